"""Does a score detect errors that confidence does not? Cross-fitted error models, compared; risk and coverage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_xattn.functional.intervals import Estimate, grouped_mean_interval
from lightning_xattn.functional.probe import FOLDS
from lightning_xattn.functional.ranking import auroc_influence, estimate_by_influence

RIDGE = 1.0
"""The penalty on the squared weights of an error model, with standardised inputs and an intercept that is free."""

LEAST_OF_OUTCOME = 30
"""An error model needs so many wrong predictions, and so many right ones."""

LEAST_GROUPS = 10
"""An error model needs so many groups; samples without groups count as one each."""

COVERAGE = 0.8
"""The share of samples, those that look most reliable, whose share of errors is reported."""

_CERTAIN = 1e-6

_CONSTANT = 1e-12
"""A score whose deviation is this part of its mean varies by rounding only."""


def error_probabilities(scores: Tensor, wrong: Tensor, folds: Tensor) -> Tensor:
    """The probability that a prediction is wrong, by a logistic regression that has not seen the sample's fold.

    ``logit P(wrong) = w_0 + sum_j w_j z_j``, with z the standardised scores, has the smallest log loss
    plus ``RIDGE / 2 sum_j w_j^2``, found by Newton's method.

    Parameters
    ----------
    scores
        ``(samples, scores)``, finite.
    wrong
        ``(samples,)`` bool.
    folds
        ``(samples,)`` int64 in [0, FOLDS), the same for all samples of a group, see `assign_folds`.

    Returns
    -------
    Tensor
        ``(samples,)`` float64 in (0, 1).

    Examples
    --------
    >>> wrong, folds = torch.arange(100) % 4 == 0, torch.arange(100) // 20
    >>> found = error_probabilities(wrong[:, None] * 2.0, wrong, folds)
    >>> bool(found[wrong].min() > 0.8), bool(found[~wrong].max() < 0.2)
    (True, True)
    """
    scores, seen = scores.double(), (folds != torch.arange(FOLDS)[:, None]).double()
    count = seen.sum(1, keepdim=True)
    mean = seen @ scores / count
    z = scores - mean[:, None]
    deviation = ((seen[:, None] @ z.square())[:, 0] / count).sqrt()
    z /= torch.where(deviation > _CONSTANT * mean.abs(), deviation, 1)[:, None]
    x = torch.cat([torch.ones_like(z[..., :1]), z], dim=2)
    weights = _fit_logistic(x * seen[..., None], wrong.double(), count)
    # Of all fits each sample has the one without its fold.
    return (x[folds, torch.arange(len(folds))] * weights[folds]).sum(1).sigmoid()


def _fit_logistic(x: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    """``(fits, terms)`` weights of all fits at once.

    ``x`` is ``(fits, samples, terms)``, 1 in the first, and 0 in a row that a fit leaves out, so that it adds nothing;
    ``count`` is ``(fits, 1)`` how many it keeps.
    """
    penalty = torch.full_like(x[0, 0], RIDGE)
    penalty[0] = 0
    weights = torch.zeros_like(x[:, 0])
    weights[:, 0] = ((x[..., 0] @ labels) / count[:, 0]).clamp(_CERTAIN, 1 - _CERTAIN).logit()

    def loss(of: Tensor) -> Tensor:
        scores = (x @ of[..., None])[..., 0]
        return (torch.nn.functional.softplus(scores) - labels * scores).sum(1) + (penalty * of.square()).sum(1) / 2

    for _ in range(50):
        p = (x @ weights[..., None])[..., 0].sigmoid()
        gradient = ((p - labels)[:, None] @ x)[:, 0] + penalty * weights
        moves = gradient.abs().amax(1, keepdim=True) >= 1e-8 * count
        if not moves.any():
            break
        curvature = (x.mT * (p * (1 - p))[:, None]) @ x + torch.diag(penalty + 1e-9)
        step = torch.where(moves, torch.linalg.solve(curvature, gradient), 0)
        before, size = loss(weights), torch.ones_like(count)
        while (too_far := (loss(weights - size * step) > before)[:, None] & (size > 1e-6)).any():
            size = torch.where(too_far, size / 2, size)
        weights = weights - size * step
    return weights


@dataclass(frozen=True)
class AddedValue:
    """What a score adds to confidence in detecting errors.

    Attributes
    ----------
    auroc, baseline_auroc
        How well the error models detect errors: that of confidence and score, and that of confidence alone.
    delta_auroc
        The former minus the latter, with its paired 95 % CI; above 0 is better.
    delta_log_loss
        The same of the mean log loss in nats; below 0 is better.
    area, baseline_area
        The areas under their risk-coverage curves, see `risk_coverage`: below is better.
    risk, baseline_risk
        The shares of errors among the ``COVERAGE`` of samples that are least likely wrong.
    wrong
        Number of wrong predictions among ``delta_auroc.count``.

    Examples
    --------
    >>> wrong = torch.arange(400) % 4 == 0
    >>> confidence, score = torch.rand(400), torch.rand(400) - 2.0 * wrong  # the score alone detects errors
    >>> added_value(confidence, score, wrong, folds=torch.arange(400) % 5).adds
    True
    """

    auroc: float
    baseline_auroc: float
    delta_auroc: Estimate
    delta_log_loss: Estimate
    area: float
    baseline_area: float
    risk: float
    baseline_risk: float
    wrong: int

    @property
    def adds(self) -> bool:
        """Whether both intervals exclude 0 in the better direction."""
        return self.delta_auroc.low > 0 and self.delta_log_loss.high < 0


def added_value(
    confidence: Tensor, score: Tensor, wrong: Tensor, folds: Tensor, groups: Tensor | None = None
) -> AddedValue:
    """Compare an error model of confidence and a score with one of confidence alone, both cross-fitted.

    Parameters
    ----------
    confidence
        ``(samples,)`` probability of the predicted class.
    score
        ``(samples,)`` finite; which of its ends stands for errors is fitted.
    wrong
        ``(samples,)`` bool; some must be wrong, and some right.
    folds, groups
        ``(samples,)`` int64: fold, see `assign_folds`, and key of the group; None: each sample is its own group.

    Returns
    -------
    AddedValue
        With intervals by DeLong's influence values, summed by group.

    Examples
    --------
    >>> wrong = torch.arange(400) % 4 == 0
    >>> score = torch.rand(400) - 2.0 * wrong  # detects errors
    >>> found = added_value(confidence=torch.rand(400), score=score, wrong=wrong, folds=torch.arange(400) % 5)
    >>> found.delta_auroc.low > 0
    True
    """
    certain = confidence.double().clamp(_CERTAIN, 1 - _CERTAIN).logit()
    base = error_probabilities(certain[:, None], wrong, folds)
    model = error_probabilities(torch.stack([certain, score.double()], dim=1), wrong, folds)
    (auroc, influence), (baseline, base_influence) = (auroc_influence(one, wrong) for one in (model, base))
    delta_auroc = estimate_by_influence(auroc - baseline, influence - base_influence, groups, (-1.0, 1.0))
    losses = _log_losses(model, wrong) - _log_losses(base, wrong)
    index = torch.arange(len(wrong)) if groups is None else groups.unique(return_inverse=True)[1]
    counts = index.bincount().double()
    ends = grouped_mean_interval(counts, torch.zeros_like(counts).index_add(0, index, losses))
    (area, risk), (base_area, base_risk) = (risk_coverage(one, wrong) for one in (model, base))
    return AddedValue(
        auroc,
        baseline,
        delta_auroc,
        Estimate(float(losses.mean()), *ends, len(wrong), delta_auroc.groups),
        area,
        base_area,
        risk,
        base_risk,
        int(wrong.sum()),
    )


def _log_losses(probabilities: Tensor, happened: Tensor) -> Tensor:
    probabilities = probabilities.clamp(_CERTAIN, 1 - _CERTAIN)
    return -torch.where(happened, probabilities, 1 - probabilities).log()


def risk_coverage(error: Tensor, wrong: Tensor, coverage: float = COVERAGE) -> tuple[float, float]:
    """How many errors remain when only the most reliable predictions are kept (Geifman & El-Yaniv 2017).

    Parameters
    ----------
    error
        ``(samples,)`` how likely a prediction is wrong, in any unit. Samples of equal value count in all orders.
    wrong
        ``(samples,)`` bool.
    coverage
        The share of samples that are kept, in (0, 1].

    Returns
    -------
    area, risk
        The mean share of errors over all numbers of kept samples, 1 to all; and the share of errors at ``coverage``.
        NaN without samples.

    Examples
    --------
    >>> area, risk = risk_coverage(torch.tensor([0.1, 0.2, 0.3, 0.9, 0.4]), torch.tensor([0, 0, 0, 1, 0]).bool())
    >>> round(area, 3), risk  # (0 + 0 + 0 + 0 + 1/5) / 5
    (0.04, 0.0)
    """
    if not len(error):
        return math.nan, math.nan
    _, place, counts = error.unique(return_inverse=True, return_counts=True)
    # Of samples of one value each is wrong as often as all of them together.
    share = torch.zeros(len(counts), dtype=torch.float64).index_add(0, place, wrong.double()) / counts
    risks = share.repeat_interleave(counts).cumsum(0) / torch.arange(1, len(error) + 1)
    return float(risks.mean()), float(risks[math.ceil(coverage * len(error) - 1e-9) - 1])
