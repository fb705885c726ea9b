"""Accumulated sums say what a list of all samples would say, whatever the batches."""

import operator
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_xattn.core.attention import Attention, Direction
from lightning_xattn.core.errors import ShapeError
from lightning_xattn.evaluation.accumulators import LayerAccumulator
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.statistics import (
    ALIGNMENT,
    CONFIDENCE,
    ENTROPY,
    INVALID_ROWS,
    SCORES,
    STATISTICS,
    Column,
    sample_statistics,
)
from lightning_xattn.functional import prepare_layer
from lightning_xattn.functional.outcomes import BINS, CORRECT, INCORRECT, UNKNOWN
from tests import reference

SAMPLES, HEADS, QUERIES, KEYS, CLASSES = 23, 3, 5, 7, 3
DIRECTION = Direction("eeg", "spec")


def make_samples(seed=0):
    """Attention of all samples with a few broken rows, class ids (3 is none) and outcomes."""
    generator = torch.Generator().manual_seed(seed)
    there = torch.randn(SAMPLES, HEADS, QUERIES, KEYS, generator=generator)
    back = there.transpose(-1, -2) + torch.randn(SAMPLES, HEADS, KEYS, QUERIES, generator=generator)
    there, back = there.softmax(-1), back.softmax(-1)
    there[3] = torch.nan
    back[4, 1, 2] = torch.nan
    classes = torch.randint(0, CLASSES + 1, (SAMPLES,), generator=generator)
    classes[1::6] = CLASSES
    outcomes = torch.randint(0, 2, (SAMPLES,), generator=generator)
    outcomes[::7] = UNKNOWN
    tied = torch.rand(SAMPLES, generator=generator) < 0.3
    return there, back, classes, outcomes, tied


def rows_of(there, back):
    return prepare_layer(Attention(DIRECTION, there), Attention(DIRECTION.opposite, back))


def new_accumulator(rows, n_classes=CLASSES):
    return LayerAccumulator.empty(rows, tuple(sample_statistics(rows)), n_classes)


def add(accumulator, rows, *labels):
    return accumulator.add(rows, sample_statistics(rows), *labels)


def tensors_of(accumulator):
    """Every sum of an accumulator by name."""
    settled = vars(accumulator.cpu())
    found = {name: value for name, value in settled.items() if torch.is_tensor(value)}
    found |= {f"maps/{direction}": value for direction, value in settled["maps"].items()}
    for name in ("by_group", "head_entropies", "scores_by_group"):
        found |= {f"{name}/keys": settled[name].keys, f"{name}/sums": settled[name].sums}
    return found


def masked_samples():
    """Ragged samples: the last tokens of some are padding, in bfloat16, with rows of a single valid key."""
    there, back, classes, outcomes, tied = make_samples(5)
    there, back = there.nan_to_num(nan=1 / KEYS), back.nan_to_num(nan=1 / QUERIES)
    eeg = torch.arange(QUERIES) < torch.arange(SAMPLES)[:, None] % QUERIES + 1
    spec = torch.arange(KEYS) < torch.arange(SAMPLES)[:, None] % KEYS + 1
    there, back = there * spec[:, None, None], back * eeg[:, None, None]
    there, back = (x / x.sum(-1, keepdim=True) for x in (there, back))
    return there.bfloat16(), back.bfloat16(), eeg, spec, classes, outcomes, tied


