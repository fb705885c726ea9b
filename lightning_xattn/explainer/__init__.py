"""The offline explainer: one sample, one batch, or a whole loader of a trained model, with the callback's numbers."""

from lightning_xattn.explainer.capture import ExplainabilityCapture
from lightning_xattn.explainer.checkpoint import load_checkpoint
from lightning_xattn.explainer.training import training_data

__all__ = ["ExplainabilityCapture", "load_checkpoint", "training_data"]
