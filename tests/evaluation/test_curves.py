"""Curves and the history's records: each is the summary's number, of the samples that its name says."""

from __future__ import annotations

import math
import warnings
from copy import copy

import numpy as np
import pytest
import torch

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.core.attention import Direction
from lightning_xattn.evaluation.curves import epoch_curves, fusion_curves, fusion_record
from lightning_xattn.evaluation.statistics import ALIGNMENT, INVALID_ROWS, SCORES, Column
from lightning_xattn.evaluation.support import unused
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from tests import reference
from tests.attribution.models import loader_of, sample_ids
from tests.explained import summary
from tests.report.conftest import CLASSES, SUBSETS, group_of, make_samples
from tests.toy import quiet_trainer

THERE, BACK = Direction("left", "right"), Direction("right", "left")
WHOLE = {"all": (None, None), **SUBSETS}


@pytest.fixture(scope="module")
def evaluated():
    """What a validation logs, its record, and its summaries: the numbers of many samples and groups."""
    model, data = make_samples()
    watch = AttentionExplainabilityCallback(
        class_names=CLASSES,
        sample_ids=sample_ids,
        groups=group_of,
        fusion="fusion",
        modalities={"left": 0, "right": 1},
        curves="all",
        figures_every_n_epochs=0,
    )
    trainer = quiet_trainer(callbacks=[watch])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads that little training has left dead
        trainer.validate(model, loader_of(data), verbose=False)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("xattn_")}
    return logged, watch.history[0], watch.summaries["val"], watch.fusion_summaries["val"]


def expected_of_layer(one):
    """By ``<topic>/<what>``: every curve of a layer, from its own tables of names."""
    expected = {f"alignment/{name}": one.mean(ALIGNMENT, *subset) for name, subset in WHOLE.items()}
    for direction in (THERE, BACK):
        of_all = {name: subset for name, subset in WHOLE.items() if name not in ("correct", "incorrect")}
        for name, subset in of_all.items():
            expected[f"entropy/{direction}/{name}"] = one.mean(Column("entropy", direction), *subset)
        for head in range(3):
            expected[f"entropy/{direction}/head_{head}"] = one.mean(Column("entropy", direction, head))
        for name in ("max", "sparsity", "effective_keys"):
            expected[f"focus/{direction}/{name}"] = one.mean(Column(name, direction))
        for name in ("query_selectivity", "head_diversity"):
            expected[f"health/{name}/{direction}"] = one.mean(Column(name, direction))
    for name, outcome in (("correct", CORRECT), ("incorrect", INCORRECT)):
        expected[f"entropy/{name}"] = one.mean(Column("entropy"), outcome=outcome)
    for score in (ALIGNMENT, Column("entropy")):
        means = [one.mean(score, outcome=outcome) for outcome in (CORRECT, INCORRECT)]
        expected[f"{score}/gap"] = means[0] - means[1]
    expected["alignment/null"] = one.alignment_null
    expected |= {f"outcome/{score}_auroc": one.compare(score).auroc for score in SCORES}
    return expected | {"health/undefined_share": one.undefined_share(), "health/invalid_rows": one.total(INVALID_ROWS)}


def expected_of_fusion(fusion):
    """The same of the modalities; the AUROC of the confidence is the layer's."""
    expected = {f"probe/{name}": fusion.estimate(f"right/{name}").mean for name in ("left", "right", "joint")}
    expected |= {f"support/{cell.key}": cell.share.mean for cell in fusion.cells}
    unsupported = fusion.outcomes[(fusion.support_cell >= 3) & (fusion.target >= 0)]
    expected["support/accuracy/unsupported"] = float((unsupported == CORRECT).double().mean())
    supported = fusion.outcomes[(fusion.support_cell == 0) & (fusion.target >= 0)]
    expected["support/accuracy/supported"] = float((supported == CORRECT).double().mean())
    expected["support/delta_auroc"] = math.nan
    expected |= {f"health/unused/{name}": unused(fusion, name) for name in ("left", "right")}
    for name in ("left", "right"):
        expected[f"contribution/{name}"] = fusion.estimate(f"phi/{name}").mean
        shares = {which: fusion.share(name, *subset).mean for which, subset in WHOLE.items()}
        expected[f"contribution/share/{name}"] = shares.pop("all")
        expected |= {f"contribution/share/{name}/{which}": share for which, share in shares.items()}
        expected[f"contribution/share/{name}/gap"] = shares["correct"] - shares["incorrect"]
    expected["contribution/interaction"] = fusion.estimate("interaction").mean
    expected["contribution/emap_accuracy"] = fusion.estimate("additive_right").mean
    expected["outcome/support_auroc"] = fusion.compare("support").auroc
    for direction in (THERE, BACK):
        expected[f"faithfulness/{direction}"] = fusion.faithfulness(direction).mean
        expected[f"faithfulness/reference/{direction}"] = fusion.faithfulness(direction, "reference").mean
        expected[f"faithfulness/cost/{direction}"] = fusion.estimate(f"cost/{direction}").mean
    return expected


