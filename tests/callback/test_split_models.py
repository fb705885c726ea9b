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


def assert_as_one_process(split, ranks, data_parallel, folder):
    """What a validation, a test and a fit say, and what is in the table."""
    (here := folder / "alone").mkdir()
    alone = run_alone(split_run.explain, "", {}, here)
    assert [record["stage"] for record in alone["history"]] == ["val", "test", "val"]
    for rank in ranks:
        assert rank[split]["heads"] == alone["heads"] == [split_run.HEADS, split_run.HEADS]
        for found, expected in zip(rank[split]["history"][:2], alone["history"][:2], strict=True):
            assert_same_numbers(found, expected)
            assert "contribution/audio" in found
            assert found["samples"] == split_run.SAMPLES
            assert found["repeats"] == -split_run.SAMPLES % data_parallel
    # A fit deals its samples out otherwise, so its weights are others; they are the same on each process.
    fitted = [rank[split]["history"][2] for rank in ranks]
    assert all(json.dumps(one) == json.dumps(fitted[0]) for one in fitted)
    assert (fitted[0]["stage"], fitted[0]["samples"]) == ("val", split_run.SAMPLES)
    rows = pq.read_table(folder / "table").to_pandas()
    assert [len(of_one) for _, of_one in rows.groupby(["run", "stage"])] == [split_run.SAMPLES] * 3
    names = {path.name.partition("rank=")[2][:6] for path in (folder / "table").iterdir()}
    assert names == {f"{rank}-of-{data_parallel}" for rank in range(data_parallel)}


def test_parameters_are_split(tmp_path):
    noise = "noise, parameters"
    ranks = run_together(tmp_path, 2, 1, "parameters", noise)
    assert_as_one_process("parameters", ranks, 2, tmp_path)
    # Of a model that differs from run to run each process alone would try another number of replays.
    first, second = (rank[noise]["said"] for rank in ranks)
    assert first == second
    assert "contributions cannot be told" in first


def test_heads_are_split(tmp_path):
    put_together = {"heads": "", "masked heads": "masked", "faint both heads": "faint"}
    said = {"classes": WHOLE, "queries": QUERIES, "faint queries": QUERIES}
    ranks = run_together(tmp_path, 1, 2, "heads of both", *put_together, *said)
    assert_as_one_process("heads of both", ranks, 1, tmp_path)
    for split, whole in put_together.items():
        (expected,) = run_alone(split_run.validate, whole, {})["history"]
        for rank in ranks:
            (found,) = rank[split]["history"]
            assert_same_numbers(found, expected)
            assert f"entropy/text_to_audio/head_{split_run.HEADS - 1}" in found
    for split, reason in said.items():
        assert all(reason in rank[split] for rank in ranks), split


def test_heads_and_parameters_are_split(tmp_path):
    ranks = run_together(tmp_path, 2, 2, "heads of both and parameters")
    assert_as_one_process("heads of both and parameters", ranks, 2, tmp_path)
