"""The sample table: complete or absent, readable by everybody."""

import os
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback, XAttnWarning
from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import SettingError
from lightning_xattn.evaluation import table as table_module
from lightning_xattn.evaluation.statistics import sample_statistics
from lightning_xattn.evaluation.table import SampleTable
from lightning_xattn.functional import prepare_layer
from tests.messages import tells
from tests.toy import ToyModule, quiet_trainer, toy_data, toy_loader


def run(module, folder, loader=None, epochs=None, **settings):
    callback = AttentionExplainabilityCallback(table=folder, **settings)
    trainer = quiet_trainer(callbacks=[callback], max_epochs=epochs or 1)
    if epochs:
        trainer.fit(module, toy_loader(), loader or toy_loader())
    else:
        trainer.validate(module, loader or toy_loader(), verbose=False)
    return callback


def test_rows_are_the_samples(tmp_path):
    torch.manual_seed(0)
    module = ToyModule()
    run(module, tmp_path)
    frame = pd.read_parquet(tmp_path / "attention")
    audio, text, target = toy_data()[:]
    with torch.no_grad(), AttentionRecorder(module.eval()) as recorder:
        logits = module(audio, text)
    statistics = sample_statistics(prepare_layer(*recorder.attention[0].directions))
    for column, values in statistics.items():
        name = f"{column.direction}_{column.statistic}" if column.direction else column.statistic
        written = frame[name] if column.head is None else np.stack(frame[f"{name}_heads"])[:, column.head]
        np.testing.assert_allclose(written, values, rtol=1e-4, atol=1e-6, err_msg=str(column))
    assert frame["target"].tolist() == target.tolist()
    assert frame["prediction"].tolist() == logits.argmax(1).tolist()
    np.testing.assert_allclose(frame["confidence"], logits.softmax(1).amax(1), rtol=1e-5)
    assert frame["correct"].tolist() == (logits.argmax(1) == target).tolist()
    assert not frame["undefined"].any()
    assert not frame["tied"].any()
    assert frame["sample_id"].isna().all()
    constants = frame[["stage", "epoch", "step", "dataloader", "process", "layer"]].drop_duplicates()
    assert constants.values.tolist() == [["val", 0, 0, 0, 0, "audio_to_text"]]


def test_a_data_set_for_pandas_polars_and_duckdb_over_epochs_and_runs(tmp_path):
    for _ in range(2):  # the second run adds to the folder
        run(ToyModule(), tmp_path, epochs=2)
    frames = [
        pd.read_parquet(tmp_path / "attention"),
        pl.read_parquet(tmp_path / "attention/*.parquet").to_pandas(),
        duckdb.sql(f"select * from read_parquet('{tmp_path}/attention/*.parquet')").df(),
    ]
    for frame in frames:
        assert frame.groupby("epoch").size().tolist() == [46, 46]
        assert frame["alignment"].mean() == pytest.approx(frames[0]["alignment"].mean(), rel=1e-5)
        # As the documentation reads what the last run says of each epoch.
        latest = frame[frame["run"] == frame.groupby(["stage", "epoch"])["run"].transform("max")]
        assert latest.groupby("epoch").size().tolist() == [23, 23]
        assert latest["run"].nunique() == 1
        both = frame.merge(pd.read_parquet(tmp_path / "samples"), validate="one_to_one")  # on all that both have
        assert len(both) == len(frame)
        assert both["support"].isna().all()  # of 23 samples there are no probes
    for kind in ("attention", "samples"):
        paths = list((tmp_path / kind).iterdir())
        assert len(paths) == 4
        assert all("-rank=0-of-1-" in path.name for path in paths)


def test_undefined_numbers_are_missing_and_flagged(tmp_path):
    audio, text, target = toy_data().tensors
    audio[3] = torch.nan
    with pytest.warns(UserWarning, match=tells("not finite")):
        run(ToyModule(), tmp_path, DataLoader(TensorDataset(audio, text, target), batch_size=5))
    rows = duckdb.sql(
        f"select avg(alignment), count(alignment), sum(undefined::int) from '{tmp_path}/attention/*.parquet'"
    )
    ((mean, defined, undefined),) = rows.fetchall()
    assert np.isfinite(mean)
    assert (defined, undefined) == (22, 1)


@pytest.mark.parametrize("ids", [torch.arange(23) + 7, [f"patient {i}" for i in range(23)]], ids=["numbers", "names"])
def test_sample_ids(ids, tmp_path):
    class Named(ToyModule):
        def _loss(self, batch):
            return super()._loss((batch["audio"], batch["text"], batch["target"]))

    audio, text, target = toy_data().tensors
    rows = [
        {"audio": a, "text": t, "target": y, "file": i} for a, t, y, i in zip(audio, text, target, ids, strict=True)
    ]
    run(Named(), tmp_path, DataLoader(rows, batch_size=5), sample_ids="file")
    assert pd.read_parquet(tmp_path / "attention")["sample_id"].tolist() == [
        str(i.item() if torch.is_tensor(i) else i) for i in ids
    ]


class Crash(ToyModule):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 3:
            raise RuntimeError("crash")
        return super().validation_step(batch, batch_idx)