def test_every_curve_is_the_summarys_number(evaluated):
    logged, record, one, fusion = evaluated
    expected = expected_of_layer(one) | expected_of_fusion(fusion)
    curves = {f"xattn_{name.replace('/', '/val/', 1)}": value for name, value in expected.items()}
    assert set(logged) == set(curves)
    assert logged == pytest.approx(curves, rel=1e-5, nan_ok=True)
    assert len({round(value, 9) for value in expected.values()}) > 0.95 * len(expected), "what is swapped must show"
    # What is undefined has a curve, and no place in the record.
    defined = {name: value for name, value in expected.items() if math.isfinite(value)}
    assert len(defined) > 80
    assert not [name for name in set(expected) - set(defined) if name in record]
    assert {name: record[name] for name in defined} == pytest.approx(defined)


def test_the_record_has_counts_intervals_and_what_is_compared(evaluated):
    _, record, one, fusion = evaluated
    right, wrong = (int((fusion.outcomes == outcome).sum()) for outcome in (CORRECT, INCORRECT))
    assert (record["samples"], record["groups"], record["probed_samples"]) == (130, 23, 130)
    assert (record["ties"], record["unclassified"], record["wholly_masked"]) == (0, 7, 0)
    assert record["accuracy"] == pytest.approx(right / (right + wrong))
    assert record["largest_class"] == pytest.approx(45 / 123)
    assert record["modalities"] == ", ".join(fusion.sources)
    problems = {str(direction): fusion.faithfulness_problem(direction) for direction in (THERE, BACK)}
    assert (record["missing"], record["probe_problems"], record["contribution_problem"]) == ({}, {}, "")
    assert record["faithfulness_problems"] == problems
    assert (record["support_problem"], record["added_value_problem"]) == ("", fusion.added_value)
    assert record["probe_macro_auroc"] == {name: one.mean for name, one in fusion.probe_aurocs.items()}
    assert record["probe_calibration_error"] == fusion.calibration_errors
    ends = {f"probe/{name}": fusion.estimate(f"right/{name}") for name in ("left", "right", "joint")}
    ends |= {f"contribution/share/{name}": fusion.share(name) for name in ("left", "right")}
    ends |= {f"faithfulness/{direction}": fusion.faithfulness(direction) for direction in (THERE, BACK)}
    ends = {name: found for name, found in ends.items() if math.isfinite(found.low)}
    ends = {name: (found.low, found.high) for name, found in ends.items()}
    for name, outcome in (("correct", CORRECT), ("incorrect", INCORRECT)):
        for score in SCORES:
            ends[f"{score}/{name}"] = one.interval(score, outcome=outcome)
    found = fusion.compare("support")
    ends["outcome/support_auroc"] = found.low, found.high
    ends |= {f"support/{cell.key}": (cell.share.low, cell.share.high) for cell in fusion.cells}
    found = fusion.estimate("correct", among=fusion.support_cell >= 3)
    ends["support/accuracy/unsupported"] = found.low, found.high
    ends["support/accuracy/supported"] = fusion.cells[0].accuracy.low, fusion.cells[0].accuracy.high
    for score in SCORES:
        found = one.compare(score)
        ends[f"outcome/{score}_auroc"] = found.low, found.high
        compared = {name: record[f"outcome/{score}_{name}"] for name in ("gap", "class_adjusted_gap")}
        assert compared == {"gap": found.gap, "class_adjusted_gap": found.class_adjusted_gap}
        for name in ("correct", "incorrect", "correct_groups", "incorrect_groups"):
            assert record[f"outcome/{score}_{name}"] == getattr(found, name)
    for name, (low, high) in ends.items():
        assert math.isfinite(low)
        assert (record[f"{name}_low"], record[f"{name}_high"]) == pytest.approx((low, high)), name


def test_the_fusions_numbers_are_the_means_of_the_samples(evaluated):
    """From its rows, one by one, without its estimates."""
    _, record, _, fusion = evaluated
    numbers, outcomes, _ = fusion.numbers, fusion.outcomes, fusion.classes
    assert record["probe/left"] == pytest.approx(float(numbers["right/left"].nanmean()))
    left, right = (numbers[f"supports/{name}"] == 1 for name in ("left", "right"))
    assert record["support/both"] == pytest.approx(float((left & right).double().mean()))
    assert record["support/only_right"] == pytest.approx(float((right & ~left).double().mean()))
    assert record["support/neither_agree"] + record["support/neither_differ"] == pytest.approx(
        float((~left & ~right).double().mean())
    )
    phi = torch.stack([numbers["phi/left"], numbers["phi/right"]], 1)
    known = phi[phi.isfinite().all(1)]
    assert len(known) == 128
    assert record["contribution/left"] == pytest.approx(float(known[:, 0].mean()))
    assert record["contribution/share/left"] == pytest.approx(float(known[:, 0].mean() / known.sum(1).mean()))
    bins = reference.binned((numbers["support"] / 2).exp().numpy(), 0, 1)
    correct, incorrect = (outcomes == CORRECT).numpy(), (outcomes == INCORRECT).numpy()
    expected = reference.error_auroc("support", bins[correct], bins[incorrect])
    assert record["outcome/support_auroc"] == pytest.approx(expected)


