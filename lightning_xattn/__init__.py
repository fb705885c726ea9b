"""Watch how a multi-modal model's modalities attend to each other.

``AttentionExplainabilityCallback`` goes into a Lightning ``Trainer``, ``ExplainabilityCapture`` explains a trained
model, ``AttentionRecorder`` records any model.
"""

from lightning_xattn.attention import Attention, AttentionPair, Direction, TokenAxis
from lightning_xattn.callback import AttentionExplainabilityCallback
from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.errors import XAttnError, XAttnWarning
from lightning_xattn.explainer import ExplainabilityCapture

__all__ = [
    "Attention",
    "AttentionExplainabilityCallback",
    "AttentionPair",
    "AttentionRecorder",
    "Direction",
    "ExplainabilityCapture",
    "TokenAxis",
    "XAttnError",
    "XAttnWarning",
]

__version__ = "0.1.0"
