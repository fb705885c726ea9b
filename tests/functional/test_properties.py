"""Attention planted by hand with a known answer, and what must hold whatever the attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_xattn import functional as F
from lightning_xattn.core.attention import Attention, Direction
from lightning_xattn.core.errors import ShapeError
from lightning_xattn.evaluation.statistics import INVALID_ROWS, STATISTICS, Column, sample_statistics, score_bins
from tests.messages import tells

DIRECTION = Direction("eeg", "spec")


def rows_of(weights, **masks):
    return F.prepare_rows(Attention(DIRECTION, weights, **masks))


def back_rows_of(weights, **masks):
    return F.prepare_rows(Attention(DIRECTION.opposite, weights, **masks))


RANGES = {
    "alignment": lambda queries, keys: (-1, 1),
    "entropy": lambda queries, keys: (0, 1),
    "effective_keys": lambda queries, keys: (1, keys),
    "effective_share": lambda queries, keys: (1 / keys, 1),
    "max": lambda queries, keys: (1 / keys, 1),
    "min": lambda queries, keys: (0, 1 / keys),
    "sparsity": lambda queries, keys: (0, 100),
    "std": lambda queries, keys: (0, math.sqrt(keys - 1) / keys),  # of all attention to one key
    "mean": lambda queries, keys: (1 / keys, 1 / keys),
    "lift": lambda queries, keys: (0, keys),
    "query_selectivity": lambda queries, keys: (0, 1),
    "head_diversity": lambda queries, keys: (0, 1),
    "sink": lambda queries, keys: (1 / keys, 1),
    "sink_excess": lambda queries, keys: (0, 1),
    "invalid_rows": lambda queries, keys: (0, 0),  # of sound attention
    "broken": lambda queries, keys: (0, 0),
    "wholly_masked": lambda queries, keys: (0, 0),
}
"""From where to where each number goes, of so many real queries and keys."""


def assert_in(bounds, values, name):
    """Within these bounds but for rounding; undefined values are nowhere."""
    low, high = bounds
    defined = values[~values.isnan()]
    assert (defined >= low - 1e-5 * (1 + abs(low))).all(), (name, defined.min(), low)
    assert (defined <= high + 1e-5 * (1 + abs(high))).all(), (name, defined.max(), high)


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_uniform_attention():
    statistics = F.row_statistics(rows_of(torch.full((2, 3, 5, 7), 1 / 7)))
    for name, expected in (("entropy", 1), ("effective_keys", 7), ("max", 1 / 7), ("std", 0), ("mean", 1 / 7)):
        torch.testing.assert_close(statistics[name], torch.full((2, 3), expected).float(), atol=1e-6, rtol=1e-5)
    many = F.row_statistics(rows_of(torch.full((2, 3, 5, 119), 1 / 119)))
    assert (many["sparsity"] == 100).all(), "many keys make uniform attention look sparse"


def test_a_weight_at_the_threshold_is_not_below_it():
    weights = torch.tensor([[0.1, 0.9], [0.05, 0.95]], dtype=torch.float64).expand(1, 1, 2, 2)
    statistics = F.row_statistics(rows_of(weights))
    assert statistics["sparsity"].item() == 25, "of the second row one key of two"


@pytest.mark.parametrize(
    ("row", "valid"),
    [
        (torch.tensor([0.5, 0.5009]), True),
        (torch.tensor([0.5, 0.5011]), False),
        (torch.tensor([0.5, 0.4991]), True),
        (torch.tensor([0.5, 0.4989]), False),
        # Half precision keeps a sum up to its rounding only: to 4 eps, of bfloat16 1 / 32.
        (torch.tensor([0.5, 0.53125]).bfloat16(), True),
        (torch.tensor([0.5, 0.546875]).bfloat16(), False),
    ],
)
def test_a_row_is_broken_that_does_not_sum_to_1_within_its_precision(row, valid):
    weights = row.expand(1, 1, 3, 2).clone()
    weights[:, :, 2] = torch.nan
    rows = rows_of(weights, query_mask=torch.tensor([[True, True, False]]))
    assert rows.valid.flatten().tolist() == [valid, valid, False]
    assert rows.broken.flatten().tolist() == [not valid, not valid, False], "padding is not broken"


def test_a_row_of_half_precision_is_scaled_to_sum_to_1_and_one_of_single_precision_stays():
    row = torch.tensor([0.5, 0.5009]).expand(1, 1, 1, 2)
    assert F.max_weight(rows_of(row)).item() == pytest.approx(0.5009, abs=1e-6)
    half = torch.tensor([0.5, 0.53125]).expand(1, 1, 1, 2)
    rows = rows_of(half.bfloat16())
    assert F.max_weight(rows).item() == pytest.approx(0.53125 / 1.03125, abs=1e-6)
    assert rows.weights.sum().item() == pytest.approx(1)


def test_single_keys_are_those_of_valid_rows():
    assert F.has_single_keys(rows_of(torch.ones(2, 3, 5, 1)))
    assert not F.has_single_keys(rows_of(torch.full((2, 3, 5, 7), 1 / 7)))
    assert not F.has_single_keys(rows_of(torch.full((2, 3, 5, 1), torch.nan))), "there is no row that would say so"


def test_masks_of_tokens_beside_a_slot_stay_in_their_place():
    weights = torch.tensor([0.5, 0.25, 0.0, 0.25]).expand(1, 1, 1, 4)
    visible = torch.tensor([True, True, False, True]).expand(1, 1, 1, 4)
    lifts = F.lift(rows_of(weights, visible=visible, extra_keys=1)).flatten()
    torch.testing.assert_close(lifts, torch.tensor([1.5, 0.75, torch.nan]), equal_nan=True)


def test_what_crosses_over_is_averaged_over_the_real_queries():
    mask, shares = torch.tensor([[True, True, False]]), torch.tensor([[[0.2, 0.6, 0.9]]])
    weights = torch.full((1, 1, 3, 2), 0.5)
    assert F.cross_modal_mass(rows_of(weights, query_mask=mask, cross_modal_mass=shares)).item() == pytest.approx(0.4)
    with pytest.raises(ShapeError, match=tells("eeg_to_spec", "joint sequence")):
        F.cross_modal_mass(rows_of(weights))


def test_one_hot_attention():
    weights = torch.zeros(2, 3, 5, 7)
    weights[..., 4] = 1
    statistics = F.row_statistics(rows_of(weights))
    torch.testing.assert_close(statistics["entropy"], torch.zeros(2, 3))
    torch.testing.assert_close(statistics["effective_keys"], torch.ones(2, 3))
    torch.testing.assert_close(statistics["sparsity"], torch.full((2, 3), 100 * 6 / 7))


def test_a_half_masked_uniform_row_is_as_diffuse_as_it_can_be():
    weights = torch.tensor([0.25] * 4 + [0.0] * 3).expand(2, 3, 5, 7)
    key_mask = torch.tensor([True] * 4 + [False] * 3).expand(2, 7)
    assert F.row_statistics(rows_of(weights, key_mask=key_mask))["entropy"].allclose(torch.ones(2, 3))
    assert F.row_statistics(rows_of(weights))["entropy"].allclose(torch.full((2, 3), math.log(4) / math.log(7)))


def test_a_single_key_says_nothing():
    one, back = rows_of(torch.ones(2, 3, 1, 1)), back_rows_of(torch.ones(2, 3, 1, 1))
    statistics = sample_statistics(F.prepare_layer(one, back))
    for name in ("alignment", "entropy", "eeg_to_spec/query_selectivity", "eeg_to_spec/head_diversity"):
        assert statistics[Column.parse(name)].isnan().all(), name
    assert (statistics[INVALID_ROWS] == 0).all()


def test_queries_that_differ_are_selective_and_heads_that_differ_are_diverse():
    one_hot = torch.eye(7)
    by_query = one_hot[:5].expand(2, 3, 5, 7)
    torch.testing.assert_close(F.query_selectivity(rows_of(by_query)), torch.full((2, 3), math.log(5) / math.log(7)))
    torch.testing.assert_close(F.head_diversity(rows_of(by_query)), torch.zeros(2))
    by_head = one_hot[:3][:, None].expand(2, 3, 5, 7)
    torch.testing.assert_close(F.query_selectivity(rows_of(by_head)), torch.zeros(2, 3))
    torch.testing.assert_close(F.head_diversity(rows_of(by_head)), torch.ones(2))


def test_one_query_that_looks_elsewhere_hides_no_sink():
    weights = torch.full((1, 1, 100, 20), 0.1 / 19)
    weights[..., 0] = 0.9
    weights[0, 0, 7] = torch.eye(20)[5]
    assert F.sink(weights).item() == pytest.approx(0.891)
    assert F.sink_excess(weights).item() == pytest.approx((0.891 - 1 / 20) / (1 - 1 / 20))


def test_a_sink_is_of_the_valid_queries_and_the_keys_that_they_see():
    """Two of six queries are padding, and only they see the last two keys, which they attend to alone."""
    weights = torch.tensor([0.4, 0.1, 0.2, 0.2, 0.1, 0, 0]).repeat(2, 3, 6, 1)
    weights[:, :, 4:] = torch.eye(7)[6]
    visible = torch.ones(6, 7, dtype=torch.bool)
    visible[:4, 5:] = False
    rows = rows_of(
        weights, visible=visible.expand(2, 3, 6, 7), query_mask=torch.tensor([True] * 4 + [False] * 2).expand(2, 6)
    )
    torch.testing.assert_close(F.sink(rows), torch.full((2, 3), 0.4))
    torch.testing.assert_close(F.sink_excess(rows), torch.full((2, 3), (0.4 - 1 / 5) / (1 - 1 / 5)))


def test_a_key_that_a_query_cannot_see_gets_nothing_of_it():
    """Under a causal mask the first query sees one key, the others two, three and four."""
    weights = torch.ones(1, 1, 4, 4).tril()
    rows = rows_of(weights / weights.sum(-1, keepdim=True), visible=weights.bool())
    share = (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    assert F.sink(rows).item() == pytest.approx(share)
    assert F.sink_excess(rows).item() == pytest.approx((share - 1 / 4) / (1 - 1 / 4))


@pytest.mark.parametrize("queries", [3, 4])
def test_a_few_queries_may_look_at_one_key_by_chance(queries):
    weights = torch.tensor([1.0, 0.0]).expand(1, 1, 5, 2)
    rows = rows_of(weights, query_mask=(torch.arange(5) < queries)[None])
    assert F.sink(rows).item() == 1
    assert F.sink_excess(rows).isnan().item() == (queries < 4)


def test_heads_differ_over_the_queries_that_see_several_keys():
    """A query of a single key says nothing: of the other, each head has a key of its own."""
    weights = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])[None]
    visible = torch.tensor([[True, False], [True, True]]).expand(1, 1, 2, 2)
    assert F.head_diversity(rows_of(weights, visible=visible)).item() == pytest.approx(1)
    assert F.head_diversity(rows_of(weights[:, :, :1], visible=visible[:, :, :1])).isnan()


def test_a_mask_over_a_token_and_a_slot_is_that_of_the_token():
    """A band of two keys, of which the second is no token."""
    weights = torch.tensor([[0.25, 0.75], [0.0, 1.0]]).expand(1, 1, 2, 2)
    visible = torch.tensor([[True, True], [False, True]]).expand(1, 1, 2, 2)
    rows = rows_of(weights, visible=visible, extra_keys=1)
    assert rows.token_visible.shape == (1, 1, 2, 1)
    torch.testing.assert_close(F.lift(rows).flatten(), torch.tensor([0.5, torch.nan]), equal_nan=True)


def test_check_values_of_the_definition():
    """Random logits, sizes 2, 3, 5, 7: the values that METRICS.md states, over many draws."""
    shape = (400, 3, 5, 7)
    logits, other = random_logits(*shape), random_logits(400, 3, 7, 5, seed=1)
    there, back = rows_of(logits.softmax(-1)), back_rows_of(logits.transpose(-1, -2).softmax(-1))
    of_heads = F.head_alignment_matrix(there, back).diagonal(dim1=1, dim2=2)
    assert of_heads.mean() == pytest.approx(0.76, abs=0.01)
    independent = back_rows_of(other.softmax(-1))
    of_heads = F.head_alignment_matrix(there, independent).diagonal(dim1=1, dim2=2)
    assert of_heads.mean() == pytest.approx(0.0, abs=0.01)


def test_best_head_matching_finds_the_permutation():
    logits = 2 * random_logits(1, 3, 5, 7)
    order = [2, 0, 1]
    back = back_rows_of(logits[:, order].transpose(-1, -2).softmax(-1))
    matrix = F.head_alignment_matrix(rows_of(logits.softmax(-1)), back)
    assert F.best_head_matching(matrix[0]) == [(0, 1), (1, 2), (2, 0)]


def test_heads_whose_alignment_is_undefined_are_matched_last():
    matrix = torch.tensor([[math.nan, 0.2, 0.1], [0.3, 0.9, math.nan], [-0.8, math.nan, 0.4]])
    assert F.best_head_matching(matrix) == [(0, 1), (1, 0), (2, 2)]


@pytest.mark.parametrize(("swing", "defined"), [(0.5e-6, False), (2e-6, True)])
def test_a_map_that_differs_by_rounding_only_has_no_alignment(swing, defined):
    """A standard deviation of a millionth of the weights is rounding of float32."""
    signs = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    there = ((1 + swing * signs) / 8).expand(1, 2, 5, 8)
    back = random_logits(1, 2, 8, 5).double().softmax(-1)
    for function in (F.alignment, F.head_alignment_matrix):
        values = function(rows_of(there), back_rows_of(back))
        assert (values.isfinite() if defined else values.isnan()).all(), function.__name__


def test_slots_that_are_no_tokens_take_no_part_in_alignment():
    """A slot that takes a quarter of every query's attention scales the rest, which no correlation sees."""

    def with_slot(weights):
        return torch.cat([0.75 * weights, torch.full_like(weights[..., :1], 0.25)], dim=-1)

    there, back = random_logits(2, 3, 5, 7).softmax(-1), random_logits(2, 3, 7, 5, seed=1).softmax(-1)
    plain = rows_of(there), back_rows_of(back)
    slotted = rows_of(with_slot(there), extra_keys=1), back_rows_of(with_slot(back), extra_keys=1)
    for function in (F.alignment, F.head_alignment_matrix):
        torch.testing.assert_close(function(*slotted), function(*plain))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 8))
