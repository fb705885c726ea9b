"""Processes that hold a model together say what one process says, and say each sample once."""

import json
import warnings

import pyarrow.parquet as pq
import pytest

from tests import split_run
from tests.processes import run_processes

# A test makes much of each start of its processes, as starting them takes longer than what they do.
pytestmark = pytest.mark.slow

WHOLE = "different predictions for the same samples: each seems to have a part of them"
QUERIES = "audio_to_text for the same samples, though no layer in 'fusion.audio_to_text_attn' is parallelized"


def run_together(folder, data_parallel, tensor_parallel, *splits):
    """What each process says of each split."""
    run_processes("tests.split_run", folder, data_parallel, tensor_parallel, *splits)
    ranks = range(data_parallel * tensor_parallel)
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in ranks]


def run_alone(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its attention has no names that say all, and its modalities cannot be read
        return function(*arguments)


def assert_same_numbers(found, expected):
    # Gradients do not pass between processes, so faithfulness has no reference there.
    referred = {name for name in expected if name.startswith("faithfulness/reference")}
    assert expected.keys() - referred == found.keys()
    for name, value in found.items():
        if name != "repeats":
            assert value == pytest.approx(expected[name], abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize(
    ("split", "data_parallel", "tensor_parallel"),
    [("parameters", 2, 1), ("heads of both", 1, 2), ("heads of both and parameters", 2, 2)],
)
def test_numbers_are_those_of_one_process(split, data_parallel, tensor_parallel, tmp_path):
    (here := tmp_path / "alone").mkdir()
    alone = run_alone(split_run.explain, "", {}, here)
    assert [record["stage"] for record in alone["history"]] == ["val", "test", "val"]
    ranks = [said[split] for said in run_together(tmp_path, data_parallel, tensor_parallel, split)]
    for rank in ranks:
        assert rank["heads"] == alone["heads"] == [split_run.HEADS, split_run.HEADS]
        for found, expected in zip(rank["history"][:2], alone["history"][:2], strict=True):
            assert_same_numbers(found, expected)
            assert "contribution/audio" in found
            assert found["samples"] == split_run.SAMPLES
            assert found["repeats"] == -split_run.SAMPLES % data_parallel
    # Weights are others after a fit, and the same on each process.
    fitted = [rank["history"][2] for rank in ranks]
    assert all(json.dumps(one) == json.dumps(fitted[0]) for one in fitted)
    assert (fitted[0]["stage"], fitted[0]["samples"]) == ("val", split_run.SAMPLES)
    # The table has each sample once.
    rows = pq.read_table(tmp_path / "table").to_pandas()
    assert [len(of_one) for _, of_one in rows.groupby(["run", "stage"])] == [split_run.SAMPLES] * 3
    names = {path.name.partition("rank=")[2][:6] for path in (tmp_path / "table").iterdir()}
    assert names == {f"{rank}-of-{data_parallel}" for rank in range(data_parallel)}


def test_heads_are_put_together_where_they_are_split_and_what_cannot_be_is_refused(tmp_path):
    put_together, said = ("heads", "faint both heads"), {"classes": WHOLE, "queries": QUERIES, "faint queries": QUERIES}
    ranks = run_together(tmp_path, 1, 2, *put_together, *said)
    for split in put_together:
        (expected,) = run_alone(split_run.validate, "faint" if "faint" in split else "", {})["history"]
        for rank in ranks:
            (found,) = rank[split]["history"]
            assert_same_numbers(found, expected)
            assert f"entropy/text_to_audio/head_{split_run.HEADS - 1}" in found
    for split, reason in said.items():
        assert all(reason in rank[split] for rank in ranks)


def test_a_model_that_differs_from_run_to_run_ends_no_run(tmp_path):
    """Each process alone would try another number of replays, and wait for the others in another collective."""
    first, second = (rank["noise, parameters"]["said"] for rank in run_together(tmp_path, 2, 1, "noise, parameters"))
    assert first == second
    assert "contributions cannot be told" in first
