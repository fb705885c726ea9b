"""Run by test_distributed.py: validates and fits on several processes and writes what each of them saw."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.evaluation.statistics import ALIGNMENT, ENTROPY
from lightning_xattn.functional.outcomes import INCORRECT
from tests.toy import ToyModule, quiet_trainer, toy_data

SAMPLES, MANY = 22, 140


def make_data(scenario, ranks):
    """22 samples, which DistributedSampler deals out in turn, so uneven for two ranks' batches and for three ranks.

    Of many samples the attention is tested, too.
    """
    audio, text, target = toy_data(MANY if scenario == "many" else SAMPLES).tensors
    last = torch.arange(len(target)) % ranks == ranks - 1
    if scenario == "odd":
        audio, text, target = audio[:-1], text[:-1], target[:-1]
    elif scenario == "class missing on a rank":
        target[last & (target == 0)] = 1
    elif scenario == "nothing valid on a rank":
        audio[last] = torch.nan
    return TensorDataset(audio, text, target, torch.arange(len(target)) + 100)


SCENARIOS = {2: ("odd", "many"), 3: ("even", "odd", "class missing on a rank", "nothing valid on a rank")}
"""By the number of ranks."""


class Identified(ToyModule):
    """Batches carry sample ids behind the target."""

    def _loss(self, batch):
        return super()._loss(batch[:3])


def watch(**settings):
    return AttentionExplainabilityCallback(
        targets=lambda outputs, batch: batch[2],
        sample_ids=lambda outputs, batch: batch[3],
        groups=lambda outputs, batch: batch[3] // 3,  # whose samples are dealt to several processes
        **settings,
    )


def count_collectives(counts):
    """Count the calls of every collective that a callback could make."""

    def counted(name, collective):
        def call(*args, **kwargs):
            counts.append(name)
            return collective(*args, **kwargs)

        return call

    for name in ("all_gather_object", "all_gather", "all_reduce", "broadcast", "gather", "reduce"):
        setattr(dist, name, counted(name, getattr(dist, name)))


def validate(scenario, ranks, settings, folder):
    torch.manual_seed(0)
    callback = watch(table=folder / "table" / scenario)
    counts = []
    finish = AttentionExplainabilityCallback._end_evaluation

    def end_evaluation(self, *args, **settings):
        counts.clear()
        finish(self, *args, **settings)
        seen.extend(counts)

    seen = []
    AttentionExplainabilityCallback._end_evaluation = end_evaluation
    originals = {name: getattr(dist, name) for name in dir(dist)}
    count_collectives(counts)
    trainer = quiet_trainer(callbacks=[callback], **settings)
    trainer.validate(Identified(), DataLoader(make_data(scenario, ranks), batch_size=4), verbose=False)
    for name, value in originals.items():
        setattr(dist, name, value)
    AttentionExplainabilityCallback._end_evaluation = finish
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    summary = callback.summaries["val"]
    by_group = [summary.groups(), *summary.interval(ALIGNMENT), *summary.interval(ENTROPY, outcome=INCORRECT)]
    return {"logged": logged, "history": callback.history, "collectives": seen, "by_group": by_group}


def fit(settings, folder):
    torch.manual_seed(0)
    best = ModelCheckpoint(folder / "checkpoints", monitor="xattn_alignment/val/all", mode="max")
    callbacks = [watch(), best, EarlyStopping("xattn_alignment/val/all", patience=9, mode="max", check_finite=False)]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=2, enable_checkpointing=True, **settings)
    data = make_data("odd", 2)
    trainer.fit(Identified(), DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))
    return {"best": float(best.best_model_score), "epochs": [record["epoch"] for record in callbacks[0].history]}


def run(ranks, folder):
    settings = {"strategy": "ddp", "devices": ranks}
    results = {scenario: validate(scenario, ranks, settings, folder) for scenario in SCENARIOS[ranks]}
    return results | {"fit": fit(settings, folder)}


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    results = run(int(sys.argv[1]), folder)
    rank = dist.get_rank() if dist.is_initialized() else 0
    (folder / f"rank_{rank}.json").write_text(json.dumps(results))
