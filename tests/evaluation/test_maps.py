"""The maps of single samples: whose are kept, and what is in them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_xattn import (
    AttentionExplainabilityCallback,
    ExplainabilityCapture,
    XAttnWarning,
    create_explainability_report,
)
from lightning_xattn.attribution.kept_samples import BottomKSample
from lightning_xattn.evaluation import maps as maps_module
from lightning_xattn.evaluation.maps import CELLS, add_maps, maps_by_sample
from lightning_xattn.evaluation.results import TrainingData
from lightning_xattn.explainer import training_data
from lightning_xattn.report.samples import list_dataset
from tests.toy import (
    PaddedToyModule,
    ToyModule,
    padded_toy_data,
    quiet_trainer,
    run_toy,
    toy_data,
    toy_loader,
)

DIRECTIONS = ("audio_to_text", "text_to_audio")


def explainer(module=None, **settings):
    torch.manual_seed(0)
    return ExplainabilityCapture(module or ToyModule(), predict=run_toy, **settings)


@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_each_samples_map_is_its_mean_weight_times_its_keys(kind):
    module, data = (PaddedToyModule, padded_toy_data(11)) if kind == "padded" else (ToyModule, toy_data(11))
    of_model = explainer(module())
    explained = of_model.explain_loader(DataLoader(data, 4), progress=False)
    assert set(explained.maps) == {(0, number) for number in range(11)}
    batch = of_model.explain_batch(data[:])
    for (_, number), maps in explained.maps.items():
        assert tuple(maps) == DIRECTIONS
        for direction, lifts in maps.items():
            weights = batch["attention_dict"][direction][number].mean(0)  # NaN where a mask hides something
            expected = weights * weights.isfinite().sum(1, keepdim=True)
            torch.testing.assert_close(lifts.float(), expected, rtol=2e-3, atol=1e-3, equal_nan=True)
    assert any(maps[DIRECTIONS[0]].isnan().any() for maps in explained.maps.values()) == (kind == "padded")


def kept(room, order, cut, monkeypatch):
    """Of samples in an order, from a place on in a second process: those whose maps are kept.

    Odd ones have twice as many tokens, and there is room for so many of the smaller maps.
    """
    monkeypatch.setattr(maps_module, "CELLS", 6 * room)
    monkeypatch.setattr(maps_module, "lift_map", lambda rows: rows.weights)
    parts = []
    for rank, chosen in enumerate((order[:cut], order[cut:])):
        sample = BottomKSample(CELLS)
        for number in chosen:
            lifts = torch.full((1, 2, 3 + 3 * (number % 2)), number)
            rows = SimpleNamespace(direction="a_to_b", weights=lifts, bin_sizes=(1, 1))
            one = torch.tensor([number])
            add_maps(sample, [rows], one, {"sample_idx": one, "process": torch.tensor([rank])})
        parts.append(sample)
    merged = maps_by_sample(parts[0] + parts[1])
    assert all((maps["a_to_b"] == number).all() for (_, number), maps in merged.items())
    return {number for _, number in merged}


@pytest.mark.parametrize("numbers", [range(40), range(0, 80, 2)], ids=["of two lengths", "of one length"])
def test_the_same_samples_have_maps_whatever_the_order_and_the_processes(numbers, monkeypatch):
    once = kept(14, [*numbers], 40, monkeypatch)
    assert len(once) == (7 if 1 in numbers else 14)
    assert kept(14, [*reversed(numbers)], 40, monkeypatch) == once
    assert kept(14, [*numbers], 25, monkeypatch) == once
    assert kept(100, [*numbers], 25, monkeypatch) == set(numbers)


def test_samples_of_each_number_of_tokens_have_maps():
    batches = [(torch.randn(2, 5, 3), torch.randn(2, length, 2), torch.tensor([0, 1])) for length in (4, 4, 6)]
    with pytest.warns(XAttnWarning, match="the number of tokens changes from batch to batch"):
        explained = explainer().explain_loader(batches, progress=False)
    lengths = {number: maps[DIRECTIONS[0]].shape[1] for (_, number), maps in explained.maps.items()}
    assert lengths == {0: 4, 1: 4, 2: 4, 3: 4, 4: 6, 5: 6}
    assert [len(one.pictures) for one in list_dataset(explained, {})] == [2] * 6


@pytest.mark.slow
def test_a_page_shows_them_and_only_a_test_keeps_them(tmp_path):
    explained = explainer().explain_loader(toy_loader(), tmp_path / "table", progress=False)
    page = create_explainability_report(explained, format="html")
    assert page.count('<img class="map"') == 2 * 23
    watch, logger, kept = AttentionExplainabilityCallback(), CSVLogger(tmp_path, name="", version="x"), []
    trainer = quiet_trainer(logger=logger, callbacks=[watch, _Looking(watch, kept)])
    trainer.validate(ToyModule(), toy_loader(), verbose=False)
    trainer.test(ToyModule(), toy_loader(), verbose=False)
    assert kept == [False, True]
    (page,) = tmp_path.rglob("xattn_about/test/**/*.html")
    assert page.read_text().count('<img class="map"') == 2 * 23


class _Looking(pl.Callback):
    """Looks at what the callback before it has kept when a batch ends."""

    def __init__(self, watch, kept):
        self.watch, self.kept = watch, kept

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            self.kept.append(len(self.watch._run.evaluations[0].totals.maps) > 0)

    on_test_batch_end = on_validation_batch_end


class Split(pl.LightningDataModule):
    """Says which samples it trains on."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def train_dataloader(self):
        return toy_loader()

    def val_dataloader(self):
        return toy_loader()

    def state_dict(self):
        return self.state


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (
            {"training_ids": torch.tensor([3, 5]), "training_groups": torch.tensor([30, 50])},
            TrainingData(frozenset({"3", "5"}), frozenset({"30", "50"})),
        ),
        ({"training_ids": ["a", "b"]}, TrainingData(frozenset({"a", "b"}))),
        ({}, None),
    ],
)
def test_a_checkpoint_says_what_its_model_was_trained_on(state, expected, tmp_path):
    trainer = quiet_trainer(limit_train_batches=1)
    trainer.fit(ToyModule(), datamodule=Split(state))
    trainer.save_checkpoint(tmp_path / "toy.ckpt")
    assert training_data(tmp_path / "toy.ckpt") == expected


