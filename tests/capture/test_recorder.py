"""The recorder: what it holds, what it says, and that no hook stays behind."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn.capture import AttentionRecorder, readers
from lightning_xattn.capture.attention_mode import AttentionMode
from lightning_xattn.capture.extractor import AttentionExtractor
from lightning_xattn.core.errors import DiscoveryError, ShapeError, XAttnWarning
from lightning_xattn.evaluation.batch import StepRecorder
from tests.capture.models import BATCH, Fusing, Pair, Runs, heads, recorded, tokens
from tests.messages import tells
from tests.toy import ToyModule, count_hooks, toy_data


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
    batch = toy_data(BATCH)[:]
    with StepRecorder(model) as recorder:
        first = model(*batch[:2])
        model(*batch[:2])
        with pytest.warns(XAttnWarning, match="ran more often"):
            step, _ = recorder.collect_step(None, batch)
        assert step.forward is first
        recorder.clear()
        assert recorder.collect_step(None, batch) is None


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (AttentionMode, "_note_use"),
        (AttentionExtractor, "extract"),
        (AttentionMode, "record"),
        (AttentionRecorder, "_level"),
    ],
)
def test_what_goes_wrong_while_the_model_runs_waits_until_it_has_run(owner, name, monkeypatch):
    model, (audio, text) = Pair(), tokens()
    (expected, _), _ = model(audio, text)

    def fail(*args):
        raise ArithmeticError("a fault of ours")

    monkeypatch.setattr(owner, name, fail)
    recorder = AttentionRecorder(model).__enter__()
    (got, _), _ = model(audio, text)
    assert torch.equal(got, expected)
    with pytest.raises(ArithmeticError, match="of ours"):
        _ = recorder.attention
    with pytest.raises(ArithmeticError, match="of ours"):
        recorder.__exit__(None)
    assert count_hooks(model) == 0


def test_attention_that_cannot_be_read_is_refused_after_the_run(monkeypatch):
    model = Pair()
    monkeypatch.setattr(readers, "_with_masks", lambda *_: torch.zeros(2).reshape(3))
    with pytest.raises(DiscoveryError, match=tells("cannot be read", "invalid for input of size 2")):
        recorded(model, None)


def test_a_copy_of_a_model_that_is_recorded_acts_as_the_model_does(tmp_path):
    """A snapshot or EMA callback copies the model between the hooks of a batch."""
    model, (audio, text) = Pair(), tokens()
    expected = model(audio, text)[0][0]
    with AttentionRecorder(model) as recorder:
        copies = [copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))]
        torch.save(model, tmp_path / "model.pt")
        model(audio, text)
        weights = recorder.attention[0].forward.weights
        copies.append(torch.load(tmp_path / "model.pt", weights_only=False))
        for one in copies:
            assert torch.equal(one(audio, text)[0][0], expected)
        assert torch.equal(recorder.attention[0].forward.weights, weights)
    module = nn.MultiheadAttention(12, 3, batch_first=True)
    with AttentionRecorder(nn.ModuleDict({"a_to_b": module})):
        torch.save(module, tmp_path / "attention.pt")
    path = str(tmp_path / "attention.pt")
    code = f"import sys, torch; sys.modules['lightning_xattn'] = None; torch.load({path!r}, weights_only=False)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hooks_leave_when_the_model_crashes_and_when_setting_up_fails(monkeypatch):
    model = ToyModule()
    with pytest.raises(RuntimeError), AttentionRecorder(model):
        model(torch.zeros(1, 2, 99), torch.zeros(1, 2, 2))
    assert count_hooks(model) == 0

    recorder = AttentionRecorder(model)
    model.text_to_audio_attn = None  # found before, gone when the hooks are set
    with pytest.raises(
        DiscoveryError,
        match=tells("'text_to_audio_attn'", "no longer", "Found: audio_to_text_attn", "new AttentionRecorder"),
    ):
        recorder.__enter__()
    assert count_hooks(model) == 0


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
        with pytest.raises(
            DiscoveryError,
            match=tells("'text_to_audio_attn'", "text_to_audio", "did not run", "attention={'<a>_to_<b>'"),
        ):
            _ = recorder.attention


def test_directions_that_do_not_fit_are_refused():
    model, (audio, text) = Pair(), tokens()
    with AttentionRecorder(model) as recorder:
        model.audio_to_text_attn(audio, text, text)
        model.text_to_audio_attn(text[:, :3], audio, audio)
        with pytest.raises(
            ShapeError,
            match=tells("audio_to_text", (2, 3, 5, 7), "text_to_audio", "queries=7, keys=5", "got (2, 3, 3, 5)"),
        ):
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
