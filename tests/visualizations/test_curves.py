"""The figure of epochs: each curve, interval and reference is drawn as given, and the legend names it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.text import Text

from lightning_xattn.visualizations import Curve, Panel, plot_epochs
from lightning_xattn.visualizations.drawing import LOOKS
from lightning_xattn.visualizations.plots import write_ticks
from tests.visualizations.conftest import texts

EPOCHS = [3, 5, 6]
CURVES = [
    Curve("correct", EPOCHS, [0.25, 0.5, math.nan], [0.125, 0.25, math.nan], [0.375, 0.75, math.nan]),
    Curve("incorrect", EPOCHS, [0.5, 0.625, 0.75]),
    Curve("third", EPOCHS, [0.25, 0.25, 0.25], [0.125, 0.125, 0.125], [0.375, 0.375, 0.375]),
]
GIVEN = [
    Panel("alignment", CURVES, (-1, 1), ("null", [0.0, 0.0625, 0.125])),
    Panel("entropy", CURVES[1:2], (0, 1)),
    Panel("nothing", [Curve("a", EPOCHS, [math.nan] * 3)], (0, 1), ("chance", [math.nan] * 3)),
]


def is_drawn(figure, artist):
    """Whether it is a part of the figure, and is seen there."""
    return artist in figure.get_children() and artist.get_visible()


def legend_of(figure):
    """What is written beside each of the legends' lines, in the order of the page's columns."""
    written = {text.get_position(): text.get_text() for text in figure.findobj(Text)}
    lines = [line for line in figure.findobj(Line2D) if line.get_markevery() == [1]]
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
    return [next(text for (x, y), text in written.items() if y == end[1] and 0 < x - end[0] < 0.2) for end in ends]


def test_each_curve_has_its_numbers_its_band_and_its_entry_in_the_legend():
    figure = plot_epochs(GIVEN, unit="step", context="val, step 6")
    shown = figure.plots
    areas = [plot.area for plot in shown]
    assert areas[0].y0 == areas[1].y0 < areas[2].y0
    assert areas[0].x1 < areas[1].x0
    assert areas[0].width == pytest.approx(areas[1].width)
    assert [(plot.title, plot.label) for plot in shown] == [(one.title, "step") for one in GIVEN]
    assert {"alignment", "entropy", "nothing", "step"} <= set(texts(figure).splitlines())
    assert "Step by step\nval, step 6\nBands and bars: 95 % CI." in texts(figure)
    # Of each panel, below it.
    assert legend_of(figure) == ["correct", "incorrect", "third", "null", "incorrect"]
    for plot, given in zip(shown[:2], GIVEN, strict=False):
        name, reference = given.reference
        expected = {curve.name: curve.values for curve in given.curves} | ({name: reference} if name else {})
        assert [line.get_label() for line in plot.lines] == list(expected)
        for line, values in zip(plot.lines, expected.values(), strict=True):
            assert is_drawn(figure, line)
            assert line.get_xdata().tolist() == EPOCHS
            np.testing.assert_array_equal(line.get_ydata(), values)
        with_ends = [curve for curve in given.curves if curve.low]
        assert list(plot.bands) == [curve.name for curve in with_ends]
        for curve in with_ends:
            band = plot.bands[curve.name]
            assert is_drawn(figure, band)
            known = [i for i, low in enumerate(curve.low) if math.isfinite(low)]
            ends = {(EPOCHS[i], end[i]) for i in known for end in (curve.low, curve.high)}
            assert {tuple(point) for point in band.get_path().vertices} == ends
            (line,) = (line for line in plot.lines if line.get_label() == curve.name)
            np.testing.assert_allclose(band.get_facecolor()[:3], to_rgb(line.get_color()))
    for line, name in zip(shown[0].lines, ("correct", "incorrect"), strict=False):
        look = LOOKS[name]
        assert (line.get_color(), line.get_linestyle(), line.get_marker()) == (look.colour, look.line, look.marker)
    # What there is, with 8 % around it, and no more than the numbers can be.
    assert shown[0].ylim == pytest.approx((0 - 0.08 * 0.75, 0.75 + 0.08 * 0.75))
    assert shown[1].ylim == pytest.approx((0.5 - 0.08 * 0.25, 0.75 + 0.08 * 0.25))
    assert (shown[2].note, shown[2].lines, shown[2].xticks, shown[2].yticks) == ("not computed", [], [], [])
    assert texts(figure).splitlines().count("not computed") == 1


def test_numbers_are_drawn_where_the_ticks_say():
    """A curve's point at a tick lies beside the tick's text."""
    curve = Curve("a", [0, 10, 20], [0.0, 0.5, 1.0])
    figure = plot_epochs([Panel("probes", [curve], (0, 1))])
    figure.draw_without_rendering()
    (plot,) = figure.plots
    assert plot.xticks == [0, 10, 20]
    assert plot.yticks == [0, 0.5, 1]
    height = figure.get_figheight()
    where = {text.get_text(): text for text in figure.findobj(Text)}
    for x, y in zip(curve.moments, curve.values, strict=True):
        left, bottom = plot.transform.transform((x, y)) / figure.dpi
        assert plot.area.x0 <= left <= plot.area.x1
        assert where[f"{x}"].get_position()[0] == pytest.approx(left)
        assert where[f"{y:.1f}"].get_position()[1] == pytest.approx(height - bottom)


@pytest.mark.parametrize(
    ("ticks", "expected"),
    [
        ([0.0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
        ([-0.02, 0.0], ["\N{MINUS SIGN}0.02", "0.00"]),
        ([0.1 * i for i in range(4)], ["0.0", "0.1", "0.2", "0.3"]),
        ([0.0, 3.0, 6.0], ["0", "3", "6"]),
        ([0.0, 200000.0], ["0", "200000"]),
        ([0.0, 2e7], ["0", "2e+07"]),
        ([0.0, 2e-5], ["0", "2e-05".replace("-", "\N{MINUS SIGN}")]),
        ([7.0], ["7"]),
        ([], []),
    ],
)
def test_ticks_have_the_digits_that_they_need(ticks, expected):
    assert write_ticks(ticks) == expected


def test_a_panel_ends_where_its_numbers_can_be_no_larger():
    curve = Curve("a", EPOCHS, [0.5, 0.75, 1.0], [0.25, 0.5, -0.5], [0.75, 1.5, 1.25])
    figure = plot_epochs([Panel("probes", [curve], (0, 1))])
    (plot,) = figure.plots
    assert plot.ylim == pytest.approx((-0.08, 1.08))
    assert legend_of(figure) == ["a", "goes on beyond the panel"]
    below, above = plot.marks
    assert (below.get_xdata().tolist(), below.get_ydata().tolist()) == ([6], [plot.ylim[0]])
    assert (above.get_xdata().tolist(), above.get_ydata().tolist()) == ([5, 6], [plot.ylim[1]] * 2)
    narrow = Curve("a", EPOCHS, [0.5] * 3)
    (plot,) = plot_epochs([Panel("probes", [narrow], (0, 1))]).plots
    assert plot.ylim == pytest.approx((0.45, 0.55)), "at least a tenth of what is possible"


def test_an_interval_that_is_unknown_in_between_has_two_bands():
    low, high = [0.1, math.nan, 0.2, 0.3], [0.2, 0.5, 0.4, 0.5]
    (plot,) = plot_epochs([Panel("a", [Curve("a", [0, 1, 2, 3], [0.15] * 4, low, high)], (0, 1))]).plots
    corners = {tuple(point) for point in plot.bands["a"].get_path().vertices}
    assert corners == {(0, 0.1), (0, 0.2), (2, 0.2), (2, 0.4), (3, 0.3), (3, 0.5)}


def test_a_single_moment_has_points_with_bars():
    curves = [Curve("a", [4], [0.5], [0.25], [0.625]), Curve("b", [4], [0.5], [0.5625], [0.75])]
    figure = plot_epochs([Panel("probes", curves, (0, 1), ("chance", [0.125]))])
    (plot,) = figure.plots
    assert plot.xlim == (3, 5)
    assert all(is_drawn(figure, bar) for bar in plot.bars.values())
    # An interval that does not hold the mean reaches to it.
    assert {name: bar.get_ydata() for name, bar in plot.bars.items()} == {"a": [0.25, 0.625], "b": [0.5, 0.75]}
    assert plot.ylim == pytest.approx((0.125 - 0.08 * 0.625, 0.75 + 0.08 * 0.625))
