"""Where a mask begins: on either side of every boundary, how many keys each row is said to see.

What counts is ``K_q``: entropy is a share of its logarithm, and a lift a multiple of its inverse.
"""

import pytest
import torch
import torch.nn.functional as F

from lightning_xattn.capture.masks import RecordedWeights, find_weighted_keys
from lightning_xattn.functional import prepare_rows
from tests.capture.models import BATCH, Runs, heads, mha, record_fusion, tokens
from tests.toy import AUDIO, HEADS, TEXT

HIDDEN = torch.arange(TEXT) >= 4  # the last three keys


def keys_seen(pair):
    """How many keys each row sees, ``(batch, heads, queries)``."""
    rows = prepare_rows(pair.forward)
    return rows.keys.expand(rows.valid.shape)


def by_attention_mask(module, x, y, mask):
    return module.cross(x, y, y, attn_mask=mask.expand(AUDIO, TEXT))


def by_padding_mask(module, x, y, mask):
    return module.cross(x, y, y, key_padding_mask=mask.expand(BATCH, TEXT))


def by_kernel(module, x, y, mask):
    return F.scaled_dot_product_attention(heads(x), heads(y), heads(y), mask.expand(AUDIO, TEXT))


@pytest.mark.parametrize("attend", [by_attention_mask, by_padding_mask, by_kernel])
@pytest.mark.parametrize(("added", "seen"), [(-1000.0, 4), (-999.0, 7), (-100.0, 7)])
def test_a_float_mask_hides_from_minus_1000_on_and_is_a_bias_above(attend, added, seen):
    """A bias by distance, as of ALiBi, may well add -100 to what is far away."""
    mask = torch.zeros(TEXT).masked_fill(HIDDEN, added)
    (pair,) = record_fusion(Runs(attend, cross=mha()).eval(), {"a_to_b": "fusion"}, (*tokens(), mask))
    assert (keys_seen(pair) == seen).all()


def softmax_of(scores):
    """What is recorded of a softmax over these scores."""
    scores = scores.expand(BATCH, HEADS, AUDIO, TEXT)
    fusion = Runs(lambda module, scores, y: scores.softmax(-1) @ heads(y))
    return record_fusion(fusion, {"a_to_b": "fusion"}, (scores, tokens()[1]))[0]


@pytest.mark.parametrize("largest", [0.0, 30.0, -700.0])
@pytest.mark.parametrize(("below", "seen"), [(500.0, 4), (499.0, 7)])
def test_a_softmax_hides_what_gets_no_weight_and_lies_500_below_the_largest_score(largest, below, seen):
    scores = torch.full((TEXT,), largest).masked_fill(HIDDEN, largest - below)
    assert (softmax_of(scores).forward.weights[..., HIDDEN] == 0).all()
    assert (keys_seen(softmax_of(scores)) == seen).all()


def test_a_key_with_any_weight_is_not_hidden_however_low_its_score():
    """A softmax that divides its scores by a temperature gives weight to keys 500 below the largest."""

    def attend(module, scores, y):
        return F.softmax(scores, dim=-1) @ heads(y)

    scores = torch.zeros(BATCH, HEADS, AUDIO, TEXT, dtype=torch.float64).masked_fill(HIDDEN, -600.0)
    fusion = Runs(attend)
    (pair,) = record_fusion(fusion, {"a_to_b": "fusion"}, (scores, tokens()[1].double()))
    assert (pair.forward.weights[..., HIDDEN] > 0).all(), "of float64, exp(-600) is not 0"
    assert (keys_seen(pair) == TEXT).all()


@pytest.mark.parametrize(
    ("largest", "seen"),
    [
        (-9499.0, TEXT),
        (-9500.0, 0),
        (-10_000.0, 0),
        (-10_500.0, 0),
        (-10_501.0, TEXT),
        (-29_999.0, TEXT),
        (-30_000.0, 0),
        (torch.finfo(torch.float16).min, 0),
        (torch.finfo(torch.float32).min, 0),
    ],
)
def test_a_row_is_hidden_whole_whose_largest_score_is_what_a_mask_adds(largest, seen):
    """-10,000 within 500, or -30,000 and lower; such a row is neither focused nor diffuse."""
    assert (keys_seen(softmax_of(torch.full((TEXT,), largest))) == seen).all()


def returned(weights):
    """What is recorded of weights that a module returns, whose softmax is not seen."""
    batch, _, queries, _ = weights.shape
    fusion = Runs(lambda module, x, weights: (x, weights))
    (pair,) = record_fusion(fusion, {"a_to_b": "fusion[1]"}, (torch.zeros(batch, queries, 4), weights))
    return pair


@pytest.mark.parametrize(("dtype", "seen"), [(torch.float32, 6), (torch.bfloat16, 6), (torch.float16, 7)])
def test_a_key_without_any_weight_is_padding_but_in_float16_which_rounds_small_weights_to_0(dtype, seen):
    weights = torch.full((BATCH, HEADS, AUDIO, TEXT), 1 / 6)
    weights[..., 6] = 0
    assert (keys_seen(returned(weights.to(dtype))) == seen).all()


def closed(pattern):
    """Weights of a pattern of keys, alike among those that are open."""
    pattern = torch.as_tensor(pattern, dtype=torch.float32)
    return pattern / pattern.sum(-1, keepdim=True)


GROWING = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
SPARSE = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 1]])


@pytest.mark.filterwarnings("ignore:.*weights of exactly 0")
@pytest.mark.parametrize(("dtype", "seen"), [(torch.float32, 3), (torch.bfloat16, 3), (torch.float16, 4)])
def test_a_key_that_nobody_sees_is_padding_also_where_other_zeros_are_weights(dtype, seen):
    patterns = F.pad(torch.stack([GROWING, SPARSE])[None], (0, 1))
    assert (keys_seen(returned(closed(patterns).to(dtype))) == seen).all()


def test_a_key_has_weight_if_any_query_of_any_head_looks_at_it():
    weights = torch.zeros(2, 2, 2, 4)
    weights[0, 0, 0, 0] = weights[0, 1, 1, 2] = weights[1, 0, 1, 3] = 0.5
    seen = [[True, False, True, False], [False, False, False, True]]
    assert find_weighted_keys(weights).tolist() == [[[of_sample]] for of_sample in seen]
    assert find_weighted_keys(weights.half()).tolist() == [[[[True] * 4]]] * 2, "float16 rounds small weights to 0"


@pytest.mark.parametrize("masked", [False, True])
def test_tokens_that_were_cut_off_are_put_back_as_padding(masked):
    """Attention over three tokens of five; a mask that is one for all samples and heads goes along."""
    weights = torch.rand(2, 2, 3, 3).softmax(-1)
    known = torch.tensor([[True, True, False], [True, True, True]])
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    recorded = RecordedWeights(weights, *((known, causal) if masked else ()))
    whole = recorded.padded_to(5)
    assert torch.equal(whole.weights[:, :, :3, :3], weights)
    assert not whole.weights[:, :, 3:].any()
    assert not whole.weights[..., 3:].any()
    real = known.tolist() if masked else [[True] * 3] * 2
    assert whole.key_mask.dtype == torch.bool
    assert whole.key_mask.tolist() == [[*of_sample, False, False] for of_sample in real]
    if masked:
        assert whole.visible.shape == (2, 2, 5, 5)
        assert torch.equal(whole.visible[..., :3, :3], causal.expand(2, 2, 3, 3))
        assert not whole.visible[..., 3:].any()
        assert not whole.visible[..., 3:, :].any()
    else:
        assert whole.visible is None
    assert recorded.padded_to(3) is recorded
