"""What is said of the modalities by the explainer, in its folders and in the sample table."""

import duckdb
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_xattn import ExplainabilityCapture
from lightning_xattn.core.ids import hashed
from tests.attribution.models import (
    NAMED,
    Concatenation,
    loader_of,
    said_data,
    sample_ids,
    summary_of,
    trained,
    watch_of,
)


def test_the_explainer_and_the_callback_agree():
    data, _ = said_data(60)
    module = trained(None, data, epochs=5)
    expected = summary_of(module, data)
    explainer = ExplainabilityCapture(
        module,
        predict=lambda model, batch: model(*batch[:2]),
        targets=lambda outputs, batch: batch[2],
        sample_ids=sample_ids,
    )
    ours = explainer.explain_loader(loader_of(data), progress=False).fusion
    for name, values in expected.numbers.items():
        torch.testing.assert_close(ours.numbers[name], values, equal_nan=True, atol=1e-6, rtol=1e-5)


def test_an_explained_folder_is_gone_on_with(tmp_path):
    data, _ = said_data(60)
    module = trained(None, data, epochs=5)

    def explain(loader, folder):
        explainer = ExplainabilityCapture(
            module,
            predict=lambda model, batch: model(*batch[:2]),
            targets=lambda outputs, batch: batch[2],
            sample_ids=sample_ids,
        )
        return explainer.explain_loader(loader, folder, progress=False).fusion

    class Interrupted:
        def __iter__(self):
            for i, batch in enumerate(loader_of(data)):
                if i == 2:
                    raise KeyboardInterrupt
                yield batch

        def __len__(self):
            return 4

    expected = explain(loader_of(data), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        explain(Interrupted(), tmp_path / "parts")
    for folder in ("parts", "parts", "whole"):
        ours = explain(loader_of(data), tmp_path / folder)
        for name, values in expected.numbers.items():
            torch.testing.assert_close(ours.numbers[name], values, equal_nan=True, atol=0, rtol=0)


def test_the_table_has_the_numbers_of_each_sample(tmp_path):
    data, _ = said_data(150)
    module = trained(None, data, epochs=5)
    callback = watch_of(module, data, table=tmp_path, contribution_samples=64)
    frame = pd.read_parquet(tmp_path / "attention").merge(pd.read_parquet(tmp_path / "samples"), how="left")
    frame = frame.set_index("sample_id")
    summary = callback.fusion_summaries["val"]
    ids = {int(one): str(int(sample)) for sample, one in zip(data.tensors[3], hashed(data.tensors[3], 0), strict=True)}
    rows = frame.loc[[ids[int(one)] for one in summary.rows["hash"]]]
    names = {name: name for name in ("conflict", "support", "supports/left", "supports/right", "interaction")}
    names |= {f"contribution/{name}": f"phi/{name}" for name in ("left", "right")}
    for column, number in names.items():
        np.testing.assert_allclose(rows[column], summary.numbers[number], rtol=1e-5, atol=1e-6, err_msg=column)
    assert rows["contribution/left"].notna().sum() == 64
    for name, classes in summary.probe_classes.items():
        assert rows[f"probe/{name}"].tolist() == classes.tolist()
        np.testing.assert_allclose(rows[f"probe_probability/{name}"], summary.probe_probabilities[name], rtol=1e-5)
    few = TensorDataset(*(one[:30] for one in data.tensors))
    watch_of(module, few, table=tmp_path / "few")
    unread = pd.read_parquet(tmp_path / "few/samples")
    assert (
        unread[["conflict", "support", "supports/left", "probe/left", "probe_probability/left"]].isna().all(axis=None)
    )
    assert unread["contribution/left"].notna().all()
    both = duckdb.sql(
        f"select count(conflict), count(*) from read_parquet('{tmp_path}/**/samples/*.parquet')"
    ).fetchall()
    assert both == [(150, 180)]


def test_a_table_of_a_model_without_attention(tmp_path):
    data, _ = said_data(60)
    watch_of(trained(Concatenation(), data), data, table=tmp_path, **NAMED)
    frame = pd.read_parquet(tmp_path / "attention")
    assert len(frame) == 60
    assert frame["layer"].isna().all()
    assert pd.read_parquet(tmp_path / "samples")["conflict"].notna().all()
