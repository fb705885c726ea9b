"""Tables, lists and key points of a data set: each number is the summary's, in the row and column that names it."""

from __future__ import annotations

import math
import re
from copy import copy
from dataclasses import replace

import pytest
import torch

from lightning_xattn import create_explainability_report
from lightning_xattn.evaluation.fusion_samples import describe_modalities, most_confident_unsupported
from lightning_xattn.evaluation.statistics import ALIGNMENT, Column
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.report.estimates import estimate_mean
from tests.report.conftest import CLASSES, SUBSETS


def decimals(value, digits=3):
    return f"{round(value, digits) + 0.0:.{digits}f}"


def in_brackets(one, signed=False):
    plus = "+" if signed and one.mean >= 0 else ""
    return f"{plus}{decimals(one.mean)} ({decimals(one.low)} to {decimals(one.high)})"


def in_percent(one, ci=""):
    mean, low, high = (decimals(100 * number, 1) for number in (one.mean, one.low, one.high))
    return f"{mean} %" if math.isnan(one.low) else f"{mean} % ({ci}{low} to {high} %)"


def tables_of(report):
    """Each table: its header, and its rows by their first cell."""
    found = []
    for part in report.split("\n\n"):
        if part.startswith("|"):
            header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines())
            found.append((header, {name: cells for name, *cells in rows}))
    return found


@pytest.fixture(scope="module")
def report(result):
    return create_explainability_report(result)


@pytest.fixture(scope="module")
def tables(report):
    of_fusion = "modalities", "faithfulness", "cells", "right", "scores of the fusion", "subsets"
    return dict(zip([*of_fusion, "layer", "scores of the layer"], tables_of(report), strict=True))


def test_modalities_have_their_probes_contributions_and_shares(result, tables):
    header, rows = tables["modalities"]
    assert header == ["modality", "probe accuracy", "macro AUROC", "calibration error", "contribution", "share"]
    fusion = result.fusion

    def of_probe(name):
        error = decimals(fusion.calibration_errors[name], 2)
        return [in_percent(fusion.estimate(f"right/{name}")), in_brackets(fusion.probe_aurocs[name]), error]

    for name in ("left", "right"):
        contribution = in_brackets(fusion.estimate(f"phi/{name}"), signed=True)
        assert rows[name.capitalize()] == [*of_probe(name), contribution, in_percent(fusion.share(name))]
    assert rows["joint probe"] == [*of_probe("joint"), "", ""]
    assert rows["the model itself"] == [in_percent(fusion.estimate("correct")), "", "", "", ""]


def test_directions_have_their_faithfulness_that_of_the_reference_and_the_cost(result, tables):
    header, rows = tables["faithfulness"]
    assert header == ["replaced keys", "faithfulness", "of the reference", "cost of replacing all"]
    for name, direction in zip(("Left → Right", "Right → Left"), result.fusion.replaced, strict=True):
        found = [result.fusion.faithfulness(direction, order) for order in ("gain", "reference")]
        expected = [in_brackets(one, signed=True) for one in found]
        assert rows[name] == [*expected, in_brackets(result.fusion.estimate(f"cost/{direction}"))]
    assert list(rows) == ["Left → Right", "Right → Left"]


def test_classes_and_outcomes_have_their_support_and_shares(result, tables):
    header, rows = tables["subsets"]
    names = ("left", "right")
    assert header == ["true class", "supported by Left", "supported by Right", "share of Left", "share of Right"]
    assert list(rows) == ["all", *SUBSETS]
    for name, subset in {"all": (None, None), **SUBSETS}.items():
        supports = [in_percent(result.fusion.estimate(f"supports/{one}", *subset)) for one in names]
        assert rows[name] == [*supports, *(in_percent(result.fusion.share(one, *subset)) for one in names)]


