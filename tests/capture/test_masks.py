"""Which keys are hidden: on either side of every boundary, how many keys each row is said to see.

What counts is ``K_q``: entropy is a share of its logarithm, and a lift a multiple of its inverse.
"""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn import AttentionRecorder
from lightning_xattn.capture.masks import RecordedWeights, find_weighted_keys
from lightning_xattn.core.errors import XAttnWarning
from lightning_xattn.functional import prepare_rows
from tests.capture.models import BATCH, Fusing, Runs, heads, mha, record_fusion, softmax, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH

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


def test_tokens_that_were_cut_off_are_put_back_as_padding():
    """Attention over three tokens of five; a mask that is one for all samples and heads goes along."""
    weights = torch.rand(2, 2, 3, 3).softmax(-1)
    known = torch.tensor([[True, True, False], [True, True, True]])
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    recorded = RecordedWeights(weights, known, causal)
    whole = recorded.padded_to(5)
    assert torch.equal(whole.weights, F.pad(weights, (0, 2, 0, 2)))
    assert torch.equal(whole.key_mask, F.pad(known, (0, 2)))
    assert torch.equal(whole.visible, F.pad(causal.expand(2, 2, 3, 3), (0, 2, 0, 2)))
    assert recorded.padded_to(3) is recorded
    plain = RecordedWeights(weights).padded_to(5)
    assert plain.key_mask.tolist() == [[True] * 3 + [False] * 2] * 2
    assert plain.visible is None


MASKS = {
    "filled with -10,000 and then scaled": (lambda s, m: s.masked_fill(m, -1e4) / math.sqrt(192), True),
    "added, lowest float": (lambda s, m: s + torch.zeros_like(s).masked_fill(m, torch.finfo(s.dtype).min), True),
    "added, lowest half": (lambda s, m: s + torch.zeros_like(s).masked_fill(m, -65504), True),
    "squared distances": (lambda s, m: -((torch.arange(TEXT) - 3.0) ** 2) * 20 - 1500 + 0 * s, False),
}


@pytest.mark.parametrize(("scores", "hides"), MASKS.values(), ids=MASKS)
def test_which_keys_a_softmax_hides_is_told_from_the_scores_whatever_hides_them(scores, hides):
    def attend(module, audio, text):
        return scores(heads(audio) @ heads(text).mT, HIDDEN.expand(AUDIO, TEXT)).softmax(-1) @ heads(text)

    (pair,) = record_fusion(Runs(attend), {"a_to_b": "fusion"})
    if hides:
        assert torch.equal(pair.forward.key_mask, (~HIDDEN).expand(BATCH, TEXT))
    else:
        assert pair.forward.visible_to() is None


def test_a_mask_that_is_changed_later_is_not_what_was_in_force():
    def attend(module, audio, text):
        mask = (~HIDDEN).repeat(AUDIO, 1)
        out = F.scaled_dot_product_attention(heads(audio), heads(text), heads(text), mask)
        mask.zero_()
        return out

    (pair,) = record_fusion(Runs(attend), {"a_to_b": "fusion"})
    assert torch.equal(pair.forward.key_mask, (~HIDDEN).expand(BATCH, TEXT))


def test_keys_without_weight_of_a_softmax_are_seen_beside_a_sample_that_is_all_hidden():
    def run(module, x, y):
        scores = heads(x) @ heads(y).mT
        scores[0, ..., 6] = -200.0  # so low that the weight is 0, and no mask
        scores[1] = -torch.inf
        return x, scores.softmax(-1)

    (pair,) = record_fusion(Runs(run), {"a_to_b": "fusion[1]"})
    assert (pair.forward.weights[0, ..., 6] == 0).all()
    assert pair.forward.key_mask[0].all()


def test_zeros_of_a_causal_mask_in_returned_weights_are_hidden():
    """A sequence asks another one as long as it is, and sees no later token; the softmax is seen."""
    x, y, causal = tokens()[1], tokens()[1].flip(1), torch.ones(TEXT, TEXT, dtype=torch.bool).tril()

    def attend(module, x, y):
        scores = (heads(x) @ heads(y).mT).masked_fill(~causal, -torch.inf)
        return x, scores.softmax(-1).mean(1)

    with AttentionRecorder(Fusing(Runs(attend)), {"a_to_b": "fusion[1]"}) as recorder:
        recorder._model(x, y)
        with pytest.warns(XAttnWarning) as told:
            (pair,) = recorder.attention
    assert not any("larger entropy" in str(warning.message) for warning in told)
    visible = pair.forward.visible.expand(pair.forward.weights.shape)
    assert torch.equal(visible, causal.expand(visible.shape))


