"""Explain a trained checkpoint on a folder of recordings: report, figures and table.

python examples/example_analysis.py CHECKPOINT DATA OUT
"""

import sys
from pathlib import Path

from lightning_xattn import ExplainabilityCapture, create_explainability_report
from lightning_xattn.explainer import load_checkpoint
from lightning_xattn.hms import HMSDataModule, HMSLightningModule
from lightning_xattn.report import dataset_figures
from lightning_xattn.visualizations import plot_cross_modal_attention, plot_modality_alignment

checkpoint, data, out = (Path(argument) for argument in sys.argv[1:])

model = load_checkpoint(HMSLightningModule, checkpoint)
datamodule = HMSDataModule(data, test_data=data, cache_dir=out / "features")
loader = datamodule.test_dataloader()

# The data module has the times of the windows, so pairs and figures have places.
explainer = ExplainabilityCapture(model, axes=datamodule.attention_axes)

# The whole data set: one row per recording in the table, classes and outcomes in the report.
explained = explainer.explain_loader(loader, table=out / "table")
print(create_explainability_report(explained, out / "report.md"))
(out / "figures").mkdir(exist_ok=True)
for name, figure in dataset_figures(explained):
    figure.savefig(out / "figures" / f"{name}.png")

# One batch, sample by sample.
results = explainer.explain_batch(next(iter(loader)))
create_explainability_report(results, out / "samples.md")
pair = results["attention"][0]
plot_cross_modal_attention(pair, sample_idx=0, axes=results["axes"], save_path=out / "figures/sample_0.pdf")
plot_modality_alignment(pair, sample_idx=0, axes=results["axes"], save_path=out / "figures/sample_0_alignment.png")
