"""What it costs to see it: what a fit draws in an epoch and at its end, memory over epochs, a report of 2,000 samples.

As a script, print the peak memory after drawing ``EPOCHS`` epochs: ``python -m benchmarks.figures FOLDER EPOCHS``.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.timing import median_seconds
from benchmarks.validate import BATCH, balanced, one_batch
from lightning_xattn import ExplainabilityCapture, create_explainability_report
from lightning_xattn.callback.pictures import Drawn
from lightning_xattn.evaluation.curves import epoch_curves, epoch_record, fusion_curves, fusion_record
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.hms import HMSLightningModule
from lightning_xattn.loggers import Picture
from lightning_xattn.report.figures import dataset_figures
from lightning_xattn.visualizations import render

EPOCHS = 10  # over which the overview goes


def explained(folder: Path, table: Path, samples: int) -> DatasetResult:
    """Explain ``samples`` samples of the reference model: 6 classes, 8 heads, 9 x 119 windows."""
    batch: Any = one_batch(folder)
    explainer = ExplainabilityCapture(balanced(HMSLightningModule(), batch))
    loader = [batch] * (samples // BATCH)
    return explainer.explain_loader(loader, table=table, progress=False)


def history_of(result: DatasetResult) -> list[dict[str, Any]]:
    """The history of ``EPOCHS`` epochs, for the overview."""
    names, summary, fusion = result.class_names, result.headline, result.fusion
    assert fusion is not None
    known = epoch_record(summary, "val", epoch_curves(summary, "val", names))
    known |= fusion_record(fusion, "val", fusion_curves(fusion, "val", names, has_attention=True))
    return [{"stage": "val", "epoch": i, "step": i, **known} for i in range(EPOCHS)]


def drawn(result: DatasetResult, history: list[dict[str, Any]]) -> Drawn:
    """All that a logger gets of an epoch, or of the end of a fit."""
    (layer,) = result.summaries
    history = [{**one, "layer": layer} for one in history]
    return Drawn(result, result, history, "val", {layer: "val"}, "val, epoch 9")


def encode(figures: Iterator[tuple[str, Figure]]) -> None:
    """Draw figures as a logger gets them."""
    for _, figure in figures:
        assert Picture(render(figure)).png


def peak_memory_of_drawing(folder: Path, epochs: int) -> int:
    """MiB, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.figures", str(folder), str(epochs)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def figures_and_report(folder: Path) -> None:
    """Of the reference model: 6 classes, 8 heads, 9 x 119 windows."""
    with tempfile.TemporaryDirectory() as temporary:
        result = explained(folder, Path(temporary) / "table", 2016)
        history = history_of(result)

        whole = drawn(result, history)

        def figures_of_an_epoch() -> None:
            encode(whole.main_figures())

        def end_of_a_fit() -> None:
            encode(whole.other_figures())
            create_explainability_report(result, format="markdown")

        def figures_of_a_data_set() -> None:
            for _, figure in dataset_figures(result):
                render(figure)

        def report() -> None:
            create_explainability_report(result, Path(temporary) / "report.html")

        (of_an_epoch,) = median_seconds(figures_of_an_epoch, repeats=15)
        at_the_end, of_a_data_set, writing = median_seconds(end_of_a_fit, figures_of_a_data_set, report, repeats=3)
    few, many = (peak_memory_of_drawing(folder, epochs) for epochs in (20, 200))
    print(f"two figures of an epoch, as PNG     {of_an_epoch:6.2f} s   (aim: at most 0.25)")
    print(f"the end of a fit: figures, report   {at_the_end:6.2f} s   (aim: at most 2)")
    print(f"all figures of a data set           {of_a_data_set:6.2f} s")
    print(f"peak memory of 20, 200 epochs' figures  {few}, {many} MiB   (aim: no growth)")
    print(f"report.html of 2,016 samples        {writing:6.2f} s   (aim: at most 20)")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as of_tables:
        of_few = explained(Path(sys.argv[1]), Path(of_tables) / "table", 10 * BATCH)
    so_far = history_of(of_few)
    for _ in range(int(sys.argv[2])):
        encode(drawn(of_few, so_far).main_figures())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