def test_masked_ragged_half_precision_and_single_keys():
    there, back, eeg, spec, classes, outcomes, tied = masked_samples()
    rows = prepare_layer(
        Attention(DIRECTION, there, key_mask=spec, query_mask=eeg),
        Attention(DIRECTION.opposite, back, key_mask=eeg, query_mask=spec),
    )
    accumulator = new_accumulator(rows)
    accumulator = add(accumulator, rows, classes, outcomes, tied)
    summary = LayerSummary(accumulator)

    scaled = [x.double().numpy() for x in (there, back)]
    scaled = [x / x.sum(-1, keepdims=True) for x in scaled]
    masks = eeg.numpy(), spec.numpy()
    expected = {
        "alignment": [],
        "eeg_to_spec/entropy": [],
        "spec_to_eeg/max": [],
        "invalid_rows": [],
    }
    for b in range(SAMPLES):
        a, z, (e, s) = scaled[0][b], scaled[1][b], (masks[0][b], masks[1][b])
        expected["alignment"].append(reference.alignment(a, z, e, s, s, e))
        expected["eeg_to_spec/entropy"].append(reference.mean_defined(reference.row_statistics(a, e, s)["entropy"]))
        expected["spec_to_eeg/max"].append(reference.mean_defined(reference.row_statistics(z, s, e)["max"]))
        invalid = (~reference.valid_rows(a, e, s)).sum() + (~reference.valid_rows(z, s, e)).sum()
        expected["invalid_rows"].append(invalid)
    for name, values in expected.items():
        column, defined = Column.parse(name), [value for value in values if not np.isnan(value)]
        assert summary.count(column) == len(defined), column
        assert summary.mean(column) == pytest.approx(np.mean(defined), rel=1e-4, abs=1e-5), column
    assert 0 < summary.undefined_share() < 1
    assert np.isnan(summary.alignment_null)  # samples of different token counts cannot be compared

    for c in range(CLASSES):
        chosen = np.flatnonzero(classes == c)
        for q in range(QUERIES):
            for k in range(KEYS):
                cells = [scaled[0][b, :, q, k] for b in chosen if masks[0][b, q] and masks[1][b, k]]
                mean = np.mean(cells) if cells else np.nan
                np.testing.assert_allclose(summary.maps[DIRECTION][c, q, k], mean, rtol=1e-4, atol=1e-6)


def accumulate(samples, batches):
    accumulator = None
    for batch in batches:
        there, back, classes, outcomes, tied = (x[batch] for x in samples)
        rows = rows_of(there, back)
        accumulator = accumulator or new_accumulator(rows)
        accumulator = add(accumulator, rows, classes, outcomes, tied)
    return accumulator


def in_batches(order, size):
    return [order[i : i + size] for i in range(0, len(order), size)]


EVERYTHING = {"all": (None, None)} | {
    f"class {c}, outcome {o}": (c, o) for c in (None, *range(CLASSES)) for o in (None, CORRECT, INCORRECT)
}


def expected_numbers(samples):
    """The reference's value of every column for every sample, NaN where undefined."""
    there, back, *_ = (x.double().numpy() for x in samples)
    numbers = {}
    numbers["alignment"] = [reference.alignment(there[b], back[b]) for b in range(SAMPLES)]
    invalid = [0] * SAMPLES  # nothing is masked, so every invalid row is a broken one
    for name, maps in (("eeg_to_spec", there), ("spec_to_eeg", back)):
        by_head = [reference.row_statistics(maps[b]) for b in range(SAMPLES)]
        for column in ("entropy", "max", "sparsity", "effective_keys"):
            numbers[f"{name}/{column}"] = [reference.mean_defined(s[column]) for s in by_head]
        for head in range(HEADS):
            numbers[f"{name}/entropy/head_{head}"] = [s["entropy"][head] for s in by_head]
            broken = [(~reference.valid_rows(maps[b]))[head].sum() for b in range(SAMPLES)]
            numbers[f"{name}/broken/head_{head}"] = broken
            for column in ("sink", "sink_excess"):
                of_samples = [getattr(reference, column)(maps[b])[head] for b in range(SAMPLES)]
                numbers[f"{name}/{column}/head_{head}"] = of_samples
        selectivity = [reference.mean_defined(reference.query_selectivity(maps[b])) for b in range(SAMPLES)]
        numbers[f"{name}/query_selectivity"] = selectivity
        numbers[f"{name}/head_diversity"] = [reference.head_diversity(maps[b]) for b in range(SAMPLES)]
        invalid = [n + (~reference.valid_rows(maps[b])).sum() for b, n in enumerate(invalid)]
    directions = zip(numbers["eeg_to_spec/entropy"], numbers["spec_to_eeg/entropy"], strict=True)
    numbers["entropy"] = [reference.mean_defined(both) for both in directions]
    numbers["invalid_rows"] = invalid
    numbers["wholly_masked"] = [0] * SAMPLES
    return numbers


@pytest.fixture(scope="module")
def samples():
    return make_samples()


