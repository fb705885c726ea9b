"""The offline explainer: one sample, one batch, or a whole loader of a trained model, with the callback's numbers."""

from lightning_xattn.explainer.capture import ExplainabilityCapture
from lightning_xattn.explainer.checkpoint import load_checkpoint
from lightning_xattn.explainer.training import training_data
from lightning_xattn.figures import dataset_figures, save_dataset_figures

__all__ = ["ExplainabilityCapture", "dataset_figures", "load_checkpoint", "save_dataset_figures", "training_data"]
