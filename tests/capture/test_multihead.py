"""nn.MultiheadAttention: the true weights, and outputs and gradients that stay bit for bit the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DiscoveryError
from tests.capture.models import BATCH, Fusing, Pair, Runs, assert_same, mha, per_head, record, recorded, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


padding = torch.arange(TEXT) >= torch.tensor([[TEXT], [5]])
hidden = random(BATCH * HEADS, AUDIO, TEXT, seed=3) > 0.3
hidden[0, 1] = True  # a fully masked row
float_padding = torch.zeros(BATCH, TEXT).masked_fill(padding, -torch.inf)

CALLS = {
    "averaged": {},
    "per head": {"average_attn_weights": False},
    "without weights": {"need_weights": False},
    "padding": {"key_padding_mask": padding},
    "padding, without weights": {"key_padding_mask": padding, "need_weights": False},
    "float mask": {"attn_mask": random(AUDIO, TEXT, seed=2)},
    "mask": {"attn_mask": random(AUDIO, TEXT, seed=6) > 0.3},
    "mask by head": {"attn_mask": hidden},
    "float mask by head": {"attn_mask": random(BATCH * HEADS, AUDIO, TEXT, seed=4)},
    "float padding and mask": {
        "key_padding_mask": float_padding,
        "attn_mask": random(AUDIO, TEXT, seed=2),
        "need_weights": False,
    },
    "mask by head, without weights": {"attn_mask": hidden, "need_weights": False},
}
MODULES = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 4, "vdim": 4},
    "dropout": {"dropout": 0.4},
}
# Every call of a plain module, and of every other module one with weights and one without.
PAIRS = [("plain", call) for call in CALLS] + [
    (module, call) for module in list(MODULES)[1:] for call in ("padding", "mask by head, without weights")
]


@pytest.mark.parametrize(("module", "call"), PAIRS)
def test_weights_are_those_that_the_module_gives_on_request(module, call):
    settings, call = MODULES[module], CALLS[call]
    model = Pair(**settings)
    audio, text = tokens(settings.get("batch_first", True), settings.get("kdim", WIDTH))
    text_back = torch.nn.functional.pad(text, (0, WIDTH - text.shape[-1]))

    def run(model):
        there = model.audio_to_text_attn(audio, text, text, **call)
        return there, model.text_to_audio_attn(text_back, audio, audio, need_weights=call.get("need_weights", True))

    pairs = record(model, run)
    with AttentionRecorder(model.train()) as recorder:  # before dropout
        run(model)
    truth = per_head(model.audio_to_text_attn, audio, text, **call)
    for pair in (*pairs, *recorder.attention):
        weights = pair.forward.weights
        # Of a row without a key torch gives NaN, and scores 0.
        torch.testing.assert_close(weights.nan_to_num(), truth.nan_to_num(), atol=2e-6, rtol=1e-5)
        assert pair.forward.extra_keys == weights.shape[-1] - TEXT
        if "key_padding_mask" in call:
            assert torch.equal(pair.forward.key_mask[:, :TEXT], ~padding)
            assert pair.forward.key_mask[:, TEXT:].all(), "extra keys are no padding"
            assert torch.equal(pair.backward.query_mask, ~padding)
        else:
            assert pair.forward.key_mask is None
            assert pair.backward.query_mask is None
        if "attn_mask" in call:
            sees = pair.forward.visible.expand(weights.shape)
            assert ((weights > 0) <= sees).all()


def test_positional_arguments_and_unbatched_tokens():
    model = Pair()
    audio, text = (x[0] for x in tokens())
    with AttentionRecorder(model) as recorder:
        got = model.audio_to_text_attn(audio, text, text, None, True)
        model.text_to_audio_attn(text, audio, audio, None, False)
    assert_same(got, model.audio_to_text_attn(audio, text, text, None, True))
    assert recorder.attention[0].forward.weights.shape == (1, HEADS, AUDIO, TEXT)
    assert recorder.attention[0].backward.weights.shape == (1, HEADS, TEXT, AUDIO)


def test_large_half_precision_tokens_do_not_overflow():
    model = Pair().half()
    audio, text = (300 * x.half() for x in tokens())
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(audio, text, {"need_weights": False}, {"need_weights": False})
    exact = per_head(model.audio_to_text_attn.float(), audio.float(), text.float())
    torch.testing.assert_close(recorder.attention[0].forward.weights, exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "patch",
    [
        lambda forward: lambda q, k, v, **_: forward(q, k, v),
        lambda forward: lambda *args, **call: forward(*args, **call | {"average_attn_weights": True}),
    ],
    ids=["drops what it is asked", "averages"],
)
def test_a_forward_that_was_patched_is_seen_through(patch):
    model, (audio, text) = Pair(), tokens()
    attention = model.audio_to_text_attn
    weights = per_head(attention, audio, text)
    attention.forward = patch(attention.forward)
    (pair,) = record(model, lambda m: m.audio_to_text_attn(audio, text, text), {"audio_to_text": "audio_to_text_attn"})
    assert torch.equal(pair.forward.weights, weights)


@pytest.mark.parametrize("key", [lambda x: x, lambda x: x[:], lambda x: x.detach()])
def test_a_view_of_the_query_is_the_query(key):
    audio, _ = tokens()
    model = Runs(lambda m, x: m.audio_to_text(x, key(x), x), audio_to_text=mha())
    with pytest.raises(DiscoveryError, match=tells("audio_to_text", "JointSequence('path', spans=")):
        recorded(model, inputs=[audio])
    other = Runs(lambda m, x: m.audio_to_text(x, x.flip(1), x), audio_to_text=mha())
    (pair,) = recorded(other, inputs=[audio])
    assert torch.equal(pair.forward.weights, per_head(other.audio_to_text, audio, audio.flip(1)))


@pytest.mark.parametrize("training", [False, True])
def test_what_is_computed_beside_is_computed_in_full_precision(training):
    model, (audio, text) = Pair(dropout=0.3 * training).train(training), tokens()
    call = {"need_weights": False}
    with torch.autocast("cpu", torch.bfloat16), AttentionRecorder(model) as recorder:
        model(audio, text, call, call)
    rounded = recorder.attention[0].forward.weights
    model.eval()
    exact = model(audio, text, {"average_attn_weights": False})[0][1]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact)


class Rotated(nn.MultiheadAttention):
    """A subclass with a forward of its own."""

    def forward(self, query, *args, **kwargs):
        return super().forward(query.flip(1), *args, **kwargs)


def test_a_subclass_with_a_forward_of_its_own():
    audio, text = tokens()
    model = nn.Module()
    model.audio_to_text_attn = Rotated(WIDTH, HEADS, batch_first=True)
    (pair,) = record(model, lambda m: m.audio_to_text_attn(audio, text, text, average_attn_weights=False))
    with torch.no_grad():
        _, expected = model.audio_to_text_attn(audio, text, text, average_attn_weights=False)
    assert torch.equal(pair.forward.weights, expected)
    (pair,) = record(model, lambda m: m.audio_to_text_attn(audio, text, text, need_weights=False))
    torch.testing.assert_close(pair.forward.weights, expected)


def test_direct_calls_of_multi_head_attention_forward():
    audio, text = tokens()
    attention = mha()

    def run(module, x, y):
        p = attention
        x, y = x.transpose(0, 1), y.transpose(0, 1)
        settings = (WIDTH, HEADS, p.in_proj_weight, p.in_proj_bias, None, None, False, 0.0, p.out_proj.weight)
        return F.multi_head_attention_forward(x, y, y, *settings, p.out_proj.bias, training=False)

    model = Fusing(Runs(run))
    expected = model(audio, text)
    with AttentionRecorder(model, {"a_to_b": "fusion"}) as recorder:
        assert_same(model(audio, text), expected)
    weights = attention(audio, text, text, average_attn_weights=False)[1]
    assert torch.equal(recorder.attention[0].forward.weights, weights)
