"""Predictions and targets of strangers' steps: what the loss reads, what the step returns, what is named."""

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.core.errors import DiscoveryError, XAttnWarning
from tests.toy import quiet_trainer

SAMPLES, CLASSES, WIDTH = 30, 3, 8


def tensors():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(SAMPLES) % CLASSES
    hot = F.one_hot(y, CLASSES).float()
    return hot + torch.randn(SAMPLES, 3, generator=g), hot + torch.randn(SAMPLES, 3, generator=g), y


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH), nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, left, right):
        return self.head(torch.cat([self.left(left).tanh(), self.right(right).tanh()], 1))


class Module(pl.LightningModule):
    def __init__(self, step):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.teacher, self.own_step = Net(), Net(), step
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, left, right):
        return self.net(left, right)

    def validation_step(self, batch, batch_idx):
        return self.own_step(self, batch)


def look(step, batches=None, net=Net, **settings):
    module = Module(step)
    torch.manual_seed(0)
    module.net = net()
    settings = {"class_names": ["a", "b", "c"]} | settings
    watch = AttentionExplainabilityCallback(figures_every_n_epochs=0, **settings)
    if batches is None:
        left, right, y = tensors()
        batches = [(left[i : i + 10], right[i : i + 10], y[i : i + 10]) for i in range(0, SAMPLES, 10)]
    quiet_trainer(callbacks=[watch]).validate(module, DataLoader(batches, batch_size=None), verbose=False)
    left, right, y = tensors()
    with torch.no_grad():
        scores = module.net(left, right)
    return watch, scores, y


def accuracy(scores, y):
    return pytest.approx(float((scores.argmax(1) == y).float().mean()))


def logs(loss):
    def step(module, batch):
        module.log("val_loss", loss(module, batch))

    return step


