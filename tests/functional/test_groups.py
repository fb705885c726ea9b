"""Intervals of samples that are alike within groups: against a slow reference, and how often they hold the truth."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from lightning_xattn import functional as F
from lightning_xattn.core.ids import UNKNOWN_GROUP
from lightning_xattn.evaluation.statistics import score_bins
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from tests import reference

RUNS = 1_000
GROUPS, SIZE, INTRACLASS = 30, 10, 0.5


def in_groups(rng, sizes):
    """Scores of variance 1 that correlate by ``INTRACLASS`` within groups of these sizes, and the groups."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    shared = rng.standard_normal(len(sizes))[groups] * np.sqrt(INTRACLASS)
    return shared + rng.standard_normal(len(groups)) * np.sqrt(1 - INTRACLASS), groups


def mean_of(values, groups):
    index = torch.as_tensor(groups)
    counts = torch.zeros(int(index.max()) + 1, dtype=torch.float64)
    sums = counts.index_add(0, index, torch.as_tensor(values))
    return F.grouped_mean_interval(counts.index_add(0, index, torch.ones(len(index), dtype=torch.float64)), sums)


def separation_of(scores, groups, correct):
    """Of scores in about [-5, 5], scaled into the range of an alignment."""
    bins = score_bins(torch.as_tensor(scores / 8), -1, 1)
    return F.separation(bins, torch.as_tensor(np.stack([correct, ~correct], axis=1)), torch.as_tensor(groups))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=11), seed=st.integers(0, 10**6))
def test_the_mean_of_groups(sizes, seed):
    values, groups = in_groups(np.random.default_rng(seed), sizes)
    low, high = mean_of(values, groups)
    assert (low, high) == pytest.approx(reference.grouped_mean_interval(values, groups), abs=1e-3, nan_ok=True)
    assert np.isnan(low) == (len(sizes) < MINIMUM_GROUP)


def test_a_group_without_samples_is_none():
    counts, sums = torch.tensor([3.0, 1, 2, 4, 2]), torch.tensor([0.9, 0.1, 0.8, 1.0, 0.4])
    alone, empty = F.grouped_mean_interval(counts, sums), torch.zeros(3)
    assert np.isfinite(alone).all()
    assert F.grouped_mean_interval(torch.cat([counts, empty]), torch.cat([sums, empty])) == alone
    assert np.isnan(F.grouped_mean_interval(counts * (counts > 1), sums * (counts > 1))).all(), "four are too few"


def share_of(values, groups):
    index = torch.as_tensor(groups)
    counts, successes = torch.zeros(2, int(index.max()) + 1, dtype=torch.float64)
    values = torch.as_tensor(values, dtype=torch.float64)
    return F.grouped_proportion_interval(
        counts.index_add(0, index, torch.ones_like(values)), successes.index_add(0, index, values)
    )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=13).filter(any),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_the_share_of_groups(sizes, share, seed):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    values = rng.random(len(groups)) < np.where(rng.random(len(sizes)) < 0.5, share, rng.random(len(sizes)))[groups]
    values = values.astype(int).tolist()
    low, high = share_of(values, groups)
    assert (low, high) == pytest.approx(reference.proportion_interval(values, groups), abs=1e-3, nan_ok=True)
    enough = sum(size > 0 for size in sizes) >= MINIMUM_GROUP
    assert np.isnan([low, high]).tolist() == [not enough] * 2
    if enough:
        assert 0 <= low < high <= 1
        assert low <= np.mean(values) <= high


@pytest.mark.parametrize(("successes", "count"), [(16, 16), (0, 16), (39, 40), (3, 7), (5, 5), (4, 4)])
def test_a_share_of_independent_samples_is_that_of_groups_of_one(successes, count):
    values = [1] * successes + [0] * (count - successes)
    found = share_of(values, range(count))
    assert found == pytest.approx(reference.proportion_interval(values), abs=1e-4, nan_ok=True)
    assert np.isnan(found[0]) == (count < 5)


