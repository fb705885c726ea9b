"""Draw what a low and a high value of each number look like: ``python docs/make_pictures.py`` writes docs/images/*.svg.

The pictures show made-up data; the package's own functions compute their numbers. ``python docs/make_pictures.py LOGS``
takes docs/images/card.png from the test that ``examples/watch.py`` logged in the folder LOGS.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_xattn import Attention, Direction
from lightning_xattn.capture.joint import cut_direction
from lightning_xattn.capture.masks import RecordedWeights
from lightning_xattn.functional import (
    Game,
    Rows,
    alignment,
    alignment_null,
    conflict,
    contribution_shares,
    cross_fitted_probe,
    cross_modal_mass,
    entropy,
    head_diversity,
    prepare_layer,
    prepare_rows,
    query_selectivity,
    ranking_gain,
    separation,
    sink,
    support,
)
from lightning_xattn.functional.outcomes import BINS
from lightning_xattn.visualizations.drawing import HUES

FIRST, SECOND, THIRD = HUES[:3]
GREY = "0.6"
NAMES = ("A", "B", "C", "D")
FORWARD = Direction("eeg", "spec")

Drawn = tuple[float, float]
"""The number of the left half and that of the right."""


def rows_of(weights: Tensor, direction: Direction = FORWARD) -> Rows:
    """Attention ``(heads, queries, keys)`` of one sample, made ready for statistics."""
    return prepare_rows(Attention(direction, weights[None]))


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def diagonal(queries: int, keys: int, width: float = 1.0) -> Tensor:
    """Scores that are highest where query and key have the same relative place."""
    places = torch.linspace(0, 1, queries)[:, None] - torch.linspace(0, 1, keys)
    return -((places * max(queries, keys) / width) ** 2)


def draw_map(ax: Axes, weights: Tensor, x: str = "key", y: str = "query") -> None:
    """One map of attention."""
    ax.imshow(weights.numpy(), cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
    ax.set(xticks=[], yticks=[], xlabel=x, ylabel=y)


def draw_bars(ax: Axes, probes: Tensor, chosen: int | None = None) -> None:
    """The probabilities of two probes, and which class the model predicts."""
    for shift, probe, colour, hatch, name in (
        (-0.2, probes[0], FIRST, "", "probe on EEG"),
        (0.2, probes[1], SECOND, "///", "probe on Spec"),
    ):
        places = np.arange(len(probe)) + shift
        ax.bar(places, probe.numpy(), 0.4, color=colour, hatch=hatch, edgecolor="white", label=name)
    ax.set_xticks(range(probes.shape[1]), NAMES[: probes.shape[1]])
    ax.set(ylim=(0, 1.05), yticks=(0, 0.5, 1), ylabel="probability", xlabel="class")
    if chosen is not None:
        ax.set_ylim(0, 1.4)
        ax.text(chosen, 0.87, "predicted", ha="center", fontsize=9)


def halves(panels: int = 1, height: float = 2.4) -> tuple[Figure, list[list[Axes]]]:
    """A figure of two halves, with ``panels`` panels each."""
    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, [list(half.subplots(1, panels, squeeze=False)[0]) for half in figure.subfigures(1, 2, wspace=0.06)]


def name_halves(half: Sequence[Sequence[Axes]], name: str, values: Sequence[float], what: Sequence[str]) -> Drawn:
    """Title the halves with their numbers."""
    for axes, value, meaning in zip(half, values, what, strict=True):
        axes[0].figure.suptitle(f"{name} {value:.2f}\n{meaning}", fontsize=11)
    low, high = values
    return low, high


def draw_probe(figure_axes: list[list[Axes]]) -> Drawn:
    """What enters the fusion, in two dimensions, and how often a probe is right."""
    target = torch.arange(240) % 3
    angles = 2 * math.pi * target / 3
    folds = torch.arange(240) // 3 % 5
    values = []
    for (ax,), spread in zip(figure_axes, (6.0, 0.45), strict=True):
        points = torch.stack([angles.cos(), angles.sin()], dim=1) + spread * random(240, 2)
        probabilities = cross_fitted_probe(points, target, folds, 3)
        values.append(float((probabilities.argmax(1) == target).double().mean()))
        for one, (marker, colour) in enumerate(zip("o^s", (FIRST, SECOND, THIRD), strict=True)):
            x, y = points[target == one].T.numpy()
            ax.scatter(x, y, s=14, marker=marker, color=colour, label=f"class {NAMES[one]}")
        ax.set(xticks=[], yticks=[], xlabel="what the modality brings into the fusion")
    figure_axes[1][0].legend(fontsize=9, loc="lower right")
    return name_halves(figure_axes, "probe accuracy", values, ("little above the largest class, 0.33", "well above it"))


def draw_conflict(figure_axes: list[list[Axes]]) -> Drawn:
    """Two probes that agree, and two that do not."""
    agree = torch.tensor([[0.85, 0.10, 0.05], [0.90, 0.06, 0.04]])
    differ = torch.tensor([[0.85, 0.10, 0.05], [0.05, 0.05, 0.90]])
    values = [float(conflict(one[:, None])) for one in (agree, differ)]
    for (ax,), probes in zip(figure_axes, (agree, differ), strict=True):
        draw_bars(ax, probes)
    figure_axes[1][0].legend(fontsize=9, loc="upper center")
    what = "both probes predict A", "the probe on EEG predicts A, that on Spec C"
    return name_halves(figure_axes, "conflict", values, what)


def draw_support(figure_axes: list[list[Axes]]) -> Drawn:
    """A prediction that both probes agree with, and one that neither does."""
    probes = torch.tensor([[0.80, 0.15, 0.05], [0.70, 0.20, 0.10]])
    values = []
    for (ax,), predicted in zip(figure_axes, (2, 0), strict=True):
        values.append(float(support(probes[:, None].log(), torch.tensor([predicted]))))
        draw_bars(ax, probes, predicted)
    figure_axes[0][0].legend(fontsize=9, loc="upper right")
    return name_halves(figure_axes, "support", values, ("neither supports the prediction", "both support it"))


def draw_contribution(figure_axes: list[list[Axes]]) -> Drawn:
    """Probabilities of the prediction with modalities permuted, and what follows for EEG's share."""
    games = ((0.17, 0.45, 0.55, 0.85), (0.17, 0.88, 0.12, 0.80))
    shares = []
    for (ax,), values in zip(figure_axes, games, strict=True):
        subsets = (frozenset[int](), frozenset({0}), frozenset({1}), frozenset({0, 1}))
        of_subset = {one: torch.tensor([value]) for one, value in zip(subsets, values, strict=True)}
        phi = Game(2, of_subset, dict.fromkeys(subsets, torch.zeros(1))).phi
        shares.append(float(contribution_shares(phi)[0]))
        ax.bar(range(4), values, 0.6, color=(GREY, FIRST, SECOND, "0.3"))
        ax.set_xticks(range(4), ("neither", "EEG", "Spec", "both"))
        ax.set(ylim=(0, 1.25), yticks=(0, 0.5, 1), xlabel="modalities of the sample itself", ylabel="probability")
        ax.text(0.02, 0.97, f"φ(EEG) {phi[0, 0]:+.2f}, φ(Spec) {phi[0, 1]:+.2f}", transform=ax.transAxes, va="top")
    return name_halves(
        figure_axes,
        "share of EEG",
        shares,
        ("both contribute to the prediction", "EEG contributes, Spec opposes it"),
    )


