"""What stands in the figures of modalities is what they were given."""

import numpy as np
import pytest
from matplotlib.markers import CARETLEFT, CARETRIGHT

from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.visualizations import (
    Mean,
    SampleRow,
    plot_conflict,
    plot_conflicting_samples,
    plot_contribution_shares,
)
from tests.visualizations.conftest import panels, texts

NAN = float("nan")
CONFLICT, CONFIDENCE = [0.1, 0.9, 0.5, NAN, 0.3], [0.9, 0.4, 0.6, 0.7, NAN]
CORRECT = [True, False, True, True, False]
CLASSES = [Mean(23, 0.8, 0.7, 0.9, 7), Mean(4, 0.6, NAN, NAN, 2), Mean(0, NAN, NAN, NAN, 0)]
OUTCOMES = [Mean(19, 0.75, 0.65, 0.85, 7), Mean(8, 1.1, 0.9, 1.3, 5)]
NAMES = ["a", "b", "c"]


def other(groups):
    """The shares of the other one of two modalities."""
    return [one._replace(mean=1 - one.mean, low=1 - one.high, high=1 - one.low) for one in groups]


SHARES = {"eeg": (CLASSES, OUTCOMES), "spec": (other(CLASSES), other(OUTCOMES))}
ROWS = [
    SampleRow("3: GPD (0.58)\ntrue: LPD", {"eeg": ("GPD", 0.71), "spec": ("$x$", 0.64)}, {"eeg": 0.4, "spec": -0.1}),
    SampleRow("8: LPD (0.91)", {"eeg": ("LPD", 0.99), "spec": ("GPD", 0.55)}, {}),
]


def test_each_sample_is_where_its_numbers_are_and_errors_are_marked():
    claims = {"confidence": "finds errors: AUROC 0.83", "conflict": "AUROC 0.72"}
    figure = plot_conflict(CONFLICT, CONFIDENCE, CORRECT, claims=claims, context="val, epoch 3")
    (ax,) = panels(figure)
    right, wrong = (np.asarray(points.get_offsets()) for points in ax.collections)
    np.testing.assert_allclose(right, [[0.9, 0.1], [0.6, 0.5]])
    np.testing.assert_allclose(wrong, [[0.4, 0.9]])
    said = texts(figure)
    assert all(one in said for one in ("correct (n=2)", "incorrect (n=1)", *claims.values(), "val, epoch 3"))
    assert ax.get_xlabel() == "confidence of the prediction"
    assert ax.get_ylabel() == "conflict of the probes"


def test_each_modality_has_its_share_of_each_class_with_its_interval():
    figure = plot_contribution_shares(SHARES, NAMES, group_noun="patients", context="test")
    (ax,) = panels(figure)
    bars = [one for one in ax.containers if hasattr(one, "patches")]
    intervals = [one for one in ax.containers if not hasattr(one, "patches")]
    for of_bars, of_intervals, (classes, outcomes) in zip(bars, intervals, SHARES.values(), strict=True):
        groups = [*classes, *outcomes]
        np.testing.assert_allclose([bar.get_width() for bar in of_bars], [one.mean for one in groups])
        ends = [segment[:, 0] for segment in of_intervals[2][0].get_segments() if len(segment)]
        known = [one for one in groups if np.isfinite(one.low)]
        np.testing.assert_allclose(ends, [(one.low, one.high) for one in known])
        assert [round(bar.get_y() + bar.get_height() / 2) for bar in of_bars] == list(range(5))
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        *("a (n=23 of 7)", "b (n=4 of 2)", "c (n=0 of 0)", "correct (n=19 of 7)", "incorrect (n=8 of 5)"),
    ]
    said = texts(figure).replace("\n", " ")
    assert all(one in said for one in ("EEG", "Spec", "per true class", "by patients", "fewer than 5 patients"))
    assert ax.xaxis.get_major_formatter()(0.5) == "50 %"
    low, high = ax.get_xlim()
    assert low < -0.3
    assert high > 1.3


def test_an_interval_that_reaches_beyond_all_shares_is_cut_off_with_an_arrow():
    wide = [Mean(6, 0.5, -40.0, 41.0), Mean(6, 0.5, 0.4, 41.0)]
    figure = plot_contribution_shares({"eeg": (wide, OUTCOMES)}, ["a", "b"])
    (ax,) = panels(figure)
    assert ax.get_xlim() == (-0.6, 1.6)
    arrows = {line.get_marker(): line for line in ax.lines if line.get_marker() in (CARETLEFT, CARETRIGHT)}
    found = {marker: (line.get_xdata().tolist(), line.get_ydata().tolist()) for marker, line in arrows.items()}
    assert found == {CARETLEFT: ([-0.6], [0]), CARETRIGHT: ([1.6, 1.6], [0, 1])}
    assert "goes on beyond the panel" in texts(figure)
    assert "goes on beyond the panel" not in texts(plot_contribution_shares(SHARES, NAMES))


def test_each_sample_has_what_its_modalities_say_and_carry():
    figure = plot_conflicting_samples(ROWS, context="test")
    left, right = panels(figure)
    for i, name in enumerate(("eeg", "spec")):
        assert [bar.get_width() for bar in left.containers[i]] == [one.probes[name][1] for one in ROWS]
        carried = [bar.get_width() for bar in right.containers[i]]
        np.testing.assert_allclose(carried, [one.contributions.get(name, NAN) for one in ROWS])
    said = texts(figure)
    assert all(one in said for one in ("GPD 0.71", "$x$ 0.64", "LPD 0.99", "3: GPD (0.58), true: LPD", "not permuted"))
    assert left.yaxis_inverted()


@pytest.mark.parametrize(
    ("draw", "error", "said"),
    [
        (lambda: plot_conflict(CONFLICT, CONFIDENCE[:3], CORRECT), ShapeError, "confidence"),
        (lambda: plot_contribution_shares({}, NAMES), SettingError, "1 to 4 modalities"),
        (lambda: plot_contribution_shares({"eeg": (CLASSES[:2], OUTCOMES)}, NAMES), ShapeError, "3 classes"),
        (lambda: plot_contribution_shares(SHARES, NAMES, classes_by="sex"), SettingError, "classes_by"),
        (lambda: plot_conflicting_samples([]), SettingError, "At least one sample"),
    ],
)
def test_what_cannot_be_drawn(draw, error, said):
    with pytest.raises(error, match=said):
        draw()
