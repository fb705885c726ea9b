"""The offline explainer: one sample, one batch, or a whole loader of a trained model, with the callback's numbers."""

from lightning_xattn.explainer.capture import ExplainabilityCapture
from lightning_xattn.figures import dataset_figures

__all__ = ["ExplainabilityCapture", "dataset_figures"]
