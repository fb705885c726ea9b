"""Files in a folder, for loggers that take no pictures, and for a Trainer without any."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_xattn.core.files import complete_or_absent, path_of
from lightning_xattn.loggers.writer import LoggerWriter, Picture


class FolderWriter(LoggerWriter):
    """Writes ``<folder>/<name>/step_<step>.png``, ``.md`` and ``.html``, each complete or absent.

    Parameters
    ----------
    logger
        The logger; None without any.
    folder
        Where to write.
    """

    def __init__(self, logger: Any, folder: Path) -> None:
        super().__init__(logger)
        self.folder = folder

    def log_images(self, images: Mapping[str, Picture], step: int) -> None:
        """One file each."""
        for name, picture in images.items():
            self._write(name, step, "png", picture)

    def log_text(self, name: str, text: str, step: int) -> None:
        """One file."""
        self._write(name, step, "md", text)

    def log_page(self, name: str, html: str, step: int) -> None:
        """One file."""
        self._write(name, step, "html", html)

    def _write(self, name: str, step: int, suffix: str, content: Picture | str) -> None:
        with complete_or_absent(self.folder / path_of(name) / f"step_{step:06d}.{suffix}") as part:
            if isinstance(content, str):
                part.write_text(content, encoding="utf-8")
            else:
                Image.fromarray(content).save(part, format="png")
