"""The history as a checkpoint has it: small after a thousand validations."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_xattn.evaluation.curves import main_names

_ENDS = re.compile("_(low|high)$")


def main_history(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give the records without curves that ``curves="main"`` does not log; the ends of intervals stay with the rest.

    Most of a record are the curves of heads and of many classes.
    """
    curves = {name for one in records for name in one if "/" in name}
    kept = main_names(_ENDS.sub("", name) for name in curves)
    dropped = {name for name in curves if _ENDS.sub("", name) not in kept}
    # A checkpoint stores each name once if it is one object.
    return [{sys.intern(name): value for name, value in one.items() if name not in dropped} for one in records]
