"""Comet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from lightning_xattn.loggers.writer import LoggerWriter, Picture


class CometWriter(LoggerWriter):
    """Lightning's ``CometLogger``: images by step, the rest as assets."""

    def log_images(self, images: Mapping[str, Picture], step: int) -> None:
        """In the graphics tab."""
        for name, picture in images.items():
            # Of an array it computes -1 - x, which overflows, and says so in its log alone.
            self.logger.experiment.log_image(Image.fromarray(picture), name=name, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """As an asset."""
        self.logger.experiment.log_asset_data(text, name=f"{name}.md", step=step)

    def log_page(self, name: str, html: str, step: int) -> None:
        """As an asset."""
        self.logger.experiment.log_asset_data(html, name=f"{name}.html", step=step)

    def log_table(self, name: str, path: Path, step: int) -> None:
        """As an asset."""
        self.logger.experiment.log_asset(str(path), file_name=f"{name}/{path.name}", step=step)