def test_what_is_no_checkpoint_does_not_say(tmp_path):
    (tmp_path / "other").write_bytes(b"something else")
    assert training_data(tmp_path / "other") is None


@pytest.mark.slow
def test_a_report_says_of_how_many_samples_it_was_trained_on(tmp_path):
    explained = explainer(
        sample_ids=lambda outputs, batch: [f"s{int(1000 * one)}" for one in batch[0][:, 0, 0]],
        groups=lambda outputs, batch: [f"p{int(one)}" for one in batch[2]],
    ).explain_loader(toy_loader(), tmp_path, progress=False)
    unknown = create_explainability_report(explained, format="html")
    assert "it is not known which of these samples the model was trained on." in unknown
    ids = [f"s{int(1000 * one)}" for one in toy_data().tensors[0][:, 0, 0]]
    groups = [f"p{int(one)}" for one in toy_data().tensors[2]]
    related = sum(group == groups[0] for group in groups) - 1
    explained = replace(explained, trained_on=TrainingData(frozenset(ids[:1]), frozenset(groups[:1])))
    page = create_explainability_report(explained, format="html")
    said = f"the model was trained on 1 of these 23 samples, and on others of the groups of {related} more"
    assert said in page
    assert said in " ".join(create_explainability_report(explained).split())
    unnamed = explainer().explain_loader(toy_loader(), tmp_path / "unnamed", progress=False)
    unnamed = replace(unnamed, trained_on=TrainingData(frozenset(map(str, range(23)))))
    told = create_explainability_report(unnamed, format="html")
    assert "it is not known which of these samples the model was trained on." in told
    none = replace(explained, trained_on=TrainingData(frozenset({"another"})))
    page = create_explainability_report(none, format="html")
    assert "whether it was trained on others of their groups is not known" in page
    assert "trained on none of these 23 samples" in " ".join(create_explainability_report(none).split())
