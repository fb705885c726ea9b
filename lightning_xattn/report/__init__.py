"""Reports of explained samples and data sets: results to facts (JSON), facts to words, words to text or Markdown."""

import lightning_xattn.report.in_notebook  # noqa: F401  # tells notebooks how to show results
from lightning_xattn.report.create import create_explainability_report, print_report
from lightning_xattn.report.figures import dataset_figures, save_dataset_figures

__all__ = ["create_explainability_report", "dataset_figures", "print_report", "save_dataset_figures"]
