"""The log probabilities of a linear probe, a few samples or classes at a time: of many classes all are too many."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from lightning_xattn.core import chunks


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
        ``(n,)`` int64, ascending: the classes that any fit knows, at least one.
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
        self._score, self.samples, self.classes, self.n_classes = score, samples, classes, n_classes

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
        known = self.of_known_classes(torch.arange(self.samples) if rows is None else rows)
        found = known.new_full((len(known), self.n_classes), -math.inf)
        found[:, self.classes] = known
        found[known.isnan().any(1)] = torch.nan
        return found

    def of_known_classes(self, rows: Tensor) -> Tensor:
        """The same of ``classes`` alone: all others have minus infinity.

        Parameters
        ----------
        rows
            ``(rows,)`` int64 places of samples.
        """
        if self._whole is not None:
            return self._whole[rows]
        return torch.cat([self._compute(some) for some in rows.split(chunks.rows_at_once(len(self.classes)))])

    def of_known_class(self, places: Tensor) -> Tensor:
        """``(samples, places)`` the same of all samples and some of ``classes``.

        Parameters
        ----------
        places
            ``(places,)`` int64 the classes' places in ``classes``.
        """
        if self._whole is not None:
            return self._whole[:, places]
        rows = torch.arange(self.samples).split(chunks.rows_at_once(len(places)))
        return torch.cat([self._score(some, places) for some in rows]) - self._normaliser[:, None]

    @cached_property
    def _whole(self) -> Tensor | None:
        """All log probabilities of known classes, where they are few."""
        few = self.samples * len(self.classes) <= chunks.KEPT_CELLS
        return self._compute(torch.arange(self.samples)) if few else None

    @cached_property
    def _normaliser(self) -> Tensor:
        """``(samples,)`` the logarithm of the sum of the exponentials of a sample's scores."""
        rows = torch.arange(self.samples).split(chunks.rows_at_once(len(self.classes)))
        return torch.cat([self._score(some, slice(None)).logsumexp(1) for some in rows])

    def _compute(self, rows: Tensor) -> Tensor:
        return self._score(rows, slice(None)).log_softmax(1)
