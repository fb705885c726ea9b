"""Layouts of attention in a whole validation: time first, as many queries as keys, samples on the wrong axis."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.core.errors import XAttnWarning
from tests import reference
from tests.capture.models import Runs
from tests.messages import tells
from tests.toy import quiet_trainer

WIDTH, HEADS, CLASSES, SAMPLES, BATCH = 12, 3, 3, 30, 6


class TimeFirst(nn.Module):
    """Attention of (tokens, batch, width), with heads folded into the samples."""

    def __init__(self, heads_are_called="num_heads"):
        super().__init__()
        setattr(self, heads_are_called, HEADS)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.given = []

    def forward(self, x, y):
        def fold(tokens):
            return tokens.contiguous().view(len(tokens), -1, WIDTH // HEADS).transpose(0, 1)

        query, key, value = fold(self.query(x)), fold(self.key(y)), fold(self.value(y))
        weights = F.softmax(2 * query @ key.transpose(1, 2), dim=-1)
        self.given.append(weights.unflatten(0, (-1, HEADS)).detach().clone())
        attended = (weights @ value).transpose(0, 1).reshape(len(x), -1, WIDTH)
        return attended, self.given[-1].mean(1)


class Base(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj_l, self.proj_a, self.out = nn.Linear(5, WIDTH), nn.Linear(4, WIDTH), nn.Linear(2 * WIDTH, CLASSES)

    def validation_step(self, batch, batch_idx):
        left, right, target = batch
        self.log("val_loss", F.cross_entropy(self(left, right), target))


class MulT(Base):
    """Two layers in each direction, whose names hold no direction."""

    def __init__(self, heads_are_called="num_heads"):
        super().__init__()
        self.l_with_a, self.a_with_l = (
            nn.ModuleList([TimeFirst(heads_are_called) for _ in range(2)]) for _ in range(2)
        )

    def forward(self, left, right):
        left, right = (one.transpose(0, 1) for one in (self.proj_l(left), self.proj_a(right)))
        x, y = left, right
        for there, back in zip(self.l_with_a, self.a_with_l, strict=True):
            x, y = x + there(x, right)[0], y + back(y, left)[0]
        return self.out(torch.cat([x[-1], y[-1]], 1))


class OneDirection(Base):
    """Tokens ask as many others."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, left, right):
        left, right = self.proj_l(left), self.proj_a(right)
        return self.out(torch.cat([self.attend(left, right, right)[0].mean(1), left.mean(1)], 1))


class Twice(Base):
    """One module computes both directions, by its own softmax."""

    def __init__(self):
        super().__init__()
        self.fusion = Runs(self.attend, first=nn.Linear(WIDTH, WIDTH), second=nn.Linear(WIDTH, WIDTH))
        self.given = []

    def attend(self, fusion, x, y):
        there, back = (fusion.first(x) @ y.mT).softmax(-1), (fusion.second(y) @ x.mT).softmax(-1)
        self.given.append(there.detach().clone()[:, None])
        return torch.cat([(there @ y).mean(1), (back @ x).mean(1)], 1)

    def forward(self, left, right):
        return self.out(self.fusion(self.proj_l(left), self.proj_a(right)))


class AcrossSamples(Base):
    """Tokens (batch, tokens, width) for attention that expects (tokens, batch, width)."""

    def __init__(self):
        super().__init__()
        self.right_to_left = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, left, right):
        left, right = self.proj_l(left), self.proj_a(right)
        return self.out(torch.cat([self.right_to_left(right, left, left)[0].mean(1), right.mean(1)], 1))


def validate(module, left, right):
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(SAMPLES, left, 5, generator=generator),
        torch.randn(SAMPLES, right, 4, generator=generator),
        torch.arange(SAMPLES) % CLASSES,
    )
    callback = AttentionExplainabilityCallback(figures_every_n_epochs=0, curves="all")
    quiet_trainer(callbacks=[callback]).validate(module.eval(), DataLoader(data, BATCH), verbose=False)
    return callback


