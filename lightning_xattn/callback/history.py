"""The history of a callback as its checkpoint has it: a table in plain types, small after a thousand validations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_xattn.evaluation.curves import main_names

_ENDS = re.compile("_(low|high)$")

_ABSENT = "<absent>"
"""In a column of other things: the record has none."""


def pack_history(records: Sequence[Mapping[str, Any]], keeps_all: bool) -> dict[str, Any]:
    """Records as columns: whole numbers, other numbers in single precision, and whatever else there is.

    Parameters
    ----------
    records
        The history.
    keeps_all
        Whether everything is kept, and not the curves that are acted on alone, with their intervals. The curves of many
        layers, classes and heads are most of it.
    """
    names = list(dict.fromkeys(name for one in records for name in one))
    kept = main_names(_ENDS.sub("", name) for name in names if "/" in name)
    names = [name for name in names if keeps_all or "/" not in name or _ENDS.sub("", name) in kept]
    columns: dict[str, list[str]] = {"whole": [], "single": [], "other": []}
    for name in names:
        values = [one[name] for one in records if name in one]
        # What a record lacks is NaN in its column, which whole numbers do not have.
        if all(type(value) is int for value in values) and len(values) == len(records):
            columns["whole"].append(name)
        else:
            columns["single" if all(type(value) is float for value in values) else "other"].append(name)
    return {
        "names": columns,
        "whole": torch.tensor([[one[name] for name in columns["whole"]] for one in records], dtype=torch.int64),
        "single": torch.tensor([[one.get(name, torch.nan) for name in columns["single"]] for one in records]),
        # Apart from what is undefined, which is NaN, too.
        "has": torch.tensor([[name in one for name in columns["single"]] for one in records], dtype=torch.bool),
        "other": [[one.get(name, _ABSENT) for one in records] for name in columns["other"]],
    }


def unpack_history(packed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records that `pack_history` packed."""
    names = packed["names"]
    records = [dict(zip(names["whole"], row, strict=True)) for row in packed["whole"].tolist()]
    for record, row, has in zip(records, packed["single"].tolist(), packed["has"].tolist(), strict=True):
        record |= {name: value for name, value, there in zip(names["single"], row, has, strict=True) if there}
    for name, values in zip(names["other"], packed["other"], strict=True):
        for record, value in zip(records, values, strict=True):
            if value != _ABSENT:
                record[name] = value
    return records
