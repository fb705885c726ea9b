"""The callback in the ways that people use a Trainer: monitors, history, resuming, several of everything."""

import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

from lightning_xattn import AttentionExplainabilityCallback, JointSequence
from lightning_xattn.callback.processes import find_processes
from lightning_xattn.callback.schedule import Schedule
from lightning_xattn.evaluation.curves import main_names
from lightning_xattn.evaluation.statistics import ALIGNMENT
from tests.toy import ToyModule, count_hooks, quiet_trainer, toy_data, toy_loader


def fit(callbacks, module=None, ckpt_path=None, loaders=None, **settings):
    trainer = quiet_trainer(callbacks=callbacks, **settings)
    trainer.fit(module or ToyModule(), toy_loader(), loaders or toy_loader(seed=1), ckpt_path=ckpt_path)
    return trainer


def test_history_is_a_table_with_a_record_for_each_epoch():
    watch = AttentionExplainabilityCallback(class_names=["a", "b", "c", "d"])
    trainer = fit([watch], max_epochs=3)
    trainer.test(trainer.model, toy_loader(seed=2), verbose=False)
    frame = pd.DataFrame(watch.history)
    assert frame["stage"].tolist() == ["val", "val", "val", "test"]
    assert frame["epoch"].tolist() == [0, 1, 2, 3]
    assert frame["samples"].tolist() == [23] * 4
    assert {"alignment/all", "alignment/a", "entropy/audio_to_text/head_2", "health/undefined_share"} <= set(frame)
    assert frame["alignment/all"].between(-1, 1).all()
    last = trainer.callback_metrics["xattn_alignment/test/all"].item()
    assert frame["alignment/all"].iloc[-1] == pytest.approx(last, abs=1e-6)


def assert_same_records(saved, records):
    """What is logged is there, and what says where it is from; numbers in single precision."""
    for one, whole in zip(saved, records, strict=True):
        kept = main_names(re.sub("_(low|high)$", "", name) for name in whole)
        logged = {name for name in whole if "/" not in name or re.sub("_(low|high)$", "", name) in kept}
        assert set(one) == logged
        for name, value in one.items():
            assert value == (
                pytest.approx(whole[name], rel=1e-6, nan_ok=True) if isinstance(value, float) else whole[name]
            ), name


def test_history_survives_saving_resuming_and_a_second_fit(tmp_path):
    first = AttentionExplainabilityCallback()
    trainer = fit([first], max_epochs=2, enable_checkpointing=False)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    loaded = torch.load(path, weights_only=True)
    (state,) = (value for key, value in loaded["callbacks"].items() if "AttentionExplainability" in key)
    assert [*state] == ["history", "fit_begins"]

    resumed = AttentionExplainabilityCallback()
    fit([resumed], ckpt_path=path, max_epochs=3)
    assert [record["epoch"] for record in resumed.history] == [0, 1, 2]
    assert_same_records(resumed.history[:2], first.history)

    fit([first], max_epochs=1)
    assert [record["epoch"] for record in first.history] == [0, 1, 0]

    longer = fit([AttentionExplainabilityCallback()], max_epochs=3)
    (watch,) = (callback for callback in longer.callbacks if isinstance(callback, AttentionExplainabilityCallback))
    longer.test(longer.model, toy_loader(), ckpt_path=path, verbose=False)
    assert [record["stage"] for record in watch.history] == ["val", "val", "val", "test"]


def test_a_fit_goes_on_with_its_history_where_its_schedule_or_table_has_changed(tmp_path):
    """But not where something else was measured."""
    first, second = AttentionExplainabilityCallback(), AttentionExplainabilityCallback(classes_by="prediction")
    fit([first, second], max_epochs=2, enable_checkpointing=False).save_checkpoint(tmp_path / "last.ckpt")
    other = AttentionExplainabilityCallback(table=tmp_path / "table", figures_every_n_epochs=0, every_n_batches=2)
    new = AttentionExplainabilityCallback(class_names=[*"wxyz"], classes_by="prediction")
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        fit([other, new], ckpt_path=tmp_path / "last.ckpt", max_epochs=3)
    assert_same_records(other.history[:2], first.history)
    assert [record["epoch"] for record in other.history] == [0, 1, 2]
    assert [record["epoch"] for record in new.history] == [2]


def test_a_state_without_a_history_is_an_empty_one():
    watch = AttentionExplainabilityCallback()
    watch.load_state_dict({})
    assert watch.history == []


def of_key(outputs, batch):
    return batch[2]


def of_column(outputs, batch):
    return batch[2] + 0


