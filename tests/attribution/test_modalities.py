"""Modalities of models as strangers write them: found by the flow of data, with contributions equal to brute force."""

from dataclasses import dataclass
from itertools import combinations
from math import comb

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_xattn import AttentionExplainabilityCallback
from tests.toy import quiet_trainer

SAMPLES, CLASSES, WIDTH = 37, 3, 8


def brute_force(scores, streams, further=()):
    """``(samples, modalities)`` Shapley values by exchanging inputs between all samples, in plain loops."""
    samples, modalities = len(streams[0]), len(streams)
    with torch.no_grad():
        predicted = scores(*streams, *further).softmax(1).argmax(1)
        values = {}
        for size in range(modalities + 1):
            for own in combinations(range(modalities), size):
                table = torch.zeros(samples, samples)
                for j in range(samples):
                    mixed = [
                        stream if number in own else stream[j : j + 1].expand_as(stream)
                        for number, stream in enumerate(streams)
                    ]
                    table[:, j] = scores(*mixed, *further).softmax(1).gather(1, predicted[:, None])[:, 0]
                apart = ~torch.eye(samples, dtype=torch.bool)
                values[own] = (table * apart).sum(1) / (samples - 1)
    phi = torch.zeros(samples, modalities)
    for one in range(modalities):
        others = [other for other in range(modalities) if other != one]
        for size in range(modalities):
            weight = 1 / (modalities * comb(modalities - 1, size))
            for before in combinations(others, size):
                after = tuple(sorted((*before, one)))
                phi[:, one] += weight * (values[after] - values[before])
    return phi


