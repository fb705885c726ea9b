"""The figures of an epoch: what is drawn is what was given, where it was said to be, or is refused."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.visualizations import (
    plot_class_attention,
    plot_head_entropy,
    render,
)
from tests.messages import tells
from tests.visualizations.conftest import (
    EEG,
    LONG_REGIONS,
    REGIONS,
    SPEC,
    colour_bar,
    drawn,
    make_maps,
    mesh,
    panels,
    places,
    texts,
)

# Mean attention maps


def test_all_panels_and_the_colour_bar_share_one_scale() -> None:
    maps = make_maps(3, 3, 7)
    figure = plot_class_attention(maps, [1, 1, 1], list("abc"), direction="eeg_to_spec")
    limits = {mesh(ax).get_clim() for ax in panels(figure)}
    assert limits == {(maps.min() * 7, maps.max() * 7)}
    bar = colour_bar(figure)
    assert {bar.get_xlim()} == limits
    assert bar.get_xlabel() == "lift over uniform: mean weight / (1/7) (line: 1)"
    assert {(line.get_xdata()[0], line.get_color()) for line in bar.lines} == {(1, "black"), (1, "white")}


def test_uniform_maps_are_not_zoomed_into_noise() -> None:
    maps = np.full((2, 3, 7), 1 / 7) + 1e-9 * make_maps(2, 3, 7)
    figure = plot_class_attention(maps, [1, 1], ["a", "b"], direction="eeg_to_spec")
    assert mesh(panels(figure)[0]).get_clim() == pytest.approx((0.9, 1.1))


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
    ("classes", "columns", "lowest"),
    [(1, 1, {0}), (2, 2, {0, 1}), (3, 2, {1, 2}), (4, 2, {2, 3}), (5, 2, {3, 4}), (7, 2, {5, 6})],
)
def test_only_the_outer_panels_have_labels_and_above_a_gap_is_an_outer_one(classes: int, columns: int, lowest) -> None:
    names = list("abcdefg"[:classes])
    shown = panels(plot_class_attention(make_maps(classes, 3, 5), [1] * classes, names, direction="x_to_y"))
    assert places(shown) == [divmod(i, columns) for i in range(classes)]
    assert {i for i, ax in enumerate(shown) if ax.xaxis.get_visible()} == lowest
    assert {i for i, ax in enumerate(shown) if ax.yaxis.get_visible()} == set(range(0, classes, columns))


# Entropy per head


def test_entropy_cells_show_their_values() -> None:
    values = np.array([[0.0, 0.25, 1.0], [0.5, np.nan, 0.75]])
    figure = plot_head_entropy({"eeg_to_spec": values, "spec_to_eeg": 1 - values}, [3, 5], ["a", "b"])
    there, back = panels(figure)
    assert places([there, back]) == [(0, 0), (1, 0)]
    assert (there.get_xlabel(), there.get_xlim()) == ("head", (-0.5, 2.5))
    assert (there.get_title(), back.get_title()) == ("EEG → Spec", "Spec → EEG")
    np.testing.assert_array_equal(drawn(there), values)
    np.testing.assert_array_equal(drawn(back), 1 - values)
    assert mesh(there).get_clim() == mesh(back).get_clim() == (0, 1)
    printed = {text.get_position(): text.get_text() for text in there.texts}
    assert printed == {(0, 0): "0.00", (1, 0): "0.25", (2, 0): "1.00", (0, 1): "0.50", (1, 1): "\u2013", (2, 1): "0.75"}
    assert [label.get_text() for label in there.get_yticklabels()] == ["a (n=3)", "b (n=5)"]
    assert there.yaxis_inverted()
    assert "undefined: no samples" in texts(figure)
    bar = colour_bar(figure)
    assert (bar.get_xlim(), bar.get_xlabel()) == ((0, 1), "normalised entropy (0: one key, 1: diffuse)")
    (narrow,) = panels(plot_head_entropy({"x_to_y": np.full((1, 32), 0.5)}, [3], ["a"]))
    assert not narrow.texts, "cells have no room for their numbers"


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


# All of them


@pytest.mark.parametrize(
    "plot",
    [
        lambda **say: plot_class_attention(make_maps(1, 3, 7), [4], ["a"], direction="eeg_to_spec", **say),
        lambda **say: plot_head_entropy({"x_to_y": [[0.5, 0.7]]}, [4], ["a"], **say),
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
    ("shape", "settings", "error", "facts"),
    [
        ((3, 5), {}, ShapeError, ["'maps'", "(classes=2, queries, keys)", "got (3, 5)"]),
        ((3, 3, 5), {}, ShapeError, ["'maps'", "(classes=2, queries, keys)", "got (3, 3, 5)"]),
        ((2, 3, 5), {"counts": [1]}, ShapeError, ["'counts'", "(classes=2)", "got (1,)"]),
        ((2, 3, 5), {"key_axis": REGIONS}, ShapeError, ["key axis 'region'", 4, 5]),
        ((2, 3, 4), {"query_axis": REGIONS}, ShapeError, ["query axis 'region'", 4, 3]),
        ((2, 2, 2), {"direction": "x"}, SettingError, ["'<query>_to_<key>'", "got 'x'"]),
        ((0, 2, 2), {"counts": [], "class_names": []}, SettingError, ["class", "got none"]),
        ((2, 2, 2), {"classes_by": "class"}, SettingError, ["'target', 'prediction', None", "got 'class'"]),
    ],
)
def test_maps_that_do_not_fit_are_refused(shape, settings, error, facts: list[object]) -> None:
    known = {"counts": [1, 1], "class_names": ["a", "b"], "direction": "x_to_y"} | settings
    with pytest.raises(error, match=tells(*facts)):
        plot_class_attention(make_maps(*shape), **known)


def test_entropies_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingError, match=tells("direction", "got none")):
        plot_head_entropy({}, [1], ["a"])
    with pytest.raises(ShapeError, match=tells("entropy['x_to_y']", "(classes=1, heads)", "got (2, 3)")):
        plot_head_entropy({"x_to_y": np.ones((2, 3))}, [1], ["a"])


def test_spans_that_do_not_ascend_are_refused() -> None:
    with pytest.raises(SettingError, match=tells("TokenAxis 'time (s)'", "start below stop", "[(5, 6), (0, 1)]")):
        TokenAxis("time (s)", spans=[(5, 6), (0, 1)])
