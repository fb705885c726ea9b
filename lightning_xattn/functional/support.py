"""Who agrees with a prediction? The modalities' linear probes, held against it and against the true class."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_LOG_PROBABILITY = -15.0
"""The least that a modality adds to the support of a prediction, in nats: a probability of 3e-7."""


def supports(probes: Tensor, predicted: Tensor) -> Tensor:
    """Whether each modality supports the prediction: the most probable class of its probe is the predicted one.

    Parameters
    ----------
    probes
        ``(modalities, samples, classes)`` log probabilities, or probabilities, which do not show what a fit has not
        seen.
    predicted
        ``(samples,)`` int64 class ids; a class outside of the probes' classes is not known.

    Returns
    -------
    Tensor
        ``(modalities, samples)`` 1 or 0; NaN where the prediction is not known, the probe is undefined, or its fit has
        not seen the predicted class.

    Examples
    --------
    >>> probes = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]])  # of two modalities, for one sample
    >>> supports(probes, predicted=torch.tensor([0])).tolist()
    [[1.0], [0.0]]
    """
    known = ~probes.isnan().any(2) & (predicted >= 0) & (predicted < probes.shape[2])
    # A fit that has not seen the class cannot tell.
    known &= _of_class(probes, predicted) > -torch.inf
    return torch.where(known, (probes.argmax(2) == predicted).to(probes.dtype), torch.nan)


def support(probes: Tensor, predicted: Tensor) -> Tensor:
    """How much the modalities support the prediction: ``sum_m max(ln p_m(predicted), -15)``, in nats.

    Parameters
    ----------
    probes
        ``(modalities, samples, classes)`` log probabilities; minus infinity for a class that a fit has not seen.
    predicted
        As `supports` takes it.

    Returns
    -------
    Tensor
        ``(samples,)`` at most 0: all probes are certain of the prediction. NaN where `supports` is for a modality.

    Examples
    --------
    >>> probes = torch.tensor([[[0.5, 0.5]], [[0.2, 0.8]]]).log()
    >>> support(probes, predicted=torch.tensor([0]))  # ln 0.5 + ln 0.2
    tensor([-2.3026])
    """
    known = ~probes.isnan().any(2).any(0) & (predicted >= 0) & (predicted < probes.shape[2])
    of_class = _of_class(probes, predicted)
    known &= (of_class > -torch.inf).all(0)
    return torch.where(known, of_class.clamp_min(LEAST_LOG_PROBABILITY).sum(0), torch.nan)


def _of_class(probes: Tensor, class_ids: Tensor) -> Tensor:
    """``(modalities, samples)`` what the probes give these classes; of an unknown class, anything."""
    place = torch.where((class_ids >= 0) & (class_ids < probes.shape[2]), class_ids, 0)
    return probes.gather(2, place.expand(len(probes), -1)[..., None])[..., 0]


def support_cells(probes: Tensor, predicted: Tensor) -> Tensor:
    """Which modalities support each prediction, as the number of a cell.

    Parameters
    ----------
    probes, predicted
        As `supports` takes them, of at least two modalities.

    Returns
    -------
    Tensor
        ``(samples,)`` int64. Of two modalities, 0: both support it, 1: only the first, 2: only the second. Of M > 2
        modalities, the number of those that do not, 0 to M - 1. Then, where none supports it, the next number if all
        probes have one most probable class, and the last if they differ. -1 where the prediction is not known or a
        probe is undefined.

    Examples
    --------
    >>> probes = torch.tensor([[[0.9, 0.1, 0.0]] * 3, [[0.8, 0.2, 0.0], [0.3, 0.7, 0.0], [0.3, 0.7, 0.0]]])
    >>> support_cells(probes, predicted=torch.tensor([1, 1, 2])).tolist()  # the two agree; only the second; none
    [3, 2, 4]
    """
    supported, most_probable = supports(probes, predicted), probes.argmax(2)
    differ = (most_probable != most_probable[0]).any(0)
    return _count_cells(supported, differ)


def right_cells(probes: Tensor, joint: Tensor, target: Tensor) -> Tensor:
    """Whose probe is right about each sample, as the number of a cell.

    Parameters
    ----------
    probes
        As `supports` takes them, of at least two modalities.
    joint
        ``(samples, classes)`` of the probe on the features of all modalities, as ``probes`` are.
    target
        ``(samples,)`` int64 true classes; a class outside of the probes' classes is not known.

    Returns
    -------
    Tensor
        ``(samples,)`` int64, as `support_cells` counts cells, but that the last two are, where no single probe is
        right, that the joint one is, and that it is not.

    Examples
    --------
    >>> probes = torch.tensor([[[0.9, 0.1]], [[0.8, 0.2]]])
    >>> right_cells(probes, joint=torch.tensor([[0.3, 0.7]]), target=torch.tensor([1])).tolist()  # the joint one only
    [3]
    """
    right = supports(torch.cat([probes, joint[None]]), target)
    cells = _count_cells(right[:-1], right[-1] == 0)
    return torch.where(right[-1].isnan(), -1, cells)


def _count_cells(holds: Tensor, is_last: Tensor) -> Tensor:
    """Cells by who of ``(modalities, samples)`` holds; those of which none does are split in two."""
    count, modalities = holds.sum(0), len(holds)
    if modalities == 2:  # it matters which one it is
        first = torch.where(count == 2, 0, torch.where(holds[0] == 1, 1, 2))
    else:
        first = (modalities - count).nan_to_num().long()
    last = max(modalities, 3)  # the cells of which one holds come before
    cells = torch.where(count == 0, torch.where(is_last, last + 1, last), first)
    return torch.where(holds.isnan().any(0), -1, cells)


def conflict(probes: Tensor) -> Tensor:
    """The chance that two modalities, each drawing a class from its probe, draw different ones: ``1 - sum p_a p_b``.

    It ranks samples. Its level depends on how sure the probes are, not only on whether they differ.

    Parameters
    ----------
    probes
        ``(modalities, samples, classes)`` probabilities of at least two modalities.

    Returns
    -------
    Tensor
        ``(samples,)`` in [0, 1], the mean over all pairs of modalities; NaN where a probe is undefined.

    Examples
    --------
    >>> conflict(torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]))  # two samples
    tensor([1.0000, 0.5000])
    """
    modalities = len(probes)
    # The squared sum has each pair twice, and each modality with itself.
    same = (probes.sum(0).square() - probes.square().sum(0)).sum(1) / (modalities * (modalities - 1))
    return (1 - same).clamp(0, 1)
