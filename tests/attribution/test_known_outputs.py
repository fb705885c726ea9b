"""Calls that get the same tensors again are not run again: what is skipped, and that no number changes."""

import pytest
import torch
from torch import nn

from lightning_xattn.attribution.known_outputs import KnownOutputs
from lightning_xattn.attribution.replay import Replay
from lightning_xattn.attribution.root import ReplayError
from lightning_xattn.capture.calls import Call
from lightning_xattn.core.attention import Direction
from tests.attribution.test_faithfulness import Gazer, marked_data, summary_of


class Counting(nn.Module):
    runs = 0

    def forward(self, values, scale=1.0):
        self.runs += 1
        return values * scale


def test_a_call_that_gets_the_same_tensors_and_numbers_runs_once():
    model = nn.Sequential(Counting(), nn.Sequential(nn.Sequential(Counting()), Counting()))
    module, one, other = model[0], torch.ones(2), torch.ones(2)
    known = KnownOutputs(model, model[1][0])
    assert set(known.paths.values()) == {"0", "1.1"}  # neither what attends, nor what it is in, nor what is in it
    first = known.run(("0", 0), module.forward, Call((one,), {"scale": 2.0}))
    assert known.run(("0", 0), module.forward, Call((one,), {"scale": 2.0})) is first
    assert module.runs == 1
    for call in (Call((one,), {"scale": 3.0}), Call((other,), {"scale": 2.0}), Call(([one],), {})):
        fresh = KnownOutputs(model, model[1][0])
        fresh.run(("0", 0), lambda *_, **__: None, Call((one,), {"scale": 2.0}))
        assert fresh.run(("0", 0), lambda *_, **__: "ran", call) == "ran"


class Leaves(nn.Module):
    """Leaves what the fusion reads in an attribute, or changes what it got in place."""

    def __init__(self, habit):
        super().__init__()
        self.habit, self.left = habit, None

    def forward(self, values):
        self.left = values.mul_(1.5) if self.habit == "in place" else 1.5 * values
        return self.left


@pytest.mark.parametrize("habit", ["none", "attribute", "in place"])
def test_faithfulness_is_that_of_whole_runs(habit, monkeypatch):
    def make():
        module = Gazer()
        module.fusion.norm, forward = Leaves(habit), module.fusion.forward

        def run(left, right):
            normed = module.fusion.norm(left)
            return forward(module.fusion.norm.left if habit == "attribute" else normed, right)

        module.fusion.forward = run
        return module

    found = summary_of(make(), marked_data(130))

    def refuse(*_):
        raise ReplayError("nothing is skipped")

    monkeypatch.setattr(Replay, "_run_skipping", refuse)
    whole = summary_of(make(), marked_data(130))
    for direction in (Direction("left", "right"), Direction("right", "left")):
        for name in ("gain", "reference", "cost"):
            one, other = (summary.numbers[f"{name}/{direction}"] for summary in (found, whole))
            assert torch.allclose(one, other, atol=1e-6, equal_nan=True)
