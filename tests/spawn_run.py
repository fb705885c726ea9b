"""Run by test_spawn.py: fits in processes that the Trainer spawns, and writes what is left here."""

import csv
import json
import pickle
import sys
from collections import defaultdict
from pathlib import Path

import torch
from pytorch_lightning.loggers import CSVLogger

from lightning_xattn import AttentionExplainabilityCallback
from tests.toy import ToyModule, quiet_trainer, toy_loader

STRATEGIES = ("ddp_spawn", "ddp_notebook")


def run(settings, folder):
    """What the logger, a checkpoint and the callback in this process have after a fit."""
    torch.manual_seed(0)
    # One that was copied is as good as one that was not.
    callback = pickle.loads(pickle.dumps(AttentionExplainabilityCallback(figures_every_n_epochs=0)))
    logger = CSVLogger(folder, name="", version="log")
    trainer = quiet_trainer(callbacks=[callback], logger=logger, max_epochs=2, enable_checkpointing=True, **settings)
    trainer.fit(ToyModule(), toy_loader(12), toy_loader())
    logged = defaultdict(list)
    with (folder / "log" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name.startswith("xattn_") and value:
                    logged[name].append(float(value))
    (checkpoint,) = (folder / "log" / "checkpoints").iterdir()
    saved = torch.load(checkpoint, weights_only=True)["callbacks"][callback.state_key]
    return {"logged": logged, "saved": saved["history"], "history": callback.history}


if __name__ == "__main__":
    found = {one: run({"strategy": one, "devices": 2}, Path(sys.argv[1]) / one) for one in STRATEGIES}
    (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
