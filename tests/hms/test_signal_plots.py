"""Attention over the signals: everything at its second, one scale where panels are compared, gaps left as gaps."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection

from lightning_xattn.core.attention import Attention, AttentionPair, Direction, TokenAxis
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.hms.features import spectrogram_spans
from lightning_xattn.hms.montage import (
    ELECTRODES,
    REGIONS,
    derive,
)
from lightning_xattn.hms.recording_plots import Spectrograms, Traces, find_page
from lightning_xattn.hms.recordings import COMPETITION, IIIC
from lightning_xattn.hms.signal_plots import plot_attention_over_signals
from tests import reference
from tests.messages import tells
from tests.visualizations.conftest import drawn, make_pair, make_spectrograms, make_traces, mesh, texts

AXES = {"eeg": TokenAxis("EEG window", spans=COMPETITION.spans), "spec": TokenAxis("window", spans=spectrogram_spans())}
# Of rows that are left out figures warn, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*not finite or do not sum to 1:lightning_xattn.XAttnWarning")

PAIR = make_pair(queries=9, keys=119)
TRACES, SPECTROGRAMS = make_traces(), make_spectrograms()
NAN, CONTEXT = float("nan"), "sample 3001, predicted LPD (0.82), true GPD"


def plot(traces=TRACES, spectrograms=SPECTROGRAMS, pair=PAIR, sample_idx=1, axes=AXES, **settings):
    return plot_attention_over_signals(traces, spectrograms, pair, sample_idx, axes=axes, **settings)


class Parts:
    """The panels by what they show."""

    def __init__(self, figure):
        self.figure = figure
        self.eeg, *axes = (ax for ax in figure.axes if ax.get_label() != "<colorbar>")
        is_longer = axes[0].get_title(loc="left").startswith("The whole")
        self.whole = axes.pop(0) if is_longer else None
        self.eeg_strip, self.links, *spectrograms = axes[:6]
        self.spectrograms, self.spec_strip, self.maps = spectrograms, axes[6], axes[7:]


@cache
def default() -> Parts:
    """What most tests look at: drawn once, and changed by none."""
    return Parts(plot(context=CONTEXT))


def segments(ax):
    (lines,) = (c for c in ax.collections if isinstance(c, LineCollection))
    return np.array(lines.get_segments())


def test_traces_stand_at_their_seconds_negative_up_and_to_scale() -> None:
    values = np.zeros((2000, 3))
    values[400:, 1] = -1.0  # most of it, so the offset that is removed
    values[800:1000, 1] = 79.0
    traces = Traces(values, 200, ["a", "b", "c"], start=-5)
    axes = {"eeg": TokenAxis("w", spans=IIIC.spans), "spec": AXES["spec"]}
    parts = Parts(plot(traces, axes=axes))
    lines = parts.eeg.lines
    np.testing.assert_allclose(lines[1].get_xdata(), np.arange(2000) / 200 - 5)
    assert parts.eeg.get_xlim() == (-5, 5)
    assert parts.eeg.yaxis_inverted()
    y = np.asarray(lines[1].get_ydata())
    assert y[500] == pytest.approx(1), "at its row"
    # Rows count downwards: a positive value lies below its row. The bar beside says how much a distance is.
    (bar,) = (line for line in parts.eeg.lines if line.get_marker() == "_")
    (said,) = (text.get_text() for text in parts.eeg.texts)
    microvolts = float(said.removesuffix(" µV"))
    assert 0.4 < np.ptp(bar.get_ydata()) <= 1, "a round number of microvolts, no higher than a row"
    assert (y[900] - y[500]) / np.ptp(bar.get_ydata()) * microvolts == pytest.approx(80)
    assert [label.get_text() for label in parts.eeg.get_yticklabels()] == ["a", "b", "c"]


def test_ten_seconds_around_the_labelled_moment_are_drawn_to_be_read_and_marked_in_the_whole() -> None:
    parts = default()
    assert parts.eeg.get_xlim() == (-5, 5)
    assert "10 s around the labelled moment, referential montage" in parts.eeg.get_title(loc="left")
    np.testing.assert_allclose(parts.eeg.lines[3].get_xdata(), np.arange(-5, 5, 1 / 200), atol=1e-9)
    np.testing.assert_allclose(parts.whole.lines[3].get_xdata(), np.arange(-25, 25, 1 / 200), atol=1e-9)
    shown = np.asarray(TRACES.microvolts)[4000:6000, 3]
    y = np.asarray(parts.eeg.lines[3].get_ydata())
    assert np.corrcoef(y, shown)[0, 1] == pytest.approx(1), "these seconds and no others"
    (shade,) = parts.whole.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (-5, 5)
    assert parts.whole.get_title(loc="left") == "The whole 50 s (shaded: the 10 s above)"


@pytest.mark.parametrize(
    ("extent", "page"),
    [((-25, 25), (-5, 5)), ((-5, 5), (-5, 5)), ((-3, 4), (-3, 4)), ((-2, 30), (-2, 8)), ((-40, -8), (-18, -8))],
)
def test_of_a_recording_that_ends_early_the_nearest_ten_seconds_are_drawn(extent, page) -> None:
    assert find_page(extent) == page


def test_the_bipolar_montage_is_each_electrode_less_the_next_one_of_its_chain() -> None:
    values = np.random.default_rng(0).normal(size=(50, 19))
    found = derive(values, ELECTRODES, "bipolar")
    assert list(found.names) == [
        *("Fp1-F7", "F7-T3", "T3-T5", "T5-O1"),
        *("Fp2-F8", "F8-T4", "T4-T6", "T6-O2"),
        *("Fp1-F3", "F3-C3", "C3-P3", "P3-O1"),
        *("Fp2-F4", "F4-C4", "C4-P4", "P4-O2"),
        *("Fz-Cz", "Cz-Pz"),
    ]
    electrodes = dict(zip(ELECTRODES, values.T, strict=True))
    for name, trace in zip(found.names, found.microvolts.T, strict=True):
        first, second = name.split("-")
        np.testing.assert_array_equal(trace, electrodes[first] - electrodes[second])
    # Whatever the reference, and whatever the order of the electrodes.
    order = np.random.default_rng(1).permutation(19)
    again = derive(values[:, order] + 31.0, [ELECTRODES[i] for i in order], "bipolar")
    np.testing.assert_allclose(again.microvolts, found.microvolts)
    steps = np.diff(found.rows)
    assert {i for i, step in enumerate(steps) if step > 1} == {3, 7, 11, 15}, "a gap between two chains"
    assert set(np.delete(steps, [3, 7, 11, 15]).round(6)) == {1}


def test_the_bipolar_montage_is_drawn_as_it_is_derived() -> None:
    traces = dataclasses.replace(TRACES, names=ELECTRODES)
    parts = Parts(plot(traces, montage="bipolar"))
    names = [label.get_text() for label in parts.eeg.get_yticklabels()]
    assert names[:2] == ["Fp1-F7", "F7-T3"]
    assert "longitudinal bipolar montage, negative up" in parts.eeg.get_title(loc="left")
    values = np.asarray(TRACES.microvolts)[4000:6000]
    expected = values[:, ELECTRODES.index("Fp1")] - values[:, ELECTRODES.index("F7")]
    (bar,) = (line for line in parts.eeg.lines if line.get_marker() == "_")
    (said,) = (text.get_text() for text in parts.eeg.texts)
    microvolts = float(said.removesuffix(" µV")) / np.ptp(bar.get_ydata())
    np.testing.assert_allclose(
        np.asarray(parts.eeg.lines[0].get_ydata()) * microvolts, expected - np.median(expected), atol=1e-9
    )


def test_the_outer_traces_are_whole() -> None:
    values = np.random.default_rng(0).normal(0, 20, (10_000, 5))
    values[5000, 0], values[5400, 4] = -120, 110  # up, and down
    ax = Parts(plot(Traces(values, 200, list("abcde"), -25))).eeg
    bottom, top = ax.get_ylim()
    assert top < ax.lines[0].get_ydata().min() < -1.5
    assert bottom > ax.lines[4].get_ydata().max() > 5.5
    assert "leaves the panel" not in ax.get_title(loc="left")


@pytest.mark.parametrize("huge", [-1e5, 1e5])
def test_a_huge_artefact_leaves_the_panel_and_is_marked(huge: float) -> None:
    values = np.random.default_rng(0).normal(0, 20, (10_000, 5))
    values[5000, 0] = huge
    ax = Parts(plot(Traces(values, 200, list("abcde"), -25))).eeg
    bottom, top = ax.get_ylim()
    assert -4 < top < bottom < 8, "the other traces can still be read"
    assert "bars at the top: a trace leaves the panel" in ax.get_title(loc="left")
    (bar,) = [one for one in ax.collections if one.get_paths() and one.get_paths()[0].get_extents().y0 == top]
    extent = bar.get_paths()[0].get_extents()
    assert (extent.x0, extent.x1) == pytest.approx((0, 1 / 200))


def test_gaps_are_hatched_and_said() -> None:
    values = np.array(TRACES.microvolts)
    values[1000:4500, 2] = NAN
    values[:, 5] = np.inf
    power = np.array(SPECTROGRAMS.power)
    power[10:20, 1] = NAN
    power[:, 2, 3] = 0
    figure = plot(dataclasses.replace(TRACES, microvolts=values), dataclasses.replace(SPECTROGRAMS, power=power))
    parts = Parts(figure)
    assert np.isnan(parts.eeg.lines[2].get_ydata()[:500]).all()
    assert np.isfinite(parts.eeg.lines[2].get_ydata()[500:]).all()
    hatched = {i: c.get_paths()[0].get_extents() for i, c in enumerate(parts.eeg.collections) if c.get_paths()}
    assert set(hatched) == {2, 5}
    assert (hatched[2].x0, hatched[2].x1) == pytest.approx((-5, -2.5))
    assert (hatched[5].x0, hatched[5].x1) == pytest.approx((-5, 5))
    assert np.isnan(parts.whole.lines[2].get_ydata()[1000:4500]).all()
    assert np.isnan(drawn(parts.spectrograms[1])[:, 10:20]).all()
    assert np.isnan(drawn(parts.spectrograms[2])[3]).all(), "no power has no logarithm"
    assert "undefined: no signal, or no attention" in texts(figure)
    assert "undefined" not in texts(default().figure)


def test_titles_and_colours_say_what_is_shown() -> None:
    """Signals are grey, attention is in colour, and each map says who attends to whom."""
    parts = default()
    assert parts.figure.get_suptitle() == f"Attention over the signals ({CONTEXT})"
    assert "s from the labelled moment" in texts(parts.figure)
    said = [ax.get_title(loc="left").replace("\n", " ") for ax in (parts.eeg_strip, parts.spec_strip, *parts.maps)]
    for text, start in zip(
        said,
        (
            "Attention that each EEG window receives (Spec → EEG)",
            "Attention that each Spec window receives (EEG → Spec)",
            "EEG → Spec: which Spec window each EEG window attends to (lift ",
            "Spec → EEG: which EEG window each Spec window attends to (lift ",
        ),
        strict=True,
    ):
        assert text.startswith(start)
    assert [ax.get_ylabel() for ax in parts.maps] == ["eeg (s)", "eeg (s)"], "in both maps the EEG's windows go down"
    assert {mesh(ax).get_cmap().name for ax in parts.spectrograms} == {"Greys"}
    bars = [ax for ax in parts.figure.axes if ax.get_label() == "<colorbar>"]
    assert [(ax.get_ylabel().partition("\n")[0], mesh(ax).get_cmap().name) for ax in bars] == [
        ("power (dB)", "Greys"),
        ("lift (line: 1)", "viridis"),
        ("lift (line: 1)", "viridis"),
    ]


def test_spectrograms_are_log_power_on_one_scale_at_their_time_and_frequency() -> None:
    parts = default()
    for index, ax in enumerate(parts.spectrograms):
        np.testing.assert_allclose(drawn(ax), 10 * np.log10(np.asarray(SPECTROGRAMS.power)[:, index].T))
        corners = mesh(ax).get_coordinates()
        np.testing.assert_allclose(corners[0, :, 0], np.arange(-300, 301, 2))
        step = (19.9 - 0.6) / 99
        np.testing.assert_allclose(corners[:, 0, 1], 0.6 + step * (np.arange(101) - 0.5))
        assert ax.get_ylabel() == REGIONS[index]
        # The EEG's stretch is marked.
        assert [line.get_xdata()[0] for line in ax.lines] == [-25, 25]
    # Single artefacts do not take the scale.
    limits = np.percentile(10 * np.log10(SPECTROGRAMS.power), (2, 98))
    for ax in parts.spectrograms:
        assert mesh(ax).get_clim() == pytest.approx(limits)


def test_strips_show_what_each_window_receives_at_its_full_extent() -> None:
    parts = default()
    for ax, name, spans in (
        (parts.eeg_strip, "spec_to_eeg", COMPETITION.spans),
        (parts.spec_strip, "eeg_to_spec", spectrogram_spans()),
    ):
        expected = reference.received_lift(PAIR[name][1].double().numpy())
        np.testing.assert_allclose(segments(ax)[:, :, 0], spans)
        np.testing.assert_allclose(segments(ax)[:, 0, 1], expected, rtol=1e-5)
        np.testing.assert_allclose(segments(ax)[:, 1, 1], expected, rtol=1e-5)
        assert ax.get_ylim()[0] < min(expected) < max(expected) < ax.get_ylim()[1]
        assert ax.lines[0].get_ydata()[0] == 1
    assert parts.eeg_strip.get_ylim() != parts.spec_strip.get_ylim(), "each direction has its own scale"


def test_maps_share_the_time_axis_of_the_spectrograms_and_have_a_scale_each() -> None:
    parts = default()
    there, back = parts.maps
    np.testing.assert_allclose(drawn(there), reference.lift_map(PAIR["eeg_to_spec"][1].double().numpy()), rtol=1e-5)
    np.testing.assert_allclose(drawn(back), reference.lift_map(PAIR["spec_to_eeg"][1].double().numpy()).T, rtol=1e-5)
    bars = [ax for ax in parts.figure.axes if ax.get_label() == "<colorbar>"][1:]
    for ax, bar in zip(parts.maps, bars, strict=True):
        assert mesh(ax).get_clim() == bar.get_ylim() == (drawn(ax).min(), drawn(ax).max())
    for ax in parts.maps:
        corners = mesh(ax).get_coordinates()
        # From midpoint to midpoint between centres -295, -290, ...; the outer cells to the ends of their windows.
        np.testing.assert_allclose(corners[0, :, 0], [-300, *np.arange(-292.5, 295, 5), 300])
        np.testing.assert_allclose(corners[:, 0, 1], [-25, *np.arange(-17.5, 20, 5), 25])
        assert ax.yaxis_inverted()
    aligned = [*parts.spectrograms, parts.spec_strip, *parts.maps]
    assert {ax.get_xlim() for ax in aligned} == {(-300, 300)}
    parts.figure.draw_without_rendering()
    assert len({tuple(np.round(ax.get_position().intervalx, 6)) for ax in aligned}) == 1
    assert parts.whole.get_xlim() == parts.eeg_strip.get_xlim() == (-25, 25)


def test_the_strongest_pairs_are_linked_from_second_to_second() -> None:
    there = torch.full((1, 2, 9, 119), 1e-3)
    planted = [(0, 100), (4, 59), (8, 3)]
    for query, key in planted:
        there[0, :, query, key] = 1.0
    there = there / there.sum(-1, keepdim=True)
    parts = Parts(plot(pair={"eeg_to_spec": there}, sample_idx=0))
    centres = {m: np.mean(axis.spans, axis=1) for m, axis in AXES.items()}
    expected = {((centres["eeg"][q] + 25) / 50, (centres["spec"][k] + 300) / 600) for q, k in planted}
    links = [line for line in parts.links.lines if line.get_linewidth() > 1.5]
    assert {tuple(np.round(line.get_xdata(), 6)) for line in links} == {tuple(np.round(e, 6)) for e in expected}
    assert all(tuple(line.get_ydata()) == (1, 0) for line in links), "from the EEG above to the spectrogram below"


def test_links_tell_their_direction_as_the_legend_does() -> None:
    there, back = torch.full((1, 2, 9, 119), 1e-3), torch.full((1, 2, 119, 9), 1e-3)
    there[0, :, 0, 100] = back[0, :, 20, 6] = 9.0
    for query, key in ((4, 59), (8, 3)):
        there[0, :, query, key] = 1.0
        back[0, :, key, query] = 1.0
    pair = {n: w / w.sum(-1, keepdim=True) for n, w in (("eeg_to_spec", there), ("spec_to_eeg", back))}
    ax = Parts(plot(pair=pair, sample_idx=0)).links
    handles = {handle.get_label(): handle for handle in ax.get_legend().legend_handles}
    assert list(handles) == ["the EEG's stretch", "3 strongest EEG → Spec", "3 strongest Spec → EEG"]
    centres = {m: np.mean(axis.spans, axis=1) for m, axis in AXES.items()}
    for name, window, other in (("EEG → Spec", 0, 100), ("Spec → EEG", 6, 20)):
        handle = handles[f"3 strongest {name}"]
        assert handle.get_linestyle() == ("-" if name == "EEG → Spec" else "--")
        links = [line for line in ax.lines if line.get_color() == handle.get_color()]
        assert [line.get_linestyle() for line in links] == [handle.get_linestyle()] * 3
        strongest = (centres["eeg"][window] + 25) / 50, (centres["spec"][other] + 300) / 600
        np.testing.assert_allclose(links[0].get_xdata(), strongest)


def test_the_eegs_stretch_leads_from_above_to_its_seconds_below() -> None:
    ax = default().links
    left, right = (-25 + 300) / 600, (25 + 300) / 600
    stretch = [line for line in ax.lines if line.get_linewidth() < 1.5]
    np.testing.assert_allclose([line.get_xdata() for line in stretch], [(0, left), (1, right)])
    np.testing.assert_allclose([line.get_ydata() for line in stretch], [(1, 0), (1, 0)])
    (area,) = ax.patches
    np.testing.assert_allclose(area.get_xy(), [(0, 1), (1, 1), (right, 0), (left, 0), (0, 1)])


def test_a_window_that_is_padding_receives_nothing_and_is_hatched_in_its_strip() -> None:
    real = (torch.arange(119) < 116).expand(2, -1)
    there = PAIR["eeg_to_spec"] * real[:, None, None]
    direction = Direction("eeg", "spec")
    forward = Attention(direction, there / there.sum(-1, keepdim=True), key_mask=real)
    backward = Attention(direction.opposite, PAIR["spec_to_eeg"], query_mask=real)
    strip = Parts(plot(pair=AttentionPair("fusion", forward, backward))).spec_strip
    hatched = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in strip.patches if patch.get_hatch()]
    np.testing.assert_allclose(hatched, spectrogram_spans()[116:])
    np.testing.assert_allclose(segments(strip)[:, :, 0], spectrogram_spans()[:116])


def test_one_direction_alone_is_drawn_and_the_other_missed() -> None:
    figure = plot(pair={"spec_to_eeg": PAIR["spec_to_eeg"]})
    parts = Parts(figure)
    assert len(parts.maps) == 1
    assert [text.get_text() for text in parts.spec_strip.texts] == ["this direction was not recorded"]
    assert not parts.eeg_strip.texts


def test_a_window_that_nobody_can_see_is_hatched() -> None:
    back = PAIR["spec_to_eeg"].clone()
    back[1, :, 40:60] = NAN
    figure = plot(pair={**PAIR, "spec_to_eeg": back})
    assert np.isnan(drawn(Parts(figure).maps[1])[:, 40:60]).all()
    assert len(segments(Parts(figure).eeg_strip)) == 9, "other queries still see every window"
    assert "undefined: no signal, or no attention" in texts(figure)


@pytest.mark.parametrize(
    ("pair", "axes", "said"),
    [
        ({n: torch.ones(1, 2, 1, 1) for n in PAIR}, {}, "a single key, so every weight is 1"),
        ({n: torch.full_like(w, 1 / w.shape[-1]) for n, w in PAIR.items()}, AXES, "uniform: every key gets the same"),
        ({n: w * NAN for n, w in PAIR.items()}, AXES, "undefined: no valid row"),
    ],
)
def test_attention_that_says_nothing_is_labelled_and_not_linked(pair, axes, said: str) -> None:
    parts = Parts(plot(pair=pair, axes=axes, sample_idx=0))
    for ax in (parts.eeg_strip, parts.spec_strip, *parts.maps):
        assert said in ax.texts[0].get_text()
    assert not [line for line in parts.links.lines if line.get_linewidth() > 1.5]


SPANS = "axes['eeg'] = TokenAxis(title, spans=[(start, stop), ...])"


@pytest.mark.parametrize(
    ("settings", "error", "facts"),
    [
        ({"montage": "transverse"}, SettingError, ["montage", "'bipolar', 'referential'", "got 'transverse'"]),
        ({"montage": "bipolar"}, SettingError, ["19 electrodes of the 10-20 system", "C3, C4, Cz", "E0, E1"]),
        ({"axes": {"spec": AXES["spec"]}}, SettingError, ["'eeg'", SPANS, "no axis", "plot_cross_modal_attention"]),
        ({"axes": {**AXES, "eeg": TokenAxis("region", names=list("abcdefghi"))}}, SettingError, [SPANS, "no times"]),
        ({"traces": make_traces(seconds=10)}, ShapeError, ["'eeg'", "-25 to 25 s", "-5 to 5 s"]),
        ({"axes": {**AXES, "eeg": TokenAxis("w", spans=COMPETITION.spans[:8])}}, ShapeError, ["axis 'w'", 8, 9]),
        ({"pair": {"audio_to_text": PAIR["eeg_to_spec"]}}, SettingError, ["eeg and spec", "audio_to_text"]),
        ({"sample_idx": 2}, SettingError, ["sample_idx", "0 to 1", "got 2"]),
    ],
)
def test_what_does_not_fit_is_said(settings, error: type[Exception], facts: list[object]) -> None:
    with pytest.raises(error, match=tells(*facts)):
        plot(**settings)


def test_signals_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError, match=tells("'microvolts'", "(samples, electrodes=1)", "got (10, 3)")):
        Traces(np.zeros((10, 3)), 200, ["a"], 0)
    with pytest.raises(SettingError, match=tells("rate", "> 0", "got 0")):
        Traces(np.zeros((10, 1)), 0, ["a"], 0)
    with pytest.raises(ShapeError, match=tells("'power'", "(rows, regions=4, frequencies=2)", "got (10, 4, 3)")):
        Spectrograms(np.zeros((10, 4, 3)), 2, REGIONS, [1, 2], 0)
    with pytest.raises(SettingError, match=tells("ascending frequencies", "got [2, 1]")):
        Spectrograms(np.zeros((10, 4, 2)), 2, REGIONS, [2, 1], 0)
