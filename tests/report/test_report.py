"""Reports hold the numbers that went in: Markdown in the guide's structure, that renders, and strict JSON."""

import json
import re
from itertools import pairwise

import pytest
import torch
from markdown_it import MarkdownIt
from rich.cells import cell_len

from lightning_xattn import create_explainability_report, interpret_sample
from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.wording import decimal
from lightning_xattn.evaluation.layer_summary import Comparison
from lightning_xattn.evaluation.statistics import ALIGNMENT
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT, UNKNOWN
from lightning_xattn.report import print_report
from lightning_xattn.report.estimates import compare_outcomes
from tests.explained import NAMES, NAN, NO_ROW, SINGLE_KEY, batch, dataset, placed, sample, statistics, summary
from tests.messages import tells

CLASSES = [0, 1, 2] * 13
OUTCOMES = [CORRECT, CORRECT, INCORRECT, CORRECT] * 9 + [UNKNOWN] * 3
WRONG = {"predicted_class": 0, "predicted_name": "Seizure", "correct": False, "modality_agreement": 0.12}
UNLABELLED = {"true_class": None, "true_name": None, "correct": None}
WITHOUT_SCORES = {"predicted_class": None, "predicted_name": None, "confidence": None, "probabilities": None}


def text_of(*samples, **values):
    return create_explainability_report(batch(*samples, **values))


def strict(report):
    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    return json.loads(report, parse_constant=refuse)


def json_of(results):
    return strict(create_explainability_report(results, format="json"))


# Markdown of a batch


def test_a_batch_has_the_guides_structure():
    lines = text_of(sample()).splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# Cross-modal attention report",
        "## BATCH-LEVEL STATISTICS",
        "## PER-SAMPLE ANALYSIS",
        "### Sample 0",
        "## How to read this",
    ]
    numbers = "mean=0.1429, std=0.1500, max=0.6000, min=0.0100, entropy=0.6000, sparsity=40.00%"
    assert f"- **EEG → Spec Attention:** {numbers}" in lines
    assert "- **Modality Alignment:** 0.7234" in lines
    start = lines.index("### Sample 0")
    assert lines[start + 2 : start + 8] == [
        "- **Predicted:** 2 (GPD, confidence: 0.8234)",
        "- **Ground Truth:** 2 ✓ CORRECT",
        "- **Modality Agreement:** 0.7234",
        "- **Top EEG→Spec attention:** (1, 4, 0.9123), lift 6.39: RL → 4",
        "  - (0, 6, 0.5000), lift 3.50: LL → 6",
        "- **Top Spec→EEG attention:** (4, 1, 0.8756), lift 6.13: 4 → RL",
    ]
    assert "- **Patterns of attention:** high modality agreement" in lines
    assert "- **Checklist for a correct prediction:** 1 of 4 met" in lines
    assert r"  - ✗ entropy \< 0.5 (EEG→Spec 0.6000)" in lines
    assert "- **Tokens of EEG:** EEG region" in lines


def test_a_batch_claims_no_more_than_it_shows():
    report = " ".join(text_of(sample()).split())
    assert "The mean is 1 / (number of keys) by construction, whatever the model learned." in report
    assert "not why it predicts" in report
    assert "rules of thumb, not evidence" in report
    assert "because of" not in report


def test_a_wrong_prediction_names_both_classes_and_has_its_own_checklist():
    report = text_of(sample(**WRONG, tied=True, sample_id="3911565283", sample_idx=7))
    assert "### Sample 7 (id 3911565283)\n\n- **Predicted:** 0 (Seizure, confidence: 0.8234)\n" in report
    assert (
        "**Ground Truth:** 2 (GPD) ✗ INCORRECT (its top vote is tied: the first of the tied classes counts)" in report
    )
    assert "**Checklist for an incorrect prediction:** 1 of 4 met" in report
    assert "for a correct prediction" not in report
    assert "**Samples:** 1 (0 of 1 predicted correctly, 1 with a tied top vote)" in report


def test_without_targets_there_is_no_mark():
    report = text_of(sample(**UNLABELLED))
    assert "**Ground Truth:** not known, so neither correct nor incorrect" in report
    assert "CORRECT" not in report
    assert "**Samples:** 1 (1 without a known outcome)" in report
    assert "Checklist for a correct prediction" in report
    assert "Checklist for an incorrect prediction" in report


