"""The log probabilities of a linear probe, a few samples or classes at a time: of many classes all are too many."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

CELLS = 2**20
"""So many numbers of samples x classes are computed at once, 8 MB."""

KEPT_CELLS = 2**23
"""So many are kept where they are needed again, 64 MB; where there are more, they are computed again."""


def rows_at_once(n_classes: int) -> int:
    """How many samples' scores are computed at once."""
    return max(1, CELLS // max(1, n_classes))


class LinearProbe:
    """What a modality's probe predicts of each sample.

    Parameters
    ----------
    score
        Gets places of samples ``(rows,)``, and which of ``classes``: their places, or a slice. Gives float64 scores
        ``(rows, classes)``, whose softmax over all classes are the probabilities; minus infinity for a class that the
        sample's fit does not know; NaN of a sample that it cannot read.
    samples
        How many samples there are.
    classes
        ``(n,)`` int64, ascending: the classes that are known to any fit.
    n_classes
        How many classes there are.

    Examples
    --------
    >>> table = torch.tensor([[1.0, 1.0], [0.0, 9.0]]).double()  # scores of classes 0 and 2
    >>> probe = LinearProbe(lambda rows, classes: table[rows][:, classes], 2, torch.tensor([0, 2]), n_classes=3)
    >>> probe.log_probabilities(torch.tensor([0])).exp().tolist()
    [[0.5, 0.0, 0.5]]
    """

    def __init__(
        self, score: Callable[[Tensor, Tensor | slice], Tensor], samples: int, classes: Tensor, n_classes: int
    ) -> None:
        self._score, self.samples, self._classes, self.n_classes = score, samples, classes, n_classes

    def log_probabilities(self, rows: Tensor | None = None) -> Tensor:
        """Log probabilities of all classes.

        Parameters
        ----------
        rows
            ``(rows,)`` int64 places of samples; None: all.

        Returns
        -------
        Tensor
            ``(rows, n_classes)`` float64, natural logarithms, as a probability far from the data is too small for a
            number; minus infinity for a class that the sample's fit does not know; NaN where a sample cannot be read.
        """
        if self._whole is not None:
            return self._whole if rows is None else self._whole[rows]
        rows = torch.arange(self.samples) if rows is None else rows
        return torch.cat([self._compute(some) for some in rows.split(rows_at_once(self.n_classes))])

    def of_classes(self, classes: Tensor) -> Tensor:
        """Log probabilities of some classes, ``(samples, classes)``, as those of all.

        Parameters
        ----------
        classes
            ``(classes,)`` int64 class ids.
        """
        if self._whole is not None:
            return self._whole[:, classes]
        found = torch.full((self.samples, len(classes)), -math.inf, dtype=torch.float64)
        place = torch.searchsorted(self._classes, classes).clamp_max(max(0, len(self._classes) - 1))
        known = self._classes[place] == classes if len(self._classes) else torch.zeros_like(classes, dtype=torch.bool)
        for rows in torch.arange(self.samples).split(rows_at_once(len(classes))):
            found[rows[:, None], known.nonzero()[:, 0]] = self._score(rows, place[known])
        found -= self._normaliser[:, None]
        return found

    @cached_property
    def _whole(self) -> Tensor | None:
        """All log probabilities, where they are few."""
        if self.samples * self.n_classes > KEPT_CELLS:
            return None
        return self._compute(torch.arange(self.samples))

    @cached_property
    def _normaliser(self) -> Tensor:
        """``(samples,)`` the logarithm of the sum of the exponentials of a sample's scores."""
        rows = torch.arange(self.samples).split(rows_at_once(len(self._classes)))
        return torch.cat([self._score(some, slice(None)).logsumexp(1) for some in rows])

    def _compute(self, rows: Tensor) -> Tensor:
        scores = self._score(rows, slice(None)).log_softmax(1)
        found = scores.new_full((len(rows), self.n_classes), -math.inf)
        if len(self._classes):
            found[:, self._classes] = scores
        found[scores.isnan().any(1)] = torch.nan
        return found
