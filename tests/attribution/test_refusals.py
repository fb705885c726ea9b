"""What cannot be computed is said with a line that can be pasted, and pasting it gives the numbers."""

import re

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.core.errors import XAttnWarning
from tests.toy import quiet_trainer

SAMPLES, CLASSES, WIDTH = 60, 3, 8


def data():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(SAMPLES) % CLASSES
    hot = F.one_hot(y, CLASSES).float()
    return TensorDataset(*(hot + torch.randn(SAMPLES, 3, generator=g) for _ in range(3)), y)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.sound, self.sight, self.touch = (nn.Linear(3, WIDTH) for _ in range(3))
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, one, two, three):
        return self.head(torch.cat([self.sound(one).tanh(), self.sight(two).tanh()], 1))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(*batch[:3]), batch[3]))


def look(module, **settings):
    watch = AttentionExplainabilityCallback(figures_every_n_epochs=0, **settings)
    quiet_trainer(callbacks=[watch]).validate(module.eval(), DataLoader(data(), 20), verbose=False)
    return watch


class AcrossSamples(Model):
    """Normalises by the batch."""

    def forward(self, *streams):
        scores = super().forward(*streams)
        return scores - scores.mean(0)


class BatchNorm(Model):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(CLASSES, track_running_stats=False)

    def forward(self, *streams):
        return self.norm(super().forward(*streams))


class OverTheBatch(Model):
    """Attends over the batch's axis."""

    def __init__(self):
        super().__init__()
        self.across = nn.MultiheadAttention(2 * WIDTH, 2, batch_first=True)

    def forward(self, one, two, three):
        fused = torch.cat([self.sound(one).tanh(), self.sight(two).tanh()], 1)[None]
        return self.head(5 * self.across(fused, fused, fused)[0][0])


@pytest.mark.parametrize("kind", [AcrossSamples, BatchNorm, OverTheBatch])
@pytest.mark.filterwarnings("ignore::lightning_xattn.core.errors.XAttnWarning")
def test_a_model_that_looks_across_samples_has_no_contributions(kind):
    summary = look(kind(), attention={}).fusion_summaries["val"]
    assert "looks across samples" in summary.contribution_problem
    assert not [name for name in summary.numbers if name.startswith("phi")]


def paste(message, name):
    """The settings in a message, with its first two candidates in the places of what is to be filled in."""
    found = re.search(rf"{name}=(\{{.*?\}}|'[^']*')", message)
    assert found, message
    return found[1]


class OneLeaf(Model):
    """Both streams come in one tensor."""

    def forward(self, both):
        one, two = both.chunk(2, dim=1)
        return self.head(torch.cat([self.sound(one).tanh(), self.sight(two).tanh()], 1))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(torch.cat(batch[:2], 1)), batch[3]))


def test_modules_that_are_named_as_the_message_lists_them(infos):
    class OfBatch(OneLeaf):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self(batch["x"]), batch["y"]))

    def validate(**settings):
        *streams, y = data().tensors
        batches = [{"x": torch.cat(streams[:2], 1)[i : i + 20], "y": y[i : i + 20]} for i in range(0, SAMPLES, 20)]
        watch = AttentionExplainabilityCallback(figures_every_n_epochs=0, **settings)
        quiet_trainer(callbacks=[watch]).validate(OfBatch(), DataLoader(batches, batch_size=None), verbose=False)
        return watch

    assert not validate().fusion_summaries
    message = next(said for said in infos.messages if "Probes and contributions are not computed" in said)
    pattern = eval(paste(message, "modalities"))  # of our own message
    assert set(pattern) == {"<a>", "<b>"}
    candidates = re.findall(r"'(\w+)' \(16, 8\)", message)
    assert candidates == ["sound", "sight"]
    summary = validate(modalities=dict(zip(("left", "right"), candidates, strict=True))).fusion_summaries["val"]
    assert not summary.contribution_problem
    assert summary.modalities == ("left", "right")


def test_a_prediction_that_is_not_clear_is_named_as_the_message_says():
    class Silent(Model):
        def validation_step(self, batch, batch_idx):
            self(*batch[:3])

    with pytest.warns(XAttnWarning, match="says that they are") as caught:
        look(Silent(), class_names=list("abc"))
    message = next(str(one.message) for one in caught if "says that they are" in str(one.message))
    setting = paste(message, "predictions").strip("'")
    record = look(Silent(), predictions=setting, class_names=list("abc")).history[0]
    assert {"accuracy", "contribution/share/sound"} <= set(record)


class Regression(Model):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2 * WIDTH, 1)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self(*batch[:3])[:, 0], batch[3].float()))


class ThreeStreams(Model):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * WIDTH, CLASSES)

    def forward(self, one, two, three):
        return self.head(torch.cat([self.sound(one), self.sight(two), self.touch(three)], 1).tanh())


class Maps(Model):
    """Feature maps enter the head."""

    def __init__(self):
        super().__init__()
        self.sound = nn.Conv2d(1, WIDTH, 1)

    def forward(self, one, two, three):
        maps = self.sound(one[:, None, :, None]).tanh()
        return self.head(torch.cat([maps.mean((2, 3)), self.sight(two).tanh()], 1))


@pytest.mark.filterwarnings("ignore:No (predictions|targets) found")
@pytest.mark.parametrize(
    ("kind", "names", "topic"),
    [
        (Model, ("sound", "sight"), "share"),
        (Regression, ("sound", "sight"), "size"),
        (ThreeStreams, ("sound", "sight", "touch"), "share"),
        (Maps, ("sound", "sight"), "share"),
    ],
)
def test_numbers_at_first_contact(kind, names, topic):
    """A fusion without attention, a regression, three modalities and feature maps need no setting at all."""
    record = look(kind()).history[0]
    shares = [record[f"contribution/{topic}/{name}"] for name in names]
    assert all(share == share for share in shares)
    if topic == "share":
        assert sum(shares) == pytest.approx(1)
