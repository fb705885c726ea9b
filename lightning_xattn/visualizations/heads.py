"""The figure of heads: how focused each of them is."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from lightning_xattn.core.wording import SINGLE_KEY
from lightning_xattn.functional import has_single_keys, require_heads, row_statistics
from lightning_xattn.visualizations.drawing import WIDTH, arrow, new_figure, set_title
from lightning_xattn.visualizations.output import save
from lightning_xattn.visualizations.pairs import AttentionDict, read_pair

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
        require_heads(num_heads, rows.attention.shape[1], str(rows.direction))
    most = max(rows.attention.shape[1] for rows in pair)
    fig = new_figure(max(WIDTH, 2.0 + 0.4 * most), 6.4)
    above, below = fig.subplots(2, 1, sharex=True)
    width = 0.8 / len(pair)
    for side, rows in enumerate(pair):
        statistics = {name: values.nanmean(0).numpy() for name, values in row_statistics(rows).items()}
        places = np.arange(rows.attention.shape[1]) + width * (side - (len(pair) - 1) / 2)
        largest, uniform = statistics["max"], statistics["mean"]
        above.bar(places, largest - uniform, width, uniform, label=arrow(rows.direction), **_LOOKS[side])
        above.hlines(uniform, places - width / 2, places + width / 2, color="black", linewidth=2)
        below.bar(places, statistics["effective_share"], width, **_LOOKS[side])
        for ax in (above, below):
            for place in places[np.isnan(largest)]:
                text = ax.text(place, 0.5, "undefined", rotation=90, fontsize=9, ha="center", va="center")
                text.set_transform(ax.get_xaxis_transform())
    above.set_yscale("log")
    lowest = min(1 / rows.attention.shape[3] for rows in pair)
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
    samples = len(pair[0].attention)
    set_title(fig, "Focus of each head", f"mean of {samples} sample{'s' * (samples > 1)}", "\n".join(remarks))
    return save(fig, save_path)
