"""Every statistic against the slow reference, on plain, masked, ragged, broken and half-precision attention."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lightning_xattn import functional as F
from lightning_xattn.core.attention import Attention, Direction
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.evaluation.statistics import sample_statistics, score_bins
from tests import reference
from tests.messages import tells

BATCH, HEADS, QUERIES, KEYS = 2, 3, 5, 7
EEG_TO_SPEC = Direction("eeg", "spec")


def softmax_pair(generator, dtype=torch.float32):
    there = torch.randn(BATCH, HEADS, QUERIES, KEYS, generator=generator)
    back = 0.5 * there.transpose(-1, -2) + torch.randn(BATCH, HEADS, KEYS, QUERIES, generator=generator)
    return (2 * there).softmax(-1).to(dtype), (2 * back).softmax(-1).to(dtype)


def masked(weights, visible):
    weights = weights * visible
    return weights / weights.sum(-1, keepdim=True)  # a fully masked row becomes NaN, as softmax makes it


def make_case(name):
    """Forward and backward attention, and the masks as the reference takes them, by sample."""
    generator = torch.Generator().manual_seed(3)
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    there, back = softmax_pair(generator, dtype)
    eeg = spec = there_sees = back_sees = None
    if name == "padded":
        eeg = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        spec = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
        there, back = masked(there, spec[:, None, None]), masked(back, eeg[:, None, None])
    elif name == "attention mask":
        there_sees = torch.rand(BATCH, HEADS, QUERIES, KEYS, generator=generator) > 0.3
        there_sees[0, 1, 2] = False
        there, back_sees = masked(there, there_sees), torch.ones(1, 1, KEYS, QUERIES, dtype=torch.bool)
    elif name == "attention masks both ways":
        there_sees = torch.rand(BATCH, HEADS, QUERIES, KEYS, generator=generator) > 0.3
        back_sees = torch.rand(BATCH, HEADS, KEYS, QUERIES, generator=generator) > 0.3
        there, back = masked(there, there_sees), masked(back, back_sees)
    elif name == "causal":  # rows of one key, of two, and so on
        there_sees = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril().expand(BATCH, HEADS, -1, -1)
        back_sees = there_sees.transpose(-1, -2)
        there, back = masked(there, there_sees), masked(back, back_sees)
    elif name == "local":  # each query sees the key in its own place and the next one
        places = torch.arange(KEYS) - torch.arange(QUERIES)[:, None]
        there_sees = ((places == 0) | (places == 1)).expand(1, 1, -1, -1)
        there = masked(there, there_sees)
    elif name == "two tokens":
        there, back = there[..., :2, :2], back[..., :2, :2]
        there, back = (side / side.sum(-1, keepdim=True) for side in (there, back))
    elif name == "broken rows":
        there[0, 1, 2, 3] = torch.nan
        there[1, 0, 4] *= 1.01
        back[1, :, 6] = torch.inf
    elif name == "one head broken":
        back[0, 2] = torch.nan
    elif name == "peaked":  # weights from 0 on, whose logarithm is floored
        there, back = (200 * there).softmax(-1), (200 * back).softmax(-1)
    elif name == "uniform":
        there = torch.full_like(there, 1 / KEYS)
    elif name == "one key":
        there, back = torch.ones(BATCH, HEADS, 1, 1), torch.ones(BATCH, HEADS, 1, 1)
    elif name == "nothing valid":
        there, back = there * torch.nan, back * torch.nan
    elif name == "one valid key":
        spec = torch.tensor([[True] + [False] * 6] * 2)
        there = masked(there, spec[:, None, None])
    forward = Attention(EEG_TO_SPEC, there, key_mask=spec, visible=there_sees, query_mask=eeg)
    backward = Attention(EEG_TO_SPEC.opposite, back, key_mask=eeg, visible=back_sees, query_mask=spec)
    return forward, backward


CASES = (
    "plain",
    "padded",
    "attention mask",
    "attention masks both ways",
    "causal",
    "local",
    "two tokens",
    "broken rows",
    "one head broken",
    "peaked",
    "uniform",
    "one key",
    "one valid key",
    "nothing valid",
    "bfloat16",
)


def sample(attention, b):
    """One sample's weights in float64 and its query and key masks, as the reference takes them."""
    weights = attention.weights[b].double().numpy()
    if attention.weights.dtype == torch.bfloat16:
        weights = weights / weights.sum(-1, keepdims=True)
    queries = None if attention.query_mask is None else attention.query_mask[b].numpy()
    keys = None
    if attention.key_mask is not None:
        keys = attention.key_mask[b].numpy()
    if attention.visible is not None:
        visible = attention.visible.expand(attention.weights.shape)[b].numpy()
        keys = visible if keys is None else keys & visible
    return weights, queries, keys