def test_without_scores_and_names():
    report = text_of(sample(**WITHOUT_SCORES, true_name=None, correct=None), class_names=(), axes={})
    assert "**Predicted:** not known\n- **Ground Truth:** 2, not compared with a prediction\n" in report
    assert "**Predicted:** 2\n" in text_of(sample(predicted_name=None, confidence=None))
    assert "**Predicted:** 2 (confidence: 0.8234)\n" in text_of(sample(predicted_name=None))
    assert "**Predicted:** 2 (GPD)\n" in text_of(sample(confidence=None))


def test_a_single_key_says_nothing():
    report = text_of(
        sample(modality_agreement=NAN, attention_stats={"eeg_to_spec": SINGLE_KEY, "spec_to_eeg": statistics()})
    )
    reason = "a single key, so every weight is 1 whatever the model learned"
    assert f"entropy=undefined, sparsity=0.00% ({reason})" in report
    assert f"**Modality Alignment:** undefined ({reason})\n" in report
    assert f"**Modality Agreement:** undefined ({reason})\n" in report
    assert f"Top EEG→Spec attention:** undefined ({reason})" in report
    assert "**Checklist for a correct prediction:** 0 of 4 met, 4 undefined" in report
    assert f"? mean of the rows' largest weights > 0.7 (EEG→Spec undefined; {reason})" in report
    assert "fuse token sequences" in report
    assert "nan" not in report.lower()


@pytest.mark.parametrize(
    ("directions", "reason"),
    [
        ({"eeg_to_spec": statistics()}, "only one direction of attention is recorded"),
        ({"eeg_to_spec": statistics(), "fusion.1/eeg_to_spec": NO_ROW}, "only one direction of attention is recorded"),
        ({"eeg_to_spec": statistics(), "spec_to_eeg": NO_ROW}, "no valid row (all are padding"),
        ({"eeg_to_spec": statistics(), "spec_to_eeg": statistics()}, "a map that does not vary"),
    ],
)
def test_why_an_agreement_is_undefined(directions, reason):
    undefined = sample(modality_agreement=NAN, attention_stats=directions)
    assert f"**Modality Agreement:** undefined ({reason}" in text_of(undefined)
    assert reason in json_of(batch(undefined))["undefined"]["modality_alignment"]


def test_a_mean_over_some_samples_says_so():
    report = text_of(sample(), sample(sample_idx=1, modality_agreement=NAN, attention_stats={"a_to_b": statistics()}))
    assert "**Modality Alignment:** 0.7234, the mean of 1 of 2 samples" in report


def test_other_modalities_several_layers_and_no_pairs():
    names = ("audio_to_text", "fusion.1/audio_to_text", "fusion.1/PET_to_MEG1")
    report = text_of(
        sample(
            attention_stats=dict.fromkeys(names, statistics()),
            top_attention_places={names[0]: [placed(0, 3, 0.5)] * 5, names[1]: [], names[2]: [placed(1, 0, 0.25)]},
        )
    )
    assert "**Audio → Text Attention:** mean" in report
    assert "**Audio → Text Attention, layer fusion.1:** mean" in report
    assert "**Top Audio→Text attention:** (0, 3, 0.5000), lift 3.50\n" in report
    assert report.count("(0, 3, 0.5000)") == 3  # of five pairs
    assert "**Top Audio→Text attention, layer fusion.1:** none\n" in report
    assert "**Top PET→MEG1 attention, layer fusion.1:** (1, 0, 0.2500), lift 1.75\n" in report


def test_sparsity_of_many_keys_is_put_in_its_place():
    many = {"eeg_to_spec": statistics(mean=1 / 119, sparsity=99.5)}
    remark = "with more than ten keys even uniform attention has 100 %"
    assert remark in " ".join(text_of(sample(attention_stats=many)).split())
    assert remark not in " ".join(text_of(sample()).split())


def test_an_empty_batch():
    report = text_of(sample(), per_sample_explanations=[], modality_alignment=NAN)
    assert "**Modality Alignment:** undefined (no samples)\n- **Samples:** 0\n" in report
    assert "No samples." in report


# JSON


