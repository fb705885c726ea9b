"""A first batch that shows nothing, or not all: the next one is waited for, and what never comes is said."""

import pandas as pd
import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture
from lightning_xattn.core.errors import DataError, DiscoveryError, XAttnWarning
from tests.messages import tells
from tests.toy import ToyModule, count_hooks, quiet_trainer, run_toy, toy_data, toy_loader


class Skipping(ToyModule):
    """Returns before it runs anything for the batches of ``skipped``, by dataloader."""

    def __init__(self, skipped=((0,),)):
        super().__init__()
        self.skipped = skipped

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if batch_idx in self.skipped[dataloader_idx % len(self.skipped)]:
            return None
        return super().validation_step(batch, batch_idx)

    test_step = predict_step = validation_step


ALL = tuple(range(5))

pytestmark = pytest.mark.filterwarnings("ignore:predict returned None")


def run(module, how, callback=None, loaders=None, **settings):
    callback = callback or AttentionExplainabilityCallback(figures_every_n_epochs=0)
    trainer = quiet_trainer(callbacks=[callback], **settings)
    loaders = loaders or toy_loader()
    if how == "fit":
        trainer.fit(module, toy_loader(), loaders)
    elif how == "predict":
        trainer.predict(module, loaders, return_predictions=False)
    else:
        getattr(trainer, how)(module, loaders, verbose=False)
    assert count_hooks(module) == 0
    return callback


@pytest.mark.parametrize(
    ("how", "scope", "named"),
    [("fit", "val", True), ("fit", "val", False), ("test", "test", True), ("predict", "predict", False)],
)
def test_the_first_step_in_which_something_ran_is_looked_at(how, scope, named):
    """Also in the sanity check, of which all batches may run nothing."""
    attention = {"audio_to_text": "audio_to_text_attn", "text_to_audio": "text_to_audio_attn"} if named else None
    callback = AttentionExplainabilityCallback(attention, figures_every_n_epochs=0)
    run(Skipping(((0, 1),)), how, callback)
    assert callback.summaries[scope].samples == 13
    assert callback.fusion_summaries[scope].samples == 13
    assert callback.summaries[scope].n_classes == 4


@pytest.mark.parametrize("every", [1, 2])
def test_some_of_several_dataloaders(every):
    """The second one is first in the first; of the third not every recorded batch runs."""
    callback = AttentionExplainabilityCallback(figures_every_n_epochs=0, every_n_batches=every)
    skipped = ALL, (0,), (2,)
    run(Skipping(skipped), "validate", callback, [toy_loader(seed=seed) for seed in range(3)])
    samples = {scope: summary.samples for scope, summary in callback.summaries.items()}
    assert samples == {"val/dataloader_1": 18 if every == 1 else 8, "val/dataloader_2": 18 if every == 1 else 8}


def test_all_dataloaders_have_the_classes_of_the_first_that_ran():
    class Later(Skipping):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return None if not (dataloader_idx or self.current_epoch) else super().validation_step(batch, batch_idx)

    callback = AttentionExplainabilityCallback(figures_every_n_epochs=0)
    run(Later(), "fit", callback, [toy_loader(), toy_loader(seed=1)], max_epochs=2, num_sanity_val_steps=0)
    assert [(one["dataloader"], one["samples"]) for one in callback.history] == [(1, 18), (0, 18), (1, 18)]
    assert {summary.n_classes for summary in callback.summaries.values()} == {4}


@pytest.mark.parametrize("how", ["validate", "predict"])
def test_where_nothing_ever_runs_it_is_said_at_the_end(how):
    with pytest.warns(XAttnWarning, match=tells("No recorded step", "every_n_batches=1")) as caught:
        callback = run(Skipping((ALL,)), how)
    assert len([one for one in caught if one.category is XAttnWarning]) == 1
    assert callback.history == []


def test_a_fusion_without_attention_is_waited_for_too():
    class Join(nn.Module):
        def forward(self, audio, text):
            return torch.cat([audio.mean(1), text.mean(1)], 1)

    class Joined(Skipping):
        def __init__(self):
            super().__init__()
            self.join = Join()

        def forward(self, audio, text):
            return self.head(self.join(self.audio(audio), self.text(text)))

        def _loss(self, batch):
            return {"logits": self(*batch[:2]), "targets": batch[2]}

    named = {"fusion": "join", "modalities": {"audio": 0, "text": 1}}
    callback = run(Joined(), "validate", AttentionExplainabilityCallback(**named, figures_every_n_epochs=0))
    assert callback.fusion_summaries["val"].samples == 18