LOSSES = {
    "cross_entropy": lambda m, b: F.cross_entropy(m.net(*b[:2]), b[2]),
    "a loss module": lambda m, b: nn.CrossEntropyLoss()(m.net(*b[:2]), b[2]),
    "nll_loss": lambda m, b: F.nll_loss(m.net(*b[:2]).log_softmax(1), b[2]),
    "one-hot targets": lambda m, b: F.cross_entropy(m.net(*b[:2]), F.one_hot(b[2], CLASSES).float()),
    "binary_cross_entropy": lambda m, b: F.binary_cross_entropy(
        m.net(*b[:2]).softmax(1), F.one_hot(b[2], CLASSES).float()
    ),
    "a focal loss": lambda m, b: F.cross_entropy(m.net(*b[:2]), b[2], reduction="none").pow(2).mean(),
    "kl_div": lambda m, b: F.kl_div(m.net(*b[:2]).log_softmax(1), F.one_hot(b[2], CLASSES).float()),
    "a direct forward": lambda m, b: F.cross_entropy(m.net.forward(*b[:2]), b[2]),
    "a metric": lambda m, b: m.accuracy(m(*b[:2]), b[2]),
    "argmax": lambda m, b: (m(*b[:2]).argmax(1) == b[2]).float().mean(),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_predictions_are_what_the_loss_reads(loss):
    watch, scores, y = look(logs(loss))
    assert watch.history[0]["accuracy"] == accuracy(scores, y)
    assert 0 <= watch.history[0]["contribution/share/left"] <= 1


def test_the_target_that_the_loss_reads_counts():
    """The batch holds other class ids, too."""
    left, right, y = tensors()
    batches = [(left, right, (y + 1) % CLASSES, y)]
    watch, scores, _ = look(logs(lambda m, b: F.cross_entropy(m.net(*b[:2]), b[3])), batches)
    assert watch.history[0]["accuracy"] == accuracy(scores, y)


@pytest.mark.parametrize(
    "student", [lambda m, b: F.cross_entropy(m.net(*b[:2]), b[2]), lambda m, b: 0], ids=["taught", "alone"]
)
def test_a_teacher_and_a_student_are_refused_with_both_settings(student):
    def loss(module, batch):
        return F.mse_loss(module.net(*batch[:2]), module.teacher(*batch[:2])) + student(module, batch)

    with pytest.warns(XAttnWarning) as caught:
        watch, _, _ = look(logs(loss))
    told = " ".join(str(one.message) for one in caught)
    assert "predictions='net'" in told
    assert "predictions='teacher'" in told
    assert not watch.history or "accuracy" not in watch.history[0]
    for name, one in (("net", lambda m: m.net), ("teacher", lambda m: m.teacher)):
        watch, _, y = look(logs(loss), predictions=name, targets=lambda outputs, batch: batch[2])
        left, right, _ = tensors()
        with torch.no_grad():
            expected = one(Module(None))(left, right)
        assert watch.history[0]["accuracy"] == accuracy(expected, y)


def test_a_shape_alone_is_no_evidence():
    def step(module, batch):
        module(*batch[:2])

    with pytest.warns(XAttnWarning, match="predictions='forward' says that they are"):
        watch, scores, y = look(step)
    assert not watch.history or "accuracy" not in watch.history[0]
    watch, scores, y = look(step, predictions="forward")
    assert watch.history[0]["accuracy"] == accuracy(scores, y)


@dataclass
class Output:
    loss: torch.Tensor
    scores: torch.Tensor


Named = namedtuple("Named", "loss scores")


FORMS_OF_PREDICTIONS = {
    "a key": (lambda loss, scores: {"loss": loss, "logits": scores}, {}),
    "nested": (lambda loss, scores: {"loss": loss, "deep": {"mine": scores}}, {"predictions": "mine"}),
    "a dataclass": (Output, {"predictions": "scores"}),
    "a namedtuple": (Named, {"predictions": "scores"}),
    "an array": (lambda loss, scores: {"preds": scores.argmax(1).numpy()}, {}),
    "a list": (lambda loss, scores: {"preds": scores.argmax(1).tolist()}, {}),
    "a column": (lambda loss, scores: {"preds": scores.argmax(1)[:, None]}, {}),
    "a module": (lambda loss, scores: loss, {"predictions": "net"}),
    "a part of it": (lambda loss, scores: loss, {"predictions": "net.head"}),
    "a callable": (lambda loss, scores: loss, {"predictions": lambda outputs, batch, forward: forward}),
}


@pytest.mark.parametrize(("returned", "settings"), FORMS_OF_PREDICTIONS.values(), ids=FORMS_OF_PREDICTIONS)
def test_forms_of_predictions(returned, settings):
    def step(module, batch):
        scores = module(*batch[:2])
        return returned(scores.sum(), scores)

    watch, scores, y = look(step, **settings)
    assert watch.history[0]["accuracy"] == accuracy(scores, y)


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        (lambda y: y[:, None], {}),
        (lambda y: y.tolist(), {"targets": "target"}),
        (lambda y: y.numpy(), {"targets": "target"}),
        (lambda y: np.asarray(y.tolist())[:, None], {"targets": "target"}),
    ],
    ids=["column", "list", "array", "column of an array"],
)
def test_forms_of_targets(form, settings):
    left, right, y = tensors()

    def step(module, batch):
        return {"logits": module(batch["left"], batch["right"])}

    batches = [{"left": left, "right": right, "target": form(y)}]
    watch, scores, _ = look(step, batches, **settings)
    assert watch.history[0]["accuracy"] == accuracy(scores, y)


def test_an_attribute_of_a_graphs_batch():
    from torch_geometric.data import Batch, Data

    left, right, y = tensors()
    graphs = [Data(x=torch.cat([left[i], right[i]])[None], kind=y[i]) for i in range(SAMPLES)]

    def step(module, batch):
        return {"logits": module(batch.x[:, :3], batch.x[:, 3:])}

    watch, scores, _ = look(step, [Batch.from_data_list(graphs)], targets="kind")
    assert watch.history[0]["accuracy"] == accuracy(scores, y)


