"""Predictions, targets, sample ids, groups and masks of queries out of a step."""

from lightning_xattn.capture.labels.finder import SEVERAL_LABELS, LabelFinder, Labels
from lightning_xattn.capture.labels.places import LabelSetting, Step

__all__ = ["SEVERAL_LABELS", "LabelFinder", "LabelSetting", "Labels", "Step"]