def test_every_number_by_class_and_outcome(samples):
    summary = LayerSummary(accumulate(samples, in_batches(torch.arange(SAMPLES), 5)))
    numbers = expected_numbers(samples)
    assert set(map(str, summary.columns)) == set(numbers)
    classes, outcomes = samples[2].numpy(), samples[3].numpy()
    for class_id, outcome in EVERYTHING.values():
        chosen = np.ones(SAMPLES, bool) if class_id is None else classes == class_id
        chosen = chosen if outcome is None else chosen & (outcomes == outcome)
        for name, values in numbers.items():
            column = Column.parse(name)
            if column.head is not None and (class_id, outcome) != (None, None):
                continue
            values = np.array(values, float)[chosen]
            values = values[~np.isnan(values)]
            assert summary.count(column, class_id, outcome) == len(values), column
            mean = values.mean() if len(values) else np.nan
            std = values.std(ddof=1) if len(values) > 1 else np.nan
            np.testing.assert_allclose(summary.mean(column, class_id, outcome), mean, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(summary.std(column, class_id, outcome), std, rtol=1e-3, atol=1e-5)
            interval = np.clip(reference.mean_interval(values), *STATISTICS[column.statistic].range)
            np.testing.assert_allclose(summary.interval(column, class_id, outcome), interval, rtol=1e-3, atol=1e-4)
        if outcome is None:
            known = [int(one == CORRECT) for one in outcomes[chosen] if one in (CORRECT, INCORRECT)]
            found = summary.accuracy_interval(class_id)
            np.testing.assert_allclose(found, reference.proportion_interval(known), atol=1e-3)
        for head in range(HEADS if outcome is None else 0):
            name = f"eeg_to_spec/entropy/head_{head}"
            np.testing.assert_allclose(
                summary.mean(Column.parse(name), class_id), np.nanmean(np.array(numbers[name])[chosen]), rtol=1e-4
            )
    assert summary.samples == SAMPLES
    assert summary.undefined_share() == pytest.approx(np.isnan(numbers["alignment"]).mean())
    assert summary.total(INVALID_ROWS) == sum(numbers["invalid_rows"])
    assert summary.ties == samples[4].sum()


def test_single_heads_have_sums_of_all_samples_and_their_entropy_by_class(samples):
    summary = LayerSummary(accumulate(samples, [torch.arange(SAMPLES)]))
    for name, class_id, outcome in (("sink/head_0", 0, None), ("entropy/head_0", None, CORRECT)):
        with pytest.raises(KeyError, match="entropy by class"):
            summary.mean(Column.parse(f"eeg_to_spec/{name}"), class_id, outcome)


def test_outcome_statistics(samples):
    summary = LayerSummary(accumulate(samples, [torch.arange(SAMPLES)]))
    numbers, (_, _, classes, outcomes, _) = expected_numbers(samples), samples
    for score in (ALIGNMENT, ENTROPY):
        values = np.array(numbers[str(score)])
        defined = ~np.isnan(values)
        correct = values[defined & (outcomes == CORRECT).numpy()]
        incorrect = values[defined & (outcomes == INCORRECT).numpy()]
        separation = summary.compare(score)
        low = -1 if score == ALIGNMENT else 0
        binned = reference.binned(correct, low, 1), reference.binned(incorrect, low, 1)
        assert separation.auroc == pytest.approx(reference.error_auroc(str(score), *binned), abs=1e-9)
        assert (separation.correct, separation.incorrect) == (len(correct), len(incorrect))
        assert summary.gap(score) == pytest.approx(correct.mean() - incorrect.mean(), abs=1e-5)
        known = ((outcomes != UNKNOWN) & (classes < CLASSES)).numpy()
        adjusted = reference.class_adjusted_gap(values[known], classes[known].tolist(), (outcomes == CORRECT)[known])
        assert summary.compare(score).class_adjusted_gap == pytest.approx(adjusted, abs=1e-5)


def test_mean_maps(samples):
    there, back, classes, outcomes, _ = samples
    summary = LayerSummary(accumulate(samples, in_batches(torch.arange(SAMPLES), 4)))
    for direction, weights in ((DIRECTION, there), (DIRECTION.opposite, back)):
        for c in range(CLASSES):
            expected = weights[classes == c].nanmean((0, 1))
            torch.testing.assert_close(summary.maps[direction][c].float(), expected)
        for outcome in (INCORRECT, CORRECT):
            expected = weights[outcomes == outcome].nanmean((0, 1))
            torch.testing.assert_close(summary.outcome_maps[direction][outcome].float(), expected)


def test_mean_maps_of_masks_that_differ_by_head():
    """A head that may not attend counts with weight 0, one whose row is broken does not count."""
    generator = torch.Generator().manual_seed(2)
    visible = torch.rand(SAMPLES, HEADS, QUERIES, KEYS, generator=generator) > 0.5
    visible[:, :, 1, 2], visible[:2, 0, 3] = False, False
    scores = torch.randn(visible.shape, generator=generator)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    weights[5, 1, 4] *= 1.1
    rows = prepare_layer(Attention(DIRECTION, weights, visible=visible))
    labels = torch.zeros(SAMPLES, dtype=torch.long), torch.full((SAMPLES,), UNKNOWN), torch.zeros(SAMPLES)
    (found,) = LayerSummary(add(new_accumulator(rows, 1), rows, *labels)).maps[DIRECTION]
    cells = {}
    for b in range(SAMPLES):
        for cell, of_heads in reference.head_weights(weights[b].double().numpy(), keys=visible[b].numpy()).items():
            cells.setdefault(cell, []).extend(of_heads)
    expected = [[np.mean(cells.get((q, k), np.nan)) for k in range(KEYS)] for q in range(QUERIES)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert np.isnan(expected).sum() == 1


def test_alignment_between_different_samples(samples):
    there, back = samples[:2]
    whole = [b for b in range(SAMPLES) if b not in (3, 4)]  # those have broken rows: cells of their own
    chosen = tuple(x[whole] for x in samples)
    summary = LayerSummary(accumulate(chosen, in_batches(torch.arange(len(whole)), 4)))
    pairs = [(there[b].double().numpy(), back[b].double().numpy()) for b in whole]
    assert summary.alignment_null == pytest.approx(reference.alignment_null(pairs), abs=1e-6)
    assert np.isnan(LayerSummary(accumulate(samples, [torch.arange(SAMPLES)])).alignment_null)
    assert np.isnan(LayerSummary(accumulate(chosen, [torch.arange(1)])).alignment_null)


def null_of(there, back, **visible):
    """Of a first batch of three samples and a second of the others."""
    accumulator = None
    for batch in (slice(3), slice(3, None)):
        attention = Attention(DIRECTION, there, **visible)[batch], Attention(DIRECTION.opposite, back)[batch]
        rows = prepare_layer(*attention)
        accumulator = accumulator or new_accumulator(rows)
        n = len(attention[0])
        accumulator = add(
            accumulator, rows, torch.zeros(n).long(), torch.zeros(n).long(), torch.zeros(n, dtype=torch.bool)
        )
    return LayerSummary(accumulator).alignment_null


def test_samples_without_an_alignment_have_no_part_in_the_null(samples):
    """One attends to all alike, in one all rows are broken, and one of its maps is NaN in the one direction alone."""
    there, back = (x[5:14].clone() for x in samples[:2])
    there[1], back[4], there[7], back[7] = 1 / KEYS, torch.nan, torch.nan, torch.nan
    pairs = [(there[b].double().numpy(), back[b].double().numpy()) for b in (0, 2, 3, 5, 6, 8)]
    assert null_of(there, back) == pytest.approx(reference.alignment_null(pairs), abs=1e-6)


@pytest.mark.parametrize("sample", [0, 8])
def test_a_sample_that_is_masked_in_part_ends_the_null(samples, sample):
    """It has an alignment, over cells of its own, in which other samples' maps are not standardised."""
    there, back = (x[5:14].clone() for x in samples[:2])
    visible = torch.ones(9, 1, QUERIES, KEYS, dtype=torch.bool)
    assert null_of(there, back, visible=visible) == pytest.approx(null_of(there, back), abs=1e-9)
    visible[sample, :, 1, 2] = False
    there = there * visible
    assert np.isnan(null_of(there / there.sum(-1, keepdim=True), back, visible=visible))


def test_merging_parts_with_other_token_counts_ends_the_maps(samples):
    there, back, classes, outcomes, tied = samples
    rows = rows_of(*_shorter(there, back))
    other = new_accumulator(rows)
    other = add(other, rows, classes, outcomes, tied)
    first = accumulate(samples, [torch.arange(SAMPLES)])
    summary = LayerSummary(first + other)
    assert summary.maps == {}
    assert np.isnan(summary.alignment_null)
    assert summary.samples == 2 * SAMPLES
    several = [first, other, first, other]
    for parts in (several, several[::-1]):
        merged = LayerSummary(reduce(operator.add, parts))
        assert merged.samples == 4 * SAMPLES
        assert merged.maps == {}
        for column in summary.columns:
            assert merged.mean(column) == pytest.approx(summary.mean(column))
    grouped = LayerAccumulator.empty(rows, tuple(sample_statistics(rows)), CLASSES, "patients")
    ours = "3 classes and 3 heads eeg_to_spec, 3 heads spec_to_eeg"
    for other, theirs in ((new_accumulator(rows, 7), ours.replace("3", "7", 1)), (grouped, f"{ours}, in patients")):
        with pytest.raises(ShapeError, match=f"recorded: {ours} in one place, {theirs} in another[.]"):
            first + other


def test_maps_end_when_token_counts_change_and_numbers_go_on(samples):
    accumulator = accumulate(samples, [torch.arange(SAMPLES)])
    there, back, classes, outcomes, tied = make_samples(1)
    accumulator = add(accumulator, rows_of(*_shorter(there, back)), classes, outcomes, tied)
    summary = LayerSummary(accumulator)
    assert summary.maps == {}
    assert summary.samples == 2 * SAMPLES


def _shorter(there, back):
    there, back = there[..., :4], back[:, :, :4]
    return there / there.sum(-1, keepdim=True), back


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, SAMPLES), cut=st.integers(1, SAMPLES - 1), seed=st.integers(0, 10**6))
def test_any_order_in_any_batches_and_processes_is_the_same(size, cut, seed):
    samples = make_samples()
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))
    whole = accumulate(samples, [torch.arange(SAMPLES)])
    parts = accumulate(samples, in_batches(order[:cut], size)) + accumulate(samples, in_batches(order[cut:], size))
    for name, values in tensors_of(whole).items():
        torch.testing.assert_close(tensors_of(parts)[name], values, rtol=1e-5, atol=1e-6, msg=name)
    # A score within rounding of a bin's edge may change its bin with the batch.
    shift = (histograms_of(parts).cumsum(-1) - histograms_of(whole).cumsum(-1)).abs()
    assert shift.max() <= 1
    assert (shift > 0).sum() <= 2


