"""The figures of an epoch: values in, :class:`matplotlib.figure.Figure` out.

Only matplotlib's object API is used: no figure is registered with pyplot and nobody's settings change. A figure
is 900 pixels wide (more only for more than 16 heads) with text of 9 points or more, for TensorBoard. Colours run
along viridis, whose lightness rises steadily, so they survive a grey print and colour blindness; outcomes differ
in shape and line as well as in colour. An undefined value is hatched grey, never a colour of the scale.
"""

from lightning_xattn.visualizations.drawing import render
from lightning_xattn.visualizations.epoch import (
    OutcomeSummary,
    plot_class_attention,
    plot_head_entropy,
    plot_outcome_alignment,
)

__all__ = ["OutcomeSummary", "plot_class_attention", "plot_head_entropy", "plot_outcome_alignment", "render"]
