"""What the figures of attention take: a guide-style dict of weights, or a pair with its masks."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch

from lightning_xattn.core.attention import Attention, AttentionPair, Direction, TokenAxis
from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.notices import warn
from lightning_xattn.core.wording import BROKEN_ROWS
from lightning_xattn.functional import Rows, prepare_rows
from lightning_xattn.visualizations.drawing import MapAxis, place_tokens

AttentionDict = Mapping[str, Any] | AttentionPair
"""Weights ``(batch, heads, queries, keys)`` by direction, e.g. ``{'eeg_to_spec': ..., 'spec_to_eeg': ...}``, where keys
with a slash belong to later layers and are passed over, and NaN marks what a mask hides; or one layer's pair."""


def read_pair(attention: AttentionDict) -> tuple[Rows, ...]:
    """The first layer's directions, made ready for statistics on the CPU.

    Raises
    ------
    SettingError
        If there is no direction, more than two, or a name that is not one.
    ShapeError
        If the directions do not fit each other.
    """
    if not isinstance(attention, AttentionPair):
        first = {name: weights for name, weights in attention.items() if "/" not in name}
        if len(first) not in (1, 2):
            raise SettingError(
                "Expected one direction or both, e.g. {'eeg_to_spec': weights, 'spec_to_eeg': weights} (names with '/' "
                f"belong to later layers); got {', '.join(attention) or 'none'}."
            )
        directions = [Attention.of_weights(Direction.parse(name), torch.as_tensor(w)) for name, w in first.items()]
        attention = AttentionPair("attention_dict", *directions)
    pair = tuple(prepare_rows(direction.cpu()) for direction in attention.directions)
    warn_of_broken_rows(*pair)
    return pair


def warn_of_broken_rows(*pair: Rows) -> None:
    """Warn of weights that are not attention, as a figure of them may be all undefined."""
    broken = [str(rows.direction) for rows in pair if rows.broken.any()]
    if broken:
        warn([f"{' and '.join(broken)} {BROKEN_ROWS}"])


def read_both(attention: AttentionDict, what: str) -> tuple[Rows, Rows]:
    """The first layer's two directions, for ``what`` compares them."""
    rows = read_pair(attention)
    if len(rows) == 1:
        raise SettingError(f"{what} compares two directions; got {rows[0].direction} alone.")
    return rows[0], rows[1]


def check_sample(sample_idx: int, samples: int) -> int:
    """Return the sample's index if there is such a sample."""
    if not _is_place(sample_idx, samples):
        raise SettingError(
            f"sample_idx must be 0 to {samples - 1}, a whole number, as there are {samples} samples; got "
            f"{sample_idx!r}."
        )
    return sample_idx


def check_head(head: int | None, heads: int) -> None:
    """Refuse a head that does not exist; None is the mean over heads."""
    if head is not None and not _is_place(head, heads):
        raise SettingError(f"head must be 0 to {heads - 1}, a whole number, or None (mean over heads); got {head!r}.")


def _is_place(index: object, count: int) -> bool:
    """Whether it is an index below ``count``; True and False are none."""
    return isinstance(index, Integral) and not isinstance(index, bool) and 0 <= int(index) < count


def place_pair(rows: Rows, axes: Mapping[str, TokenAxis] | None) -> tuple[MapAxis, MapAxis]:
    """Place the queries and the keys of a direction on the axes of their modalities."""
    direction, axes = rows.direction, axes or {}
    queries = place_tokens("query", direction.query, rows.attention.shape[2], axes.get(direction.query))
    return queries, place_tokens("key", direction.key, rows.tokens, axes.get(direction.key))