class Partly(ToyModule):
    """Runs an encoder in its first step, and no attention."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return super().validation_step(batch, batch_idx) if batch_idx else self.audio(batch[0]).mean()


def test_a_step_that_ran_something_else_does_not_meet_a_setting():
    """Attention that is named and does not run is an error at once; what was found by itself is refused."""
    paths = {"audio_to_text": "audio_to_text_attn", "text_to_audio": "text_to_audio_attn"}
    with pytest.raises(DiscoveryError, match="None of audio_to_text_attn, text_to_audio_attn ran"):
        run(Partly(), "validate", AttentionExplainabilityCallback(paths))
    with pytest.warns(XAttnWarning, match="Nothing is recorded in this run. None of audio_to_text_attn, .* ran"):
        run(Partly(), "validate")


class LossFirst(ToyModule):
    """The first step returns the loss alone, the others what they have."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        scores = self(*batch[:2])
        loss = nn.functional.cross_entropy(scores, batch[2])
        return {"loss": loss, "logits": scores, "targets": batch[2]} if batch_idx else loss


def test_a_first_step_that_returns_the_loss_alone_has_its_outcomes():
    callback, module = AttentionExplainabilityCallback(figures_every_n_epochs=0), LossFirst()
    run(module, "validate", callback)
    audio, text, target = toy_data().tensors
    with torch.no_grad():
        by_hand = float((module.eval()(audio, text).argmax(1) == target).float().mean())
    assert callback.history[0]["accuracy"] == pytest.approx(by_hand)


def nothing_for(numbers, count=None):
    """How to run a model that skips the batches of these numbers."""
    seen = []

    def predict(model, batch):
        seen.append(batch)
        return None if len(seen) - 1 in numbers else run_toy(model, batch)

    return predict


def explain(numbers, table=None, loader=None, **settings):
    torch.manual_seed(0)
    explainer = ExplainabilityCapture(ToyModule().eval(), predict=nothing_for(numbers), **settings)
    return explainer.explain_loader(loader or toy_loader(), table=table, progress=False)


@pytest.mark.parametrize("numbers", [(0,), (0, 1, 3), (2,)])
def test_the_explainer_waits_too(numbers, tmp_path):
    result = explain(numbers, tmp_path / "table")
    samples = sum(len(batch[2]) for number, batch in enumerate(toy_loader()) if number not in numbers)
    assert result.headline.samples == samples
    assert len(pd.read_parquet(tmp_path / "table/attention")) == samples


def test_an_explainer_for_which_nothing_ever_runs_says_so():
    with pytest.raises(DataError, match="Nothing ran for any of the loader's 5 batches"):
        explain(range(10))
    explainer = ExplainabilityCapture(ToyModule(), predict=lambda model, batch: None)
    with pytest.raises(DiscoveryError, match="Nothing ran for this batch"):
        explainer.explain_batch(toy_data(5)[:])


def test_hooks_of_a_step_that_ran_nothing_are_gone_when_the_next_begins():
    class Count(Callback):
        def __init__(self):
            self.counts = []

        def on_validation_batch_end(self, trainer, pl_module, *args):
            self.counts.append(count_hooks(pl_module))

    count = Count()
    callback = AttentionExplainabilityCallback(figures_every_n_epochs=0)
    loader = DataLoader(TensorDataset(*toy_data().tensors), 5)
    quiet_trainer(callbacks=[callback, count]).validate(Skipping(), loader, verbose=False)
    assert count.counts == [0] * 5


class Begins(ToyModule):
    """The first step runs an encoder, and returns before it comes to the attention."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            self.audio(batch[0])
            return None
        return super().validation_step(batch, batch_idx)


class Never(Begins):
    """No step comes to the attention."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.audio(batch[0])


def test_a_step_that_begins_and_returns_nothing_is_not_the_one_to_judge_by():
    callback = AttentionExplainabilityCallback(figures_every_n_epochs=0)
    run(Begins(), "validate", callback)
    assert callback.history[0]["samples"] == 18
    callback = AttentionExplainabilityCallback(figures_every_n_epochs=0)
    with pytest.warns(XAttnWarning, match="Nothing is recorded in this run. None of audio_to_text_attn") as warned:
        run(Never(), "validate", callback)
    assert sum(one.category is XAttnWarning for one in warned) == 1
    assert callback.history == []
