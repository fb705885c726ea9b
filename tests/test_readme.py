"""What the README shows runs as written."""

import re
from pathlib import Path

import pytest
import torch

from lightning_xattn import AttentionRecorder, ExplainabilityCapture, create_explainability_report
from lightning_xattn.explainer import dataset_figures
from tests.toy import ToyModule, toy_data, toy_loader

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
OWN_MODEL, REFERENCE_MODEL, EXPLAIN, OFFLINE = BLOCKS


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a block as a script, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda code: exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


# Warnings that a user would see and act on, as of heads that are uniform still, do not end a block.
@pytest.mark.filterwarnings("default")
@pytest.mark.slow
@pytest.mark.parametrize("block", [OWN_MODEL, REFERENCE_MODEL], ids=["own model", "reference model"])
def test_a_block_that_is_a_script_runs_and_leaves_its_log(block, run, tmp_path):
    run(block)
    assert list(tmp_path.glob("lightning_logs/version_0/events*"))


def test_own_model_is_the_example():
    assert (ROOT / "examples/own_model.py").read_text() == OWN_MODEL


def test_explain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "ExplainabilityCapture": ExplainabilityCapture,
        "create_explainability_report": create_explainability_report,
        "dataset_figures": dataset_figures,
        "model": ToyModule(),
        "batch": toy_data(5)[:],
        "loader": toy_loader(),
    }
    exec(EXPLAIN, names)
    assert names["results"]["attention_dict"]["audio_to_text"].shape == (5, 3, 5, 7)
    assert "| all" in (tmp_path / "explained/report.md").read_text()
    assert {path.name for path in (tmp_path / "explained").glob("*.png")} == {
        *("map_audio_to_text.png", "map_text_to_audio.png", "entropy_by_head.png", "alignment_by_outcome.png"),
        *("map_audio_to_text_by_outcome.png", "map_text_to_audio_by_outcome.png"),
        *("class_comparison.png", "contribution_shares.png"),
    }


def test_offline():
    class Model(ToyModule):
        def forward(self, batch):
            return super().forward(*batch[:2])

    names = {"AttentionRecorder": AttentionRecorder, "model": Model(), "batch": toy_data(2)[:]}
    with torch.no_grad():
        exec(OFFLINE, names)
    assert names["pair"].forward.weights.shape == (2, 3, 5, 7)
