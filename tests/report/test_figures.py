"""What stands in an epoch's figures is what the summary says: each number at its class, head, direction and outcome."""

import math
from copy import copy

import numpy as np
import pytest

from lightning_xattn.evaluation.layer_summary import Comparison
from lightning_xattn.evaluation.statistics import ALIGNMENT, Column
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT, UNKNOWN
from lightning_xattn.report.figures import dataset_figures, epoch_figures, fusion_figures, overview_figure
from tests.attribution.models import said_data, summary_of, trained
from tests.explained import NAMES, dataset, summary
from tests.visualizations.conftest import drawn, panels, smallest_text, texts

# Classes of 19, 11 and 7 samples, of which unequally many are predicted correctly.
CLASSES = [0] * 19 + [1] * 11 + [2] * 7
OUTCOMES = [CORRECT] * 13 + [INCORRECT] * 6 + [CORRECT] * 5 + [INCORRECT] * 6 + [CORRECT] * 6 + [UNKNOWN]


@pytest.fixture(scope="module")
def one():
    return summary(CLASSES, OUTCOMES)


@pytest.fixture(scope="module")
def figures(one):
    drawn_figures = epoch_figures(one, "val", NAMES, classes_by="target", axes={}, context="epoch 4")
    return {tag.replace("/val", "").removeprefix("xattn_"): figure for tag, figure in drawn_figures}


def test_each_figure_has_its_tag_and_says_where_it_is_from(figures):
    directions = ["map/eeg_to_spec", "map/spec_to_eeg"]
    maps = [tag for direction in directions for tag in (direction, f"{direction}_by_outcome")]
    assert list(figures) == [*maps, "entropy/by_head", "alignment/by_outcome"]
    assert all("epoch 4" in texts(figure) for figure in figures.values())


def test_whatever_loggers_get_is_legible_at_the_size_that_tensorboard_shows(one):
    data, _ = said_data(60)
    fusion = summary_of(trained(None, data, epochs=5), data)
    records = [
        {"stage": "val", "epoch": epoch, "step": epoch, "alignment/all": 0.1, "probed_samples": 9} for epoch in (0, 1)
    ]
    drawn_figures = {"overview": overview_figure(records, "val"), **dict(dataset_figures(dataset(one, fusion=fusion)))}
    kinds = {"overview", "map", "entropy", "alignment", "conflict", "contribution", "class"}
    assert {name.partition("_")[0] for name in drawn_figures} == kinds
    assert {
        name: smallest_text(figure, 324) for name, figure in drawn_figures.items() if smallest_text(figure, 324) < 9
    } == {}


@pytest.mark.parametrize("direction", ["eeg_to_spec", "spec_to_eeg"])
def test_each_class_has_its_map_and_its_count(one, figures, direction):
    maps = {str(name): of_direction.numpy() for name, of_direction in one.maps.items()}[direction]
    keys = maps.shape[2]
    for panel, name, samples, weights in zip(
        panels(figures[f"map/{direction}"]), NAMES, (19, 11, 7), maps, strict=True
    ):
        assert panel.get_title() == f"{name} (n={samples})"
        expected = keys * weights
        # The longer axis lies horizontally.
        np.testing.assert_allclose(drawn(panel), expected if expected.shape == (5, 7) else expected.T, rtol=1e-6)


def test_each_head_of_each_class_has_its_entropy(one, figures):
    for panel, direction in zip(panels(figures["entropy/by_head"]), one.heads, strict=True):
        expected = [[one.mean(Column("entropy", direction, head), i) for head in range(3)] for i in range(3)]
        assert len(np.unique(expected)) == 9
        np.testing.assert_allclose(drawn(panel), expected, rtol=1e-6)
    assert all(
        f"{name} (n={samples})" in texts(figures["entropy/by_head"])
        for name, samples in zip(NAMES, (19, 11, 7), strict=True)
    )


def marked(panel):
    """By marker, which tells an outcome from the other: the ends of the intervals, a row for each class."""
    found = {}
    for container in panel.containers:
        line, _, (bars,) = container
        ends = [segment[:, 0] if len(segment) else (np.nan, np.nan) for segment in bars.get_segments()]
        found[line.get_marker()] = (line.get_xdata(), np.array(ends))
    return found