def histograms_of(accumulator):
    """Counts by outcome, score and bin."""
    sums = accumulator.settled().scores_by_group
    counts = torch.zeros(3, len(SCORES), BINS, dtype=torch.float64)
    return counts.index_put(tuple(sums.keys[:, 1:].T), sums.sums, accumulate=True)


def test_the_smallest_and_the_largest_score_are_counted():
    """Seven samples, of which one has no confidence."""
    rows = rows_of(*(x[5:12] for x in make_samples()[:2]))
    scores = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0, torch.nan])
    outcomes = torch.tensor([INCORRECT, INCORRECT, INCORRECT, CORRECT, CORRECT, UNKNOWN, CORRECT])
    statistics = sample_statistics(rows).with_column(CONFIDENCE, scores)
    empty = LayerAccumulator.empty(rows, tuple(statistics), CLASSES)
    found = empty.add(rows, statistics, torch.zeros(7).long(), outcomes, torch.zeros(7))
    counts = histograms_of(found)[:, list(SCORES).index(CONFIDENCE)]
    expected = torch.zeros(3, BINS, dtype=torch.float64)
    for outcome, (lowest, highest) in {INCORRECT: (2, 1), CORRECT: (1, 1), UNKNOWN: (0, 1)}.items():
        expected[outcome, 0], expected[outcome, -1] = lowest, highest
    assert torch.equal(counts, expected)


