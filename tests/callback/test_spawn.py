"""Processes that a Trainer spawns: the loggers have what was found there. A used callback can be copied."""

import copy
import json
import pickle

import pytest
import torch

from lightning_xattn import AttentionExplainabilityCallback
from tests import spawn_run
from tests.processes import run_processes
from tests.toy import ToyModule, quiet_trainer, toy_loader, validate


@pytest.mark.slow
def test_the_loggers_and_checkpoints_have_what_spawned_processes_found(tmp_path, infos):
    printed = run_processes("tests.spawn_run", tmp_path)
    by_strategy = json.loads((tmp_path / "found.json").read_text())
    expected = spawn_run.run({}, tmp_path / "alone")
    assert [(record["epoch"], record["samples"]) for record in expected["saved"]] == [(0, 23), (1, 23)]
    for strategy in spawn_run.STRATEGIES:
        found = by_strategy[strategy]
        # Their weights differ, as two processes average their gradients.
        assert {name: len(values) for name, values in found["logged"].items()} == {
            name: len(values) for name, values in expected["logged"].items()
        }
        # What enters the model's own forward is found also while DDP runs steps as its forward.
        assert "xattn_contribution/val/share/audio" in found["logged"]
        assert [(record["epoch"], record["samples"]) for record in found["saved"]] == [(0, 23), (1, 23)]
        assert (found["history"], len(expected["history"])) == ([], 2)
    assert printed.count("history and summaries stay empty") == 2
    assert "stay empty" not in infos.text


def test_a_used_callback_can_be_copied_without_its_model():
    callback = AttentionExplainabilityCallback()
    model = ToyModule()
    model.unpicklable = lambda: None
    validate(model, callback)
    callback.extra = "a subclass's own"
    for other in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert repr(other.history) == repr(callback.history)  # NaN and all
        assert torch.equal(other.summaries["val"].moments, callback.summaries["val"].moments)
        assert other.state_key == callback.state_key
        assert other.extra == "a subclass's own"
        # It goes on by itself.
        trainer = quiet_trainer(callbacks=[other])
        trainer.validate(ToyModule(), toy_loader(), verbose=False)
        assert (len(other.history), len(callback.history)) == (2, 1)


class InTheMiddle(ToyModule):
    """Has the callback copied in a step."""

    def validation_step(self, batch, batch_idx):
        self.copies.append(pickle.dumps(self.watch))
        return super().validation_step(batch, batch_idx)


def test_a_callback_can_be_copied_while_it_records():
    callback, model = AttentionExplainabilityCallback(), InTheMiddle()
    model.watch, model.copies = callback, []
    expected = validate(ToyModule(), AttentionExplainabilityCallback())
    torch.manual_seed(0)
    assert validate(model, callback).keys() == expected.keys()
    (other,) = {pickle.loads(one).__repr__() for one in model.copies}
    assert "nothing" in other
