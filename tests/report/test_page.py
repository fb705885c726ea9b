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
from lightning_xattn.report.document import Document, Items, Paragraph, Picture, Section, Table, as_markdown
from lightning_xattn.report.headline import describe_headline
from lightning_xattn.report.page import NUMBERS, SampleEntry, as_page, describe_order
from lightning_xattn.report.samples import find_limits, list_batch, list_dataset, maps_of_dataset
from lightning_xattn.visualizations.output import COLOURS
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
        cell = int(fusion.support_cell[place])
        assert one.supported_by == (fusion.cells[cell].name if cell >= 0 else "")
        assert one.blocks == [Paragraph(str(describe_modalities(fusion, place, CLASSES)))]


def test_each_sample_has_its_maps(result, entries):
    for number, one in enumerate(entries[:9]):
        there, back = result.maps[0, number].values()
        for picture, lifts, names in zip(
            one.pictures, (there, back), (("Left", "Right"), ("Right", "Left")), strict=True
        ):
            span = f"lift {float(lifts.min()):.2f} to {float(lifts.max()):.2f}"
            assert picture.title.startswith(f"{names[0]} → {names[1]}, {span} ")
            assert picture.axis == ("0", "Right token →", "6")
            assert picture.title.endswith("From top to bottom: Left token, 0 … 4")
            with Image.open(io.BytesIO(picture.content)) as image:
                pixels = np.asarray(image.convert("RGB")).astype(int)
            lying = lifts.numpy() if lifts.shape == (5, 7) else lifts.numpy().T
            # One scale for all maps: the same lift has the same colour in each.
            low, high = find_limits(maps_of_dataset(result))
            expected = 255 * COLOURS((lying.astype(float) - low) / (high - low))[..., :3]
            assert abs(pixels - expected).max() < 2


def entry(place, **changed):
    known = {
        **{"name": f"id{place}", "predicted": "a", "true": "b", "outcome": "incorrect"},
        "numbers": {"confidence": 0.625, "support": -0.25, "alignment": -0.5},
    }
    return SampleEntry(place, **known | changed)


def page_of(samples, *sections, card=None, scale=None):
    listed = Section("Samples", [Paragraph("a note")], "in some order", has_samples=True)
    opening, *others = sections or [Section("", [])]
    return as_page(Document("T", [opening, listed, *others]), samples, card=card, scale=scale)


def attributes_of(page):
    """Of each sample, in its order on the page."""
    samples = re.findall(r'<(?:details|div) class="sample (\w*)"([^>]*)>', page)
    return [{"kind": kind} | dict(re.findall(r'data-(\w+)="([^"]*)"', text)) for kind, text in samples]


def test_what_a_page_sorts_and_filters_by_is_the_samples():
    given = [
        entry(0),
        entry(1, predicted="b", outcome="correct", numbers={"confidence": 0.75, "alignment": math.nan}),
        entry(2, true="", outcome="", numbers={"alignment": 0.125}),
    ]
    page = page_of(given)
    found = attributes_of(page)
    names = ("kind", "confidence", "support", "alignment", "place", "name", "true", "outcome")
    assert [[one[name] for name in names] for one in found] == [
        ["incorrect", "0.625", "-0.25", "-0.5", "0", "id0", "b", "incorrect"],
        ["correct", "0.75", "", "", "1", "id1", "b", "correct"],
        ["", "", "", "0.125", "2", "id2", "", ""],
    ]
    lines = re.findall(r'<(?:summary|div) class="line">(.*?)</(?:summary|div)>', page, re.DOTALL)
    cells = [re.findall(r"<(?:span|strong)[^>]*>([^<]*)", one) for one in lines]
    assert cells == [
        ["id0", "a", "b", "incorrect", "-0.25", "62 %", "-0.50"],
        ["id1", "b", "b", "correct", "", "75 %", ""],
        ["id2", "a", "", "", "", "", "0.12"],
    ]
    options = re.findall(r'<option value="([^"]*)">([^<]*)', page)
    assert options[:5] == [("", "all"), ("b", "b"), ("", "all"), ("incorrect", "incorrect"), ("correct", "correct")]
    assert options[5:7] == [("rank up", "support, then confidence"), ("place up", "order of the data")]
    assert ("support down", "support, highest first") in options
    assert ("alignment up", "alignment, lowest first") in options
    assert "<p>a note</p>" in page


def test_the_least_supported_then_the_least_confident_samples_come_first():
    known = [(0.5, 0.9), (-2, 0.8), (math.nan, 0.1), (-2, 0.3), (0.5, math.nan), (math.nan, math.nan)]
    given = [entry(i, numbers={"support": one, "confidence": other}) for i, (one, other) in enumerate(known)]
    found = attributes_of(page_of(given))
    assert [one["place"] for one in found] == ["3", "1", "0", "4", "2", "5"]
    assert [one["rank"] for one in found] == ["0", "1", "2", "3", "4", "5"]
    assert describe_order(given) == "6, lowest support and confidence first"
    assert describe_order([entry(0, numbers={"alignment": 1.0})]) == "1"
    assert describe_order([]) == "none listed"


def test_columns_that_no_sample_has_are_left_out():
    page = page_of([entry(0, true="", outcome="", numbers={"alignment": 0.5})])
    (head,) = re.findall(r'<div class="line head">(.*?)</div>', page, re.DOTALL)
    assert re.findall(r"<span[^>]*>([^<]*)", head) == ["id", "predicted", "alignment"]
    assert '<select id="outcome"' not in page
    (head,) = re.findall(r'<div class="line head">(.*?)</div>', page_of([entry(0, supported_by="both")]), re.DOTALL)
    assert re.findall(r"<span[^>]*>([^<]*)", head)[2:5] == ["true", "outcome", "supported by"]