def test_json_of_a_batch_holds_what_went_in():
    samples = [sample(), sample(**WRONG, sample_idx=1), sample(**UNLABELLED, sample_idx=2), sample(**WRONG)]
    got = json_of(batch(*samples))
    assert set(got) == {
        *("kind", "class_names", "axes", "samples", "correct", "incorrect"),
        *("attention_stats", "modality_alignment", "undefined", "per_sample_explanations"),
    }
    assert (got["kind"], got["samples"], got["correct"], got["incorrect"]) == ("batch", 4, 1, 2)
    assert got["class_names"] == list(NAMES)
    assert got["axes"] == {"eeg": {"title": "EEG region", "spans": None, "names": ["LL", "RL", "LP", "RP", "Z"]}}
    assert got["modality_alignment"] == 0.7234
    assert got["attention_stats"]["spec_to_eeg"] == vars(statistics(mean=1 / 5))
    for written, given in zip(got["per_sample_explanations"], samples, strict=True):
        assert set(written) == {*given, "undefined", "interpretation"}
        for key in ("sample_idx", "confidence", "probabilities", "true_name", "correct", "tied", "modality_agreement"):
            assert written[key] == given[key], key
        assert written["top_attention_places"] == given["top_attention_places"]
        assert written["interpretation"] == [vars(one) for one in interpret_sample(given)]


def test_json_of_a_layer_counts_the_samples_of_each_subset():
    classes, outcomes = [0, 0, 0, 1, 1, -1], [CORRECT, CORRECT, INCORRECT, INCORRECT, UNKNOWN, CORRECT]
    (layer,) = json_of(dataset(summary(classes, outcomes)))["layers"]
    told = ("group", "name", "class_id", "samples", "groups", "correct", "incorrect")
    assert [tuple(one[name] for name in told) for one in layer["groups"]] == [
        ("all", "all", None, 6, None, 3, 2),
        ("class", "Seizure", 0, 3, None, 2, 1),
        ("class", "LPD", 1, 2, None, 0, 1),
        ("class", "GPD", 2, 0, None, 0, 0),
        ("unclassified", "no class", None, 1, None, 1, 0),
        ("outcome", "correct", None, 3, None, 3, 0),
        ("outcome", "incorrect", None, 2, None, 0, 2),
    ]
    assert [one["accuracy"]["mean"] for one in layer["groups"]] == pytest.approx([0.6, 2 / 3, 0, None, 1, None, None])
    assert all(set(one) == {*told, "accuracy", "numbers"} for one in layer["groups"])


def test_json_has_null_for_what_is_undefined_and_numbers_for_tensors():
    one = sample(modality_agreement=NAN, confidence=torch.tensor(0.5), attention_stats={"eeg_to_spec": SINGLE_KEY})
    written = json_of(batch(one))["per_sample_explanations"][0]
    assert written["modality_agreement"] is None
    assert written["attention_stats"]["eeg_to_spec"]["entropy"] is None
    assert written["confidence"] == 0.5
    assert {each["met"] for each in written["interpretation"]} == {None}


# Markdown of a data set


def row(report, name):
    """The cells of a group's row in the table."""
    (line,) = (line for line in report.splitlines() if re.match(rf"\| {re.escape(name)} +\| +\d", line))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_data_set_without_groups_has_the_summarys_numbers():
    """With groups see test_tables."""
    one = summary(CLASSES, OUTCOMES, tied=(1, 2))
    report = create_explainability_report(dataset(one))
    low, high = one.interval(ALIGNMENT, 1)
    assert row(report, "LPD")[1] == "13"
    assert row(report, "LPD")[3] == f"{one.mean(ALIGNMENT, 1):.3f} ({low:.3f} to {high:.3f})"
    right, known = OUTCOMES.count(CORRECT), len(OUTCOMES) - OUTCOMES.count(UNKNOWN)
    low, high = (100 * end for end in one.accuracy_interval())
    assert row(report, "all")[2] == f"{100 * right / known:.1f} % ({low:.1f} to {high:.1f} %) {right}/{known}"
    assert "In brackets: 95 % CI, samples taken as independent; none with fewer than 5 samples.\n" in report
    assert "**Samples with a tied top vote:** 2; the first of the tied classes counts" in report
    assert row(report, "low alignment")[1:3] == [str(right), str(known - right)]
    assert "- **low alignment:** not shown to detect errors\n" in report
    assert "nan" not in report.lower()


@pytest.mark.parametrize(("favoured", "verdict"), [(2, "detects errors"), (0, "points the other way")])
def test_a_score_detects_errors_or_points_the_other_way(favoured, verdict):
    outcomes = [CORRECT if of == favoured else INCORRECT for of in CLASSES]
    report = create_explainability_report(dataset(summary(CLASSES, outcomes)))
    *_, adjusted = row(report, "low alignment")
    assert f"- **low alignment:** {verdict}, which may be a difference between classes" in report
    assert adjusted == "undefined"  # no class has both outcomes


