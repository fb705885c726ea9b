"""Files that are complete or absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        Where to write. The name is hidden and has another suffix, so tell the format to what tells it by the suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