def test_callbacks_that_measure_something_else_stand_beside_each_other():
    joint = [JointSequence("joint", {"audio": (0, 5), "text": (5, end)}) for end in (12, None)]
    settings = [{}, {"targets": of_key}, {"targets": of_column}, {"max_samples": 500}, {"groups": "patient"}]
    settings += [{"attention": one} for one in joint] + [{"attention": {"a_to_b": of_key}}]
    callbacks = [AttentionExplainabilityCallback(**one) for one in settings]
    quiet_trainer(callbacks=callbacks)
    assert len({one.state_key for one in callbacks}) == len(settings)
    assert "0x" not in "".join(one.state_key for one in callbacks), "another one in another run"


def test_callbacks_that_measure_the_same_are_refused_by_lightning(tmp_path):
    callbacks = [AttentionExplainabilityCallback(), AttentionExplainabilityCallback(table=tmp_path)]
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        quiet_trainer(callbacks=callbacks)


def test_two_callbacks_log_under_names_of_their_own_and_save_both_histories(tmp_path):
    class Mine(AttentionExplainabilityCallback):
        """A subclass logs as the second one does."""

    by_target, by_prediction = (
        kind(classes_by=group, class_names=["a", "b", "c", "d"], curves="all")
        for kind, group in ((AttentionExplainabilityCallback, "target"), (Mine, "prediction"))
    )
    trainer = fit([by_target, by_prediction])
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["xattn_alignment/val/all"] == pytest.approx(logged["xattn_alignment/val/callback_1/all"])
    for watch, scope, prefix in ((by_target, "val", ""), (by_prediction, "val/callback_1", "predicted_")):
        summary = watch.summaries[scope]
        for i, name in enumerate("abcd"):
            if summary.count(ALIGNMENT, i):
                expected = summary.mean(ALIGNMENT, i)
                assert logged[f"xattn_alignment/{scope}/{prefix}{name}"] == pytest.approx(expected, abs=1e-6)
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    assert {by_target.state_key, by_prediction.state_key} <= set(saved)


def test_several_validations_in_an_epoch_and_fewer_batches():
    watch = AttentionExplainabilityCallback()
    fit([watch], val_check_interval=2, limit_val_batches=3)
    assert [(record["epoch"], record["samples"]) for record in watch.history] == [(0, 15), (0, 15)]
    assert watch.history[0]["step"] < watch.history[1]["step"]


class Unsized(IterableDataset):
    """Samples of which nobody knows how many there are."""

    def __iter__(self):
        yield from zip(*toy_data(23).tensors, strict=True)


