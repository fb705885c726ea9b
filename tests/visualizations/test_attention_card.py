"""The attention card: each dot and interval is the number that was given, in its class's row and its panel."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.visualizations import Measure, plot_attention_card, render
from lightning_xattn.visualizations.drawing import LOOKS
from tests.messages import tells
from tests.visualizations.conftest import make_maps, texts

CLASSES = [Estimate(0.5, 0.4, 0.6, 40), Estimate(0.3, 0.2, 0.45, 30), Estimate(math.nan, math.nan, math.nan, 0)]
OUTCOMES = [Estimate(0.55, 0.5, 0.6, 50), Estimate(0.2, math.nan, math.nan, 3)]
OTHER = [Estimate(0.9, 0.88, 0.93, 40)] * 3, [Estimate(0.8, 0.78, 0.83, 50), Estimate(0.7, 0.68, 0.73, 20)]
MEASURES = [Measure("alignment", CLASSES, OUTCOMES, null=0.1), Measure("entropy", *OTHER)]
NAMES = ["a", "b", "c"]


def draw(measures=MEASURES, maps=None, **settings) -> Figure:
    return plot_attention_card(measures, maps or {}, [40, 30, 0], NAMES, **settings)


def test_each_class_and_outcome_has_its_number_and_interval() -> None:
    figure = draw()
    rows = {text.get_text(): text.get_position()[1] for text in figure.findobj(Text)}
    dots = [line for line in figure.findobj(Line2D) if line.get_linestyle() == "None"]
    assert len(dots) == 6, "classes, correct and incorrect of two panels"
    # In each panel places are a linear function of numbers: the two known classes give it, the rest must follow.
    for panel, measure in enumerate(MEASURES):
        classes, correct, incorrect = dots[3 * panel : 3 * panel + 3]
        assert classes.get_ydata() == pytest.approx([rows[name] for name in NAMES])
        assert correct.get_ydata() == pytest.approx([rows["correct"]])
        assert incorrect.get_ydata() == pytest.approx([rows["incorrect"]])
        found = [*classes.get_xdata(), *correct.get_xdata(), *incorrect.get_xdata()]
        means = [one.mean for one in (*measure.classes, *measure.outcomes)]
        known = np.isfinite(means)
        assert np.isnan(found).tolist() == (~known).tolist()
        slope, offset = np.polyfit(np.array(means)[known], np.array(found)[known], 1)
        assert slope > 0
        np.testing.assert_allclose(slope * np.array(means)[known] + offset, np.array(found)[known], atol=1e-9)
        ends = [(one.low, one.high) for one in (*measure.classes, *measure.outcomes) if math.isfinite(one.low)]
        drawn = [
            tuple((x[i : i + 2] - offset) / slope)
            for line in figure.findobj(Line2D)
            if line.get_linewidth() == 1.4
            for x in [np.asarray(line.get_xdata())]
            for i in range(0, len(x), 3)
        ]
        for one in ends:
            assert any(one == pytest.approx(other) for other in drawn)


def test_outcomes_look_as_everywhere() -> None:
    dots = [line for line in draw().findobj(Line2D) if line.get_linestyle() == "None"]
    for line, look in zip(dots[1:3], LOOKS.values(), strict=True):
        assert to_hex(line.get_color()) == to_hex(look.colour)
        assert line.get_marker() == look.marker


def test_the_null_is_drawn_where_it_is_known() -> None:
    assert "Dotted: alignment of different samples (null)." in texts(draw()).replace("\n", " ")
    assert "Dotted" not in texts(draw(MEASURES[1:]))


def test_few_samples_make_no_claim() -> None:
    assert "No line: fewer than 5 patients" in texts(draw(group_noun="patients")).replace("\n", " ")
    assert "No line" not in texts(draw(MEASURES[1:]))


def test_the_maps_come_below() -> None:
    maps = {"eeg_to_spec": make_maps(3, 4, 7)}
    figure = draw(maps=maps)
    said = texts(figure)
    assert "Mean attention maps" in said
    assert "EEG → Spec\n4 queries, 7 keys" in said
    named = plot_attention_card(MEASURES, {"x_to_y": make_maps(1, 4, 7)}, [70], NAMES, map_names=["all samples"])
    assert "all samples (n=70)" in texts(named)


def test_noise_does_not_fill_a_panel() -> None:
    alike = [Estimate(0.5, 0.499, 0.501, 40)] * 3, [Estimate(0.508, 0.507, 0.509, 50)] * 2
    figure = draw([Measure("entropy", *alike)])
    ticks = [float(t.get_text()) for t in figure.findobj(Text) if t.get_text().replace(".", "").isdigit()]
    assert max(ticks) - min(ticks) >= 0.05


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match=tells("'alignment'", "3 classes", "2 outcomes", "got 1 and 2")):
        draw([Measure("alignment", CLASSES[:1], OUTCOMES)])
    with pytest.raises(SettingError, match="At least one measure or map"):
        draw([])


def test_long_titles_break_between_words_and_numbers_keep_apart() -> None:
    names = "electroencephalogram", "spectrogram"
    titles = "alignment", f"entropy {names[0]} → {names[1]}", f"entropy {names[1]} → {names[0]}"
    figure = draw([Measure(title, CLASSES, OUTCOMES) for title in titles])
    said = texts(figure)
    assert "spectrogram" in said.split()
    assert any(word.startswith("electroencep") and word.endswith("…") for word in said.split())
    render(figure)
    boxes = [t.get_window_extent() for t in figure.findobj(Text) if t.get_text().replace(".", "").isdigit()]
    assert len(boxes) >= 3
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
