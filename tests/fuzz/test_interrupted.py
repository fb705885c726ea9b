"""A run that fails at any point leaves complete files or none, and the next one ends as if nothing had happened."""

import functools
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture, create_explainability_report
from lightning_xattn.callback.epoch_log import main_history
from lightning_xattn.evaluation import table as table_module
from tests.explainer.test_explain_loader import assert_same_summary
from tests.fuzz.examples import fuzz
from tests.fuzz.mishaps import at_line, interrupt, run_into
from tests.toy import NAMES, ToyModule, quiet_trainer, run_toy, toy_loader

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
EPOCHS, SAMPLES = 3, 23


def explain(folder):
    """A data set of five batches; rows are written as they come."""
    table_module.ROWS_IN_MEMORY = 6
    torch.manual_seed(0)
    explainer = ExplainabilityCapture(ToyModule(), predict=run_toy, class_names=NAMES, contribution_samples=8)
    return explainer.explain_loader(toy_loader(SAMPLES), folder, progress=False)


def train(folder):
    """Three epochs, from the last checkpoint on if there is one; rows are written as they come."""
    table_module.ROWS_IN_MEMORY = 6
    torch.manual_seed(0)
    settings = {"contribution_samples": 8, "figures_every_n_epochs": 0, "curves": "all"}
    callback = AttentionExplainabilityCallback(table=folder / "table", **settings)
    keep = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    trainer = quiet_trainer(callbacks=[callback, keep], max_epochs=EPOCHS, enable_checkpointing=True)
    last = folder / "last.ckpt"
    trainer.fit(ToyModule(), toy_loader(), toy_loader(seed=1), ckpt_path=last if last.exists() else None)
    return callback.history


@pytest.fixture(autouse=True)
def _put_back(monkeypatch):
    monkeypatch.setattr(table_module, "ROWS_IN_MEMORY", table_module.ROWS_IN_MEMORY)


@functools.cache
def undisturbed(function):
    """What it gives, its folder, and how many lines it runs."""
    folder = tempfile.TemporaryDirectory()
    with at_line(0, interrupt) as ran:
        return function(Path(folder.name)), folder, len(ran)


def mishaps(*kinds):
    """Some in a row, each at a share of the lines, or of the size of the largest file."""
    return st.lists(st.tuples(st.sampled_from(kinds), st.floats(0, 1)), min_size=1, max_size=4)


def rows_of(folder):
    rows = pd.read_parquet(folder / "attention")
    return rows.sort_values("sample_idx", ignore_index=True)[sorted(rows.columns)]


def report_of(result):
    return create_explainability_report(result, format="json").replace(str(result.table), "")


@fuzz(mishaps("killed", "interrupted", "full"), some=None, many=12)
def test_the_table_of_a_data_set_is_complete_or_absent(chain):
    expected, whole, lines = undisturbed(explain)
    largest = max(path.stat().st_size for path in Path(whole.name).iterdir())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "explained"
        for mishap, share in chain:
            run_into(mishap, round(share * (largest if mishap == "full" else lines)), explain, folder)
            if list(folder.glob("attention/*.parquet")):
                assert set(pd.read_parquet(folder / "attention")["sample_idx"]) == set(range(SAMPLES))
            hidden = [path for path in folder.glob("*") if path.name.startswith(".")]
            assert mishap == "killed" or not hidden
        result = explain(folder)
        assert_same_summary(result.headline, expected.headline, rtol=0, atol=0)
        assert report_of(result) == report_of(expected)
        pd.testing.assert_frame_equal(rows_of(folder), rows_of(Path(whole.name)), check_exact=True)
        assert all(path.match("explained-*.parquet") for path in folder.glob("*/*"))


@fuzz(mishaps("killed"), some=None, many=6)
def test_a_training_run_goes_on_from_its_last_checkpoint(chain):
    expected, whole, lines = undisturbed(train)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for mishap, share in chain:
            run_into(mishap, round(share * lines), train, folder)
            if list((folder / "table/attention").glob("*.parquet")):
                pd.read_parquet(folder / "table/attention")
        history = train(folder)
        assert [record["epoch"] for record in history] == list(range(EPOCHS))
        # A checkpoint keeps the main curves alone.
        for record, complete, main in zip(history, expected, main_history(expected), strict=True):
            assert set(main) <= set(record) <= set(complete)
            for name, value in record.items():
                same = (
                    pytest.approx(complete[name], rel=1e-6, nan_ok=True) if isinstance(value, float) else complete[name]
                )
                assert value == same, name
        rows, theirs = (pd.read_parquet(Path(one) / "table/attention") for one in (folder, whole.name))
        latest = rows[rows["run"] == rows.groupby(["stage", "epoch"])["run"].transform("max")]
        order = ["epoch", "sample_idx"]
        latest, theirs = (one.sort_values(order, ignore_index=True).drop(columns="run") for one in (latest, theirs))
        pd.testing.assert_frame_equal(latest, theirs, check_exact=True)
        assert not [path for path in (folder / "table").glob("*/*") if path.suffix != ".parquet"]
