"""What users do with Trainers, in any order: nothing changes, nothing stays behind, and everything is counted."""

import pickle
import tempfile
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from tests.callback.test_trainer import assert_same_records
from tests.capture.models import assert_same
from tests.fuzz.examples import fuzz
from tests.toy import CLASSES, ToyModule, count_global_hooks, count_hooks, quiet_trainer, toy_data

# Advice of Lightning's about small data, and ours about labels and numbers that are not there.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

STAGES = ("train", "validation", "test", "predict")
MOMENTS = ("epoch_start", "batch_start", "batch_end", "epoch_end")
HOOKS = [f"on_{stage}_{moment}" for stage in STAGES for moment in MOMENTS]
STEPS = st.sampled_from(["fit", "fit", "validate", "test", "predict", "resume"])


@st.composite
def cases(draw):
    return {
        "module": draw(st.sampled_from(["weights", "no weights", "two layers", "dropout"])),
        "labels": draw(st.sampled_from(["classes", "classes", "none", "soft"])),
        "nan_batch": draw(st.booleans()),
        "loaders": draw(st.integers(1, 2)),
        "callbacks": draw(st.integers(1, 2)),
        "table": draw(st.booleans()),
        "settings": {
            "every_n_epochs": draw(st.integers(1, 2)),
            "every_n_batches": draw(st.integers(1, 3)),
            "figures_every_n_epochs": draw(st.integers(0, 2)),
            "faithfulness_every_n_epochs": draw(st.integers(0, 2)),
            "contribution_samples": draw(st.sampled_from([0, 8])),
            "classes_by": draw(st.sampled_from(["target", "prediction"])),
            "curves": draw(st.sampled_from(["main", "all"])),
        },
        "trainer": {
            "max_epochs": draw(st.integers(1, 3)),
            "limit_val_batches": draw(st.sampled_from([1.0, 0, 2])),
            "limit_train_batches": 2,
            "val_check_interval": draw(st.sampled_from([1.0, 1])),
            "num_sanity_val_steps": draw(st.sampled_from([0, 2, -1])),
            "check_val_every_n_epoch": draw(st.integers(1, 2)),
            "fast_dev_run": draw(st.sampled_from([False, False, False, True])),
        },
        "steps": draw(st.lists(STEPS, min_size=1, max_size=4)),
        "crash": draw(st.sampled_from([None, "step", *HOOKS])),
        "crashes_at": draw(st.integers(0, 4)),
        "crashes_first": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


class Module(ToyModule):
    """Notes what it computes."""

    def __init__(self, case):
        super().__init__(need_weights=case["module"] != "no weights")
        self.crash, self.noted = Crash(case), []
        self.drop = nn.Dropout(0.3 if case["module"] == "dropout" else 0)
        self.second = nn.Module()
        if case["module"] == "two layers":
            for name in ("audio_to_text_attn", "text_to_audio_attn"):
                self.second.add_module(name, nn.MultiheadAttention(12, 2, batch_first=True))

    def forward(self, audio, text):
        if len(list(self.second.children())):
            a, t = self.audio(audio), self.text(text)
            self.second.audio_to_text_attn(a, t, t)
            self.second.text_to_audio_attn(t, a, a)
        logits = super().forward(self.drop(audio), text)
        self.crash.check()
        return logits

    def _loss(self, batch):
        logits = self.predict_step(batch)
        loss = nn.functional.cross_entropy(logits, batch[2]) if len(batch) > 2 else logits.square().sum()
        self.noted.append(loss.detach().clone())
        return loss

    def predict_step(self, batch, *_):
        self.crash.count("step")
        logits = self(*batch[:2])
        self.noted.append(logits.detach().clone())
        return logits


def make_loader(case, samples, seed):
    audio, text, target = toy_data(samples, seed).tensors
    if case["nan_batch"]:
        audio[5:8] = torch.nan
    if case["labels"] == "soft":
        shares = torch.rand(samples, CLASSES, generator=torch.Generator().manual_seed(seed))
        target = shares / shares.sum(1, keepdim=True)
    return DataLoader(TensorDataset(audio, text, *[] if case["labels"] == "none" else [target]), batch_size=4)


class Ledger(Callback):
    """Counts by itself what a callback beside it must have recorded: ``(stage, epoch, dataloader, samples)``.

    ``history`` is that of a checkpoint where a fit goes on from one, ``rows`` has all that a table must have, and
    ``latest`` the samples by stage and dataloader.
    """

    def __init__(self, settings):
        self.settings, self.now, self.history, self.rows, self.latest = settings, None, [], [], {}

    def state_dict(self):
        return {"history": list(self.history)}

    def load_state_dict(self, state_dict):
        self.history = list(state_dict["history"])

    def start(self, trainer, pl_module):
        validated = (trainer.current_epoch + 1) // trainer.check_val_every_n_epoch - 1
        fits = trainer.state.fn == "fit"
        self.now = {} if not fits or validated % self.settings["every_n_epochs"] == 0 else None

    def add(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if self.now is not None and batch_idx % self.settings["every_n_batches"] == 0:
            self.now[dataloader_idx] = self.now.get(dataloader_idx, 0) + len(batch[0])

    def end(self, trainer, pl_module):
        if self.now is not None and not trainer.sanity_checking:
            stage = "test" if trainer.testing else "predict" if trainer.predicting else "val"
            self.latest |= {(stage, number): samples for number, samples in self.now.items()}
            self.rows += [] if trainer.fast_dev_run else self.now.values()
            if stage != "predict":
                self.history += [(stage, trainer.current_epoch, *found) for found in sorted(self.now.items())]
        self.now = None

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = add
    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = end


class CrashError(Exception):
    pass


class Crash(Callback):
    """Raises once: in a hook, or in the middle of a step. The same run without our callback crashes there, too."""

    def __init__(self, case):
        self.place, self.left, self.is_due = case["crash"], case["crashes_at"], False
        if self.place in HOOKS:
            setattr(self, self.place, self.raise_in_hook)

    def raise_in_hook(self, *_):
        self.count(self.place)
        self.check()

    def count(self, place):
        if place == self.place:
            self.is_due, self.left = self.left == 0, self.left - 1

    def check(self):
        if self.is_due:
            self.is_due = False
            raise CrashError


def live(case, folder, watched):
    """Run through a life; after each step what the callbacks say is checked. Gives what the module computed."""
    torch.manual_seed(case["seed"])
    module, ledger, checkpoint = Module(case), Ledger(case["settings"]), folder / "last.ckpt"
    table = folder / "table" if case["table"] else None
    settings = [case["settings"] | {"table": table}, case["settings"] | {"max_samples": 50}][: case["callbacks"]]
    watches = [AttentionExplainabilityCallback(**one) for one in settings] if watched else []
    callbacks = [*watches, ledger]
    callbacks = [module.crash, *callbacks] if case["crashes_first"] else [*callbacks, module.crash]
    loaders = [make_loader(case, samples, seed) for samples, seed in ((18, 1), (7, 2))][: case["loaders"]]
    for step in case["steps"]:
        trainer = quiet_trainer(callbacks=callbacks, default_root_dir=folder, **case["trainer"])
        with suppress(CrashError):
            if step in ("fit", "resume"):
                begin = checkpoint if step == "resume" and checkpoint.exists() else None
                trainer.fit(module, make_loader(case | {"nan_batch": False}, 12, 0), loaders, ckpt_path=begin)
                trainer.save_checkpoint(checkpoint)
            elif step == "predict":
                trainer.predict(module, loaders)
            else:
                getattr(trainer, step)(module, loaders, verbose=False)
        assert count_hooks(module) == count_global_hooks() == torch._C._len_torch_function_stack() == 0
        for watch in watches:
            check_callback(case, watch, ledger)
        if watched and table is not None:
            check_table(case, table, ledger)
    return [*module.noted, torch.get_rng_state(), *module.state_dict().values()]


def layers_of(case):
    return 1 + (case["module"] == "two layers")


def check_callback(case, watch, ledger):
    records = [(one["stage"], one["epoch"], one["dataloader"], one["samples"]) for one in watch.history]
    assert records == [one for one in ledger.history for _ in range(layers_of(case))]
    for (stage, number), samples in ledger.latest.items():
        scope = [stage] + [f"dataloader_{number}"] * (number > 0)
        found = [one.samples for name, one in watch.summaries.items() if scope == stage_and_dataloader(name)]
        assert found == [samples] * layers_of(case)
    again = AttentionExplainabilityCallback(**case["settings"])
    again.load_state_dict(pickle.loads(pickle.dumps(watch.state_dict())))
    if case["settings"]["curves"] == "main":
        assert_same_records(again.history, watch.history)
    pickled = pickle.loads(pickle.dumps(watch))
    assert repr((pickled.history, pickled.summaries)) == repr((watch.history, watch.summaries))


def stage_and_dataloader(scope):
    """Of a summary's scope, which may also name the callback and the layer."""
    return [part for part in scope.split("/") if part in ("val", "test", "predict") or part.startswith("dataloader_")]


def check_table(case, folder, ledger):
    assert not [path for path in folder.glob("*/*") if path.name.startswith(".")]
    rows = pd.read_parquet(folder / "attention") if ledger.rows else []
    assert len(rows) == sum(ledger.rows) * layers_of(case)
    if ledger.rows:
        assert not rows.duplicated(["run", "stage", "epoch", "step", "dataloader", "layer", "sample_idx"]).any()


@fuzz(cases(), some=None, many=25)
def test_any_life(case):
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        assert_same(live(case, Path(first), watched=True), live(case, Path(second), watched=False))
