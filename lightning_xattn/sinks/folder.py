"""Files in a folder, for loggers that take no pictures, and for a Trainer without any."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_xattn.files import complete_or_absent
from lightning_xattn.sinks.sink import Picture, Sink

_LONGEST = 100
"""Bytes: most file systems take 255, and of a file that is being written the name is longer."""

_DEVICES = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)


class FolderSink(Sink):
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


def path_of(name: str) -> Path:
    """A name as a path that stays in its folder and that every file system takes.

    What a file system might refuse is ``_``, and Windows' devices begin with it. So that two names do not become one
    path, a part that is cut or has lost signs ends in eight that differ: ``../a b`` is ``_/a b``, ``a?`` is
    ``a_-8b596524``.
    """
    return Path(*map(_file_name, name.split("/")))


def _file_name(part: str) -> str:
    allowed = re.sub(r"[^\w .=+-]", "_", part).strip(". ")
    allowed = f"_{allowed}" if _DEVICES.fullmatch(allowed.partition(".")[0]) else allowed
    short = allowed.encode()[:_LONGEST].decode(errors="ignore")
    if short == part or not short:
        return short or "_"
    return f"{short}-{zlib.crc32(part.encode('utf-8', 'surrogatepass')):08x}"
