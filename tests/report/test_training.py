"""How many of the samples the model was trained on: counted by hand in a small table, and said."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_xattn import create_explainability_report
from lightning_xattn.evaluation.results import TrainingData
from lightning_xattn.functional.outcomes import CORRECT
from lightning_xattn.report.key_points import count_training, describe_training
from tests.explained import dataset, summary

IDS, GROUPS = list("abcdefg"), ["p", "q", "p", "q", "r", "p", None]
TRAINED_ON = TrainingData(frozenset("abx"), frozenset("pqs"))
"""On a and b, and on groups of which three others are here: c, d and f."""


def explained(folder, trained_on=TRAINED_ON, ids=IDS, groups=GROUPS, layers=1):
    """A data set of one layer whose table has two, or of none."""
    (folder / "attention").mkdir()
    for number, layer in enumerate(["fusion.0", "fusion.1"] if layers else [None]):
        rows = pa.table(
            {
                "sample_idx": pa.array(range(len(ids))),
                "layer": pa.array([layer] * len(ids), pa.string()),
                "sample_id": pa.array(ids, pa.string()),
                **({} if groups is None else {"group": pa.array(groups, pa.string())}),
            }
        )
        pq.write_table(rows, folder / "attention" / f"{number}.parquet")
    summaries = [summary([0, 1] * 3 + [2], [CORRECT] * 7)][:layers]
    return dataset(*summaries, table=folder, trained_on=trained_on)


@pytest.mark.parametrize("layers", [1, 0])
def test_samples_are_seen_or_related_by_their_group_or_new(layers, tmp_path):
    result = explained(tmp_path, layers=layers)
    assert count_training(result) == {"samples": 7, "seen": 2, "related": 3}


@pytest.mark.parametrize(
    ("changed", "seen", "related"),
    [
        ({"trained_on": TrainingData(frozenset("ab"))}, 2, None),
        ({"groups": None}, 2, None),
        ({"groups": [None] * 7}, 2, None),
        ({"groups": [*[None] * 6, "q"]}, 2, 1),
        ({"trained_on": TrainingData(frozenset("x"), frozenset("y"))}, 0, 0),
        ({"ids": [*"abcde", None, None]}, 2, 2),
    ],
)
def test_related_samples_are_not_known_without_groups(changed, seen, related, tmp_path):
    assert count_training(explained(tmp_path, **changed)) == {"samples": 7, "seen": seen, "related": related}


@pytest.mark.parametrize("changed", [{"trained_on": None}, {"ids": [None] * 7}])
def test_nothing_is_counted_where_training_or_ids_are_not_known(changed, tmp_path):
    assert count_training(explained(tmp_path, **changed)) is None


def test_nothing_is_counted_without_a_table():
    assert count_training(dataset(trained_on=TRAINED_ON)) is None


WARNING = "Such samples do not show how well the model does on new ones."


@pytest.mark.parametrize(
    ("seen", "related", "said"),
    [
        (2, 3, f"2 of these 7 samples, and on others of the groups of 3 more. {WARNING}"),
        (0, 3, f"none of these 7 samples, and on others of the groups of 3 more. {WARNING}"),
        (2, 0, f"2 of these 7 samples. {WARNING}"),
        (0, 0, "none of these 7 samples, nor on others of their groups."),
        (2, None, f"2 of these 7 samples; whether it was trained on others of their groups is not known. {WARNING}"),
        (0, None, "none of these 7 samples; whether it was trained on others of their groups is not known."),
    ],
)
def test_what_is_said_of_the_training(seen, related, said):
    counts = {"samples": 7, "seen": seen, "related": related}
    assert describe_training(counts) == f"the model was trained on {said}"


def test_a_report_has_the_counts_and_the_sentence(tmp_path):
    found = json.loads(create_explainability_report(explained(tmp_path), format="json"))
    counts = {"samples": 7, "seen": 2, "related": 3}
    assert found["training"] == counts
    assert found["key_points"]["Training"] == describe_training(counts)
    assert describe_training(None) == "it is not known which of these samples the model was trained on."
