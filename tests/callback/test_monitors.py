"""Callbacks and schedulers that act on curves: each finds its curve in every epoch, and warnings name the risks."""

import math

import pytest
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.core.errors import XAttnWarning
from lightning_xattn.evaluation.curves import TOPICS
from tests.messages import tells
from tests.toy import AUDIO, CLASSES, TEXT, ToyModule, quiet_trainer, toy_data, toy_loader

SHARE, ALIGNMENT = "xattn_contribution/val/share/audio", "xattn_alignment/val/all"
FAITHFULNESS = "xattn_faithfulness/val/audio_to_text"


class Names(Callback):
    """Keeps what there is to monitor after each validation."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            logged = trainer.callback_metrics.items()
            self.seen.append({name: float(value) for name, value in logged if name.startswith("xattn_")})


class Sure(ToyModule):
    """Says one class of all samples until its second epoch, when it has learned that there are others."""

    def forward(self, audio, text):
        scores = super().forward(audio, text)
        return scores if self.current_epoch else 0 * scores + torch.arange(CLASSES)


def fit(module, *callbacks, loader=None, settings=(), **of_trainer):
    torch.manual_seed(0)
    names = Names()
    callback = AttentionExplainabilityCallback(**{"figures_every_n_epochs": 0} | dict(settings))
    of_trainer = {"max_epochs": 2, "callbacks": [callback, names, *callbacks], "num_sanity_val_steps": 0} | of_trainer
    of_trainer |= {"enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks)}
    trainer = quiet_trainer(**of_trainer)
    trainer.fit(module, toy_loader(), loader or toy_loader(seed=1))
    return trainer, callback, names.seen


def test_a_curve_that_is_undefined_in_an_epoch_is_nan_and_not_missing(tmp_path):
    trainer, callback, seen = fit(Sure(), ModelCheckpoint(tmp_path, monitor=SHARE, mode="max"))
    assert trainer.current_epoch == 2
    assert list(seen[0]) == list(seen[1])
    assert math.isnan(seen[0][SHARE])
    assert math.isfinite(seen[1][SHARE])
    assert ["contribution/share/audio" in record for record in callback.history] == [False, True]


def only(dataset, chosen):
    return DataLoader(TensorDataset(*dataset[chosen]), 5)


def test_the_names_are_the_same_whatever_an_epoch_has(tmp_path):
    """All samples of one class, all correct, and very few of them, after an epoch of all."""

    class Changing(ToyModule):
        def val_dataloader(self):
            data = toy_data()
            with torch.no_grad():
                correct = self(*data[:][:2]).argmax(1) == data[:][2]
            chosen = [torch.arange(23), data[:][2] == 1, correct, torch.arange(1)]
            return only(data, chosen[self.current_epoch])

        def training_step(self, batch, _):
            return 0 * self._loss(batch)

    names, callback = Names(), AttentionExplainabilityCallback(figures_every_n_epochs=0, curves="all")
    trainer = quiet_trainer(
        max_epochs=4, callbacks=[callback, names], reload_dataloaders_every_n_epochs=1, num_sanity_val_steps=0
    )
    trainer.fit(Changing(), toy_loader())
    assert [record["samples"] for record in callback.history][::3] == [23, 1]
    assert all(list(one) == list(names.seen[0]) for one in names.seen)
    whole = names.seen[0]
    assert math.isfinite(whole["xattn_alignment/val/incorrect"])
    assert math.isfinite(whole["xattn_alignment/val/class_0"])
    assert math.isnan(names.seen[1]["xattn_alignment/val/class_0"])
    assert math.isnan(names.seen[2]["xattn_alignment/val/incorrect"])
    assert math.isnan(names.seen[2]["xattn_alignment/val/gap"])
    assert {name.partition("/")[0].removeprefix("xattn_") for name in whole} <= set(TOPICS)


class Silent(ToyModule):
    """Runs nothing in the validations of its first epoch."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return super().validation_step(batch, batch_idx) if self.current_epoch else None


