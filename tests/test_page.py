"""What a page says first, and whose samples it lists."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_xattn import ExplainabilityCapture, create_explainability_report
from lightning_xattn.fusion.samples import SampleModalities
from lightning_xattn.report import listing
from lightning_xattn.report.facts import collect_facts
from lightning_xattn.report.listing import _entry, entries_of_batch, entries_of_dataset
from lightning_xattn.report.modalities import _verdict, collect_fusion
from lightning_xattn.report.short import in_short
from lightning_xattn.results import DatasetResult
from lightning_xattn.summary import Comparison
from tests.fusion.models import NAMED, Concatenation, said_data, trained, watch_of
from tests.toy import PaddedToyModule, padded_toy_data, run_toy


@pytest.fixture(scope="module")
def result():
    data, _ = said_data(160, noise=1.5)
    watch = watch_of(trained(Concatenation(), data, epochs=15), data, class_names=list("abcd"), **NAMED)
    return DatasetResult({}, watch.fusion_summaries["val"], tuple("abcd"), "target", {}, None)


def compared(auroc, low, high):
    return Comparison(auroc, low, high, 50, 50, None, None, 2 * auroc - 1, 0.1, 0.1)


NO_SCORE = "No score tells errors clearly better than confidence. AUROC:"


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        (
            {"confidence": compared(0.7, 0.6, 0.8), "conflict": compared(0.3, 0.2, 0.4)},
            f"{NO_SCORE} confidence 0.70 (0.60 to 0.80; higher in correct predictions); "
            "conflict 0.70 (0.60 to 0.80; lower in correct predictions).",
        ),
        (
            {"confidence": compared(0.25, 0.2, 0.3), "conflict": compared(0.1, 0.05, 0.15)},
            "Conflict tells errors clearly better than confidence. AUROC: confidence 0.25 (0.20 to 0.30; lower in "
            "correct predictions); conflict 0.90 (0.85 to 0.95; lower in correct predictions).",
        ),
        (
            {"confidence": compared(0.47, 0.23, 0.72), "alignment": compared(0.54, 0.29, 0.78)},
            f"{NO_SCORE} confidence 0.47 (0.23 to 0.72; no difference shown); "
            "alignment 0.54 (0.29 to 0.78; no difference shown).",
        ),
        (
            {"confidence": compared(0.7, 0.6, 0.8)},
            f"{NO_SCORE} confidence 0.70 (0.60 to 0.80; higher in correct predictions).",
        ),
        (
            {"confidence": compared(0.7, math.nan, math.nan)},
            "Whether a score tells errors cannot be said of 50 correct and 50 incorrect predictions: nothing is "
            "claimed of fewer than 5 groups, or samples, of either.",
        ),
        ({}, "Whether a score tells errors cannot be said: confidence, the baseline, is not known."),
    ],
)
def test_confidence_is_the_baseline_and_keeps_its_direction(result, outcomes, said):
    facts = collect_facts(result)
    facts["fusion"]["outcomes"] = outcomes
    assert list(in_short(facts))[-1] == said


def test_what_is_used_is_said_in_whole_sentences(result):
    sentences = list(in_short(collect_facts(result)))
    assert any(sentence.startswith("What the model uses: mostly Left (shares: ") for sentence in sentences)
    assert any(sentence.startswith("Left can be read: by itself it is right in ") for sentence in sentences)


@pytest.mark.parametrize(("low", "said"), [(0.55, "mostly Left"), (0.4, "no modality clearly more")])
def test_a_model_uses_mostly_one_of_three_if_that_carries_more_than_half(result, low, said):
    fusion = collect_fusion(result.fusion, "abcd")
    first = fusion["modalities"][0]
    share = replace(first["share"], mean=0.6, low=low, high=0.7)
    others = [first | {"name": name, "share": replace(share, mean=0.2, low=0.1, high=0.3)} for name in ("x", "y")]
    sentences = list(_verdict({**fusion, "modalities": [first | {"share": share}, *others]}))
    assert sentences[1].startswith(f"Uses: {said} (shares: Left 0.60")


def test_a_value_has_no_shares_in_the_list(result):
    one = SampleModalities(0.1, {}, None, None, math.nan, {"left": 3.0, "right": 1.0}, None)
    assert math.isnan(_entry(0, "0", one, None, {}, []).numbers["share"])
    assert _entry(0, "0", replace(one, predicted="a"), None, {}, []).numbers["share"] == 0.75


def test_those_with_maps_are_listed_before_others(monkeypatch):
    monkeypatch.setattr(listing, "LISTED", 3)
    assert listing._listed(range(10), lambda one: one in (4, 8)) == [0, 4, 8]


def test_samples_of_two_processes_keep_what_is_theirs(result):
    """As of a DistributedSampler: each process numbers its own."""
    whole = result.fusion
    single = list(entries_of_dataset(result, {}))
    rows = dict(whole.rows)
    numbers = whole.sample_numbers
    whole.rows = rows | {"process": numbers % 2}
    whole.sample_numbers = numbers // 2
    try:
        entries = list(entries_of_dataset(result, {}))
    finally:
        whole.rows, whole.sample_numbers = rows, numbers
    assert len({one.name for one in entries}) == len(entries) == 160
    assert all((one.predicted == one.true) == (one.outcome == "correct") for one in entries)
    assert sorted(one.says for one in entries) == sorted(one.says for one in single)


def test_maps_leave_out_what_a_mask_hides(monkeypatch):
    from lightning_xattn import visualizations

    drawn = []
    monkeypatch.setattr(visualizations, "map_picture", lambda values: drawn.append(values) or b"")
    torch.manual_seed(0)
    explainer = ExplainabilityCapture(PaddedToyModule(), predict=run_toy)
    batch = explainer.explain_batch(padded_toy_data(6)[:])
    list(entries_of_batch(batch, collect_facts(batch), {}))
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
