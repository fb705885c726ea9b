"""Attention out of a live model, without changing what it computes."""

from lightning_xattn.capture.joint import JointSequence
from lightning_xattn.capture.layers import locate_attention
from lightning_xattn.capture.recorder import AttentionRecorder
from lightning_xattn.capture.sources import AttentionSetting, Layer, check_attention, is_set_aside

__all__ = [
    "AttentionRecorder",
    "AttentionSetting",
    "JointSequence",
    "Layer",
    "check_attention",
    "is_set_aside",
    "locate_attention",
]
