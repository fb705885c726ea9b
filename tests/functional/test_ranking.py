"""AUROCs with their intervals by group, and the calibration of probabilities, against slow references."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t
from sklearn.metrics import roc_auc_score

from lightning_xattn import functional
from lightning_xattn.core.ids import UNKNOWN_GROUP
from tests import reference

CLASSES = 3


def made_up(samples=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (samples,), generator=generator)
    scores = torch.randn(samples, CLASSES, generator=generator) + torch.nn.functional.one_hot(target, CLASSES)
    return scores.double().softmax(1).round(decimals=1), target, torch.arange(samples) // 4


def macro(probabilities, target, groups=None):
    return functional.estimate_by_influence(
        *functional.macro_auroc_influence(probabilities, target), groups, limits=(0.0, 1.0)
    )


def test_the_macro_auroc_is_scikit_learns_and_its_interval_the_references():
    probabilities, target, groups = made_up()
    ours = macro(probabilities, target, groups)
    one_against_rest = [roc_auc_score(target == c, probabilities[:, c]) for c in range(CLASSES)]
    assert ours.mean == pytest.approx(np.mean(one_against_rest))
    value, error = reference.macro_auroc(probabilities.tolist(), target.tolist(), groups.tolist())
    half = t.ppf(0.975, 14) * error
    assert (ours.mean, ours.low, ours.high) == pytest.approx((value, value - half, min(1, value + half)))
    assert (ours.count, ours.groups) == (60, 15)


def test_samples_without_groups_are_their_own():
    probabilities, target, _ = made_up()
    ours = macro(probabilities, target)
    same = macro(probabilities, target, torch.arange(60))
    assert (ours.low, ours.high, ours.groups) == (same.low, same.high, None)


def test_few_samples_or_groups_have_no_interval():
    probabilities, target, _ = made_up()
    few = macro(probabilities, target, torch.arange(60) % 4)
    assert (math.isnan(few.low), math.isnan(few.mean)) == (True, False)
    unknown = macro(probabilities, target, torch.where(torch.arange(60) < 40, UNKNOWN_GROUP, torch.arange(60) % 4))
    assert math.isnan(unknown.low)
    assert math.isnan(macro(probabilities[:4], target[:4]).mean)


def test_an_auroc_without_a_wrong_pair_has_no_interval():
    """Its variance is 0, and an interval of no width would claim all."""
    scores, positive = torch.arange(20).double(), torch.arange(20) >= 10
    auroc, influence = functional.auroc_influence(scores, positive)
    assert (auroc, influence.abs().sum()) == (1, 0)
    assert all(map(math.isnan, functional.influence_interval(auroc, influence)))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Two classes, groups of 5 that share half of their noise: the truth is that of very many."""
    generator = torch.Generator().manual_seed(0)

    def draw(groups):
        target = torch.randint(2, (groups * 5,), generator=generator)
        shared = torch.randn(groups, generator=generator).repeat_interleave(5)
        own = torch.randn(groups * 5, generator=generator)
        score = 0.8 * target + 0.7 * shared + 0.7 * own
        return torch.stack([-score, score], 1).double().softmax(1), target, torch.arange(groups).repeat_interleave(5)

    truth = macro(*draw(20000)).mean
    found = [macro(*draw(30)) for _ in range(300)]
    held = sum(one.low < truth < one.high for one in found) / 300
    assert 0.91 < held < 0.985


def test_the_calibration_error_is_the_references():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(53, generator=generator).double()
    right = (torch.rand(53, generator=generator) < confidence**2).double()
    expected = reference.calibration_error(confidence.tolist(), right.tolist(), 10)
    assert functional.calibration_error(confidence, right) == pytest.approx(expected)
    assert math.isnan(functional.calibration_error(confidence[:9], right[:9]))


def test_a_class_that_fits_have_not_seen_is_in_no_macro_auroc():
    probabilities, target, _ = made_up()
    logs = probabilities.log()
    logs[target == 2, 2] = -math.inf
    both = torch.stack([functional.auroc_influence(logs[:, c], target == c)[1] for c in range(2)]).mean(0)
    value, influence = functional.macro_auroc_influence(logs, target)
    assert value == pytest.approx(np.mean([roc_auc_score(target == c, probabilities[:, c]) for c in range(2)]))
    torch.testing.assert_close(influence, both)


@pytest.mark.parametrize("groups", [None, torch.arange(60) // 5])
def test_a_probe_that_is_never_wrong_has_an_interval(groups):
    target = torch.arange(60) % CLASSES
    found = macro(torch.nn.functional.one_hot(target, CLASSES).double(), target, groups)
    n = 60 if groups is None else 12
    assert (found.mean, found.high) == (1, 1)
    assert found.low == pytest.approx(n / (n + t.ppf(0.975, n - 1) ** 2))
    none = functional.estimate_by_influence(0.0, torch.zeros(60), groups, limits=(-1.0, 1.0))
    assert math.isnan(none.low)


def test_classes_one_by_one_give_the_same_macro_auroc(monkeypatch):
    probabilities, target, _ = made_up()
    whole = functional.macro_auroc_influence(probabilities, target)
    monkeypatch.setattr("lightning_xattn.core.chunks.CELLS", 60)
    asked = []

    def columns(classes):
        asked.append(classes.tolist())
        return probabilities[:, classes]

    of_target = probabilities.gather(1, target[:, None])[:, 0]
    value, influence = functional.macro_auroc_by_class(columns, of_target, target, CLASSES)
    assert asked == [[0], [1], [2]]
    assert value == whole[0]
    assert torch.equal(influence, whole[1])
    expected = [roc_auc_score(target == c, probabilities[:, c]) for c in range(CLASSES)]
    assert value == pytest.approx(np.mean(expected), rel=1e-12)