def test_cells_have_their_share_accuracy_and_confidence(result, tables):
    header, rows = tables["cells"]
    assert header == [
        *("supported by", "samples (groups)", "share", "the model's accuracy", "mean confidence", "calibration gap"),
    ]
    for cell, (name, cells) in zip(result.fusion.cells, rows.items(), strict=True):
        numbers = (cell.share, cell.accuracy, cell.confidence, cell.calibration_gap)
        assert (name, cells) == (cell.name, [f"{cell.samples} ({cell.groups})", *map(in_percent, numbers)])
    header, rows = tables["right"]
    assert header == ["whose probe is right", "samples (groups)", "share", "the model's accuracy"]
    for cell, (name, cells) in zip(result.fusion.right_cells, rows.items(), strict=True):
        numbers = (cell.share, cell.accuracy)
        assert (name, cells) == (cell.name, [f"{cell.samples} ({cell.groups})", *map(in_percent, numbers)])


def test_classes_and_outcomes_have_their_samples_accuracy_and_attention(result, members, tables):
    header, rows = tables["layer"]
    one, fusion = result.headline, result.fusion
    assert header == [
        *("true class", "n (groups)", "accuracy (recall)"),
        *("alignment", "Left → Right entropy", "Right → Left entropy"),
    ]
    assert list(rows) == ["all", *CLASSES, "no class", "correct", "incorrect"]
    for name, (size, accuracy, *means) in rows.items():
        chosen = members[name]
        assert size == f"{int(chosen.sum())} ({len(fusion.groups[chosen].unique())})"
        right, wrong = (int((chosen & (fusion.outcomes == outcome)).sum()) for outcome in (CORRECT, INCORRECT))
        subset = {"all": (None, None), "no class": (len(CLASSES), None), **SUBSETS}[name]
        if right and wrong:
            low, high = (decimals(100 * end, 1) for end in one.accuracy_interval(subset[0]))
            share = decimals(100 * right / (right + wrong), 1)
            assert accuracy == f"{share} % ({low} to {high} %) {right}/{right + wrong}"
        else:
            assert accuracy == ""
        columns = [ALIGNMENT, *(Column("entropy", direction) for direction in one.heads)]
        assert means == [in_brackets(estimate_mean(one, column, *subset)) for column in columns]


def test_the_table_of_classes_says_how_many_intervals_miss_by_chance(result, report, tables):
    _, rows = tables["layer"]
    intervals = sum(bool(re.search(r"\(.* to .*\)", cell)) for cells in rows.values() for cell in cells)
    assert intervals > 20
    sentence = (
        f"Each of these {intervals} intervals misses the truth once in 20 times: expect about "
        f"{decimals(intervals / 20, 1)} of them to miss by chance."
    )
    assert sentence in report.splitlines()
    whole = replace(result, class_names=[], fusion=None)
    assert "by chance" not in create_explainability_report(whole)


@pytest.mark.parametrize("where", ["fusion", "layer"])
def test_scores_have_their_sizes_and_what_they_separate(result, members, tables, where):
    header, rows = tables[f"scores of the {where}"]
    assert header == [
        *("sign of an error", "correct (groups)", "incorrect (groups)"),
        *("AUROC", "gap", "gap within classes"),
    ]
    names = {"low confidence": "confidence", "low support": "support"}
    if where == "layer":
        names = {"low confidence": "confidence", "low alignment": "alignment", "high entropy": "entropy"}
    assert list(rows) == list(names)
    sizes = [
        f"{int(members[name].sum())} ({len(result.fusion.groups[members[name]].unique())})"
        for name in ("correct", "incorrect")
    ]
    for sign, name in names.items():
        found = result.fusion.compare(name) if where == "fusion" else result.headline.compare(Column(name))
        auroc = f"{decimals(found.auroc)} ({decimals(found.low)} to {decimals(found.high)})"
        gaps = [f"{'+' * (gap >= 0)}{decimals(gap)}" for gap in (found.gap, found.class_adjusted_gap)]
        assert rows[sign] == [*sizes, auroc, *gaps]
        assert gaps[0] != gaps[1]


