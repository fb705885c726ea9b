"""Attention, predictions and targets out of a live model, without changing what it computes."""

from lightning_xattn.capture.discovery import locate_attention
from lightning_xattn.capture.labels import LabelFinder, Labels
from lightning_xattn.capture.recorder import AttentionRecorder
from lightning_xattn.capture.sites import AttentionSetting, JointSequence, LayerSites, check_attention

__all__ = [
    "AttentionRecorder",
    "AttentionSetting",
    "JointSequence",
    "LabelFinder",
    "Labels",
    "LayerSites",
    "check_attention",
    "locate_attention",
]
