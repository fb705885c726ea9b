"""Samples in any batches, processes and order: sums, intervals and comparisons are those of a list of all samples."""

import math
from functools import reduce
from itertools import product
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy import stats

from lightning_xattn.core.attention import Attention, Direction
from lightning_xattn.evaluation.accumulators import LayerAccumulator
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.statistics import CONFIDENCE, ENTROPY, SCORES, STATISTICS, sample_statistics
from lightning_xattn.functional import prepare_layer
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT, UNKNOWN
from tests import reference
from tests.fuzz.examples import fuzz

DIRECTION, CLASSES = Direction("eeg", "spec"), 3


@st.composite
def cases(draw, fewest=1):
    return {
        "samples": draw(st.integers(fewest, fewest + 40)),
        "heads": draw(st.integers(1, 3)),
        "both": draw(st.booleans()),
        "broken": draw(st.sampled_from(["nothing", "rows", "samples", "everything"])),
        "few_values": draw(st.booleans()),
        "groups": draw(st.sampled_from([None, 2, 7, 40])),
        "largest_batch": draw(st.integers(1, 12)),
        "processes": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 10**6)),
    }


def make(case):
    """Weights of both directions and what is known of each sample."""
    generator, n = torch.Generator().manual_seed(case["seed"]), case["samples"]
    there = torch.randn(n, case["heads"], 3, 5, generator=generator)
    back = there.mT + torch.randn(n, case["heads"], 5, 3, generator=generator)
    broken = torch.zeros(there.shape[:3], dtype=torch.bool)
    if case["broken"] == "rows":
        broken = torch.rand(broken.shape, generator=generator) < 0.05
    elif case["broken"] != "nothing":
        share = 0.3 if case["broken"] == "samples" else 1
        broken = broken | (torch.rand(n, 1, 1, generator=generator) < share)
    confidence = torch.rand(n, generator=generator)
    columns = {
        "there": torch.where(broken[..., None], torch.nan, there.softmax(-1)),
        "back": back.softmax(-1),
        # Few different scores are ties.
        "confidence": (confidence * 3).round() / 3 if case["few_values"] else confidence,
        "class": torch.randint(-1, CLASSES + 1, (n,), generator=generator),
        "outcome": torch.randint(3, (n,), generator=generator),
        "tied": torch.rand(n, generator=generator) < 0.2,
    }
    columns["confidence"][torch.rand(n, generator=generator) < 0.1] = torch.nan
    if case["groups"]:
        columns["group"] = torch.randint(case["groups"], (n,), generator=generator)
    return columns, generator


def rows_and_numbers(case, columns):
    attention = [Attention(DIRECTION, columns["there"]), Attention(DIRECTION.opposite, columns["back"])]
    layer = prepare_layer(*attention[: 1 + case["both"]])
    return layer, sample_statistics(layer).with_column(CONFIDENCE, columns["confidence"])


def add_up(case, columns, parts):
    """The sums of each part, which is a list of batches, merged."""
    sums = []
    for batches in parts:
        accumulator = None
        for batch in batches:
            taken = {name: values[batch] for name, values in columns.items()}
            rows, numbers = rows_and_numbers(case, taken)
            noun = case["groups"] and "patients"
            accumulator = accumulator or LayerAccumulator.empty(rows, tuple(numbers), CLASSES, noun)
            labels = taken["class"], taken["outcome"], taken["tied"], taken.get("group")
            accumulator = accumulator.add(rows, numbers, *labels)
        sums += [accumulator] if accumulator else []
    return LayerSummary(reduce(add, sums))


def deal_out(case, generator):
    """Shuffled samples in batches of any size, dealt out to processes of which some may have none."""
    order, parts = torch.randperm(case["samples"], generator=generator), [[] for _ in range(case["processes"])]
    while len(order):
        size = int(torch.randint(1, case["largest_batch"] + 1, (), generator=generator))
        parts[int(torch.randint(case["processes"], (), generator=generator))].append(order[:size])
        order = order[size:]
    return parts


def close(ours, theirs, **tolerance):
    np.testing.assert_allclose(ours, theirs, **{"rtol": 1e-6, "atol": 1e-8} | tolerance)