def data_of(samples=SAMPLES, seed=0):
    """Two streams of 4 and 3 numbers, an age, and a target."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % CLASSES
    hot = F.one_hot(y, CLASSES).float()
    left = torch.randn(samples, 4, generator=g) + F.pad(2 * hot, (0, 1))
    right = torch.randn(samples, 3, generator=g) + hot
    return left, right, torch.rand(samples, 1, generator=g), y


class Batches(Dataset):
    def __init__(self, tensors, collate):
        self.tensors, self.collate = tensors, collate

    def loader(self, size=20):
        whole = [[one[i : i + size] for one in self.tensors] for i in range(0, len(self.tensors[0]), size)]
        return DataLoader([self.collate(*batch) for batch in whole], batch_size=None)


def by_position(left, right, age, y):
    return left, right, age, y


class Base(pl.LightningModule):
    """Encoders of two streams; ``scores`` gives logits of what the batch holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left_encoder = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh())
        self.right_encoder = nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh())
        self.mix, self.out = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def fuse(self, left, right):
        return 3 * self.out(torch.tanh(2 * self.mix(torch.cat([left, right], 1))))

    def forward(self, left, right, age):
        return self.fuse(self.left_encoder(left), self.right_encoder(right))

    def validation_step(self, batch, batch_idx):
        left, right, age, y = batch
        self.log("val_loss", F.cross_entropy(self(left, right, age), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class InTheStep(Base):
    """Encoders are called in the step, a head by itself."""

    def forward(self, left, right, age):
        raise RuntimeError("not called")

    def validation_step(self, batch, batch_idx):
        left, right, _, y = batch
        logits = self.fuse(self.left_encoder(left), self.right_encoder(right))
        self.log("val_loss", F.cross_entropy(logits, y))

    def scores(self, left, right, age):
        return self.fuse(self.left_encoder(left), self.right_encoder(right))


class Augmented(Base):
    """The mean of two calls of an inner model."""

    def __init__(self):
        super().__init__()
        self.net = Base()

    def validation_step(self, batch, batch_idx):
        left, right, age, y = batch
        self.log("val_loss", F.cross_entropy(self.scores(left, right, age), y))

    def scores(self, left, right, age):
        return (self.net(left, right, age) + self.net(-left, right.flip(1), age)) / 2


class LastStep(Base):
    """Scores of two time steps, of which the last one counts."""

    def forward(self, left, right, age):
        scores = super().forward(left, right, age)
        return torch.stack([scores.flip(1), scores], 1)

    def validation_step(self, batch, batch_idx):
        left, right, age, y = batch
        self.log("val_loss", F.cross_entropy(self(left, right, age)[:, -1], y))

    def scores(self, left, right, age):
        return self(left, right, age)[:, -1]


class Unused(Base):
    """The right stream is encoded, and multiplied by 0."""

    def forward(self, left, right, age):
        return self.fuse(self.left_encoder(left), 0 * self.right_encoder(right))


class Siamese(Base):
    """One encoder for both streams, called twice."""

    def forward(self, left, right, age):
        return self.fuse(self.left_encoder(left), self.left_encoder(F.pad(right, (0, 1))))


class Third(Base):
    """An age that scales the fused features."""

    def forward(self, left, right, age):
        return (0.2 + 2 * age) * super().forward(left, right, age)


class Recurrent(Base):
    """The states of an LSTM, whose samples are on the second axis."""

    def __init__(self):
        super().__init__()
        self.left_encoder = nn.LSTM(2, WIDTH, batch_first=True)
        nn.init.normal_(self.left_encoder.weight_ih_l0, std=2)

    def forward(self, left, right, age):
        _, (state, _) = self.left_encoder(left.unflatten(1, (2, 2)))
        return self.fuse(3 * state[-1], self.right_encoder(right))


class InPlace(Base):
    """Works in place on what the encoders give, and on its inputs."""

    def forward(self, left, right, age):
        right += 1
        left = self.left_encoder(left)
        left.mul_(1.5).add_(0.1)
        return self.fuse(left, self.right_encoder(right))


class RandomPatches(Base):
    """The encoder of the left stream looks at random entries, the same for a batch."""

    def __init__(self):
        super().__init__()
        self.left_encoder = Patches()


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, WIDTH)

    def forward(self, x):
        chosen = torch.randperm(4)[:2]
        return torch.tanh(self.inner(x[:, chosen]))


class PlainList(Base):
    """Encoders in a plain list, which torch does not see."""

    def __init__(self):
        super().__init__()
        self.encoders = [self.left_encoder, self.right_encoder]
        del self.left_encoder, self.right_encoder

    def forward(self, left, right, age):
        return self.fuse(self.encoders[0](left), self.encoders[1](right))


class FeatureMaps(Base):
    """Feature maps of the left stream, pooled in the fusion."""

    def __init__(self):
        super().__init__()
        self.left_encoder = nn.Conv2d(1, WIDTH, 1)
        nn.init.normal_(self.out.weight, std=2)

    def forward(self, left, right, age):
        return self.fuse(self.left_encoder(left.view(-1, 1, 2, 2)).tanh().mean((2, 3)), self.right_encoder(right))


class MoreScores(Base):
    """Gives more numbers than scores of classes."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(WIDTH, CLASSES + 2)

    def scores(self, left, right, age):
        return self(left, right, age)[:, :CLASSES]


def first_scores(outputs, batch, forward):
    return forward[:, :CLASSES]


class ListEntries(Base):
    """Encoders that are entries of a list, whose names are no names of modalities."""

    def __init__(self):
        super().__init__()
        self.projectors = nn.ModuleList([self.left_encoder, self.right_encoder])
        del self.left_encoder, self.right_encoder

    def forward(self, left, right, age):
        return self.fuse(self.projectors[0](left), self.projectors[1](right))


@dataclass
class Fields:
    left: torch.Tensor
    right: torch.Tensor
    age: torch.Tensor
    y: torch.Tensor


class OfFields(Base):
    """A batch that is a dataclass."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch.left, batch.right, batch.age), batch.y))


class Ids(Base):
    """A batch of ids alone: the streams are looked up."""

    def __init__(self):
        super().__init__()
        left, right, _, y = data_of()
        for name, one in (("lefts", left), ("rights", right), ("ys", y)):
            self.register_buffer(name, one)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(self.lefts[batch], self.rights[batch], None), self.ys[batch]))