def grouped_sums(samples):
    """Sums of all samples, of seven groups."""
    there, back, classes, outcomes, tied = samples
    rows = rows_of(there, back)
    statistics = sample_statistics(rows)
    accumulator = LayerAccumulator.empty(rows, tuple(statistics), CLASSES, "patients")
    return accumulator.add(rows, statistics, classes, outcomes, tied, torch.arange(SAMPLES) % 7)


def test_groups_of_a_class_and_an_outcome(samples):
    _, _, classes, outcomes, _ = samples
    summary, groups = LayerSummary(grouped_sums(samples)), torch.arange(SAMPLES) % 7
    defined = ~torch.tensor(expected_numbers(samples)["alignment"]).isnan()
    for class_id, outcome in EVERYTHING.values():
        chosen = torch.ones(SAMPLES, dtype=torch.bool) if class_id is None else classes == class_id
        chosen = chosen if outcome is None else chosen & (outcomes == outcome)
        assert summary.groups(class_id=class_id, outcome=outcome) == len(groups[chosen].unique())
        assert summary.groups(ALIGNMENT, class_id, outcome) == len(groups[chosen & defined].unique())


def test_classes_that_are_put_together(samples):
    """Classes 2 and 0 stay, in this order; class 1 is all others, and samples without a class stay so."""
    there, back, classes, outcomes, tied = samples
    found = LayerSummary(grouped_sums(samples).with_classes([2, 0]))
    named = torch.tensor([1, 2, 0, CLASSES])[classes]
    expected = LayerSummary(grouped_sums((there, back, named, outcomes, tied)))
    assert found.n_classes == 3
    for column in found.columns:
        for class_id in (None, 0, 1, 2, 3) if column.head is None else (None,):
            for outcome in (None, CORRECT, INCORRECT) if column.head is None else (None,):
                assert found.count(column, class_id, outcome) == expected.count(column, class_id, outcome)
                mean = expected.mean(column, class_id, outcome)
                assert found.mean(column, class_id, outcome) == pytest.approx(mean, nan_ok=True)
                std = expected.std(column, class_id, outcome)
                assert found.std(column, class_id, outcome) == pytest.approx(std, nan_ok=True)
                interval = expected.interval(column, class_id, outcome)
                assert found.interval(column, class_id, outcome) == pytest.approx(interval, nan_ok=True)
    assert found.unclassified == expected.unclassified == (classes == CLASSES).sum()
    for direction in (DIRECTION, DIRECTION.opposite):
        torch.testing.assert_close(found.maps[direction], expected.maps[direction], equal_nan=True)
    for score in (ALIGNMENT, ENTROPY):
        assert vars(found.compare(score)) == pytest.approx(vars(expected.compare(score)), nan_ok=True)


