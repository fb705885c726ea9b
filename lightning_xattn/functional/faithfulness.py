"""Does an attention rank the keys that the model uses? What gets the most attention is replaced, and what gets least.

A symmetric relevance gain (Bluecher et al. 2024): where a random order gives 0 by construction, which single curves of
deletion do not. Keys are replaced by those of another sample, as masking them leaves a model with what it never saw.
"""

from __future__ import annotations

import torch
from torch import Tensor

REPLACED_SHARES = (0.25, 0.5, 0.75)
"""Shares of the keys that are replaced."""

LEAST_SAMPLES = 128
"""With fewer samples than this faithfulness is not told."""


def replacements(scores: Tensor, shuffled: Tensor) -> Tensor:
    """Which keys to replace: those of the largest scores, those of the smallest, and all.

    Of ``K`` keys a share is that of the nearest number of keys, from 1 to ``K - 1``.

    Parameters
    ----------
    scores
        ``(samples, keys)``; a key whose score is NaN is never replaced.
    shuffled
        ``(samples, keys)`` a random order of the keys, that of those with the same score: equal scores rank nothing.

    Returns
    -------
    Tensor
        ``(samples, 2 * shares + 1, keys)`` bool: for each of ``REPLACED_SHARES`` the keys of the largest scores, then
        for each those of the smallest, then all keys.

    Examples
    --------
    >>> which = replacements(torch.tensor([[0.7, 0.2, 0.1]]), shuffled=torch.tensor([[0, 1, 2]]))
    >>> which[0, 0].tolist(), which[0, -1].tolist()
    ([True, False, False], [True, True, True])
    """
    known = ~scores.isnan()
    counts = known.sum(1, keepdim=True)

    def ranks(values: Tensor) -> Tensor:
        order = shuffled.gather(1, values.gather(1, shuffled).argsort(dim=1, stable=True))
        return order.argsort(1)

    # Keys that are not known are at the end of both.
    first, last = (ranks(values.masked_fill(~known, torch.inf)) for values in (-scores, scores))
    replaced = [torch.minimum((share * counts + 0.5).long().clamp_min(1), counts - 1) for share in REPLACED_SHARES]
    chosen = [rank < count for rank in (first, last) for count in replaced]
    return torch.stack([*(one & known for one in chosen), known], dim=1)


def ranking_gain(replaced: Tensor) -> Tensor:
    """Mean over the shares of what replacing the keys of the smallest scores leaves more than that of the largest.

    Parameters
    ----------
    replaced
        ``(samples, 2 * shares + 1)`` probability of the class that is predicted for the intact sample, after each of
        `replacements`.

    Returns
    -------
    Tensor
        ``(samples,)``. Faithfulness is its mean over the mean of what it costs to replace all keys.

    Examples
    --------
    >>> ranking_gain(torch.tensor([[0.25, 0.75, 0.1]]))  # of the largest score, of the smallest, and of all
    tensor([0.5000])
    """
    most, least = replaced[:, :-1].chunk(2, dim=1)
    return (least - most).mean(1)