def test_a_share_with_a_published_interval():
    """Newcombe 1998, table I: 81 of 263, Wilson with z. With t(262) it is hardly wider."""
    assert share_of([1] * 81 + [0] * 182, range(263)) == pytest.approx((0.2553, 0.3662), abs=2e-3)


def test_errors_of_few_groups_say_nothing_of_how_alike_their_samples_are():
    """One wrong sample of 400 has a design effect of 1, but in 20 groups of 20 it is none of 400 independent ones."""
    counts, right = torch.full((20,), 20.0), torch.full((20,), 20.0)
    all_right = F.grouped_proportion_interval(counts, right)
    assert all_right == pytest.approx(share_of([1] * 20, range(20)))
    right[3] -= 1
    low, high = F.grouped_proportion_interval(counts, right)
    assert low < all_right[0] + 0.01
    assert high < 1
    right[:5] = 19  # of five groups: now it can be told, and they are not alike
    low, _ = F.grouped_proportion_interval(counts, right)
    assert low > 0.95


@pytest.mark.parametrize(("groups", "size"), [(5, 10), (20, 20)])
@pytest.mark.parametrize(("share", "intraclass"), [(0.8, 0.3), (0.98, 0.5)])
def test_a_share_by_groups_holds_the_truth(groups, size, share, intraclass):
    rng = np.random.default_rng(0)
    strength = 1 / intraclass - 1
    held = 0
    for _ in range(300):
        right = rng.binomial(size, rng.beta(share * strength, (1 - share) * strength, groups))
        low, high = F.grouped_proportion_interval(torch.full((groups,), float(size)), torch.as_tensor(right))
        held += low <= share <= high
    assert held / 300 >= 0.92


def test_what_is_not_possible_is_cut_off_an_interval():
    assert F.within((-0.2, 0.4), (0.0, 1.0)) == (0.0, 0.4)
    assert F.within((0.9, 1.1), (0.0, 1.0)) == (0.9, 1.0)
    assert F.within((-3.0, 3.0), (-np.inf, np.inf)) == (-3.0, 3.0)
    assert np.isnan(F.within((np.nan, np.nan), (0.0, 1.0))).all()


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=5, max_size=12), seed=st.integers(0, 10**6), tie=st.booleans())
@pytest.mark.slow
def test_the_auroc_of_groups(sizes, seed, tie):
    rng = np.random.default_rng(seed)
    scores, groups = in_groups(rng, sizes)
    scores = np.round(scores) if tie else scores
    correct = rng.random(len(scores)) < 0.6
    ours = separation_of(scores, groups * 17 - 40, correct)
    theirs = [len(set(groups[which])) for which in (correct, ~correct)]
    assert [ours.correct_groups, ours.incorrect_groups] == theirs
    assert (ours.correct, ours.incorrect) == (correct.sum(), (~correct).sum())
    if min(theirs) < MINIMUM_GROUP:
        assert np.isnan([ours.auroc, ours.low, ours.high]).all()
        return
    binned = reference.binned(scores / 8, -1, 1)
    parts = binned[correct], binned[~correct], groups[correct], groups[~correct]
    assert ours.auroc == pytest.approx(reference.auroc(*parts[:2]), abs=1e-9)
    assert (ours.low, ours.high) == pytest.approx(reference.grouped_auroc_interval(*parts), abs=1e-4)


def test_one_sample_a_group_is_no_group():
    rng = np.random.default_rng(0)
    scores, groups = in_groups(rng, np.ones(40, dtype=int))
    correct = np.arange(40) % 3 > 0
    alone = F.mean_interval(scores.mean(), scores.std(ddof=1), 40)
    assert mean_of(scores, groups) == pytest.approx(alone, abs=1e-9)
    variances = reference.auroc_variances(scores[correct], scores[~correct], groups[correct], groups[~correct])
    assert variances[0] == pytest.approx(variances[1])
    ours = separation_of(scores, groups, correct)
    bins = score_bins(torch.as_tensor(scores / 8), -1, 1)
    independent = F.separation(bins, torch.as_tensor(np.stack([correct, ~correct], axis=1)))
    assert ours.auroc == independent.auroc
    # Student's quantile instead of the normal one: a little wider.
    assert 0 < independent.low - ours.low < 0.01
    assert 0 < ours.high - independent.high < 0.01