def test_a_note_stands_once_beside_its_first_table_also_in_the_text():
    table = Table(("h0", "h1"), [("r0", "1"), ("r1", "2")], ["what h1 means"])
    sections = [Section("first", [table]), Section("second", [table, Paragraph("<p>")])]
    page, text = page_of([], *sections), as_markdown(Document("T", sections))
    for report in (page, text):
        assert report.count("what h1 means") == 1
        assert report.index("r1") < report.index("what h1 means") < report.rindex("second")
    assert '<tr><th scope="col">h0</th><th scope="col">h1</th></tr>' in page
    assert "<tr><td>r1</td><td>2</td></tr>" in page
    assert "<p>&lt;p&gt;</p>" in page


def test_nothing_else_stands_on_a_page():
    """The whole of a small page without its style and its script, and where each text stands."""
    blocks = [Items([("a", "b", ("c",)), ("d", "e", ())], "title"), Paragraph("f"), Table(("g", "h"), [("i", "j")])]
    sections = [Section("One", blocks[:2]), Section("Two", blocks[2:], "about two")]
    pictures = [Picture("map", b"1", "png", ("0", "x →", "9")), Picture("plot", b"2", "webp", is_captioned=False)]
    numbers = dict(zip(NUMBERS, (-0.25, 0.625, -0.5), strict=True))
    first = entry(0, numbers=numbers, supported_by="both", blocks=blocks[1:2], pictures=pictures[:1])
    last = entry(1, true="", outcome="", numbers={})
    page = page_of([last, first], *sections, card=pictures[1], scale=(0.25, 4))
    body = re.sub(r"<(style|script)>.*?</\1>", "", page[page.index("<body") :], flags=re.DOTALL)
    assert [one.strip() for one in re.split("<[^>]*>", body) if one.strip()] == [
        *("T", "Samples", "Two"),
        *("One", "title", "a", "b", "c", "d", "e", "f"),
        *("Samples", "in some order", "a note", "true class", "all", "b", "outcome", "all", "incorrect"),
        *("sort by", "support, then confidence", "order of the data"),
        *(f"{name}, {end} first" for name in NUMBERS for end in ("lowest", "highest")),
        *("id contains", "show all", "Colours of all maps: lift 0.25"),
        "4.00 or more. Lift is the weight times the number of keys; 1: uniform attention.",
        *("id", "predicted", "true", "outcome", "supported by", "support (nats)", *NUMBERS[1:]),
        *("id0", "a", "b", "incorrect", "both", "-0.25", "62 %", "-0.50", "f", "map", "0", "x →", "9"),
        *("id1", "a"),
        *("Two", "about two", "g", "h", "i", "j"),
    ]
    links = re.findall('<a href="#([^"]*)">', body)
    assert links == re.findall('<details class="part" id="([^"]*)">', body) == ["samples", "part-2"]
    # A sample of which nothing more is known does not open.
    assert body.count("<details") == 3
    # What the script and the labels ask for.
    chosen = re.findall('<label for="([^"]*)">[^<]*</label><(?:select|input) id="([^"]*)" name="([^"]*)"', body)
    assert chosen == [(one, one, one) for one in ("true", "outcome", "order", "words")]
    assert all(f'id="{one}"' in body for one in ("choose", "list", "shown"))
    images = re.findall('<img( class="map")? src="data:image/([^;]*);base64,([^"]*)" alt="([^"]*)"', body)
    assert images == [("", "webp", "Mg==", "plot"), (' class="map"', "png", "MQ==", "map")]


def test_names_are_text_and_long_pictures_are_whole():
    content = bytes(range(256)) * 40
    page = page_of([entry(0, name="<b>\x1b", predicted="{{ 7 * 7 }}")], card=Picture('"><i>', content, "png"))
    assert base64.b64encode(content).decode() in page
    assert "&lt;b&gt;\\x1b" in page
    assert "{{ 7 * 7 }}" in page
    assert "<i>" not in page


def test_a_page_has_the_figures_with_their_titles_and_says_how_many_samples_it_lists(result, monkeypatch, tmp_path):
    figures = {}
    for name in ("card", "first", "second"):
        figures[name] = Figure(figsize=(1, 1))
        figures[name].suptitle(f"the {name}\nfigure")
    monkeypatch.setattr("lightning_xattn.report.figures.dataset_figures", lambda explained: figures.items())
    monkeypatch.setattr("lightning_xattn.report.samples.LISTED", 40)
    page = create_explainability_report(replace(result, maps={}), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == page
    shown = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', page)
    assert [html.unescape(title) for _, title in shown] == ["the card figure", "the first figure", "the second figure"]
    for name, (content, _) in zip(figures, shown, strict=True):
        assert f"<!-- the {name} -->" in base64.b64decode(content).decode()
    assert "40 of 130 samples, those with maps among them. The others are in the table." in page
    assert page.count('<details class="sample') == 40
    headline = describe_headline(result)
    assert f'<p class="lead">{html.escape(headline.sentence)}</p>' in page.replace("\N{NO-BREAK SPACE}%", " %")
    assert page.index("the card figure") < page.index('class="lead"') < page.index('<details class="part"')
    folded = re.findall(r'<details class="part" id="[^"]*">\s*<summary><h2>([^<]*)', page)
    assert folded == ["Attention", "Classes", "Samples", "All other figures and numbers", "How to read this"]


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
    monkeypatch.setattr(visualizations, "map_picture", lambda values, limits: drawn.append(values) or b"")
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