def test_what_is_monitored_is_nan_where_nothing_is_known_yet(tmp_path):
    with pytest.warns(XAttnWarning) as caught:
        trainer, callback, seen = fit(Silent(), ModelCheckpoint(tmp_path, monitor=ALIGNMENT, mode="max"))
    told = [str(one.message) for one in caught if one.category is XAttnWarning]
    assert any(tell_of(one, "ModelCheckpoint", ALIGNMENT, "logged as NaN") for one in told)
    assert trainer.current_epoch == 2
    assert (math.isnan(seen[0][ALIGNMENT]), math.isfinite(seen[1][ALIGNMENT])) == (True, True)
    assert trainer.checkpoint_callback.best_model_score == pytest.approx(callback.history[0]["alignment/all"], abs=1e-6)


def tell_of(message, *facts):
    return all(fact in message for fact in facts)


def test_an_unknown_curve_is_nan_and_a_warning_lists_the_known_ones(tmp_path):
    wrong = "xattn_contribution/val/share/video"
    with pytest.warns(XAttnWarning, match=tells("ModelCheckpoint", wrong, "NaN", SHARE)):
        trainer, _, seen = fit(ToyModule(), ModelCheckpoint(tmp_path, monitor=wrong, mode="max"))
    assert trainer.current_epoch == 2
    assert all(math.isnan(one[wrong]) for one in seen)


def test_a_monitored_curve_is_logged_though_it_is_none_of_the_main_ones(tmp_path):
    name = "xattn_alignment/val/gap"
    _, callback, seen = fit(ToyModule(), ModelCheckpoint(tmp_path, monitor=name, mode="max"))
    assert [one[name] for one in seen] == pytest.approx([one["alignment/gap"] for one in callback.history], abs=1e-6)


