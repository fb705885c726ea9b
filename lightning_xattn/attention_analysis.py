"""The guide's analyser: statistics of attention tensors, from the same functions that the callback calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of attention rows, averaged over valid rows, then heads, then samples; NaN where undefined.

    Attributes
    ----------
    mean
        Mean weight of a row: ``1 / K`` by construction, so it says nothing about the model.
    std
        Population standard deviation of a row over its valid keys.
    max, min
        Largest and smallest weight of a row, in [0, 1].
    entropy
        Normalised Shannon entropy in [0, 1]: 0 = one key, 1 = diffuse.
    sparsity
        Percentage of valid keys below 0.1, in [0, 100].
    """

    mean: float
    std: float
    max: float
    min: float
    entropy: float
    sparsity: float

    def __getitem__(self, name: str) -> float:
        """Read a statistic by its name, as from a dict."""
        try:
            value: float = vars(self)[name]
        except KeyError:
            raise KeyError(f"No statistic '{name}'; there are {', '.join(vars(self))}.") from None
        return value
