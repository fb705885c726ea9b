"""Attention with its masks: cut, marked, paired, and refused where parts do not fit."""

import math
import re

import numpy as np
import pytest
import torch

from lightning_xattn import AttentionPair, TokenAxis
from lightning_xattn.core.attention import Attention, Direction, fitting_axes, mask_queries
from lightning_xattn.core.errors import SettingError, ShapeError
from tests.messages import tells

BATCH, HEADS, QUERIES, KEYS = 4, 2, 3, 5
THERE = Direction("eeg", "spec")


def attention(batch=BATCH, seed=0, direction=THERE, **changed):
    """With every mask, and weights that say which sample they are of."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (QUERIES, KEYS) if direction == THERE else (KEYS, QUERIES)
    masks = {
        "key_mask": torch.rand(batch, keys, generator=generator) > 0.3,
        "visible": torch.rand(batch, HEADS, queries, keys, generator=generator) > 0.3,
        "query_mask": torch.rand(batch, queries, generator=generator) > 0.3,
        "cross_modal_mass": torch.rand(batch, HEADS, queries, generator=generator),
    }
    weights = torch.rand(batch, HEADS, queries, keys, generator=generator).softmax(-1)
    return Attention(direction, weights, **masks | changed)


TENSORS = ("weights", "key_mask", "visible", "query_mask", "cross_modal_mass")


def assert_same(one, other):
    for name in TENSORS:
        ours, theirs = getattr(one, name), getattr(other, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or torch.equal(ours, theirs), name
    assert (one.direction, one.extra_keys) == (other.direction, other.extra_keys)


def test_some_of_the_samples_take_their_masks_along():
    whole = attention(extra_keys=1)
    cut = whole[1:3]
    for name in TENSORS:
        assert torch.equal(getattr(cut, name), getattr(whole, name)[1:3]), name
    assert (cut.direction, cut.extra_keys) == (THERE, 1)
    bare = attention(**dict.fromkeys(TENSORS[1:]))[1:3]
    assert [getattr(bare, name) for name in TENSORS[1:]] == [None] * 4
    shared = whole.visible[:1]
    assert torch.equal(attention(visible=shared)[2:].visible, shared), "one mask for all samples stays"
    alone = attention(batch=1)
    assert_same(alone[:1], alone)
    assert len(alone[1:].weights) == len(alone[1:].visible) == 0


def test_pairs_are_cut_by_direction():
    pair = AttentionPair("fusion", attention(3, 0), attention(3, 9, THERE.opposite))
    cut = pair[1:3]
    assert cut.layer == "fusion"
    for ours, whole in zip(cut.directions, pair.directions, strict=True):
        assert_same(ours, whole[1:3])
    alone = AttentionPair("fusion", pair.forward)[1:3]
    assert alone.backward is None
    assert_same(alone.cpu().forward, pair.forward[1:3])


def test_what_is_moved_is_the_same_without_its_gradient():
    weights = torch.full((1, 1, 2, 2), 0.5, requires_grad=True)
    moved = Attention(THERE, weights, extra_keys=1).cpu()
    assert not moved.weights.requires_grad
    assert_same(moved, Attention(THERE, weights.detach(), extra_keys=1))
    whole = attention()
    assert_same(whole.cpu(), whole)


def test_weights_are_marked_where_a_mask_hides_the_key_or_the_query_is_padding():
    whole = attention()
    for b in range(BATCH):
        for h in range(HEADS):
            for q in range(QUERIES):
                for k in range(KEYS):
                    shown = whole.key_mask[b, k] and whole.visible[b, h, q, k] and whole.query_mask[b, q]
                    marked = whole.marked_weights[b, h, q, k]
                    assert marked == whole.weights[b, h, q, k] if shown else marked.isnan()
    bare = attention(**dict.fromkeys(TENSORS[1:]))
    assert torch.equal(bare.marked_weights, bare.weights)
    again = Attention.of_weights(THERE, whole.marked_weights)
    assert torch.equal(again.visible, ~whole.marked_weights.isnan())
    assert torch.equal(again.weights, whole.marked_weights.nan_to_num(0))
    assert (again.direction, again.key_mask, again.query_mask) == (THERE, None, None)


def test_slots_are_keys_and_no_tokens():
    one = attention(extra_keys=2)
    assert one.tokens == KEYS - 2
    assert one.token_counts == {"eeg": QUERIES, "spec": KEYS - 2}
    assert AttentionPair("x", one, Attention(THERE.opposite, torch.ones(BATCH, 1, KEYS - 2, QUERIES))).backward
    with pytest.raises(ShapeError, match=tells("'x'", f"queries={KEYS - 2}, keys={QUERIES}")):
        AttentionPair("x", one, attention(direction=THERE.opposite))


@pytest.mark.parametrize(
    "wrong",
    [
        {"key_mask": torch.ones(BATCH, QUERIES, dtype=torch.bool)},
        {"query_mask": torch.ones(BATCH, KEYS, dtype=torch.bool)},
        {"query_mask": torch.ones(1, QUERIES, dtype=torch.bool)},
        {"cross_modal_mass": torch.ones(BATCH, QUERIES)},
    ],
)
def test_a_mask_that_does_not_fit_is_refused(wrong):
    ((name, mask),) = wrong.items()
    with pytest.raises(ShapeError, match=tells(name, "eeg_to_spec", f"got {tuple(mask.shape)}")):
        attention(**wrong)
    with pytest.raises(ShapeError, match=tells("eeg_to_spec", "(batch, heads, queries, keys)", (BATCH, QUERIES, KEYS))):
        Attention(THERE, torch.ones(BATCH, QUERIES, KEYS))


def test_directions_that_are_no_opposites_and_samples_that_differ_are_no_pair():
    with pytest.raises(ShapeError, match=tells("'x'", "pairs eeg_to_spec with eeg_to_spec", "expected spec_to_eeg")):
        AttentionPair("x", attention(), attention())
    with pytest.raises(ShapeError, match=tells("'x'", f"batch={BATCH}")):
        AttentionPair("x", attention(), attention(BATCH - 1, direction=THERE.opposite))


@pytest.mark.parametrize(
    ("query", "key"), [("a", "a"), ("", "a"), ("a", ""), ("a_to_b", "c"), ("a", "b/c"), ("a/b", "c")]
)
def test_names_that_a_direction_could_not_be_read_back_from_are_refused(query, key):
    with pytest.raises(SettingError, match=re.escape(f"got '{query}_to_{key}'")):
        Direction(query, key)


def test_a_mask_of_queries_goes_to_the_modality_that_asks_alone():
    mask = torch.arange(QUERIES) < torch.tensor([[1], [2], [3], [2]])
    bare = dict.fromkeys(TENSORS[1:])
    alone = AttentionPair("one", attention(**bare))
    both = AttentionPair("two", attention(**bare), attention(direction=THERE.opposite, **bare))
    other = AttentionPair("three", attention(direction=Direction("spec", "eeg"), **bare))
    masked = mask_queries([both, alone, other], mask)
    assert [pair.layer for pair in masked] == ["two", "one", "three"]
    assert masked[0] is both, "the keys of the opposite direction tell which queries are tokens"
    assert torch.equal(masked[1].forward.query_mask, mask)
    assert torch.equal(masked[1].forward.weights, alone.forward.weights)
    assert masked[2] is other, "another modality asks"
    assert mask_queries([both, alone], None) == (both, alone)


def test_an_axis_gives_the_place_of_a_token():
    spans = TokenAxis("time (s)", spans=[(0, 10), (5.5, 15), (10, 20), (15, 25)])
    names = TokenAxis("region", names=["left", "right"])
    assert [spans.place(token) for token in range(len(spans))] == ["0 to 10", "5.5 to 15", "10 to 20", "15 to 25"]
    assert [names.place(token) for token in range(len(names))] == ["left", "right"]
    axes = {"eeg": spans, "spec": names}
    assert fitting_axes(axes, {"eeg": 4, "spec": 2, "ecg": 2}) == axes
    assert fitting_axes(axes, {"eeg": 3, "spec": 2}) == {"spec": names}
    for both in ({}, {"spans": [(0, 1)], "names": ["a"]}):
        with pytest.raises(SettingError, match=tells("'time'", "either (start, stop)", "or a name")):
            TokenAxis("time", **both)
    late, backwards = [(5, 8), (0, 3)], [(3, 0)]
    for wrong in ([], 3, "ab", [(0, 1, 2)], [(0, math.nan)], [(0, math.inf)], late, backwards, [("a", "b")]):
        with pytest.raises(SettingError, match=tells("'time'", "(start, stop) of each token", repr(wrong))):
            TokenAxis("time", spans=wrong)
    for wrong in ([], 3, "ab", ["a", ""], ["a", 3], {"a", "b"}):
        with pytest.raises(SettingError, match=tells("'region'", "a name for each token", repr(wrong))):
            TokenAxis("region", names=wrong)
    with pytest.raises(SettingError, match=tells("TokenAxis 3 needs a title")):
        TokenAxis(3, names=["a"])


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_spans_may_be_an_array(make):
    axis = TokenAxis("time (s)", spans=make([[0.0, 1.0], [1.0, 2.0]]))
    assert (len(axis), axis.place(1)) == (2, "1 to 2")
    assert repr(axis) == "TokenAxis('time (s)', 2 tokens: 0 to 1, 1 to 2)"