def draw_faithfulness(figure_axes: list[list[Axes]]) -> Drawn:
    """How the probability falls as keys are replaced, the most attended first and the least attended first."""
    cases = ((0.70, 0.50, 0.35, 0.69, 0.52, 0.34, 0.20), (0.45, 0.30, 0.24, 0.88, 0.82, 0.62, 0.20))
    values = []
    for (ax,), replaced in zip(figure_axes, cases, strict=True):
        intact = 0.90
        gain = float(ranking_gain(torch.tensor([replaced])))
        values.append(gain / (intact - replaced[-1]))
        for which, colour, marker, name in (
            (replaced[:3], FIRST, "o", "most attended first"),
            (replaced[3:6], SECOND, "^", "least attended first"),
        ):
            ax.plot((0, 25, 50, 75, 100), (intact, *which, replaced[-1]), color=colour, marker=marker, label=name)
        ax.set(ylim=(0, 1), xticks=(0, 25, 50, 75, 100), xlabel="replaced keys (%)", ylabel="probability")
    figure_axes[0][0].legend(fontsize=9, loc="lower left")
    return name_halves(
        figure_axes, "faithfulness", values, ("the order of the keys means nothing", "attended keys matter more")
    )


def draw_alignment(figure_axes: list[list[Axes]]) -> Drawn:
    """The two directions of a layer, the second one transposed."""
    there = (diagonal(9, 14) + 0.3 * random(9, 14)).softmax(-1)
    values = []
    for axes, back in zip(
        figure_axes, (2 * random(14, 9, seed=3), diagonal(14, 9) + 0.3 * random(14, 9, seed=2)), strict=True
    ):
        other = back.softmax(-1)
        values.append(float(alignment(rows_of(there[None]), rows_of(other[None], FORWARD.opposite))))
        draw_map(axes[0], there, "Spec", "EEG")
        draw_map(axes[1], other.T, "Spec", "")
        axes[0].set_title("EEG asks", fontsize=9)
        axes[1].set_title("Spec asks", fontsize=9)
    return name_halves(figure_axes, "alignment", values, ("unrelated maps", "the same pairs, both ways"))