def held_against(weights, found):
    """The mean entropy of attention that a module has kept of the steps, against the curve's."""
    rows = [reference.row_statistics(one.double().numpy())["entropy"].mean() for one in weights]
    assert found == pytest.approx(sum(rows) / len(rows), abs=1e-5)


@pytest.mark.filterwarnings("ignore:Found in the first pass")
@pytest.mark.parametrize(("tokens", "name"), [((11, 11), "h"), ((BATCH, BATCH), "num_heads")])
def test_attention_of_time_first_tokens_with_heads_folded_into_the_samples(tokens, name):
    module = MulT(name)
    callback = validate(module, *tokens)
    layers = list(callback.summaries)
    assert len(layers) == 2
    assert callback.fusion_summaries["val"].modalities == ("left", "right")
    assert callback.fusion_summaries["val"].sources == ("left = proj_l", "right = proj_a")
    for layer, there, back in zip(layers, module.l_with_a, module.a_with_l, strict=True):
        (record,) = [one for one in callback.history if one["layer"] in layer]
        for direction, attention in (("left_to_right", there), ("right_to_left", back)):
            steps = [one for one in attention.given if len(one) == BATCH][:1] + attention.given[-4:]
            held_against(torch.cat(steps), record[f"entropy/{direction}/all"])


@pytest.mark.filterwarnings("ignore:Found ")
def test_one_direction_between_as_many_tokens():
    callback = validate(OneDirection(), 5, 5)
    assert {"entropy/left_to_right/all"} <= callback.history[0].keys()
    assert callback.history[0]["samples"] == SAMPLES


@pytest.mark.filterwarnings("ignore:(?s).*has no axis for heads|Found in the first pass")
@pytest.mark.parametrize("right", [7, WIDTH], ids=["as many tokens", "as many as a token is wide"])
def test_a_module_that_attends_twice(right):
    module = Twice()
    record = validate(module, 7, right).history[0]
    assert record["samples"] == SAMPLES
    assert {"entropy/left_to_right/all", "entropy/right_to_left/all"} <= record.keys()
    steps = [one for one in module.given if len(one) == BATCH]
    held_against(torch.cat(steps[:1] + module.given[-4:]), record["entropy/left_to_right/all"])


@pytest.mark.parametrize(
    ("samples", "tokens", "facts"),
    [
        (BATCH, BATCH, ("Attention from sample to sample", "'right_to_left'", "batch_first=True")),
        (BATCH, 5, ("Nothing is recorded", "5 samples", "6 and 6 tokens", "6 targets", "batch_first=True")),
    ],
)
def test_attention_from_sample_to_sample_is_left_out_and_said(samples, tokens, facts):
    with pytest.warns(XAttnWarning, match=tells(*facts)):
        callback = validate(AcrossSamples(), tokens, tokens)
    assert not any(name.startswith("entropy") for record in callback.history for name in record)
    if callback.history:
        assert "looks across samples" in callback.fusion_summaries["val"].contribution_problem


def test_attention_that_the_flow_of_data_shows_waits_for_a_batch_that_has_all_modalities():
    """Nobody in the first batch has the left one, so nothing shows yet which attention goes across."""

    class Lacking(MulT):
        def validation_step(self, batch, batch_idx):
            left, right, target, _ = batch
            logits = self(left, right)
            self.log("val_loss", F.cross_entropy(logits, target))
            return {"logits": logits}

    torch.manual_seed(0)
    tokens = torch.randn(SAMPLES, 6, 5), torch.randn(SAMPLES, 6, 4)
    has_left = torch.arange(SAMPLES) >= BATCH
    data = TensorDataset(*tokens, torch.randint(0, CLASSES, (SAMPLES,)), has_left)
    callback = AttentionExplainabilityCallback(present={"left": lambda _, batch: batch[3]}, figures_every_n_epochs=0)
    with pytest.warns(XAttnWarning, match="Found in the first pass"):
        quiet_trainer(callbacks=[callback]).validate(Lacking(), DataLoader(data, BATCH), verbose=False)
    assert [one.samples for one in callback.summaries.values()] == [SAMPLES - BATCH] * 2
    assert callback.fusion_summaries["val"].unrecorded == BATCH
