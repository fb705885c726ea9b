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
"""In bytes. Most file systems take 255, and the name of a file that is being written is longer."""

_DEVICES = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Write a file under a hidden name beside its own; rename it when it is whole, remove it on failure.

    A reader never sees half a file, and a file that was there stays until the new one is whole.

    Parameters
    ----------
    path
        The file; its folder is made when it does not exist.

    Yields
    ------
    Path
        Where to write: ``hidden_part(path)``. Its suffix is another one, so name the format where a suffix would.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = hidden_part(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def hidden_part(path: Path) -> Path:
    """The name of a file until it is whole: hidden, beside its own, with the process that writes it."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")


def remove_dead_parts(folder: Path) -> None:
    """Remove the parts that killed processes of this machine left behind."""
    for part in folder.glob(f".*.{socket.gethostname()}.*.part"):
        process = part.name.split(".")[-2]
        if not _is_running(int(process)):
            part.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if sys.platform == "win32":  # where os.kill would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def path_of(name: str) -> Path:
    """A name as a path that stays in its folder and that every file system takes.

    Characters that a file system might refuse become ``_``, which is also put before the names of Windows' devices. A
    part that is cut or changed ends in eight characters of a hash, so that two names do not become one path:
    ``../a b`` is ``_/a b``, ``a?`` is ``a_-8b596524``.
    """
    return Path(*map(_file_name, name.split("/")))


def _file_name(part: str) -> str:
    allowed = re.sub(r"[^\w .=+-]", "_", part).strip(". ")
    allowed = f"_{allowed}" if _DEVICES.fullmatch(allowed.partition(".")[0]) else allowed
    short = allowed.encode()[:_LONGEST].decode(errors="ignore")
    if short == part or not short:
        return short or "_"
    return f"{short}-{zlib.crc32(part.encode('utf-8', 'surrogatepass')):08x}"