def test_sums_without_labels_are_those_of_samples_that_never_had_any(samples):
    there, back, classes, *_ = samples
    found = grouped_sums(samples).without_labels()
    nothing = torch.full_like(classes, -1), torch.full_like(classes, UNKNOWN), torch.zeros(SAMPLES, dtype=torch.bool)
    rows = rows_of(there, back)
    statistics = sample_statistics(rows)
    never = LayerAccumulator.empty(rows, tuple(statistics), 0, "patients")
    expected = never.add(rows, statistics, *nothing, torch.arange(SAMPLES) % 7)
    assert (found.columns, found.n_classes, found.heads) == (expected.columns, 0, expected.heads)
    for name, values in tensors_of(expected).items():
        torch.testing.assert_close(tensors_of(found)[name], values, rtol=1e-5, atol=1e-6, msg=name)


def test_one_direction_and_no_classes():
    there, _, _, outcomes, tied = make_samples()
    rows = prepare_layer(Attention(DIRECTION, there))
    accumulator = new_accumulator(rows, 0)
    accumulator = add(accumulator, rows, torch.full((SAMPLES,), -1), outcomes, tied)
    summary = LayerSummary(accumulator)
    assert ALIGNMENT not in summary.columns
    assert summary.undefined_share() == pytest.approx(1 / SAMPLES)  # the sample whose rows are all broken
    assert summary.n_classes == 0
    torch.testing.assert_close(summary.maps[DIRECTION][0].float(), there.nanmean((0, 1)))


def test_sums_made_in_inference_mode_go_on_outside_of_it(samples):
    with torch.inference_mode():
        accumulator = accumulate(samples, [torch.arange(10)])
    there, back, classes, outcomes, tied = (x[10:] for x in samples)
    accumulator = add(accumulator, rows_of(there, back), classes, outcomes, tied)
    whole = accumulate(samples, [torch.arange(SAMPLES)])
    torch.testing.assert_close(accumulator.cpu().totals, whole.cpu().totals)
