"""Wrapped forwards: copies are of the plain module, what overlaps leaves cleanly, and nothing stays after a crash."""

import copy
import inspect
import io
import pickle
import subprocess
import sys
from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback, AttentionRecorder
from lightning_xattn.capture.attention_mode import (
    AttentionMode,
    WrappedForward,
    get_module,
    walk_modules,
    wrap_forwards,
)
from lightning_xattn.capture.extractor import AttentionExtractor
from lightning_xattn.core.errors import DiscoveryError
from tests.capture.models import BATCH, Pair, assert_same, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, ToyModule, count_hooks, quiet_trainer, toy_data, toy_loader


class Doubled(nn.Linear):
    def forward(self, x, *, scale=1.0):
        return 2 * scale * super().forward(x)


def wrapped(module, seen):
    changes = ExitStack()

    def around(one, forward, args, kwargs):
        seen.append(one)
        return forward(*args, **kwargs)

    wrap_forwards({module: ""}, around, changes)
    return changes


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_a_copy_runs_its_own_weights_and_is_not_seen(copied):
    seen = []
    module = Doubled(2, 2)
    with wrapped(module, seen):
        other = copied(module)
        with torch.no_grad():
            other.weight.zero_()
            other.bias.fill_(3)
        x = torch.ones(1, 2)
        assert torch.equal(other(x), torch.full((1, 2), 6.0))
        assert seen == []
        assert torch.equal(module(x), 2 * nn.functional.linear(x, module.weight, module.bias))
        assert seen == [module]
        # A copy of the copy, and a file that needs nothing of ours.
        assert torch.equal(copy.deepcopy(other)(x), torch.full((1, 2), 6.0))
        assert b"lightning_xattn" not in pickle.dumps(nn.Sequential(module)).replace(b"tests.capture", b"")
    assert "forward" not in vars(module)
    torch.save(module, io.BytesIO())


def test_a_shallow_copy_runs_its_own_weights():
    module, seen = Doubled(2, 2), []
    with wrapped(module, seen):
        other = copy.copy(module)
        other._parameters = {"weight": nn.Parameter(torch.zeros(2, 2)), "bias": nn.Parameter(torch.full((2,), 3.0))}
        assert torch.equal(other(torch.ones(1, 2)), torch.full((1, 2), 6.0))
        assert seen == []


def test_a_forward_of_the_modules_own_comes_back():
    module = nn.Linear(2, 2)
    own = module.forward = lambda x: x + 1
    with wrapped(module, []):
        assert torch.equal(copy.deepcopy(module)(torch.zeros(2)), torch.ones(2))
    assert vars(module)["forward"] is own


def test_wrappers_that_overlap_leave_in_any_order():
    module, seen, others = Doubled(2, 2), [], []
    first = wrapped(module, seen)
    second = wrapped(module, others)
    module(torch.ones(1, 2))
    assert (len(seen), len(others)) == (1, 1)
    first.close()
    module(torch.ones(1, 2))
    assert (len(seen), len(others)) == (1, 2)
    assert isinstance(vars(module)["forward"], WrappedForward)
    second.close()
    module(torch.ones(1, 2))
    assert (len(seen), len(others)) == (1, 2)
    assert "forward" not in vars(module)


def test_the_signature_is_the_forwards():
    module = Doubled(2, 2)
    before = inspect.signature(module.forward)
    with wrapped(module, []):
        assert inspect.signature(module.forward) == before


def test_direct_calls_of_forward_are_seen():
    model = ToyModule()
    audio, text, _ = toy_data().tensors
    with AttentionRecorder(model) as recorder:
        model.forward(audio, text)
    (pair,) = recorder.attention
    assert pair.forward.weights.shape == (23, 3, 5, 7)


def test_modules_in_plain_lists_and_dicts_are_walked():
    model = nn.Module()
    model.encoders, model.heads = [nn.Linear(1, 1), nn.Linear(1, 1)], {"left": nn.Linear(1, 1)}
    model.own = nn.Sequential(nn.ReLU())
    paths = dict(walk_modules(model))
    assert set(paths) == {"", "own", "own.0", "encoders.0", "encoders.1", "heads.left"}
    assert all(get_module(model, path) is module for path, module in paths.items())
    with pytest.raises(AttributeError):
        get_module(model, "encoders.2")


class Crashing(ToyModule):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        if batch_idx == self.when:
            raise self.error


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_nothing_stays_after_a_crash(error, when):
    module = Crashing()
    module.error, module.when = error, when
    trainer = quiet_trainer(callbacks=[AttentionExplainabilityCallback(figures_every_n_epochs=0)])
    with pytest.raises((ValueError, KeyboardInterrupt, SystemExit)):
        trainer.validate(module, toy_loader(), verbose=False)
    assert count_hooks(module) == 0
    assert not any("forward" in vars(one) for one in module.modules())
    assert torch._C._len_torch_function_stack() == 0


def test_recorders_nest_and_other_hooks_see_what_the_caller_gets():
    model, (audio, text), seen = Pair(), tokens(), []
    model.audio_to_text_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    (_, expected), _ = model(audio, text)
    with AttentionRecorder(model) as outer, AttentionRecorder(model) as inner:
        (_, got), _ = model(audio, text)
    assert torch.equal(got, expected)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(outer.attention[0].forward.weights, inner.attention[0].forward.weights)


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
    with pytest.raises(DiscoveryError, match=tells("'text_to_audio_attn'", "no longer", "new AttentionRecorder")):
        recorder.__enter__()
    assert count_hooks(model) == 0


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


def test_other_hooks_see_the_call_as_it_was_made():
    model, (audio, text), seen = Pair(), tokens(), []
    attention = model.audio_to_text_attn
    attention.register_forward_hook(lambda module, args, kwargs, _: seen.append((len(args), kwargs)), with_kwargs=True)
    with AttentionRecorder(model):
        attention(audio, text, value=text, key_padding_mask=None)
        attention(audio, text, text, None, True, None, True, False)
    assert seen == [
        (2, {"value": text, "key_padding_mask": None}),
        (8, {}),
    ]


@pytest.mark.parametrize("need_weights", [False, True])
def test_reading_a_parametrized_weight_changes_nothing(need_weights):
    outputs = []
    for recorded_too in (False, True):
        torch.manual_seed(0)
        model, (audio, text) = Pair(dropout=0.1), tokens()
        nn.utils.parametrizations.spectral_norm(model.audio_to_text_attn, "in_proj_weight")
        call = {"need_weights": need_weights}
        with AttentionRecorder(model) if recorded_too else nullcontext():
            outputs.append([model(audio, text, call)[0][0] for _ in range(3)])
        assert all(module.training for module in model.modules())
    assert_same(outputs[1], outputs[0])


def test_what_the_caller_changes_in_place_is_not_what_was_recorded():
    model, (audio, text) = Pair(), tokens()
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        _, weights = model.audio_to_text_attn(audio, text, text, average_attn_weights=False)
        weights.zero_()
        model.text_to_audio_attn(text, audio, audio)
    torch.testing.assert_close(recorder.attention[0].forward.weights.sum(-1), torch.ones(BATCH, HEADS, AUDIO))


def test_entering_twice_leaves_no_hook():
    model = Pair()
    recorder = AttentionRecorder(model)
    with recorder, recorder:
        model(*tokens())
    assert count_hooks(model) == 0
