"""Models that are no textbook fusion: nothing is told that is not so, and no training ends of it."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.core.errors import XAttnWarning
from tests.attribution.models import (
    NAMED,
    Concatenation,
    Sum,
    TwoStreams,
    said_data,
    summary_of,
    trained,
    watch_of,
)
from tests.toy import quiet_trainer

DATA, _ = said_data(160)


@pytest.mark.parametrize("targets", [True, False])
def test_a_model_that_diverges_to_nan_still_ends_its_validation(targets):
    class Diverged(TwoStreams):
        def validation_step(self, batch, batch_idx):
            return super().validation_step(batch, batch_idx) if targets else {"logits": self(*batch[:2])}

    torch.manual_seed(0)
    module = Diverged()
    with torch.no_grad():
        for one in (module.left, module.right):
            one.weight.fill_(math.nan)
    with pytest.warns(XAttnWarning):
        summary = summary_of(module, DATA, fusion="fusion", modalities={"left": 0, "right": 1})
    assert (summary.samples, summary.nonfinite) == (0, 160)
    assert summary.probe_problems["left"] == "what enters the fusion is not finite in any sample"


@pytest.mark.parametrize("first", [True, False])
def test_a_named_argument_that_is_none_in_some_batches_leaves_these_out(first):
    class Optional(Concatenation):
        def forward(self, left, right, left_mask=None):
            return super().forward(left if left_mask is None else left * left_mask[..., None], right)

    class Sometimes(TwoStreams):
        def validation_step(self, batch, batch_idx):
            left, right, target, *_ = batch
            mask = torch.ones(left.shape[:2], dtype=torch.bool) if (batch_idx == 0) != first else None
            return {"logits": self.head(self.fusion(self.left(left), self.right(right), mask)), "targets": target}

    settings = {"fusion": "fusion", "modalities": {"left": (0, 2), "right": 1}}
    torch.manual_seed(0)
    with pytest.warns(XAttnWarning, match="The modalities are left out of a step"):
        summary = summary_of(Sometimes(Optional()), DATA, **settings)
    assert summary.samples == (144 if first else 16)


def test_contributions_to_a_value_have_a_size_and_no_share():
    class Value(TwoStreams):
        def validation_step(self, batch, batch_idx):
            return {"value": self(*batch[:2])}

    torch.manual_seed(0)
    module = Value(Sum(), outputs=1)
    with torch.no_grad():
        module.head.weight[:, 12:] *= 0.05
    callback = watch_of(module, DATA, **NAMED)
    summary = callback.fusion_summaries["val"]
    size = {name: float(summary.numbers[f"phi/{name}"].abs().nanmean()) for name in ("left", "right")}
    assert size["left"] > 3 * size["right"]
    record = callback.history[0]
    assert {name: record[f"contribution/size/{name}"] for name in size} == pytest.approx(size)
    told = [name for name in record if name.startswith("contribution/") and "size" not in name]
    assert told == ["contribution/interaction"]
    assert math.isnan(summary.share("left").mean)


def test_shares_of_an_unclear_total_are_not_computed():
    summary = summary_of(trained(Sum(), DATA, epochs=5), DATA, **NAMED)
    summary.numbers["phi/left"] = torch.randn(160).double() * 0.3
    summary.numbers["phi/right"] = -summary.numbers["phi/left"] + 1e-4
    summary.numbers["phi/right"][0] -= 1
    assert math.isnan(summary.share("left").mean)


def test_too_few_groups_are_the_reason_where_they_are():
    def patients(outputs, batch):
        return batch[3] % 4

    summary = summary_of(trained(Sum(), DATA), DATA, groups=patients, **NAMED)
    assert summary.probe_problems["left"] == "it needs 5 groups, this run had 4"


def test_each_two_of_three_modalities_have_an_interaction():
    class Three(nn.Module):
        def forward(self, a, b, c):
            return torch.stack([a[:, 0], 3 * b[:, 0] * c[:, 0]], dim=1)

    class Streams(TwoStreams):
        def __init__(self):
            super().__init__(Three())

        def forward(self, x):
            return self.fusion(*x.unbind(1))

        def validation_step(self, batch, batch_idx):
            return {"logits": self(batch[0]), "targets": batch[1]}

    x = torch.randn(96, 3, 2, generator=torch.Generator().manual_seed(0))
    target = (3 * x[:, 1, 0] * x[:, 2, 0] > x[:, 0, 0]).long()
    callback = AttentionExplainabilityCallback(
        fusion="fusion", modalities={"a": 0, "b": 1, "c": 2}, figures_every_n_epochs=0
    )
    quiet_trainer(callbacks=[callback]).validate(Streams(), DataLoader(TensorDataset(x, target), 32), verbose=False)
    numbers = callback.fusion_summaries["val"].numbers
    assert numbers["interaction/a_b"].abs().max() < 1e-5
    assert numbers["interaction/a_c"].abs().max() < 1e-5
    assert numbers["interaction/b_c"].abs().mean() > 0.5
    assert {"contribution/interaction/a_b", "contribution/interaction/b_c"} <= set(callback.history[0])


def test_a_class_that_the_model_rules_out_does_not_end_contributions():
    class RulesOut(TwoStreams):
        def forward(self, left, right):
            logits = super().forward(left, right)
            return torch.cat([logits, torch.full_like(logits[:, :1], -math.inf)], dim=1)

    torch.manual_seed(0)
    module, plain = RulesOut(Concatenation()), TwoStreams(Concatenation())
    plain.load_state_dict(module.state_dict())
    ours, theirs = (summary_of(one, DATA, **NAMED) for one in (module, plain))
    assert not ours.contribution_problem
    for name in ("phi/left", "interaction", "additive_right"):
        torch.testing.assert_close(ours.numbers[name], theirs.numbers[name], atol=1e-5, rtol=1e-5, equal_nan=True)


def test_confidence_stands_beside_conflict_where_a_step_gives_class_ids_alone():
    class Ids(TwoStreams):
        def validation_step(self, batch, batch_idx):
            found = super().validation_step(batch, batch_idx)
            return {"preds": found["logits"].argmax(1), "targets": found["targets"]}

    data, _ = said_data(160, noise=1.5)
    torch.manual_seed(0)
    plain, ids = trained(Sum(), data, epochs=15), Ids(Sum())
    ids.load_state_dict(plain.state_dict())
    names = ["a", "b", "c", "d"]
    records = [watch_of(one, data, class_names=names, **NAMED).history[0] for one in (plain, ids)]
    assert records[0]["outcome/confidence_auroc"] == pytest.approx(records[1]["outcome/confidence_auroc"])
