"""Words, numbers and intervals that reports, figures and notices write in the same way."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_xattn.core.names import shown

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


def decimal(value: float, digits: int = 2, signed: bool = False) -> str:
    """Write a number with ``digits`` digits after the point, never as -0.00.

    ``signed``: with a plus before what is not negative.
    """
    return f"{round(value, digits) + 0.0:{'+' if signed else ''}.{digits}f}"


def percent(share: float, digits: int = 1) -> str:
    """Write a share of 1 in percent, with ``digits`` digits after the point: 0.975 as ``97.5 %``."""
    return f"{decimal(100 * share, digits)} %"


def say_interval(low: float, high: float, digits: int = 3, as_percent: bool = False) -> str:
    """An interval in words; one without width in these digits is given as "± less than"."""
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
