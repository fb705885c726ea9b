"""Every figure can be read: nothing too small, cut off or overlapping. Each layout is drawn once."""

from __future__ import annotations

import dataclasses
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.visualizations import (
    Cell,
    Curve,
    Estimate,
    Measure,
    Panel,
    plot_attention_card,
    plot_attention_heatmap,
    plot_card,
    plot_class_attention,
    plot_class_comparison,
    plot_cross_modal_attention,
    plot_epochs,
    plot_head_contributions,
    plot_head_entropy,
    plot_modality_alignment,
    render,
)
from tests.visualizations.conftest import (
    EEG,
    LONG_REGIONS,
    REGIONS,
    SPEC,
    assert_written,
    drawn,
    make_maps,
    make_pair,
    make_spectrograms,
    make_traces,
    mesh,
    panels,
    smallest_text,
    texts,
)

# Of rows that are left out figures warn, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*not finite or do not sum to 1:lightning_xattn.XAttnWarning")

HMS = ["Seizure", "LPD", "GPD", "LRDA", "GRDA", "Other"]
LONG = [
    "Lateralised periodic discharges over the left hemisphere",
    "Generalised rhythmic delta activity with superimposed fast activity",
    "Other_without_a_single_space_in_its_very_long_name",
]
CONTEXT = "validation, epoch 117, layer model.backbone.fusion.cross_attention_block_3"


def attention_figure(classes: list[str], query: TokenAxis, key: TokenAxis, missing: int | None = None) -> Figure:
    maps, counts = make_maps(len(classes), len(query), len(key)), np.arange(len(classes)) + 120
    if missing is not None:
        maps[missing], counts[missing] = np.nan, 0
    return plot_class_attention(
        maps, counts, classes, direction="eeg_to_spec", query_axis=query, key_axis=key, context=CONTEXT
    )


def both_ways_figure(
    classes: list[str], one: TokenAxis, other: TokenAxis, missing: int | None = None, back: bool = True
) -> Figure:
    maps = {"eeg_to_spec": make_maps(len(classes), len(one), len(other))}
    maps |= {"spec_to_eeg": make_maps(len(classes), len(other), len(one))} if back else {}
    counts = np.arange(len(classes)) + 120
    if missing is not None:
        counts[missing] = 0
    axes = {"eeg": one, "spec": other}
    return plot_attention_card(make_measures(classes), maps, counts, classes, axes=axes, context=CONTEXT)


def make_measures(classes: list[str]) -> list[Measure]:
    means = np.random.default_rng(0).uniform(size=len(classes) + 2)
    groups = [Estimate(mean, mean - 0.1, mean + 0.1, 3 + i) for i, mean in enumerate(means)]
    titles = "alignment", "entropy EEG → Spec", "entropy Spec → EEG"
    return [Measure(title, groups[:-2], groups[-2:], null=0.1) for title in titles]


def card_figure(modalities: list[str], cells: list[str]) -> Figure:
    rng = np.random.default_rng(0)

    def some() -> Estimate:
        mean = rng.uniform()
        return Estimate(mean, mean - 0.2, mean + 0.2, 40)

    few = Estimate(0.5, math.nan, math.nan, 2)
    probes = {name: some() for name in (*modalities, "joint", "model")}
    of_cells = [Cell(name, some(), few if i == 1 else some(), some()) for i, name in enumerate(cells)]
    sentence = "The model mostly uses EEG (88 % of the contribution). Both modalities support 28 % of the predictions."
    settings = {"largest_class": 0.17, "sentence": sentence, "group_noun": "patients", "context": CONTEXT}
    return plot_card(modalities, probes, {name: some() for name in modalities}, of_cells, **settings)


def entropy_figure(classes: list[str], heads: int, missing: int | None = None) -> Figure:
    values = np.random.default_rng(0).uniform(size=(len(classes), heads))
    if missing is not None:
        values[missing] = np.nan
    directions = {"eeg_to_spec": values, "spec_to_eeg": values}
    return plot_head_entropy(directions, np.full(len(classes), 120), classes, context=CONTEXT)


