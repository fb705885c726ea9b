"""The figures of heads: what each contributes, and which head of one direction goes with which of the other."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from lightning_xattn.core.wording import SINGLE_KEY, decimal
from lightning_xattn.functional import (
    best_head_matching,
    has_single_keys,
    head_alignment_matrix,
    require_heads,
    row_statistics,
)
from lightning_xattn.visualizations.drawing import (
    WIDTH,
    arrow,
    draw_colour_bar,
    draw_mesh,
    new_figure,
    print_value,
    set_title,
    show_key,
    undefined_key,
)
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pairs import AttentionDict, check_sample, read_both, read_pair

# The two directions differ in lightness and hatching, not in hue alone.
_LOOKS: tuple[dict[str, Any], ...] = (
    {"facecolor": "#00614A", "edgecolor": "black"},
    {"facecolor": "#E7B6D1", "edgecolor": "black", "hatch": "///"},
)


def plot_head_contributions(
    attention_dict: AttentionDict, num_heads: int | None = None, *, save_path: str | PathLike[str] | None = None
) -> Figure:
    """Draw how focused each head is, in both directions, averaged over rows and samples.

    Above, a row's largest weight, on a logarithmic axis: a bar starts at what uniform attention gives, ``1 / K``, so
    its length is the lift. Below, the share of its keys that a row really uses, ``exp(entropy) / K``: 1 is uniform.

    The mean weight is not drawn: a row sums to 1, so its mean is ``1 / K`` for every head whatever the model learned.
    It is the line at which the bars above start.

    Parameters
    ----------
    attention_dict
        Weights ``(batch, heads, queries, keys)`` by direction (or one direction alone), or an ``AttentionPair``, whose
        masks then count.
    num_heads
        How many heads are expected; None: as many as there are.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    SettingError
        If ``num_heads`` is not how many there are, a direction is not one, or the suffix of ``save_path`` cannot be
        written.
    ShapeError
        If the directions do not fit each other.

    Examples
    --------
    >>> logits = torch.randn(4, 8, 9, 12)
    >>> weights = {"eeg_to_spec": logits.softmax(-1), "spec_to_eeg": logits.mT.softmax(-1)}
    >>> figure = plot_head_contributions(weights, save_path="heads.png")
    >>> Path("heads.png").is_file()
    True
    """
    pair = read_pair(attention_dict)
    for rows in pair:
        require_heads(num_heads, rows.weights.shape[1], str(rows.direction))
    most = max(rows.weights.shape[1] for rows in pair)
    fig = new_figure(max(WIDTH, 2.0 + 0.4 * most), 6.4)
    above, below = fig.subplots(2, 1, sharex=True)
    width = 0.8 / len(pair)
    for side, rows in enumerate(pair):
        statistics = {name: values.nanmean(0).numpy() for name, values in row_statistics(rows).items()}
        places = np.arange(rows.weights.shape[1]) + width * (side - (len(pair) - 1) / 2)
        largest, uniform = statistics["max"], statistics["mean"]
        above.bar(places, largest - uniform, width, uniform, label=arrow(rows.direction), **_LOOKS[side])
        above.hlines(uniform, places - width / 2, places + width / 2, color="black", linewidth=2)
        below.bar(places, statistics["effective_share"], width, **_LOOKS[side])
        for ax in (above, below):
            for place in places[np.isnan(largest)]:
                text = ax.text(place, 0.5, "undefined", rotation=90, fontsize=9, ha="center", va="center")
                text.set_transform(ax.get_xaxis_transform())
    above.set_yscale("log")
    lowest = min(1 / rows.weights.shape[3] for rows in pair)
    above.set_ylim(lowest / 1.5, 1.5)
    above.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
    above.set_ylabel("largest weight of a row")
    above.set_title("Largest weight; bars start at 1 / keys, what uniform attention gives", fontsize=10)
    below.axhline(1.0, color="black", linestyle="--", linewidth=1)
    below.set(ylim=(0, 1.1), ylabel="share of its keys in use", xlabel="head", xlim=(-0.6, most - 0.4))
    below.set_xticks(range(most))
    below.set_title("Effective keys, exp(entropy) / keys (dashed: uniform; lower is more focused)", fontsize=10)
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    remarks = ["The mean weight is not drawn: a row sums to 1, so it is 1 / keys for every head, whatever it learned."]
    remarks += [f"{arrow(rows.direction)}: {SINGLE_KEY}" for rows in pair if has_single_keys(rows)]
    samples = len(pair[0].weights)
    set_title(fig, "Focus of each head", f"mean of {samples} sample{'s' * (samples > 1)}", "\n".join(remarks))
    return save(fig, save_path)


def plot_head_alignment_matrix(
    attention_dict: AttentionDict,
    sample_idx: int | None = None,
    *,
    context: str = "",
    save_path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw the alignment of every head of one direction with every head of the other, the best matching outlined.

    Heads of the two directions share no parameters, so head 0 need not go with head 0. The best matching is the
    one-to-one matching with the largest total; as it is picked for that, its mean is above 0 even by chance.

    Parameters
    ----------
    attention_dict
        Weights ``(batch, heads, queries, keys)`` of both directions, or an ``AttentionPair``, whose masks then count.
    sample_idx
        Which sample; None: the mean over the samples where a pair is defined.
    context
        What to know of the sample or samples, for the title, e.g. ``"sample 3001, predicted LPD (0.82), true GPD"``;
        which sample of the batch, or how many samples, when empty.
    save_path
        Also write the figure there (PNG, PDF, SVG and others, by suffix).

    Raises
    ------
    SettingError
        If there is one direction only, no such sample, or the suffix of ``save_path`` is not one that can be written.
    ShapeError
        If the directions do not fit each other.

    Examples
    --------
    >>> logits = torch.randn(4, 8, 9, 12)
    >>> weights = {"eeg_to_spec": logits.softmax(-1), "spec_to_eeg": logits.mT.softmax(-1)}
    >>> figure = plot_head_alignment_matrix(weights, sample_idx=0, save_path="matrix.png")
    >>> Path("matrix.png").is_file()
    True
    """
    forward, backward = read_both(attention_dict, "plot_head_alignment_matrix")
    matrices = head_alignment_matrix(forward, backward)
    samples = len(matrices)
    which = slice(None) if sample_idx is None else check_sample(sample_idx, samples)
    if sample_idx is None:
        matrix, shown = matrices.nanmean(0), f"mean of {samples} sample{'s' * (samples > 1)}"
    else:
        matrix, shown = matrices[which], f"sample {sample_idx}"
    values = matrix.numpy()
    rows, columns = values.shape
    fig = new_figure(max(WIDTH, 2.6 + 0.4 * columns), 2.0 + max(0.3 * rows, 1.2))
    ax = fig.subplots()
    scale = Normalize(-1.0, 1.0)
    draw_mesh(ax, np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, values, scale)
    for (row, column), value in np.ndenumerate(values):
        print_value(ax, column, row, value, scale)
    matched = [pair for pair in best_head_matching(matrix) if not np.isnan(values[pair])]
    for row, column in matched:
        for colour, thickness in (("black", 3.5), ("white", 1.5)):
            ax.add_patch(
                Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, color=colour, linewidth=thickness)
            )
    ax.set_xlabel(f"head of {arrow(backward.direction)}")
    ax.set_ylabel(f"head of {arrow(forward.direction)}")
    ax.set_xticks(range(columns))
    ax.set_yticks(range(rows))
    ax.invert_yaxis()
    bar = draw_colour_bar(fig, np.array([ax]), scale, "Pearson r\n(line: 0, unrelated)")
    bar.axhline(0.0, color="white", linewidth=3)
    bar.axhline(0.0, color="black", linewidth=1)
    single = [arrow(rows.direction) for rows in (forward, backward) if has_single_keys(rows, which)]
    if np.isnan(values).any():
        show_key(fig, undefined_key("a map has no variance, or no valid row"))
    set_title(
        fig, "Alignment of the heads of both directions", context or shown, "\n".join(_said_of(values, matched, single))
    )
    return save(fig, save_path)


def _said_of(values: NDArray[Any], matched: list[tuple[int, int]], single: list[str]) -> list[str]:
    """What the title says of the matching."""
    lines = []
    if matched:
        best = np.mean([values[pair] for pair in matched])
        lines.append(f"Outlined: the best one-to-one matching, mean r = {decimal(best)} (above 0 even by chance).")
    lines += [f"{direction}: {SINGLE_KEY}" for direction in single]
    return lines