def compare(ours, expected, **tolerance):
    np.testing.assert_allclose(ours.double().numpy(), np.array(expected), **{"rtol": 2e-5, "atol": 2e-6} | tolerance)


@pytest.fixture(params=CASES)
def case(request):
    return make_case(request.param)


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_the_same_where_no_value_is_looked_at(name, monkeypatch):
    """As on a GPU, which would have to wait for it."""
    layer = F.prepare_layer(*make_case(name))
    numbers = sample_statistics(layer)
    monkeypatch.setattr("lightning_xattn.core.devices.reads_at_once", lambda tensor: False)
    other = F.prepare_layer(*make_case(name))
    found = sample_statistics(other)
    assert found.columns == numbers.columns
    torch.testing.assert_close(found.matrix, numbers.matrix, rtol=1e-5, atol=1e-6, equal_nan=True)
    for one, two in zip(layer.directions, other.directions, strict=True):
        for what in ("map_weights", "map_heads", "received"):
            torch.testing.assert_close(getattr(two, what), getattr(one, what), msg=what)
    for what in ("x", "y", "is_whole"):
        ours, theirs = (getattr(each.comparison, what) for each in (other, layer))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True, msg=what)


def test_row_statistics(case):
    for attention in case:
        ours = F.row_statistics(F.prepare_rows(attention))
        expected = [reference.row_statistics(*sample(attention, b)) for b in range(BATCH)]
        assert set(ours) == set(expected[0])
        for name, values in ours.items():
            compare(values, [e[name] for e in expected])


PLAIN = {
    **F.ROW_STATISTICS,
    "query_selectivity": F.query_selectivity,
    "head_diversity": F.head_diversity,
    "sink": F.sink,
    "sink_excess": F.sink_excess,
    "lift": F.lift,
    "lift_map": F.lift_map,
    "received_lift": F.received_lift,
    "received_attention": F.received_attention,
}


@pytest.mark.parametrize("name", PLAIN)
def test_weights_may_be_a_tensor_with_a_key_mask_an_attention_or_rows(name):
    generator = torch.Generator().manual_seed(5)
    weights, _ = softmax_pair(generator)
    key_mask = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    weights, function = masked(weights, key_mask[:, None, None]), PLAIN[name]
    expected = []
    for b in range(BATCH):
        of_sample = weights[b].double().numpy(), None, key_mask[b].numpy()
        rows = reference.row_statistics(*of_sample)
        expected.append(rows[name] if name in rows else getattr(reference, name)(*of_sample))
    attention = Attention(EEG_TO_SPEC, weights, key_mask)
    for values in (function(weights, key_mask), function(attention), function(F.prepare_rows(attention))):
        compare(values, expected)
    torch.testing.assert_close(function(weights[1:]), function(weights[1:], key_mask[1:]), equal_nan=True)