def draw_null(figure_axes: list[list[Axes]]) -> Drawn:
    """Two samples whose pairs are their own, and two that share a habit."""
    habit = diagonal(9, 14)
    own = (3 * random(2, 9, 14), torch.stack([habit, habit]) + 0.2 * random(2, 9, 14, seed=4))
    values = []
    for axes, scores in zip(figure_axes, own, strict=True):
        there = prepare_rows(Attention(FORWARD, scores.softmax(-1)[:, None]))
        back = prepare_rows(Attention(FORWARD.opposite, scores.transpose(1, 2).softmax(-1)[:, None]))
        compared = prepare_layer(there, back).comparison
        of_samples, sums = compared.alignment, (compared.x.sum(0), compared.y.sum(0))
        values.append(float(alignment_null(*sums, of_samples.sum(), torch.tensor(2))))
        for number, ax in enumerate(axes):
            draw_map(ax, there.weights[number, 0], "Spec", "" if number else "EEG")
            ax.set_title(f"sample {number + 1}: alignment {of_samples[number]:.2f}", fontsize=9)
    return name_halves(
        figure_axes,
        "alignment of different samples",
        values,
        ("the pairs are each sample's own", "a habit of the model"),
    )


def draw_entropy(figure_axes: list[list[Axes]]) -> Drawn:
    """One query's weights over twelve keys."""
    values = []
    focused = random(12, seed=1).index_fill(0, torch.tensor([4]), 6.0)
    for (ax,), scores in zip(figure_axes, (focused, 0.4 * random(12, seed=1)), strict=True):
        weights = scores.softmax(-1)
        values.append(float(entropy(rows_of(weights[None, None]))))
        ax.bar(range(12), weights.numpy(), color=FIRST)
        ax.axhline(1 / 12, color="0.3", linestyle=":")
        ax.set(ylim=(0, 1), xticks=[], xlabel="key", ylabel="weight")
    figure_axes[1][0].text(11.4, 0.12, "uniform: 1/12", ha="right", va="bottom", fontsize=9)
    return name_halves(figure_axes, "entropy", values, ("one key gets nearly all", "all keys get about the same"))


def draw_heads(figure_axes: list[list[Axes]]) -> Drawn:
    """Three heads of one layer."""
    alike = diagonal(9, 14).expand(3, 9, 14) + 0.1 * random(3, 9, 14)
    places = torch.arange(14)
    focus = [-((places - place) ** 2) / 4.0 for place in (2, 7, 12)]
    differ = torch.stack([one.expand(9, 14) for one in focus])
    values = []
    for axes, scores in zip(figure_axes, (alike, differ), strict=True):
        weights = scores.softmax(-1)
        values.append(float(head_diversity(rows_of(weights))))
        for head, ax in enumerate(axes):
            draw_map(ax, weights[head], "key", "" if head else "query")
            ax.set_title(f"head {head}", fontsize=9)
    return name_halves(figure_axes, "head diversity", values, ("all heads do the same", "each head attends elsewhere"))


def draw_selectivity(figure_axes: list[list[Axes]]) -> Drawn:
    """A head with the same attention for all queries, and one in which each query attends elsewhere."""
    bands = 2 * random(1, 14, seed=2).expand(9, 14) + 0.1 * random(9, 14)
    values = []
    for (ax,), scores in zip(figure_axes, (bands, 4 * diagonal(9, 14)), strict=True):
        weights = scores.softmax(-1)
        values.append(float(query_selectivity(rows_of(weights[None]))))
        draw_map(ax, weights)
    return name_halves(figure_axes, "query selectivity", values, ("all queries get the same", "each has its own key"))


