"""Compare alignment and entropy of correct and incorrect predictions, also within classes.

python examples/correct_vs_incorrect.py CHECKPOINT DATA
"""

import math
import sys

from lightning_xattn import ExplainabilityCapture
from lightning_xattn.evaluation.statistics import ALIGNMENT, ENTROPY
from lightning_xattn.explainer import load_checkpoint
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.hms import HMSDataModule, HMSLightningModule

checkpoint, data = sys.argv[1:]
explainer = ExplainabilityCapture(load_checkpoint(HMSLightningModule, checkpoint))
summary = explainer.explain_loader(HMSDataModule(data, test_data=data).test_dataloader()).headline

for score in (ALIGNMENT, ENTROPY):
    print(score)
    for name, outcome in (("correct", CORRECT), ("incorrect", INCORRECT)):
        low, high = summary.interval(score, outcome=outcome)
        n, mean = summary.count(score, outcome=outcome), summary.mean(score, outcome=outcome)
        interval = "too few for an interval" if math.isnan(low) else f"95 % CI {low:.3f} to {high:.3f}"
        patients = summary.groups(score, outcome=outcome)
        print(f"  {name}: mean {mean:.3f} ({interval}, n = {n} of {patients} {summary.group_noun})")
    # Classes differ in accuracy and in attention, which alone makes a gap; the gap within classes leaves that out.
    found = summary.compare(score)
    print(f"  gap {found.gap:+.3f}, within classes {found.class_adjusted_gap:+.3f}")
    if math.isnan(found.auroc):
        groups = f"{found.correct_groups} and {found.incorrect_groups} {summary.group_noun}"
        print(f"  {found.correct} correct and {found.incorrect} incorrect, of {groups}, are too few for an AUROC")
    else:
        auroc = f"{found.auroc:.2f} (95 % CI {found.low:.2f} to {found.high:.2f}; 0.5 is chance)"
        print(f"  AUROC of {found.error_side} {score} for errors {auroc}")