CASES = {
    "a forward": (Base, by_position, {}),
    "encoders called in the step": (InTheStep, by_position, {}),
    "two augmented calls": (Augmented, by_position, {}),
    "the last of two steps": (LastStep, by_position, {}),
    "an unused modality": (Unused, by_position, {}),
    "siamese encoders": (Siamese, by_position, {}),
    "a third input": (Third, by_position, {}),
    "an LSTM's states": (Recurrent, by_position, {}),
    "in-place operations": (InPlace, by_position, {}),
    "encoders in a plain list": (PlainList, by_position, {}),
    "entries of a list": (ListEntries, by_position, {}),
    "selected scores": (MoreScores, by_position, {"predictions": first_scores, "targets": lambda _, batch: batch[3]}),
    "feature maps": (FeatureMaps, by_position, {}),
    "a dataclass": (OfFields, Fields, {}),
    "ids alone": (Ids, None, {"modalities": {"left": "left_encoder", "right": "right_encoder"}}),
    "named modules": (Base, by_position, {"modalities": {"left": "left_encoder", "right": "right_encoder"}}),
    "named list items": (PlainList, by_position, {"modalities": {"left": "encoders[0]", "right": "encoders[1]"}}),
    "named inputs": (Base, by_position, {"modalities": {"left": "left", "right": "right"}}),
}


@pytest.mark.parametrize("name", CASES)
def test_contributions_are_those_of_brute_force(name, infos):
    kind, collate, settings = CASES[name]
    tensors = data_of()
    model = kind().eval()
    further = tensors[2:3]
    scores = getattr(model, "scores", model)

    def copied(left, right, age):
        return scores(left.clone(), right.clone(), age)

    expected = brute_force(copied, tensors[:2], further)
    loader = (
        DataLoader(torch.arange(SAMPLES), 20)
        if collate is None
        else Batches([one.clone() for one in tensors], collate).loader()
    )
    # All partners: with as few samples as these, four each would be an estimate.
    callback = AttentionExplainabilityCallback(contribution_samples=SAMPLES, figures_every_n_epochs=0, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_xattn.evaluation.evaluation.compute_contributions", of_all_partners)
        quiet_trainer(callbacks=[callback]).validate(model, loader, verbose=False)
    summary = callback.fusion_summaries["val"]
    assert not summary.contribution_problem, infos.messages
    assert len(summary.modalities) == 2
    assert not any("." in modality or modality.isdigit() for modality in summary.modalities)
    found = torch.stack([summary.numbers[f"phi/{modality}"] for modality in summary.modalities], 1)
    torch.testing.assert_close(found.mean(0), expected.mean(0).double(), atol=1e-5, rtol=1e-4)
    right = scores(*(one.clone() for one in tensors[:3])).argmax(1) == tensors[3]
    assert callback.history[0]["accuracy"] == pytest.approx(float(right.float().mean()))


def of_all_partners(kept, fusion, partners):
    from lightning_xattn.attribution.contribution import compute_contributions

    return compute_contributions(kept, fusion, None)


def test_patches_that_are_drawn_at_random_in_each_batch():
    """Samples keep what was drawn for them: as by hand from what the encoder gave in the steps."""
    model, given = RandomPatches().eval(), []
    model.left_encoder.register_forward_hook(lambda module, args, output: given.append(output.clone()))
    loader = Batches([one.clone() for one in data_of()], by_position).loader()
    callback = AttentionExplainabilityCallback(contribution_samples=SAMPLES, figures_every_n_epochs=0)
    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_xattn.evaluation.evaluation.compute_contributions", of_all_partners)
        quiet_trainer(callbacks=[callback]).validate(model, loader, verbose=False)
    state = torch.get_rng_state()
    assert [len(one) for one in given] == [20, 17]
    summary = callback.fusion_summaries["val"]
    assert not summary.contribution_problem
    right = data_of()[1]
    expected = brute_force(lambda left, other: model.fuse(left, model.right_encoder(other)), (torch.cat(given), right))
    found = torch.stack([summary.numbers[f"phi/{modality}"] for modality in ("left", "right")], 1)
    torch.testing.assert_close(found.mean(0), expected.mean(0).double(), atol=1e-5, rtol=1e-4)
    # The run's random numbers are those of a run without the callback.
    torch.manual_seed(1)
    loader = Batches([one.clone() for one in data_of()], by_position).loader()
    quiet_trainer().validate(model, loader, verbose=False)
    assert torch.equal(torch.get_rng_state(), state)
