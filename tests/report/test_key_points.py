"""Key points of a data set: the summary's numbers in sentences, and no claim that they do not support."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace

import pytest
import torch

from lightning_xattn import create_explainability_report
from lightning_xattn.core.wording import say_interval
from lightning_xattn.functional.error_detection import AddedValue
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.functional.outcomes import CORRECT
from lightning_xattn.report.key_points import describe_added_value, describe_limits, describe_shares, key_points
from tests.explained import dataset
from tests.report.conftest import CLASSES
from tests.report.test_tables import decimals, in_brackets, in_percent, tables_of


@pytest.fixture
def alone(result):
    """The modalities without a layer, a table and maps."""
    return replace(result, summaries={}, table=None, maps={})


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
    first, none = fusion.cells[0], fusion.support_cell >= 3
    right = fusion.outcomes[none & (fusion.target >= 0)] == CORRECT
    share = decimals(100 * float(none.double().mean()), 1)
    sure = decimals(100 * float(fusion.numbers["confidence"][none].mean()), 1)
    accuracy = in_percent(fusion.estimate("correct", among=none), "95 % CI ")
    assert accuracy.startswith(f"{decimals(100 * float(right.double().mean()), 1)} % ")
    assert sentences["Support"] == (
        f"both probes support {decimals(100 * first.share.mean, 1)} % of the predictions, accuracy "
        f"{in_percent(first.accuracy, '95 % CI ')}; neither supports {share} %, accuracy {accuracy} at a mean "
        f"confidence of {sure} %."
    )
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
    assert sentences["Errors"] == (
        f"whether support detects errors that confidence misses is not computed: {fusion.added_value}."
    )


@pytest.mark.parametrize(
    ("delta", "loss", "said"),
    [
        ((0.21, 0.17, 0.25), (-0.3, -0.4, -0.2), "support detects"),
        ((0.21, 0.17, 0.25), (-0.3, -0.4, 0.2), "support is not shown to detect"),
        ((0.21, -0.17, 0.25), (-0.3, -0.4, -0.2), "support is not shown to detect"),
        ((0.21, math.nan, math.nan), (-0.3, -0.4, -0.2), "support is not shown to detect"),
    ],
)
def test_what_support_adds_is_said_in_one_sentence(result, delta, loss, said):
    fusion = copy(result.fusion)
    fusion.added_value = AddedValue(
        0.91, 0.7, Estimate(*delta, 400), Estimate(*loss, 400), *(0.1, 0.2), *(0.034, 0.051), 55
    )
    interval = "" if math.isnan(delta[1]) else f", 95 % CI {decimals(delta[1], 2)} to {decimals(delta[2], 2)}"
    but = "; the log loss is not clearly better (-0.300 (-0.400 to 0.200) nats)" if loss[2] > 0 else ""
    assert describe_added_value(fusion) == (
        f"in this evaluation {said} errors that confidence misses: AUROC 0.70 → 0.91 (+0.21{interval}){but}."
    )
    report = create_explainability_report(replace(result, fusion=fusion))
    assert f"**Errors:** {describe_added_value(fusion)}" in report
    assert (
        "**Confidence → confidence and support:** errors among the 80 % of predictions that look most reliable "
        "5.1 % → 3.4 %; area under the risk-coverage curve 0.200 → 0.100; log loss of the error model "
        f"{in_brackets(fusion.added_value.delta_log_loss, signed=True)} nats"
    ) in report


def test_an_unused_modality_is_named(result):
    fusion = copy(result.fusion)
    fusion.numbers = dict(fusion.numbers)
    fusion.numbers["phi/left"], fusion.numbers["phi/right"] = torch.full((2, 130), 0.5).double()
    fusion.numbers["phi/right"] = torch.linspace(-0.05, 0.05, 130).double()
    fusion.numbers["right/joint"] = (torch.arange(130) % 10 > 0).double()
    fusion.numbers["joint_gain/right"] = (torch.arange(130) % 4 == 1).double()
    share, gain = in_percent(fusion.share("right"), "95 % CI "), fusion.auroc_gains["right"].mean
    assert dict(describe_limits(fusion))["Unused"] == (
        f"the model does not use Right (share {share}), though a linear probe of all modalities is right for 90.0 % "
        f"with Right and for {decimals(100 * (117 - 33) / 130, 1)} % without it (macro AUROC "
        f"{gain:+.3f} with it)."
    )


def test_key_points_of_a_regression_and_of_layers_alone(result):
    fusion = copy(result.fusion)
    fusion.is_regression = True
    said = {label: text for label, text, _ in key_points(dataset(fusion=fusion, class_names=CLASSES)).items}
    sizes = [decimals(fusion.size(name).mean) for name in ("left", "right")]
    assert said["Contribution"] == (
        f"Left moves the output by {sizes[0]}, Right moves the output by {sizes[1]}, on average over samples."
    )
    right = in_percent(fusion.estimate("correct"), "95 % CI ")
    assert said["Samples"] == f"130 samples of 23 groups; the model is right for {right}."
    assert {label for label, _, _ in key_points(dataset(result.headline)).items} == {"Samples"}
    report = create_explainability_report(dataset(fusion=fusion, class_names=CLASSES))
    (header, rows), *_ = tables_of(report)
    assert header == ["modality", "probe accuracy", "macro AUROC", "calibration error", "mean size of the contribution"]
    assert rows["Right"][3] == in_brackets(fusion.size("right"))
    assert f"**Interaction (of the output):** {in_brackets(fusion.estimate('interaction'), signed=True)}" in report
    assert "EMAP" not in report


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
