"""The guide's thresholds, held against samples on either side of them."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_xattn import interpret_sample
from lightning_xattn.core.attention import Attention, Direction
from lightning_xattn.functional import prepare_rows, row_statistics
from lightning_xattn.report.criteria import AGREEING, DIFFUSE, DISAGREEING, FOCUSED, IF_CORRECT, IF_INCORRECT, PATTERNS
from tests.explained import NAN, NO_ROW, SINGLE_KEY, sample, statistics

FOCUSED_EXAMPLE = statistics(max=0.95, entropy=0.2, sparsity=85.0)
DIFFUSE_EXAMPLE = statistics(max=0.35, entropy=0.9, sparsity=5.0)


def judged(agreement=0.6, correct=None, **directions):
    directions = directions or {"eeg_to_spec": statistics(), "spec_to_eeg": statistics()}
    return interpret_sample(sample(modality_agreement=agreement, correct=correct, attention_stats=directions))


def met(criteria, group):
    return [one.met for one in criteria if one.group == group]


@pytest.mark.parametrize(
    ("example", "shown", "agreement"),
    [(FOCUSED_EXAMPLE, FOCUSED, 0.71), (DIFFUSE_EXAMPLE, DIFFUSE, 0.19), (statistics(), None, 0.5)],
)
def test_the_guides_examples_show_their_patterns(example, shown, agreement):
    criteria = judged(agreement, eeg_to_spec=example, spec_to_eeg=example)
    for pattern in (FOCUSED, DIFFUSE):
        assert len(met(criteria, pattern)) == 3
        assert all(met(criteria, pattern)) == (pattern == shown)
    assert met(criteria, AGREEING) == [agreement > 0.7]
    assert met(criteria, DISAGREEING) == [agreement < 0.2]
    assert met(criteria, IF_CORRECT) == [shown == FOCUSED] * 4
    assert met(criteria, IF_INCORRECT) == [shown == DIFFUSE] * 4


@pytest.mark.parametrize(
    ("quantity", "group", "inside", "outside"),
    [
        ("max", IF_CORRECT, 0.701, 0.7),
        ("max", IF_INCORRECT, 0.499, 0.5),
        ("entropy", IF_CORRECT, 0.499, 0.5),
        ("entropy", IF_INCORRECT, 0.701, 0.7),
        ("sparsity", IF_CORRECT, 50.1, 50.0),
        ("sparsity", IF_INCORRECT, 24.9, 25.0),
    ],
)
def test_thresholds(quantity, group, inside, outside):
    name = {"max": "mean of the rows' largest weights"}.get(quantity, quantity)
    for value, expected in ((inside, True), (outside, False)):
        criteria = judged(eeg_to_spec=replace(statistics(), **{quantity: value}))
        (one,) = (one for one in criteria if one.group == group and one.criterion.startswith(name))
        assert (one.value, one.met) == (value, expected)
        assert f" {one.threshold:g}" in one.criterion


@pytest.mark.parametrize(
    ("agreement", "expected"),
    [(0.51, (True, False)), (0.5, (False, False)), (0.2, (False, False)), (-1, (False, True))],
)
def test_thresholds_of_the_agreement(agreement, expected):
    criteria = judged(agreement)
    assert (met(criteria, IF_CORRECT)[0], met(criteria, IF_INCORRECT)[0]) == expected


@pytest.mark.parametrize(
    ("correct", "checklists"),
    [(True, [IF_CORRECT]), (False, [IF_INCORRECT]), (None, [IF_CORRECT, IF_INCORRECT])],
)
def test_the_checklist_is_that_of_the_outcome(correct, checklists):
    groups = list(dict.fromkeys(one.group for one in judged(correct=correct)))
    assert groups == [*PATTERNS, *checklists]


def test_every_direction_has_to_meet_a_criterion():
    criteria = judged(correct=True, eeg_to_spec=FOCUSED_EXAMPLE, spec_to_eeg=DIFFUSE_EXAMPLE)
    for one in criteria:
        if one.direction:
            wanting = "spec_to_eeg" if one.group in (FOCUSED, IF_CORRECT) else "eeg_to_spec"
            assert (one.direction, one.met) == (wanting, False)


def test_further_layers_do_not_count():
    alone = judged(eeg_to_spec=FOCUSED_EXAMPLE)
    assert judged(**{"eeg_to_spec": FOCUSED_EXAMPLE, "fusion.1/eeg_to_spec": DIFFUSE_EXAMPLE}) == alone


@pytest.mark.parametrize("nothing", [SINGLE_KEY, NO_ROW])
def test_where_attention_says_nothing_no_criterion_is_met_or_failed(nothing):
    criteria = judged(NAN, eeg_to_spec=statistics(), spec_to_eeg=nothing)
    assert all(one.met is None and math.isnan(one.value) for one in criteria)
    caveat = "single key" if nothing is SINGLE_KEY else "no valid row"
    assert all(caveat in one.caveat for one in criteria if one.direction == "spec_to_eeg")


def test_one_direction_has_no_agreement():
    criteria = judged(NAN, correct=True, eeg_to_spec=FOCUSED_EXAMPLE)
    assert met(criteria, IF_CORRECT) == [None, True, True, True]


@pytest.mark.parametrize(("keys", "sparse"), [(7, False), (10, False), (11, True), (119, True)])
def test_sparsity_of_many_keys_has_a_caveat_exactly_where_uniform_attention_is_sparse(keys, sparse):
    rows = prepare_rows(Attention(Direction("eeg", "spec"), torch.full((1, 3, 5, keys), 1 / keys, dtype=torch.float64)))
    uniform = {name: float(values.mean()) for name, values in row_statistics(rows).items()}
    assert (uniform["sparsity"] == 100) == sparse
    of_rows = {name: uniform[name] for name in ("mean", "std", "max", "entropy", "sparsity")}
    caveats = [one.caveat for one in judged(eeg_to_spec=statistics(**of_rows)) if one.criterion.startswith("sparsity")]
    expected = f"with {keys} keys even uniform attention has 100 %" if sparse else None
    assert caveats == [expected] * 4


@pytest.mark.parametrize(("keys", "caveat"), [(2, "with 2 keys a row's largest weight is at least 0.5"), (3, None)])
def test_a_largest_weight_that_few_keys_bound_has_a_caveat(keys, caveat):
    criteria = judged(eeg_to_spec=statistics(mean=1 / keys))
    assert {one.caveat for one in criteria if one.criterion.startswith("mean of the rows' largest")} == {caveat}
