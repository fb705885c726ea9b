"""The guide's analyser: statistics of attention tensors, from the same functions that the callback calls.

Weights are a tensor ``(batch, heads, queries, keys)``, in which every token counts as real, or an ``Attention``, which
has its masks: ``results["attention"]`` of the explainer holds these. Rows that are not attention (not finite, or not
summing to 1) are left out; an undefined number is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from torch import Tensor

from lightning_xattn.core.attention import Attention, AttentionPair, Direction
from lightning_xattn.core.errors import SettingError, check_whole_number
from lightning_xattn.core.notices import warn
from lightning_xattn.core.wording import BROKEN_ROWS, SINGLE_KEYS
from lightning_xattn.evaluation.results import AttentionStatistics
from lightning_xattn.functional import (
    ROW_STATISTICS,
    Rows,
    alignment,
    has_single_keys,
    head_top_pairs,
    prepare_rows,
    query_selectivity,
    require_heads,
    top_pairs,
)

__all__ = [
    "AttentionAnalyzer",
    "AttentionStatistics",
    "HeadAnalysis",
    "head_wise_attention_analysis",
]

Weights = Tensor | Attention


class HeadAnalysis(TypedDict):
    """One head of one direction, over a batch.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])  # one sample, one head, two queries, two keys
    >>> analysed = head_wise_attention_analysis({"eeg_to_spec": weights})["eeg_to_spec"][0]
    >>> round(analysed["specialization_score"], 3), round(analysed["effective_keys"], 3)
    (0.5, 1.5)
    """

    specialization_score: float
    """The head's entropy, in [0, 1]: lower is more specialised."""
    attention_stats: AttentionStatistics
    effective_keys: float
    """The number of keys that a row uses, in [1, K]."""
    query_selectivity: float
    """In [0, 1]; 0: all queries have the same attention, so the head is a fixed pooling."""
    top_pairs: list[tuple[int, int, float]]
    """(query, key, weight) of the head's mean map, the largest weight first."""


class AttentionAnalyzer:
    """Statistics of attention weights.

    Parameters
    ----------
    num_heads
        The number of heads that the weights must have; None: any number.

    Raises
    ------
    SettingError
        If ``num_heads`` is no whole number >= 1. The methods raise it if the weights are neither a tensor nor an
        ``Attention``, or have another number of heads.

    Examples
    --------
    >>> weights = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])  # one sample, one head, two queries, two keys
    >>> analyzer = AttentionAnalyzer(num_heads=1)
    >>> analyzer.get_top_attention_pairs(weights, top_k=2)  # query, key, weight
    [(1, 0, 1.0), (0, 0, 0.5)]
    >>> round(analyzer.compute_attention_entropy(weights), 3)
    0.5
    """

    def __init__(self, num_heads: int | None = None) -> None:
        check_whole_number("num_heads", num_heads, optional=True)
        self.num_heads = num_heads

    def __repr__(self) -> str:
        return f"AttentionAnalyzer(num_heads={self.num_heads})"

    def analyze_attention_weights(self, weights: Weights) -> AttentionStatistics:
        """Statistics of a batch, averaged over rows, then heads, then samples."""
        rows = self._rows(weights)
        _warn_of({"These weights": rows})
        return AttentionStatistics.of_batch(rows)

    def get_top_attention_pairs(self, weights: Weights, top_k: int = 5) -> list[tuple[int, int, float]]:
        """(query, key, weight) of the mean over batch and heads, the largest weight first; at most ``top_k``."""
        check_whole_number("top_k", top_k)
        rows = self._rows(weights)
        _warn_of({"These weights": rows}, of_single_keys=False)  # the only pair is the top one
        return [pair[:3] for pair in top_pairs(rows, top_k)]

    def compute_attention_entropy(self, weights: Weights, per_head: bool = False) -> float | dict[int, float]:
        """Entropy in [0, 1], averaged over rows and samples: the mean over heads, or ``{head: entropy}``."""
        rows = self._rows(weights)
        _warn_of({"These weights": rows})
        entropy = ROW_STATISTICS["entropy"](rows)
        if per_head:
            return dict(enumerate(entropy.cpu().double().nanmean(0).tolist()))
        return float(entropy.nanmean(1).cpu().double().nanmean())

    def compare_modality_agreement(self, eeg_to_spec: Weights, spec_to_eeg: Weights) -> float:
        """Alignment of the two directions, in [-1, 1], averaged over the samples for which it is defined.

        Pearson correlation of the head-averaged maps, one of them transposed; ``functional.directions`` gives it by
        sample. NaN if it is defined for no sample, as with a single key.

        Raises
        ------
        ShapeError
            If the queries of one direction are not the keys of the other.
        """
        forward = _as_attention(eeg_to_spec)
        backward = _as_attention(spec_to_eeg, str(forward.direction.opposite))
        pair = AttentionPair("the two directions", forward, backward)
        rows = {str(attention.direction): self._rows(attention) for attention in pair.directions}
        _warn_of(rows)
        return float(alignment(*rows.values()).cpu().double().nanmean())

    def _rows(self, weights: Weights) -> Rows:
        return _prepare(weights, self.num_heads, "These weights")


