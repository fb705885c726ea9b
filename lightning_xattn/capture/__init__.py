"""Attention, predictions and targets out of a live model, without changing what it computes."""

from lightning_xattn.capture.discovery import LayerSites, locate_attention
from lightning_xattn.capture.labels import LabelFinder, Labels
from lightning_xattn.capture.recorder import AttentionRecorder

__all__ = ["AttentionRecorder", "LabelFinder", "Labels", "LayerSites", "locate_attention"]