def test_each_outcome_has_its_means_intervals_and_counts(one, figures):
    figure = figures["alignment/by_outcome"]
    above, below = panels(figure)
    shown = marked(below)
    for outcome, marker, name in ((CORRECT, "o", "correct"), (INCORRECT, "s", "incorrect")):
        means, ends = shown[marker]
        np.testing.assert_allclose(means, [one.mean(ALIGNMENT, i, outcome) for i in range(3)], rtol=1e-6)
        expected = np.array([one.interval(ALIGNMENT, i, outcome) for i in range(3)])
        assert np.isfinite(expected).any()
        np.testing.assert_allclose(ends, expected, rtol=1e-5)
        total = one.count(ALIGNMENT, outcome=outcome)
        assert f"{name} (n = {total}, mean {one.mean(ALIGNMENT, outcome=outcome):.3f})" in texts(figure)
    assert [label.get_text() for label in below.get_yticklabels()] == ["Seizure (13/6)", "LPD (5/6)", "GPD (6/0)"]
    found = one.compare(ALIGNMENT)
    for number in (found.auroc, found.low, found.high):
        assert f"{number:.3f}" in texts(figure)
    assert [line.get_xdata()[0] for line in above.lines if line.get_linestyle() == ":"] == [one.alignment_null]


def test_a_data_sets_classes_and_outcomes_have_their_means_intervals_and_counts(one):
    figure = dict(dataset_figures(dataset(one)))["class_comparison"]
    directions = [Column("entropy", direction) for direction in one.heads]
    places = [(0, None), (1, None), (2, None), (None, CORRECT), (None, INCORRECT)]
    for panel, column in zip(panels(figure), [ALIGNMENT, *directions], strict=True):
        means = np.concatenate([container.lines[0].get_xdata() for container in panel.containers])
        np.testing.assert_allclose(means, [one.mean(column, *place) for place in places], rtol=1e-6)
        segments = [segment for container in panel.containers for segment in container.lines[2][0].get_segments()]
        ends = [segment[:, 0] for segment in segments]
        np.testing.assert_allclose(ends, [one.interval(column, *place) for place in places], rtol=1e-5)
    labels = [label.get_text() for label in panels(figure)[0].get_yticklabels()]
    assert labels == ["Seizure (n=19)", "LPD (n=11)", "GPD (n=7)", "correct (n=24)", "incorrect (n=12)"]
    titles = [text.get_text().partition(" (")[0] for text in figure.texts]
    assert [one for one in titles if one.startswith(("alignment", "entropy"))] == [
        *("alignment", "entropy eeg → spec", "entropy spec → eeg"),
    ]
    nulls = [[line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"] for ax in panels(figure)]
    assert nulls == [[one.alignment_null], [], []]


def test_without_classes_all_samples_are_one(one):
    whole = summary([-1] * 5, [UNKNOWN] * 5, n_classes=0)
    drawn_figures = dict(epoch_figures(whole, "test", (), classes_by="target", axes={}, context=""))
    assert list(drawn_figures) == [f"xattn_map/test/{d}" for d in one.heads] + ["xattn_entropy/test/by_head"]
    (panel,) = panels(drawn_figures["xattn_map/test/eeg_to_spec"])
    assert panel.get_title() == "all samples (n=5)"


@pytest.mark.parametrize(
    ("interval", "claim"),
    [
        ((0.6, 0.9), "AUROC 0.75 (95 % CI 0.60 to 0.90; higher in correct predictions)"),
        ((0.4, 0.9), "AUROC 0.65 (95 % CI 0.40 to 0.90; no difference shown)"),
        ((0.1, 0.4), "AUROC 0.25 (95 % CI 0.10 to 0.40; lower in correct predictions)"),
        ((math.nan, math.nan), ""),
    ],
)
def test_a_score_has_its_auroc_and_claims_no_difference_that_is_not_shown(interval, claim):
    low, high = interval
    found = Comparison((low + high) / 2, low, high, 50, 50, None, None, 0.0, 0.1, 0.1)
    data, _ = said_data(60, noise=1.5)
    summary = copy(summary_of(trained(None, data, epochs=5), data))
    summary.compare = lambda score: found
    _, figure = next(fusion_figures(summary, "val", [], all_names=[], classes_by="target", context=""))
    text = " ".join(texts(figure).split())
    for score in ("confidence", "conflict"):
        assert (f"{score}: {claim}" in text) if claim else "AUROC" not in text
