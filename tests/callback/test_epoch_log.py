"""What an epoch's end logs of very many classes and layers, and what never ends a run."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.callback import pictures as pictures_module
from lightning_xattn.callback.pictures import Drawn
from lightning_xattn.core.errors import XAttnWarning
from lightning_xattn.evaluation.curves import mean_curves
from lightning_xattn.evaluation.results import REST
from lightning_xattn.evaluation.statistics import ALIGNMENT
from tests.messages import tells
from tests.toy import ToyModule, quiet_trainer, toy_data, toy_loader, validate

MANY = 14


class ManyClasses(ToyModule):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(24, MANY)


def many_classes(samples=120):
    audio, text, _ = toy_data(samples).tensors
    # Class i has 15 - i samples, 14 classes.
    target = torch.repeat_interleave(torch.arange(MANY), torch.arange(MANY + 1, 1, -1))[:samples]
    return DataLoader(TensorDataset(audio[: len(target)], text[: len(target)], target), 16)


def test_of_many_classes_the_ten_largest_and_the_rest_are_shown():
    torch.manual_seed(0)
    watch = AttentionExplainabilityCallback(curves="all")
    logged = validate(ManyClasses(), watch, many_classes())
    shown = {name.rpartition("/")[2] for name in logged if name.startswith("xattn_alignment/val/class_")}
    assert shown == {f"class_{i}" for i in range(10)}
    summary = watch.summaries["val"]
    assert summary.n_classes == MANY, "what is not shown is known"
    rest = [i for i in range(10, MANY) if summary.count(ALIGNMENT, i)]
    counts = [summary.count(ALIGNMENT, i) for i in rest]
    means = [summary.mean(ALIGNMENT, i) for i in rest]
    expected = sum(n * mean for n, mean in zip(counts, means, strict=True)) / sum(counts)
    assert logged[f"xattn_alignment/val/{REST}"] == pytest.approx(expected, abs=1e-6)


def test_of_more_than_ten_classes_none_has_a_curve_by_default():
    trainer = quiet_trainer(callbacks=[AttentionExplainabilityCallback()])
    trainer.validate(ManyClasses(), many_classes(), verbose=False)
    shown = {name for name in trainer.callback_metrics if "class_" in name or REST in name}
    assert shown == set()
    assert "xattn_alignment/val/all" in trainer.callback_metrics


def test_a_mean_of_all_layers_needs_all_layers():
    of_layers = [{"xattn_alignment/val/a/all": 0.25}, {"xattn_alignment/val/b/all": 0.75}]
    assert mean_curves(of_layers, ["val/a", "val/b"], "val", 2) == {"xattn_alignment/val/all": 0.5}
    assert math.isnan(mean_curves(of_layers, ["val/a", "val/b"], "val", 3)["xattn_alignment/val/all"])


def test_means_over_layers_are_of_alignment_entropy_and_focus_and_of_no_head():
    """0.25 and 0.75 of each; one curve is of a single layer."""
    names = ("alignment/{}/x", "entropy/{}/a_to_b/x", "focus/{}/a_to_b/max", "focus/{}/a_to_b/sink/head_0")
    names += ("entropy/{}/a_to_b/head_0", "outcome/{}/alignment_auroc", "health/{}/invalid_rows", "support/{}/both")
    scopes = {"test/a": 0.25, "test/b": 0.75}
    of_layers = [{f"xattn_{name.format(scope)}": value for name in names} for scope, value in scopes.items()]
    of_layers[1]["xattn_alignment/test/b/y"] = 1.0
    shown = [f"xattn_{name.format('test')}" for name in names[:3]]
    assert mean_curves(of_layers, [*scopes], "test", 2) == dict.fromkeys(shown, 0.5)
    assert [*mean_curves(of_layers, [*scopes], "test", 3)] == shown


@pytest.mark.parametrize("grouped", [True, False])
def test_classes_together_are_what_their_samples_are(grouped):
    torch.manual_seed(0)
    groups = (lambda outputs, batch: torch.arange(len(batch[2])) % 7) if grouped else None
    watch = AttentionExplainabilityCallback(groups=groups)
    validate(ManyClasses(), watch, many_classes())
    summary, fusion = watch.summaries["val"], watch.fusion_summaries["val"]
    few, of_fusion = summary.with_classes([3, 0]), fusion.merge_classes([3, 0])
    for i, old in enumerate((3, 0)):
        assert few.mean(ALIGNMENT, i) == summary.mean(ALIGNMENT, old)
        assert few.interval(ALIGNMENT, i) == pytest.approx(summary.interval(ALIGNMENT, old), nan_ok=True)
        torch.testing.assert_close(
            next(iter(few.maps.values()))[i], next(iter(summary.maps.values()))[old], equal_nan=True
        )
        assert of_fusion.chosen(i).equal(fusion.chosen(old))
    assert few.size(2) == summary.samples - summary.size(3) - summary.size(0)
    assert few.mean(ALIGNMENT) == pytest.approx(summary.mean(ALIGNMENT))
    assert of_fusion.chosen(2).sum() == few.size(2)


class ManyLayers(ToyModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(6))
        for layer in self.layers:
            for name in ("audio_to_text_attn", "text_to_audio_attn"):
                layer[name] = nn.MultiheadAttention(12, 2, batch_first=True)
                nn.init.normal_(layer[name].in_proj_weight, std=0.3)
        del self.audio_to_text_attn, self.text_to_audio_attn

    def forward(self, audio, text):
        a, t = self.audio(audio), self.text(text)
        for layer in self.layers:
            a = a + layer["audio_to_text_attn"](a, t, t)[0]
            t = t + layer["text_to_audio_attn"](t, a, a)[0]
        return self.head(torch.cat([a.mean(1), t.mean(1)], dim=1))


def test_of_many_layers_four_and_the_mean_are_shown(tmp_path):
    watch = AttentionExplainabilityCallback(table=tmp_path)
    torch.manual_seed(0)
    logged = validate(ManyLayers(), watch)
    shown = [f"layers.{i}" for i in (0, 2, 3, 5)]
    assert [record["layer"] for record in watch.history] == shown
    assert {name.split("/")[2] for name in logged if name.startswith("xattn_alignment/val/layers")} == set(shown)
    whole = [watch.summaries[f"val/layers.{i}"].mean(ALIGNMENT) for i in range(6)]
    assert logged["xattn_alignment/val/all"] == pytest.approx(sum(whole) / 6, abs=1e-6)
    import pandas as pd

    assert set(pd.read_parquet(tmp_path / "attention")["layer"]) == {f"layers.{i}" for i in range(6)}


@pytest.mark.parametrize("broken", ["create_explainability_report", "describe_with_captions", "card_figure"])
def test_what_is_wrong_in_our_own_extras_ends_no_run(broken, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(pictures_module, broken, fails)
    monkeypatch.setattr(Drawn, "other_figures", lambda self: ())  # drawing takes most of the time
    with pytest.warns(XAttnWarning, match=tells("oh")):
        logged = validate(ToyModule(), AttentionExplainabilityCallback(), logger=False, default_root_dir=tmp_path)
    assert "xattn_alignment/val/all" in logged


def test_models_with_one_direction_have_curves_of_correct_and_incorrect():
    class OneWay(ToyModule):
        def __init__(self):
            super().__init__()
            del self.text_to_audio_attn

        def forward(self, audio, text):
            audio, text = self.audio(audio), self.text(text)
            there, _ = self.audio_to_text_attn(audio, text, text)
            return self.head(torch.cat([there.mean(1), text.mean(1)], dim=1))

    with pytest.warns(XAttnWarning, match="without text_to_audio, so there is no alignment"):
        logged = validate(OneWay(), AttentionExplainabilityCallback(), toy_loader())
    assert all(math.isfinite(logged[f"xattn_entropy/val/{name}"]) for name in ("correct", "incorrect"))


@pytest.mark.parametrize("setting", ["fast_dev_run", "barebones"])
def test_trial_runs_without_a_logger_leave_nothing(setting, tmp_path):
    settings = {"accelerator": "cpu", "default_root_dir": tmp_path, "callbacks": [AttentionExplainabilityCallback()]}
    settings |= {"max_epochs": 1, "logger": False} if setting == "fast_dev_run" else {"max_epochs": 1}
    trainer = pl.Trainer(**settings, **{setting: True})
    trainer.fit(ToyModule(), toy_loader(), toy_loader())
    assert list(tmp_path.iterdir()) == []


def test_the_epochs_report_names_every_class(tmp_path, monkeypatch):
    for figures in ("main_figures", "other_figures"):  # drawing takes most of the time
        monkeypatch.setattr(Drawn, figures, lambda self: ())
    torch.manual_seed(0)
    watch = AttentionExplainabilityCallback()
    validate(ManyClasses(), watch, many_classes(), logger=False, default_root_dir=tmp_path)
    (report,) = (tmp_path / "xattn_output").rglob("*.html")
    assert all(f">class_{i}<" in report.read_text() for i in range(MANY))
    assert f">{REST}<" not in report.read_text()
