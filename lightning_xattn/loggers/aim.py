"""Aim."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from lightning_xattn.loggers.writer import LoggerWriter, Picture


class AimWriter(LoggerWriter):
    """Aim's own ``AimLogger``: images and texts by step."""

    def log_images(self, images: Mapping[str, Picture], step: int) -> None:
        """In the images explorer."""
        from aim import Image as AimImage  # only where there is its logger

        for name, picture in images.items():
            self.logger.experiment.track(AimImage(Image.fromarray(picture)), name=name, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """In the run's texts."""
        from aim import Text

        self.logger.experiment.track(Text(text), name=name, step=step)

    def log_page(self, name: str, html: str, step: int) -> None:
        """In the run's texts: Aim shows no pages."""
        self.log_text(name, html, step)
