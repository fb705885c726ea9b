"""Notices: information and warnings to the user, once, on the first of several processes."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
import warnings
import weakref
from collections.abc import Hashable, Iterable
from pathlib import Path

from lightning_utilities.core.rank_zero import WarningCache, rank_zero_only

from lightning_xattn.core.errors import XAttnError, XAttnWarning
from lightning_xattn.core.names import clean, shown

_given = WarningCache()
_running: weakref.WeakSet[object] = weakref.WeakSet()
"""The notices of this run that are given once: their texts, or what they are about."""

_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


class _StandardError(logging.Handler):
    """Writes to the present ``sys.stderr``, which a progress bar replaces for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # a closed pipe or a full disk ends no run
            self.handleError(record)


_log = logging.getLogger("lightning_xattn")
_log.setLevel(logging.INFO)
if not logging.getLogger().hasHandlers():  # as Lightning does: users who set up logging get it all in one place
    _log.addHandler(_StandardError())
    _log.propagate = False


_ADVICE = re.compile(r"weights_only|safe_globals|trusted source|_ALLOWED_INSTANTIATORS|[Ii]f you trust")


def first_line(error: BaseException) -> str:
    """The first line of an error that says what is wrong: torch's errors go on for a page.

    Torch's advice on how to run the code in a file is left out.
    """
    *_, text = str(error).split("WeightsUnpickler error:")
    lines = [line.strip() for line in text.strip().splitlines()] or [""]
    # "Error(s) in loading state_dict for Model:" alone does not help.
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    sentences = [one for one in re.split(r"(?<=[.!?]) ", line) if not _ADVICE.search(one)]
    kept = " ".join(sentences)
    # Some errors have no words, or a bare number.
    return shown(kept if re.search(r"[^\W\d]", kept) else f"{type(error).__name__}({kept})", 500)


def describe_error(error: Exception) -> str:
    """An error's message; of one that was not raised on purpose also its class and place."""
    if isinstance(error, XAttnError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = frames[-1]
    what = f"{type(error).__name__}: {first_line(error)} ({where.filename}, line {where.lineno})."
    # The user's code that was called from here, such as a function that finds labels.
    ours = [i for i, frame in enumerate(frames) if frame.filename.startswith(_PACKAGE)]
    behind = frames[ours[-1] + 1 :] if ours else frames
    if any("site-packages" not in frame.filename for frame in behind):
        return f"{what} It was raised in code of yours that lightning_xattn called; your run goes on as without it."
    return f"{what} This is a fault of lightning_xattn; your run goes on as without it."


def begin_run(run: object | None = None) -> None:
    """Forget which notices were given, as a new run may give them again; not while another run goes on.

    ``run`` goes on until ``end_run``, or until nobody holds it.
    """
    if not _running:
        _given.clear()
    if run is not None:
        _running.add(run)


def end_run(run: object) -> None:
    """Let the next run give its notices again."""
    _running.discard(run)


def is_new(about: Hashable) -> bool:
    """Whether no notice about this was given in this run; from now on one was."""
    known = about in _given
    _given.add(about)
    return not known


def info(messages: str | Iterable[str], once: bool | str = False) -> None:
    """Print messages that need no action, on the first process.

    Parameters
    ----------
    messages
        One or several.
    once
        True: leave out messages that this run has given before. A string: what they are about; leave them out if this
        run has given any about it.
    """
    for message in _new(messages, once):
        _log.info(clean(message))


def warn(messages: str | Iterable[str], once: bool | str = False) -> None:
    """Warn with an `XAttnWarning` at the user's line that led here, on the first process; as `info`."""
    for message in _new(messages, once):
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, contextlib.__file__)):
            frame, level = frame.f_back, level + 1
        warnings.warn(clean(message), XAttnWarning, stacklevel=level)


def _new(messages: str | Iterable[str], once: bool | str) -> list[str]:
    several = [messages] if isinstance(messages, str) else list(messages)
    if isinstance(once, str):
        several = several if several and is_new(once) else []
    elif once:
        several = [message for message in several if is_new(message)]
    # No rank is set before Lightning is imported.
    return several if getattr(rank_zero_only, "rank", 0) == 0 else []