@fuzz(cases(), some=6, many=60)
def test_sums_and_maps_are_those_of_all_samples(case):
    columns, generator = make(case)
    summary = add_up(case, columns, deal_out(case, generator))
    check_maps(case, columns, summary)
    _, numbers = rows_and_numbers(case, columns)
    classes, outcomes = columns["class"].numpy(), columns["outcome"].numpy()
    assert summary.samples == case["samples"]
    assert summary.ties == columns["tied"].sum()
    assert summary.unclassified == ((classes < 0) | (classes >= CLASSES)).sum()
    for (column, values), class_id, outcome in product(
        numbers.items(), [None, *range(CLASSES)], [None, CORRECT, INCORRECT, UNKNOWN]
    ):
        if column.head is not None and (class_id, outcome) != (None, None):  # sums of all samples alone
            continue
        of_class = class_id is None or classes == class_id
        chosen = np.broadcast_to(of_class & (outcome is None or outcomes == outcome), len(classes))
        theirs = values.double().numpy()[values.isfinite().numpy() & chosen]
        assert summary.count(column, class_id, outcome) == len(theirs)
        close(summary.mean(column, class_id, outcome), theirs.mean() if len(theirs) else np.nan)
        std = theirs.std(ddof=1) if len(theirs) > 1 else np.nan
        close(summary.std(column, class_id, outcome), std, atol=1e-6)
        interval = math.nan, math.nan
        if case["groups"] and column.head is None:
            groups = columns["group"][values.isfinite() & torch.tensor(chosen)]
            interval = reference.grouped_mean_interval(theirs.tolist(), groups.tolist())
        elif not case["groups"] and len(theirs) >= 5:
            half = stats.t.ppf(0.975, len(theirs) - 1) * std / len(theirs) ** 0.5
            interval = theirs.mean() - half, theirs.mean() + half
        width = np.nan_to_num(interval[1] - interval[0])
        interval = np.clip(interval, *STATISTICS[column.statistic].range)
        close(summary.interval(column, class_id, outcome), interval, atol=1e-4 * width + 1e-5)


def check_maps(case, columns, summary):
    there = columns["there"].double()
    for c in range(CLASSES):
        close(summary.maps[DIRECTION][c], there[columns["class"] == c].nanmean((0, 1)), rtol=1e-5)
    if case["both"]:
        pairs = list(zip(there.numpy(), columns["back"].double().numpy(), strict=True))
        defined = [(a, b) for a, b in pairs if not np.isnan(reference.alignment(a, b))]
        # A map with holes cannot be compared with that of another sample.
        whole = all(np.isfinite(a).all() for a, _ in defined)
        close(summary.alignment_null, reference.alignment_null(defined) if whole else np.nan, rtol=1e-4, atol=1e-6)


@fuzz(cases(fewest=20), some=4, many=20)
def test_comparisons_of_outcomes(case):
    columns, generator = make(case)
    summary = add_up(case, columns, deal_out(case, generator))
    _, numbers = rows_and_numbers(case, columns)
    outcomes, groups = columns["outcome"].numpy(), columns.get("group", torch.zeros(0)).numpy()
    for score, (low, high) in SCORES.items():
        if score not in numbers:
            continue
        values = numbers[score].double().numpy()
        parts = [np.isfinite(values) & (outcomes == outcome) for outcome in (CORRECT, INCORRECT)]
        found = summary.compare(score)
        assert (found.correct, found.incorrect) == tuple(part.sum() for part in parts)
        close(found.gap, np.subtract(*(values[part].mean() if part.any() else np.nan for part in parts)), atol=1e-7)
        classes = np.where((columns["class"] >= 0) & (columns["class"] < CLASSES), columns["class"], CLASSES)
        told = (parts[0] | parts[1]) & (classes < CLASSES)
        adjusted = reference.class_adjusted_gap(values[told], classes[told].tolist(), (outcomes == CORRECT)[told])
        close(found.class_adjusted_gap, adjusted, atol=1e-7)
        sizes = [len(np.unique(groups[part])) for part in parts] if case["groups"] else [part.sum() for part in parts]
        if min(sizes) < 5:
            assert np.isnan([found.auroc, found.low, found.high]).all()
            continue
        binned = [reference.binned(values[part], low, high) for part in parts]
        # A high entropy is a sign of an error, and a low value of any other score.
        sign = -1 if score == ENTROPY else 1
        binned = [sign * one for one in binned]
        auroc = stats.mannwhitneyu(*binned).statistic / (len(binned[0]) * len(binned[1]))
        # A score within rounding of a bin's edge may change its bin with the batch.
        assert found.auroc == pytest.approx(auroc, abs=1e-3)
        if case["groups"]:
            interval = reference.grouped_auroc_interval(*binned, *(groups[part].tolist() for part in parts))
        else:
            interval = reference.auroc_interval(auroc, *map(len, binned))
        assert (found.low, found.high) == pytest.approx(interval, abs=2e-3)