def test_permuting_samples_permutes_their_numbers_and_all_stay_in_range(seed, scale):
    there = (scale * random_logits(5, 3, 5, 7, seed=seed)).softmax(-1)
    back = (scale * random_logits(5, 3, 7, 5, seed=seed + 1)).softmax(-1)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    numbers = sample_statistics(F.prepare_layer(rows_of(there), back_rows_of(back)))
    permuted = sample_statistics(F.prepare_layer(rows_of(there[order]), back_rows_of(back[order])))
    for column, values in numbers.items():
        torch.testing.assert_close(permuted[column], values[order], msg=str(column))
        bounds = RANGES[column.statistic](*((7, 5) if column.direction == DIRECTION.opposite else (5, 7)))
        assert_in(bounds, values, column)
        # The table gives the range of any number of tokens.
        low, high = STATISTICS[column.statistic].range
        assert low <= bounds[0] <= bounds[1] <= high, column


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 20), queries=st.integers(1, 5), keys=st.integers(1, 7))
def test_every_number_stays_in_its_range_and_is_undefined_only_where_it_must_be(seed, scale, queries, keys):
    """The ranges that METRICS.md states, of so many real tokens among padding."""
    eeg, spec = torch.arange(5) < queries, torch.arange(7) < keys
    there = (scale * random_logits(2, 3, 5, 7, seed=seed)).masked_fill(~spec, -torch.inf).softmax(-1)
    back = (scale * random_logits(2, 3, 7, 5, seed=seed + 1)).masked_fill(~eeg, -torch.inf).softmax(-1)
    eeg, spec = eeg.expand(2, 5), spec.expand(2, 7)
    forward = rows_of(there, key_mask=spec, query_mask=eeg)
    backward = back_rows_of(back, key_mask=eeg, query_mask=spec)
    single = {"entropy": keys == 1, "head_diversity": keys == 1}
    single |= {"query_selectivity": keys == 1 or queries == 1, "sink_excess": keys == 1 or queries < 4}
    numbers = F.row_statistics(forward) | {
        "query_selectivity": F.query_selectivity(forward),
        "head_diversity": F.head_diversity(forward),
        "sink": F.sink(forward),
        "sink_excess": F.sink_excess(forward),
        "lift": F.lift(forward)[..., :queries, :keys],
    }
    for name, values in numbers.items():
        assert_in(RANGES[name](queries, keys), values, name)
        assert values.isnan().all() if single.get(name, False) else values.isfinite().all(), name
    for function in (F.alignment, F.head_alignment_matrix):
        values = function(forward, backward)
        assert_in((-1, 1), values, function.__name__)
        # Of a single token either map is all ones.
        assert values.isnan().all() if queries == 1 or keys == 1 else values.isfinite().any(), function.__name__


