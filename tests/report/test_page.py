"""The page of a data set: every sample has its own classes, numbers and maps, and figures come in their order."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from copy import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from lightning_xattn import ExplainabilityCapture, create_explainability_report
from lightning_xattn.evaluation.fusion_samples import describe_modalities
from lightning_xattn.report import samples as samples_module
from lightning_xattn.report.document import Document, Items, Paragraph, Section, Table
from lightning_xattn.report.page import NUMBERS, Picture, SampleEntry, as_page
from lightning_xattn.report.samples import list_batch, list_dataset
from tests.report.conftest import CLASSES
from tests.toy import PaddedToyModule, padded_toy_data, run_toy


@pytest.fixture(scope="module")
def entries(result):
    return list(list_dataset(result, {}))


def test_each_sample_has_its_classes_and_numbers(result, entries):
    fusion = result.fusion
    rows = pd.read_parquet(result.table / "attention").sort_values("sample_idx")
    supports = dict(zip(fusion.sample_numbers.tolist(), fusion.numbers["support"].tolist(), strict=True))
    assert [one.place for one in entries] == list(range(130))
    outcomes = {True: "correct", False: "incorrect"}
    for one, (_, row) in zip(entries, rows.iterrows(), strict=True):
        assert one.name == row["sample_id"]
        has_class = row["target"] is not None and row["target"] >= 0
        assert (one.predicted, one.true) == (
            CLASSES[int(row["prediction"])],
            CLASSES[int(row["target"])] if has_class else "",
        )
        assert one.outcome == (outcomes[one.predicted == one.true] if has_class else "")
        expected = {name: row[name] for name in ("confidence", "alignment")}
        assert one.numbers == pytest.approx(expected | {"support": supports[row["sample_idx"]]}, rel=1e-5)
        place = fusion.sample_numbers.tolist().index(row["sample_idx"])
        assert one.blocks == [Paragraph(str(describe_modalities(fusion, place, CLASSES)))]


def test_each_sample_has_its_maps(result, entries):
    for number, one in enumerate(entries[:9]):
        there, back = result.maps[0, number].values()
        for picture, lifts, names in zip(
            one.pictures, (there, back), (("Left", "Right"), ("Right", "Left")), strict=True
        ):
            span = f"lift {float(lifts.min()):.2f} to {float(lifts.max()):.2f}"
            assert picture.title.startswith(f"{names[0]} asks {names[1]}: {span} ")
            assert picture.axis == ("0", "Right token →", "6")
            assert picture.title.endswith("From top to bottom: Left token, 0 … 4")
            with Image.open(io.BytesIO(picture.content)) as image:
                pixels = np.asarray(image.convert("RGB")).astype(int)
            lying = lifts.numpy() if lifts.shape == (5, 7) else lifts.numpy().T
            # The largest value is yellow, the smallest one dark.
            brightness = pixels.sum(-1)
            assert brightness.argmax() == lying.argmax()
            assert pixels.reshape(-1, 3)[lying.argmin()].tolist() == [68, 1, 84]


def entry(place, **changed):
    known = {
        **{"name": f"id{place}", "predicted": "a", "true": "b", "outcome": "incorrect"},
        "numbers": {"confidence": 0.625, "support": -0.25, "alignment": -0.5},
    }
    return SampleEntry(place, **known | changed)


def test_what_a_page_sorts_and_filters_by_is_the_samples():
    given = [
        entry(0),
        entry(1, predicted="b", outcome="correct", numbers={"confidence": 0.75, "alignment": math.nan}),
        entry(2, true="", outcome="", numbers={"alignment": 0.125}),
    ]
    document = Document("T", [Section("Key points", []), Section("Rest", [])])
    page = as_page(document, [], given, "3 of 4 samples")
    samples = re.findall(r'<details class="sample ?(\w*)"(.*?)</details>', page, re.DOTALL)
    found = [dict(re.findall(r'data-(\w+)="([^"]*)"', one)) for _, one in samples]
    names = ("confidence", "support", "alignment", "place", "name", "true", "outcome")
    assert [[one[name] for name in names] for one in found] == [
        ["0.625", "-0.25", "-0.5", "0", "id0", "b", "incorrect"],
        ["0.75", "", "", "1", "id1", "b", "correct"],
        ["", "", "0.125", "2", "id2", "", ""],
    ]
    assert [kind for kind, _ in samples] == ["incorrect", "correct", ""]
    classes = [re.findall(r'<span class="(\w+)">([^<]*)</span>', one) for _, one in samples]
    assert classes[0] == [
        *(("classes", "a, true b"), ("outcome", "incorrect")),
        *(("number", "confidence 0.62"), ("number", "support -0.25"), ("number", "alignment -0.50")),
    ]
    assert classes[1:] == [
        [("classes", "b, true b"), ("outcome", "correct"), ("number", "confidence 0.75")],
        [("classes", "a"), ("number", "alignment 0.12")],
    ]
    options = re.findall(r'<option value="([^"]*)">([^<]*)', page)
    assert options[:5] == [("", "all"), ("b", "b"), ("", "all"), ("incorrect", "incorrect"), ("correct", "correct")]
    assert ("support down", "support, highest first") in options
    assert ("alignment up", "alignment, lowest first") in options
    assert "<p>3 of 4 samples</p>" in page


def test_blocks_are_lists_and_tables():
    blocks = [Items([("label", "value", ("below",))], "title"), Table(("h0", "h1"), [("r0", "1"), ("r1", "2")])]
    document = Document("T", [Section("first", blocks), Section("second", [Paragraph("<p>")]), Section("last", [])])
    page = as_page(document, [Picture("figure", b"1", "png")], [], "none")
    assert "<h3>title</h3><dl><dt>label</dt><dd>value<br>below</dd></dl>" in page
    assert '<tr><th scope="col">h0</th><th scope="col">h1</th></tr>' in page
    assert "<tr><td>r0</td><td>1</td></tr><tr><td>r1</td><td>2</td></tr>" in page
    assert "<p>&lt;p&gt;</p>" in page
    assert re.findall("<h2>(.*?)</h2>", page) == ["first", "Figures", "second", "Samples", "last"]


def test_nothing_else_stands_on_a_page():
    """The whole of a small page without its style and its script, and where each text stands."""
    blocks = [Items([("a", "b", ("c",)), ("d", "e", ())]), Paragraph("f"), Table(("g", "h"), [("i", "j")])]
    document = Document("T", [Section("One", blocks[:1]), Section("Two", blocks[1:2]), Section("Three", blocks[2:])])
    pictures = [Picture("map", b"1", "png", ("0", "x →", "9")), Picture("plot", b"2", "webp", is_captioned=False)]
    numbers = dict(zip(NUMBERS, (0.625, -0.25, -0.5), strict=True))
    first = entry(0, numbers=numbers, blocks=blocks[1:2], pictures=pictures[:1])
    page = as_page(document, pictures, [first, entry(1, true="", outcome="", numbers={})], "note")
    body = re.sub(r"<(style|script)>.*?</\1>", "", page[page.index("<body") :], flags=re.DOTALL)
    assert [one.strip() for one in re.split("<[^>]*>", body) if one.strip()] == [
        *("T", "One", "Figures", "Two", "Samples", "Three"),
        *("One", "a", "b", "c", "d", "e"),
        *("Figures", "map", "0", "x →", "9"),
        *("Two", "f"),
        *("Samples", "note", "true class", "all", "b", "outcome", "all", "incorrect"),
        *("sort by", "order of the data", "confidence, lowest first", "confidence, highest first"),
        *(f"{name}, {end} first" for name in NUMBERS[1:] for end in ("lowest", "highest")),
        *("id contains", "show all"),
        *("id0", "a, true b", "incorrect", "confidence 0.62", "support -0.25", "alignment -0.50"),
        *("f", "map", "0", "x →", "9"),
        *("id1", "a", "Nothing more is known about this sample."),
        *("Three", "g", "h", "i", "j"),
    ]
    links = re.findall('<a href="#([^"]*)">([^<]*)', body)
    assert links == re.findall('<section id="([^"]*)"><h2>([^<]*)', body)
    assert [one for one, _ in links] == ["part-0", "part-1", "part-2", "samples", "part-4"]
    # What the script and the labels ask for.
    chosen = re.findall('<label for="([^"]*)">[^<]*</label><(?:select|input) id="([^"]*)" name="([^"]*)"', body)
    assert chosen == [(one, one, one) for one in ("true", "outcome", "order", "words")]
    assert all(f'id="{one}"' in body for one in ("choose", "list", "shown"))
    images = re.findall('<img( class="map")? src="data:image/([^;]*);base64,([^"]*)" alt="([^"]*)"', body)
    of_map, of_plot = (' class="map"', "png", "MQ==", "map"), ("", "webp", "Mg==", "plot")
    assert images == [of_map, of_plot, of_map]


def test_a_page_has_the_figures_with_their_titles_and_says_how_many_samples_it_lists(result, monkeypatch, tmp_path):
    figures = {}
    for name in ("first", "second"):
        figures[name] = Figure(figsize=(1, 1))
        figures[name].suptitle(f"the {name}\nfigure")
    monkeypatch.setattr("lightning_xattn.report.figures.dataset_figures", lambda explained: figures.items())
    monkeypatch.setattr("lightning_xattn.report.samples.LISTED", 40)
    page = create_explainability_report(replace(result, maps={}), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == page
    shown = re.findall(r'<figure><img src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', page)
    assert [html.unescape(title) for _, title in shown] == ["the first figure", "the second figure"]
    for name, (content, _) in zip(figures, shown, strict=True):
        assert f"<!-- the {name} -->" in base64.b64decode(content).decode()
    assert "40 of 130 samples, those with maps among them. The others are in the table." in page
    assert page.count('<details class="sample') == 40


@pytest.fixture
def alone(result):
    """The modalities without a layer, a table and maps."""
    return replace(result, summaries={}, table=None, maps={})


def test_those_with_maps_are_listed_before_others(monkeypatch):
    monkeypatch.setattr(samples_module, "LISTED", 3)
    assert samples_module._choose_listed(range(10), lambda one: one in (4, 8)) == [0, 4, 8]


def test_samples_of_two_processes_keep_what_is_theirs(alone):
    """As of a DistributedSampler: each process numbers its own."""
    single = list(list_dataset(alone, {}))
    split = copy(alone.fusion)
    split.rows = split.rows | {"process": split.sample_numbers % 2}
    split.sample_numbers = split.sample_numbers // 2
    entries = list(list_dataset(replace(alone, fusion=split), {}))
    assert len({one.name for one in entries}) == len(entries) == 130
    assert all((one.predicted == one.true) == (one.outcome == "correct") for one in entries if one.true)
    assert sorted(one.blocks[0].text for one in entries) == sorted(one.blocks[0].text for one in single)


def test_maps_leave_out_what_a_mask_hides(monkeypatch):
    from lightning_xattn import visualizations

    drawn = []
    monkeypatch.setattr(visualizations, "map_picture", lambda values: drawn.append(values) or b"")
    torch.manual_seed(0)
    explainer = ExplainabilityCapture(PaddedToyModule(), predict=run_toy)
    batch = explainer.explain_batch(padded_toy_data(6)[:])
    list(list_batch(batch, {}))
    first = batch["attention_dict"]["audio_to_text"]
    for i in range(6):
        weights = first[i].mean(0)
        visible = weights.isfinite().sum(1, keepdim=True)
        torch.testing.assert_close(torch.as_tensor(drawn[2 * i]), weights * visible, equal_nan=True)
    assert torch.as_tensor(drawn[2]).isnan().any()
