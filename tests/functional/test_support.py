"""Who supports a prediction, and whose probe is right, against slow references."""

import math

import pytest
import torch

from lightning_xattn import functional
from tests import reference

CLASSES = 4


def made_up(modalities, samples=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(modalities + 1, samples, CLASSES, generator=generator).double().mul(3).softmax(2)
    return probes[:-1], probes[-1], torch.randint(CLASSES, (samples,), generator=generator)


@pytest.mark.parametrize("modalities", [2, 3])
def test_support_is_the_references(modalities):
    probes, _, predicted = made_up(modalities)
    supports, support = functional.supports(probes, predicted), functional.support(probes.log(), predicted)
    assert torch.equal(functional.supports(probes.log(), predicted), supports)
    for i in range(len(predicted)):
        sample = probes[:, i].tolist(), int(predicted[i])
        assert supports[:, i].nonzero()[:, 0].tolist() == reference.supporters(*sample)
        assert support[i] == pytest.approx(reference.support(*sample))


@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_cells_are_the_references(modalities):
    probes, joint, class_ids = made_up(modalities)
    holders = [(0, 1), (0,), (1,)] if modalities == 2 else list(range(modalities, 0, -1))
    cells = functional.support_cells(probes, class_ids)
    rights = functional.right_cells(probes, joint, class_ids)
    for i, class_id in enumerate(class_ids.tolist()):
        sample = probes[:, i].tolist()
        assert [*holders, "agree", "differ"][cells[i]] == reference.support_cell(sample, class_id)
        assert [*holders, "joint only", "none"][rights[i]] == reference.right_cell(sample, joint[i].tolist(), class_id)
    assert len(cells.unique()) == len(rights.unique()) == len(holders) + 2


def test_what_is_not_known_has_no_support():
    probes, joint, predicted = made_up(2, samples=4)
    predicted = torch.tensor([-1, CLASSES, 0, 0])
    probes[1, 2] = math.nan
    assert functional.support(probes.log(), predicted).isnan().tolist() == [True, True, True, False]
    assert functional.supports(probes, predicted).isnan().tolist() == [
        [True, True, False, False],
        [True, True, True, False],
    ]
    assert (functional.support_cells(probes, predicted) < 0).tolist() == [True, True, True, False]
    joint[3] = math.nan
    assert (functional.right_cells(probes, joint, predicted) < 0).all()


def test_a_class_that_a_fit_has_not_seen_has_no_support():
    probes = torch.tensor([[[-0.5, -0.5, -math.inf]], [[0.0, -400.0, -50.0]]]).double()
    assert functional.support(probes, torch.tensor([1])).tolist() == [-0.5 - 15]
    assert functional.support(probes, torch.tensor([2])).isnan().all()
    assert functional.supports(probes, torch.tensor([2])).isnan().tolist() == [[True], [False]]
    assert functional.support_cells(probes, torch.tensor([2])).tolist() == [-1]


@pytest.mark.parametrize("modalities", [2, 3])
def test_conflict_is_the_chance_that_two_draws_differ(modalities):
    probes, _, _ = made_up(modalities, samples=11)
    ours = functional.conflict(probes)
    for i in range(11):
        assert ours[i] == pytest.approx(reference.conflict(probes[:, i].tolist()))


def test_conflict_of_certain_probes():
    agree, differ = torch.eye(3).double()[[0, 1]], torch.eye(3).double()[[0, 2]]
    assert functional.conflict(torch.stack([agree, agree])).tolist() == [0, 0]
    assert functional.conflict(torch.stack([agree, differ])).tolist() == [0, 1]