def signals_figure(pair: dict[str, torch.Tensor], seconds: int = 50, **modalities: str) -> Figure:
    from lightning_xattn.hms.features import spectrogram_spans
    from lightning_xattn.hms.recordings import COMPETITION, IIIC
    from lightning_xattn.hms.signal_plots import plot_attention_over_signals

    names = {"eeg": "eeg", "spec": "spec"} | modalities
    spans = {names["eeg"]: {50: COMPETITION, 10: IIIC}[seconds].spans, names["spec"]: spectrogram_spans()}
    axes = {name: TokenAxis("w", spans=of_one) for name, of_one in spans.items()}
    if len(next(iter(pair.values()))[0, 0]) == 1:
        axes = {}
    traces = dataclasses.replace(make_traces(seconds), modality=names["eeg"])
    spectrograms = dataclasses.replace(make_spectrograms(), modality=names["spec"])
    context = "sample 1628180742, predicted Seizure (0.82), true Other"
    return plot_attention_over_signals(traces, spectrograms, pair, axes=axes, context=context)


def comparison_figure(classes: list[str], quantities: int) -> Figure:
    rng = np.random.default_rng(0)
    means = rng.uniform(size=len(classes) + 2)
    groups = [Estimate(mean, mean - 0.1, mean + 0.1, 3 + i) for i, mean in enumerate(means)]
    titles = ["alignment (Pearson r)", "entropy eeg → spec (0: one key, 1: diffuse)", "entropy spec → eeg (0: one key)"]
    parts = dict.fromkeys(titles[:quantities], (groups[:-2], groups[-2:]))
    return plot_class_comparison(parts, classes, context=CONTEXT)


def shares_figure(classes: list[str], modalities: list[str]) -> Figure:
    rng = np.random.default_rng(0)
    shares = {}
    for name in modalities:
        means = rng.uniform(-10, 100, size=len(classes) + 2)
        groups = [Estimate(mean, mean - 80, mean + 80, 3 + i, 2 + i) for i, mean in enumerate(means)]
        shares[f"share of {name} (% of the contributions)"] = groups[:-2], groups[-2:]
    return plot_class_comparison(shares, classes, limits=(-60, 160), group_noun="patients", context=CONTEXT)


def epochs_figure(panels: int) -> Figure:
    epochs = [*range(12)]
    values = np.random.default_rng(0).uniform(0.2, 0.8, size=(2, 12))
    curves = [
        Curve(name, epochs, of.tolist(), (of - 0.9).tolist(), (of + 0.1).tolist())
        for name, of in zip(("correct", "incorrect"), values, strict=True)
    ]
    reference = "null: different samples", [0.1] * 12
    titles = ["alignment", "share of the contribution of each modality to the prediction", "accuracy of each probe"]
    return plot_epochs([Panel(title, curves, (0, 1), reference) for title in titles[:panels]], context=CONTEXT)


