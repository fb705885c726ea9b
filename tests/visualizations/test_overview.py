"""The figure of epochs: each curve, interval and reference is drawn as given, and the legend names it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb

from lightning_xattn.visualizations import Curve, Panel, plot_epochs
from lightning_xattn.visualizations.drawing import LOOKS
from tests.visualizations.conftest import panels, places, texts

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


def legend_of(figure):
    return [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]


def test_each_curve_has_its_numbers_its_band_and_its_entry_in_the_legend():
    figure = plot_epochs(GIVEN, unit="step", context="val, step 6")
    shown = panels(figure)
    assert places(shown) == [(0, 0), (0, 1), (1, 0)]
    assert len({round(panel.get_position().width, 3) for panel in shown[:2]}) == 1
    assert [panel.get_title() for panel in shown] == ["alignment", "entropy", "nothing"]
    assert [panel.get_xlabel() for panel in shown] == ["step"] * 3
    assert "Step by step\nval, step 6\nBands and bars: 95 % CI." in texts(figure)
    # Of each panel, below it.
    assert legend_of(figure) == [["correct", "incorrect", "third", "null"], ["incorrect"]]
    for panel, given in zip(shown[:2], GIVEN, strict=False):
        name, reference = given.reference
        expected = {curve.name: curve.values for curve in given.curves} | ({name: reference} if name else {})
        assert [line.get_label() for line in panel.lines] == list(expected)
        for line, values in zip(panel.lines, expected.values(), strict=True):
            assert line.get_xdata().tolist() == EPOCHS
            np.testing.assert_array_equal(line.get_ydata(), values)
        with_ends = [curve for curve in given.curves if curve.low]
        bands = [one for one in panel.collections if isinstance(one, PolyCollection)]
        for band, curve in zip(bands, with_ends, strict=True):
            known = [i for i, low in enumerate(curve.low) if math.isfinite(low)]
            ends = {(EPOCHS[i], end[i]) for i in known for end in (curve.low, curve.high)}
            assert {tuple(point) for point in band.get_paths()[0].vertices} == ends
            (line,) = (line for line in panel.lines if line.get_label() == curve.name)
            np.testing.assert_allclose(band.get_facecolor()[0][:3], to_rgb(line.get_color()))
    first, second = (shown[0].lines[i] for i in range(2))
    for line, name in ((first, "correct"), (second, "incorrect")):
        look = LOOKS[name]
        assert (line.get_color(), line.get_linestyle(), line.get_marker()) == (look.colour, look.line, look.marker)
    # What there is, with 8 % around it, and no more than the numbers can be.
    assert shown[0].get_ylim() == pytest.approx((0 - 0.08 * 0.75, 0.75 + 0.08 * 0.75))
    assert shown[1].get_ylim() == pytest.approx((0.5 - 0.08 * 0.25, 0.75 + 0.08 * 0.25))
    assert [text.get_text() for text in shown[2].texts] == ["not computed"]
    assert (list(shown[2].get_xticks()), list(shown[2].get_yticks())) == ([], [])


def test_a_panel_ends_where_its_numbers_can_be_no_larger():
    curve = Curve("a", EPOCHS, [0.5, 0.75, 1.0], [0.25, 0.5, -0.5], [0.75, 1.5, 1.25])
    figure = plot_epochs([Panel("probes", [curve], (0, 1))])
    (panel,) = panels(figure)
    assert panel.get_ylim() == pytest.approx((-0.08, 1.08))
    assert legend_of(figure) == [["a", "goes on beyond the panel"]]
    narrow = Curve("a", EPOCHS, [0.5] * 3)
    (panel,) = panels(plot_epochs([Panel("probes", [narrow], (0, 1))]))
    assert panel.get_ylim() == pytest.approx((0.5 - 0.08 * 0.02, 0.5 + 0.08 * 0.02))


def test_a_single_moment_has_points_with_bars():
    curves = [Curve("a", [4], [0.5], [0.25], [0.625]), Curve("b", [4], [0.5], [0.5625], [0.75])]
    (panel,) = panels(plot_epochs([Panel("probes", curves, (0, 1), ("chance", [0.125]))]))
    assert panel.get_xlim() == (3, 5)
    ends = [bars.lines[2][0].get_segments()[0][:, 1].tolist() for bars in panel.containers]
    # An interval that does not hold the mean reaches to it.
    assert ends == [[0.25, 0.625], [0.5, 0.75]]
    assert panel.get_ylim() == pytest.approx((0.125 - 0.08 * 0.625, 0.75 + 0.08 * 0.625))
