"""What stands in an epoch's figures is what the summary says: each number at its class, head, direction and outcome."""

import numpy as np
import pytest

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
    assert list(figures) == ["map/eeg_to_spec", "map/spec_to_eeg", "entropy/by_head", "outcome/class_comparison"]
    assert all("epoch 4" in texts(figure) for figure in figures.values())


def test_whatever_loggers_get_is_legible_at_the_size_that_tensorboard_shows(one):
    data, _ = said_data(60)
    fusion = summary_of(trained(None, data, epochs=5), data)
    records = [
        {"stage": "val", "epoch": epoch, "step": epoch, "alignment/all": 0.1, "probed_samples": 9} for epoch in (0, 1)
    ]
    drawn_figures = {"overview": overview_figure(records, "val"), **dict(dataset_figures(dataset(one, fusion=fusion)))}
    kinds = {"overview", "map", "entropy", "contribution", "class"}
    assert {name.partition("_")[0] for name in drawn_figures} == kinds
    assert {
        name: smallest_text(figure, 324) for name, figure in drawn_figures.items() if smallest_text(figure, 324) < 9
    } == {}


@pytest.mark.parametrize("direction", ["eeg_to_spec", "spec_to_eeg"])
def test_each_class_and_outcome_has_its_map_and_its_count(one, figures, direction):
    maps, by_outcome = (
        {str(name): of_direction.numpy() for name, of_direction in them.items()}[direction]
        for them in (one.maps, one.outcome_maps)
    )
    given = np.concatenate([maps, by_outcome[[CORRECT, INCORRECT]]])
    names, keys = [*NAMES, "correct", "incorrect"], maps.shape[2]
    for panel, name, samples, weights in zip(
        panels(figures[f"map/{direction}"]), names, (19, 11, 7, 24, 12), given, strict=True
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


def test_each_modality_has_its_share_of_each_class_and_outcome():
    data, _ = said_data(60)
    fusion = summary_of(trained(None, data, epochs=5), data)
    names = [f"class {i}" for i in range(fusion.n_classes)]
    ((tag, figure),) = fusion_figures(fusion, "val", names, classes_by="target", context="")
    assert tag == "xattn_contribution/val/shares"
    places = [*((i, None) for i in range(len(names))), (None, CORRECT), (None, INCORRECT)]
    for panel, modality in zip(panels(figure), fusion.modalities, strict=True):
        means = np.concatenate([container.lines[0].get_xdata() for container in panel.containers])
        shares = [100 * fusion.share(modality, *place).mean for place in places]
        assert np.isfinite(shares).any()
        np.testing.assert_allclose(means, shares, rtol=1e-6)
        assert f"share of {modality.capitalize()} (% of the contributions)" in texts(figure)
