"""What was found in processes that a Trainer starts is here afterwards, and a used callback can be copied."""

import copy
import json
import pickle
import tempfile
import warnings

import pytest
import torch

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.callback.findings import Findings, Handover
from tests import spawn_run
from tests.processes import run_processes
from tests.toy import ToyModule, quiet_trainer, toy_loader, validate


@pytest.fixture(scope="module")
def alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return spawn_run.run({})


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_findings_come_back(tmp_path, alone, strategy, monkeypatch):
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    run_processes("tests.spawn_run", strategy, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["fitted"] == 2
    assert [(one["stage"], one["epoch"], one["samples"]) for one in found["history"]] == [
        (one["stage"], one["epoch"], one["samples"]) for one in alone["history"]
    ]
    # What enters the model's own forward is found also while DDP runs steps as its forward.
    assert all("contribution/audio" in one for one in found["history"])
    assert found["summaries"] == alone["summaries"]
    if "failed" in found:
        assert "on purpose" in found["failed"]["error"]
        assert [one["epoch"] for one in found["failed"]["history"]] == [0]
    assert not list(temporary.glob("lightning_xattn-*")), "a file was left behind"


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


def test_nothing_is_left_by_the_process_that_made_the_callback_or_by_a_stranger(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    handover = Handover()
    handover.leave(Findings())
    assert handover.take() is None
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    handover = Handover()
    parent = type("Parent", (), {"pid": handover._made_in})
    monkeypatch.setattr("lightning_xattn.callback.findings.parent_process", lambda: parent)
    with pytest.warns(UserWarning, match="What the callback has found stays in process .*: FileNotFoundError"):
        handover.leave(Findings())
    assert handover.take() is None


def test_the_newest_findings_are_taken_once_and_go_with_the_callback(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(
        "lightning_xattn.callback.findings.parent_process", lambda: type("Parent", (), {"pid": made_in})
    )
    handover = Handover()
    made_in = handover._made_in
    (sent := Handover.__new__(Handover)).__dict__.update(vars(handover))  # as a fork has it
    for epochs in (1, 2):
        sent.leave(Findings(history=[{}] * epochs))
        assert len(handover.take().history) == epochs
        assert handover.take() is None
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o077 == 0, "others may look into it"
    del handover
    assert not folder.exists()
