"""Files that are complete or absent."""

from __future__ import annotations

import os
import re
import socket
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LONGEST = 100
"""Bytes: most file systems take 255, and of a file that is being written the name is longer."""

_DEVICES = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Write a file under another name beside its own, which it gets when it is whole; on failure it is removed.

    So a reader never sees half a file, and a file that was there stays until the new one is whole.

    Parameters
    ----------
    path
        The file; its folder is made when it does not exist.

    Yields
    ------
    Path
        Where to write: ``hidden_part(path)``. It has another suffix, so tell the format to what tells it by the suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = hidden_part(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def hidden_part(path: Path) -> Path:
    """What a file is called until it is whole: hidden, beside its own name, and telling which process writes it."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")


def remove_dead_parts(folder: Path) -> None:
    """Remove what processes of this machine left behind that were killed while they wrote."""
    for part in folder.glob(f".*.{socket.gethostname()}.*.part"):
        process = part.name.split(".")[-2]
        if not _is_running(int(process)):
            part.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if sys.platform == "win32":  # where this question would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


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