def test_two_directions_and_pairs_of_tensors():
    there, back = softmax_pair(torch.Generator().manual_seed(6))
    rows = F.prepare_rows(Attention(EEG_TO_SPEC, there)), F.prepare_rows(Attention(EEG_TO_SPEC.opposite, back))
    for function in (F.alignment, F.head_alignment_matrix):
        assert torch.equal(function(there, back), function(*rows)), function.__name__
    for function in (F.top_pairs, F.sample_top_pairs, F.head_top_pairs):
        key_mask = torch.arange(KEYS).expand(BATCH, KEYS) < 4
        of_attention = Attention(EEG_TO_SPEC, masked(there, key_mask[:, None, None]), key_mask)
        assert function(of_attention.weights, 3, key_mask) == function(of_attention, 3), function.__name__


def test_what_is_no_attention_is_refused():
    weights = torch.full((BATCH, HEADS, QUERIES, KEYS), 1 / KEYS)
    with pytest.raises(SettingError, match=tells("tensor (batch, heads, queries, keys)", "ndarray", "torch.as_tensor")):
        F.entropy(weights.numpy())
    with pytest.raises(ShapeError, match=tells("(batch, heads, queries, keys)", "(3, 5, 7)")):
        F.entropy(weights[0])
    with pytest.raises(ShapeError, match=tells("key_mask", "(2, 7)", "(2, 5)")):
        F.entropy(weights, torch.ones(BATCH, QUERIES, dtype=torch.bool))
    for own in (Attention(EEG_TO_SPEC, weights), F.prepare_rows(weights)):
        with pytest.raises(SettingError, match="key_mask goes with a tensor alone"):
            F.entropy(own, torch.ones(BATCH, KEYS, dtype=torch.bool))


def test_rows_are_valid_as_the_reference_says(case):
    for attention in case:
        expected = [reference.valid_rows(*sample(attention, b)) for b in range(BATCH)]
        np.testing.assert_array_equal(F.prepare_rows(attention).valid.numpy(), expected)


def test_lift_and_what_keys_receive(case):
    for attention in case:
        rows = F.prepare_rows(attention)
        samples = [sample(attention, b) for b in range(BATCH)]
        compare(F.lift(rows), [reference.lift(*s) for s in samples])
        compare(F.lift_map(rows), [reference.lift_map(*s) for s in samples])
        compare(F.received_lift(rows), [reference.received_lift(*s) for s in samples])
        compare(F.received_attention(rows), [reference.received_attention(*s) for s in samples])


def test_lift_leaves_out_keys_that_are_no_tokens():
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125]).expand(1, 1, 1, 4)
    rows = F.prepare_rows(Attention(EEG_TO_SPEC, weights, extra_keys=1))
    assert F.lift(rows).flatten().tolist() == [2.0, 1.0, 0.5]
    assert F.received_lift(rows).flatten().tolist() == [2.0, 1.0, 0.5]


def test_heads(case):
    for attention in case:
        rows = F.prepare_rows(attention)
        samples = [sample(attention, b) for b in range(BATCH)]
        compare(F.query_selectivity(rows), [reference.query_selectivity(*s) for s in samples])
        compare(F.head_diversity(rows), [reference.head_diversity(*s) for s in samples])
        compare(F.sink(rows), [reference.sink(*s) for s in samples])
        compare(F.sink_excess(rows), [reference.sink_excess(*s) for s in samples])


def test_top_pairs(case):
    for attention in case:
        rows = F.prepare_rows(attention)
        samples = [sample(attention, b) for b in range(BATCH)]
        compare_pairs(F.top_pairs(rows, 4), reference.top_pairs(samples, 4))
        for ours, of_sample in zip(F.sample_top_pairs(rows, 4), samples, strict=True):
            compare_pairs(ours, reference.top_pairs([of_sample], 4))
        for h, ours in enumerate(F.head_top_pairs(rows, 4)):
            of_head = [
                (A[[h]], queries, keys if keys is None or keys.ndim == 1 else keys[[h]]) for A, queries, keys in samples
            ]
            compare_pairs(ours, reference.top_pairs(of_head, 4))


