"""The recorder sees the true attention, the model notices nothing, and no hook stays behind."""

import pytest
import torch
from torch import nn

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.errors import DiscoveryError, ShapeError, XAttnWarning
from tests.toy import AUDIO, HEADS, TEXT, WIDTH, ToyModule, count_hooks, toy_data

BATCH = 2


class Pair(nn.Module):
    """Two attention modules, called as the test says."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        settings = {"batch_first": True} | settings
        back = settings | {k: WIDTH for k in ("kdim", "vdim") if k in settings}
        self.audio_to_text_attn = nn.MultiheadAttention(WIDTH, HEADS, **settings)
        self.text_to_audio_attn = nn.MultiheadAttention(WIDTH, HEADS, **back)

    def forward(self, audio, text, audio_call=None, text_call=None):
        return (
            self.audio_to_text_attn(audio, text, text, **(audio_call or {})),
            self.text_to_audio_attn(text, audio, audio, **(text_call or {})),
        )


def tokens(batch_first=True, text_width=WIDTH):
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(BATCH, AUDIO, WIDTH, generator=generator)
    text = torch.randn(BATCH, TEXT, text_width, generator=generator)
    return (audio, text) if batch_first else (audio.transpose(0, 1), text.transpose(0, 1))


def per_head(module, query, key, **call):
    """The weights as the module itself returns them on request, per head and without dropout."""
    training = module.training
    module.eval()
    with torch.no_grad():
        weights = module(query, key, key, **(call | {"need_weights": True, "average_attn_weights": False}))[1]
    module.train(training)
    return weights


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, torch.Tensor):
            assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
            assert a.dtype == b.dtype
        else:
            assert a is b


padding = torch.zeros(BATCH, TEXT, dtype=torch.bool)
padding[1, 5:] = True
float_mask = torch.randn(AUDIO, TEXT, generator=torch.Generator().manual_seed(2))
hidden = torch.rand(BATCH * HEADS, AUDIO, TEXT, generator=torch.Generator().manual_seed(3)) > 0.6
hidden[0, 1] = True  # a fully masked row

CALLS = {
    "averaged": {},
    "per head": {"average_attn_weights": False},
    "without weights": {"need_weights": False},
    "padding": {"key_padding_mask": padding},
    "padding, without weights": {"key_padding_mask": padding, "need_weights": False},
    "float mask": {"attn_mask": float_mask},
    "float mask, without weights": {"attn_mask": float_mask, "need_weights": False},
    "mask by head": {"attn_mask": hidden},
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


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("settings", MODULES.values(), ids=MODULES)
def test_multihead_attention(settings, call, training):
    model = Pair(**settings).train(training)
    audio, text = tokens(settings.get("batch_first", True), settings.get("kdim", WIDTH))
    text_back = torch.nn.functional.pad(text, (0, WIDTH - text.shape[-1]))

    def run():
        torch.manual_seed(5)  # dropout draws the same
        there = model.audio_to_text_attn(audio, text, text, **call)
        return there, model.text_to_audio_attn(text_back, audio, audio)

    expected = run()
    with AttentionRecorder(model) as recorder:
        got = run()
    assert count_hooks(model) == 0
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)

    (pair,) = recorder.attention
    weights = pair.forward.weights
    assert not weights.requires_grad
    truth = per_head(model.audio_to_text_attn, audio, text, **call)
    torch.testing.assert_close(weights, truth, atol=2e-6, rtol=1e-5, equal_nan=True)
    assert pair.forward.extra_keys == weights.shape[-1] - TEXT
    if "key_padding_mask" in call:
        torch.testing.assert_close(pair.forward.key_mask[:, :TEXT], ~padding)
        torch.testing.assert_close(pair.backward.query_mask, ~padding)
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


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradients_are_those_without_recording(need_weights):
    def gradients(recording):
        torch.manual_seed(0)
        model = ToyModule(need_weights)
        audio, text, _ = toy_data(BATCH)[:]
        if recording:
            with AttentionRecorder(model) as recorder:
                model(audio, text).sum().backward()
            assert not recorder.attention[0].forward.weights.requires_grad
        else:
            model(audio, text).sum().backward()
        return [p.grad for p in model.parameters()]

    assert_same(gradients(True), gradients(False))


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(need_weights):
    model = ToyModule(need_weights).eval()
    audio, text, _ = toy_data(BATCH)[:]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(audio, text)
        with AttentionRecorder(model) as recorder:
            assert torch.equal(model(audio, text), expected)
    (pair,) = recorder.attention
    # Recomputed beside a fused kernel, or in bfloat16 as the model had it.
    torch.testing.assert_close(pair.forward.weights.float().sum(-1), torch.ones(BATCH, HEADS, AUDIO), atol=1e-2, rtol=0)


def test_recorders_nest_and_other_hooks_see_what_the_caller_gets():
    model, (audio, text), seen = Pair(), tokens(), []
    model.audio_to_text_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    (_, expected), _ = model(audio, text)
    with AttentionRecorder(model) as outer, AttentionRecorder(model) as inner:
        (_, got), _ = model(audio, text)
    assert torch.equal(got, expected)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(outer.attention[0].forward.weights, inner.attention[0].forward.weights)


def test_keeps_the_first_output_of_the_models_own_forward():
    model = ToyModule()
    audio, text, _ = toy_data(BATCH)[:]
    with AttentionRecorder(model) as recorder:
        first = model(audio, text)
        assert recorder.output is first
        recorder.clear()
        assert recorder.output is None
        assert recorder.attention == ()


def test_hooks_leave_when_the_model_crashes_and_when_setting_up_fails(monkeypatch):
    model = ToyModule()
    with pytest.raises(RuntimeError), AttentionRecorder(model):
        model(torch.zeros(1, 2, 99), torch.zeros(1, 2, 2))
    assert count_hooks(model) == 0

    recorder = AttentionRecorder(model)
    model.text_to_audio_attn = None  # found before, gone when the hooks are set
    with pytest.raises(AttributeError):
        recorder.__enter__()
    assert count_hooks(model) == 0


def test_of_a_module_that_runs_twice_the_first_run_is_shown():
    model, (audio, text) = Pair(), tokens()
    with AttentionRecorder(model) as recorder:
        model(audio, text)
        (once,) = recorder.attention
        model(audio.flip(1), text)
        with pytest.warns(XAttnWarning, match="ran 2 times in one step; its first run is shown"):
            (twice,) = recorder.attention
    assert torch.equal(once.forward.weights, twice.forward.weights)


def test_a_direction_that_runs_without_its_opposite_is_refused():
    model, (audio, text) = Pair(), tokens()
    with AttentionRecorder(model) as recorder:
        model.audio_to_text_attn(audio, text, text)
        with pytest.raises(DiscoveryError, match="'text_to_audio_attn' .* did not run"):
            _ = recorder.attention


def test_a_subclass_that_computes_attention_its_own_way_is_refused():
    class Rotated(nn.MultiheadAttention):
        def forward(self, query, *args, **kwargs):
            return super().forward(query.flip(1), *args, **kwargs)

    model = Pair()
    model.audio_to_text_attn = Rotated(WIDTH, HEADS, batch_first=True)
    with pytest.raises(DiscoveryError, match="Rotated is an nn.MultiheadAttention with a forward of its own"):
        AttentionRecorder(model).__enter__()
    assert count_hooks(model) == 0


def test_large_half_precision_tokens_do_not_overflow():
    model = Pair().half()
    audio, text = (300 * x.half() for x in tokens())
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(audio, text, {"need_weights": False}, {"need_weights": False})
    assert recorder.attention[0].forward.weights.isfinite().all()


def test_a_masked_key_beside_a_bias_is_masked():
    model, (audio, text) = Pair(), tokens()
    mask = torch.where(torch.arange(TEXT) < 3, 0.0, -1e4).expand(AUDIO, TEXT) + 0.5
    with AttentionRecorder(model) as recorder:
        model(audio, text, {"attn_mask": mask})
    visible = recorder.attention[0].forward.visible.expand(BATCH, HEADS, AUDIO, TEXT)
    assert (visible == (torch.arange(TEXT) < 3)).all()


def test_directions_that_do_not_fit_are_refused():
    model, (audio, text) = Pair(), tokens()
    with AttentionRecorder(model) as recorder:
        model.audio_to_text_attn(audio, text, text)
        model.text_to_audio_attn(text[:, :3], audio, audio)
        with pytest.raises(ShapeError, match="queries=7, keys=5.*got \\(2, 3, 3, 5\\)"):
            _ = recorder.attention
