"""Long sequences: in chunks and from scores every number is that of all weights at once."""

import numpy as np
import pytest
import torch

from lightning_xattn import functional as F
from lightning_xattn.core.attention import Attention, Direction
from lightning_xattn.core.scores import Scores
from lightning_xattn.evaluation.statistics import sample_statistics
from lightning_xattn.functional.bins import bin_sizes
from tests import reference

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 3, 73, 67, 5
DIRECTION = Direction("audio", "text")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of few queries."""
    monkeypatch.setattr("lightning_xattn.functional.row_chunks.CHUNK", 11 * BATCH * HEADS * KEYS)


@pytest.fixture(params=[0, 2**22], ids=["recomputed", "kept"])
def kept(request, monkeypatch):
    """Whether the backward direction's map is kept or computed again."""
    monkeypatch.setattr("lightning_xattn.functional.directions.KEPT_CELLS", request.param)


@pytest.fixture(params=[True, False], ids=["looked at", "not looked at"])
def looks(request, monkeypatch):
    """Whether values are looked at, or not, as on a GPU, which would have to wait."""
    monkeypatch.setattr("lightning_xattn.core.devices.reads_at_once", lambda tensor: request.param)


def make_scores(seed=0, heads=HEADS, scale=2.0):
    generator = torch.Generator().manual_seed(seed)

    def some(tokens):
        return torch.randn(BATCH, heads, tokens, WIDTH, generator=generator) * scale

    bias = torch.randn(1, 1, QUERIES, KEYS, generator=generator)
    return Scores(some(QUERIES), some(KEYS), (bias,)), Scores(some(KEYS), some(QUERIES))


def make_masks(case, seed=1):
    """Arguments of both directions."""
    if case == "by head, for all queries":
        shown = torch.rand(BATCH, HEADS, 1, KEYS, generator=torch.Generator().manual_seed(seed)) > 0.3
        return {"visible": shown}, {}
    generator = torch.Generator().manual_seed(seed)
    keys, queries = (torch.rand(BATCH, n, generator=generator) > 0.2 for n in (KEYS, QUERIES))
    padding = {"key_mask": keys, "query_mask": queries}, {"key_mask": queries, "query_mask": keys}
    shape = {"one mask": (QUERIES, KEYS), "by head": (BATCH, HEADS, QUERIES, KEYS)}.get(case, ())
    visible = torch.rand(shape or (1, 1), generator=generator) > 0.3
    if case == "none":
        return {}, {}
    if case == "padding":
        return padding
    visible[..., 5, :] = False  # a query without a key
    return padding[0] | {"visible": visible}, padding[1]


def of_kind(attention, kind):
    """The same attention from scores, or from its weights."""
    if kind == "scores":
        return attention
    weights = attention.weights.to({"half": torch.bfloat16}.get(kind, torch.float32))
    return Attention(attention.direction, weights, attention.key_mask, attention.visible, attention.query_mask)


def sample(attention, b):
    """One sample's weights in float64 and its masks, as the reference takes them."""
    visible, weights = attention.visible_to(), attention.weights[b].double().numpy()
    keys = np.ones(weights.shape, bool) if visible is None else visible.expand(attention.shape)[b].numpy()
    weights = np.where(keys, weights, 0)
    total = weights.sum(-1, keepdims=True)
    queries = None if attention.query_mask is None else attention.query_mask[b].numpy()
    return weights / np.where(total > 0, total, 1), queries, keys


def expected_numbers(there, back, b):
    """The numbers of a sample from the reference, by column."""
    found = {}
    for attention in (there, back):
        one = sample(attention, b)
        rows = reference.row_statistics(*one)
        means = {name: rows[name] for name in ("entropy", "max", "effective_keys", "sparsity")}
        means["query_selectivity"] = reference.query_selectivity(*one)
        found |= {f"{attention.direction}/{name}": reference.mean_defined(values) for name, values in means.items()}
        found[f"{attention.direction}/head_diversity"] = reference.head_diversity(*one)
        for name in ("sink", "sink_excess"):
            for head, value in enumerate(getattr(reference, name)(*one)):
                found[f"{attention.direction}/{name}/head_{head}"] = value
    (A, eeg, sees), (B, spec, seen) = sample(there, b), sample(back, b)
    found["alignment"] = reference.alignment(A, B, eeg, spec, sees, seen)
    return found