def compare_pairs(ours, expected):
    assert len(ours) == len(expected)
    # Uniform weights of float64 differ in their last bits, and so in their order.
    if len({round(pair[2], 6) for pair in expected}) == len(expected):
        assert [pair[:2] for pair in ours] == [pair[:2] for pair in expected]
    np.testing.assert_allclose([pair[2:] for pair in ours], [pair[2:] for pair in expected], rtol=2e-5)


def test_equal_pairs_stand_in_order():
    rows = F.prepare_rows(Attention(EEG_TO_SPEC, torch.full((BATCH, HEADS, QUERIES, KEYS), 1 / KEYS)))
    assert [pair[:2] for pair in F.top_pairs(rows, 8)] == [(0, k) for k in range(7)] + [(1, 0)]


def test_slots_that_are_no_tokens_are_no_pairs():
    weights = torch.zeros(BATCH, HEADS, QUERIES, KEYS).softmax(-1)
    weights[..., -1] += 0.5
    weights = weights / weights.sum(-1, keepdim=True)
    pairs = F.top_pairs(F.prepare_rows(Attention(EEG_TO_SPEC, weights, extra_keys=1)), QUERIES * KEYS)
    assert len(pairs) == QUERIES * (KEYS - 1)
    assert max(pair.key for pair in pairs) == KEYS - 2
    np.testing.assert_allclose([pair.weight for pair in pairs], 1 / 7 / 1.5, rtol=1e-5)


@pytest.mark.parametrize("name", ["alignment", "head_alignment_matrix"])
def test_alignment(case, name):
    forward, backward = case
    expected = []
    for b in range(BATCH):
        there, eeg, there_sees = sample(forward, b)
        back, spec, back_sees = sample(backward, b)
        expected.append(getattr(reference, name)(there, back, eeg, spec, there_sees, back_sees))
    ours = getattr(F, name)(F.prepare_rows(forward), F.prepare_rows(backward))
    compare(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_null_is_the_mean_over_all_pairs_of_different_samples():
    generator = torch.Generator().manual_seed(4)
    pairs = [softmax_pair(generator) for _ in range(3)]
    there, back = (torch.cat(side) for side in zip(*pairs, strict=True))
    rows = [F.prepare_rows(Attention(d, w)) for d, w in ((EEG_TO_SPEC, there), (EEG_TO_SPEC.opposite, back))]
    compared = F.prepare_layer(*rows).comparison
    x, y, whole = compared.x, compared.y, compared.is_whole
    aligned = F.alignment(*rows)
    compare((x * y).sum((1, 2)), aligned.tolist())
    assert whole.all()
    null = F.alignment_null(x.sum(0), y.sum(0), aligned.sum(), torch.tensor(len(x)))
    expected = reference.alignment_null(list(zip(there.double().numpy(), back.double().numpy(), strict=True)))
    compare(null, expected, atol=1e-6)
    assert F.alignment_null(x[0], y[0], aligned[0], torch.tensor(1)).isnan(), "there is no other sample"


def test_a_head_that_may_not_attend_counts_with_weight_0():
    """Each head sees half of the keys: the mean of both is uniform, and varies only where the first head does."""
    visible = torch.eye(2, dtype=torch.bool).repeat_interleave(2, 1)[None, :, None].expand(1, 2, 2, 4)
    there = torch.tensor([[[[0.75, 0.25, 0, 0], [0.25, 0.75, 0, 0]], [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]]]])
    back = (4 * there.mean(1, keepdim=True)).transpose(-1, -2).softmax(-1)
    rows = F.prepare_rows(Attention(EEG_TO_SPEC, there, visible=visible))
    opposite = F.prepare_rows(Attention(EEG_TO_SPEC.opposite, back))
    x = torch.tensor([[0.375, 0.125, 0.25, 0.25], [0.125, 0.375, 0.25, 0.25]])
    expected = np.corrcoef(x.flatten(), back[0, 0].T.flatten())[0, 1]
    assert F.alignment(rows, opposite).item() == pytest.approx(expected, abs=1e-6)
    first, *_ = F.top_pairs(rows, 1)
    assert first == (0, 0, 0.375, 1.5)


