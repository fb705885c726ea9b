"""Progress of long work: a bar in a terminal; in a command one line with what was done and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from lightning_xattn.core.names import clean

_prints = ContextVar("prints", default=False)

Item = TypeVar("Item")


def track(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items while a bar in the terminal shows how many there were; elsewhere time them, see ``timed``.

    Parameters
    ----------
    items
        What is worked on, one after the other.
    title
        What is done, e.g. ``"Simulating 480 recordings"``.
    total
        How many items there are; None: their length, where they have one.
    """
    # Imported here as only long work needs it.
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track as track_in_terminal

    console = Console()
    if console.is_terminal:
        yield from track_in_terminal(items, escape(clean(title)), total, console=console)
    else:
        with timed(title):
            yield from items


@contextmanager
def timed(title: str) -> Iterator[None]:
    """Report what was done and how long it took, unless it fails."""
    started = time.monotonic()
    yield
    report_time(title, started)


def report_time(title: str, started: float) -> None:
    """In a command, print what was done, and the seconds since ``started``."""
    if _prints.get():
        print(f"{clean(title)}: {time.monotonic() - started:.0f} s", flush=True)


@contextmanager
def printed_times() -> Iterator[None]:
    """Have ``report_time`` print, as a command does."""
    before = _prints.set(True)
    try:
        yield
    finally:
        _prints.reset(before)