def test_outcomes_that_do_not_overlap_are_not_certain():
    groups = np.repeat(np.arange(10), 20)
    correct = groups < 5
    ours = separation_of(np.where(correct, 1.0, -1.0), groups, correct)
    assert (ours.auroc, ours.high) == (1, 1)
    alone = F.separation(torch.tensor([0, 1]), torch.tensor([[0, 5], [5, 0]]))  # each group as one sample
    assert ours.low == pytest.approx(alone.low, abs=0.15)


@pytest.mark.parametrize("groups", [6, 7, 11, 59])
def test_a_variance_that_is_rounding_is_none(groups):
    """Each group has a correct and an incorrect sample of one score: their variances and covariance cancel."""
    scores = torch.randperm(1000, generator=torch.Generator().manual_seed(groups))[:groups].repeat(2)
    counts = torch.tensor([[1.0, 0.0]] * groups + [[0.0, 1.0]] * groups)
    found = F.separation(scores, counts, torch.arange(groups).repeat(2))
    assert found.auroc == pytest.approx(0.5)
    assert found.high - found.low > 0.2


def test_samples_of_unknown_groups_widen_an_auroc_and_are_none_that_a_claim_rests_on():
    scores, groups = torch.arange(18) * 100, torch.tensor([0, 1, 2, 3, 9, 9, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])
    counts = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 12)
    assert F.separation(scores, counts, groups).correct_groups == 5
    found = F.separation(scores, counts, torch.where(groups == 9, UNKNOWN_GROUP, groups))
    assert (found.correct_groups, found.incorrect_groups) == (4, 11)
    assert np.isnan([found.auroc, found.low, found.high]).all()
    groups[5] = 20
    unknown = torch.where(groups == 9, UNKNOWN_GROUP, groups)
    found, known = (F.separation(scores, counts, one) for one in (unknown, groups))
    assert (found.correct_groups, known.correct_groups) == (5, 6)
    assert (found.auroc, found.low, found.high) == (known.auroc, known.low, known.high)


def test_a_mean_by_groups_holds_the_truth_and_one_by_samples_does_not():
    rng = np.random.default_rng(0)
    by_group = by_sample = 0
    for _ in range(RUNS):
        values, groups = in_groups(rng, np.full(GROUPS, SIZE))
        low, high = mean_of(values, groups)
        by_group += low <= 0 <= high
        low, high = F.mean_interval(values.mean(), values.std(ddof=1), len(values))
        by_sample += low <= 0 <= high
    assert 0.93 <= by_group / RUNS <= 0.97
    assert by_sample / RUNS < 0.7


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.slow
def test_an_auroc_by_groups_holds_the_truth_and_one_by_samples_does_not(shift):
    """Whole groups are correct or incorrect, as the recordings of a patient may be."""
    rng = np.random.default_rng(1)
    by_group = by_sample = 0
    true = norm.cdf(shift / np.sqrt(2))
    for _ in range(RUNS):
        scores, ids = in_groups(rng, np.full(GROUPS, SIZE))
        correct = rng.permutation(GROUPS)[ids] < GROUPS // 2
        scores = scores + shift * correct
        found = separation_of(scores, ids, correct)
        by_group += found.low <= true <= found.high
        bins = score_bins(torch.as_tensor(scores / 8), -1, 1)
        found = F.separation(bins, torch.as_tensor(np.stack([correct, ~correct], axis=1)))
        by_sample += found.low <= true <= found.high
    assert 0.93 <= by_group / RUNS <= 0.97
    assert by_sample / RUNS < 0.7
