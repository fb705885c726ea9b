"""The card: each dot, interval, bar and printed value is the number that was given, in its row."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from lightning_xattn.core.errors import SettingError
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.visualizations import Cell, plot_card
from lightning_xattn.visualizations.drawing import HUES, LOOKS
from tests.visualizations.conftest import texts

PROBES = {"eeg": Estimate(0.75, 0.7, 0.8, 40), "spec": Estimate(0.35, 0.3, 0.42, 40)}
PROBES |= {"joint": Estimate(0.82, 0.78, 0.86, 40), "the model": Estimate(0.68, 0.6, 0.74, 40)}
SHARES = {"eeg": Estimate(0.9, 0.85, 0.95, 40), "spec": Estimate(0.1, 0.05, 0.15, 40)}
CELLS = [
    Cell("both", Estimate(0.3, 0.2, 0.4, 40), Estimate(0.93, 0.85, 0.97, 12), Estimate(0.71, 0.65, 0.77, 12)),
    Cell("neither", Estimate(0.2, 0.1, 0.3, 40), Estimate(0.25, math.nan, math.nan, 4), Estimate(0.5, 0.4, 0.6, 4)),
]


def draw(probes=PROBES, shares=SHARES, cells=CELLS, **settings) -> Figure:
    return plot_card(["eeg", "spec"], probes, shares, cells, largest_class=0.17, **settings)


def heights(figure: Figure) -> dict[str, list[float]]:
    """Where each text is, in inches from the top."""
    found: dict[str, list[float]] = {}
    for text in figure.findobj(Text):
        found.setdefault(text.get_text(), []).append(float(text.get_position()[1]))
    return found


def scale_of(figure: Figure) -> Callable[[float], float]:
    """From inches to a share of the scale from 0 to 100 %."""
    ticks = [text for text in figure.findobj(Text) if text.get_ha() == "center"]
    (zero,) = {text.get_position()[0] for text in ticks if text.get_text() == "0 %"}
    (whole,) = {text.get_position()[0] for text in ticks if text.get_text() == "100 %"}
    return lambda x: (x - zero) / (whole - zero)


def shares_at(figure: Figure, y: float) -> tuple[list[float], list[tuple[float, float]]]:
    """The dots and intervals of a row, as shares of the scale, which is that of the section's grid."""
    (zero,) = {text.get_position()[0] for text in figure.findobj(Text) if text.get_text() == "0 %"}
    (whole,) = {
        text.get_position()[0]
        for text in figure.findobj(Text)
        if text.get_text() == "100 %" and text.get_ha() == "center"
    }

    def share(x: float) -> float:
        return (x - zero) / (whole - zero)

    dots, intervals = [], []
    for line in figure.findobj(Line2D):
        x, at = line.get_xdata(), line.get_ydata()
        if len(x) == 1 and abs(at[0] - y) < 0.06:
            dots.append(share(x[0]))
        elif len(x) == 3 and math.isnan(x[2]) and at[0] == at[1] and abs(at[0] - y) < 0.06:
            intervals.append((share(x[0]), share(x[1])))
    return dots, intervals


ROWS = [("joint probe", PROBES["joint"]), ("the model", PROBES["the model"])]


def test_each_row_has_its_number_and_interval() -> None:
    figure = draw(context="test, epoch 3", sentence="It is so.")
    places = heights(figure)
    rows = [("joint probe", [PROBES["joint"]]), ("the model", [PROBES["the model"]])]
    rows += [(f"{one.name} ({100 * one.share.mean:.0f} %)", [one.accuracy, one.confidence]) for one in CELLS]
    for name, estimates in rows:
        dots, intervals = shares_at(figure, places[name][0])
        assert dots == pytest.approx([one.mean for one in estimates])
        known = [(one.low, one.high) for one in estimates if math.isfinite(one.low)]
        assert [pytest.approx(one) for one in known] == intervals
    for i, (of_probe, of_share) in enumerate((("eeg", "eeg"), ("spec", "spec"))):
        for y, one in zip(sorted(places[("EEG", "Spec")[i]]), (PROBES[of_probe], SHARES[of_share]), strict=True):
            assert shares_at(figure, y) == ([pytest.approx(one.mean)], [pytest.approx((one.low, one.high))])
    assert "It is so.\ntest, epoch 3" in texts(figure)


def test_values_stand_beside_their_rows() -> None:
    figure = draw()
    places = heights(figure)
    for name, value in {
        "joint probe": "82 %",
        "the model": "68 %",
        "both (30 %)": "93 %",
        "neither (20 %)": "25 %",
    }.items():
        assert places[name][0] in places[value]


def test_cells_have_bars_of_their_shares() -> None:
    bars = [bar.get_width() for bar in draw().findobj(Rectangle) if bar.get_height() == pytest.approx(0.14)]
    assert bars[1] / bars[0] == pytest.approx(0.2 / 0.3)


def test_the_largest_class_is_marked() -> None:
    figure = draw()
    assert "largest class (17 %)" in texts(figure)
    (mark,) = [
        line for line in figure.findobj(Line2D) if line.get_linestyle() == ":" and math.isnan(line.get_xdata()[-1])
    ]
    (zero,) = {text.get_position()[0] for text in figure.findobj(Text) if text.get_text() == "0 %"}
    (whole,) = {t.get_position()[0] for t in figure.findobj(Text) if t.get_text() == "100 %" and t.get_ha() == "center"}
    assert (mark.get_xdata()[0] - zero) / (whole - zero) == pytest.approx(0.17)


def test_what_is_not_computed_says_why() -> None:
    figure = draw(shares="Not computed: needs 128 samples, this run had 97.", cells="Not computed.")
    assert "Not computed: needs 128 samples, this run had 97." in texts(figure)
    assert texts(figure).split("\n").count("accuracy") == 1, "over the values of the probes"


def test_an_undefined_number_has_a_dash_and_no_dot() -> None:
    undefined = Estimate(math.nan, math.nan, math.nan, 0)
    figure = draw(probes=PROBES | {"joint": undefined})
    y = heights(figure)["joint probe"][0]
    assert shares_at(figure, y) == ([], [])
    assert y in heights(figure)["\N{EN DASH}"]


def test_what_lies_beyond_the_scale_is_marked() -> None:
    figure = draw(shares={"eeg": Estimate(1.11, 0.95, 1.3, 40), "spec": Estimate(-0.11, -0.3, 0.05, 40)})
    assert "Arrow: goes on beyond the panel." in texts(figure).replace("\n", " ")
    assert "111 %" in texts(figure)
    assert "Arrow" not in texts(draw())


def test_few_samples_make_no_claim() -> None:
    assert "No line: fewer than 5 patients, no claim." in texts(draw(group_noun="patients")).replace("\n", " ")
    assert "95 % CI by patients" in texts(draw(group_noun="patients"))


def test_modalities_have_colours_that_no_outcome_has() -> None:
    assert not {to_hex(one) for one in HUES} & {to_hex(look.colour) for look in LOOKS.values()}
    used = {to_hex(line.get_color()) for line in draw().findobj(Line2D)}
    assert {to_hex(HUES[0]), to_hex(HUES[1])} <= used


def test_a_card_needs_a_modality() -> None:
    with pytest.raises(SettingError, match="At least one modality"):
        plot_card([], {}, {}, [])


def test_values_have_headings_and_long_names_an_ellipsis() -> None:
    figure = draw(cells=[CELLS[0]._replace(name="supported by each one of all modalities")])
    assert texts(figure).split("\n").count("accuracy") == 3, "probes, cells, and the legend"
    assert "supported by each one of… (30 %)" in texts(figure)
