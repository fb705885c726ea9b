"""JSON of a data set: each number is the summary's, of the subset under whose name it stands."""

from __future__ import annotations

import json
import math
from copy import copy
from pathlib import Path

import pytest

from lightning_xattn import create_explainability_report
from lightning_xattn.evaluation.fusion_samples import describe_modalities, most_confident_unsupported
from lightning_xattn.evaluation.statistics import Column
from lightning_xattn.evaluation.support import unused
from lightning_xattn.functional.error_detection import AddedValue
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.report.key_points import key_points
from tests.explained import dataset, summary
from tests.report.conftest import CLASSES, SUBSETS


@pytest.fixture(scope="module")
def facts(result):
    return json.loads(create_explainability_report(result, format="json"))


def plain(one):
    """A dataclass as JSON has it."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in vars(one).items()
    }


def test_what_the_data_set_is(result, facts):
    assert set(facts) == {
        *("kind", "class_names", "classes_by", "axes", "table", "training", "key_points", "fusion", "layers"),
    }
    assert (facts["kind"], facts["class_names"], facts["classes_by"]) == ("dataset", list(CLASSES), "target")
    assert (facts["axes"], facts["table"], facts["training"]) == ({}, str(result.table), None)
    assert facts["key_points"] == {label: sentence for label, sentence, _ in key_points(result).items}


def test_each_subset_of_a_layer_has_its_own_samples_groups_and_numbers(result, members, facts):
    (layer,), one, fusion = facts["layers"], result.headline, result.fusion
    subsets = {"all": (None, None), **SUBSETS, "no class": (len(CLASSES), None)}
    assert [found["name"] for found in layer["groups"]] == ["all", *CLASSES, "no class", "correct", "incorrect"]
    kinds = ["all", *["class"] * 4, "unclassified", "outcome", "outcome"]
    assert [found["group"] for found in layer["groups"]] == kinds
    assert [found["class_id"] for found in layer["groups"]] == [None, 0, 1, 2, 3, None, None, None]
    for found in layer["groups"]:
        subset, chosen = subsets[found["name"]], members[found["name"]]
        assert found["samples"] == int(chosen.sum())
        assert found["groups"] == len(fusion.groups[chosen].unique())
        right, wrong = (int((chosen & (fusion.outcomes == outcome)).sum()) for outcome in (CORRECT, INCORRECT))
        assert (found["correct"], found["incorrect"]) == (right, wrong)
        is_told = right + wrong and found["name"] not in ("correct", "incorrect")
        assert found["accuracy"]["mean"] == (pytest.approx(right / (right + wrong)) if is_told else None)
        ends = one.accuracy_interval(subset[0]) if is_told else (None, None)
        assert (found["accuracy"]["low"], found["accuracy"]["high"]) == ends
        assert found["accuracy"]["count"] == right + wrong
        assert set(found["numbers"]) == {str(column) for column in one.columns if column.head is None}
        for name, number in found["numbers"].items():
            of_subset = Column.parse(name), *subset
            low, high = one.interval(*of_subset)
            assert number == {
                **{"mean": one.mean(*of_subset), "std": one.std(*of_subset), "low": low, "high": high},
                **{"count": one.count(*of_subset), "groups": one.groups(*of_subset)},
            }


def test_a_layer_has_its_counts_and_what_is_compared(result, facts):
    (layer,), one = facts["layers"], result.headline
    for score in ("confidence", "alignment", "entropy"):
        assert layer["outcomes"][score] == plain(one.compare(Column(score)))
    assert set(layer["outcomes"]) == {"confidence", "alignment", "entropy"}
    assert layer["directions"] == ["left_to_right", "right_to_left"]
    assert (layer["samples"], layer["group_noun"], layer["unclassified"]) == (130, "groups", 7)
    assert (layer["alignment_null"], layer["undefined"]) == (one.alignment_null, {})
    assert (layer["layer"], layer["other_lengths"]) == (next(iter(result.summaries)), 0)
    broken = summary([0, 1, 2] * 13, [CORRECT] * 39, tied=(1, 2), broken=(4,))
    several = dataset(result.headline, broken, other_lengths={"fusion.1": 4}, table=Path("rows"))
    got = json.loads(create_explainability_report(several, format="json"))
    assert got["table"] == "rows"
    first, second = got["layers"]
    assert (first["layer"], first["other_lengths"], second["layer"], second["other_lengths"]) == (
        *("fusion.0", 0),
        *("fusion.1", 4),
    )
    assert (second["samples"], second["ties"], second["invalid_rows"], second["group_noun"]) == (39, 2, 15, None)
    assert (second["undefined_share"], second["wholly_masked"]) == (pytest.approx(1 / 39), 0)
    assert second["undefined"]["eeg_to_spec"].startswith("1 of 39 samples with no valid row")
    assert second["groups"][1]["groups"] is None


def test_each_subset_of_the_modalities_has_its_own_numbers_and_shares(result, facts):
    found, fusion = facts["fusion"], result.fusion
    subsets = {"all": (None, None), **SUBSETS}
    assert [one["name"] for one in found["subsets"]] == list(subsets)
    assert [one["group"] for one in found["subsets"]] == ["all", *["class"] * 4, "outcome", "outcome"]
    for one in found["subsets"]:
        subset = subsets[one["name"]]
        assert set(one["numbers"]) == {name for name in fusion.numbers if not name.startswith("error/")}
        for name, number in one["numbers"].items():
            assert number == plain(fusion.estimate(name, *subset)), name
        assert one["shares"] == {name: plain(fusion.share(name, *subset)) for name in ("left", "right")}
    assert len({one["shares"]["left"]["mean"] for one in found["subsets"]}) == 7
    assert found["outcomes"] == {score: plain(fusion.compare(score)) for score in ("confidence", "support")}
    for score in found["outcomes"].values():
        assert score["low"] < score["auroc"] < score["high"]


def test_the_modalities_are_described(result, facts):
    found, fusion = facts["fusion"], result.fusion
    assert (found["modalities"], found["sources"]) == (["left", "right"], list(fusion.sources))
    assert (found["samples"], found["groups"], found["group_noun"]) == (130, 23, "groups")
    assert (found["nonfinite"], found["missing"]) == (0, {})
    assert found["largest_class"] == pytest.approx(45 / 123)
    assert found["sizes"] == {name: plain(fusion.size(name)) for name in ("left", "right")}
    assert [one["direction"] for one in found["attention"]] == ["left_to_right", "right_to_left"]
    for one, (direction, replaced) in zip(found["attention"], fusion.replaced.items(), strict=True):
        assert one["faithfulness"] == plain(fusion.faithfulness(direction))
        assert one["reference"] == plain(fusion.faithfulness(direction, "reference"))
        assert one["faithfulness"]["mean"] != one["reference"]["mean"]
        assert (one["faithfulness_problem"], one["without_reference"]) == ("", replaced.without_reference)
        assert one["at_attention"] == replaced.at_attention
    places = most_confident_unsupported(fusion)
    assert [one["sample_idx"] for one in found["unsupported"]] == [int(fusion.sample_numbers[i]) for i in places]
    for one, i in zip(found["unsupported"], places, strict=True):
        told = describe_modalities(fusion, i, CLASSES)
        assert one["modalities"]["support"] == pytest.approx(told.support)
        assert one["modalities"]["supporters"] == list(told.supporters) == []
        assert one["modalities"]["predicted"] == told.predicted
        assert one["modalities"]["contributions"] == pytest.approx(told.contributions)


def test_support_is_described(result, facts):
    found, fusion = facts["fusion"], result.fusion
    for key, cells in (("support", fusion.cells), ("right", fusion.right_cells)):
        assert [one["key"] for one in found[key]] == [one.key for one in cells]
        for one, cell in zip(found[key], cells, strict=True):
            assert (one["name"], one["samples"], one["groups"]) == (cell.name, cell.samples, cell.groups)
            for name in ("share", "accuracy", "confidence", "calibration_gap"):
                assert one[name] == plain(getattr(cell, name))
    assert found["support_problem"] == ""
    assert found["added_value"] is None
    assert found["added_value_problem"] == fusion.added_value
    assert found["probe_macro_auroc"] == {name: plain(one) for name, one in fusion.probe_aurocs.items()}
    assert found["probe_calibration_error"] == fusion.calibration_errors
    assert found["joint_auroc_gain"] == {name: plain(one) for name, one in fusion.auroc_gains.items()}
    added = AddedValue(0.9, 0.7, *[Estimate(0.2, 0.1, 0.3, 99)] * 2, *(0.1, 0.2, 0.03, 0.05), 40)
    fusion = copy(fusion)
    fusion.added_value = added
    shown = json.loads(create_explainability_report(dataset(fusion=fusion, class_names=CLASSES), format="json"))
    expected = vars(added) | {name: plain(getattr(added, name)) for name in ("delta_auroc", "delta_log_loss")}
    assert shown["fusion"]["added_value"] == expected
    assert shown["fusion"]["added_value_problem"] == ""
    assert found["unused"] == {name: unused(fusion, name) for name in ("left", "right")}


def test_what_is_not_known_is_null(result):
    def of_fusion(**changed):
        fusion = copy(result.fusion)
        vars(fusion).update(changed)
        shown = dataset(fusion=fusion, class_names=CLASSES, axes={})
        return json.loads(create_explainability_report(shown, format="json"))["fusion"]

    without = of_fusion(contribution_problem="no pairs", nonfinite=3, missing={"left": 2}, group_noun=None)
    assert (without["contribution_problem"], without["sizes"], without["groups"]) == ("no pairs", None, None)
    assert (without["nonfinite"], without["missing"]) == (3, {"left": 2})
    assert {one["shares"] for one in without["subsets"]} == {None}
    regression = of_fusion(is_regression=True, probe_problems={"left": "no targets"})
    assert {one["shares"] for one in regression["subsets"]} == {None}
    assert regression["probe_problems"] == {"left": "no targets"}
    assert regression["sizes"]["left"]["mean"] > 0
    unknown = copy(result.fusion)
    unknown.numbers = unknown.numbers | {"confidence": unknown.numbers["confidence"] * math.nan}
    assert of_fusion(numbers=unknown.numbers)["outcomes"] == {}