@pytest.mark.filterwarnings("ignore:.*no axis for heads")
def test_zeros_that_may_be_weights_are_left_to_be_weights_and_said():
    def closed(module, x, y):
        powers = torch.relu(x @ y.mT) + 1e-30
        powers = torch.where(powers < 0.5, 0.0, powers) + torch.eye(TEXT)[:AUDIO]
        return x, powers / powers.sum(-1, keepdim=True)

    with AttentionRecorder(Fusing(Runs(closed)), {"a_to_b": "fusion[1]"}) as recorder:
        recorder._model(*tokens())
        with pytest.warns(XAttnWarning, match=tells("'fusion[1]'", "weights of exactly 0", "softmax")):
            (pair,) = recorder.attention
    assert (pair.forward.weights == 0).any()
    assert pair.forward.visible is None or pair.forward.visible.any(-2).all()


def test_weights_that_are_changed_before_they_are_used_are_said():
    def attend(module, x, y):
        return (softmax(x, y) ** 2) @ heads(y)

    with AttentionRecorder(Fusing(Runs(attend)).eval(), {"a_to_b": "fusion"}) as recorder:
        recorder._model(*tokens())
        with pytest.warns(XAttnWarning, match=tells("'fusion'", "between the softmax and their use", "'path[item]'")):
            (pair,) = recorder.attention
    assert torch.equal(pair.forward.weights, softmax(*tokens()))


@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.Identity()])
def test_dropout_and_scaling_of_rows_change_no_attention(drop):
    def attend(module, x, y):
        return module.drop(0.5 * softmax(x, y)) @ heads(y)

    fusion = Runs(attend, drop=drop)
    for training in (True, False):
        (pair,) = record_fusion(fusion.train(training), {"a_to_b": "fusion"})
        assert torch.equal(pair.forward.weights, softmax(*tokens()))
        assert pair.forward.visible is None or pair.forward.visible.all()


def test_weights_that_are_used_for_both_sides():
    def attend(module, x, y):
        scores = (heads(x) @ heads(y).mT).masked_fill(HIDDEN, -torch.inf)
        weights = scores.softmax(-1)
        return weights @ heads(y), weights.transpose(-1, -2) @ heads(x)

    x = torch.randn(BATCH, TEXT, WIDTH)
    (pair,) = record_fusion(Runs(attend).eval(), {"a_to_b": "fusion"}, (x, x + 1))
    assert prepare_rows(pair.forward).valid.all()


def fusing(module, x, y, weights):
    return torch.einsum("bhij,bhjd->bhid", weights, heads(y))


def folding(module, x, y, weights):
    return torch.bmm(weights.flatten(0, 1), heads(y).flatten(0, 1))


def returning(module, x, y, weights):
    return folding(module, x, y, weights), weights


@pytest.mark.parametrize(("use", "name"), [(fusing, "fusion"), (folding, "fusion"), (returning, "fusion[1]")])
def test_rows_that_are_set_to_zero_after_the_softmax_are_left_out(use, name):
    """As in Flamingo: text before any image looks at none."""
    before = (torch.arange(AUDIO) < torch.tensor([[2], [3]]))[:, None, :, None]

    def attend(module, x, y):
        scores = (heads(x) @ heads(y).mT).masked_fill(before, -torch.finfo(x.dtype).max)
        weights = (scores - scores.amax(-1, keepdim=True)).softmax(-1)
        return use(module, x, y, weights.masked_fill(before, 0.0))

    with AttentionRecorder(Fusing(Runs(attend)).eval(), {"a_to_b": name}) as recorder:
        for is_told in (use is not returning, False):
            recorder._model(*tokens())
            said = pytest.warns(XAttnWarning, match=tells("'fusion'", "whole rows", "after the softmax", "left out"))
            with said if is_told else nullcontext():
                (pair,) = recorder.attention
            recorder.clear()
            rows = prepare_rows(pair.forward)
            assert torch.equal(rows.valid, ~before[..., 0].expand(-1, HEADS, -1))
            assert not rows.broken.any()
