"""Predictions that a callable computes, and targets where several heads say the same."""

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_xattn import AttentionExplainabilityCallback
from tests.toy import quiet_trainer

SAMPLES = 48


class Stranger(LightningModule):
    """Two inputs, two linear layers and a head, in a model of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(8, 2)

    def forward(self, image, omics):
        return self.head(torch.cat([self.left(image), self.right(omics)], 1))

    def validation_step(self, batch, batch_idx):
        scores = self(batch["image"], batch["omics"])
        self.log("loss", F.binary_cross_entropy_with_logits(scores, batch["labels"].float()))


def make_batches():
    generator = torch.Generator().manual_seed(0)
    image, omics = (torch.randn(SAMPLES, width, generator=generator) for width in (3, 5))
    labels = torch.randint(0, 2, (SAMPLES, 2), generator=generator)
    return [{"image": image[i], "omics": omics[i], "labels": labels[i]} for i in range(SAMPLES)]


def observe(module, **settings):
    callback = AttentionExplainabilityCallback(contribution_samples=SAMPLES, **settings)
    quiet_trainer(callbacks=[callback]).validate(module, DataLoader(make_batches(), 16), verbose=False)
    return callback


def exchange(predict, module):
    """Mean absolute change of the first class's probability where one input is another sample's, all partners."""
    batch = torch.utils.data.default_collate(make_batches())
    rows, columns = (~torch.eye(SAMPLES, dtype=torch.bool)).nonzero().T
    with torch.no_grad():

        def value(image, omics):
            return predict(module(batch["image"][image], batch["omics"][omics]))

        every = torch.arange(SAMPLES)
        own = value(every, every)
        chosen = own.argmax(1)

        def mean(values):
            return values.gather(1, chosen[rows][:, None])[:, 0].double().view(SAMPLES, -1).mean(1)

        whole, none = own.gather(1, chosen[:, None])[:, 0].double(), mean(value(columns, columns))
        return (mean(value(rows, columns)) - none + whole - mean(value(columns, rows))) / 2


@pytest.mark.parametrize(
    "select",
    [
        lambda outputs, batch, forward: forward[:, 0],
        lambda outputs, batch, forward: torch.stack([-forward[:, 0], forward[:, 0]], 1),
    ],
)
def test_a_callable_may_select_the_predictions_from_what_forward_returns(select):
    module = Stranger()
    fusion = observe(module, predictions=select, targets=lambda _, batch: batch["labels"][:, 0]).fusion_summaries["val"]
    assert fusion.modalities == ("left", "right")
    assert not fusion.contribution_problem

    def predict(scores):
        first = select(None, None, scores)
        return first.softmax(1) if first.dim() == 2 else torch.stack([1 - first.sigmoid(), first.sigmoid()], 1)

    expected = exchange(predict, module)[fusion.sample_numbers]
    # Four partners each, and the two-way fit: close to all partners, not the same.
    assert torch.corrcoef(torch.stack([fusion.numbers["phi/left"], expected]))[0, 1] > 0.98


@pytest.mark.parametrize("as_list", [False, True])
def test_a_callable_that_gives_arrays_or_lists_ends_no_run(as_list, infos):
    """Where it computes something, no torch function shows what that comes from."""
    callback = observe(
        Stranger(),
        predictions=lambda _, batch, forward: forward[:, 0].tolist() if as_list else forward.detach().numpy(),
        targets=lambda _, batch: batch["labels"][:, 0],
    )
    if as_list:
        assert "Probes and contributions are not computed: fewer than two inputs reach the predictions" in infos.text
    else:
        assert not callback.fusion_summaries["val"].contribution_problem


def test_a_callable_that_gives_nothing_in_replays_is_why_there_are_no_contributions():
    ended = []

    def select(outputs, batch, forward):
        return None if ended else 2 * forward

    callback = AttentionExplainabilityCallback(
        predictions=select, targets=lambda _, batch: batch["labels"][:, 0], contribution_samples=SAMPLES
    )

    class Last(Callback):
        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            ended.extend([1] if batch_idx == 2 else [])

    trainer = quiet_trainer(callbacks=[callback, Last()])
    trainer.validate(Stranger(), DataLoader(make_batches(), 16), verbose=False)
    assert "it gives no predictions when it is run again" in callback.fusion_summaries["val"].contribution_problem


@pytest.mark.parametrize("is_trained", [False, True])
def test_targets_are_those_of_the_head_whose_predictions_are_returned(is_trained):
    """Heads that are not trained yet predict the same class everywhere, so class ids do not show whose they are."""

    class TwoHeads(Stranger):
        def __init__(self):
            super().__init__()
            self.site = nn.Linear(8, 2)
            with torch.no_grad():
                for head, bias in ((self.head, 9.0), (self.site, -9.0 if is_trained else 9.0)):
                    head.weight.zero_()
                    head.bias.copy_(torch.tensor([bias, 0.0]))

        def validation_step(self, batch, batch_idx):
            features = torch.cat([self.left(batch["image"]), self.right(batch["omics"])], 1)
            main, site = self.head(features), self.site(features)
            y = batch["labels"]
            loss = F.cross_entropy(site, y[:, 1]) + F.cross_entropy(main, y[:, 0])
            return {"loss": loss, "preds": main.argmax(1), "targets": y[:, 0]}

    batch = torch.utils.data.default_collate(make_batches())
    assert observe(TwoHeads(), class_names=["a", "b"]).history[-1]["accuracy"] == pytest.approx(
        float((batch["labels"][:, 0] == 0).float().mean())
    )