def test_maps_with_padding_are_not_whole():
    """So they are not compared from sample to sample, whose tokens are not the same."""
    for case in ("padded", "broken rows"):
        assert F.prepare_layer(*make_case(case)).comparison.is_whole.tolist() == [False, False]


def made_up_scores(n_correct, n_incorrect):
    rng = np.random.default_rng(n_correct)
    correct = rng.normal(0.2, 0.3, n_correct).clip(-1, 1)
    incorrect = rng.normal(0, 0.3, n_incorrect).clip(-1, 1)
    correct[:2] = incorrect[:2]  # ties
    return correct, incorrect


def separation(correct, incorrect):
    scores = torch.tensor(np.concatenate([correct, incorrect]))
    is_correct = torch.arange(len(scores)) < len(correct)
    return F.separation(score_bins(scores, -1, 1), torch.stack([is_correct, ~is_correct], dim=1))


@pytest.mark.parametrize(("n_correct", "n_incorrect"), [(5, 5), (40, 13), (200, 7)])
def test_separation_of_binned_scores(n_correct, n_incorrect):
    scores = made_up_scores(n_correct, n_incorrect)
    ours = separation(*scores)
    binned = [reference.binned(s, -1, 1) for s in scores]
    assert ours.auroc == pytest.approx(reference.auroc(*binned), abs=1e-9)
    assert (ours.low, ours.high) == pytest.approx(
        reference.auroc_interval(ours.auroc, n_correct, n_incorrect), abs=2e-5
    )
    assert (ours.correct, ours.incorrect) == (n_correct, n_incorrect)
    assert ours.auroc == pytest.approx(reference.auroc(*scores), abs=1e-3), "bins are fine enough"


def test_a_score_on_an_edge_belongs_to_the_bin_above_it_and_the_highest_to_the_last():
    width, last = 2 / 2**14, 2**14 - 1
    scores = [-1, -1 + 0.75 * width, -1 + width, 0, 1 - 0.5 * width, 1, -1.1, 1.1, torch.nan]
    bins = score_bins(torch.tensor(scores, dtype=torch.float64), -1, 1)
    assert bins.tolist() == [0, 0, 1, 2**13, last, last, 0, last, 0]


def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    for n, m, shift in ((5, 5, 1.5), (20, 6, 0.5), (40, 40, 0.0)):
        truth = norm.cdf(shift / np.sqrt(2))
        intervals = [
            separation(rng.normal(shift / 5, 0.2, n).clip(-1, 1), rng.normal(0, 0.2, m).clip(-1, 1)) for _ in range(200)
        ]
        covered = np.mean([i.low <= truth <= i.high for i in intervals])
        assert 0.91 <= covered <= 0.99, (n, m, covered)
        assert all(i.high > i.low for i in intervals)


def test_groups_that_do_not_overlap():
    apart = separation(np.full(5, 0.5), np.full(5, -0.5))
    assert (apart.auroc, apart.high) == (1, 1)
    assert 0.5 < apart.low < 0.8
    back = separation(np.full(5, -0.5), np.full(5, 0.5))
    assert (back.auroc, back.low, back.high) == (0, 0, pytest.approx(1 - apart.low))


def test_nothing_is_claimed_of_fewer_than_five():
    ours = F.separation(torch.tensor([0, 2]), torch.tensor([[4, 0], [0, 50]]))
    assert np.isnan([ours.auroc, ours.low, ours.high]).all()
    assert (ours.correct, ours.incorrect) == (4, 50)