class StopAt(Callback):
    """Asks for the end in the midst of an epoch, as a timer does."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= trainer.global_step == self.batches


class SeesTests(Callback):
    """The recorded validations of a fit, and whether their attention is tested."""

    def __init__(self, every_n_epochs, faithfulness_every_n_epochs):
        self.schedule = Schedule(every_n_epochs, 1, faithfulness_every_n_epochs, 1)
        self.validations = []

    def on_validation_epoch_end(self, trainer, pl_module):
        if self.schedule.records(trainer) and not trainer.sanity_checking:
            batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
            self.validations.append((trainer.current_epoch, batches, self.schedule.tests_attention(trainer)))


BY_BATCHES = {"check_val_every_n_epoch": None}
FITS = {
    # The training has five batches. By setting: in which epochs, after how many batches.
    "four epochs": ({"max_epochs": 4}, {}, [(0, 5), (3, 20)]),
    "eleven epochs": ({"max_epochs": 11}, {"faithfulness_every_n_epochs": 4}, [(0, 5), (4, 25), (8, 45), (10, 55)]),
    "never": ({"max_epochs": 3}, {"faithfulness_every_n_epochs": 0}, []),
    "both": ({"max_epochs": 9, "check_val_every_n_epoch": 2}, {"every_n_epochs": 3}, [(1, 10), (7, 40)]),
    # Each of the last epoch.
    "several in an epoch": ({"max_epochs": 3, "val_check_interval": 2}, {}, [(0, 2), (0, 4), (2, 12), (2, 14)]),
    "by batches": ({"max_epochs": 4, "val_check_interval": 3} | BY_BATCHES, {}, [(0, 3), (3, 18)]),
    "by batches, every other": (
        {"max_epochs": 4, "val_check_interval": 3} | BY_BATCHES,
        {"every_n_epochs": 2},
        [(0, 3), (2, 12), (2, 15)],
    ),
    "stopped": ({"max_epochs": 9, "callbacks": [StopAt(8)]}, {}, [(0, 5), (1, 8)]),
    "stopped early": ({"max_epochs": 9, "min_epochs": 3, "callbacks": [StopAt(8)]}, {}, [(0, 5), (2, 15)]),
    "fast_dev_run": ({"fast_dev_run": True}, {}, [(0, 1)]),
}
OF_UNKNOWN_LENGTH = {
    "epochs": ({"max_epochs": 3}, {}, [(0, 5), (2, 15)]),
    "several": ({"max_epochs": 3, "val_check_interval": 2}, {}, [(0, 2), (0, 4), (2, 12), (2, 14)]),
}


@pytest.mark.parametrize(
    ("unsized", "settings", "schedule", "expected"),
    [(False, *of) for of in FITS.values()] + [(True, *of) for of in OF_UNKNOWN_LENGTH.values()],
    ids=[*FITS, *(f"unknown length, {name}" for name in OF_UNKNOWN_LENGTH)],
)
def test_attention_is_tested_in_every_nth_epoch_and_in_the_last_of_a_fit(unsized, settings, schedule, expected):
    watch = SeesTests(**{"every_n_epochs": 1, "faithfulness_every_n_epochs": 10} | schedule)
    loader = DataLoader(Unsized(), 5) if unsized else toy_loader()
    settings = {"limit_val_batches": 1} | settings
    trainer = quiet_trainer(**settings | {"callbacks": [*settings.get("callbacks", []), watch]})
    trainer.fit(ToyModule(), loader, toy_loader(seed=1))
    assert [(epoch, batches) for epoch, batches, tested in watch.validations if tested] == expected
    is_last_tested = watch.validations[-1][2]
    assert is_last_tested == bool(expected)


def test_attention_is_tested_at_the_last_epoch_of_a_fit_that_is_resumed(tmp_path):
    first, second = SeesTests(1, 10), SeesTests(1, 10)
    trainer = quiet_trainer(callbacks=[first], max_epochs=2)
    trainer.fit(ToyModule(), toy_loader(), toy_loader(seed=1))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer = quiet_trainer(callbacks=[second], max_epochs=5)
    trainer.fit(ToyModule(), toy_loader(), toy_loader(seed=1), ckpt_path=tmp_path / "last.ckpt")
    assert [(epoch, tested) for epoch, _, tested in second.validations] == [(2, False), (3, False), (4, True)]


def test_dataloaders_with_batches_of_two_kinds():
    class Either(ToyModule):
        def _loss(self, batch):
            return super()._loss(tuple(batch.values()) if isinstance(batch, dict) else batch)

    parts = zip(*toy_data(8, seed=1).tensors, strict=True)
    rows = [{"audio": audio, "text": text, "label": label} for audio, text, label in parts]
    watch = AttentionExplainabilityCallback()
    fit([watch], Either(), loaders=[toy_loader(), DataLoader(rows, batch_size=3)])
    assert [(record["dataloader"], record["samples"]) for record in watch.history] == [(0, 23), (1, 8)]
    for scope, samples in (("val", 23), ("val/dataloader_1", 8)):
        summary = watch.summaries[scope]
        assert sum(summary.count(ALIGNMENT, outcome=outcome) for outcome in (0, 1)) == samples


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"num_sanity_val_steps": 0}, {"limit_val_batches": 0}])
def test_rehearsals(settings, tmp_path):
    watch = AttentionExplainabilityCallback(table=tmp_path / "table")
    fit([watch], **settings)
    assert len(watch.history) == (0 if "limit_val_batches" in settings else 1)
    assert (tmp_path / "table").exists() == ("num_sanity_val_steps" in settings)


class CountSynchronisations(TorchDispatchMode):
    """Counts what would make a GPU wait: probe a value, a shape that depends on values, and copies to the CPU."""

    WAITING = ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "nonzero")

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen, self.on = [], False
        for name in self.WAITING:  # on CPU tensors these need not dispatch anything
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name, method):
        def call(tensor, *args, **kwargs):
            if self.on:
                self.seen.append(name)
            return method(tensor, *args, **kwargs)

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.on = True
        return super().__enter__()

    def __exit__(self, *error):
        self.on = False
        return super().__exit__(*error)


class ByHand(ToyModule):
    """Computes its attention with the fused kernel or with a softmax, or returns it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.look, self.hear = Attend(kind), Attend(kind)

    def forward(self, audio, text):
        audio, text = self.audio(audio), self.text(text)
        there, back = self.look(audio, text), self.hear(text, audio)
        return self.head(torch.cat([fused.mean(1) for fused, _ in (there, back)], dim=1))


