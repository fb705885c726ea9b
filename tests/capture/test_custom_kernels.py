"""Kernels of other packages: flash_attn is read by its operator, and what is not known is refused with a remedy."""

import pytest
import torch
from torch import Tensor, nn

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DiscoveryError
from tests.capture.models import BATCH, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH

PATHS = {"audio_to_text": "audio_to_text_attn", "text_to_audio": "text_to_audio_attn"}

KERNELS = torch.library.Library("flash_attn", "FRAGMENT")
OTHERS = torch.library.Library("their_package", "FRAGMENT")
KERNELS.define(
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, "
    "int window_size_left=-1, int window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
    "bool return_softmax=False) -> (Tensor, Tensor)"
)
OTHERS.define("memory_efficient_attention(Tensor query, Tensor key, Tensor value) -> Tensor")


def compute(q: Tensor, k: Tensor, v: Tensor, dropout_p=0.0, softmax_scale=1.0, causal=False, *_, **__):
    """As the kernel does it, of tokens ``(batch, tokens, heads, width)``."""
    k, v = (one.repeat_interleave(q.shape[2] // k.shape[2], 2) for one in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    if causal:
        queries, keys = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(queries, keys).triu(keys - queries + 1).bool(), -torch.inf)
    weights = scores.softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).contiguous(), weights


KERNELS.impl("_flash_attn_forward", compute, "CompositeExplicitAutograd")
OTHERS.impl("memory_efficient_attention", lambda q, k, v: compute(q, k, v)[0], "CompositeExplicitAutograd")


class Kernel(nn.Module):
    """Cross-attention by a kernel."""

    def __init__(self, run, key_heads=HEADS):
        super().__init__()
        self.run, self.key_heads = run, key_heads
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = self.v = nn.Linear(WIDTH, WIDTH // HEADS * key_heads)

    def split(self, audio, text):
        q = self.q(audio).unflatten(-1, (HEADS, -1))
        return q, *(one(text).unflatten(-1, (self.key_heads, -1)) for one in (self.k, self.v))

    def forward(self, audio, text):
        return self.run(*self.split(audio, text)).flatten(2)


class Both(nn.Module):
    def __init__(self, run, **kwargs):
        super().__init__()
        self.audio_to_text_attn, self.text_to_audio_attn = Kernel(run, **kwargs), Kernel(run, **kwargs)

    def forward(self, audio, text):
        return self.audio_to_text_attn(audio, text).mean(1) + self.text_to_audio_attn(text, audio).mean(1)


class Function(torch.autograd.Function):
    """As flash_attn calls its kernel."""

    @staticmethod
    def forward(ctx, q, k, v, settings):
        return torch.ops.flash_attn._flash_attn_forward(q, k, v, 0.0, 0.3, **settings)[0]


def flash(**settings):
    return lambda q, k, v: Function.apply(q, k, v, {"causal": False} | settings)


def overload(q, k, v):
    return torch.ops.flash_attn._flash_attn_forward.default(q, k, v, 0.0, 0.3, False)[0]


@pytest.mark.parametrize(
    ("run", "causal", "key_heads"),
    [
        (flash(), False, HEADS),
        (flash(causal=True), True, HEADS),
        (flash(), False, 1),
        (overload, False, HEADS),
    ],
    ids=["plain", "causal", "grouped", "overload"],
)
def test_flash_attn_is_read(run, causal, key_heads):
    audio, text = tokens()
    model = Both(run, key_heads=key_heads).eval()
    with torch.no_grad():
        plain = model(audio, text)
        with AttentionRecorder(model, PATHS) as recorder:
            torch.testing.assert_close(model(audio, text), plain, rtol=0, atol=0, equal_nan=True)
        (pair,) = recorder.attention
        for attention, module, given in (
            (pair.forward, model.audio_to_text_attn, (audio, text)),
            (pair.backward, model.text_to_audio_attn, (text, audio)),
        ):
            _, expected = compute(*module.split(*given), 0.0, 0.3, causal)
            torch.testing.assert_close(attention.weights, expected.nan_to_num(), atol=2e-6, rtol=1e-5)
    assert pair.forward.shape == (BATCH, HEADS, AUDIO, TEXT)


@pytest.mark.parametrize(
    ("run", "what"),
    [
        (flash(window_size_left=2), "with a window"),
        (flash(softcap=3.0), "with a soft cap"),
        (flash(alibi_slopes=torch.ones(HEADS)), "with ALiBi slopes"),
        (torch.ops.their_package.memory_efficient_attention, "the kernel their_package::memory_efficient_attention"),
    ],
)
def test_what_is_not_known_is_refused_with_the_remedy(run, what):
    model, (audio, text) = Both(run).eval(), tokens()
    refused = pytest.raises(DiscoveryError, match=tells(what, "attn_implementation='sdpa'"))
    with refused, AttentionRecorder(model, PATHS):
        model(audio, text)
