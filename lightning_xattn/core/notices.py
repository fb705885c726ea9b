"""Notices: information and warnings to the user, once, on the first of several processes."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import traceback
import warnings
import zlib
from argparse import Namespace
from collections.abc import Hashable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any, TextIO

from lightning_utilities.core.rank_zero import WarningCache, rank_zero_only

from lightning_xattn.core.errors import XAttnError, XAttnWarning
from lightning_xattn.core.names import clean, shown

_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what is stderr when something is written, as a progress bar takes its place for a while."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # an attribute of the base
        return sys.stderr


_log = logging.getLogger("lightning_xattn")
_log.setLevel(logging.INFO)
if not logging.getLogger().hasHandlers():  # as Lightning does: who has set up logging has it all in one place
    _log.addHandler(_StandardError())
    _log.propagate = False


def named(setting: Any) -> Any:
    """A setting with the names of its callables in their places, which stay from run to run."""
    if isinstance(setting, Mapping):
        return {name: named(value) for name, value in setting.items()}
    if isinstance(setting, (list, tuple)):
        return [named(value) for value in setting]
    if isinstance(setting, partial):
        return named([setting.func, *setting.args, setting.keywords])
    if isinstance(setting, Namespace):
        return named(vars(setting))
    if isinstance(setting, FunctionType) and "<" in setting.__qualname__:
        # A lambda or a function in a function has the name of its neighbours.
        return f"{setting.__qualname__}#{zlib.crc32(str(_what_it_does(setting)).encode()):08x}"
    names_an_address = f" at {hex(id(setting))}" in repr(setting)
    if not hasattr(setting, "__qualname__") and (names_an_address or callable(setting)):
        return type(setting).__qualname__
    return getattr(setting, "__qualname__", setting)


def _what_it_does(function: FunctionType) -> list[Any]:
    """The instructions of a function and what they act on, without where it stands."""
    code, cells = function.__code__, function.__closure__ or ()
    closed = [_enclosed(cell) for cell in cells]
    return [code.co_code, code.co_names, [*map(_constant, code.co_consts)], closed, named(function.__defaults__)]


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return value.co_code
    # Strings have another order in a set in every run.
    return sorted(map(repr, value)) if isinstance(value, frozenset) else value


def _enclosed(cell: CellType) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None
    # A function that calls itself encloses itself.
    return value.__qualname__ if isinstance(value, FunctionType) else named(value)


_ADVICE = re.compile(r"weights_only|safe_globals|trusted source|_ALLOWED_INSTANTIATORS|[Ii]f you trust")


def first_line(error: BaseException) -> str:
    """What an error says in its first line: torch's go on for a page, and say what is wrong in the midst of it.

    Without torch's advice on how to have the code in a file run.
    """
    *_, said = str(error).split("WeightsUnpickler error:")
    lines = [line.strip() for line in said.strip().splitlines()] or [""]
    # "Error(s) in loading state_dict for Model:" says nothing by itself.
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    sentences = [one for one in re.split(r"(?<=[.!?]) ", line) if not _ADVICE.search(one)]
    kept = " ".join(sentences)
    # Some errors have no words, or a bare number.
    return shown(kept if re.search(r"[^\W\d]", kept) else f"{type(error).__name__}({kept})", 500)


def describe_error(error: Exception) -> str:
    """What an error says; of one that was not raised on purpose also what and where it is."""
    if isinstance(error, XAttnError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = frames[-1]
    what = f"{type(error).__name__}: {first_line(error)} ({where.filename}, line {where.lineno})."
    # Code of the user's that was called from here, such as a function that finds labels.
    ours = [i for i, frame in enumerate(frames) if frame.filename.startswith(_PACKAGE)]
    behind = frames[ours[-1] + 1 :] if ours else frames
    if any("site-packages" not in frame.filename for frame in behind):
        return f"{what} It was raised in code of yours that lightning_xattn called; your run goes on as without it."
    return f"{what} This is a fault of lightning_xattn; your run goes on as without it."


_said = WarningCache()


def begin_run() -> None:
    """Forget which notices were given: a new run may give them again."""
    _said.clear()


def is_new(about: Hashable) -> bool:
    """Whether no notice about this was given in this run; from now on one was."""
    known = about in _said
    _said.add(about)
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
