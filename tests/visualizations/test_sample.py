"""The figures of one sample: numbers as the reference has them, and what says nothing is labelled so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from lightning_xattn.core.attention import Attention, AttentionPair, Direction, TokenAxis
from lightning_xattn.core.errors import SettingError, ShapeError, XAttnWarning
from lightning_xattn.visualizations import (
    plot_attention_heatmap,
    plot_cross_modal_attention,
    plot_head_contributions,
    plot_modality_alignment,
    render,
)
from lightning_xattn.visualizations import sample as sample_figures
from tests import reference
from tests.messages import tells
from tests.visualizations.conftest import EEG, REGIONS, SPEC, drawn, make_pair, mesh, panels, texts

# Of rows that are left out figures warn, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*not finite or do not sum to 1:lightning_xattn.XAttnWarning")

PAIR = make_pair()
NAN = float("nan")
ONE_KEY = {"eeg_to_spec": torch.ones(2, 3, 5, 1), "spec_to_eeg": make_pair(keys=1)["spec_to_eeg"]}
UNIFORM = {"eeg_to_spec": torch.full((2, 3, 5, 7), 1 / 7), "spec_to_eeg": torch.full((2, 3, 7, 5), 1 / 5)}


def sample(name: str, index: int = 1):
    return PAIR[name][index].double().numpy()


# Both directions


def test_both_directions_lie_alike_and_show_the_lift_of_the_sample() -> None:
    figure = plot_cross_modal_attention(PAIR, sample_idx=1)
    left, right = panels(figure)
    np.testing.assert_allclose(drawn(left), reference.lift_map(sample("eeg_to_spec")), rtol=1e-5)
    np.testing.assert_allclose(drawn(right), reference.lift_map(sample("spec_to_eeg")).T, rtol=1e-5)
    assert (left.get_ylabel(), left.get_xlabel()) == ("query: EEG token", "key: Spec token")
    assert (right.get_ylabel(), right.get_xlabel()) == ("key: EEG token", "query: Spec token")
    assert left.get_title() == f"EEG → Spec (lift {drawn(left).min():.2f} to {drawn(left).max():.2f})"
    assert left.yaxis_inverted()
    assert right.yaxis_inverted()
    assert "sample 1" in figure.get_suptitle()


def test_the_keys_lie_horizontally_where_both_modalities_have_as_many_tokens() -> None:
    left, right = panels(plot_cross_modal_attention(make_pair(queries=5, keys=5)))
    assert (left.get_ylabel(), left.get_xlabel()) == ("query: EEG token", "key: Spec token")
    assert (right.get_ylabel(), right.get_xlabel()) == ("query: Spec token", "key: EEG token")


@pytest.mark.parametrize("plot", [plot_cross_modal_attention, plot_modality_alignment])
def test_each_direction_has_its_own_scale_and_bar_so_that_neither_blanks_the_other(plot) -> None:
    figure = plot({**PAIR, "eeg_to_spec": 0.8 / 7 + 0.2 * PAIR["eeg_to_spec"]})
    maps = panels(figure)[-2:]
    limits = [(drawn(ax).min(), drawn(ax).max()) for ax in maps]
    assert np.ptp(limits[1]) > 3 * np.ptp(limits[0])
    assert [mesh(ax).get_clim() for ax in maps] == limits
    bars = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    assert [bar.get_xlim() for bar in bars] == limits
    for bar in bars:
        assert bar.get_xlabel().startswith("lift over uniform")
        assert "line: 1" in bar.get_xlabel()
        assert {(line.get_xdata()[0], line.get_color()) for line in bar.lines} == {(1, "black"), (1, "white")}


def test_axes_are_those_of_the_modalities() -> None:
    pair = make_pair(queries=9, keys=119)
    left, right = panels(plot_cross_modal_attention(pair, axes={"eeg": EEG, "spec": SPEC}))
    for ax in (left, right):
        np.testing.assert_allclose(mesh(ax).get_coordinates()[0, :, 0], np.arange(2.5, 600, 5))
    assert right.get_xlabel().replace("\n", " ") == f"query: {SPEC.title}"


def test_an_axis_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match=tells("query axis 'region'", 4, 5)):
        plot_cross_modal_attention(PAIR, axes={"eeg": REGIONS})


def test_one_direction_alone_is_drawn() -> None:
    (ax,) = panels(plot_cross_modal_attention({"eeg_to_spec": PAIR["eeg_to_spec"]}))
    np.testing.assert_allclose(drawn(ax), reference.lift_map(sample("eeg_to_spec", 0)), rtol=1e-5)


def test_later_layers_are_passed_over() -> None:
    later = {f"fusion.1/{name}": weights[:, :1] for name, weights in PAIR.items()}
    left, right = panels(plot_cross_modal_attention({**later, **PAIR}))
    np.testing.assert_allclose(drawn(left), reference.lift_map(sample("eeg_to_spec", 0)), rtol=1e-5)
    np.testing.assert_allclose(drawn(right), reference.lift_map(sample("spec_to_eeg", 0)).T, rtol=1e-5)


def test_masks_of_a_pair_count() -> None:
    key_mask = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    there = PAIR["eeg_to_spec"] * key_mask[:, None, None]
    there = there / there.sum(-1, keepdim=True)
    direction = Direction("eeg", "spec")
    pair = AttentionPair(
        "fusion",
        Attention(direction, there, key_mask=key_mask),
        Attention(direction.opposite, PAIR["spec_to_eeg"], query_mask=key_mask),
    )
    figure = plot_cross_modal_attention(pair)
    left, right = panels(figure)
    expected = reference.lift_map(there[0].double().numpy(), keys=key_mask[0].numpy())
    np.testing.assert_allclose(drawn(left), expected, rtol=1e-5)
    assert np.isnan(drawn(left)[:, 4:]).all()
    assert np.isnan(drawn(right)[:, 4:]).all()
    assert "undefined: padding, masked, or not attention" in texts(figure)


@pytest.mark.parametrize("plot", [plot_cross_modal_attention, plot_modality_alignment])
@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (ONE_KEY, "a single key, so every weight is 1"),
        (UNIFORM, "uniform: every key gets the same"),
        ({name: weights * NAN for name, weights in PAIR.items()}, "undefined: no valid row"),
    ],
)
def test_a_map_without_information_is_labelled(plot, pair, said: str) -> None:
    figure = plot(pair)
    figure.draw_without_rendering()
    assert said in texts(figure).replace("\n", " ")
    assert said not in texts(plot(PAIR)).replace("\n", " ")


@pytest.mark.parametrize(("swing", "said"), [(0.5e-6, True), (2e-6, False)])
def test_a_map_is_uniform_whose_lifts_differ_by_rounding_only(swing: float, said: bool) -> None:
    signs = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    weights = ((1 + swing * signs) / 8).expand(1, 1, 5, 8)
    assert ("every key gets the same weight" in texts(plot_cross_modal_attention({"eeg_to_spec": weights}))) == said


def test_nearly_uniform_attention_looks_flat_and_is_not_called_uniform() -> None:
    weights = (1e-3 * torch.randn(2, 3, 5, 7)).softmax(-1)
    figure = plot_cross_modal_attention({"eeg_to_spec": weights})
    assert mesh(panels(figure)[0]).get_clim() == pytest.approx((0.9, 1.1))
    assert "every key gets the same weight" not in texts(figure)


def test_a_broken_row_is_hatched() -> None:
    there = PAIR["eeg_to_spec"].clone()
    there[0, :, 2] = NAN
    figure = plot_cross_modal_attention({"eeg_to_spec": there})
    (ax,) = panels(figure)
    assert np.isnan(drawn(ax)).all(axis=1).tolist() == [False, False, True, False, False]
    assert ax.patch.get_hatch()
    assert "undefined: padding, masked, or not attention" in texts(figure)


@pytest.mark.parametrize(
    ("plot", "names"),
    [
        (plot_cross_modal_attention, "eeg_to_spec and spec_to_eeg"),
        (plot_modality_alignment, "eeg_to_spec and spec_to_eeg"),
        (lambda pair: plot_attention_heatmap(pair["eeg_to_spec"]), "query_to_key"),
    ],
)
def test_weights_that_are_not_attention_are_said_to_be_once(plot, names: str) -> None:
    with pytest.warns(
        XAttnWarning, match=tells(names, "sum to 1", "after the softmax", "before any dropout", "eval mode")
    ) as caught:
        plot({name: 0.9 * weights for name, weights in PAIR.items()})
    assert len(caught) == 1


@pytest.mark.parametrize(
    "plot",
    [
        *(plot_cross_modal_attention, plot_head_contributions, plot_modality_alignment),
        lambda weights: plot_attention_heatmap(weights["eeg_to_spec"]),
    ],
)
def test_the_warning_points_at_the_line_that_drew(plot) -> None:
    with pytest.warns(XAttnWarning) as caught:
        plot({name: 0.9 * weights for name, weights in PAIR.items()})
    assert {warning.filename for warning in caught} == {__file__}


# One map


def test_a_heatmap_of_one_head_and_sample_says_so() -> None:
    weights = PAIR["spec_to_eeg"].numpy()
    figure = plot_attention_heatmap(weights, title="Here", sample_idx=1, head=2, direction="spec_to_eeg")
    (ax,) = panels(figure)
    np.testing.assert_allclose(drawn(ax), 5 * sample("spec_to_eeg")[2].T, rtol=1e-5)
    assert ax.get_title().startswith("head 2, lift ")
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("key: EEG token", "query: Spec token")
    assert figure.get_suptitle() == "Here"


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_a_heatmap_takes_two_to_four_axes(leading: tuple[int, ...]) -> None:
    weights = PAIR["eeg_to_spec"][(0,) * (2 - len(leading))]
    ax = panels(plot_attention_heatmap(weights, title="Title"))[0]
    expected = weights.double().numpy().reshape(-1, 5, 7)[: leading[-1] if leading else 1]
    np.testing.assert_allclose(drawn(ax), reference.lift_map(expected), rtol=1e-5)
    assert ax.get_title().startswith("mean over heads, lift " if len(expected) > 1 else "lift ")
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("query token", "key token")


# Alignment


def bars(ax):
    """Place and height of every bar."""
    drawn = [patch for c in ax.containers if isinstance(c, BarContainer) for patch in c]
    return {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in drawn}


def test_bars_are_the_alignment_of_each_head() -> None:
    figure = plot_modality_alignment(PAIR, sample_idx=1)
    matrix = reference.head_alignment_matrix(sample("eeg_to_spec"), sample("spec_to_eeg"))
    top = figure.axes[0]
    assert bars(top) == pytest.approx(dict(enumerate(np.diag(matrix))), abs=1e-5)
    headline = reference.alignment(sample("eeg_to_spec"), sample("spec_to_eeg"))
    assert f"Pearson r = {headline:.2f} of the head-averaged maps (sample 1)" in figure.get_suptitle()
    # On a scale of its own, whatever the values.
    assert top.get_ylim() == (-1.2, 1.2)


def test_levels_of_agreement_differ_in_hatching_too() -> None:
    eye = torch.eye(5).expand(1, 4, 5, 5)
    noise = torch.rand(1, 4, 5, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    there = 0.8 * eye + 0.2 * noise
    back = there.mT.clone()
    back[:, 1] = there[:, 1].mT * 0.05 + 0.95 * there[:, 1].roll(1, -1).mT
    back[:, 2] = (there[:, 2].mT + there[:, 2].roll(1, -1).mT + there[:, 2].roll(2, -1).mT) / 3
    back[:, 3] = NAN
    back = back / back.sum(-1, keepdim=True)
    figure = plot_modality_alignment({"x_to_y": there, "y_to_x": back})
    top = figure.axes[0]
    heights = bars(top)
    assert heights[0] > 0.5 > heights[2] > 0 > heights[1]
    assert 3 not in heights
    looks = [(c[0].get_facecolor(), c[0].get_hatch()) for c in top.containers if isinstance(c, BarContainer)]
    assert len(set(looks)) == 3
    said = [text.get_text() for text in top.texts]
    assert said.count("undefined") == 1
    assert {"high (> 0.5)", "medium", "disagree (< 0)"} <= set(texts(figure).splitlines())
    keys = {key.get_label(): (key.get_facecolor(), key.get_hatch()) for key in figure.legends[0].legend_handles}
    assert set(looks) <= set(keys.values())


def test_levels_begin_at_the_guides_thresholds_and_every_bar_has_its_number() -> None:
    """As ``0.5`` is not over 0.5 it is medium, and so is 0."""
    values = np.array([0.51, 0.5, 0.0, -0.01, NAN])
    ax = Figure().subplots()
    sample_figures._draw_bars(ax, values, list("abcde"), matched=False)
    drawn = [c[0] for c in ax.containers if isinstance(c, BarContainer)]
    looks = [(to_hex(bar.get_facecolor()), bar.get_hatch()) for bar in drawn]
    assert looks == [("#0072b2", None), ("#e9c46a", "///"), ("#e9c46a", "///"), ("#b23a00", "xxx")]
    numbers = {text.xy: (text.get_text(), text.get_va()) for text in ax.texts if isinstance(text, Annotation)}
    assert numbers == {
        (0, 0.51): ("0.51", "bottom"),
        (1, 0.5): ("0.50", "bottom"),
        (2, 0.0): ("0.00", "bottom"),
        (3, -0.01): ("-0.01", "top"),
    }, "beyond the end of its bar"
    (gap,) = [patch for patch in ax.patches if patch not in drawn]
    assert (gap.get_x(), gap.get_width(), gap.get_hatch()) == (pytest.approx(3.6), pytest.approx(0.8), "///")
    assert [text.get_position() for text in ax.texts if text.get_text() == "undefined"] == [(4, 0)]
    assert {line.get_ydata()[0]: line.get_linestyle() for line in ax.lines} == {0: "-", 0.5: "--"}
    assert [label.get_text() for label in ax.get_xticklabels()] == list("abcde")


def test_different_numbers_of_heads_are_matched_and_said() -> None:
    pair = make_pair(heads=3, heads_back=2)
    figure = plot_modality_alignment(pair)
    top = figure.axes[0]
    A, B = (weights[0].double().numpy() for weights in pair.values())
    matrix = reference.head_alignment_matrix(A, B)
    names = [label.get_text() for label in top.get_xticklabels()]
    best = max(matrix[i, 0] + matrix[j, 1] for i in range(3) for j in range(3) if i != j)
    assert sum(bars(top).values()) == pytest.approx(best, abs=1e-5)
    for height, name in zip(bars(top).values(), names, strict=True):
        i, j = map(int, name.split(", "))
        assert height == pytest.approx(matrix[i, j], abs=1e-5)
    assert "different numbers of heads" in top.get_title()


@pytest.mark.parametrize("plot", [plot_cross_modal_attention, plot_modality_alignment])
def test_the_title_says_which_sample(plot) -> None:
    assert plot(PAIR, 1).get_suptitle().splitlines()[0].endswith("(sample 1)")
    context = "recording 3001, true GPD"
    title = plot(PAIR, 1, context=context).get_suptitle()
    assert f"({context})" in title.replace("\n", " ")
    assert "sample" not in title


def test_a_colour_bar_stands_below_each_map() -> None:
    figure = plot_modality_alignment(make_pair(queries=9, keys=119), axes={"eeg": EEG, "spec": SPEC})
    render(figure)
    bars = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    for bar, panel in zip(bars, panels(figure)[-2:], strict=True):
        box, above = bar.get_window_extent(), panel.get_window_extent()
        assert (box.x0, box.x1) == pytest.approx((above.x0, above.x1), abs=2)
        assert 0 < above.y0 - box.y1 < 100


def test_undefined_alignment_is_no_number() -> None:
    figure = plot_modality_alignment(UNIFORM)
    assert not bars(figure.axes[0])
    assert figure.get_suptitle().startswith("Modality alignment: undefined (sample 0)")


# What does not fit


HALF = {"eeg_to_spec": PAIR["eeg_to_spec"]}
ONE_TOKEN = TokenAxis("t", names=["a"])


@pytest.mark.parametrize(
    ("plot", "given", "settings", "error", "facts"),
    [
        (plot_cross_modal_attention, {}, {}, SettingError, ["{'eeg_to_spec': weights,", "got none"]),
        (plot_cross_modal_attention, {"a/x_to_y": 0}, {}, SettingError, ["later layers", "got a/x_to_y"]),
        (plot_cross_modal_attention, {**PAIR, "a_to_b": 0}, {}, SettingError, ["got eeg_to_spec, spec_to_eeg, a_to_b"]),
        (plot_cross_modal_attention, PAIR, {"sample_idx": 2}, SettingError, ["sample_idx", "0 to 1", "got 2"]),
        (plot_cross_modal_attention, PAIR, {"sample_idx": 0.5}, SettingError, ["whole number", "got 0.5"]),
        (plot_modality_alignment, PAIR, {"sample_idx": True}, SettingError, ["whole number", "got True"]),
        (plot_cross_modal_attention, PAIR, {"sample_idx": -1}, SettingError, ["sample_idx", "got -1"]),
        (plot_modality_alignment, HALF, {}, SettingError, ["two directions", "got eeg_to_spec"]),
        (plot_attention_heatmap, torch.ones(5), {}, ShapeError, ["(heads, queries, keys)", "got shape (5,)"]),
        (plot_attention_heatmap, HALF["eeg_to_spec"], {"head": 3}, SettingError, ["head", "0 to 2", "None", "got 3"]),
        (plot_attention_heatmap, HALF["eeg_to_spec"], {"direction": "x"}, SettingError, ["'<query>_to_<key>'"]),
        (plot_attention_heatmap, HALF["eeg_to_spec"], {"key_axis": ONE_TOKEN}, ShapeError, ["key axis 't'", 1, 7]),
        (
            plot_cross_modal_attention,
            {**PAIR, "spec_to_eeg": PAIR["eeg_to_spec"]},
            {},
            ShapeError,
            ["eeg_to_spec", (2, 3, 5, 7), "spec_to_eeg", "queries=7, keys=5"],
        ),
    ],
)
def test_what_does_not_fit_is_said(plot, given, settings, error, facts: list[object]) -> None:
    with pytest.raises(error, match=tells(*facts)):
        plot(given, **settings)