@pytest.mark.parametrize(
    ("gap", "within", "between"),
    [(0.2, 0.19, False), (0.2, 0.05, True), (0.2, -0.2, True), (-0.2, -0.11, False), (0.0, 0.1, True)],
)
def test_a_gap_that_classes_do_not_have_is_said_to_be_theirs(gap, within, between):
    auroc, low, high = (0.7, 0.6, 0.8) if gap > 0 else (0.3, 0.2, 0.4)
    outcome = Comparison(auroc, low, high, 30, 9, gap=gap, class_adjusted_gap=within)
    _, verdicts = compare_outcomes({"alignment": outcome}, None)
    ((_, found, _),) = verdicts.items
    assert ("which may be a difference between classes" in found) == between


def test_fewer_than_five_of_an_outcome_support_no_claim():
    report = create_explainability_report(dataset(summary(CLASSES, [INCORRECT] * 4 + [CORRECT] * 35)))
    assert row(report, "low alignment")[1:] == ["35", "4", "", "", ""]
    assert "- **low alignment:** no claim, fewer than 5 samples of an outcome" in report
    report = create_explainability_report(dataset(summary(CLASSES, [INCORRECT] * 5 + [CORRECT] * 34)))
    assert row(report, "low alignment")[3].startswith("0.")


def test_predicted_classes_unclassified_samples_and_several_layers():
    classes = [-1, *CLASSES[1:]]
    report = create_explainability_report(
        dataset(summary(classes, OUTCOMES), summary(classes, OUTCOMES, keys=1), classes_by="prediction")
    )
    assert "## Attention (layer fusion.0)\n" in report
    assert "## Attention (layer fusion.1)\n" in report
    assert "predicted class" in report
    assert "(precision)" in report
    assert "true class" not in report
    assert "**Samples without a class:** 1" in report
    assert "**EEG → Spec:** 39 of 39 samples with a single key" in report
    assert "fuse token sequences" in report
    assert "**Alignment undefined:** 100.0 % of the samples" in report
    assert "**Alignment between different samples:** undefined (it needs two samples with an alignment" in report
    second = report.partition("## Attention (layer fusion.1)")[2]
    assert row(second, "LPD")[3:5] == ["undefined"] * 2
    assert row(second, "no class")[1] == "1"


def test_one_direction_without_classes_and_outcomes():
    one = summary([-1] * 5, [UNKNOWN] * 5, n_classes=0, both=False)
    results = dataset(one, class_names=())
    report = create_explainability_report(results)
    assert "**Alignment:** undefined (only one direction of attention is recorded)" in report
    assert "Correct and incorrect predictions are not compared: predictions or targets are not known." in report
    assert row(report, "all")[2] == ""  # no accuracy
    layer = json_of(results)["layers"][0]
    assert layer["alignment_null"] is None
    assert layer["outcomes"] == {}
    assert [group["name"] for group in layer["groups"]] == ["all"]
    assert layer["groups"][0]["accuracy"]["mean"] is None


def test_fewer_than_five_samples_have_no_interval():
    results = dataset(summary([0, 1, 1, 1, 1] + [2] * 5, [CORRECT] * 10))
    report = create_explainability_report(results)
    assert " to " not in row(report, "Seizure")[3]
    assert " to " not in row(report, "LPD")[3]
    assert " to " in row(report, "GPD")[3]
    groups = {group["name"]: group["numbers"]["alignment"] for group in json_of(results)["layers"][0]["groups"]}
    assert (groups["LPD"]["low"], groups["LPD"]["high"]) == (None, None)
    assert groups["GPD"]["low"] < groups["GPD"]["mean"] < groups["GPD"]["high"]


def test_no_number_is_minus_zero():
    one = summary(CLASSES, OUTCOMES)
    one.alignment_null = -1e-9
    assert "between different samples:** 0.000 (" in create_explainability_report(dataset(one))
    assert "**Modality Agreement:** 0.0000" in text_of(sample(modality_agreement=-1e-9))
    assert [decimal(-1e-9), decimal(-1e-9, 3, signed=True), decimal(-0.0016, 3)] == ["0.00", "+0.000", "-0.002"]


