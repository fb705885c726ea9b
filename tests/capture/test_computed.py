"""Attention that a module computes with the fused kernel or with a softmax of its own, below a named module."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention  # bound early, as some libraries do

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.capture.masks import find_visible_keys
from lightning_xattn.core.errors import DiscoveryError, XAttnWarning
from lightning_xattn.functional import prepare_rows
from tests.capture.models import BATCH, record, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH

HEAD = WIDTH // HEADS


def fused(q, k, v, **call):
    return scaled_dot_product_attention(q, k, v, **call)


def eager(q, k, v, attn_mask=None, dropout_p=0.0, scale=None):
    scores = q @ k.transpose(-1, -2) * (HEAD**-0.5 if scale is None else scale)
    scores = scores if attn_mask is None else scores + attn_mask
    weights = scores.softmax(dim=-1)
    if not torch.is_grad_enabled():
        weights.mul_(0.5)  # whatever a model may do to its weights afterwards
    return F.dropout(weights, dropout_p) @ v


class Cross(nn.Module):
    """One direction, written by hand."""

    def __init__(self, kernel, kv_heads=HEADS, dropout=0.0):
        super().__init__()
        self.kernel, self.kv_heads, self.dropout = kernel, kv_heads, dropout
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * HEAD * kv_heads)

    def heads(self, queries, keys):
        q = self.q(queries).unflatten(-1, (-1, HEAD)).transpose(1, 2)
        k, v = self.kv(keys).unflatten(-1, (2, self.kv_heads, HEAD)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, queries, keys, **call):
        if self.dropout and self.training:
            call["dropout_p"] = self.dropout
        return self.kernel(*self.heads(queries, keys), **call).transpose(1, 2).flatten(2)


class Both(nn.Module):
    def __init__(self, kernel=fused, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.x, self.y = Cross(kernel, **settings), Cross(kernel, **settings)

    def forward(self, audio, text, there=None, back=None):
        return self.x(audio, text, **(there or {})), self.y(text, audio, **(back or {}))


PATHS = {"audio_to_text": "x", "text_to_audio": "y"}


def by_loops(q, k, scale=None, added=None, hidden=None):
    """Softmax of the scores, row by row; a row without a visible key is NaN."""
    weights = torch.full((*q.shape[:3], k.shape[2]), torch.nan, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if hidden is None or not hidden[b, h, i, j]]
                scores = [
                    float(q[b, h, i].double() @ k[b, h // group, j].double()) * (scale or HEAD**-0.5)
                    + (0 if added is None else float(added[b, h, i, j]))
                    for j in seen
                ]
                total = sum(math.exp(score) for score in scores)
                if seen:
                    weights[b, h, i] = 0
                for j, score in zip(seen, scores, strict=True):
                    weights[b, h, i, j] = math.exp(score) / total
    return weights.float()


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


padding = torch.arange(TEXT) < torch.tensor([[7], [4]])  # True: seen, as the kernel has it
sees = random(AUDIO, TEXT, seed=1) > -0.3
by_head = random(BATCH, HEADS, AUDIO, TEXT, seed=2) > -0.3
by_head[1, 2, 3] = False  # a fully masked row
whole = (BATCH, HEADS, AUDIO, TEXT)

MASKS = {
    "none": ({}, {}),
    "padding": ({"attn_mask": padding[:, None, None]}, {"hidden": ~padding[:, None, None].expand(whole)}),
    "bool": ({"attn_mask": sees}, {"hidden": ~sees.expand(whole)}),
    "bool by head": ({"attn_mask": by_head}, {"hidden": ~by_head}),
    "float": ({"attn_mask": random(AUDIO, TEXT, seed=3)}, {"added": random(AUDIO, TEXT, seed=3).expand(whole)}),
    "float that hides": (
        {"attn_mask": torch.zeros(AUDIO, TEXT).masked_fill(~sees, -torch.inf)},
        {"hidden": ~sees.expand(whole)},
    ),
    "causal": ({"is_causal": True}, {"hidden": ~torch.ones(AUDIO, TEXT, dtype=torch.bool).tril().expand(whole)}),
    "scale": ({"scale": 0.9}, {"scale": 0.9}),
}


@pytest.mark.parametrize(("call", "truth"), MASKS.values(), ids=MASKS)
def test_beside_the_fused_kernel(call, truth):
    model, (audio, text) = Both(), tokens()
    (pair,) = record(model, lambda m: m(audio, text, call), PATHS)
    with torch.no_grad():
        q, k, _ = model.x.heads(audio, text)
    got = pair.forward
    torch.testing.assert_close(got.weights, by_loops(q, k, **truth), atol=2e-6, rtol=1e-5, equal_nan=True)
    assert pair.backward.weights.shape == (BATCH, HEADS, TEXT, AUDIO)
    if "hidden" in truth:
        visible = torch.ones(whole, dtype=torch.bool) if got.visible is None else got.visible.expand(whole)
        assert torch.equal(visible & got.key_mask[:, None, None], ~truth["hidden"])
        # Padding as a key is padding as a query of the other direction; under another mask the token may be real.
        is_padding = "attn_mask" in call and call["attn_mask"].shape[-2] == 1
        real = padding if is_padding else torch.ones(BATCH, TEXT, dtype=torch.bool)
        assert torch.equal(pair.backward.query_mask, real)
    else:
        assert pair.forward.visible is None or pair.forward.visible.all()


def test_grouped_query_heads():
    model, (audio, text) = Both(kv_heads=1), tokens()
    (pair,) = record(model, lambda m: m(audio, text, {"enable_gqa": True}, {"enable_gqa": True}), PATHS)
    with torch.no_grad():
        q, k, _ = model.x.heads(audio, text)
    torch.testing.assert_close(pair.forward.weights, by_loops(q, k), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_softmax_in_the_open_is_the_same_attention_as_the_fused_kernels(dropout):
    """Before dropout in training, and before what the model does to the weights in place."""
    audio, text = tokens()
    mask = torch.zeros(BATCH, 1, 1, TEXT).masked_fill(~padding[:, None, None], torch.finfo(torch.float32).min)

    def run(model):
        return model(audio, text, {"attn_mask": mask})

    (expected,) = record(Both(fused, dropout=dropout), run, PATHS)
    model = Both(eager, dropout=dropout)
    (got,) = record(model, run, PATHS)
    model.train()
    with AttentionRecorder(model, PATHS) as recorder:
        run(model)
    for pair in (got, recorder.attention[0]):
        for a, b in zip(pair.directions, expected.directions, strict=True):
            torch.testing.assert_close(a.weights, b.weights, atol=2e-6, rtol=1e-5)
        assert torch.equal(pair.forward.key_mask, padding)
        assert torch.equal(pair.backward.query_mask, padding)


class OneHead(nn.Module):
    def __init__(self, fold):
        super().__init__()
        self.fold = fold

    def forward(self, queries, keys):
        if self.fold:
            queries, keys = (x.unflatten(-1, (HEADS, HEAD)).transpose(1, 2).flatten(0, 1) for x in (queries, keys))
        return F.scaled_dot_product_attention(queries, keys, keys)


def test_three_axes_are_one_head_unless_heads_hide_among_the_samples():
    audio, text = tokens()
    model = nn.Module()
    model.x = OneHead(fold=False)
    with AttentionRecorder(model, {"audio_to_text": "x"}) as recorder:
        model.x(audio, text)
    with pytest.warns(XAttnWarning, match=tells("'x'", "one head")):
        assert recorder.attention[0].forward.weights.shape == (BATCH, 1, AUDIO, TEXT)
    model.x = OneHead(fold=True)
    with AttentionRecorder(model, {"audio_to_text": "x"}) as recorder:
        model.x(audio, text)
    assert recorder.attention[0].forward.weights.shape == (BATCH, HEADS, AUDIO, TEXT)
    assert torch._C._len_torch_function_stack() == 0


def test_several_attentions_in_one_module_are_not_guessed():
    audio, text = tokens()
    model = Both()
    with (
        pytest.raises(
            DiscoveryError,
            match=tells(
                "'fusion#1' (2, 3, 5, 7)",
                "5 queries (audio)",
                "7 keys (text)",
                "'fusion#2' (2, 3, 7, 5)",
                "7 queries (text)",
                "5 keys (audio)",
                "'path[item]'",
            ),
        ),
        AttentionRecorder(nn.ModuleDict({"fusion": model}), {"audio_to_text": "fusion"}),
    ):
        model(audio, text)


def test_the_modes_leave_when_the_module_crashes():
    model, (audio, text) = Both(), tokens()
    with AttentionRecorder(model, PATHS) as recorder:
        with pytest.raises(RuntimeError):
            model(audio, text[..., :2])
        assert torch._C._len_torch_function_stack() == 0
        model(audio, text)
    assert recorder.attention[0].forward.weights.shape == whole

    class Interrupted(Cross):
        def forward(self, queries, keys):
            raise KeyboardInterrupt

    model.x = Interrupted(fused)
    with pytest.raises(KeyboardInterrupt), AttentionRecorder(model, PATHS):
        model(audio, text)
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("kernel", [fused, eager])
def test_what_is_not_finite_is_broken_and_what_is_masked_is_not(kernel):
    """A NaN in a token breaks its own row, and of the other direction every row of its sample but for padding."""
    model = Both(kernel).eval()
    audio, text = tokens()
    audio = audio.clone()
    audio[0, 2] = torch.nan
    there = {"attn_mask": torch.zeros(AUDIO, TEXT).masked_fill(torch.arange(TEXT) > TEXT - 3, -torch.inf)}
    with torch.no_grad(), AttentionRecorder(model, PATHS) as recorder:
        model(audio, text, there=there)
    forward, backward = map(prepare_rows, recorder.attention[0].directions)
    broken = torch.zeros(BATCH, HEADS, AUDIO, dtype=torch.bool)
    broken[0, :, 2] = True
    assert torch.equal(forward.broken, broken)
    assert torch.equal(forward.valid, ~broken)
    broken = torch.zeros(BATCH, HEADS, TEXT, dtype=torch.bool)
    broken[0, :, : TEXT - 2] = True
    assert torch.equal(backward.broken, broken)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_sees_what_the_other_rows_see(value):
    scores = torch.zeros(1, 1, 3, 4)
    scores[..., 3] = -torch.inf  # padding
    scores[0, 0, 1, 0] = value
    visible = find_visible_keys(scores, scores.softmax(-1))
    assert visible.expand(scores.shape).tolist() == [[[[True, True, True, False]] * 3]]
