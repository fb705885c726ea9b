"""What a score adds to confidence: slow references, scikit-learn, false claims under the null, and power."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from lightning_xattn import functional
from lightning_xattn.functional.probe import FOLDS
from tests import reference


def made_up(samples, effect, seed=0, per_group=1):
    """Errors by confidence, and by ``effect`` times a score that itself depends on confidence."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(samples) // per_group
    of_group = torch.randn(samples // per_group + 1, generator=generator)[groups] if per_group > 1 else 0.0
    certain = 1 + torch.randn(samples, generator=generator) + 0.5 * of_group
    score = 0.7 * certain + torch.randn(samples, generator=generator)
    p_wrong = (-0.3 - certain - effect * (score - 0.7 * certain)).sigmoid()
    wrong = torch.rand(samples, generator=generator) < p_wrong
    return certain.double().sigmoid(), score.double(), wrong, functional.assign_folds(groups), groups


def test_error_models_are_the_references_and_scikit_learns():
    confidence, score, wrong, folds, _ = made_up(151, effect=1)
    scores = torch.stack([confidence.logit(), score], dim=1)
    ours = functional.error_probabilities(scores, wrong, folds)
    np.testing.assert_allclose(ours, reference.error_probabilities(scores, wrong.tolist(), folds.tolist()), atol=1e-5)
    for fold in range(FOLDS):
        seen = folds != fold
        scaler = StandardScaler().fit(scores[seen])
        theirs = LogisticRegression(C=1.0, tol=1e-10).fit(scaler.transform(scores[seen]), wrong[seen])
        expected = theirs.predict_proba(scaler.transform(scores[~seen]))[:, 1]
        np.testing.assert_allclose(ours[~seen], expected, atol=1e-5)


def test_a_score_that_does_not_vary_but_in_the_fold_left_out_changes_nothing():
    confidence, _, wrong, folds, _ = made_up(151, effect=1)
    base = functional.error_probabilities(confidence.logit()[:, None], wrong, folds)
    score = torch.where(folds == 0, 0.7, 0.1).double()
    model = functional.error_probabilities(torch.stack([confidence.logit(), score], dim=1), wrong, folds)
    unvaried = functional.error_probabilities(torch.stack([confidence.logit(), score * 0 + 0.1], 1), wrong, folds)
    torch.testing.assert_close(unvaried, base, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model[folds == 0], base[folds == 0], rtol=1e-8, atol=1e-10)


def test_a_score_that_does_not_vary_and_errors_that_are_separated_have_a_model():
    wrong, folds = torch.arange(50) % 5 == 0, torch.arange(50) // 10
    constant = functional.error_probabilities(torch.full((50, 1), 3.0), wrong, folds)
    torch.testing.assert_close(constant, torch.full((50,), 0.2).double())
    separated = functional.error_probabilities(1e9 * wrong[:, None].double(), wrong, folds)
    assert separated[wrong].min() > 0.8 > 0.2 > separated[~wrong].max()


@pytest.mark.parametrize("per_group", [1, 4])
def test_added_value_is_the_references(per_group):
    confidence, score, wrong, folds, groups = made_up(120, effect=1, per_group=per_group)
    found = functional.added_value(confidence, score, wrong, folds, groups)
    of_lists = confidence.tolist(), score.tolist(), wrong.tolist(), groups.tolist(), folds.tolist()
    for ours, theirs in zip((found.delta_auroc, found.delta_log_loss), reference.added_value(*of_lists), strict=True):
        assert (ours.mean, ours.low, ours.high) == pytest.approx(theirs, abs=1e-5)
        assert (ours.count, ours.groups) == (120, 120 // per_group)
    base = functional.error_probabilities(confidence.logit()[:, None], wrong, folds)
    assert found.baseline_auroc == pytest.approx(roc_auc_score(wrong, base))
    assert found.auroc == pytest.approx(found.baseline_auroc + found.delta_auroc.mean)
    assert (found.baseline_area, found.baseline_risk) == pytest.approx(
        reference.risk_coverage(base.tolist(), wrong.tolist(), 0.8)
    )
    assert found.wrong == int(wrong.sum())
    if per_group == 1:
        alone = functional.added_value(confidence, score, wrong, folds)
        assert alone.delta_auroc.low == found.delta_auroc.low
        assert alone.delta_log_loss.high == found.delta_log_loss.high
        assert alone.delta_auroc.groups is None


@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_a_confidence_that_is_certain_is_finite(confidence):
    _, score, wrong, folds, _ = made_up(100, effect=1)
    found = functional.added_value(torch.full((100,), confidence), score, wrong, folds)
    assert math.isfinite(found.delta_log_loss.mean)


def test_claims_are_rarely_false_and_an_effect_is_found():
    claims = {
        effect: sum(functional.added_value(*made_up(500, effect, seed)[:4]).adds for seed in range(60))
        for effect in (0.0, 0.8)
    }
    assert claims[0.0] <= 4  # 2.5 % are 1.5; more than 4 of 60 have a chance of 2 %
    assert claims[0.8] >= 0.6 * 60


@pytest.mark.slow
@pytest.mark.parametrize("per_group", [1, 5, 10])
def test_claims_are_rarely_false_where_samples_of_a_group_are_alike(per_group):
    runs = 400
    claims = sum(functional.added_value(*made_up(500, 0.0, seed, per_group)).adds for seed in range(runs))
    assert claims <= 0.025 * runs + 2 * math.sqrt(0.025 * 0.975 * runs)


def test_risk_and_coverage_are_the_references():
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(53, generator=generator).round(decimals=1)  # with ties
    wrong = torch.rand(53, generator=generator) < error
    for coverage in (0.01, 0.8, 1.0):
        assert functional.risk_coverage(error, wrong, coverage) == pytest.approx(
            reference.risk_coverage(error.tolist(), wrong.tolist(), coverage)
        )
    assert functional.risk_coverage(error, wrong)[0] < functional.risk_coverage(-error, wrong)[0]
    assert all(map(math.isnan, functional.risk_coverage(error[:0], wrong[:0])))


def test_a_model_that_is_certain_and_wrong_has_a_finite_log_loss():
    wrong, folds = torch.arange(200) % 4 == 0, torch.arange(200) % 5
    score = torch.where(folds == 0, -1e6, 0.0) * torch.arange(200) % 3
    found = functional.added_value(torch.full((200,), 0.7), score, wrong, folds)
    assert math.isfinite(found.delta_log_loss.mean)
