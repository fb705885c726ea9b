"""What the terminal shows at the end of a run: at most eight lines, with what the summaries say."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.callback.terminal import MAX_LINES, finish_progress_bar, list_lines
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.report.headline import Headline, describe_headline
from tests.toy import NAMES, ToyModule, labelled_loader, quiet_trainer, toy_loader


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("lightning_xattn.callback.pictures.Drawn.main_figures", lambda self: ())
    monkeypatch.setattr("lightning_xattn.callback.pictures.Drawn.other_figures", lambda self: ())
    monkeypatch.setattr("lightning_xattn.callback.pictures.create_explainability_report", lambda *args, **form: "page")


def summaries_of(infos):
    return [said.splitlines() for said in infos.messages if said.startswith(("val", "test"))]


@pytest.mark.parametrize("method", ["fit", "validate", "test"])
def test_each_run_ends_with_its_headline_once(method, infos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    watch = AttentionExplainabilityCallback(class_names=NAMES)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = quiet_trainer(max_epochs=2, logger=logger, callbacks=[watch])
    if method == "fit":
        trainer.fit(ToyModule(), toy_loader(), labelled_loader())
    else:
        getattr(trainer, method)(ToyModule(), labelled_loader(), verbose=False)
    stage = "test" if method == "test" else "val"
    said = describe_headline(DatasetResult({}, watch.fusion_summaries[stage], NAMES, "target"))
    (lines,) = summaries_of(infos)
    assert len(lines) <= MAX_LINES
    assert lines[0] == f"{stage}: {said.sentence}"
    assert lines[1:4] == [f"  {name}: {text}" for name, text in said.numbers]
    assert lines[-2:] == ["  tensorboard --logdir run", f"  Report: run/xattn_about/{stage}/report.html"]


@pytest.mark.parametrize("setting", ["fast_dev_run", "barebones"])
def test_a_trial_run_says_nothing_of_its_numbers(setting, infos, tmp_path):
    settings = {"accelerator": "cpu", "default_root_dir": tmp_path, "callbacks": [AttentionExplainabilityCallback()]}
    settings |= {"logger": False} if setting == "fast_dev_run" else {"max_epochs": 1}
    trainer = pl.Trainer(**settings, **{setting: True})
    trainer.fit(ToyModule(), toy_loader(), toy_loader())
    assert summaries_of(infos) == []


def test_several_dataloaders_have_a_sentence_each(infos, tmp_path):
    trainer = quiet_trainer(logger=CSVLogger(tmp_path), callbacks=[AttentionExplainabilityCallback()])
    trainer.validate(ToyModule(), [toy_loader(seed=1), toy_loader(seed=2)], verbose=False)
    (lines,) = summaries_of(infos)
    assert [line.partition(":")[0] for line in lines[:2]] == ["val", "val/dataloader_1"]
    assert lines[-2].startswith("  Figures: ")


def test_what_does_not_fit_is_counted():
    one = Headline("It is so.", [(name, "1 %") for name in "abc"], [f"warning {i}" for i in range(9)])
    lines = list_lines({"val": one}, ["tensorboard --logdir logs", "Report: page.html", "a third place"])
    assert len(lines) == MAX_LINES
    assert lines[:5] == ["val: It is so.", "  a: 1 %", "  b: 1 %", "  c: 1 %", "  Warning: warning 0"]
    assert lines[5:] == ["  8 more: see the report.", "  tensorboard --logdir logs", "  Report: page.html"]


def test_warnings_of_several_dataloaders_are_shown_with_their_scope():
    scopes = {name: Headline(f"Of {name}.", [("Support", "both 28 %")], ["Do this."]) for name in ("val_0", "val_1")}
    lines = list_lines(scopes, ["tensorboard --logdir logs"])
    assert lines[2:4] == ["  Warning (val_0): Do this.", "  Warning (val_1): Do this."]


def test_the_reports_path_is_shown_beside_the_first_of_several_loggers():
    lines = list_lines(
        {"val": Headline("It.", (), ())}, ["tensorboard --logdir logs", "https://wandb", "Report: a.html"]
    )
    assert lines[1:] == ["  tensorboard --logdir logs", "  Report: a.html"]


def test_a_subclass_of_rich_s_bar_that_fails_or_counts_its_teardowns_is_left_alone():
    class RichProgressBar:
        def teardown(self, trainer, module, stage):
            raise RuntimeError("no console")

    class Own(RichProgressBar):
        def teardown(self, trainer, module, stage):
            raise AssertionError("the user's own teardown is Lightning's to call")

    finish_progress_bar(SimpleNamespace(progress_bar_callback=Own(), lightning_module=None))
