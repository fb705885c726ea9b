"""The probe of each modality, against a slow reference and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from lightning_xattn import functional
from lightning_xattn.functional.probe import LEAST_OF_A_CLASS, READING_WIDTH
from tests import reference

CLASSES = 3


def made_up(samples=67, width=5, seed=0):
    """Features whose classes differ in the mean, ids of their classes and folds."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (samples,), generator=generator)
    features = torch.randn(samples, width, generator=generator) + 2 * torch.eye(CLASSES, width)[target]
    return features * 3 + 100, target, torch.randint(5, (samples,), generator=generator)


def test_the_fit_is_scikit_learns_but_for_the_covariances_denominator():
    """scikit-learn divides the scatter within classes by n, the definition by n less the number of classes."""
    x, target, _ = made_up()
    x = x.double()
    member = torch.nn.functional.one_hot(target, CLASSES).double()
    weights, bias = functional.discriminant(member.sum(0), member.T @ x, x.T @ x)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(x, target)
    scale = (len(x) - CLASSES) / len(x)
    expected = theirs.coef_ * scale
    np.testing.assert_allclose(weights, expected, rtol=1e-8)
    shift = -0.5 * np.diag(theirs.means_ @ expected.T) + np.log(theirs.priors_)
    np.testing.assert_allclose(bias, shift, rtol=1e-8)


def sums_of(x, target):
    member = torch.nn.functional.one_hot(target, CLASSES).double()
    return member.sum(0), member.T @ x, x.T @ x


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_features_of_another_scale_are_read_alike(scale):
    x, target, _ = made_up()
    x = x.double() - 100
    weights, bias = functional.discriminant(*sums_of(x, target))
    scaled, same = functional.discriminant(*sums_of(scale * x, target))
    torch.testing.assert_close(scaled * scale, weights)
    torch.testing.assert_close(same, bias)


def test_a_fit_takes_two_classes_and_one_sample_more_than_classes():
    """Of classes 0 and 2: the means are 1 and 4, and two samples lie 1 from theirs."""
    x, target = torch.tensor([[0.0], [2.0], [4.0]]).double(), torch.tensor([0, 0, 2])
    weights, bias = functional.discriminant(*sums_of(x, target))
    assert weights.flatten().tolist() == pytest.approx([1 / 2, 0, 4 / 2])
    expected = [math.log(2 / 3) - 1 / 4, -math.inf, math.log(1 / 3) - 16 / 4]
    assert bias.tolist() == pytest.approx(expected)
    for some in ([0, 2], [0, 1]):  # no more samples than classes, and one class
        weights, bias = functional.discriminant(*sums_of(x[some], target[some]))
        assert weights.isnan().all()
        assert bias.isnan().all()


def test_each_sample_is_read_by_a_fit_of_the_other_folds():
    x, target, folds = made_up()
    ours = functional.cross_fitted_probe(x, target, folds, CLASSES)
    expected = reference.cross_fitted_probe(x.double().numpy(), target.tolist(), folds.tolist(), CLASSES)
    np.testing.assert_allclose(ours.exp(), expected, atol=1e-9)
    assert (ours.argmax(1) == target).double().mean() > 0.7


def test_a_label_of_its_own_fold_changes_no_probe_of_it():
    x, target, folds = made_up()
    before = functional.cross_fitted_probe(x, target, folds, CLASSES)
    changed = torch.where(folds == 2, (target + 1) % CLASSES, target)
    after = functional.cross_fitted_probe(x, changed, folds, CLASSES)
    assert torch.equal(before[folds == 2], after[folds == 2])
    assert not torch.equal(before[folds == 1], after[folds == 1])


def test_samples_without_a_label_are_read_but_not_fitted():
    x, target, folds = made_up()
    unknown = torch.arange(len(x)) % 7 == 0
    ours = functional.cross_fitted_probe(x, torch.where(unknown, -1, target), folds, CLASSES)
    assert ours.isfinite().all()
    shifted = torch.where(unknown[:, None], x + 1e3, x)
    others = functional.cross_fitted_probe(shifted, torch.where(unknown, -1, target), folds, CLASSES)
    assert torch.equal(ours[~unknown], others[~unknown])


def test_samples_that_are_not_finite_are_left_out():
    x, target, folds = made_up()
    broken = x.clone()
    broken[3] = math.nan
    ours = functional.cross_fitted_probe(broken, target, folds, CLASSES)
    assert ours[3].isnan().all()
    kept = torch.arange(len(x)) != 3
    expected = functional.cross_fitted_probe(x[kept], target[kept], folds[kept], CLASSES)
    torch.testing.assert_close(ours[kept], expected)


@pytest.mark.parametrize(("second", "readable"), [(LEAST_OF_A_CLASS, True), (LEAST_OF_A_CLASS - 1, False)])
def test_two_classes_need_enough_samples(second, readable):
    x, _, folds = made_up(40 + second + 3)
    target = torch.tensor([0] * 40 + [1] * second + [2] * 3)
    ours = functional.cross_fitted_probe(x, target, folds, CLASSES)
    assert bool(ours.isfinite().all()) == readable
    assert bool(ours.isnan().all()) != readable