@pytest.mark.usefixtures("small_chunks", "kept", "looks")
@pytest.mark.parametrize("case", ["none", "padding", "one mask", "by head", "by head, for all queries"])
@pytest.mark.parametrize("kind", ["scores", "weights", "half"])
def test_every_number_is_the_references(case, kind):
    directions = zip((DIRECTION, DIRECTION.opposite), make_scores(), make_masks(case), strict=True)
    there, back = (of_kind(Attention(one, scores, **masks), kind) for one, scores, masks in directions)
    numbers = {str(column): values for column, values in sample_statistics(F.prepare_layer(there, back)).items()}
    for b in range(BATCH):
        for name, value in expected_numbers(there, back, b).items():
            assert numbers[name][b].item() == pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True), name


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("case", ["none", "padding", "by head"])
def test_maps_in_bins_are_means_over_their_cells(case):
    (scores, _), (masks, _) = make_scores(), make_masks(case)
    rows = F.prepare_rows(Attention(DIRECTION, scores, **masks))
    assert rows.bin_sizes == bin_sizes(QUERIES, KEYS) == (2, 2)
    whole = [reference.head_weights(*sample(rows.attention, b)) for b in range(BATCH)]
    for b, cells in enumerate(whole):
        for q in range(0, QUERIES, 2):
            for k in range(0, KEYS, 2):
                values = [one for i in (q, q + 1) for j in (k, k + 1) for one in cells.get((i, j), [])]
                mean = (rows.map_weights / rows.map_heads)[b, q // 2, k // 2].item()
                expected = sum(values) / len(values) if values else np.nan
                assert mean == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.usefixtures("small_chunks", "kept")
def test_the_alignment_of_bins_is_that_of_their_means():
    there, back = make_scores()
    compared = F.prepare_layer(Attention(DIRECTION, there), Attention(DIRECTION.opposite, back)).comparison
    for b in range(BATCH):
        x, y = there.weights()[b].mean(0), back.weights()[b].mean(0).T
        maps = [
            torch.stack(
                [torch.stack([m[q : q + 2, k : k + 2].mean() for k in range(0, KEYS, 2)]) for q in range(0, QUERIES, 2)]
            )
            for m in (x, y)
        ]
        expected = np.corrcoef(*(m.flatten().numpy() for m in maps))[0, 1]
        assert compared.map_alignment[b].item() == pytest.approx(expected, abs=1e-5)
    assert compared.is_whole.all()


@pytest.mark.usefixtures("small_chunks", "kept")
@pytest.mark.parametrize("kind", ["scores", "weights"])
def test_attention_of_one_head_stays_as_it_is(kind):
    """Its map is its weights, which nothing may change in place."""
    directions = zip((DIRECTION, DIRECTION.opposite), make_scores(heads=1), strict=True)
    there, back = (of_kind(Attention(*one), kind) for one in directions)
    before = [one.weights.clone() for one in (there, back)]
    F.prepare_layer(there, back)
    for one, weights in zip((there, back), before, strict=True):
        assert one.weights.equal(weights)


@pytest.mark.usefixtures("small_chunks", "kept")
@pytest.mark.parametrize("tokens", [(QUERIES, KEYS), (60, 61)], ids=["in bins", "of each token"])
def test_one_heads_chunks_do_not_write_over_each_other(tokens):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(BATCH, 1, n, WIDTH, generator=generator) for n in tokens)
    scores = Attention(DIRECTION, Scores(first, second)), Attention(DIRECTION.opposite, Scores(second, first))
    found, expected = (F.prepare_layer(*(of_kind(one, kind) for one in scores)) for kind in ("scores", "weights"))
    torch.testing.assert_close(found.comparison.alignment, expected.comparison.alignment, rtol=1e-4, atol=1e-5)
    for one, other in zip(found.directions, expected.directions, strict=True):
        torch.testing.assert_close(one.map_weights, other.map_weights)


def test_a_score_of_minus_infinity_is_a_weight_of_0():
    scores, _ = make_scores()
    key = scores.key.clone()
    key[..., 3, :] = torch.tensor([-torch.inf, 0, 0, 0, 0])
    query = scores.query.clone()
    query[..., 0] = query[..., 0].abs() + 1
    query[..., 1:] = query[..., 1:] * (query[..., 1:] != 0)
    one = Scores(query, key.nan_to_num(nan=0.0))
    rows = F.prepare_rows(Attention(DIRECTION, one))
    weights = one.weights()
    sound = weights.isfinite().all(-1)
    assert rows.valid.equal(sound)
    other = F.prepare_rows(Attention(DIRECTION, weights))
    torch.testing.assert_close(rows.entropy, other.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_chunks", "kept")
def test_a_constant_map_has_no_alignment():
    there, back = make_scores()
    uniform = Scores(torch.zeros_like(there.query), there.key)
    layer = F.prepare_layer(Attention(DIRECTION, uniform), Attention(DIRECTION.opposite, back))
    assert layer.comparison.alignment.isnan().all()


def test_a_broken_query_is_left_out_of_both_directions():
    there, back = make_scores()
    query = there.query.clone()
    query[0, 1, 3] = torch.nan
    sides = Attention(DIRECTION, Scores(query, there.key, there.biases)), Attention(DIRECTION.opposite, back)
    layer = F.prepare_layer(*sides)
    assert layer.directions[0].broken.nonzero().tolist() == [[0, 1, 3]]
    plain = F.prepare_layer(Attention(DIRECTION, there), sides[1])
    assert layer.comparison.alignment[1] == plain.comparison.alignment[1]
    rows = [one for one in range(QUERIES) if one != 3]
    x, y = (scores.weights()[0].mean(0) for scores in (there, back))
    expected = np.corrcoef(x[rows].flatten().numpy(), y.T[rows].flatten().numpy())[0, 1]
    assert layer.comparison.alignment[0].item() == pytest.approx(expected, abs=1e-5)
    back_query = back.query.clone()
    back_query[0, 0, 2] = torch.inf
    other = F.prepare_layer(sides[0], Attention(DIRECTION.opposite, Scores(back_query, back.key)))
    assert other.directions[1].broken.nonzero().tolist() == [[0, 0, 2]]
    assert other.comparison.alignment.isfinite().all()


def test_large_scores_lose_no_digits():
    """Of scores around 1,000 the entropy is a difference of large numbers unless it is computed with care."""
    there, _ = make_scores()
    shifted = Scores(there.query, there.key, (*there.biases, torch.full((1, 1, 1, 1), 1000.0)))
    rows = F.prepare_rows(Attention(DIRECTION, shifted)), F.prepare_rows(Attention(DIRECTION, there))
    torch.testing.assert_close(rows[0].entropy, rows[1].entropy, rtol=1e-4, atol=1e-4)