def test_samples_without_a_class_are_in_no_gap_within_classes(evaluated):
    """Of a fusion: as where predictions are classes, some of them of none, and outcomes are known all the same."""
    fusion = copy(evaluated[-1])
    fusion.classes = torch.where(torch.arange(130) % 5 == 0, -1, fusion.classes)
    fusion.outcomes = torch.arange(130) % 3 % 2
    found, known = fusion.compare("support"), (fusion.classes >= 0).numpy()
    values = fusion.numbers["support"].numpy()
    of_known = values[known], fusion.classes[known].tolist(), (fusion.outcomes == CORRECT)[known]
    assert found.class_adjusted_gap == pytest.approx(reference.class_adjusted_gap(*of_known))
    everyone = reference.class_adjusted_gap(values, fusion.classes.tolist(), fusion.outcomes == CORRECT)
    assert abs(found.class_adjusted_gap - everyone) > 1e-4
    correct, incorrect = (values[(fusion.outcomes == outcome).numpy()].mean() for outcome in (CORRECT, INCORRECT))
    assert found.gap == pytest.approx(correct - incorrect)


def test_classes_that_are_put_together_leave_those_without_a_class_out(evaluated):
    fusion = evaluated[-1]
    merged = fusion.merge_classes([3, 0])
    named = {3: 0, 0: 1, 1: 2, 2: 2, -1: -1}
    assert merged.classes.tolist() == [named[int(one)] for one in fusion.classes]
    assert (merged.n_classes, fusion.n_classes) == (3, 4)
    of_others = (fusion.classes == 1) | (fusion.classes == 2)
    assert merged.estimate("support", 2).mean == pytest.approx(float(fusion.numbers["support"][of_others].mean()))


def test_what_is_not_measured_has_its_curves_all_the_same(evaluated):
    """As NaN, so that the names are those of every epoch; a regression has sizes."""
    fusion = copy(evaluated[-1])
    permuted = {name for name in fusion_curves(fusion, "val", CLASSES, True) if "contribution" in name}
    fusion.contribution_problem, fusion.replaced = "too few samples", {}
    of_contributions = ("phi", "error", "gain", "reference", "cost", "interaction", "additive_right", "model_right")
    fusion.numbers = {
        name: one for name, one in fusion.numbers.items() if name.partition("/")[0] not in of_contributions
    }
    curves = fusion_curves(fusion, "val", CLASSES, True, tested=[THERE])
    assert {name for name in curves if "contribution" in name} == permuted
    assert {name for name in curves if "faithfulness" in name} == {
        f"xattn_faithfulness/val/{which}{THERE}" for which in ("", "reference/", "cost/")
    }
    assert all(math.isnan(value) for name, value in curves.items() if "contribution" in name or "faithful" in name)
    assert not any("contribution" in name for name in fusion_curves(fusion, "val", CLASSES, True, permutes=False))
    alone = fusion_curves(fusion, "val", CLASSES, has_attention=False)
    assert alone["xattn_outcome/val/confidence_auroc"] == fusion.compare("confidence").auroc
    record = fusion_record(fusion, "val", alone)
    found = fusion.compare("confidence")
    assert (record["outcome/confidence_auroc_low"], record["outcome/confidence_auroc_high"]) == (found.low, found.high)
    assert record["contribution_problem"] == "too few samples"
    assert "faithfulness_problems" not in record
    assert not any(name.startswith("contribution/") for name in record)
    regression = copy(evaluated[-1])
    regression.is_regression = True
    curves = fusion_curves(regression, "val", CLASSES, True)
    for name in ("left", "right"):
        assert curves[f"xattn_contribution/val/size/{name}"] == regression.size(name).mean
    assert not any("share" in name for name in curves)


def test_one_direction_without_classes_has_no_curves_of_them():
    one = summary([-1] * 5, [CORRECT] * 5, n_classes=0, both=False)
    curves = epoch_curves(one, "test/block", ())
    assert "xattn_alignment/test/block/all" not in curves
    assert curves["xattn_entropy/test/block/eeg_to_spec/all"] == one.mean(Column.parse("eeg_to_spec/entropy"))
    assert np.isnan(curves["xattn_outcome/test/block/entropy_auroc"])