def test_a_class_that_a_fit_has_not_seen_has_no_probability():
    x, target, folds = made_up()
    folds = torch.where(target == 2, 0, folds)
    ours = functional.cross_fitted_probe(x, target, folds, CLASSES)
    assert (ours[folds == 0, 2] == -math.inf).all()
    assert ours.exp().isfinite().all()
    unseen = functional.support_difference(torch.stack([ours, ours]), torch.full((len(x),), 2))
    assert unseen[folds == 0].isnan().all()
    assert (unseen[folds != 0] == 0).all()


def test_features_that_do_not_vary_or_are_of_one_fold_cannot_be_read():
    x, target, folds = made_up()
    assert functional.cross_fitted_probe(torch.ones_like(x), target, folds, CLASSES).isnan().all()
    assert functional.cross_fitted_probe(x, target, torch.full_like(folds, 4), CLASSES).isnan().all()


@pytest.mark.parametrize("modalities", [2, 3])
def test_conflict_is_the_chance_that_two_draws_differ(modalities):
    probes = torch.rand(modalities, 11, 4).double().softmax(2)
    ours = functional.conflict(probes)
    for i in range(11):
        assert ours[i] == pytest.approx(reference.conflict(probes[:, i].tolist()))


def test_conflict_of_certain_probes():
    agree, differ = torch.eye(3).double()[[0, 1]], torch.eye(3).double()[[0, 2]]
    assert functional.conflict(torch.stack([agree, agree])).tolist() == [0, 0]
    assert functional.conflict(torch.stack([agree, differ])).tolist() == [0, 1]


def test_a_probe_far_from_the_data_has_a_support_difference():
    x, target, folds = made_up()
    ours = functional.cross_fitted_probe(x * 1e-3 + target[:, None] * 10.0, target, folds, CLASSES)
    wrong = (target + 1) % CLASSES
    assert (ours.exp().gather(1, wrong[:, None]) == 0).any()
    assert functional.support_difference(torch.stack([ours, -torch.ones_like(ours)]), wrong).isfinite().all()


def test_support_difference():
    probes = torch.rand(2, 7, 4).double().softmax(2)
    predicted = torch.tensor([0, 1, 2, 3, 0, -1, 4])
    ours = functional.support_difference(probes.log(), predicted)
    assert ours[5:].isnan().all()
    for i in range(5):
        assert ours[i] == pytest.approx(reference.support_difference(*probes[:, i].tolist(), predicted[i]))


def test_only_probe_right_is_a_right_probe_of_a_wrong_prediction():
    says = torch.eye(3).double()
    probes = torch.stack([says[[0, 0, 0, 0]], says[[1, 1, 2, 1]]])
    ours = functional.only_probe_right(probes, torch.tensor([0, 2, 1, 2]), torch.tensor([0, 1, 1, -1]))
    assert ours[1] == 1  # the second one said 1
    assert ours[[0, 2, 3]].isnan().all()  # a right prediction, another one, and no target
    assert functional.only_probe_right(probes, torch.tensor([2, 2, 2, 2]), torch.tensor([1, 1, 1, 0])).tolist() == [
        1,
        1,
        0,
        1,
    ]


def test_tokens_are_averaged_where_they_are_real():
    tokens, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    ours = functional.pooled_tokens(tokens, mask)
    torch.testing.assert_close(ours[0], tokens[0, :3].mean(0))
    torch.testing.assert_close(ours[1], tokens[1].mean(0))
    assert ours[2].isnan().all()
    padded = torch.where(mask[..., None], tokens, math.nan)
    assert torch.equal(functional.pooled_tokens(padded, mask)[:2], ours[:2])
    assert torch.equal(functional.pooled_tokens(tokens[:, 0]), tokens[:, 0])
    assert functional.pooled_tokens(tokens.half()).dtype == torch.float32
    assert functional.pooled_tokens(tokens.double()).dtype == torch.float64


def test_a_projection_is_the_same_in_every_process_and_draws_no_random_numbers(monkeypatch):
    found = []
    for seed in (1, 2):
        monkeypatch.setattr("lightning_xattn.functional.probe._PROJECTIONS", {})
        torch.manual_seed(seed)
        found.append(functional.project(torch.eye(READING_WIDTH + 3)))
        assert torch.get_rng_state().equal(torch.manual_seed(seed).get_state())
    assert torch.equal(*found)


def test_wide_features_are_projected_always_the_same_way():
    x = torch.randn(200, 300)
    assert torch.equal(functional.project(x[:, :READING_WIDTH]), x[:, :READING_WIDTH])
    ours = functional.project(x)
    assert ours.shape == (200, READING_WIDTH)
    assert torch.equal(ours, functional.project(x.clone()))
    ratio = ours.square().sum(1).mean() / x.square().sum(1).mean()
    assert ratio == pytest.approx(1, abs=0.15)