def head_wise_attention_analysis(
    attention_dict: Mapping[str, Weights], num_heads: int | None = None, top_k: int = 5
) -> dict[str, dict[int, HeadAnalysis]]:
    """The analysis of each head of each direction.

    Parameters
    ----------
    attention_dict
        Weights by direction, ``{"eeg_to_spec": ..., "spec_to_eeg": ...}``; a second layer's as ``<layer>/<direction>``.
    num_heads
        The number of heads that each direction must have; None: any number.
    top_k
        The number of pairs to name.

    Returns
    -------
    dict
        ``{direction: {head: HeadAnalysis}}``, averages over the batch.

    Raises
    ------
    SettingError
        If a direction has another number of heads, a name is no direction, or a number is no whole number >= 1.
    ShapeError
        If weights do not have four axes.

    Examples
    --------
    >>> weights = torch.tensor([[[[1.0, 0.0]], [[0.5, 0.5]]]])  # two heads: one key, and all
    >>> analysed = head_wise_attention_analysis({"eeg_to_spec": weights})["eeg_to_spec"]
    >>> [abs(round(one["specialization_score"], 3)) for one in analysed.values()]
    [0.0, 1.0]
    """
    check_whole_number("num_heads", num_heads, optional=True)
    check_whole_number("top_k", top_k)
    prepared = {
        name: _prepare(_as_attention(weights, name), num_heads, name) for name, weights in attention_dict.items()
    }
    _warn_of(prepared)
    return {name: _analyse_heads(rows, top_k) for name, rows in prepared.items()}


_NAMES = tuple(AttentionStatistics.__dataclass_fields__)


def _analyse_heads(rows: Rows, top_k: int) -> dict[int, HeadAnalysis]:
    names = (*_NAMES, "effective_keys")
    values = {name: ROW_STATISTICS[name](rows).cpu().double().nanmean(0).tolist() for name in names}
    selectivity = query_selectivity(rows).cpu().double().nanmean(0).tolist()
    return {
        head: {
            "specialization_score": values["entropy"][head],
            "attention_stats": AttentionStatistics(**{name: values[name][head] for name in _NAMES}),
            "effective_keys": values["effective_keys"][head],
            "query_selectivity": selectivity[head],
            "top_pairs": [pair[:3] for pair in pairs],
        }
        for head, pairs in enumerate(head_top_pairs(rows, top_k))
    }


def _prepare(weights: Weights, num_heads: int | None, name: str) -> Rows:
    attention = _as_attention(weights)
    require_heads(num_heads, attention.shape[1], name)
    return prepare_rows(attention)


def _as_attention(weights: Weights, name: str = "query_to_key") -> Attention:
    if isinstance(weights, Attention):
        return weights
    if not isinstance(weights, Tensor):
        raise SettingError(
            f"Weights must be a tensor (batch, heads, queries, keys) or an Attention; got a {type(weights).__name__}. "
            "torch.as_tensor(weights) makes one."
        )
    return Attention.of_weights(Direction.parse(name.rpartition("/")[2]), weights)


def _warn_of(prepared: Mapping[str, Rows], of_single_keys: bool = True) -> None:
    """Warn of rows that make numbers undefined, once for all directions."""
    broken = [name for name, rows in prepared.items() if rows.broken.any()]
    single = [name for name, rows in prepared.items() if of_single_keys and has_single_keys(rows)]
    warn(f"{' and '.join(names)} {what}" for names, what in ((broken, BROKEN_ROWS), (single, SINGLE_KEYS)) if names)
