"""Means of groups with their intervals: where they were said to be, and none where nothing may be claimed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from matplotlib.markers import CARETLEFT, CARETRIGHT

from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.visualizations import Estimate, plot_class_comparison
from tests.messages import tells
from tests.visualizations.conftest import drawn_groups, panels, texts

NAN = float("nan")
CLASSES = [Estimate(0.3, 0.26, 0.35, 23), Estimate(0.5, NAN, NAN, 4), Estimate(NAN, NAN, NAN, 0)]
OUTCOMES = [Estimate(0.35, 0.25, 0.45, 19), Estimate(0.2, 0.12, 0.28, 8)]
NAMES = ["a", "b", "c"]


def test_the_null_stands_in_the_panel_that_it_is_of_and_in_the_legend() -> None:
    quantities = {"alignment (Pearson r)": (CLASSES, OUTCOMES), "entropy (0: one key)": (CLASSES, OUTCOMES)}
    figure = plot_class_comparison(quantities, NAMES, nulls={"alignment (Pearson r)": 0.07})
    found = [[line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"] for ax in panels(figure)]
    assert found == [[0.07], []]
    assert "null: alignment of different samples" in texts(figure)
    assert "null" not in texts(plot_class_comparison(quantities, NAMES))


def test_rows_are_named_and_counted_and_the_first_is_at_the_top() -> None:
    fewer = [replace(CLASSES[0], count=20), *CLASSES[1:]]
    figure = plot_class_comparison({"x": (CLASSES, OUTCOMES), "y": (fewer, OUTCOMES)}, NAMES, context="test")
    first, second = panels(figure)
    for ax, n in ((first, 23), (second, 20)):
        for group, (mean, low, high) in zip([*CLASSES, *OUTCOMES], drawn_groups(ax), strict=True):
            assert (mean, low, high) == pytest.approx((group.mean, group.low, group.high), nan_ok=True)
        # A line parts the outcomes from the classes.
        assert [line.get_ydata()[0] for line in ax.lines if len(set(line.get_xdata())) == 2] == [2.5]
        said = [label.get_text() for label in ax.get_yticklabels()]
        assert said == [f"a (n={n})", "b (n=4)", "c (n=0)", "correct (n=19)", "incorrect (n=8)"]
        assert ax.yaxis_inverted()
    said = texts(figure).replace("\n", " ")
    assert "per true class and outcome, with its 95 % CI" in said
    assert "test" in said


def test_numbers_of_one_range_have_one_scale() -> None:
    narrow = [replace(group, low=group.mean - 0.01, high=group.mean + 0.01) for group in CLASSES]
    moved = [replace(group, mean=group.mean + 3, low=group.low + 3, high=group.high + 3) for group in CLASSES]
    quantities = {
        "alignment (Pearson r)": (CLASSES, OUTCOMES),
        "entropy a (0: one key)": (narrow, OUTCOMES),
        "entropy b (0: one key)": (moved, OUTCOMES),
    }
    alone, *shared = panels(plot_class_comparison(quantities, NAMES))
    assert shared[0].get_xlim() == shared[1].get_xlim()
    assert shared[0].get_xlim() != alone.get_xlim()
    low, high = shared[0].get_xlim()
    for ax in shared:
        assert all(low < mean < high for mean, *_ in drawn_groups(ax) if not math.isnan(mean))


def test_few_samples_are_said() -> None:
    assert "fewer than 5 samples" in texts(plot_class_comparison({"x": (CLASSES, OUTCOMES)}, NAMES))
    enough = plot_class_comparison({"x": (CLASSES[:1], OUTCOMES)}, NAMES[:1])
    assert "fewer" not in texts(enough)
    absent = plot_class_comparison({"x": ([CLASSES[0], CLASSES[2]], OUTCOMES)}, ["a", "c"])
    assert "fewer" not in texts(absent), "a class without samples needs no word"


def test_intervals_by_group_are_said() -> None:
    figure = plot_class_comparison({"x": (CLASSES, OUTCOMES)}, NAMES, group_noun="patients")
    said = texts(figure).replace("\n", " ")
    assert "95 % CI by patients" in said
    assert "fewer than 5 patients" in said
    assert "n: samples, and of how many patients" in said
    counted = [replace(group, groups=3) for group in CLASSES]
    (ax,) = panels(plot_class_comparison({"x": (counted, OUTCOMES)}, NAMES, group_noun="patients"))
    assert ax.get_yticklabels()[0].get_text() == "a (n=23 of 3)"


def test_outcomes_differ_in_marker_and_from_the_classes_in_colour() -> None:
    (ax,) = panels(plot_class_comparison({"x": ([], OUTCOMES)}, [], classes_by=None))
    assert [points.get_marker() for points, _, _ in ax.containers] == ["o", "s"]
    (ax,) = panels(plot_class_comparison({"x": (CLASSES, OUTCOMES)}, NAMES))
    classes, *_, correct, incorrect = (points for points, _, _ in ax.containers)
    assert (classes.get_color(), classes.get_markerfacecolor(), classes.get_marker()) == ("black", "black", "o")
    blue, orange = "#0072B2", "#C04A00"
    assert (correct.get_color(), correct.get_markerfacecolor()) == (blue, blue)
    assert (incorrect.get_color(), incorrect.get_markerfacecolor()) == (orange, "white")


def test_an_interval_that_reaches_beyond_the_limits_is_cut_off_with_an_arrow() -> None:
    wide = [Estimate(0.5, -40.0, 41.0, 6), Estimate(0.5, 0.4, 41.0, 6)]
    figure = plot_class_comparison({"x": (wide, OUTCOMES)}, ["a", "b"], limits=(-0.6, 1.6))
    (ax,) = panels(figure)
    assert ax.get_xlim() == (-0.6, 1.6)
    arrows = {line.get_marker(): line for line in ax.lines if line.get_marker() in (CARETLEFT, CARETRIGHT)}
    found = {marker: (line.get_xdata().tolist(), line.get_ydata().tolist()) for marker, line in arrows.items()}
    assert found == {CARETLEFT: ([-0.6], [0]), CARETRIGHT: ([1.6, 1.6], [0, 1])}
    assert "goes on beyond the panel" in texts(figure)
    within = plot_class_comparison({"x": (CLASSES, OUTCOMES)}, NAMES, limits=(-0.6, 1.6))
    assert "goes on beyond the panel" not in texts(within)


@pytest.mark.parametrize(
    ("quantities", "settings", "error", "facts"),
    [
        ({}, {}, SettingError, ["quantity", "got none"]),
        ({"x": (CLASSES[:1], OUTCOMES)}, {}, ShapeError, ["'x'", "3 classes", "2 outcomes", "got 1 and 2"]),
        ({"x": (CLASSES, OUTCOMES[:1])}, {}, ShapeError, ["'x'", "3 classes", "2 outcomes", "got 3 and 1"]),
        ({"x": (CLASSES, OUTCOMES)}, {"classes_by": "x"}, SettingError, ["'target', 'prediction', None", "got 'x'"]),
    ],
)
def test_what_does_not_fit_is_said(quantities, settings, error: type[Exception], facts: list[object]) -> None:
    with pytest.raises(error, match=tells(*facts)):
        plot_class_comparison(quantities, NAMES, **settings)