SCORES = st.lists(st.floats(-1, 1), min_size=5, max_size=20)


@settings(max_examples=40, deadline=None)
@given(correct=SCORES, incorrect=SCORES, groups=st.integers(5, 8))
def test_an_auroc_and_its_interval_stay_in_their_range(correct, incorrect, groups):
    scores = torch.tensor(correct + incorrect)
    outcome = torch.arange(len(scores)) < len(correct)
    bins, of_group = score_bins(scores, -1, 1), torch.arange(len(scores)) % groups
    together = F.separation(bins, torch.stack([outcome, ~outcome], dim=1))
    grouped = F.separation(bins, torch.stack([outcome, ~outcome], dim=1), of_group)
    for found in (together, grouped):
        if found is together or min(found.correct_groups, found.incorrect_groups) >= 5:
            assert 0 <= found.low <= found.auroc <= found.high <= 1
            assert found.low < found.high, "nothing is certain"


@settings(max_examples=40, deadline=None)
@given(correct=SCORES, incorrect=SCORES, groups=st.integers(5, 8))
def test_high_scores_detect_errors_as_well_as_low_ones_do_not(correct, incorrect, groups):
    scores = torch.tensor(correct + incorrect)
    outcome = torch.arange(len(scores)) < len(correct)
    of_scores = score_bins(scores, -1, 1), torch.stack([outcome, ~outcome], dim=1)
    for of_group in (None, torch.arange(len(scores)) % groups):
        low, high = (F.separation(*of_scores, of_group, error_side=side) for side in ("low", "high"))
        mirrored = 1 - high.auroc, 1 - high.high, 1 - high.low
        assert (low.auroc, low.low, low.high) == pytest.approx(mirrored, abs=1e-6, nan_ok=True)
        assert (low.error_side, high.error_side) == ("low", "high")
