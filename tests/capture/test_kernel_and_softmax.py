"""Attention that a module computes with the fused kernel or with a softmax of its own, below a named module."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention  # bound early, as some libraries do

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.capture.masks import find_visible_keys
from lightning_xattn.functional import prepare_rows
from tests import reference
from tests.capture.models import BATCH, record, tokens
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


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


sees = random(AUDIO, TEXT, seed=1) > -0.3
by_head = random(BATCH, HEADS, AUDIO, TEXT, seed=2) > -0.3


padding = torch.arange(TEXT) < torch.tensor([[7], [4]])  # True: seen, as the kernel has it
sees = random(AUDIO, TEXT, seed=1) > -0.3
by_head = random(BATCH, HEADS, AUDIO, TEXT, seed=2) > -0.3
by_head[1, 2, 3] = False  # a fully masked row
added = random(AUDIO, TEXT, seed=3)

MASKS = {
    "none": ({}, {}),
    "padding": ({"attn_mask": padding[:, None, None]}, {"mask": lambda b, h, m, n: padding[b, n]}),
    "bool": ({"attn_mask": sees}, {"mask": lambda b, h, m, n: sees[m, n]}),
    "bool by head": ({"attn_mask": by_head}, {"mask": lambda b, h, m, n: by_head[b, h, m, n]}),
    "float": ({"attn_mask": added}, {"score": lambda s, b, h, m, n: s + float(added[m, n])}),
    "float that hides": (
        {"attn_mask": torch.zeros(AUDIO, TEXT).masked_fill(~sees, -torch.inf)},
        {"mask": lambda b, h, m, n: sees[m, n]},
    ),
    "causal": ({"is_causal": True}, {"mask": lambda b, h, m, n: n <= m}),
    "scale": ({"scale": 0.9}, {"scale": 0.9}),
    "grouped heads": ({"enable_gqa": True}, {"group": HEADS}),
}


@pytest.mark.parametrize(("call", "truth"), MASKS.values(), ids=MASKS)
def test_beside_the_fused_kernel(call, truth):
    (audio, text), grouped = tokens(), {name: call[name] for name in call if name == "enable_gqa"}
    model = Both(kv_heads=1 if grouped else HEADS)
    (pair,) = record(model, lambda m: m(audio, text, call, grouped), PATHS)
    with torch.no_grad():
        q, k, _ = (x.numpy() for x in model.x.heads(audio, text))
    weights, shown = map(torch.as_tensor, reference.attention(q, k, **truth))
    got = pair.forward
    torch.testing.assert_close(got.weights.double(), weights.nan_to_num(), atol=2e-6, rtol=1e-5)
    assert pair.backward.weights.shape == (BATCH, HEADS, TEXT, AUDIO)
    visible = got.visible_to()
    assert torch.equal(torch.ones_like(shown) if visible is None else visible.expand(shown.shape), shown)
    if "mask" in truth:
        # Padding as a key is padding as a query of the other direction; under another mask the token may be real.
        is_padding = "attn_mask" in call and call["attn_mask"].shape[-2] == 1
        real = torch.ones_like(padding) if pair.backward.query_mask is None else pair.backward.query_mask
        assert torch.equal(real, padding if is_padding else torch.ones_like(padding))


def test_a_softmax_in_the_open_is_the_same_attention_as_the_fused_kernels():
    """Before dropout in training, and before what the model does to the weights in place."""
    audio, text = tokens()
    mask = torch.zeros(BATCH, 1, 1, TEXT).masked_fill(~padding[:, None, None], torch.finfo(torch.float32).min)

    def run(model):
        return model(audio, text, {"attn_mask": mask})

    (expected,) = record(Both(fused, dropout=0.4), run, PATHS)
    model = Both(eager, dropout=0.4)
    (got,) = record(model, run, PATHS)
    model.train()
    with AttentionRecorder(model, PATHS) as recorder:
        run(model)
    for pair in (got, recorder.attention[0]):
        for a, b in zip(pair.directions, expected.directions, strict=True):
            torch.testing.assert_close(a.weights, b.weights, atol=2e-6, rtol=1e-5)
        assert torch.equal(pair.forward.key_mask, padding)
        assert torch.equal(pair.backward.query_mask, padding)


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
