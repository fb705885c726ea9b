"""The page of mean maps by class: each cell is the lift that was given, in its class's row and direction's column."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import BboxImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.visualizations import plot_attention_card, plot_class_attention, render
from lightning_xattn.visualizations.drawing import first_tokens
from tests.messages import tells
from tests.visualizations.conftest import EEG, LONG_REGIONS, REGIONS, SPEC, make_maps, mesh, panels, texts

THERE, BACK = make_maps(3, 4, 7), make_maps(3, 7, 4)
MAPS = {"eeg_to_spec": THERE, "spec_to_eeg": BACK}
NAMES, COUNTS = ["a", "b", "c"], [4, 5, 6]
plot_maps = partial(plot_attention_card, [])  # without numbers above them


def images(figure: Figure) -> dict[str, BboxImage]:
    """By direction and class, or scale."""
    return {str(one.get_gid()): one for one in figure.findobj(BboxImage)}


def place_of(figure: Figure, image: BboxImage) -> Bbox:
    """In inches from the lower left."""
    box = image.get_window_extent()
    return Bbox(box.get_points() / figure.dpi)


def written(figure: Figure, text: str) -> list[tuple[float, float]]:
    """Where a text is written, in inches from the upper left."""
    return [one.get_position() for one in figure.findobj(Text) if one.get_text() == text]


def test_each_class_has_its_lifts_in_both_directions() -> None:
    figure = plot_maps(MAPS, COUNTS, NAMES, context="val, epoch 3")
    found = images(figure)
    maps = [f"{direction}/{i}" for i in range(3) for direction in MAPS]
    assert list(found) == [*maps, "eeg_to_spec/scale", "spec_to_eeg/scale"]
    for i in range(3):
        # The modality of more tokens lies horizontally in both.
        np.testing.assert_allclose(found[f"eeg_to_spec/{i}"].get_array(), THERE[i] * 7)
        np.testing.assert_allclose(found[f"spec_to_eeg/{i}"].get_array(), BACK[i].T * 4)
    assert "Attention per true class\nval, epoch 3" in texts(figure)
    assert "EEG → Spec\n4 queries, 7 keys" in texts(figure)
    assert "Spec → EEG\n7 queries, 4 keys" in texts(figure)


def test_rows_are_classes_and_columns_are_directions() -> None:
    figure = plot_maps(MAPS, COUNTS, NAMES)
    height = figure.get_figheight()
    places = {name: place_of(figure, image) for name, image in images(figure).items()}
    for i, name in enumerate(NAMES):
        there, back = places[f"eeg_to_spec/{i}"], places[f"spec_to_eeg/{i}"]
        assert there.y0 == back.y0
        assert there.x1 < back.x0
        ((x, y),) = written(figure, f"{name} (n={COUNTS[i]})")
        assert x == pytest.approx(there.x0)
        assert 0 < height - y - there.y1 < 0.25, "a class's name stands over its row"
        assert i == 0 or there.y1 < height - y < places[f"eeg_to_spec/{i - 1}"].y0
    for direction, head in (("eeg_to_spec", "EEG → Spec"), ("spec_to_eeg", "Spec → EEG")):
        column = places[f"{direction}/0"]
        (place,) = [one.get_position() for one in figure.findobj(Text) if one.get_text().startswith(head)]
        assert place[0] == pytest.approx((column.x0 + column.x1) / 2)
        assert (places[f"{direction}/scale"].x0, places[f"{direction}/scale"].x1) == (column.x0, column.x1)


def test_pixels_have_the_colours_of_their_cells() -> None:
    figure = plot_maps(MAPS, COUNTS, NAMES)
    picture = render(figure)
    for name, image in images(figure).items():
        values, box = image.get_array(), image.get_window_extent()
        rows, columns = values.shape
        for row, column in np.ndindex(rows, min(columns, 7)):
            x = box.x0 + (column + 0.5) / columns * box.width
            y = len(picture) - box.y1 + (row + 0.5) / rows * box.height  # the first row is at the top
            if "scale" not in name:
                colour = np.multiply(255, image.to_rgba(values[row, column])[:3])
                np.testing.assert_allclose(picture[int(y), int(x)], colour, atol=1)
    bar = images(figure)["eeg_to_spec/scale"].get_window_extent()
    colours = picture[int(len(picture) - bar.y0 - bar.height / 2), int(bar.x0) + 1 : int(bar.x1) - 1].astype(int)
    np.testing.assert_allclose(colours[0], [68, 1, 84], atol=6)
    np.testing.assert_allclose(colours[-1], [253, 231, 37], atol=6)


def test_all_classes_of_a_direction_have_one_scale_and_its_bar_has_it() -> None:
    figure = plot_maps(MAPS, COUNTS, NAMES)
    found = images(figure)
    for direction, maps, keys in (("eeg_to_spec", THERE, 7), ("spec_to_eeg", BACK, 4)):
        limits = {image.get_clim() for name, image in found.items() if name.startswith(direction)}
        assert limits == {(maps.min() * keys, maps.max() * keys)}
        bar = found[f"{direction}/scale"].get_array()
        assert (bar.min(), bar.max()) == next(iter(limits))
    assert "Each direction has its own scale." in texts(figure).replace("\n", " ")
    flat = plot_maps({"x_to_y": np.full((1, 3, 7), 1 / 7)}, [1], ["a"])
    assert images(flat)["x_to_y/0"].get_clim() == pytest.approx((0.9, 1.1)), "uniform maps are not zoomed into noise"
    assert "own scale" not in texts(flat)


def test_tokens_stand_where_their_spans_are() -> None:
    maps = {"eeg_to_spec": make_maps(2, 9, 119), "spec_to_eeg": make_maps(2, 119, 9)}
    figure = plot_maps(maps, [4, 5], ["a", "b"], axes={"eeg": EEG, "spec": SPEC})
    for direction in maps:
        column = place_of(figure, images(figure)[f"{direction}/1"])
        # From 2.5 s to 597.5 s, as windows meet half-way between their centres.
        expected = column.x0 + (400 - 2.5) / 595 * column.width
        assert any(x == pytest.approx(expected) for x, _ in written(figure, "400"))
    row, height = place_of(figure, images(figure)["eeg_to_spec/0"]), figure.get_figheight()
    (_, y), *_ = sorted(written(figure, "0"), key=lambda place: place[1])
    assert height - y == pytest.approx(row.y1 - 22.5 / 45 * row.height)
    assert all(title in texts(figure).replace("\n", " ") for title in (EEG.title, SPEC.title))


def test_uneven_tokens_are_as_wide_as_their_spans() -> None:
    axis = TokenAxis("time (s)", spans=[(0, 2), (2, 6), (10, 20)])  # from -0.5 over 2.5 and 9.5 to 20.5
    maps = make_maps(1, 2, 3)
    shown = images(plot_maps({"x_to_y": maps}, [1], ["a"], axes={"y": axis}))["x_to_y/0"].get_array()
    for row in range(2):
        values, counts = np.unique(shown[row], return_counts=True)
        widths = dict(zip(values, counts / shown.shape[1], strict=True))
        assert [widths[value] for value in maps[0, row] * 3] == pytest.approx([3 / 21, 7 / 21, 11 / 21], abs=0.01)


def test_tokens_are_named() -> None:
    maps = {"eeg_to_spec": make_maps(1, 4, 4), "spec_to_eeg": make_maps(1, 4, 4)}
    figure = plot_maps(maps, [1], ["a"], axes={"eeg": LONG_REGIONS, "spec": REGIONS})
    found = images(figure)
    # Of as many tokens the keys of the first direction lie horizontally.
    np.testing.assert_allclose(found["eeg_to_spec/0"].get_array(), maps["eeg_to_spec"][0] * 4)
    np.testing.assert_allclose(found["spec_to_eeg/0"].get_array(), maps["spec_to_eeg"][0].T * 4)
    for name in REGIONS.names or ():
        assert len(written(figure, name)) == 2, "below each column"
    ys = [written(figure, name)[0][1] for name in LONG_REGIONS.names or ()]
    assert ys == sorted(ys), "the first token is at the top"


def test_a_class_without_samples_says_so() -> None:
    maps = {name: one.copy() for name, one in MAPS.items()}
    maps["eeg_to_spec"][2] = np.nan
    maps["spec_to_eeg"][0, 1] = np.nan  # one query
    figure = plot_maps(maps, [4, 0, 6], NAMES)
    assert set(images(figure)) == {
        *("eeg_to_spec/0", "spec_to_eeg/0", "spec_to_eeg/2", "eeg_to_spec/scale", "spec_to_eeg/scale")
    }
    assert len(written(figure, "no samples")) == 2
    hatched = [patch for patch in figure.findobj(Rectangle) if patch.get_hatch() and patch.get_zorder() < 0]
    assert len(hatched) == 4
    assert len(written(figure, "undefined")) == 2, "of the third class, and in the legend"
    render(figure)


def test_one_key_is_labelled() -> None:
    figure = plot_maps({"eeg_to_spec": np.ones((2, 9, 1))}, [4, 5], ["a", "b"])
    assert "EEG → Spec: a single key, so every weight is 1" in texts(figure).replace("\n", " ")


def test_what_the_classes_are_is_said() -> None:
    said = texts(plot_maps(MAPS, COUNTS, NAMES, classes_by="prediction"))
    assert "per predicted class" in said
    assert " class" not in texts(plot_maps(MAPS, COUNTS, NAMES, classes_by=None))


# Cells of several tokens


@pytest.mark.parametrize(
    ("tokens", "cells", "expected"),
    [
        (6, 6, [0, 1, 2, 3, 4, 5, 6]),
        (128, 2, [0, 64, 128]),
        (7, 3, [0, 3, 6, 7]),
        (10, 4, [0, 3, 6, 9, 10]),
        (9, 7, [0, 1, 2, 3, 5, 6, 7, 9]),  # not of one size: as even as can be
        (1, 1, [0, 1]),
    ],
)
def test_the_first_token_of_each_cell(tokens: int, cells: int, expected: list[int]) -> None:
    assert first_tokens(tokens, cells).tolist() == expected


def test_cells_of_several_tokens_are_said_and_stand_where_the_tokens_are() -> None:
    maps = {"x_to_y": make_maps(2, 4, 8), "y_to_x": make_maps(2, 8, 4)}
    tokens = {"x_to_y": (256, 1024), "y_to_x": (1024, 256)}
    figure = plot_maps(maps, [1, 1], ["a", "b"], tokens=tokens)
    assert "Each cell is the mean of up to 64 x 128 tokens (queries x keys)." in texts(figure).replace("\n", " ")
    assert "X → Y\n256 queries, 1024 keys" in texts(figure)
    found = images(figure)
    np.testing.assert_allclose(found["x_to_y/1"].get_array(), maps["x_to_y"][1] * 1024)
    np.testing.assert_allclose(found["y_to_x/1"].get_array(), maps["y_to_x"][1].T * 256)
    column = place_of(figure, found["x_to_y/1"])
    assert any(x == pytest.approx(column.x0 + 600.5 / 1024 * column.width) for x, _ in written(figure, "600"))
    assert "mean of up to" not in texts(plot_maps(maps, [1, 1], ["a", "b"]))


def test_the_larger_figure_of_maps_says_it_too() -> None:
    maps = make_maps(1, 3, 60)
    axis = TokenAxis("window (s)", spans=[(5 * i, 5 * i + 10) for i in range(119)])
    said = {"direction": "x_to_y", "tokens": (9, 119), "key_axis": axis}
    figure = plot_class_attention(maps, [4], ["a"], **said)
    assert "Each cell is the mean of up to 3 x 2 tokens (queries x keys)." in texts(figure).replace("\n", " ")
    (panel,) = panels(figure)
    corners = mesh(panel).get_coordinates()
    # Two windows a cell, and one in the last.
    np.testing.assert_allclose(corners[0, :, 0], [*np.arange(2.5, 597, 10), 597.5])
    np.testing.assert_allclose(corners[:, 0, 1], [-0.5, 2.5, 5.5, 8.5])
    np.testing.assert_allclose(np.ma.filled(mesh(panel).get_array(), np.nan), maps[0] * 119)
    names = TokenAxis("word", names=[f"word {i}" for i in range(119)])
    (panel,) = panels(plot_class_attention(maps, [4], ["a"], **said | {"key_axis": names}))
    ticks = zip(panel.get_xticks(), panel.get_xticklabels(), strict=True)
    assert {(int(place), label.get_text()) for place, label in ticks} <= {(i, f"word {i}") for i in range(119)}


# What does not fit


@pytest.mark.parametrize(
    ("maps", "settings", "error", "facts"),
    [
        ({}, {}, SettingError, ["measure or map", "got none"]),
        ({"x": THERE}, {}, SettingError, ["'<query>_to_<key>'", "got 'x'"]),
        ({"a_to_b": THERE, "c_to_a": BACK}, {}, SettingError, ["there and back", "a_to_b, c_to_a"]),
        ({"a_to_b": THERE, "b_to_a": THERE}, {}, ShapeError, ["'a_to_b'", "'b_to_a'", "(4, 7)"]),
        ({"a_to_b": THERE[:2]}, {}, ShapeError, ["maps['a_to_b']", "(classes=3, queries, keys)", "got (2, 4, 7)"]),
        (MAPS, {"counts": [1]}, ShapeError, ["'counts'", "(classes=3)", "got (1,)"]),
        (MAPS, {"axes": {"eeg": EEG}}, ShapeError, [EEG.title, 9, 4]),
        (MAPS, {"tokens": {"eeg_to_spec": (3, 7)}}, ShapeError, ["4 cells", "at least as many", "got 3"]),
        (MAPS, {"classes_by": "class"}, SettingError, ["'target', 'prediction', None", "got 'class'"]),
    ],
)
def test_maps_that_do_not_fit_are_refused(maps, settings, error, facts: list[object]) -> None:
    known = {"counts": COUNTS, "class_names": NAMES} | settings
    with pytest.raises(error, match=tells(*facts)):
        plot_maps(maps, **known)
