"""The recorder: what it holds, what it says, and that no hook stays behind."""

import pytest
import torch
import torch.nn.functional as F

from lightning_xattn.capture import AttentionRecorder, readers
from lightning_xattn.core.errors import DiscoveryError, ShapeError, XAttnWarning
from lightning_xattn.evaluation.batch import StepRecorder
from tests.capture.models import BATCH, Fusing, Pair, Runs, heads, recorded, tokens
from tests.messages import tells
from tests.toy import ToyModule, toy_data


def test_keeps_the_first_output_of_the_models_own_forward():
    model = ToyModule()
    batch = toy_data(BATCH)[:]
    with StepRecorder(model) as recorder:
        first = model(*batch[:2])
        model(*batch[:2])
        with pytest.warns(XAttnWarning, match="ran more often"):
            step, _ = recorder.collect_step(None, batch)
        assert step.forward is first
        recorder.clear()
        assert recorder.collect_step(None, batch) is None


def test_attention_that_cannot_be_read_is_refused_after_the_run(monkeypatch):
    model = Pair()
    monkeypatch.setattr(readers, "_with_masks", lambda *_: torch.zeros(2).reshape(3))
    with pytest.raises(DiscoveryError, match=tells("cannot be read", "invalid for input of size 2")):
        recorded(model, None)


def test_of_a_module_that_runs_twice_the_first_run_is_shown():
    model, (audio, text) = Pair(), tokens()
    with AttentionRecorder(model) as recorder:
        model(audio, text)
        (once,) = recorder.attention
        model(audio.flip(1), text)
        with pytest.warns(XAttnWarning, match=tells("more often", "first run")):
            (twice,) = recorder.attention
    assert torch.equal(once.forward.weights, twice.forward.weights)


def test_a_direction_that_runs_without_its_opposite_is_refused():
    model, (audio, text) = Pair(), tokens()
    with AttentionRecorder(model) as recorder:
        model.audio_to_text_attn(audio, text, text)
        with pytest.raises(DiscoveryError, match=tells("'text_to_audio_attn'", "text_to_audio", "did not run")):
            _ = recorder.attention


def test_directions_that_do_not_fit_are_refused():
    model, (audio, text) = Pair(), tokens()
    with AttentionRecorder(model) as recorder:
        model.audio_to_text_attn(audio, text, text)
        model.text_to_audio_attn(text[:, :3], audio, audio)
        with pytest.raises(ShapeError, match=tells("audio_to_text", (2, 3, 5, 7), "text_to_audio", "got (2, 3, 3, 5)")):
            _ = recorder.attention


def attend(module, x, y):
    return F.scaled_dot_product_attention(heads(x), heads(y), heads(y))


def in_the_open(module, x, y):
    return (heads(x) @ heads(y).mT).softmax(-1) @ heads(y)


@pytest.mark.parametrize("run", [attend, in_the_open])
def test_recorders_nest_around_attention_by_hand(run):
    model, (audio, text) = Fusing(Runs(run)), tokens()
    expected = model(audio, text)
    (alone,) = recorded(model, {"a_to_b": "fusion"})
    outer, inner = AttentionRecorder(model, {"a_to_b": "fusion"}), AttentionRecorder(model, {"a_to_b": "fusion"})
    with outer:
        with inner:
            assert torch.equal(model(audio, text), expected)
        model(audio, text)
    assert torch.equal(inner.attention[0].forward.weights, alone.forward.weights)
    with pytest.warns(XAttnWarning, match=tells("'fusion'", "first run")):
        assert torch.equal(outer.attention[0].forward.weights, alone.forward.weights)
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("run", [attend, in_the_open])
def test_a_module_and_one_that_it_holds(run):
    model = Fusing(Fusing(Runs(run)))
    outer, inner = recorded(model, {"a_to_b": "fusion", "c_to_d": "fusion.fusion"})
    assert torch.equal(outer.forward.weights, inner.forward.weights)


def test_a_null_key_does_not_pair():
    def attend(module, queries, keys):
        keys = torch.cat([keys, torch.zeros_like(keys[:, :1])], dim=1)
        return F.scaled_dot_product_attention(heads(queries), heads(keys), heads(keys))

    model = Runs(lambda m, x, y: (m.a_to_b(x, y), m.b_to_a(y, x)), a_to_b=Runs(attend), b_to_a=Runs(attend))
    with pytest.raises(ShapeError, match=tells("a_to_b", (2, 3, 5, 8), "b_to_a", "one direction alone")):
        recorded(model, {"a_to_b": "a_to_b", "b_to_a": "b_to_a"})
