"""The offline explainer: one sample, one batch, or a whole loader of a trained model, with the callback's numbers."""

from lightning_xattn.explainer.checkpoint import load_checkpoint, training_data
from lightning_xattn.explainer.explainability_capture import ExplainabilityCapture

__all__ = ["ExplainabilityCapture", "load_checkpoint", "training_data"]