def test_lists_say_what_is_of_all_samples(result, report):
    fusion = result.fusion
    numbers = {name: fusion.estimate(name) for name in ("additive_right", "model_right")}
    said = {name: in_percent(one) for name, one in numbers.items()}
    lines = [
        "- **Samples:** 130 of 23 groups",
        f"- **Modalities:** {', '.join(fusion.sources)}",
        "- **Samples that were permuted, for contributions and faithfulness:** 128",
        f"- **Interaction (centred logits):** {in_brackets(fusion.estimate('interaction'), signed=True)}",
        f"- **Accuracy if the modalities only added up (EMAP):** {said['additive_right']}, the model's "
        f"{said['model_right']}",
        "- **Samples without a class:** 7",
        "- **Alignment undefined:** 0.0 % of the samples",
        f"- **Alignment between different samples:** {decimals(result.headline.alignment_null)} (the mean alignment "
        f"minus this: {decimals(result.headline.mean(ALIGNMENT) - result.headline.alignment_null)})",
        "In brackets: 95 % CI, by groups; none with fewer than 5 groups.",
    ]
    assert [line for line in lines if line not in report.splitlines()] == []
    places = most_confident_unsupported(fusion)
    told = [describe_modalities(fusion, i, CLASSES) for i in places]
    listed = re.findall(r"^- \*\*Sample (\d+):\*\* (.*)", report, re.MULTILINE)
    assert listed == [(str(int(fusion.rows["id"][i])), str(one)) for i, one in zip(places, told, strict=True)]
    assert len(listed) == 10


def test_interactions_are_signed_and_named_and_problems_are_listed_together(result):
    fusion = copy(result.fusion)
    one = fusion.numbers["interaction"]
    pairs = {"interaction/left_right": one.abs(), "interaction/left_third": one}
    fusion.interactions, fusion.numbers = tuple(pairs), fusion.numbers | pairs
    fusion.probe_problems = {"left": "no targets", "right": "no targets"}
    lines = create_explainability_report(replace(result, fusion=fusion)).splitlines()
    for pair in ("left_right", "left_third"):
        estimate = in_brackets(fusion.estimate(f"interaction/{pair}"), signed=True)
        assert f"- **Interaction of {pair} (centred logits):** {estimate}" in lines
    assert fusion.estimate("interaction/left_right").mean > 0
    assert "No probe on Left and Right: no targets." in lines


def test_of_many_classes_the_largest_have_rows_and_the_others_one(result, tables, members, monkeypatch):
    monkeypatch.setattr("lightning_xattn.report.dataset.LISTED_CLASSES", 2)
    report = create_explainability_report(result)
    of_fusion = "modalities", "faithfulness", "cells", "right", "scores of the fusion", "subsets"
    found = dict(zip([*of_fusion, "layer", "scores of the layer"], tables_of(report), strict=True))
    largest = [CLASSES[c] for c in result.largest_classes(2)]
    assert largest == sorted(sorted(CLASSES, key=lambda name: -int(members[name].sum()))[:2])
    for name, (header, rows) in tables.items():
        same, ours = found[name]
        assert same == header
        if name not in ("subsets", "layer"):
            assert ours == rows
            continue
        expected = [one for one in rows if one not in CLASSES or one in largest]
        expected.insert(3, "rest")
        assert [*ours] == expected
        assert all(ours[one] == rows[one] for one in ours if one != "rest")
    others = torch.stack([members[name] for name in CLASSES if name not in largest]).any(0)
    fusion = result.fusion
    for column, name in enumerate(("left", "right")):
        expected = in_percent(fusion.estimate(f"supports/{name}", among=others))
        assert found["subsets"][1]["rest"][column] == expected
    layer = result.headline
    sizes = [layer.size(class_id) for class_id, name in enumerate(CLASSES) if name not in largest]
    assert found["layer"][1]["rest"][0].split()[0] == str(sum(sizes))
    assert "Of 4 classes the 2 with the most samples have rows of their own; rest: the others." in report
