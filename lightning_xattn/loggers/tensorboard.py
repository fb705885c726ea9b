"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_xattn.core.files import complete_or_absent, path_of
from lightning_xattn.loggers.writer import LoggerWriter, Picture


class TensorBoardWriter(LoggerWriter):
    """Lightning's ``TensorBoardLogger``: images and text; pages lie in its folder."""

    def log_images(self, images: Mapping[str, Picture], step: int) -> None:
        """In the images tab."""
        for name, picture in images.items():
            self.logger.experiment.add_image(name, picture, global_step=step, dataformats="HWC")

    def log_text(self, name: str, text: str, step: int) -> None:
        """In the text tab."""
        self.logger.experiment.add_text(name, text, global_step=step)

    def log_page(self, name: str, html: str, step: int) -> None:
        """A file beside the event file: TensorBoard shows no pages."""
        with complete_or_absent(Path(self.logger.log_dir) / path_of(f"{name}.html")) as part:
            part.write_text(html, encoding="utf-8")
