"""The figure of heads: bars as the reference has them, and what uniform attention gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.container import BarContainer

from lightning_xattn.core.errors import SettingError
from lightning_xattn.visualizations import plot_head_contributions, render
from tests import reference
from tests.messages import tells
from tests.visualizations.conftest import make_pair, panels

# Of rows that are left out figures warn, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*not finite or do not sum to 1:lightning_xattn.XAttnWarning")

PAIR = make_pair()
NAN = float("nan")


def samples(name: str):
    return PAIR[name].double().numpy()


def bar_containers(ax) -> list[BarContainer]:
    return [container for container in ax.containers if isinstance(container, BarContainer)]


@pytest.mark.parametrize("num_heads", [None, 3])
def test_bars_reach_from_uniform_to_the_largest_weight(num_heads) -> None:
    figure = plot_head_contributions(PAIR, num_heads)
    above, below = panels(figure)
    for name, largest, share in zip(PAIR, bar_containers(above), bar_containers(below), strict=True):
        expected = [reference.row_statistics(A) for A in samples(name)]
        tops = [bar.get_y() + bar.get_height() for bar in largest]
        np.testing.assert_allclose(tops, np.mean([e["max"] for e in expected], axis=0), rtol=1e-5)
        keys = PAIR[name].shape[-1]
        np.testing.assert_allclose([bar.get_y() for bar in largest], 1 / keys, rtol=1e-5)
        shares = [bar.get_height() for bar in share]
        np.testing.assert_allclose(shares, np.mean([e["effective_keys"] for e in expected], axis=0) / keys, rtol=1e-5)
    assert above.get_yscale() == "log"
    assert below.get_ylim() == (0, 1.1)
    assert "so it is 1 / keys for every head" in figure.get_suptitle()


def test_directions_stand_side_by_side_over_their_head_and_on_the_line_of_uniform_attention() -> None:
    above, below = panels(plot_head_contributions(PAIR))
    lines = [c.get_segments() for c in above.collections if isinstance(c, LineCollection)]
    for start, keys, bars, shares, uniform in zip(
        (-0.4, 0.0), (7, 5), bar_containers(above), bar_containers(below), lines, strict=True
    ):
        for head, (bar, share, segment) in enumerate(zip(bars, shares, uniform, strict=True)):
            left, right = head + start, head + start + 0.4
            for one in (bar, share):
                assert (one.get_x(), one.get_x() + one.get_width()) == pytest.approx((left, right))
            np.testing.assert_allclose(segment, [(left, 1 / keys), (right, 1 / keys)], atol=1e-6)
    # Of both directions the line of uniform attention is inside.
    assert above.get_ylim() == pytest.approx((1 / 7 / 1.5, 1.5))
    assert [(line.get_ydata()[0], line.get_linestyle()) for line in below.lines] == [(1, "--")]
    assert [label.get_text() for label in below.get_xticklabels()] == ["0", "1", "2"]


def test_a_direction_alone_stands_over_its_head() -> None:
    above, _ = panels(plot_head_contributions({"x_to_y": PAIR["eeg_to_spec"]}))
    assert [bar.get_x() + bar.get_width() / 2 for bar in bar_containers(above)[0]] == pytest.approx([0, 1, 2])


@pytest.mark.parametrize(("count", "said"), [(1, "(mean of 1 sample)"), (2, "(mean of 2 samples)")])
def test_the_samples_are_counted(count: int, said: str) -> None:
    pair = {name: weights[:count] for name, weights in PAIR.items()}
    assert said in plot_head_contributions(pair).get_suptitle()


def test_uniform_heads_have_bars_of_no_height() -> None:
    above, below = panels(plot_head_contributions({"x_to_y": torch.full((2, 3, 5, 7), 1 / 7)}))
    assert [bar.get_height() for bar in bar_containers(above)[0]] == pytest.approx([0] * 3, abs=1e-6)
    assert [bar.get_height() for bar in bar_containers(below)[0]] == pytest.approx([1] * 3)


def test_directions_differ_in_hatching_and_are_named() -> None:
    figure = plot_head_contributions(PAIR)
    there, back = bar_containers(panels(figure)[0])
    assert (there[0].get_hatch(), back[0].get_hatch()) == (None, "///")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["EEG → Spec", "Spec → EEG"]


def test_one_key_and_undefined_heads_are_said() -> None:
    back = make_pair(keys=1)["spec_to_eeg"]
    back[:, 1] = NAN
    figure = plot_head_contributions({"eeg_to_spec": torch.ones(2, 3, 5, 1), "spec_to_eeg": back})
    render(figure)
    assert "EEG → Spec: a single key, so every weight is 1" in figure.get_suptitle()
    assert "Spec → EEG: a single key" not in figure.get_suptitle()
    # Where the bar of head 1 of the second direction would stand.
    places = [[text.get_position()[0] for text in ax.texts if text.get_text() == "undefined"] for ax in panels(figure)]
    np.testing.assert_allclose(places, [[1.2], [1.2]])


def test_directions_may_differ_in_heads() -> None:
    above, _ = panels(plot_head_contributions(make_pair(heads_back=2)))
    assert [len(container) for container in bar_containers(above)] == [3, 2]


def test_another_number_of_heads_is_refused() -> None:
    with pytest.raises(SettingError, match=tells("eeg_to_spec", "num_heads=8", "num_heads=3", "3 heads", "None")):
        plot_head_contributions(PAIR, num_heads=8)
    with pytest.raises(SettingError, match=tells("spec_to_eeg", "num_heads=3", "num_heads=2", "2 heads", "None")):
        plot_head_contributions(make_pair(heads_back=2), num_heads=3)
