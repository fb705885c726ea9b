"""The one mode: keys can be hidden before an attention is computed, and what it cannot read it says."""

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.capture.readers import Want
from lightning_xattn.capture.watch import Watch
from lightning_xattn.errors import DiscoveryError
from tests.capture.models import BATCH, Fusing, Runs, assert_same, heads, mha, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH, count_hooks

HIDDEN = torch.arange(TEXT) >= 4


def kernel(mask):
    return lambda m, x, y: F.scaled_dot_product_attention(heads(x), heads(y), heads(y), mask)


def by_softmax(axis):
    def run(module, x, y, hidden=None):
        scores = heads(x) @ heads(y).mT
        scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
        return scores.softmax(-1) @ heads(y) if axis == -1 else scores.mT.softmax(-2).mT @ heads(y)

    return run


bools, floats = torch.rand(AUDIO, TEXT) > 0.2, torch.randn(AUDIO, TEXT)
bools[:, 0] = True
WAYS = {
    "kernel": (kernel(None), kernel(~HIDDEN.expand(AUDIO, TEXT))),
    "kernel with a bool mask": (kernel(bools), kernel(bools & ~HIDDEN)),
    "kernel with a float mask": (kernel(floats), kernel(floats.masked_fill(HIDDEN, -torch.inf))),
    "causal kernel": (
        lambda m, x, y: F.scaled_dot_product_attention(heads(x), heads(y), heads(y), is_causal=True),
        kernel(torch.ones(AUDIO, TEXT, dtype=torch.bool).tril() & ~HIDDEN),
    ),
    "softmax": (by_softmax(-1), lambda m, x, y: by_softmax(-1)(m, x, y, HIDDEN)),
    "softmax over another axis": (by_softmax(-2), lambda m, x, y: by_softmax(-2)(m, x, y, HIDDEN)),
}
for need_weights in (True, False):
    for name, mask in (("", None), (" with a mask", ~bools), (" with a float mask", floats)):
        call = {"need_weights": need_weights, "attn_mask": mask}
        more = {"key_padding_mask": HIDDEN.expand(BATCH, TEXT)}
        if mask is floats:
            more["key_padding_mask"] = torch.zeros(BATCH, TEXT).masked_fill(HIDDEN, -torch.inf)
        WAYS[f"multi-head attention{name}, weights: {need_weights}"] = (
            lambda m, x, y, call=call: m.p(x, y, y, **call),
            lambda m, x, y, call=call | more: m.p(x, y, y, **call),
        )


@pytest.mark.parametrize(("run", "masked"), WAYS.values(), ids=WAYS)
def test_keys_are_hidden_before_an_attention_is_computed(run, masked):
    audio, text = tokens()
    model = Runs(run, p=mha())
    expected, seen = masked(model, audio, text), []

    def hide(path, event):
        seen.append((path, event.shape))
        return HIDDEN

    watch = Watch({model: ""}, lambda run, event: Want.WEIGHTS, lambda run, output: None, hide)
    with ExitStack() as hooks:
        watch.attach(model, hooks)
        got = model(audio, text)
    torch.testing.assert_close(
        [x for x in leaves(got) if x is not None], [x for x in leaves(expected) if x is not None], atol=1e-6, rtol=1e-5
    )
    assert seen == [("", (BATCH, HEADS, AUDIO, TEXT))]
    assert count_hooks(model) == 0
    assert torch._C._len_torch_function_stack() == 0


def leaves(output):
    return list(output) if isinstance(output, tuple) else [output]


