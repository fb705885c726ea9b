"""Draw the mean attention of the samples that a model predicts as one class.

python examples/class_patterns.py CHECKPOINT DATA CLASS OUT.png
"""

import math
import sys

from lightning_xattn import ExplainabilityCapture
from lightning_xattn.core.attention import Direction
from lightning_xattn.evaluation.statistics import Column
from lightning_xattn.explainer import load_checkpoint
from lightning_xattn.hms import CLASSES, HMSDataModule, HMSLightningModule
from lightning_xattn.visualizations import plot_attention_heatmap

checkpoint, data, name, picture = sys.argv[1:]
if name not in CLASSES:
    sys.exit(f"No class {name}: expected one of {', '.join(CLASSES)}.")
datamodule = HMSDataModule(data, test_data=data)
model = load_checkpoint(HMSLightningModule, checkpoint)
axes = datamodule.attention_axes
explainer = ExplainabilityCapture(model, axes=axes, classes_by="prediction")
explained = explainer.explain_loader(datamodule.test_dataloader())
summary, which = explained.headline, CLASSES.index(name)

n = summary.size(which)
print(f"{n} samples of {summary.groups(class_id=which)} patients are predicted as {name}")
for column in map(Column.parse, ("alignment", "eeg_to_spec/entropy", "spec_to_eeg/entropy")):
    low, high = summary.interval(column, which)
    interval = "too few for an interval" if math.isnan(low) else f"95 % CI {low:.3f} to {high:.3f}"
    print(f"  {column}: {summary.mean(column, which):.3f} ({interval})")
if n:
    direction = Direction("eeg", "spec")
    plot_attention_heatmap(
        summary.maps[direction][which],
        title=f"Mean attention of {n} samples predicted as {name}",
        direction=str(direction),
        query_axis=explained.axes.get("eeg"),
        key_axis=explained.axes.get("spec"),
        save_path=picture,
    )
