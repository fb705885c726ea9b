"""Figures: values in, :class:`matplotlib.figure.Figure` out.

Only matplotlib's object API is used: no figure is registered with pyplot and nobody's settings change. What loggers get
is a page whose text is 9 pixels high or more at the 324 that TensorBoard shows (`pages.py`); a figure of a single
sample is 900 pixels wide (more only for more than 16 heads) with text of 9 points or more, for the report. Colours run
along viridis, whose lightness rises steadily, so they survive a grey print and colour blindness; outcomes and
directions differ in shape, line or hatching as well as in colour. An undefined value is hatched grey, never a colour of
the scale. Every figure is also written to ``save_path`` where that is given.
"""

from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.visualizations.attention_card import Measure, plot_attention_card
from lightning_xattn.visualizations.card import Cell, plot_card
from lightning_xattn.visualizations.comparison import plot_class_comparison
from lightning_xattn.visualizations.curves import Curve, Panel, plot_epochs
from lightning_xattn.visualizations.epoch import plot_class_attention, plot_head_entropy
from lightning_xattn.visualizations.heads import plot_head_contributions
from lightning_xattn.visualizations.output import map_picture, render, svg_picture
from lightning_xattn.visualizations.sample import (
    plot_attention_heatmap,
    plot_cross_modal_attention,
    plot_modality_alignment,
)

__all__ = [
    "Cell",
    "Curve",
    "Estimate",
    "Measure",
    "Panel",
    "map_picture",
    "plot_attention_card",
    "plot_attention_heatmap",
    "plot_card",
    "plot_class_attention",
    "plot_class_comparison",
    "plot_cross_modal_attention",
    "plot_epochs",
    "plot_head_contributions",
    "plot_head_entropy",
    "plot_modality_alignment",
    "render",
    "svg_picture",
]