def draw_sink(figure_axes: list[list[Axes]]) -> Drawn:
    """A head without a sink, and one whose queries all attend to the first key."""
    sunk = random(9, 14).index_fill(1, torch.tensor([0]), 5.0)
    values = []
    for (ax,), scores in zip(figure_axes, (diagonal(9, 14), sunk), strict=True):
        weights = scores.softmax(-1)
        values.append(float(sink(rows_of(weights[None]))))
        draw_map(ax, weights)
    return name_halves(figure_axes, "sink", values, ("no key gets much", "the first key takes most"))


def draw_cross_modal_mass(figure_axes: list[list[Axes]]) -> Drawn:
    """A joint sequence of 6 EEG and 10 spectrogram tokens."""
    values = []
    own = torch.zeros(16, dtype=torch.bool)
    own[:6] = True
    for (ax,), bonus in zip(figure_axes, (2.5, -2.5), strict=True):
        joint = (random(16, 16) + bonus * (own[:, None] == own)).softmax(-1)
        cut = cut_direction(RecordedWeights(joint[None, None]), slice(0, 6), slice(6, 16), "encoder")
        block = Attention(FORWARD, cut.weights, cross_modal_mass=cut.cross_modal_mass)
        values.append(float(cross_modal_mass(prepare_rows(block))))
        draw_map(ax, joint, "key: EEG, then Spec", "query: EEG, then Spec")
        for line in (ax.axhline, ax.axvline):
            line(5.5, color="white", linewidth=2)
    return name_halves(
        figure_axes,
        "cross-modal attention mass",
        values,
        ("EEG attends to itself", "EEG attends to the spectrogram"),
    )


def draw_auroc(figure_axes: list[list[Axes]]) -> Drawn:
    """A score that is the same whatever the outcome, and one whose low values detect errors."""
    values = []
    for (ax,), shift in zip(figure_axes, (0.0, 1.8), strict=True):
        correct, incorrect = random(2000, seed=1) + shift, random(600, seed=2)
        low, high = -4.0, 6.0
        counts = torch.stack([torch.histc(one, BINS, low, high) for one in (correct, incorrect)], dim=1)
        values.append(separation(torch.arange(BINS), counts).auroc)
        for one, colour, name in ((correct, FIRST, "correct"), (incorrect, "#D55E00", "incorrect")):
            ax.hist(one.numpy(), bins=30, range=(low, high), density=True, histtype="step", color=colour, label=name)
        ax.set(yticks=[], xticks=[], xlabel="score", ylabel="samples")
    figure_axes[1][0].legend(fontsize=9, loc="upper right")
    return name_halves(figure_axes, "AUROC", values, ("chance", "low values detect errors"))


PICTURES: Mapping[str, tuple[Callable[[list[list[Axes]]], Drawn], int]] = {
    "probe": (draw_probe, 1),
    "conflict": (draw_conflict, 1),
    "support": (draw_support, 1),
    "contribution": (draw_contribution, 1),
    "faithfulness": (draw_faithfulness, 1),
    "alignment": (draw_alignment, 2),
    "null": (draw_null, 2),
    "entropy": (draw_entropy, 1),
    "head_diversity": (draw_heads, 3),
    "query_selectivity": (draw_selectivity, 1),
    "sink": (draw_sink, 1),
    "cross_modal_mass": (draw_cross_modal_mass, 1),
    "auroc": (draw_auroc, 1),
}
"""By the name of the file, the function that draws its two halves, and the number of panels in each half."""


def make_picture(name: str, folder: Path) -> Drawn:
    """Write one picture; its numbers, the lower one first."""
    draw, panels = PICTURES[name]
    figure, halves_of_it = halves(panels)
    drawn = draw(halves_of_it)
    # The same bytes in every run.
    with matplotlib.rc_context({"svg.hashsalt": "lightning_xattn"}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    return drawn


def save_card(logs: Path, file: Path) -> None:
    """Write the card of a run's test to a file, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs), size_guidance={"images": 0}).Reload()
    file.write_bytes(events.Images("xattn_cards_of_test/test/1_modalities")[-1].encoded_image_string)


if __name__ == "__main__":
    folder = Path(__file__).parent / "images"
    if len(sys.argv) > 1:
        save_card(Path(sys.argv[1]), folder / "card.png")
    else:
        for name in PICTURES:
            print(name, *(f"{value:.2f}" for value in make_picture(name, folder)))
