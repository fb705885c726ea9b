"""Key points of a data set: the summary's numbers in sentences, and no claim that they do not support."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace

import pytest
import torch

from lightning_xattn import create_explainability_report
from lightning_xattn.core.wording import say_interval
from lightning_xattn.evaluation.layer_summary import Comparison
from lightning_xattn.evaluation.statistics import Column
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.report.key_points import describe_errors, describe_shares, key_points
from tests.explained import dataset
from tests.report.conftest import CLASSES
from tests.report.test_tables import decimals, in_brackets, in_percent, tables_of


@pytest.fixture
def alone(result):
    """The modalities without a layer, a table and maps."""
    return replace(result, summaries={}, table=None, maps={})


def compared(auroc, low, high, error_side="low"):
    return Comparison(auroc, low, high, 50, 50, error_side=error_side, gap=0.1, class_adjusted_gap=0.1)


NO_SCORE = "no score detects errors clearly better than confidence. AUROC:"


def test_key_points_say_the_summarys_numbers(result, members):
    fusion, sentences = result.fusion, {label: sentence for label, sentence, _ in key_points(result).items}
    low, high = (decimals(100 * end, 1) for end in result.headline.accuracy_interval())
    right, wrong = (int(members[name].sum()) for name in ("correct", "incorrect"))
    assert sentences["Samples"] == (
        f"130 samples of 23 groups; the model predicts {right} of {right + wrong} correctly: "
        f"{decimals(100 * right / (right + wrong), 1)} % (95 % CI {low} to {high} %)."
    )
    assert sentences["Table"] == f"the numbers of each sample are in {result.table}."
    probes = [in_percent(fusion.estimate(f"right/{name}"), "95 % CI ") for name in ("left", "right")]
    assert sentences["Probe"] == (
        f"the probe on Left is right in {probes[0]} of the samples; the probe on Right is right in {probes[1]} of the "
        f"samples; the largest class has {decimals(100 * 45 / 123, 1)} %."
    )
    conflict = fusion.estimate("conflict")
    mean, low, high = (decimals(number, 2) for number in (conflict.mean, conflict.low, conflict.high))
    assert sentences["Conflict"].startswith(f"{mean} on average (95 % CI {low} to {high}; ")
    shares = [in_percent(fusion.share(name), "95 % CI ") for name in ("left", "right")]
    assert sentences["Contribution"] == f"the model mostly uses Left. Shares: Left {shares[0]}; Right {shares[1]}."
    ranked = []
    for name, direction in zip(("Right", "Left"), fusion.replaced, strict=True):
        found = fusion.faithfulness(direction)
        mean, low, high = (decimals(number, 2) for number in (found.mean, found.low, found.high))
        ranks = "attention ranks" if found.low > 0 else "attention is not shown to rank"
        tokens = f"the {name} tokens by how much predictions depend on them"
        ranked.append(f"{ranks} {tokens} ({mean}, 95 % CI {low} to {high})")
    assert sentences["Faithfulness"] == f"{'; '.join(ranked)}."
    scores = {name: fusion.compare(name) for name in ("confidence", "conflict")}
    # The layer's confidence is that of all samples, where the fusion's may be of some.
    scores |= {name: result.headline.compare(Column(name)) for name in ("confidence", "alignment", "entropy")}
    for name, one in scores.items():
        auroc, low, high = (decimals(number, 2) for number in (one.auroc, one.low, one.high))
        side = "high" if name in ("conflict", "entropy") else "low"
        assert f"{side} {name} {auroc} (95 % CI {low} to {high}; " in sentences["Errors"]


def test_key_points_of_a_regression_and_of_layers_alone(result):
    fusion = copy(result.fusion)
    fusion.is_regression = True
    said = {label: text for label, text, _ in key_points(dataset(fusion=fusion, class_names=CLASSES)).items}
    sizes = [decimals(fusion.size(name).mean) for name in ("left", "right")]
    assert said["Contribution"] == (
        f"Left moves the output by {sizes[0]}, Right moves the output by {sizes[1]}, on average over samples."
    )
    assert said["Samples"] == "130 samples of 23 groups."
    assert {label for label, _, _ in key_points(dataset(result.headline)).items} == {"Samples", "Errors"}
    report = create_explainability_report(dataset(fusion=fusion, class_names=CLASSES))
    (header, rows), *_ = tables_of(report)
    assert header == ["modality", "probe accuracy", "mean size of the contribution"]
    assert rows["Right"][1] == in_brackets(fusion.size("right"))
    assert f"**Interaction (of the output):** {in_brackets(fusion.estimate('interaction'), signed=True)}" in report
    assert "EMAP" not in report


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        (
            {"confidence": compared(0.7, 0.6, 0.8), "conflict": compared(0.3, 0.2, 0.4, "high")},
            f"{NO_SCORE} low confidence 0.70 (95 % CI 0.60 to 0.80; detects errors); "
            "high conflict 0.30 (95 % CI 0.20 to 0.40; points the other way).",
        ),
        (
            {"confidence": compared(0.25, 0.2, 0.3), "conflict": compared(0.1, 0.05, 0.15, "high")},
            f"{NO_SCORE} low confidence 0.25 (95 % CI 0.20 to 0.30; points the other way); "
            "high conflict 0.10 (95 % CI 0.05 to 0.15; points the other way).",
        ),
        (
            {"confidence": compared(0.6, 0.5, 0.7), "conflict": compared(0.9, 0.85, 0.95, "high")},
            "conflict detects errors clearly better than confidence. AUROC: low confidence 0.60 (95 % CI 0.50 to 0.70; "
            "not shown to detect errors); high conflict 0.90 (95 % CI 0.85 to 0.95; detects errors).",
        ),
        (
            {"confidence": compared(0.25, 0.2, 0.3), "alignment": compared(0.45, 0.4, 0.5)},
            f"{NO_SCORE} low confidence 0.25 (95 % CI 0.20 to 0.30; points the other way); "
            "low alignment 0.45 (95 % CI 0.40 to 0.50; not shown to detect errors).",
        ),
        (
            {"confidence": compared(0.47, 0.23, 0.72), "alignment": compared(0.54, 0.29, 0.78)},
            f"{NO_SCORE} low confidence 0.47 (95 % CI 0.23 to 0.72; not shown to detect errors); "
            "low alignment 0.54 (95 % CI 0.29 to 0.78; not shown to detect errors).",
        ),
        (
            {"confidence": compared(0.7, 0.6, 0.8)},
            f"{NO_SCORE} low confidence 0.70 (95 % CI 0.60 to 0.80; detects errors).",
        ),
        (
            {"confidence": compared(0.7, math.nan, math.nan)},
            "no claim with 50 correct and 50 incorrect predictions: it needs 5 groups, or samples, of either.",
        ),
        ({}, "no score is compared, as confidence, the baseline, is not known."),
    ],
)
def test_confidence_is_the_baseline(outcomes, said):
    assert describe_errors(outcomes) == said


@pytest.mark.parametrize("others", [("x",), ("x", "y"), ("x", "y", "z")])
@pytest.mark.parametrize(
    ("low", "noun", "said"),
    [
        (0.67, "patients", "the model mostly uses Left"),
        (0.66, "patients", "no modality contributes clearly more than two thirds"),
        (0.55, None, "no modality contributes clearly more than two thirds"),
        (math.nan, "patients", "no claim about a main modality with fewer than 5 patients"),
        (math.nan, None, "no claim about a main modality with fewer than 5 samples"),
    ],
)
def test_a_model_uses_mostly_one_modality_if_its_share_is_clearly_above_two_thirds(others, low, noun, said):
    share = Estimate(0.8, low, 0.9, 50, None)
    rest = Estimate(0.2 / len(others), 0.0, 0.3, 50, None)
    sentence = describe_shares({"left": share, **dict.fromkeys(others, rest)}, noun)
    interval = "" if math.isnan(low) else f" (95 % CI {100 * low:.1f} to 90.0 %)"
    assert sentence.startswith(f"{said}. Shares: Left 80.0 %{interval}; X ")


@pytest.mark.parametrize("noun", ["patients", None])
def test_a_modality_that_is_always_right_is_not_right_for_certain(alone, noun):
    """As 16 of 16 samples: the key points and the table."""
    summary = copy(alone.fusion)
    summary.numbers = summary.numbers | {"right/left": torch.ones(130, dtype=torch.float64)}
    summary.numbers["right/left"][16:] = math.nan
    summary.group_noun, summary.groups = noun, torch.arange(130) // 2
    # 16 samples, or of two each 8 patients: n / (n + t(0.975, n - 1) ** 2).
    low = {"patients": 58.9, None: 77.9}[noun]
    with_it = replace(alone, fusion=summary)
    report = create_explainability_report(with_it)
    assert f"right in 100.0 % (95 % CI {low} to 100.0 %) of the samples" in report
    assert f"100.0 % ({low} to 100.0 %)" in report


def test_an_interval_that_rounds_to_nothing_is_not_certain():
    assert say_interval(0.12, 0.3) == "0.120 to 0.300"
    assert say_interval(1, 1) == say_interval(0.9997, 1.0003) == "± less than 0.001"
    assert say_interval(0.12, 0.3, 1, as_percent=True) == "12.0 to 30.0 %"
    assert say_interval(0.5, 0.5002, 1, as_percent=True) == "± less than 0.1 %"
