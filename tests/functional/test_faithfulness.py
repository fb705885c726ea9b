"""Which keys are replaced, and what is made of it, against loops."""

import pytest
import torch

from lightning_xattn import functional as F
from tests import reference

SAMPLES, KEYS = 11, 7


def shuffled(samples=SAMPLES, keys=KEYS, seed=0):
    return torch.rand(samples, keys, generator=torch.Generator().manual_seed(seed)).argsort(1)


@pytest.mark.parametrize("keys", [2, 3, 4, 7, 10])
def test_keys_are_replaced_as_the_reference_replaces_them(keys):
    scores = torch.randn(SAMPLES, keys, generator=torch.Generator().manual_seed(1))
    scores[3, 0] = scores[5, -1] = torch.nan
    found = F.replacements(scores, shuffled(keys=keys))
    for sample, of_sample in zip(scores.tolist(), found, strict=True):
        expected = reference.keys_to_replace(sample)
        assert [set(one.nonzero()[:, 0].tolist()) for one in of_sample] == [*map(set, expected)]


def test_equal_scores_rank_nothing():
    found = F.replacements(torch.zeros(SAMPLES, KEYS), shuffled())
    assert found[:, :3].equal(found[:, 3:6])
    assert len(set(map(tuple, found[:, 0].tolist()))) > 1


def test_the_order_of_a_few_equal_scores_is_that_of_the_shuffle():
    scores = torch.tensor([[1.0, 1, 0, 0]])
    for order in ([0, 1, 2, 3], [1, 0, 3, 2]):
        found = F.replacements(scores, torch.tensor([order]))
        assert found[0, 0].nonzero().tolist() == [[order[0]]]
        assert found[0, 3].nonzero().tolist() == [[order[2]]]


def test_the_gain_is_the_mean_over_the_shares():
    replaced = torch.rand(SAMPLES, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = [reference.ranking_gain(of_sample) for of_sample in replaced.tolist()]
    assert F.ranking_gain(replaced).tolist() == pytest.approx(expected)


def test_a_single_key_ranks_nothing():
    found = F.replacements(torch.ones(SAMPLES, 1), shuffled(keys=1))
    assert found[:, :6].sum() == 0
    assert found[:, 6].all()