def undefined(pair: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    pair = {name: weights.clone() for name, weights in pair.items()}
    pair["eeg_to_spec"][0, 0] = torch.nan
    pair["spec_to_eeg"][0, :, 3] = torch.nan
    return pair


SMALL, WINDOWS = make_pair(), make_pair(heads=8, queries=9, keys=119)
MANY_HEADS, SINGLE = make_pair(heads=16), make_pair(queries=1, keys=1)
PLACES = {"eeg": EEG, "spec": SPEC}
ONE = TokenAxis("pooled", names=["all"])
ELECTRODES = TokenAxis("electrode", names=[f"electrode {i}" for i in range(128)])
MANY = [f"class {i}" for i in range(20)]
QUICK = {
    "six classes": lambda: attention_figure(HMS, EEG, SPEC, missing=3),
    "card": lambda: card_figure(["eeg", "spec"], ["both", "only EEG", "only Spec", "neither (probes differ)"]),
    "card, long names": lambda: card_figure(LONG, [f"{n} of 3" for n in (3, 2, 1)]),
    "both ways": lambda: both_ways_figure(HMS, EEG, SPEC, missing=3),
    "both ways, long class names": lambda: both_ways_figure(LONG, LONG_REGIONS, SPEC),
    "long class names": lambda: attention_figure(LONG, EEG, SPEC),
    "long names below": lambda: attention_figure(HMS, REGIONS, LONG_REGIONS),
    "one key, two classes": lambda: attention_figure(HMS[:2], EEG, ONE),
    "entropy": lambda: entropy_figure(HMS, 8, missing=3),
    "entropy, long class names": lambda: entropy_figure(LONG, 8),
    "comparison, long class names": lambda: comparison_figure(LONG, 1),
    "shares of four, long class names": lambda: shares_figure(LONG, ["eeg", "spec", "video", "questionnaire"]),
    "epochs": lambda: epochs_figure(3),
    "sample, context": lambda: plot_cross_modal_attention(WINDOWS, axes=PLACES, context=CONTEXT),
    "heatmap": lambda: plot_attention_heatmap(SMALL["eeg_to_spec"], title=CONTEXT),
    "sample's alignment, context": lambda: plot_modality_alignment(WINDOWS, axes=PLACES, context=CONTEXT),
    "heads, undefined": lambda: plot_head_contributions(undefined({n: w[:1] for n, w in SMALL.items()})),
}
"""One or two layouts of each figure, the fullest ones."""

MORE = {
    "one way": lambda: both_ways_figure(HMS, EEG, SPEC, back=False),
    "both ways, twenty classes": lambda: both_ways_figure(MANY, EEG, SPEC),
    "both ways, long names below": lambda: both_ways_figure(HMS, REGIONS, LONG_REGIONS),
    "both ways, many regions": lambda: both_ways_figure(HMS[:2], REGIONS, ELECTRODES),
    "both ways, one key": lambda: both_ways_figure(HMS, ONE, EEG),
    "six classes, the way back": lambda: attention_figure(HMS, SPEC, EEG),
    "five classes": lambda: attention_figure(HMS[:5], EEG, SPEC),
    "one class": lambda: attention_figure(HMS[:1], EEG, SPEC),
    "twenty classes": lambda: attention_figure(MANY, EEG, SPEC),
    "one key": lambda: attention_figure(HMS, ONE, ONE),
    "entropy of 32 heads": lambda: entropy_figure(HMS, 32),
    "entropy, twenty classes": lambda: entropy_figure(MANY, 8),
    "comparison": lambda: comparison_figure(HMS, 3),
    "comparison, twenty classes": lambda: comparison_figure(MANY, 2),
    "shares": lambda: shares_figure(HMS, ["eeg", "spec"]),
    "shares, twenty classes": lambda: shares_figure(MANY, ["eeg", "spec"]),
    "epochs, one panel": lambda: epochs_figure(1),
    "sample": lambda: plot_cross_modal_attention(SMALL),
    "sample, regions": lambda: plot_cross_modal_attention(
        make_pair(queries=4, keys=4), axes={"eeg": LONG_REGIONS, "spec": REGIONS}
    ),
    "sample, one key": lambda: plot_cross_modal_attention(SINGLE),
    "sample, undefined": lambda: plot_cross_modal_attention(undefined(SMALL)),
    "heatmap, windows": lambda: plot_attention_heatmap(
        WINDOWS["spec_to_eeg"], direction="spec_to_eeg", query_axis=SPEC, key_axis=EEG
    ),
    "heatmap, one key": lambda: plot_attention_heatmap(SINGLE["eeg_to_spec"]),
    "sample's alignment, 16 heads": lambda: plot_modality_alignment(MANY_HEADS),
    "sample's alignment, undefined": lambda: plot_modality_alignment(undefined(SMALL)),
    "sample's alignment, one key": lambda: plot_modality_alignment(SINGLE),
    "sample's alignment, unequal heads": lambda: plot_modality_alignment(make_pair(heads_back=2)),
    "heads": lambda: plot_head_contributions(SMALL),
    "16 heads": lambda: plot_head_contributions(MANY_HEADS),
    "heads, one key": lambda: plot_head_contributions(SINGLE),
    "signals": lambda: signals_figure(WINDOWS),
    "signals of 10 s": lambda: signals_figure(WINDOWS, seconds=10),
    "signals, one direction": lambda: signals_figure({"eeg_to_spec": WINDOWS["eeg_to_spec"]}),
    "signals, undefined": lambda: signals_figure(undefined(WINDOWS)),
    "signals, long names": lambda: signals_figure(
        {"electroencephalogram_to_spectrogram of regions": WINDOWS["eeg_to_spec"]},
        eeg="electroencephalogram",
        spec="spectrogram of regions",
    ),
    "signals, one key": lambda: signals_figure(SINGLE),
}
OF_SAMPLES = ("sample", "heatmap", "heads", "16 heads", "signals")
"""How the names of figures begin that are looked at in a page; loggers show the others."""


def shown_texts(figure: Figure) -> list[Text]:
    """All that is to be read."""
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    own = (child for child in figure.get_children() if isinstance(child, Text))
    shown = [*own, *(text for legend in legends for text in legend.get_texts())]
    for ax in figure.axes:
        # Titles may stand in the middle or at either side.
        shown += [child for child in ax.get_children() if isinstance(child, Text)]
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            # Axes that are switched off keep labels that nobody sees, and so do ticks outside the limits.
            if axis.get_visible():
                low, high = sorted(axis.get_view_interval())
                ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
                shown += [axis.label, *(tick.label1 for tick in ticks)]
    return [text for text in shown if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_text_is_legible_inside_the_canvas_and_by_itself(name: str) -> None:
    figure = {**QUICK, **MORE}[name]()
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # lays out all there is
    renderer = canvas.get_renderer()
    boxes = {text: text.get_window_extent(renderer) for text in shown_texts(figure)}
    width, height = canvas.get_width_height()
    for text, box in boxes.items():
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, f"'{text.get_text()}' is cut: {box}"
    for (one, box), (other, other_box) in combinations(boxes.items(), 2):
        # A box is a little larger than its letters.
        assert not box.padded(-1).overlaps(other_box.padded(-1)), f"'{one.get_text()}' over '{other.get_text()}'"
    if name.startswith(OF_SAMPLES):
        assert smallest_text(figure, shown_width=900) >= 11 or figure.get_figwidth() > 9  # of more than 16 heads
    else:
        # TensorBoard shows one pixel for two.
        assert smallest_text(figure, shown_width=324) >= 9
        assert figure.get_figwidth() * figure.dpi == 2 * 324
        assert CONTEXT.rpartition(" ")[2] in texts(figure)


@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_vector_output_works_and_stays_small(kind: str, tmp_path: Path) -> None:
    path, figure = tmp_path / f"figure.{kind}", QUICK["six classes"]()
    figure.savefig(path)
    assert_written(path, figure)
    assert path.stat().st_size < 300_000


def test_a_rendered_figure_is_a_picture() -> None:
    figure = attention_figure(HMS[:3], LONG_REGIONS, REGIONS)
    picture = render(figure)
    width, height = figure.get_size_inches() * figure.dpi
    assert picture.shape == (round(height), round(width), 3)
    assert picture.dtype == np.uint8
    assert (picture[0, 0] == 255).all()
    for ax in panels(figure):
        values, corners = drawn(ax), mesh(ax).get_coordinates()
        for row, column in np.ndindex(values.shape):
            middle = corners[row : row + 2, column : column + 2].mean((0, 1))
            x, y = ax.transData.transform(middle)
            colour = np.multiply(255, mesh(ax).to_rgba(values[row, column])[:3])
            np.testing.assert_allclose(picture[int(height - y), int(x)], colour, atol=1)