class Attend(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, queries, keys):
        q, k = (x.unflatten(-1, (3, 4)).transpose(1, 2) for x in (queries, keys))
        if self.kind == "fused":
            fused = F.scaled_dot_product_attention(q, k, k, torch.ones(1, 1, 1, k.shape[2]).bool())
            return fused.transpose(1, 2).flatten(2), None
        scores = q @ k.transpose(-1, -2)
        weights = scores.softmax(-1) if self.kind == "softmax" else scores.exp() / scores.exp().sum(-1, keepdim=True)
        return (weights @ k).transpose(1, 2).flatten(2), weights


class Joint(ToyModule):
    def __init__(self):
        super().__init__()
        self.joint = torch.nn.TransformerEncoderLayer(12, 2, 8, batch_first=True)

    def forward(self, audio, text):
        fused = self.joint(torch.cat([self.audio(audio), self.text(text)], dim=1))
        return self.head(torch.cat([fused[:, :5].mean(1), fused[:, 5:].mean(1)], dim=1))


BY_HAND = {"audio_to_text": "look", "text_to_audio": "hear"}
KINDS = {
    "weights asked for": (lambda: ToyModule(True), None),
    "beside the fused kernel": (lambda: ToyModule(False), None),
    "scaled_dot_product_attention": (lambda: ByHand("fused"), BY_HAND),
    "softmax": (lambda: ByHand("softmax"), BY_HAND),
    "returned": (lambda: ByHand("returned"), BY_HAND),
    "joint": (Joint, JointSequence("joint", spans={"audio": (0, 5), "text": (5, 12)})),
}


@pytest.mark.parametrize(
    ("kind", "with_table"), [*((kind, False) for kind in KINDS), ("weights asked for", True), ("joint", True)]
)
def test_nothing_waits_for_the_device_while_batches_run(kind, with_table, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_xattn.core.devices.reads_at_once", lambda tensor: False)  # as on a GPU
    make, attention = KINDS[kind]
    watch = AttentionExplainabilityCallback(attention, table=tmp_path if with_table else None)
    trainer = quiet_trainer(callbacks=[watch])
    count = CountSynchronisations(monkeypatch)

    class Measure(Callback):
        """Runs each batch once more under the counter, but the first, on which the settings are checked."""

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx:
                with count:
                    watch.on_validation_batch_start(trainer, pl_module, batch, batch_idx)
                    outputs = {"logits": pl_module(*batch[:2])}
                    watch.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    trainer.callbacks.append(Measure())
    trainer.validate(make(), toy_loader(), verbose=False)
    assert watch.summaries["val"].samples == 23 + 18
    assert count.seen == []

    with count:  # the counter counts
        torch.ones(1).item()
        torch.ones(1).cpu()
    assert {"item", "cpu"} <= set(count.seen)


def test_a_prediction_is_recorded_without_labels_and_logs_nothing(tmp_path):
    class Predicting(ToyModule):
        def predict_step(self, batch, batch_idx):
            return self(*batch[:2])

    audio, text, _ = toy_data(23).tensors
    loader = DataLoader(torch.utils.data.TensorDataset(audio, text), 5)
    watch = AttentionExplainabilityCallback(table=tmp_path / "table")
    trainer = quiet_trainer(callbacks=[watch], default_root_dir=tmp_path, logger=False)
    module = Predicting()
    predictions = torch.cat(trainer.predict(module, loader)).argmax(1)
    table = pd.read_parquet(tmp_path / "table/attention")
    assert table["prediction"].tolist() == predictions.tolist()
    assert table["stage"].unique().tolist() == ["predict"]
    assert table["target"].isna().all()
    assert table["alignment"].notna().all()
    summary = watch.summaries["predict"]
    assert summary.mean(ALIGNMENT) == pytest.approx(table["alignment"].mean(), abs=1e-6)
    assert watch.history == []
    assert [path.name for path in tmp_path.iterdir()] == ["table"]
    assert count_hooks(module) == 0
    assert torch.equal(torch.cat(trainer.predict(module, loader)).argmax(1), predictions)


class OwnStrategy(DDPStrategy):
    """As users derive theirs."""


@pytest.mark.parametrize(
    ("kind", "holds_whole_model"),
    [(DDPStrategy, True), (OwnStrategy, True), (DeepSpeedStrategy, False), (FSDPStrategy, False)],
)
def test_whether_each_process_has_the_whole_model(kind, holds_whole_model, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    strategy = kind.__new__(kind)
    monkeypatch.setattr(kind, "distributed_sampler_kwargs", {"num_replicas": 2, "rank": 1})
    processes = find_processes(SimpleNamespace(world_size=2, strategy=strategy))
    assert (processes.rank, processes.count, processes.hold_whole_model) == (1, 2, holds_whole_model)
