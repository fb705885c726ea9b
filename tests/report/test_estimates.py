"""Subsets of samples, counts and accuracies that are known by hand, and estimates as text."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_xattn.evaluation.layer_summary import Comparison
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT, UNKNOWN
from lightning_xattn.report.document import Items, Paragraph, Table
from lightning_xattn.report.estimates import (
    Subset,
    compare_outcomes,
    count_outcomes,
    estimate_accuracy,
    expect_misses,
    explain_brackets,
    format_estimate,
    format_percent,
    list_layer_subsets,
    list_subsets,
)
from tests.explained import NAMES, summary

CLASSES = [0] * 6 + [1] * 4 + [-1] * 3
OUTCOMES = [*[CORRECT] * 4, INCORRECT, UNKNOWN, *[INCORRECT] * 2, CORRECT, UNKNOWN, INCORRECT, CORRECT, CORRECT]
COUNTS = {"all": (7, 4), "Seizure": (4, 1), "LPD": (1, 2), "GPD": (0, 0), "no class": (2, 1)}
COUNTS |= {"correct": (7, 0), "incorrect": (0, 4)}
"""Of the thirteen samples: how many predictions of each subset are correct, and how many are not."""

ALL, SEIZURE = Subset("all", "all"), Subset("class", "Seizure", 0, None)
OF_OUTCOMES = [Subset("outcome", "correct", None, CORRECT), Subset("outcome", "incorrect", None, INCORRECT)]


@pytest.fixture(scope="module")
def layer():
    return summary(CLASSES, OUTCOMES)


def test_subsets_are_all_samples_each_class_those_without_one_and_each_outcome():
    assert list_subsets(["Seizure"]) == [ALL, SEIZURE, *OF_OUTCOMES]
    assert list_subsets(["Seizure"], has_outcomes=False) == [ALL, SEIZURE]
    unclassified = Subset("unclassified", "no class", 1)
    assert list_subsets(["Seizure"], unclassified=1) == [ALL, SEIZURE, unclassified, *OF_OUTCOMES]
    assert [one.chosen for one in (ALL, SEIZURE, *OF_OUTCOMES)] == [
        *((None, None), (0, None)),
        *((None, CORRECT), (None, INCORRECT)),
    ]


def test_a_layer_has_the_subsets_that_it_has_samples_of(layer):
    classes = [Subset("class", name, class_id) for class_id, name in enumerate(NAMES)]
    unclassified = Subset("unclassified", "no class", 3)
    assert list_layer_subsets(layer, NAMES) == [ALL, *classes, unclassified, *OF_OUTCOMES]
    assert list_layer_subsets(summary([0, 1], [UNKNOWN, INCORRECT]), NAMES) == [ALL, *classes, *OF_OUTCOMES]
    assert list_layer_subsets(summary([0, 1], [CORRECT, UNKNOWN]), NAMES) == [ALL, *classes, *OF_OUTCOMES]
    assert list_layer_subsets(summary([0, -1], [UNKNOWN] * 2), NAMES) == [ALL, *classes, unclassified]


def test_each_subset_has_its_correct_and_incorrect_predictions_and_its_accuracy(layer):
    subsets = list_layer_subsets(layer, NAMES)
    assert {one.name: count_outcomes(layer, one) for one in subsets} == COUNTS
    nothing = math.nan, math.nan
    for one in subsets:
        correct, incorrect = COUNTS[one.name]
        is_told = one.kind != "outcome" and correct + incorrect > 0
        share = correct / (correct + incorrect) if is_told else math.nan
        # Of fewer than five there is no interval.
        low, high = layer.accuracy_interval(one.class_id) if is_told and correct + incorrect >= 5 else nothing
        expected = vars(Estimate(share, low, high, correct + incorrect, None))
        assert vars(estimate_accuracy(layer, one)) == pytest.approx(expected, nan_ok=True), one.name
        assert math.isnan(low) or low < share < high


@pytest.mark.parametrize(
    ("ends", "signed", "decimals", "percents", "with_ci"),
    [
        (
            *((0.6354, 0.6216, 0.6468), "+0.635 (0.622 to 0.647)"),
            *("0.635 (0.622 to 0.647)", "63.5 % (62.2 to 64.7 %)", "63.5 % (95 % CI 62.2 to 64.7 %)"),
        ),
        ((-0.25, math.nan, math.nan), "-0.250", "-0.250", "-25.0 %", "-25.0 %"),
        ((math.nan,) * 3, *["undefined"] * 4),
    ],
)
def test_an_estimate_as_text(ends, signed, decimals, percents, with_ci):
    one = Estimate(*ends, 9)
    assert (format_estimate(one, signed=True), format_estimate(one)) == (signed, decimals)
    assert (format_percent(one), format_percent(one, "95 % CI ")) == (percents, with_ci)


def test_what_is_said_of_intervals():
    assert explain_brackets("patients") == Paragraph(
        "In brackets: 95 % CI, by patients; none with fewer than 5 patients."
    )
    assert explain_brackets(None) == Paragraph(
        "In brackets: 95 % CI, samples taken as independent; none with fewer than 5 samples."
    )
    assert expect_misses(50) == Paragraph(
        "Each of these 50 intervals misses the truth once in 20 times: expect about 2.5 of them to miss by chance."
    )


@pytest.mark.parametrize("noun", ["patients", None])
def test_scores_are_compared_in_a_table_and_each_has_a_verdict(noun):
    sizes = {"correct": 30, "incorrect": 9}
    sizes |= {"correct_groups": 7, "incorrect_groups": 6} if noun else {}

    def compared(low, high, error_side="low", gap=0.2, within=0.19):
        auroc = (low + high) / 2
        return Comparison(auroc, low, high, error_side=error_side, gap=gap, class_adjusted_gap=within, **sizes)

    given = {
        "confidence": compared(0.6, 0.8),
        "support": compared(0.45, 0.65, within=0.01),
        "alignment": compared(0.2, 0.4, gap=-0.2, within=math.nan),
        "entropy": compared(math.nan, math.nan, "high"),
    }
    table, verdicts = compare_outcomes(given, noun)
    both = ("30 (7)", "9 (6)") if noun else ("30", "9")
    ends = (" (patients)",) * 2 if noun else ("", "")
    header = "sign of an error", f"correct{ends[0]}", f"incorrect{ends[1]}", "AUROC", "gap", "gap within classes"
    assert [note.partition(":")[0] for note in table.notes] == ["AUROC", "Gap"]
    assert replace(table, notes=()) == Table(
        header,
        [
            ("low confidence", *both, "0.700 (0.600 to 0.800)", "+0.200", "+0.190"),
            ("low support", *both, "0.550 (0.450 to 0.650)", "+0.200", "+0.010"),
            ("low alignment", *both, "0.300 (0.200 to 0.400)", "-0.200", "undefined"),
            ("high entropy", *both, "", "", ""),
        ],
    )
    assert verdicts == Items(
        [
            ("low confidence", "detects errors", ()),
            ("low support", "not shown to detect errors", ()),
            ("low alignment", "points the other way, which may be a difference between classes", ()),
            ("high entropy", f"no claim, fewer than 5 {noun or 'samples'} of an outcome", ()),
        ]
    )
