"""MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_xattn.core.files import path_of
from lightning_xattn.loggers.writer import LoggerWriter, Picture


class MLFlowWriter(LoggerWriter):
    """Lightning's ``MLFlowLogger``: images by step, the rest as artifacts. Needs MLflow 2.11."""

    def log_images(self, images: Mapping[str, Picture], step: int) -> None:
        """In the tab of model metrics, with a slider for the step."""
        for name, picture in images.items():
            key = path_of(name).as_posix()  # MLflow takes letters, digits and a few signs
            self.logger.experiment.log_image(self.logger.run_id, picture, key=key, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """As an artifact."""
        self._write(name, text, step, "md")

    def log_page(self, name: str, html: str, step: int) -> None:
        """As an artifact, which MLflow shows as a page."""
        self._write(name, html, step, "html")

    def log_table(self, name: str, path: Path, step: int) -> None:
        """As an artifact."""
        self.logger.experiment.log_artifact(self.logger.run_id, str(path), path_of(name).as_posix())

    def _write(self, name: str, content: str, step: int, suffix: str) -> None:
        place = path_of(name) / f"step_{step:06d}.{suffix}"
        self.logger.experiment.log_text(self.logger.run_id, content, place.as_posix())
