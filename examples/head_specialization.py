"""Print the strongest pair of each head, and draw how focused each head is.

python examples/head_specialization.py CHECKPOINT DATA OUT.png
"""

import sys

from lightning_xattn import ExplainabilityCapture
from lightning_xattn.attention_analysis import head_wise_attention_analysis
from lightning_xattn.explainer import load_checkpoint
from lightning_xattn.hms import HMSDataModule, HMSLightningModule
from lightning_xattn.visualizations import plot_head_contributions

checkpoint, data, picture = sys.argv[1:]
model = load_checkpoint(HMSLightningModule, checkpoint)
datamodule = HMSDataModule(data, test_data=data)
explainer = ExplainabilityCapture(model, axes=datamodule.attention_axes)
results = explainer.explain_batch(next(iter(datamodule.test_dataloader())))


def place(modality, token):
    axis = results["axes"].get(modality)
    return f"{modality} {token if axis is None else axis.place(token)}"


for direction, heads in head_wise_attention_analysis(results["attention_dict"]).items():
    query, _, key = direction.partition("_to_")
    print(direction)
    for head, found in heads.items():
        asks, looked_at, weight = found["top_pairs"][0]
        print(
            f"  head {head}: entropy {found['specialization_score']:.3f} (0: one key, 1: uniform), query selectivity "
            f"{found['query_selectivity']:.3f} (0: the same attention from all queries); most from "
            f"{place(query, asks)} to {place(key, looked_at)}, weight {weight:.3f}"
        )

plot_head_contributions(results["attention"][0], save_path=picture)
