"""AttentionMode how a multi-modal model's modalities attend to each other.

``AttentionExplainabilityCallback`` goes into a Lightning ``Trainer``; ``ExplainabilityCapture`` explains a trained
model and ``create_explainability_report`` says what it found; ``AttentionRecorder`` records any model.

Examples in docstrings take ``torch``, ``pathlib.Path``, Lightning's ``Trainer`` and the package's public names.
``model`` is one of audio and text, ``batch`` has 5 samples for it, and ``loader`` 23.
"""

from typing import TYPE_CHECKING, Any

from lightning_xattn.callback import callback as _callback
from lightning_xattn.capture import AttentionRecorder, JointSequence
from lightning_xattn.core.attention import Attention, AttentionPair, Direction, TokenAxis
from lightning_xattn.core.errors import XAttnError, XAttnWarning
from lightning_xattn.explainer import ExplainabilityCapture
from lightning_xattn.report import create_explainability_report
from lightning_xattn.report.criteria import interpret_sample

if TYPE_CHECKING:
    from lightning_xattn.callback.callback import AttentionExplainabilityCallback
else:

    def __getattr__(name: str) -> Any:
        # Asked for each time, as lightning.pytorch may be imported meanwhile, whose command line takes it by its name.
        if name == "AttentionExplainabilityCallback":
            return _callback.join_imported_namespaces()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Attention",
    "AttentionExplainabilityCallback",
    "AttentionPair",
    "AttentionRecorder",
    "Direction",
    "ExplainabilityCapture",
    "JointSequence",
    "TokenAxis",
    "XAttnError",
    "XAttnWarning",
    "create_explainability_report",
    "interpret_sample",
]

__version__ = "0.1.0"