def test_undefined_samples_show_how_many_are_behind_a_mean():
    report = create_explainability_report(dataset(summary(CLASSES, OUTCOMES, broken=(1,))))
    assert row(report, "LPD")[3].endswith(" n=12")
    assert "n=" not in row(report, "GPD")[3]


def test_a_terminal_gets_the_report_laid_out_within_its_width(monkeypatch, capsys):
    results = dataset(summary(CLASSES, OUTCOMES), class_names=("[red]a", "b", "c"))
    print_report(results)
    report = create_explainability_report(results)
    assert capsys.readouterr().out == report
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal does
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "72")
    print_report(results)
    drawn = re.sub(r"\x1b\[[\d;]*m| +$", "", capsys.readouterr().out, flags=re.MULTILINE)
    assert "**" not in drawn
    assert "[red]a" in drawn
    assert max(map(len, drawn.splitlines())) <= 72
    assert set(re.findall(r"\d\.\d+", report)) <= set(re.findall(r"\d\.\d+", drawn))


def test_the_columns_of_a_table_stand_below_each_other():
    names = ("Seizure, focal to bilateral tonic-clonic, of unknown onset", "LPD", "脳波 " * 10)
    report = create_explainability_report(dataset(summary(CLASSES, OUTCOMES), class_names=names))
    tables = [part.splitlines() for part in report.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    assert all(len({*map(cell_len, lines)}) == 1 for lines in tables)


def test_markdown_renders_whatever_the_names_hold():
    names = ("a|b", "*c* <b>_d_</b> `e`", "line\nbreak [x](y) & \\ $z$")
    one = summary(CLASSES, OUTCOMES)
    report = create_explainability_report(dataset(one, class_names=names), format="markdown")
    tokens = MarkdownIt("commonmark").enable("table").parse(report)
    cells = [
        "".join(child.content for child in token.children)
        for before, token in pairwise(tokens)
        if before.type in ("th_open", "td_open")
    ]
    assert r"\$z\$" in report  # or GitHub sets it as a formula
    width = 6
    cells = cells[: width * 7]  # header, all, three classes, correct, incorrect
    assert cells[:3] == ["true class", "n", "accuracy (recall)"]
    assert cells[2 * width :: width][:3] == ["a|b", "*c* <b>_d_</b> `e`", "line break [x](y) & \\ $z$"]
    low, high = one.interval(ALIGNMENT)
    assert cells[width + 3] == f"{one.mean(ALIGNMENT):.3f} ({low:.3f} to {high:.3f})"


def test_samples_and_outcomes_are_markup():
    report = create_explainability_report(batch(sample(), sample(**WRONG, sample_idx=1, tied=True)))
    html = MarkdownIt().render(report)
    assert "<h3>Sample 1</h3>" in html
    assert "<li><strong>Ground Truth:</strong> 2 ✓ CORRECT</li>" in html


# Files


@pytest.mark.parametrize("suffix", [".md", ".json", ".JSON"])
def test_the_format_follows_from_the_suffix_and_the_file_is_the_report(suffix, tmp_path):
    path = tmp_path / "made" / "on the way" / f"report{suffix}"
    report = create_explainability_report(batch(sample()), path)
    assert path.read_bytes().decode("utf-8") == report
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    name = "markdown" if suffix == ".md" else "json"
    assert report == create_explainability_report(batch(sample()), format=name)


def test_a_format_that_is_given_goes_before_the_suffix(tmp_path):
    report = create_explainability_report(batch(sample()), str(tmp_path / "report.log"), format="json")
    assert strict((tmp_path / "report.log").read_text(encoding="utf-8")) == strict(report)


def test_a_file_is_complete_or_absent(tmp_path):
    path = tmp_path / "report.md"
    path.mkdir()  # nothing can be written under this name
    with pytest.raises(OSError, match="report.md"):
        create_explainability_report(batch(sample()), path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_path": "report.pdf"}, r"one of .md, .json, .html; got 'report.pdf'"),
        ({"output_path": "report"}, "one of .md, .json, .html; got 'report'"),
        ({"format": "pdf"}, "format must be one of markdown, json, html, or None; got 'pdf'"),
    ],
)
def test_other_formats_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        create_explainability_report(batch(sample()), **settings)


@pytest.mark.parametrize("results", [None, [1], sample(), {"attention_stats": {}}])
def test_other_results_are_refused(results):
    with pytest.raises(SettingError, match=tells("explain_batch", "explain_loader", "got ")):
        create_explainability_report(results)
