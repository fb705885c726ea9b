"""Wrapped forwards: copies are of the plain module, what overlaps leaves cleanly, and nothing stays after a crash."""

import copy
import inspect
import io
import pickle
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback, AttentionRecorder
from lightning_xattn.capture.attention_mode import WrappedForward, get_module, walk_modules, wrap_forwards
from tests.toy import ToyModule, count_hooks, quiet_trainer, toy_data, toy_loader


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
    trainer = quiet_trainer(callbacks=[AttentionExplainabilityCallback()])
    with pytest.raises((ValueError, KeyboardInterrupt, SystemExit)):
        trainer.validate(module, toy_loader(), verbose=False)
    assert count_hooks(module) == 0
    assert not any("forward" in vars(one) for one in module.modules())
    assert torch._C._len_torch_function_stack() == 0
