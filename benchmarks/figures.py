"""What it costs to see it: an epoch's figures, and a report of 2,000 samples."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import median_seconds
from benchmarks.validate import BATCH, balanced, one_batch
from lightning_xattn import ExplainabilityCapture, create_explainability_report
from lightning_xattn.figures import dataset_figures
from lightning_xattn.hms import HMSLightningModule
from lightning_xattn.visualizations import render


def figures_and_report(folder: Path) -> None:
    """Of the reference model: 6 classes, 8 heads, 9 x 119 windows."""
    batch: Any = one_batch(folder)
    explainer = ExplainabilityCapture(balanced(HMSLightningModule(), batch))
    with tempfile.TemporaryDirectory() as temporary:
        explained = explainer.explain_loader([batch] * (2016 // BATCH), table=Path(temporary) / "table", progress=False)

        def figures() -> None:
            for _, figure in dataset_figures(explained):
                render(figure)

        def report() -> None:
            create_explainability_report(explained, Path(temporary) / "report.html")

        (drawing,) = median_seconds(figures, repeats=3)
        (writing,) = median_seconds(report, repeats=3)
    print(f"all figures of a data set           {drawing:6.2f} s   (aim: at most 2)")
    print(f"report.html of 2,016 samples        {writing:6.2f} s   (aim: at most 20)")
