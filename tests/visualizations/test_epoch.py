"""The figures of an epoch: what is drawn is what was given, where it was said to be, or is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.patches import StepPatch
from numpy.typing import NDArray
from scipy import stats

from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.visualizations import (
    epoch,
    plot_class_attention,
    plot_head_entropy,
    plot_outcome_alignment,
    render,
)
from tests.messages import tells
from tests.visualizations.conftest import (
    EDGES,
    EEG,
    LONG_REGIONS,
    REGIONS,
    SPEC,
    colour_bar,
    drawn,
    make_alignment,
    make_maps,
    make_outcome,
    mesh,
    panels,
    places,
    summary,
    texts,
)

# Mean attention maps


def test_one_panel_per_class_shows_weight_times_keys() -> None:
    maps = make_maps(5, 3, 7)
    figure = plot_class_attention(maps, [2, 3, 5, 7, 11], list("abcde"), direction="eeg_to_spec")
    assert [ax.get_title() for ax in panels(figure)] == ["a (n=2)", "b (n=3)", "c (n=5)", "d (n=7)", "e (n=11)"]
    for ax, weights in zip(panels(figure), maps, strict=True):
        np.testing.assert_allclose(drawn(ax), weights * 7)


def test_tensors_are_taken() -> None:
    maps = make_maps(1, 3, 7)
    figure = plot_class_attention(torch.tensor(maps), torch.tensor([2]), ["a"], direction="eeg_to_spec")
    np.testing.assert_allclose(drawn(panels(figure)[0]), maps[0] * 7)


def test_all_panels_and_the_colour_bar_share_one_scale() -> None:
    maps = make_maps(3, 3, 7)
    figure = plot_class_attention(maps, [1, 1, 1], list("abc"), direction="eeg_to_spec")
    limits = {mesh(ax).get_clim() for ax in panels(figure)}
    assert limits == {(maps.min() * 7, maps.max() * 7)}
    bar = colour_bar(figure)
    assert {bar.get_xlim()} == limits
    assert bar.get_xlabel().startswith("lift over uniform: mean weight / (1/7)")


def test_uniform_maps_are_not_zoomed_into_noise() -> None:
    maps = np.full((2, 3, 7), 1 / 7) + 1e-9 * make_maps(2, 3, 7)
    figure = plot_class_attention(maps, [1, 1], ["a", "b"], direction="eeg_to_spec")
    assert mesh(panels(figure)[0]).get_clim() == pytest.approx((0.9, 1.1))


def test_the_longer_axis_lies_horizontally_and_says_who_asks() -> None:
    maps = make_maps(2, 7, 3)
    figure = plot_class_attention(maps, [1, 1], ["a", "b"], direction="spec_to_eeg")
    np.testing.assert_allclose(drawn(panels(figure)[1]), maps[1].T * 3)
    assert figure.get_supxlabel() == "query: spec token"
    assert figure.get_supylabel() == "key: eeg token"
    assert "spec → eeg per true class" in figure.get_suptitle()


def test_cells_lie_at_the_centres_of_overlapping_windows() -> None:
    figure = plot_class_attention(
        make_maps(1, 9, 119), [4], ["a"], direction="eeg_to_spec", query_axis=EEG, key_axis=SPEC
    )
    corners = mesh(panels(figure)[0]).get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], np.arange(2.5, 600, 5))  # centres 5, 10, ... 595 s
    np.testing.assert_allclose(corners[:, 0, 1], np.arange(-22.5, 23, 5))
    assert figure.get_supxlabel() == f"key: {SPEC.title}"


def test_uneven_windows_meet_half_way_between_their_centres() -> None:
    axis = TokenAxis("time (s)", spans=[(0, 2), (2, 6), (10, 20)])
    figure = plot_class_attention(make_maps(1, 2, 3), [4], ["a"], direction="x_to_y", key_axis=axis)
    np.testing.assert_allclose(mesh(panels(figure)[0]).get_coordinates()[0, :, 0], [-0.5, 2.5, 9.5, 20.5])


def test_the_first_token_is_at_the_top_and_tokens_are_named() -> None:
    figure = plot_class_attention(
        make_maps(2, 4, 4), [1, 1], ["a", "b"], direction="x_to_y", query_axis=LONG_REGIONS, key_axis=REGIONS
    )
    first = panels(figure)[0]
    assert [label.get_text() for label in first.get_yticklabels()] == LONG_REGIONS.names
    assert [label.get_text() for label in first.get_xticklabels()] == REGIONS.names
    assert first.yaxis_inverted()


def test_names_that_do_not_fit_are_thinned_out() -> None:
    names = [f"electrode {i}" for i in range(128)]
    axis = TokenAxis("electrode", names=names)
    figure = plot_class_attention(make_maps(1, 2, 128), [4], ["a"], direction="x_to_y", key_axis=axis)
    shown = [label.get_text() for label in panels(figure)[0].get_xticklabels()]
    assert 10 < len(shown) < 64
    assert shown == names[:: 128 // len(shown) + 1]


def test_names_that_are_too_long_to_stand_side_by_side_are_turned() -> None:
    for axis, degrees in ((REGIONS, 0), (TokenAxis("region", names=[f"{name} of the brain" for name in "abcd"]), 90)):
        figure = plot_class_attention(
            make_maps(2, 4, 4), [1, 1], ["a", "b"], direction="x_to_y", query_axis=axis, key_axis=axis
        )
        (first, _) = panels(figure)
        assert {label.get_rotation() for label in first.get_xticklabels()} == {degrees}
        assert {label.get_rotation() for label in first.get_yticklabels()} == {0}


def test_a_single_token_lies_where_it_is() -> None:
    axis = TokenAxis("time (s)", spans=[(3, 9)])
    figure = plot_class_attention(make_maps(1, 2, 1), [4], ["a"], direction="x_to_y", key_axis=axis)
    # The longer axis lies horizontally, so the one key stands.
    np.testing.assert_allclose(mesh(panels(figure)[0]).get_coordinates()[:, 0, 1], [3, 9])


def test_tokens_are_numbered_in_whole_numbers() -> None:
    (ax,) = panels(plot_class_attention(make_maps(1, 2, 3), [4], ["a"], direction="x_to_y"))
    for ticks in (ax.get_xticks(), ax.get_yticks()):
        np.testing.assert_array_equal(ticks, np.round(ticks))


def test_a_class_name_is_no_formula_whatever_dollars_are_in_it() -> None:
    names = ["$a$", "$1 to $2"]
    (first, _) = panels(plot_class_attention(make_maps(2, 3, 5), [1, 2], names, direction="x_to_y"))
    assert (first.get_title(), first.title.get_parse_math()) == ("$a$ (n=1)", False)
    (entropy,) = panels(plot_head_entropy({"x_to_y": [[0.4], [0.5]]}, [1, 2], names))
    labels = entropy.get_yticklabels()
    assert [label.get_text() for label in labels] == ["$a$ (n=1)", "$1 to $2 (n=2)"]
    assert not any(label.get_parse_math() for label in labels)


def test_a_long_class_name_has_two_lines_and_its_count_stands_below() -> None:
    name = "generalised rhythmic delta activity with superimposed fast activity and more"
    (ax,) = panels(plot_head_entropy({"x_to_y": [[0.4]]}, [3], [name]))
    (label,) = ax.get_yticklabels()
    assert label.get_text() == "generalised\nrhythmic delta …\n(n=3)"


@pytest.mark.parametrize("missing", [np.nan, 0.0])
def test_a_class_without_samples_says_so_and_draws_nothing(missing: float) -> None:
    maps = make_maps(3, 3, 7)
    maps[1] = missing
    figure = plot_class_attention(maps, [4, 0, 5], list("abc"), direction="eeg_to_spec")
    shown = [[text.get_text() for text in ax.texts] for ax in panels(figure)]
    assert shown == [[], ["no samples"], []]
    assert np.isnan(drawn(panels(figure)[1])).all()
    assert mesh(panels(figure)[0]).get_clim()[0] > 0


def test_nothing_defined_at_all_still_draws() -> None:
    figure = plot_class_attention(np.full((2, 3, 7), np.nan), [4, 0], ["a", "b"], direction="eeg_to_spec")
    render(figure)
    assert [ax.texts[0].get_text() for ax in panels(figure)] == ["undefined", "no samples"]


@pytest.mark.parametrize("queries", [1, 9])
def test_one_key_is_labelled(queries: int) -> None:
    figure = plot_class_attention(np.ones((2, queries, 1)), [4, 5], ["a", "b"], direction="eeg_to_spec")
    assert "a single key, so every weight is 1" in texts(figure)
    assert "single key" not in texts(plot_class_attention(make_maps(1, 1, 2), [4], ["a"], direction="eeg_to_spec"))


@pytest.mark.parametrize(
    ("classes_by", "said"), [("target", "per true class"), ("prediction", "per predicted class"), (None, "spec")]
)
def test_the_title_says_what_the_classes_are(classes_by: str | None, said: str) -> None:
    figure = plot_class_attention(make_maps(1, 3, 7), [4], ["a"], direction="eeg_to_spec", classes_by=classes_by)
    assert figure.get_suptitle().endswith(said)


@pytest.mark.parametrize(
    ("classes", "columns", "lowest"),
    [(1, 1, {0}), (2, 2, {0, 1}), (3, 2, {1, 2}), (4, 2, {2, 3}), (5, 2, {3, 4}), (7, 2, {5, 6})],
)
def test_only_the_outer_panels_have_labels_and_above_a_gap_is_an_outer_one(classes: int, columns: int, lowest) -> None:
    names = list("abcdefg"[:classes])
    shown = panels(plot_class_attention(make_maps(classes, 3, 5), [1] * classes, names, direction="x_to_y"))
    assert places(shown) == [divmod(i, columns) for i in range(classes)]
    assert {i for i, ax in enumerate(shown) if ax.xaxis.get_visible()} == lowest
    assert {i for i, ax in enumerate(shown) if ax.yaxis.get_visible()} == set(range(0, classes, columns))


def test_uniform_attention_is_a_line_in_the_colour_bar() -> None:
    bar = colour_bar(plot_class_attention(make_maps(1, 3, 7), [4], ["a"], direction="eeg_to_spec"))
    assert {(line.get_xdata()[0], line.get_color()) for line in bar.lines} == {(1, "black"), (1, "white")}
    assert "uniform" in bar.get_xlabel()
    assert "line: 1" in bar.get_xlabel()


# Entropy per head


def test_directions_stand_below_each_other_with_a_cell_for_each_head() -> None:
    values = np.full((2, 9), 0.5)
    shown = panels(plot_head_entropy({"x_to_y": values, "y_to_x": values}, [3, 5], ["a", "b"]))
    assert places(shown) == [(0, 0), (1, 0)]
    for ax in shown:
        assert (ax.get_xlabel(), ax.get_xlim()) == ("head", (-0.5, 8.5))


@pytest.mark.parametrize(("heads", "printed"), [(8, True), (32, False)])
def test_values_are_printed_where_cells_have_room(heads: int, printed: bool) -> None:
    (ax,) = panels(plot_head_entropy({"x_to_y": np.full((1, heads), 0.5)}, [3], ["a"]))
    assert [text.get_text() for text in ax.texts] == ["0.50"] * heads * printed
    assert mesh(ax).get_clim() == (0, 1)


def test_the_colour_bar_of_entropy_says_which_end_is_diffuse() -> None:
    bar = colour_bar(plot_head_entropy({"x_to_y": [[0.4, 0.5]]}, [3], ["a"]))
    assert bar.get_xlim() == (0, 1)
    assert "0: one key, 1: diffuse" in bar.get_xlabel()


def test_entropy_cells_show_their_values() -> None:
    values = np.array([[0.0, 0.25, 1.0], [0.5, np.nan, 0.75]])
    figure = plot_head_entropy({"eeg_to_spec": values, "spec_to_eeg": 1 - values}, [3, 5], ["a", "b"])
    there, back = panels(figure)
    assert (there.get_title(), back.get_title()) == ("eeg → spec", "spec → eeg")
    np.testing.assert_array_equal(drawn(there), values)
    np.testing.assert_array_equal(drawn(back), 1 - values)
    assert mesh(there).get_clim() == mesh(back).get_clim() == (0, 1)
    printed = {text.get_position(): text.get_text() for text in there.texts}
    assert printed == {(0, 0): "0.00", (1, 0): "0.25", (2, 0): "1.00", (0, 1): "0.50", (1, 1): "\u2013", (2, 1): "0.75"}
    assert [label.get_text() for label in there.get_yticklabels()] == ["a (n=3)", "b (n=5)"]
    assert there.yaxis_inverted()
    assert "undefined: no samples" in texts(figure)


def test_printed_values_contrast_with_their_cells() -> None:
    values = np.linspace(0, 1, 21).reshape(3, 7)
    ax = panels(plot_head_entropy({"eeg_to_spec": values}, [3] * 3, list("abc")))[0]
    weights = np.array([0.2126, 0.7152, 0.0722])

    def luminance(colour: NDArray[np.float64]) -> float:
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ weights)

    for text, value in zip(ax.texts, values.ravel(), strict=True):
        cell = luminance(np.array(mesh(ax).to_rgba(value)[:3]))
        ink = {"black": 0.0, "white": 1.0}[text.get_color()]
        ratio = (max(cell, ink) + 0.05) / (min(cell, ink) + 0.05)
        assert ratio >= 4.5, f"{value}: contrast {ratio:.1f} (WCAG asks for 4.5)"


# Correct against incorrect


def test_densities_have_area_one_and_put_samples_where_they_are() -> None:
    correct, incorrect = make_outcome(0.4, 3, 0), make_outcome(0.2, 3, 1)
    above, _ = panels(make_alignment(correct, incorrect, list("abc")))
    steps = [patch.get_data() for patch in above.patches if isinstance(patch, StepPatch)]
    for outcome, step in zip((correct, incorrect), steps, strict=True):
        masses = step.values * np.diff(step.edges)
        middles = (step.edges[1:] + step.edges[:-1]) / 2
        assert 36 <= len(masses) <= 40
        assert masses.sum() == pytest.approx(1)
        assert masses @ middles == pytest.approx(outcome.mean, abs=0.01)
        # Whole fine bins make up a bar, so no sample is split between two.
        np.testing.assert_allclose(masses * np.sum(outcome.histogram), np.round(masses * np.sum(outcome.histogram)))
    low, high = above.get_xlim()
    occupied = EDGES[:-1][np.add(correct.histogram, incorrect.histogram) > 0]
    assert low < occupied[0] < occupied[-1] < high
    assert high - low < 1.1 * np.ptp(occupied), "zoomed to the occupied range"


def test_means_are_marked_and_counted() -> None:
    correct, incorrect = make_outcome(0.4, 3, 0), make_outcome(0.2, 3, 1)
    figure = make_alignment(correct, incorrect, list("abc"))
    above, _ = panels(figure)
    assert [line.get_xdata()[0] for line in above.lines] == [correct.mean, incorrect.mean]
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == [f"correct (n = 63, mean {correct.mean:.3f})", f"incorrect (n = 63, mean {incorrect.mean:.3f})"]


def test_outcomes_differ_in_fill_line_and_marker_as_the_legend_says() -> None:
    figure = make_alignment(make_outcome(0.4, 3, 0), make_outcome(0.2, 3, 1), list("abc"))
    above, below = panels(figure)
    assert [patch.get_fill() for patch in above.patches if isinstance(patch, StepPatch)] == [True, False]
    assert [line.get_linestyle() for line in above.lines] == ["-", "--"]
    dots = [points for points, _, _ in below.containers]
    assert [points.get_marker() for points in dots] == ["o", "s"]
    assert [points.get_markerfacecolor() for points in dots] == [above.lines[0].get_color(), "white"]
    # Correct a little above the row, incorrect a little below it; rows count downwards.
    np.testing.assert_allclose([points.get_ydata() for points in dots], [np.arange(3) - 0.15, np.arange(3) + 0.15])
    for key, line, points in zip(figure.legends[0].legend_handles, above.lines, dots, strict=True):
        assert key.get_color() == line.get_color() == points.get_color()
        assert key.get_linestyle() == line.get_linestyle()
        assert (key.get_marker(), key.get_markerfacecolor()) == (points.get_marker(), points.get_markerfacecolor())


def test_the_panels_say_what_they_measure() -> None:
    above, below = panels(make_alignment(make_outcome(0.4, 1, 0), make_outcome(0.2, 1, 1), ["a"]))
    assert above.get_ylabel() == "density"
    assert "alignment" in below.get_xlabel()
    assert "Pearson r" in below.get_xlabel()


def test_an_interval_may_reach_further_on_one_side() -> None:
    ends = [(0.2, 0.32), (0.1, 0.7)]
    made = dataclasses.replace(make_outcome(0.4, 2, 0), class_means=[0.3, 0.4], class_intervals=ends)
    _, below = panels(make_alignment(made, made, ["a", "b"]))
    for _, _, (bars,) in below.containers:
        np.testing.assert_allclose([segment[:, 0] for segment in bars.get_segments()], ends)


def test_few_samples_of_either_outcome_are_said_and_a_class_without_any_needs_no_word() -> None:
    rng = np.random.default_rng(0)
    enough, few, none = (summary([rng.normal(0.3, 0.1, 20), rng.normal(0.3, 0.1, n)]) for n in (20, 4, 0))
    for correct, incorrect, said in ((few, enough, True), (enough, few, True), (enough, none, False)):
        assert ("No interval: fewer than 5 samples" in texts(make_alignment(correct, incorrect, ["a", "b"]))) == said


def test_intervals_by_group_are_said_and_the_groups_are_counted() -> None:
    correct, incorrect = (
        dataclasses.replace(make_outcome(mean, 1, seed), groups=groups)
        for mean, seed, groups in ((0.4, 0, 7), (0.2, 1, 6))
    )

    def plot(auroc: tuple[float, float, float], **settings: str) -> Figure:
        return plot_outcome_alignment(correct, incorrect, EDGES, auroc, ["a"], **settings)

    figure = plot((0.6342, 0.551, 0.7174), group_noun="patients")
    said = texts(figure).replace("\n", " ")
    assert "AUROC 0.634, 95 % CI by patients 0.551 to 0.717" in said
    assert "Mean per true class, with its 95 % CI by patients" in said
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"correct (n = 20 of 7 patients, mean {correct.mean:.3f})",
        f"incorrect (n = 20 of 6 patients, mean {incorrect.mean:.3f})",
    ]
    assert "fewer than 5 patients" in texts(plot(NOTHING, group_noun="patients")).replace("\n", " ")
    assert "20 of 7 groups" in texts(plot(NOTHING))


def test_class_means_have_their_intervals() -> None:
    many = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    correct = summary([many, np.array([0.5]), np.array([])])
    incorrect = summary([np.array([]), np.array([0.2, 0.4, 0.9]), np.array([])])
    figure = make_alignment(correct, incorrect, list("abc"))
    _, below = panels(figure)
    dots, _, (bars,) = below.containers[0]
    np.testing.assert_allclose(dots.get_xdata(), [0.3, 0.5, np.nan])
    half = stats.t.ppf(0.975, 4) * many.std(ddof=1) / 5**0.5
    np.testing.assert_allclose(bars.get_segments()[0][:, 0], [0.3 - half, 0.3 + half], rtol=1e-5)
    assert [len(segment) for segment in bars.get_segments()] == [2, 0, 0]  # none with fewer than 5
    assert "No interval: fewer than 5" in texts(figure)
    np.testing.assert_allclose(below.containers[1][0].get_xdata(), [np.nan, 0.5, np.nan])
    assert [label.get_text() for label in below.get_yticklabels()] == ["a (5/0)", "b (1/3)", "c (0/0)"]


def test_few_samples_claim_nothing() -> None:
    few = summary([np.array([0.1, 0.3])])
    figure = make_alignment(make_outcome(0.4, 1, 0), few, ["a"])
    assert "No AUROC (fewer than 5 samples of an outcome: nothing claimed)" in texts(figure).replace("\n", " ")


def test_the_auroc_stands_with_its_interval() -> None:
    outcome = make_outcome(0.4, 1, 0)
    figure = plot_outcome_alignment(outcome, outcome, EDGES, (0.6342, 0.551, 0.7174), ["a"])
    assert "AUROC 0.634, 95 % CI 0.551 to 0.717" in texts(figure)


def test_the_null_is_a_line_in_both_panels_within_the_axis_and_in_the_legend() -> None:
    outcome = make_outcome(0.4, 2, 0)
    figure = plot_outcome_alignment(outcome, outcome, EDGES, NOTHING, ["a", "b"], null=-0.31)
    for ax in panels(figure):
        assert [line.get_linestyle() for line in ax.lines if line.get_xdata()[0] == -0.31] == [":"]
        assert ax.get_xlim()[0] < -0.31
    assert "null: different samples (-0.310)" in texts(figure)
    assert "null" not in texts(make_alignment(outcome, outcome, ["a", "b"]))


def test_an_interval_that_goes_on_beyond_the_panel_has_an_arrow_at_the_edge() -> None:
    outcome = make_outcome(0.4, 3, 0)
    ends = [(0.39, 0.41), (-0.9, 0.41), (0.39, 0.95)]
    wide = dataclasses.replace(outcome, class_means=[0.4] * 3, class_intervals=ends)
    figure = make_alignment(wide, outcome, list("abc"))
    _, below = panels(figure)
    arrows = [line for line in below.lines if line.get_marker() in (CARETLEFT, CARETRIGHT)]
    low, high = below.get_xlim()
    found = {line.get_marker(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in arrows}
    assert found == {CARETLEFT: ([low], [0.85]), CARETRIGHT: ([high], [1.85])}
    assert {line.get_color() for line in arrows} == {below.containers[0][0].get_color()}
    assert "goes on beyond the panel" in texts(figure)
    assert "goes on beyond the panel" not in texts(make_alignment(outcome, outcome, list("abc")))


def test_no_defined_alignment_says_so() -> None:
    nothing = summary([np.array([])])
    figure = make_alignment(nothing, nothing, ["a"])
    above, _ = panels(figure)
    assert above.texts[0].get_text() == "no sample with a defined alignment"
    assert not above.patches
    assert "correct (no samples)" in texts(figure)


@pytest.mark.parametrize("score", [-1.0, 0.3, 1.0])
def test_equal_scores_are_not_zoomed_apart(score: float) -> None:
    above, _ = panels(make_alignment(summary([np.full(9, score)]), summary([np.full(7, score)]), ["a"]))
    low, high = above.get_xlim()
    assert 0.02 < high - low < 0.1
    assert low < score < high


# All of them

OUTCOME = make_outcome(0.4, 2, 0)
NOTHING = (np.nan, np.nan, np.nan)


@pytest.mark.parametrize(
    "plot",
    [
        lambda **say: plot_class_attention(make_maps(1, 3, 7), [4], ["a"], direction="eeg_to_spec", **say),
        lambda **say: plot_head_entropy({"x_to_y": [[0.5, 0.7]]}, [4], ["a"], **say),
        lambda **say: plot_outcome_alignment(OUTCOME, OUTCOME, EDGES, NOTHING, ["a", "b"], **say),
    ],
)
def test_every_figure_says_where_its_numbers_come_from_and_what_the_classes_are(plot) -> None:
    figure = plot(context="val, epoch 3", classes_by="prediction")
    assert "val, epoch 3" in texts(figure)
    assert "per predicted class" in texts(figure)
    assert "per true class" in texts(plot())
    assert " class" not in texts(plot(classes_by=None))


# What does not fit


@pytest.mark.parametrize(
    ("call", "error", "facts"),
    [
        (
            lambda: plot_class_attention(make_maps(3, 5), [1, 1, 1], list("abc"), direction="x_to_y"),
            ShapeError,
            ["'maps'", "(classes=3, queries, keys)", "got (3, 5)"],
        ),
        (
            lambda: plot_class_attention(make_maps(2, 3, 5), [1, 1, 1], list("abc"), direction="x_to_y"),
            ShapeError,
            ["'maps'", "(classes=3, queries, keys)", "got (2, 3, 5)"],
        ),
        (
            lambda: plot_class_attention(make_maps(2, 3, 5), [1], ["a", "b"], direction="x_to_y"),
            ShapeError,
            ["'counts'", "(classes=2)", "got (1,)"],
        ),
        (
            lambda: plot_class_attention(make_maps(1, 3, 5), [1], ["a"], direction="x_to_y", key_axis=REGIONS),
            ShapeError,
            ["key axis 'region'", 4, 5],
        ),
        (
            lambda: plot_class_attention(make_maps(1, 3, 4), [1], ["a"], direction="x_to_y", query_axis=REGIONS),
            ShapeError,
            ["query axis 'region'", 4, 3],
        ),
        (
            lambda: plot_class_attention(
                make_maps(1, 2, 2),
                [1],
                ["a"],
                direction="x_to_y",
                key_axis=TokenAxis("time (s)", spans=[(5, 6), (0, 1)]),
            ),
            SettingError,
            ["TokenAxis 'time (s)'", "start below stop", "[(5, 6), (0, 1)]"],
        ),
        (
            lambda: plot_class_attention(make_maps(1, 2, 2), [1], ["a"], direction="x"),
            SettingError,
            ["'<query>_to_<key>'", "got 'x'"],
        ),
        (
            lambda: plot_class_attention(make_maps(0, 2, 2), [], [], direction="x_to_y"),
            SettingError,
            ["class", "got none"],
        ),
        (
            lambda: plot_class_attention(make_maps(1, 2, 2), [1], ["a"], direction="x_to_y", classes_by="class"),
            SettingError,
            ["'classes_by'", "'target', 'prediction', None", "got 'class'"],
        ),
        (lambda: plot_head_entropy({}, [1], ["a"]), SettingError, ["direction", "got none"]),
        (
            lambda: plot_head_entropy({"x_to_y": np.ones((2, 3))}, [1], ["a"]),
            ShapeError,
            ["entropy['x_to_y']", "(classes=1, heads)", "got (2, 3)"],
        ),
        (
            lambda: plot_outcome_alignment(OUTCOME, OUTCOME, EDGES[1:], NOTHING, ["a", "b"]),
            ShapeError,
            ["'correct histogram'", "(bins=16383)", "got (16384,)"],
        ),
        (
            lambda: plot_outcome_alignment(OUTCOME, OUTCOME, EDGES, NOTHING, ["a"]),
            ShapeError,
            ["'correct class_counts'", "(classes=1)", "got (2,)"],
        ),
    ],
)
def test_what_does_not_fit_is_said(call, error: type[Exception], facts: list[object]) -> None:
    with pytest.raises(error, match=tells(*facts)):
        call()


@pytest.mark.parametrize(("low", "high"), [(-0.0253, 0.0261), (0.97, 0.9999), (-1.0, -0.9), (0.2, 0.2)])
def test_the_bars_of_the_histogram_have_one_width_and_lose_no_sample(low, high):
    edges = np.linspace(-1, 1, 2**14 + 1)
    scores = np.array([low, (low + high) / 2, high])
    histograms = np.stack([np.histogram(scores, edges)[0], np.histogram(scores[:1], edges)[0]])
    bars, bar_edges = epoch._readable_bars(histograms, edges)
    np.testing.assert_allclose(np.diff(bar_edges), bar_edges[1] - bar_edges[0], rtol=1e-6)
    assert bars.sum(axis=1).tolist() == [3, 1]
    assert bar_edges[0] <= low <= high <= bar_edges[-1]
