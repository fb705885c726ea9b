"""The key points of a data set, and the samples that its page lists."""

import math
from copy import copy
from dataclasses import replace

import pytest
import torch

from lightning_xattn import ExplainabilityCapture, create_explainability_report
from lightning_xattn.core.wording import say_interval
from lightning_xattn.evaluation.layer_summary import Comparison
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.report import samples as samples_module
from lightning_xattn.report.key_points import describe_errors, describe_shares, key_points
from lightning_xattn.report.samples import list_batch, list_dataset
from tests.attribution.models import NAMED, Concatenation, said_data, trained, watch_of
from tests.toy import PaddedToyModule, padded_toy_data, run_toy


@pytest.fixture(scope="module")
def result():
    data, _ = said_data(160, noise=1.5)
    callback = watch_of(trained(Concatenation(), data, epochs=15), data, class_names=list("abcd"), **NAMED)
    return DatasetResult({}, callback.fusion_summaries["val"], tuple("abcd"), "target", {}, None)


def compared(auroc, low, high):
    return Comparison(auroc, low, high, 50, 50, gap=0.1, class_adjusted_gap=0.1)


NO_SCORE = "no score predicts errors clearly better than confidence. AUROC:"


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        (
            {"confidence": compared(0.7, 0.6, 0.8), "conflict": compared(0.3, 0.2, 0.4)},
            f"{NO_SCORE} confidence 0.70 (95 % CI 0.60 to 0.80; higher in correct predictions); "
            "conflict 0.30 (95 % CI 0.20 to 0.40; lower in correct predictions).",
        ),
        (
            {"confidence": compared(0.25, 0.2, 0.3), "conflict": compared(0.1, 0.05, 0.15)},
            "conflict predicts errors clearly better than confidence. AUROC: confidence 0.25 (95 % CI 0.20 to 0.30; "
            "lower in correct predictions); conflict 0.10 (95 % CI 0.05 to 0.15; lower in correct predictions).",
        ),
        (
            {"confidence": compared(0.47, 0.23, 0.72), "alignment": compared(0.54, 0.29, 0.78)},
            f"{NO_SCORE} confidence 0.47 (95 % CI 0.23 to 0.72; no difference shown); "
            "alignment 0.54 (95 % CI 0.29 to 0.78; no difference shown).",
        ),
        (
            {"confidence": compared(0.7, 0.6, 0.8)},
            f"{NO_SCORE} confidence 0.70 (95 % CI 0.60 to 0.80; higher in correct predictions).",
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


def test_probes_and_contributions_have_a_sentence_each(result):
    sentences = {label: sentence for label, sentence, _ in key_points(result).items}
    share = result.fusion.share("left")
    assert 0.5 < share.low < 2 / 3 < share.high
    left = f"Left {100 * share.mean:.1f} % (95 % CI {100 * share.low:.1f} to {100 * share.high:.1f} %); Right "
    assert sentences["Contribution"].startswith(f"no modality contributes clearly more than two thirds. Shares: {left}")
    accuracy = result.fusion.estimate("right/left")
    assert sentences["Probe"].startswith(f"the probe on Left is right in {100 * accuracy.mean:.1f} % (95 % CI ")


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
def test_a_modality_that_is_always_right_is_not_right_for_certain(result, noun):
    """As 16 of 16 samples: the key points and the table."""
    summary = copy(result.fusion)
    summary.numbers = summary.numbers | {"right/left": torch.ones(160, dtype=torch.float64)}
    summary.numbers["right/left"][16:] = math.nan
    summary.group_noun, summary.groups = noun, torch.arange(160) // 2
    # 16 samples, or of two each 8 patients: n / (n + t(0.975, n - 1) ** 2).
    low = {"patients": 58.9, None: 77.9}[noun]
    with_it = replace(result, fusion=summary)
    report = create_explainability_report(with_it)
    assert f"right in 100.0 % (95 % CI {low} to 100.0 %) of the samples" in report
    assert f"100.0 % ({low} to 100.0 %)" in report


def test_an_interval_that_rounds_to_nothing_is_not_certain():
    assert say_interval(0.12, 0.3) == "0.120 to 0.300"
    assert say_interval(1, 1) == say_interval(0.9997, 1.0003) == "± less than 0.001"
    assert say_interval(0.12, 0.3, 1, as_percent=True) == "12.0 to 30.0 %"
    assert say_interval(0.5, 0.5002, 1, as_percent=True) == "± less than 0.1 %"


def test_those_with_maps_are_listed_before_others(monkeypatch):
    monkeypatch.setattr(samples_module, "LISTED", 3)
    assert samples_module._choose_listed(range(10), lambda one: one in (4, 8)) == [0, 4, 8]


def test_samples_of_two_processes_keep_what_is_theirs(result):
    """As of a DistributedSampler: each process numbers its own."""
    whole = result.fusion
    single = list(list_dataset(result, {}))
    rows = dict(whole.rows)
    numbers = whole.sample_numbers
    whole.rows = rows | {"process": numbers % 2}
    whole.sample_numbers = numbers // 2
    try:
        entries = list(list_dataset(result, {}))
    finally:
        whole.rows, whole.sample_numbers = rows, numbers
    assert len({one.name for one in entries}) == len(entries) == 160
    assert all((one.predicted == one.true) == (one.outcome == "correct") for one in entries)
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


def test_a_page_is_a_format(result, tmp_path):
    report = create_explainability_report(result, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == report
    assert report.count('<details class="sample') == 160
