"""Explain multi-modal models: what each modality predicts and contributes, and how they attend to each other.

``AttentionExplainabilityCallback`` goes into a Lightning ``Trainer``; ``ExplainabilityCapture`` explains a trained
model and ``create_explainability_report`` reports what it found; ``explain_features`` needs only arrays of features and
predictions; ``AttentionRecorder`` records any model.

Examples in docstrings take ``torch``, ``pathlib.Path``, Lightning's ``Trainer`` and the package's public names.
``model`` is one of audio and text, ``batch`` has 5 samples for it, ``loader`` 23, and ``labelled_loader`` 120.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_xattn.callback.callback import AttentionExplainabilityCallback
    from lightning_xattn.capture import AttentionRecorder, JointSequence
    from lightning_xattn.core.attention import Attention, AttentionPair, Direction, TokenAxis
    from lightning_xattn.core.errors import XAttnError, XAttnWarning
    from lightning_xattn.evaluation.arrays import explain_features
    from lightning_xattn.explainer import ExplainabilityCapture
    from lightning_xattn.report import create_explainability_report
    from lightning_xattn.report.criteria import interpret_sample

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
    "explain_features",
    "interpret_sample",
]

__version__ = "0.1.0"

_PUBLIC = {
    "callback.callback": ["AttentionExplainabilityCallback"],
    "capture": ["AttentionRecorder", "JointSequence"],
    "core.attention": ["Attention", "AttentionPair", "Direction", "TokenAxis"],
    "core.errors": ["XAttnError", "XAttnWarning"],
    "evaluation.arrays": ["explain_features"],
    "explainer": ["ExplainabilityCapture"],
    "report": ["create_explainability_report"],
    "report.criteria": ["interpret_sample"],
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch and Lightning take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{next(place for place, names in _PUBLIC.items() if name in names)}")
    if name == "AttentionExplainabilityCallback":
        # Each time, as lightning.pytorch may be imported meanwhile, whose command line finds the callback by this name.
        module.join_namespaces()
    return getattr(module, name)