def test_a_fit_that_goes_on_between_two_recorded_epochs_has_the_monitored_name(tmp_path):
    first, _, _ = fit(ToyModule(), settings={"every_n_epochs": 2}, max_epochs=1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    names, callback = Names(), AttentionExplainabilityCallback(figures_every_n_epochs=0, every_n_epochs=2)
    best = ModelCheckpoint(tmp_path / "best", monitor=ALIGNMENT, mode="max")
    trainer = quiet_trainer(
        max_epochs=3, callbacks=[callback, names, best], enable_checkpointing=True, num_sanity_val_steps=0
    )
    with pytest.warns(XAttnWarning, match="every_n_epochs=1"):
        trainer.fit(ToyModule(), toy_loader(), toy_loader(), ckpt_path=tmp_path / "first.ckpt")
    assert [math.isnan(one[ALIGNMENT]) for one in names.seen] == [True, False]


def test_early_stopping_at_nan_has_a_warning_with_the_line_to_paste():
    stop = EarlyStopping(SHARE, mode="max", patience=7, min_delta=0.5)
    with pytest.warns(XAttnWarning, match=tells("EarlyStopping", SHARE, "NaN")) as caught:
        trainer, _, _ = fit(Sure(), stop)
    assert trainer.current_epoch == 1, "it ended the fit"
    (told,) = [str(one.message) for one in caught if one.category is XAttnWarning]
    pasted = eval(told.rpartition("So that it goes on: ")[2].removesuffix("."))
    assert (pasted.monitor, pasted.mode, pasted.patience, pasted.min_delta) == (SHARE, "max", 7, 0.5)
    trainer, _, _ = fit(Sure(), pasted)  # without a warning
    assert trainer.current_epoch == 2


class Plateau(ToyModule):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": ALIGNMENT}}


def test_a_monitor_of_a_curve_that_some_epochs_lack_has_a_warning(tmp_path):
    best = ModelCheckpoint(monitor=ALIGNMENT, mode="max")
    stop = EarlyStopping(ALIGNMENT, mode="max", patience=9, check_finite=False)
    with pytest.warns(XAttnWarning) as caught:
        fit(Plateau(), best, stop, settings={"every_n_epochs": 3}, default_root_dir=tmp_path / "third")
    told = [str(one.message) for one in caught if one.category is XAttnWarning]
    line = "AttentionExplainabilityCallback(every_n_epochs=1)"
    assert len(told) == 3
    for who, counts in (("ModelCheckpoint", False), ("EarlyStopping", True), ("ReduceLROnPlateau", True)):
        (one,) = [one for one in told if one.startswith(who)]
        assert tell_of(one, ALIGNMENT, "one of 3 validated epochs", line)
        assert ("no improvement" in one) == counts
    best = ModelCheckpoint(monitor=ALIGNMENT, mode="max")
    fit(Plateau(), best, stop, settings={"every_n_epochs": 1}, default_root_dir=tmp_path / "each")  # without a warning


@pytest.mark.parametrize("every", [0, 10, 1])
def test_a_monitor_of_faithfulness_that_is_seldom_tested_has_a_warning(every, tmp_path, recwarn):
    best = ModelCheckpoint(tmp_path, monitor=FAITHFULNESS, mode="max")
    _, _, seen = fit(ToyModule(), best, settings={"faithfulness_every_n_epochs": every})
    told = [str(one.message) for one in recwarn if one.category is XAttnWarning]
    line = "AttentionExplainabilityCallback(faithfulness_every_n_epochs=1)"
    assert [tell_of(one, "ModelCheckpoint", FAITHFULNESS, line) for one in told[:1]] == [True] * (every != 1)
    assert all(math.isnan(one[FAITHFULNESS]) for one in seen), "it takes 128 samples"


def test_monitors_of_others_are_none_of_ours(tmp_path):
    class Others(ToyModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            loss = super().validation_step(batch, batch_idx)
            self.log_dict({"val_loss": loss, "xattn_mine/val/all": loss})

    stops = [EarlyStopping(name, patience=9) for name in ("val_loss", "xattn_mine/val/all")]
    _, _, seen = fit(Others(), *stops, settings={"every_n_epochs": 3})  # without a warning
    assert all(math.isfinite(one["xattn_mine/val/all"]) for one in seen)


def averaging():
    callbacks = pytest.importorskip("pytorch_lightning.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("Lightning 2.6 brings it.")
    return callbacks.EMAWeightAveraging(decay=0.5)


class Swaps(Callback):
    """Averages by hand: other weights in a validation's batches."""

    def on_validation_epoch_start(self, trainer, pl_module):
        self.kept = [one.clone() for one in pl_module.parameters()]
        for one in pl_module.parameters():
            one.data.add_(0.05)

    def on_validation_epoch_end(self, trainer, pl_module):
        for one, kept in zip(pl_module.parameters(), self.kept, strict=True):
            one.data.copy_(kept)


@pytest.mark.parametrize(("make", "comes_first"), [(averaging, True), (averaging, False), (Swaps, True)])
def test_averages_of_weights_come_after(make, comes_first, infos):
    other, callback = make(), AttentionExplainabilityCallback(figures_every_n_epochs=0)
    callbacks = [other, callback] if comes_first else [callback, other]
    name, settings = type(other).__name__, {"max_epochs": 1, "num_sanity_val_steps": 0}
    quiet_trainer(callbacks=callbacks, **settings).fit(ToyModule(), toy_loader(), toy_loader(seed=1))
    (record,) = callback.history
    order = f"callbacks=[AttentionExplainabilityCallback(...), {name}(...)]"
    assert ("contribution/share/audio" in record) != comes_first
    assert tell_of(record["contribution_problem"], "other weights", order) == comes_first
    assert (record["contribution_problem"] in infos.text) == comes_first or not comes_first


def test_a_regression_has_its_names_in_every_epoch():
    """Also where nothing could be permuted."""

    class Regression(ToyModule):
        def forward(self, audio, text):
            return super().forward(audio, text)[:, :1]

        def _loss(self, batch):
            return nn.functional.mse_loss(self(*batch[:2])[:, 0], batch[2])

        def val_dataloader(self):
            audio, text, target = toy_data(23 if self.current_epoch else 1).tensors
            return DataLoader(TensorDataset(audio, text, target / 3 + 0.1), 5)

    names = Names()
    callback = AttentionExplainabilityCallback(figures_every_n_epochs=0)
    audio, text, target = toy_data().tensors
    trainer = quiet_trainer(
        max_epochs=2, callbacks=[callback, names], reload_dataloaders_every_n_epochs=1, num_sanity_val_steps=0
    )
    trainer.fit(Regression(), DataLoader(TensorDataset(audio, text, target / 3), 5))
    assert list(names.seen[0]) == list(names.seen[1])
    assert [math.isfinite(one["xattn_contribution/val/size/audio"]) for one in names.seen] == [False, True]
    assert tuple(one.shape[1] for one in (audio, text)) == (AUDIO, TEXT)
