"""The list of samples: each has its own classes, numbers, maps and pictures, and what is not known is empty."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lightning_xattn.core.attention import Attention, AttentionPair, Direction, TokenAxis
from lightning_xattn.functional.outcomes import CORRECT
from lightning_xattn.report.batch import describe_sample
from lightning_xattn.report.document import Picture
from lightning_xattn.report.page import SampleEntry
from lightning_xattn.report.samples import _draw_maps, find_limits, list_batch, list_dataset
from lightning_xattn.visualizations import map_picture
from tests.explained import NAN, batch, dataset, sample, summary

LIFTS = torch.tensor([[0.25, 1.5, 1.25], [0.5, 2.125, 0.375]])
AXES = {
    "eeg": TokenAxis("EEG region", names=["LL", "RL"]),
    "spec": TokenAxis("time (s)", spans=[(0, 2), (2, 4), (4, 6)]),
}


@pytest.mark.parametrize(
    ("query", "key", "lifts", "axes", "span", "ends", "across"),
    [
        ("eeg", "spec", LIFTS, AXES, "lift 0.25 to 2.12", "EEG region, LL … RL", ("0 to 2", "time (s) →", "4 to 6")),
        ("spec", "eeg", LIFTS.T, AXES, "lift 0.25 to 2.12", "EEG region, LL … RL", ("0 to 2", "time (s) →", "4 to 6")),
        ("eeg", "spec", LIFTS, {}, "lift 0.25 to 2.12", "EEG token, 0 … 1", ("0", "Spec token →", "2")),
        ("spec", "eeg", LIFTS.T, {}, "lift 0.25 to 2.12", "EEG token, 0 … 1", ("0", "Spec token →", "2")),
        # An axis of another number of tokens is not used.
        ("spec", "eeg", LIFTS, AXES, "lift 0.25 to 2.12", "Spec token, 0 … 1", ("0", "EEG token →", "2")),
        ("eeg", "spec", LIFTS * NAN, {}, "undefined", "EEG token, 0 … 1", ("0", "Spec token →", "2")),
    ],
)
def test_a_map_lies_and_says_what_its_sides_are(query, key, lifts, axes, span, ends, across):
    result = dataset(maps={(0, 3): {f"{query}_to_{key}": lifts}}, axes=axes)
    names = {"eeg": "EEG", "spec": "Spec"}
    title = f"{names[query]} → {names[key]}, {span} (1: uniform). From top to bottom: {ends}"
    lying = LIFTS * (NAN if span == "undefined" else 1)
    limits = (0.5, 2.0)
    drawn = Picture(title, map_picture(lying.numpy(), limits), "png", across, True)
    assert list(_draw_maps(result, (0, 3), limits)) == [drawn]
    assert list(_draw_maps(result, (1, 3), limits)) == []


def test_all_maps_have_one_scale_that_a_single_cell_does_not_stretch():
    maps = [torch.tensor([[0.5, NAN], [1.0, 0.25]]), torch.linspace(0.5, 2, 997), torch.tensor([90.0])]
    low, high = find_limits(maps)
    assert low == 0.25
    assert 1.98 < high <= 2
    assert find_limits([]) is None
    assert find_limits([torch.full((2, 3), NAN)]) is None


@pytest.fixture
def pictures(tmp_path):
    """Of the sample s1 a tall one and a small one."""
    for name, size in {"signals": (1600, 400), "small": (40, 30)}.items():
        Image.new("RGBA", size, "red").save(tmp_path / f"{name}.png")
    return {"s1": [tmp_path / "signals.png", tmp_path / "small.png"]}


def sizes_of(entries):
    """By name of a sample, the titles and sizes of its pictures, which all are WebP."""
    found = {}
    for entry in entries:
        shown = [picture for picture in entry.pictures if picture.kind == "webp"]
        for picture in shown:
            with Image.open(io.BytesIO(picture.content)) as opened:
                assert opened.format == "WEBP"
                found.setdefault(entry.name, {})[picture.title] = opened.size
    return found


SHRUNK = {"s1": {"signals": (800, 200), "small": (40, 30)}}


def test_samples_of_a_batch(pictures):
    unknown = {"predicted_class": 1, "predicted_name": None, "true_class": None, "true_name": None, "correct": None}
    wrong = {"predicted_class": 0, "predicted_name": "Seizure", "correct": False}
    samples = [
        sample(sample_id="s1"),
        sample(sample_idx=5, **wrong, modality_agreement=NAN),
        sample(sample_idx=6, **unknown, confidence=None),
        sample(sample_idx=7, true_name=None, correct=None),
    ]
    expected = [
        ("s1", "GPD", "GPD", "correct", {"confidence": 0.8234, "alignment": 0.7234}),
        ("5", "Seizure", "GPD", "incorrect", {"confidence": 0.8234, "alignment": math.nan}),
        ("6", "1", "", "", {"confidence": math.nan, "alignment": 0.7234}),
        ("7", "GPD", "2", "", {"confidence": 0.8234, "alignment": 0.7234}),
    ]
    # Of the first of two layers, in two directions: the lift is the weight times the number of keys.
    weights = torch.rand(4, 2, 5, 7, generator=torch.Generator().manual_seed(0)) + 0.1
    there = Attention(Direction("eeg", "spec"), weights / weights.sum(-1, keepdim=True))
    back = Attention(Direction("spec", "eeg"), weights.mT / weights.mT.sum(-1, keepdim=True))
    results = batch(*samples, attention=[AttentionPair("first", there, back), AttentionPair("second", there)])
    entries = list(list_batch(results, pictures))
    for place, (entry, one) in enumerate(zip(entries, samples, strict=True)):
        name, predicted, true, outcome, numbers = expected[place]
        assert entry == SampleEntry(
            *(place, name, predicted, true, outcome, pytest.approx(numbers, nan_ok=True)),
            *("", [replace(describe_sample(one), title="")], entry.pictures),
        )
        maps = [picture for picture in entry.pictures if picture.kind == "png"]
        for drawn, weights, keys in zip(maps, (there.weights, back.weights), (7, 5), strict=True):
            lifts = keys * weights[place].mean(0)
            lying = lifts if keys == 7 else lifts.T
            assert f"lift {float(lifts.min()):.2f} to {float(lifts.max()):.2f} " in drawn.title
            assert "EEG region, LL … Z" in drawn.title
            with Image.open(io.BytesIO(drawn.content)) as opened:
                brightness = np.asarray(opened.convert("RGB")).astype(int).sum(-1)
            assert brightness.shape == (5, 7)
            assert brightness[np.unravel_index(int(lying.argmax()), (5, 7))] == brightness.max()
    assert sizes_of(entries) == SHRUNK


def test_samples_of_a_table_without_a_fusion(tmp_path, pictures):
    columns = {
        "layer": ["fusion.0"] * 3 + ["other"],
        "sample_idx": [2, 0, 1, 0],
        "sample_id": ["s2", None, "s1", None],
        "prediction": [0, 2, 9, 0],
        "target": [0, 1, None, 0],
        "correct": [True, False, None, True],
        "confidence": [0.5, 0.25, None, 0.5],
        "alignment": [None, 0.125, -0.5, 0.5],
    }
    (tmp_path / "attention").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "attention" / "rows.parquet")
    result = dataset(
        summary([0, 1, 2], [CORRECT] * 3), table=tmp_path, maps={(0, 1): {"eeg_to_spec": LIFTS}, (0, 7): {}}
    )
    entries = list(list_dataset(result, pictures))
    nothing = {"confidence": math.nan, "support": math.nan, "alignment": math.nan}
    expected = [
        SampleEntry(0, "0", "GPD", "LPD", "incorrect", nothing | {"confidence": 0.25, "alignment": 0.125}),
        SampleEntry(1, "s1", "9", "", "", nothing | {"alignment": -0.5}, "", [], entries[1].pictures),
        SampleEntry(2, "s2", "Seizure", "Seizure", "correct", nothing | {"confidence": 0.5}),
    ]
    for entry, one in zip(entries, expected, strict=True):
        numbers = pytest.approx(one.numbers, nan_ok=True)
        assert vars(entry) == vars(one) | {"numbers": numbers, "blocks": [], "pictures": list(one.pictures)}
    assert [picture.kind for picture in entries[1].pictures] == ["png", "webp", "webp"]
    assert sizes_of(entries) == SHRUNK
