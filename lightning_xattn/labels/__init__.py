"""Predictions, targets, sample ids, groups and masks of queries out of a step."""

from lightning_xattn.labels.finder import SEVERAL_LABELS, LabelFinder, Labels
from lightning_xattn.labels.places import LabelSetting, Step

__all__ = ["SEVERAL_LABELS", "LabelFinder", "LabelSetting", "Labels", "Step"]