def test_a_module_of_several_scores_is_named_with_its_item():
    class Two(Net):
        def forward(self, left, right):
            scores = super().forward(left, right)
            return {"aux": scores.flip(1), "main": scores}

    def step(module, batch):
        both = module.net(*batch[:2])
        module.log("l", sum(F.cross_entropy(one, batch[2]) for one in both.values()))

    with pytest.warns(XAttnWarning, match=r"predictions='net\[aux\]' or predictions='net\[main\]'"):
        look(step, net=Two)
    watch, scores, y = look(step, net=Two, predictions="net[main]")
    assert watch.history[0]["accuracy"] == accuracy(scores["main"], y)
    with pytest.raises(DiscoveryError, match=r"'net\[aux\]' or 'net\[main\]'"):
        look(step, net=Two, predictions="net")


STEPS_THAT_CHANGE_LABELS = {
    "from 1": (lambda y: y + 1, lambda label: label - 1),
    "another order": (lambda y: (y + 1) % CLASSES, lambda label: torch.tensor([2, 0, 1])[label]),
}


@pytest.mark.parametrize("returns", [True, False], ids=["predictions", "nothing"])
@pytest.mark.parametrize("name", STEPS_THAT_CHANGE_LABELS)
def test_targets_are_what_the_loss_compares_where_a_step_changes_the_labels_of_its_batch(name, returns):
    change, back = STEPS_THAT_CHANGE_LABELS[name]

    def step(module, batch):
        scores = module(batch["a"], batch["b"])
        module.log("val_loss", F.cross_entropy(scores, back(batch["label"])))
        return {"preds": scores.argmax(1)} if returns else None

    left, right, y = tensors()
    batches = [
        {"a": left[i : i + 10], "b": right[i : i + 10], "label": change(y[i : i + 10])} for i in range(0, SAMPLES, 10)
    ]
    watch, scores, _ = look(step, batches)
    assert watch.history[0]["accuracy"] == accuracy(scores, y)


def test_a_contrastive_loss_reads_no_predictions():
    class Contrasting(Net):
        def forward(self, left, right):
            first, second = self.left(left), self.right(right)
            self.contrast = F.cross_entropy(first @ second.T, torch.arange(len(left)))
            return super().forward(left, right)

    def step(module, batch):
        left, right, y = batch
        module.log("val_loss", F.cross_entropy(module(left, right), y) + module.net.contrast)

    watch, scores, y = look(step, net=Contrasting)
    assert watch.history[0]["accuracy"] == accuracy(scores, y)


def test_scores_of_samples_for_each_other_alone_are_no_predictions():
    def step(module, batch):
        left, right, y = batch
        scores = module.net.left(left) @ module.net.right(right).T
        module.log("val_loss", F.cross_entropy(scores, torch.arange(len(y))))

    with pytest.warns(XAttnWarning, match="No predictions found"):
        watch, _, _ = look(step)
    assert "accuracy" not in (watch.history[0] if watch.history else {})


def test_a_module_that_is_not_there_is_named_in_the_error():
    with pytest.raises(DiscoveryError, match=r"'model.classifier' is in neither .* and names no module that ran"):
        look(lambda module, batch: module(*batch[:2]).mean(), predictions="model.classifier")


def test_a_step_that_shows_nothing_is_told_to_return_predictions():
    def step(module, batch):
        module.log("mean", (module.net.left(batch[0]) @ module.net.right(batch[1]).T).mean())

    with pytest.warns(XAttnWarning, match=r"No attention ran.*if the step returns its predictions as {'logits'"):
        look(step)


def test_predictions_of_each_place_are_reduced_to_classes_by_a_callable():
    class Dense(Net):
        def forward(self, left, right):
            scores = super().forward(left, right)
            return torch.stack([scores, 2 * scores], 2)

    def step(module, batch):
        module.log("loss", F.cross_entropy(module(*batch[:2]), torch.zeros(len(batch[2]), 2, dtype=torch.long)))

    with pytest.warns(XAttnWarning, match="No predictions found"):
        assert not look(step, net=Dense)[0].fusion_summaries
    named = {"predictions": lambda outputs, batch, forward: forward.mean(2), "targets": lambda outputs, batch: batch[2]}
    watch, scores, y = look(step, net=Dense, **named)
    assert watch.history[0]["accuracy"] == accuracy(scores.mean(2), y)
    assert not watch.fusion_summaries["val"].contribution_problem
