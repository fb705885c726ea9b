"""Progress of long work: one line says what was done and how long it took; in a terminal a bar shows how far it is."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lightning_xattn.core.names import clean

_log = logging.getLogger(__name__)


class Stage:
    """Something that takes long, as a context.

    Where stdout is no terminal a library has nothing to say there: the line is then a record of the logger
    ``lightning_xattn.core.progress`` at level DEBUG, which the commands print.

    Parameters
    ----------
    title
        What is done, e.g. ``"Simulating 480 recordings"``. It may be changed until the end.
    total
        How many steps it takes; None: that is not known.
    done
        How many of them an earlier run has made.
    shown
        Whether anything is said at all.
    """

    def __init__(self, title: str, total: int | None = None, done: int = 0, shown: bool = True) -> None:
        self.title = title
        self._shown = shown
        self._console = Console(highlight=False)
        self._is_drawn = shown and self._console.is_terminal
        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
        columns += (
            [TimeElapsedColumn()] if total is None else [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        )
        self._bar = Progress(*columns, console=self._console, refresh_per_second=2, transient=True)
        self._task = self._bar.add_task(clean(title), total=total, completed=done)

    def __enter__(self) -> Stage:
        self._started = time.monotonic()
        if self._is_drawn:
            self._bar.start()
        return self

    def advance(self, steps: int = 1) -> None:
        """So many more steps are made."""
        self._bar.advance(self._task, steps)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_drawn:
            self._bar.stop()
        if kind is not None or not self._shown:  # what went wrong has its own words
            return
        line = f"{clean(self.title)}: {time.monotonic() - self._started:.0f} s"
        if self._is_drawn:
            self._console.print(Text(line))
        else:
            _log.debug(line)


@contextmanager
def printed_stages() -> Iterator[None]:
    """Print the lines of all stages, where stdout is no terminal too: as a command does."""
    handler, level, propagate = logging.StreamHandler(sys.stdout), _log.level, _log.propagate
    _log.addHandler(handler)
    _log.setLevel(logging.DEBUG)
    _log.propagate = False
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)
        _log.propagate = propagate
