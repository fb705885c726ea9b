"""Reports of explained batches and data sets: sentences and tables as Markdown or a page, numbers as JSON."""

from lightning_xattn.report.create import create_explainability_report, print_report
from lightning_xattn.report.figures import dataset_figures, save_dataset_figures

__all__ = ["create_explainability_report", "dataset_figures", "print_report", "save_dataset_figures"]
