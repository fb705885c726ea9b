"""Of a model whose parameters are split attention and probes are exact; of one whose heads are, nothing is recorded."""

import json
import warnings

import pyarrow.parquet as pq
import pytest

from tests import split_run
from tests.processes import run_processes

# One start for both, as starting processes takes longer than what they do.
pytestmark = pytest.mark.slow

REPLAYED = ("contribution", "support", "health/unused", "faithfulness", "unfaithful")
"""Topics of numbers that take replays."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    run_processes("tests.split_run", folder)
    return folder


def found_by_each(folder, split):
    """What each of two processes found."""
    return [json.loads((folder / f"rank_{rank}.json").read_text())[split] for rank in range(2)]


def test_attention_and_probes_are_exact_where_parameters_are_split(folder, tmp_path):
    ranks = found_by_each(folder, "parameters")
    (here := tmp_path / "alone").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is tested below what is warned of
        alone = split_run.run("", {}, here)
    assert [record["stage"] for record in alone["history"]] == ["val", "test", "val"]
    for rank in ranks:
        assert rank["heads"] == alone["heads"] == [split_run.HEADS] * 4
        for found, expected in zip(rank["history"][:2], alone["history"][:2], strict=True):
            whole = {name for name in expected if not name.startswith(REPLAYED)} | {"support_problem"}
            # The reason why nothing is replayed stands among the numbers.
            assert found.keys() == whole | {"contribution_problem"}
            assert "the processes hold the model together" in found["contribution_problem"]
            assert found["samples"] == split_run.SAMPLES
            assert found["repeats"] == -split_run.SAMPLES % 2
            for name in whole - {"repeats", "modalities"}:
                assert found[name] == pytest.approx(expected[name], abs=1e-5, nan_ok=True), name
        assert all("the processes hold the model together" in said for said in rank["fusion"].values())
    # A fit deals its samples out otherwise, so its weights are others; they are the same on each process.
    first, second = (json.dumps(rank["history"][2]) for rank in ranks)
    assert first == second
    rows = pq.read_table(folder / "parameters/table/attention").to_pandas()
    assert [len(of_one) for _, of_one in rows.groupby(["run", "stage"])] == [split_run.SAMPLES] * 3


def test_nothing_is_recorded_where_heads_are_split(folder):
    ranks = found_by_each(folder, "heads")
    for rank in ranks:
        assert rank["losses"] == ranks[0]["losses"]
        assert (rank["history"], rank["fusion"], rank["heads"]) == ([], {}, [])
    # Once in each call of the Trainer, by the first process.
    assert not ranks[1]["warnings"]
    assert len(ranks[0]["warnings"]) == 3
    assert all("Nothing is recorded in this run" in one and "tensor parallelism" in one for one in ranks[0]["warnings"])
    assert not (folder / "heads/table").exists()