def test_class_adjusted_gap():
    rng = np.random.default_rng(0)
    scores, classes, correct = rng.normal(size=60), rng.integers(0, 4, 60), rng.random(60) < 0.6
    correct[classes == 3] = True  # a class without errors has no gap
    counts, sums = torch.zeros(4, 2), torch.zeros(4, 2)
    for score, c, ok in zip(scores, classes, correct, strict=True):
        counts[c, 0 if ok else 1] += 1
        sums[c, 0 if ok else 1] += score
    expected = reference.class_adjusted_gap(scores, classes, correct)
    assert F.class_adjusted_gap(counts, sums) == pytest.approx(expected, abs=1e-5)
    assert np.isnan(F.class_adjusted_gap(counts[3:], sums[3:]))


def test_mean_interval_is_students():
    # Student's sleep data (the second drug; R's t.test(extra) says 0.898 to 3.762).
    hours = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    assert F.mean_interval(hours.mean(), hours.std(ddof=1), 10) == pytest.approx((0.898, 3.762), abs=1e-3)
    assert np.isfinite(F.mean_interval(0.3, 0.1, 5)).all()
    assert np.isnan(F.mean_interval(0.3, 0.1, 4)).all(), "nothing is claimed of fewer than five"
    assert np.isnan(F.mean_interval(0.3, float("nan"), 1)).all()
    assert np.isnan(F.mean_interval(float("nan"), float("nan"), 0)).all()


def test_heads_with_masks_of_their_own_share_the_keys_that_any_of_them_sees():
    """Two heads see the first two keys, two the last two; without masks the same weights differ as much."""
    weights = torch.zeros(1, 4, 3, 4)
    weights[:, :2, :, :2] = weights[:, 2:, :, 2:] = 0.5
    masked = Attention(Direction("eeg", "spec"), weights, visible=weights > 0)
    for attention in (masked, Attention(Direction("eeg", "spec"), weights)):
        # Their mean is uniform over four keys, each of them over two: (ln 4 - ln 2) / ln 4.
        assert F.head_diversity(F.prepare_rows(attention)).item() == pytest.approx(0.5)


@pytest.mark.parametrize("visible", [torch.arange(QUERIES)[:, None] != 2, torch.arange(KEYS) < 4])
def test_a_mask_with_fewer_axes_is_the_same_for_all(visible):
    there, _ = softmax_pair(torch.Generator().manual_seed(3))
    whole = visible.expand(BATCH, HEADS, QUERIES, KEYS)
    there = masked(there, whole)
    short, spread = (F.prepare_rows(Attention(EEG_TO_SPEC, there, visible=one)) for one in (visible, whole))
    for name, values in F.row_statistics(spread).items():
        torch.testing.assert_close(F.row_statistics(short)[name], values, equal_nan=True)
    assert not short.wholly_masked.any()


def test_samples_whose_queries_or_keys_are_all_masked():
    """Not where nothing but an attention mask hides one modality of a joint sequence, as a causal mask does."""
    weights = torch.full((4, HEADS, QUERIES, KEYS), 1 / KEYS)
    queries, keys = torch.ones(4, QUERIES, dtype=torch.bool), torch.ones(4, KEYS, dtype=torch.bool)
    queries[1] = keys[2] = keys[0, 1:] = False
    sees = torch.ones(4, HEADS, QUERIES, KEYS, dtype=torch.bool)
    sees[3] = sees[0, 1:] = False
    for cross_modal_mass, expected in (
        (None, [False, True, True, True]),
        (torch.ones(4, HEADS, QUERIES), [False, True, True, False]),
    ):
        attention = Attention(EEG_TO_SPEC, weights, keys, sees, queries, cross_modal_mass=cross_modal_mass)
        assert F.prepare_rows(attention).wholly_masked.tolist() == expected
    extra = Attention(EEG_TO_SPEC, weights, keys & (torch.arange(KEYS) == 6), extra_keys=1)
    assert F.prepare_rows(extra).wholly_masked.all(), "only a learned key is left"
