"""Processes that hold a model together say what one process says, and say each sample once."""

import json
import warnings

import pyarrow.parquet as pq
import pytest

from tests import split_run
from tests.processes import run_processes

pytestmark = pytest.mark.slow

SPLITS = {"parameters": (2, 1), "heads of both": (1, 2), "heads of both and parameters": (2, 2)}
"""How many processes have other data, and how many the same."""


QUERIES = "audio_to_text for the same samples, though no layer in 'fusion.audio_to_text_attn' is parallelized"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its attention has no names that say all, and its modalities cannot be read
        return split_run.explain("", {}, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=SPLITS)
def split(request, tmp_path_factory):
    """What each process wrote, how many have other data, and the folder of the table."""
    folder = tmp_path_factory.mktemp("split")
    data_parallel, tensor_parallel = SPLITS[request.param]
    run_processes("tests.split_run", folder, request.param, data_parallel, tensor_parallel)
    ranks = [folder / f"rank_{rank}.json" for rank in range(data_parallel * tensor_parallel)]
    return [json.loads(path.read_text()) for path in ranks], data_parallel, folder / "table"


def test_numbers_are_those_of_one_process(split, alone):
    ranks, data_parallel, _ = split
    assert [record["stage"] for record in alone["history"]] == ["val", "test", "val"]
    for rank in ranks:
        assert rank["heads"] == alone["heads"] == [split_run.HEADS, split_run.HEADS]
        for found, expected in zip(rank["history"][:2], alone["history"][:2], strict=True):
            assert_same_numbers(found, expected)
            assert "contribution/audio" in found
            assert found["samples"] == split_run.SAMPLES
            assert found["repeats"] == -split_run.SAMPLES % data_parallel


def assert_same_numbers(found, expected):
    # Gradients do not pass between processes, so faithfulness has no reference there.
    referred = {name for name in expected if name.startswith("faithfulness/reference")}
    assert expected.keys() - referred == found.keys()
    for name, value in found.items():
        if name != "repeats":
            assert value == pytest.approx(expected[name], abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("part", ["heads", "faint both heads"])
def test_each_head_is_there_once_where_one_direction_is_split_or_all_are_alike(tmp_path, part):
    run_processes("tests.split_run", tmp_path, part, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (expected,) = split_run.validate("faint" if "faint" in part else "", {})["history"]
    for rank in (0, 1):
        (found,) = json.loads((tmp_path / f"rank_{rank}.json").read_text())["history"]
        assert_same_numbers(found, expected)
        assert f"entropy/text_to_audio/head_{split_run.HEADS - 1}" in found


def test_a_model_that_differs_from_run_to_run_ends_no_run(tmp_path):
    """Each process alone would try another number of replays, and wait for the others in another collective."""
    run_processes("tests.split_run", tmp_path, "noise, parameters", 2, 1)
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text())["said"] for rank in (0, 1))
    assert first == second
    assert "contributions cannot be told" in first


def test_a_fit_goes_on_and_all_processes_say_the_same(split):
    ranks, _, _ = split
    fitted = [rank["history"][2] for rank in ranks]
    assert all(json.dumps(one) == json.dumps(fitted[0]) for one in fitted)
    assert (fitted[0]["stage"], fitted[0]["samples"]) == ("val", split_run.SAMPLES)


def test_the_table_has_each_sample_once(split):
    _, data_parallel, folder = split
    table = pq.read_table(folder).to_pandas()
    evaluations = [rows for _, rows in table.groupby(["run", "stage"])]
    assert [len(rows) for rows in evaluations] == [split_run.SAMPLES] * 3
    names = {path.name.partition("rank=")[2][:6] for path in folder.iterdir()}
    assert names == {f"{rank}-of-{data_parallel}" for rank in range(data_parallel)}


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("classes", "different predictions for the same samples: each seems to have a part of them"),
        ("queries", QUERIES),
        ("faint queries", QUERIES),
    ],
)
def test_parts_that_cannot_be_put_together_are_refused(tmp_path, part, said):
    run_processes("tests.split_run", tmp_path, part, 1, 2)
    for rank in (0, 1):
        assert said in json.loads((tmp_path / f"rank_{rank}.json").read_text())["refused"]
