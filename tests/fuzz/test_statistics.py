"""Any attention, however masked and broken: each number of the table of statistics is the reference's."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from lightning_xattn import functional as F
from lightning_xattn.core.attention import Attention, Direction, row_sum_tolerance
from lightning_xattn.evaluation.statistics import STATISTICS, Column, sample_statistics
from lightning_xattn.functional import ROW_STATISTICS, prepare_layer, prepare_rows
from tests import reference
from tests.fuzz.examples import fuzz

# Of numpy's, where the reference adds up a row with inf and -inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")

DIRECTION = Direction("eeg", "spec")
BROKEN = ["nan", "inf", "-inf", "does not sum to one", "zero"]
MASKS = st.sampled_from([None, "all", "by query", "by head"])


@st.composite
def cases(draw):
    return {
        "samples": draw(st.integers(0, 3)),
        "heads": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "tokens": draw(st.tuples(st.integers(1, 5), st.integers(1, 7))),
        "both": draw(st.booleans()),
        "extra_keys": draw(st.integers(0, 2)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])),
        "scale": draw(st.sampled_from([0.1, 1.0, 5.0, 100.0])),
        "padding": draw(st.booleans()),
        "visible": draw(st.tuples(MASKS, MASKS)),
        "broken": draw(st.lists(st.sampled_from(BROKEN), max_size=2)),
        "cross_modal_mass": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


def make_direction(case, direction, shape, masks, visible, generator):
    """Attention of a case in one direction, whose padding is ``masks`` of its queries and keys."""
    samples, heads, queries, keys = shape
    forms = {"all": (1, 1, 1, keys), "by query": (1, 1, queries, keys), "by head": (samples, heads, queries, keys)}
    sees = None if visible is None else torch.rand(forms[visible], generator=generator) > 0.3
    hidden = torch.zeros(shape, dtype=torch.bool) if sees is None else ~sees.expand(shape)
    if masks[1] is not None:
        hidden = hidden | ~masks[1][:, None, None]
    logits = case["scale"] * torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)  # NaN where nothing is seen
    # Of smaller ones the squares are 0 in float32, so that maps of such weights alone would have no variance.
    weights = weights.masked_fill(weights < 1e-12, 0).to(case["dtype"])
    for how in case["broken"] if samples else ():
        cell = tuple(int(torch.randint(size, (), generator=generator)) for size in shape)
        if how == "does not sum to one":
            weights[cell[:3]] *= 1.1
        else:
            weights[cell] = 0.0 if how == "zero" else float(how)
    shares = torch.rand(samples, heads, queries, generator=generator) if case["cross_modal_mass"] else None
    return Attention(direction, weights, masks[1], sees, masks[0], 0 if case["both"] else case["extra_keys"], shares)


def make(case):
    """Both directions, or one."""
    generator = torch.Generator().manual_seed(case["seed"])
    (there, back), (queries, keys), samples = case["heads"], case["tokens"], case["samples"]
    keys += 0 if case["both"] else case["extra_keys"]
    masks = [None, None]
    if case["padding"]:
        masks = [torch.rand(samples, count, generator=generator) > 0.3 for count in (queries, keys)]
    forward = (samples, there, queries, keys), masks, case["visible"][0]
    backward = (samples, back, keys, queries), masks[::-1], case["visible"][1]
    made = [make_direction(case, DIRECTION, *forward, generator)]
    return made + [make_direction(case, DIRECTION.opposite, *backward, generator)] * case["both"]


def sample(attention, b):
    """Weights, queries and keys as the reference takes them: in float64, those of half precision scaled to sum to 1."""
    weights, dtype = attention.weights[b].double().numpy(), attention.weights.dtype
    keys = np.ones(weights.shape, bool)
    if attention.key_mask is not None:
        keys &= attention.key_mask[b].numpy()
    if attention.visible is not None:
        keys &= attention.visible.expand(attention.weights.shape)[b].numpy()
    if dtype.itemsize < 4:
        total = np.where(keys, weights, 0).sum(-1, keepdims=True)
        with np.errstate(invalid="ignore"):
            weights = np.where(abs(total - 1) <= row_sum_tolerance(dtype), weights / total, weights)
    return weights, None if attention.query_mask is None else attention.query_mask[b].numpy(), keys


def real_keys(attention, b):
    """Which keys are tokens that neither padding hides nor, unless it is a block of a larger attention, its mask."""
    keys = np.ones(attention.weights.shape[1:], bool)
    if attention.key_mask is not None:
        keys &= attention.key_mask[b].numpy()
    if attention.visible is not None and attention.cross_modal_mass is None:
        keys &= attention.visible.expand(attention.weights.shape)[b].numpy()
    keys[..., attention.weights.shape[3] - attention.extra_keys :] = False
    return keys


def pair_of(forward, backward):
    """Both directions of a sample as the reference takes them."""
    (there, eeg, there_sees), (back, spec, back_sees) = forward, backward
    return there, back, eeg, spec, there_sees, back_sees


def of_direction(attention, b):
    """By statistic, what the reference says of each head of a sample, or of all heads."""
    weights, queries, keys = of_sample = sample(attention, b)
    real = np.ones(weights.shape[1], bool) if queries is None else queries
    found = reference.row_statistics(*of_sample) | {
        "query_selectivity": reference.query_selectivity(*of_sample),
        "head_diversity": [reference.head_diversity(*of_sample)],
        "sink": reference.sink(*of_sample),
        "sink_excess": reference.sink_excess(*of_sample),
        "broken": (real & keys.any(-1) & ~reference.valid_rows(*of_sample)).sum(1),
    }
    if attention.cross_modal_mass is not None:
        found["cross_modal_mass"] = [
            reference.mean_defined(of_head[real]) for of_head in attention.cross_modal_mass[b].numpy()
        ]
    return {name: values for name, values in found.items() if name in STATISTICS}


def expected(made, b):
    """By column, what the reference says of a sample."""
    samples, numbers = [sample(attention, b) for attention in made], {}
    for attention in made:
        for name, values in of_direction(attention, b).items():
            levels, column = STATISTICS[name].levels, f"{attention.direction}/{name}"
            if "head" in levels:
                numbers |= {f"{column}/head_{head}": of_head for head, of_head in enumerate(values)}
            if "direction" in levels:
                numbers[column] = reference.mean_defined(values)
    numbers["entropy"] = reference.mean_defined([numbers[f"{attention.direction}/entropy"] for attention in made])
    numbers["wholly_masked"] = float(
        any(
            reference.wholly_masked(weights, queries, real_keys(one, b))
            for one, (weights, queries, _) in zip(made, samples, strict=True)
        )
    )
    numbers["invalid_rows"] = sum((~reference.valid_rows(*one)).sum() for one in samples)
    if len(made) == 2:
        numbers["alignment"] = reference.alignment(*pair_of(*samples))
    return numbers


def compare(ours, theirs, name):
    # The rounding of a correlation grows as its maps vary less.
    rounding = 1e-3 if "alignment" in name else 2e-5
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=rounding, err_msg=name)


@fuzz(cases(), some=60, many=400)
def test_any_statistics(case):
    made = make(case)
    check_what_figures_show(case, made)
    numbers = sample_statistics(prepare_layer(*made))
    assert all(values.shape == (case["samples"],) for values in numbers.values())
    for b in range(case["samples"]):
        of_sample = expected(made, b)
        assert set(map(str, numbers)) == set(of_sample)
        for name, value in of_sample.items():
            compare(numbers[Column.parse(name)][b], value, name)


def check_what_figures_show(case, made):
    rows = [prepare_rows(attention) for attention in made]
    for attention, one in zip(made, rows, strict=True):
        samples = [sample(attention, b) for b in range(case["samples"])]
        tokens = attention.tokens
        for b, of_sample in enumerate(samples):
            theirs = reference.row_statistics(*of_sample)
            for name, function in ROW_STATISTICS.items():
                compare(function(one)[b], theirs[name], name)
            compare(F.lift(one)[b], reference.lift(*of_sample)[..., :tokens], "lift")
            compare(F.lift_map(one)[b], reference.lift_map(*of_sample)[:, :tokens], "lift_map")
            compare(F.received_lift(one)[b], reference.received_lift(*of_sample)[:tokens], "received_lift")
            compare(F.received_attention(one)[b], reference.received_attention(*of_sample)[:tokens], "received")
    if len(made) == 2:
        for b in range(case["samples"]):
            pair = pair_of(*(sample(attention, b) for attention in made))
            compare(F.head_alignment_matrix(*rows)[b], reference.head_alignment_matrix(*pair), "head_alignment_matrix")
