"""Run by test_spawn.py: fits and tests in processes that the Trainer starts, and writes what the callback has here."""

import json
import pickle
import sys
from pathlib import Path

import torch

from lightning_xattn import AttentionExplainabilityCallback
from tests.toy import ToyModule, quiet_trainer, toy_loader


def run(settings):
    """What the callback has found in this process after a fit, and after a test with another Trainer."""
    torch.manual_seed(0)
    # One that was copied is as good as one that was not.
    callback, model = pickle.loads(pickle.dumps(AttentionExplainabilityCallback())), ToyModule()
    quiet_trainer(callbacks=[callback], max_epochs=2, **settings).fit(model, toy_loader(12), toy_loader())
    fitted = len(callback.history)
    quiet_trainer(callbacks=[callback], **settings).test(model, toy_loader(), verbose=False)
    summaries = {scope: repr(one) for scope, one in (callback.summaries | callback.fusion_summaries).items()}
    return {"fitted": fitted, "history": callback.history, "summaries": summaries}


def fail(settings):
    """What is there after a fit that ends in its second epoch."""

    class Failing(ToyModule):
        def on_train_epoch_start(self):
            if self.current_epoch and self.global_rank == 0:  # of which the findings are
                raise ValueError("on purpose")

    callback = AttentionExplainabilityCallback()
    try:
        quiet_trainer(callbacks=[callback], max_epochs=2, **settings).fit(Failing(), toy_loader(12), toy_loader())
    except Exception as error:
        return {"error": str(error), "history": callback.history}
    return {}


if __name__ == "__main__":
    strategy, folder = sys.argv[1], Path(sys.argv[2])
    settings = {"strategy": strategy, "devices": 2}
    results = run(settings)
    if strategy == "ddp_notebook":  # a local class cannot be sent to a spawned process
        results["failed"] = fail(settings)
    (folder / "found.json").write_text(json.dumps(results))
