"""How often a first step runs the model, and that questions which share runs get the answers that each gets alone."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.attribution import evidence
from lightning_xattn.attribution.first_step import FirstStep
from tests.attribution.models import TwoStreams, said_data
from tests.toy import quiet_trainer


class ScaledByLeft(TwoStreams):
    """The left tokens scale what the right encoder gives, and no function of torch shows it."""

    def forward(self, left, right):
        hidden = self.right(right) * (1 + torch.tensor(left.mean((1, 2)).tolist())[:, None, None])
        return self.head(self.fusion(self.left(left), hidden))


class PastAll(TwoStreams):
    """The left tokens reach the predictions past all encoders, and a function of torch shows it."""

    def forward(self, left, right):
        return super().forward(left, right) + left.mean((1, 2))[:, None]


class AcrossSamples(TwoStreams):
    """Predictions depend on the mean of their batch."""

    def forward(self, left, right):
        logits = super().forward(left, right)
        return logits - logits.mean(0)


class OneMixes(TwoStreams):
    """The left encoder looks across samples."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(3, 12), nn.BatchNorm1d(5, track_running_stats=False))


class Failing(TwoStreams):
    """It fails where two samples are the same."""

    def forward(self, left, right):
        if len({*left[:, 0, 0].tolist()}) < len(left):
            raise ValueError("twice the same")
        return super().forward(left, right)


def first_step_of(model, monkeypatch, batch=32):
    """What the first step finds, and how often the root ran to find it."""
    found, runs = [], [0]
    find, run = FirstStep.find, evidence.Root.run

    def counted(self, *args, **kwargs):
        runs[0] += not found
        return run(self, *args, **kwargs)

    def noted(self):
        found.append(find(self))
        return found[0]

    with monkeypatch.context() as patches:
        patches.setattr(evidence.Root, "run", counted)
        patches.setattr(FirstStep, "find", noted)
        callback = AttentionExplainabilityCallback(figures_every_n_epochs=0, faithfulness_every_n_epochs=0)
        loader = DataLoader(Subset(said_data()[0], range(40)), batch)
        quiet_trainer(callbacks=[callback]).validate(model, loader, verbose=False)
    return found[0], runs[0]


def answers(found):
    return (
        {one.name: one.places for one in found.modalities},
        *(found.further, found.problem, found.refusal, dict(found.sides), sorted(found.mixing)),
    )


@pytest.mark.parametrize("kind", [TwoStreams, ScaledByLeft, PastAll, AcrossSamples, OneMixes, Failing])
@pytest.mark.parametrize("batch", [3, 4, 32])
def test_shared_runs_show_what_single_ones_do(kind, batch, monkeypatch):
    torch.manual_seed(0)
    model = kind()
    monkeypatch.setattr(evidence, "LARGE", 10**9)
    alone, _ = first_step_of(model, monkeypatch, batch)
    monkeypatch.setattr(evidence, "LARGE", 0)
    together, _ = first_step_of(model, monkeypatch, batch)

    assert answers(together) == answers(alone)
    assert len(alone.modalities) == 2


def test_a_large_model_runs_three_times_and_a_small_one_seven_times(monkeypatch):
    _, small = first_step_of(TwoStreams(), monkeypatch)
    monkeypatch.setattr(evidence, "LARGE", 0)
    _, large = first_step_of(TwoStreams(), monkeypatch)

    assert (large, small) == (3, 7)


def test_what_one_modality_holds_of_another_beside_torch_is_seen_by_shared_runs_too(monkeypatch):
    monkeypatch.setattr(evidence, "LARGE", 0)
    clean, _ = first_step_of(TwoStreams(), monkeypatch)
    hidden, _ = first_step_of(ScaledByLeft(), monkeypatch)

    assert all(place.kind == "output" for one in clean.modalities for place in one.places)
    assert any(place.kind == "input" for one in hidden.modalities for place in one.places)
