"""What users do with Trainers, in any order: nothing changes, nothing stays behind, and everything is counted."""

import pickle
import tempfile
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from tests.capture.models import assert_same
from tests.fuzz.examples import examples
from tests.test_trainer import assert_same_records
from tests.toy import CLASSES, ToyModule, count_global_hooks, count_hooks, quiet_trainer, toy_data

# Advice of Lightning's about small data, and ours about labels and numbers that are not there.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

HOOKS = [
    f"on_{stage}_{moment}"
    for stage in ("train", "validation", "test", "predict")
    for moment in ("epoch_start", "batch_start", "batch_end", "epoch_end")
]
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
            "group_by": draw(st.sampled_from(["target", "prediction"])),
            "curves": draw(st.sampled_from(["main", "all"])),
        },
        "trainer": {
            "max_epochs": draw(st.integers(1, 3)),
            "limit_val_batches": draw(st.sampled_from([1.0, 0, 2])),
            "limit_train_batches": 2,
            "num_sanity_val_steps": draw(st.sampled_from([0, 2, -1])),
            "check_val_every_n_epoch": draw(st.integers(1, 2)),
            "fast_dev_run": draw(st.sampled_from([False, False, False, True])),
        },
        "steps": draw(st.lists(STEPS, min_size=1, max_size=4)),
        "crash": draw(st.one_of(st.none(), st.tuples(st.sampled_from(HOOKS), st.integers(0, 4), st.booleans()))),
        "seed": draw(st.integers(0, 10**6)),
    }


class Module(ToyModule):
    """Notes what it computes."""

    def __init__(self, case):
        super().__init__(need_weights=case["module"] != "no weights")
        self.labels, self.noted = case["labels"], []
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
        return super().forward(self.drop(audio), text)

    def _loss(self, batch):
        logits = self(*batch[:2])
        loss = nn.functional.cross_entropy(logits, batch[2]) if len(batch) > 2 else logits.square().sum()
        self.noted += [logits.detach().clone(), loss.detach().clone()]
        return loss

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
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
    """Counts by itself what a callback beside it must have recorded: ``(stage, epoch, dataloader, samples)``."""

    def __init__(self, settings):
        self.settings, self.now, self.ended = settings, None, []

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
            trial = bool(trainer.fast_dev_run)
            self.ended += [(stage, trainer.current_epoch, *found, trial) for found in sorted(self.now.items())]
        self.now = None

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = add
    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = end


class CrashError(Exception):
    pass


def make_crash(case):
    """A callback that raises in a hook, at its so-manyth call; the same run without ours crashes there too."""
    hook, count, first = case["crash"]
    calls = iter(range(10**6))

    class Crash(Callback):
        pass

    def crash(self, *args):
        if next(calls) == count:
            raise CrashError

    setattr(Crash, hook, crash)
    return Crash(), first


def live(case, folder, watched):
    """Run through a life; after each step what the callbacks say is checked. Gives what the module computed."""
    torch.manual_seed(case["seed"])
    module = Module(case)
    table = folder / "table" if case["table"] else None
    settings = [case["settings"] | {"table": table}, case["settings"] | {"max_samples": 50}][: case["callbacks"]]
    watches = [AttentionExplainabilityCallback(**one) for one in settings] if watched else []
    ledger = Ledger(case["settings"])
    if case["crash"]:
        crash, first = make_crash(case)
    for step in case["steps"]:
        callbacks = [*watches, ledger]
        if case["crash"]:
            callbacks = [crash, *callbacks] if first else [*callbacks, crash]
        trainer = quiet_trainer(callbacks=callbacks, default_root_dir=folder, **case["trainer"])
        loaders = [make_loader(case, samples, seed) for samples, seed in ((18, 1), (7, 2))][: case["loaders"]]
        with suppress(CrashError):
            if step in ("fit", "resume"):
                checkpoint = folder / "last.ckpt"
                resumes = {"ckpt_path": checkpoint} if step == "resume" and checkpoint.exists() else {}
                trainer.fit(module, make_loader(case | {"nan_batch": False}, 12, 0), loaders, **resumes)
                if not case["trainer"]["fast_dev_run"]:
                    trainer.save_checkpoint(checkpoint)
            elif step == "predict":
                trainer.predict(module, loaders)
            else:
                getattr(trainer, step)(module, loaders, verbose=False)
        assert count_hooks(module) == count_global_hooks() == torch._C._len_torch_function_stack() == 0
        for watch in watches:
            check(case, watch, ledger.ended, step)
    if watched and table is not None:
        check_table(case, table, ledger.ended)
    module.noted.append(torch.get_rng_state())
    return module.noted + list(module.state_dict().values())


def check(case, watch, ended, step):
    layers = 1 + (case["module"] == "two layers")
    logged = [one[:4] for one in ended for _ in range(layers) if one[0] != "predict"]
    records = [(one["stage"], one["epoch"], one["dataloader"], one["samples"]) for one in watch.history]
    if step != "resume":  # which goes on from the checkpoint's history
        assert records == logged
    latest = {(stage, number): samples for stage, _, number, samples, _ in ended}
    for (stage, number), samples in latest.items():
        scope = [stage] + [f"dataloader_{number}"] * (number > 0)
        found = [one for name, one in watch.summaries.items() if _scope(name) == scope]
        assert [one.samples for one in found] == [samples] * layers
    saved = pickle.loads(pickle.dumps(watch.state_dict()))
    again = AttentionExplainabilityCallback(**case["settings"])
    again.load_state_dict(saved)
    if case["settings"]["curves"] == "main":
        assert_same_records(again.history, watch.history)
    pickled = pickle.loads(pickle.dumps(watch))
    assert repr(pickled.history) == repr(watch.history)
    assert {name: repr(one) for name, one in pickled.summaries.items()} == {
        name: repr(one) for name, one in watch.summaries.items()
    }


def _scope(name):
    """Stage and dataloader of a summary's name, which may also name the callback and the layer."""
    return [part for part in name.split("/") if part in ("val", "test", "predict") or part.startswith("dataloader_")]


def check_table(case, folder, ended):
    layers = 1 + (case["module"] == "two layers")
    expected = [one[3] * layers for one in ended if not one[4]]
    assert not [path for path in folder.glob("*") if path.name.startswith(".")]
    rows = pd.read_parquet(folder) if any(expected) else pd.DataFrame()
    assert len(rows) == sum(expected)
    if len(rows):
        assert not rows.duplicated(["run", "stage", "epoch", "step", "dataloader", "layer", "sample_idx"]).any()


@examples(60)
@given(cases())
def test_any_life(case):
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        assert_same(live(case, Path(first), watched=True), live(case, Path(second), watched=False))
