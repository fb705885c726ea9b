"""What CONTRIBUTING.md says is true: each of its paragraphs is done here, and what it names is there."""

import inspect
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning.loggers import Logger
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback, AttentionRecorder
from lightning_xattn.callback import callback as callback_module
from lightning_xattn.callback import epoch_log as epoch_log_module
from lightning_xattn.capture.masks import RecordedWeights
from lightning_xattn.capture.readers import READERS, Event
from lightning_xattn.evaluation.accumulators import LayerAccumulator
from lightning_xattn.evaluation.curves import epoch_curves
from lightning_xattn.evaluation.evaluation import Evaluation
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.evaluation.statistics import STATISTICS, Column, Statistic, sample_statistics
from lightning_xattn.loggers import WRITERS, LoggerWriter
from lightning_xattn.report.facts import collect_facts
from tests.toy import ToyModule, quiet_trainer, toy_loader, validate

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_files_that_it_names_are_there():
    named = re.findall(r"`((?:lightning_xattn|tests)/[\w/.]*)`", TEXT)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_way_of_a_batch(monkeypatch):
    """Each step's file does what is said of it, in this order."""
    steps = [
        (callback_module.AttentionExplainabilityCallback, "on_validation_batch_end"),
        (Evaluation, "read"),
        (Evaluation, "add"),
        (inspect.getmodule(Evaluation), "sample_statistics"),
        (LayerAccumulator, "add"),
        (LayerSummary, "__init__"),
        (epoch_log_module, "epoch_curves"),
    ]
    seen = []

    def watched(run, name):
        def noted(*args, **kwargs):
            seen.append(name)
            return run(*args, **kwargs)

        return noted

    for owner, name in steps:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name), name))
    metrics = validate(ToyModule(), AttentionExplainabilityCallback(), toy_loader(5))
    assert seen == [name for _, name in steps]
    assert "xattn_alignment/val/all" in metrics
    files = [inspect.getsourcefile(one) for one in (callback_module, Evaluation, sample_statistics)]
    files += [inspect.getsourcefile(one) for one in (LayerAccumulator, LayerSummary, epoch_curves)]
    assert re.findall(r"^\d\. `(.*?)`", TEXT, re.MULTILINE) == [str(Path(file).relative_to(ROOT)) for file in files]


def test_a_statistic_is_one_entry(monkeypatch, tmp_path):
    def second_weight(rows):
        return rows.weights.topk(2).values[..., 1].mean(-1)

    levels, curve = ("direction", "head"), "focus/{direction}/second"
    entry = Statistic(second_weight, levels, "0: one key", "the second weight", (0.0, 0.5), curve)
    monkeypatch.setitem(STATISTICS, "second", entry)
    module = ToyModule()
    watch = AttentionExplainabilityCallback(table=tmp_path, curves="all")
    metrics = validate(module, watch, toy_loader(5))
    audio, text, _ = next(iter(toy_loader(5)))
    with torch.no_grad(), AttentionRecorder(module) as recorder:
        module(audio, text)
    weights = recorder.attention[0].forward.weights
    expected = weights.sort(-1, descending=True).values[..., 1].mean(-1)
    assert metrics["xattn_focus/val/audio_to_text/second"] == pytest.approx(float(expected.mean()))
    table = pd.read_parquet(tmp_path / "attention")
    np.testing.assert_allclose(table["audio_to_text_second"], expected.mean(1), rtol=1e-5)
    np.testing.assert_allclose(np.stack(table["audio_to_text_second_heads"]), expected, rtol=1e-5)
    summary = watch.summaries["val"]
    assert summary.mean(Column.parse("audio_to_text/second/head_2")) == pytest.approx(float(expected[:, 2].mean()))
    result = DatasetResult({"layer": summary}, None, (), "target", {}, None)
    (facts,) = collect_facts(result)["layers"]
    assert facts["groups"][0]["numbers"]["audio_to_text/second"]["mean"] == pytest.approx(float(expected.mean()))


class ByDistance(nn.Module):
    """Attention as the softmin of distances, which no reader reads."""

    def forward(self, queries, keys):
        return F.softmin(torch.cdist(queries, keys)[:, None], dim=-1)


class ByDistances(ToyModule):
    def __init__(self):
        super().__init__()
        self.audio_to_text, self.text_to_audio = ByDistance(), ByDistance()
        del self.audio_to_text_attn, self.text_to_audio_attn

    def forward(self, audio, text):
        audio, text = self.audio(audio), self.text(text)
        there, back = self.audio_to_text(audio, text), self.text_to_audio(text, audio)
        return self.head(torch.cat([(there[:, 0] @ text).mean(1), (back[:, 0] @ audio).mean(1)], dim=1))


def test_a_way_of_capturing_is_one_reader(monkeypatch):
    def read_softmin(function, args, kwargs, mode):
        (distances,) = args
        event = Event("softmin", tuple(distances.shape), distances.device)
        mode.begin(event, distances)
        weights = function(*args, **kwargs)
        mode.record(event, lambda: RecordedWeights(weights.detach().clone()), weights)
        return weights

    module, attention = ByDistances().eval(), {name: name for name in ("audio_to_text", "text_to_audio")}
    audio, text, _ = next(iter(toy_loader(5)))
    before = module(audio, text)
    monkeypatch.setitem(READERS, F.softmin, read_softmin)
    with AttentionRecorder(module, attention) as recorder:
        assert torch.equal(module(audio, text), before)
    expected = module.audio_to_text(module.audio(audio), module.text(text))
    (pair,) = recorder.attention
    assert torch.equal(pair.forward.weights, expected)
    assert str(pair.backward.direction) == "text_to_audio"
    metrics = validate(module, AttentionExplainabilityCallback(attention))
    assert "xattn_alignment/val/all" in metrics


class Pictures(Logger):
    """A logger that keeps the pictures that it gets."""

    name, version, experiment = "pictures", 0, None

    def __init__(self):
        super().__init__()
        self.pictures = {}

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        pass


class PicturesSink(LoggerWriter):
    def log_images(self, images, step):
        self.logger.pictures |= {name: (picture, step) for name, picture in images.items()}

    def log_text(self, name, text, step):
        pass

    def log_page(self, name, html, step):
        pass


def test_a_figure_is_one_tag_and_a_sink_is_one_class(monkeypatch):
    monkeypatch.setitem(WRITERS, "Pictures", PicturesSink)

    of_epoch = epoch_log_module.epoch_figures

    def more(summary, scope, class_names, **settings):
        yield from of_epoch(summary, scope, class_names, **settings)
        figure = Figure(figsize=(2, 1), dpi=100)
        figure.text(0.5, 0.5, f"{summary.mean(Column('alignment')):.3f}")
        yield f"xattn_alignment/{scope}/as_text", figure

    monkeypatch.setattr(epoch_log_module, "epoch_figures", more)
    logger = Pictures()
    quiet_trainer(logger=logger, callbacks=[AttentionExplainabilityCallback()]).validate(
        ToyModule(), toy_loader(), verbose=False
    )
    image, step = logger.pictures["xattn_alignment/val/as_text"]
    assert image.shape == (100, 200, 3)
    assert (image < 128).any()
    assert step == 0
    assert "xattn_map/val/audio_to_text" in logger.pictures
