"""Predictions, targets, sample ids, groups and masks of queries out of a step."""

from lightning_xattn.capture.labels.finder import SEVERAL_LABELS, SO_A_REGRESSION, LabelFinder, Labels
from lightning_xattn.capture.labels.places import LabelSetting, Step

__all__ = ["SEVERAL_LABELS", "SO_A_REGRESSION", "LabelFinder", "LabelSetting", "Labels", "Step"]