def test_keys_are_hidden_where_torch_would_take_a_fast_path():
    """Of an encoder layer's self-attention, which two keys do not reach any more."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True).eval()
    x, hidden = tokens()[1], HIDDEN.expand(BATCH, TEXT)
    watch = Watch({layer: ""}, lambda run, event: Want.NOTHING, lambda run, output: None, lambda *_: HIDDEN)
    with torch.no_grad(), ExitStack() as hooks:
        watch.attach(layer, hooks)
        got = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(got, layer(x, src_key_padding_mask=hidden), atol=1e-5, rtol=1e-4)


def test_the_fast_path_of_a_subclass_stays_on():
    """Of an nn.MultiheadAttention whose own forward calls torch's with one sequence for queries, keys and values."""

    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)

    torch.manual_seed(0)
    model = nn.ModuleDict({"joint": Own(24, 2, batch_first=True)}).eval()
    x = torch.randn(BATCH, 9, 24)
    with torch.no_grad():
        expected = model["joint"](x)
        fast = torch.overrides.has_torch_function
        with AttentionRecorder(model, {"a_to_b": "joint"}) as recorder:
            assert_same(model["joint"](x), expected)
        assert torch.overrides.has_torch_function is fast
    with pytest.raises(
        DiscoveryError,
        match=tells(
            "'joint'", "a_to_b", "within one sequence", "JointSequence('path', spans=", "attention={'<a>_to_<b>'"
        ),
    ):
        _ = recorder.attention


def test_other_modes_still_turn_the_fast_path_off():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model = nn.ModuleDict({"joint": nn.MultiheadAttention(24, 2, batch_first=True)}).eval()
    x = torch.randn(BATCH, 9, 24)
    with torch.no_grad(), Mode():
        expected = model["joint"](x, x, x)
        with AttentionRecorder(model, {"a_to_b": "joint"}):
            assert_same(model["joint"](x, x, x), expected)
        assert torch._C._len_torch_function_stack() == 1


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_is_not_touched_and_said():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    q, k = torch.randn(BATCH, HEADS, 16, 8), torch.randn(BATCH, HEADS, 24, 8)
    model = Fusing(Runs(lambda m, q, k: flex.flex_attention(q, k, k)))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(q, k)
        with (
            AttentionRecorder(model, {"a_to_b": "fusion"}),
            pytest.raises(
                DiscoveryError, match=tells("'fusion'", (2, 3, 16, 24), "flex_attention", "functions of the user's")
            ),
        ):
            model(q, k)
        with AttentionRecorder(model, {"a_to_b": lambda model: None}):
            assert torch.equal(model(q, k), expected)


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


@pytest.mark.filterwarnings("ignore:Found in the first pass")
@pytest.mark.parametrize("names", [("audio_to_video", "video_to_audio"), ("video_to_audio", "audio_to_video")])
def test_names_that_mean_the_flow_from_keys_to_queries_are_said(names, recwarn):
    """As in the LTX family, where video asks in ``audio_to_video_attn``."""

    def block(module, video, audio_states):
        there = getattr(module, f"{names[0]}_attn")(video, audio_states, audio_states)[0]
        return there, getattr(module, f"{names[1]}_attn")(audio_states, video, video)[0]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.video_to_audio_attn, self.audio_to_video_attn = mha(), mha()

        def forward(self, video, audio_states):
            return block(self, video, audio_states)

    model = nn.ModuleDict({"block": Block()})
    with AttentionRecorder(model) as recorder:
        model["block"](tokens()[0], tokens()[1])
        _ = recorder.attention
    told = [str(warning.message) for warning in recwarn]
    if names[0] == "video_to_audio":
        assert told == []
        return
    (message,) = told
    assert "'block.audio_to_video_attn'" in message
    setting = {"video_to_audio": "block.audio_to_video_attn", "audio_to_video": "block.video_to_audio_attn"}
    assert str(setting) in message or str(dict(reversed(setting.items()))) in message
    with AttentionRecorder(model, setting) as recorder:
        model["block"](tokens()[0], tokens()[1])
    assert str(recorder.attention[0].forward.direction) == "video_to_audio"
    assert recorder.attention[0].forward.weights.shape[2:] == (AUDIO, TEXT)
    assert len(recwarn) == 1