def test_after_a_crash_there_is_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(table_module, "ROWS_IN_MEMORY", 1)  # so that rows had been written
    with pytest.raises(RuntimeError, match="crash"):
        run(Crash(), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_killed_process_leaves_a_part_that_readers_pass_over(tmp_path, monkeypatch):
    run(ToyModule(), tmp_path)
    monkeypatch.setattr(table_module, "ROWS_IN_MEMORY", 1)
    killed = SampleTable(tmp_path, "val", {"stage": "val"})
    killed.add({"alignment": torch.zeros(9), "layer": "a"})
    hidden = [path for path in (tmp_path / "attention").iterdir() if path.name.startswith(".")]
    assert len(hidden) == 1
    assert len(pd.read_parquet(tmp_path / "attention")) == 23
    assert len(pl.read_parquet(tmp_path / "attention/*.parquet")) == 23
    assert duckdb.sql(f"select count(*) from '{tmp_path}/attention/*.parquet'").fetchall() == [(23,)]
    # This process lives and may write on; of one that has ended the next run removes the part.
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = hidden[0].with_name(hidden[0].name.replace(f".{os.getpid()}.", f".{ended.pid}."))
    dead.write_bytes(b"half")
    run(ToyModule(), tmp_path)
    assert hidden[0].exists()
    assert not dead.exists()


def test_a_disk_that_is_full_from_the_start_leaves_no_empty_part(tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, schema):
            Path(path).touch()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(table_module.pq, "ParquetWriter", Full)
    with pytest.warns(XAttnWarning, match="lacks this evaluation: .*No space left"):
        run(ToyModule(), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_files_of_one_evaluation_appear_together_or_not_at_all(tmp_path, monkeypatch):
    table = SampleTable(tmp_path, "run", {"epoch": 0})
    for name in ("first", "second"):
        table.add({name: torch.rand(3), "layer": name})
    table._write_waiting()
    _, (last, _) = table._writers.values()
    with monkeypatch.context() as patch:
        patch.setattr(last, "close", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            table.close([{"support": torch.rand(3)}])
        assert not list(tmp_path.rglob("*.parquet"))
    table.discard()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_table_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(XAttnWarning, match="sample table in .*file lacks this evaluation: .*Exists|Not a directory"):
        callback = run(ToyModule(), tmp_path / "file")
    assert callback.summaries["val"].samples == 23


def test_ids_of_any_type_in_one_run_and_from_run_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(table_module, "ROWS_IN_MEMORY", 1)
    letters = ["a", "b", None, "d", "e"]
    ids = iter([torch.arange(5), letters, [1.5] * 5, list(torch.arange(5)), [None] * 3])
    run(ToyModule(), tmp_path, sample_ids=lambda outputs, batch: next(ids))
    run(ToyModule(), tmp_path)  # without any
    frame = pl.read_parquet(tmp_path / "attention/*.parquet")
    assert frame["sample_id"].drop_nulls().sort().to_list() == sorted(
        [*map(str, range(5)), "a", "b", "d", "e", *["1.5"] * 5, *map(str, range(5))]
    )
    assert len(pd.read_parquet(tmp_path / "attention")) == len(frame) == 46


def test_samples_without_a_label_are_neither_correct_nor_incorrect(tmp_path):
    audio, text, target = toy_data().tensors
    target[12:] = -1

    class Partly(ToyModule):
        def _loss(self, batch):
            return super()._loss((*batch[:2], batch[2].clamp_min(0)))

    with pytest.warns(XAttnWarning, match="11 of 23 samples have no class"):
        run(Partly(), tmp_path, DataLoader(TensorDataset(audio, text, target), batch_size=5))
    frame = pd.read_parquet(tmp_path / "attention")
    assert frame["correct"].isna().tolist() == frame["target"].isna().tolist() == [False] * 12 + [True] * 11


def test_layers_of_different_sizes(tmp_path):
    class TwoLayers(ToyModule):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Module()
            for name in ("audio_to_text_attn", "text_to_audio_attn"):
                attention = torch.nn.MultiheadAttention(12, 2, batch_first=True)
                torch.nn.init.normal_(attention.in_proj_weight, std=0.6)
                self.first.add_module(name, attention)

        def forward(self, audio, text):
            a, t = self.audio(audio), self.text(text)
            self.first.audio_to_text_attn(a, t, t)
            self.first.text_to_audio_attn(t, a, a)
            return super().forward(audio, text)

    run(TwoLayers(), tmp_path)
    frame = pd.read_parquet(tmp_path / "attention")
    assert frame.groupby("layer").size().tolist() == [23, 23]
    lengths = frame.groupby("layer")["audio_to_text_entropy_heads"].first().map(len)
    assert lengths.to_dict() == {"audio_to_text": 3, "first": 2}
    paths = list((tmp_path / "attention").iterdir())
    assert [pq.ParquetFile(path).num_row_groups for path in paths] == [1, 1]


def test_few_rows_are_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(table_module, "ROWS_IN_MEMORY", 10)
    table = SampleTable(tmp_path, "val", {"stage": "val"})
    most = 0
    for _ in range(20):
        table.add({"alignment": torch.zeros(4), "target": None, "layer": "a"})
        most = max(most, sum(len(batch["alignment"]) for batch in table._waiting))
    table.close()
    assert most < 10 + 4
    (path,) = tmp_path.rglob("*.parquet")
    assert pq.read_table(path).num_rows == 80
    assert pq.ParquetFile(path).num_row_groups > 1


def test_a_table_without_pyarrow_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr("lightning_xattn.evaluation.settings.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r'pip install "lightning-xattn\[table\]"'):
        AttentionExplainabilityCallback(table=tmp_path)


def test_a_batch_of_which_nothing_is_kept_adds_no_rows(tmp_path):
    """As the last one of a process, which may hold nothing but a repeat."""
    table = SampleTable(tmp_path, "x", {"stage": "val"})
    rows = {"target": torch.tensor([1, 2]), "sample_id": ["a", "b"], "entropy": torch.tensor([0.5, 0.25])}
    table.add(rows | {"layer": "a"})
    table.add(
        {"target": torch.tensor([], dtype=torch.long), "sample_id": [], "entropy": torch.tensor([]), "layer": "a"}
    )
    table.close()
    assert pd.read_parquet(tmp_path / "attention")["entropy"].tolist() == [0.5, 0.25]
