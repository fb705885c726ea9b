"""What warnings, reports and figures say in the same words, how they write numbers, and how users are warned."""

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
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any, TextIO

from pytorch_lightning.utilities import rank_zero_only

from lightning_xattn.errors import XAttnError, XAttnWarning
from lightning_xattn.names import clean, shown

_PACKAGE = f"{Path(__file__).parent}{os.sep}"


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

SINGLE_KEY = "a single key, so every weight is 1 whatever the model learned"
"""Why such attention says nothing; reads on from "attend to", "with", or by itself."""

SINGLE_KEY_REMEDY = "To see attention, fuse token sequences: pool after the fusion, not before it."

SINGLE_KEYS = (
    f"attend to {SINGLE_KEY}. Entropy, selectivity and alignment are undefined and left out. {SINGLE_KEY_REMEDY}"
)
"""What is wrong with directions of single keys, and the remedy; follows their names."""


def say_wholly_masked(layer: str, masked: int, samples: int) -> str:
    """What a user should know of samples that have no attention across, as a sentence or two."""
    return (
        f"Layer '{layer}': one modality is wholly masked in {masked} of {samples} samples: none of its tokens is real, "
        "or seen. These samples have no attention across and are in no number of it. If the modality is there, look at "
        "the masks."
    )


BROKEN_ROWS = (
    "have rows that are not finite or do not sum to 1: they are left out, and where none is left every number is "
    "undefined. Pass weights after the softmax and before any dropout, as of a model in eval mode."
)
"""What is wrong with weights that are not attention, and the remedy; follows their names."""


def describe_size(samples: int, groups: int | None, group_noun: str | None) -> str:
    """How many samples there are, and of how many groups where these are known."""
    return f"{samples} samples" + (f" of {groups} {group_noun}" if group_noun else "")


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


def decimal(value: float, digits: int = 2, signed: bool = False) -> str:
    """Write a number with so many digits after the point, never as -0.00.

    ``signed``: with a plus before what is not negative.
    """
    return f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}"


def percent(share: float, digits: int = 1) -> str:
    """Write a share of 1 in percent, with so many digits after the point: 0.975 as ``97.5 %``."""
    return f"{decimal(100 * share, digits)} %"


def say_interval(low: float, high: float, digits: int = 3, as_percent: bool = False) -> str:
    """An interval in words; one that has no width in so many digits does not seem to be certain."""
    scale, unit = (100, " %") if as_percent else (1, "")
    first, last = decimal(scale * low, digits), decimal(scale * high, digits)
    if first == last:
        return f"± less than {decimal(10.0**-digits, digits)}{unit}"
    return f"{first} to {last}{unit}"


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """The names that have each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def name_modality(name: str) -> str:
    """``eeg`` as EEG and ``spec`` as Spec, as the guide writes them; a name with capitals of its own stays."""
    name = shown(name)
    if not name.isalpha() or name != name.lower():
        return name
    return name.upper() if len(name) <= 3 else name.capitalize()


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


def tell(messages: Iterable[str]) -> None:
    """Say each in the terminal, on the first of several processes: what users need not act on."""
    for message in messages:
        if _is_first_process():
            _log.info(clean(message))


def warn(messages: Iterable[str]) -> None:
    """Warn of each, on the first of several processes, at the line outside of the package that led here."""
    for message in messages:
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, contextlib.__file__)):
            frame, level = frame.f_back, level + 1
        if _is_first_process():
            warnings.warn(clean(message), XAttnWarning, stacklevel=level)


def _is_first_process() -> bool:
    return bool(getattr(rank_zero_only, "rank", 0) == 0)
