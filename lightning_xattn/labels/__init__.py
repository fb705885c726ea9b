"""Predictions, targets, sample ids, groups and masks of queries out of a step."""

from lightning_xattn.labels.finder import LabelFinder, Labels
from lightning_xattn.labels.places import LabelSetting, Step

__all__ = ["LabelFinder", "LabelSetting", "Labels", "Step"]
