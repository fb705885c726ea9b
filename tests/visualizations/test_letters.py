"""Letters that are drawn once look as matplotlib draws them, wherever and however often they stand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_xattn.visualizations import render
from lightning_xattn.visualizations.letters import LettersCanvas, LettersRenderer, _picture_of


def written(text: str, **style: object) -> Figure:
    """A text that begins at a whole pixel."""
    figure = Figure(figsize=(3, 2), dpi=100)
    figure.text(0.25, 0.5, text, **style)
    return figure


def matplotlibs(figure: Figure) -> NDArray[np.uint8]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@pytest.mark.parametrize(
    "style",
    [
        {},
        {"rotation": 90},
        {"color": "#0072B2"},
        {"fontsize": 20, "fontweight": "bold"},
        {"ha": "center", "va": "top"},
        {"style": "italic"},
    ],
)
@pytest.mark.parametrize("text", ["LPD (n=12)", "Ångström, g\nand Ŷ", "\N{MINUS SIGN}0.25"])
def test_a_text_is_where_and_what_matplotlib_draws(text: str, style: dict[str, object]) -> None:
    ours, theirs = render(written(text, **style)), matplotlibs(written(text, **style))
    inks = [255.0 - picture.astype(float).mean(-1) for picture in (ours, theirs)]
    places = [np.argwhere(ink > 100) for ink in inks]
    # Letters begin at whole pixels, so all of a line moves by less than one.
    for end in (np.min, np.max):
        np.testing.assert_allclose(end(places[0], axis=0), end(places[1], axis=0), atol=1)
    assert inks[0].sum() == pytest.approx(inks[1].sum(), rel=0.02)


@pytest.mark.parametrize("style", [{"rotation": 30}, {"alpha": 0.5}, {"color": (0.0, 0.4, 0.7, 0.3)}])
def test_what_is_no_plain_text_is_matplotlibs_own(style: dict[str, object]) -> None:
    for text in ("turned or faint", "$x^2$"):
        np.testing.assert_array_equal(render(written(text, **style)), matplotlibs(written(text, **style)))


def test_a_text_is_drawn_once_for_all_places_and_figures() -> None:
    before = _picture_of.cache_info()
    pictures = []
    for row in range(3):
        figure = Figure(figsize=(3, 2), dpi=100)
        for place in (0.1, 0.3, 0.7):
            figure.text(0.25, place, "the same words in all of them")
        pictures.append(render(figure))
        after = _picture_of.cache_info()
        assert (after.misses - before.misses, after.hits - before.hits) == (1, 3 * row + 2)
    for other in pictures[1:]:
        np.testing.assert_array_equal(pictures[0], other)
    lines = [pictures[0][200 - int(200 * place) - 15 : 200 - int(200 * place) + 5] for place in (0.1, 0.3, 0.7)]
    assert lines[0].min() < 50
    np.testing.assert_array_equal(lines[0], lines[1])
    np.testing.assert_array_equal(lines[0], lines[2])


def test_the_same_words_in_another_size_colour_or_resolution_are_others() -> None:
    pictures = {}
    for name, style, dpi in (
        ("plain", {}, 100),
        ("large", {"fontsize": 14}, 100),
        ("blue", {"color": "blue"}, 100),
        ("fine", {}, 200),
    ):
        figure = written("these words", **style)
        figure.set_dpi(dpi)
        pictures[name] = render(figure)
    assert pictures["fine"].shape == (400, 600, 3)
    ink = {name: int((picture < 128).any(-1).sum()) for name, picture in pictures.items()}
    assert ink["plain"] < ink["large"] < ink["fine"]
    assert (pictures["blue"].reshape(-1, 3).min(0)[2], pictures["plain"].min()) == (255, 0)


def test_a_figure_of_another_size_has_another_renderer() -> None:
    figure = Figure(figsize=(3, 2), dpi=100)
    canvas = LettersCanvas(figure)
    first = canvas.get_renderer()
    assert isinstance(first, LettersRenderer)
    assert canvas.get_renderer() is first
    figure.set_figheight(3)
    assert (canvas.get_renderer().height, canvas.get_renderer().width) == (300, 300)


def test_pictures_of_one_size_are_kept_apart_and_a_figure_keeps_its_canvas() -> None:
    one, other = written("one"), written("other")
    canvas = one.canvas
    first = render(one)
    kept, second = first.copy(), render(other)
    np.testing.assert_array_equal(first, kept)
    assert (first != second).any()
    assert first.flags.owndata
    assert one.canvas is canvas
    np.testing.assert_array_equal(render(written("one")), kept)


def test_threads_draw_beside_each_other() -> None:
    words = [f"thread {i}" for i in range(4)]
    alone = [render(written(text)) for text in words]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: render(written(words[i % 4])), range(40)))
    for i, picture in enumerate(together):
        np.testing.assert_array_equal(picture, alone[i % 4])
