"""What is kept of the samples that enter a fusion: the same of several processes as of one."""

import pytest
import torch

from lightning_xattn.attribution.bottom_k import hashed
from lightning_xattn.attribution.kept_samples import FusionPart, merge_parts
from lightning_xattn.functional.outcomes import UNKNOWN

SHORT, LONG = 3, 5


def rows_of(keys):
    """What is read of samples: of each all its numbers say which one it is."""
    columns = {"hash": hashed(keys, 0), "group": keys // 4, "class": keys % 3, "target": keys % 3, "correct": keys % 2}
    columns |= {"prediction": keys % 3, "confidence": keys / 60}
    return columns | {"features/a": keys[:, None] + torch.tensor([0.0, 0.5])}


def geometry_of(keys, tokens):
    return {
        "hash": hashed(keys, 0),
        "group": keys // 4,
        "tokens/a/0": keys[:, None, None].expand(-1, tokens, 2).float(),
    }


def part_of(keys, is_partial=False, left_out=0):
    """One process's part; odd samples have more tokens than even ones."""
    by_tokens = [(keys[keys % 2 == odd], tokens) for odd, tokens in ((0, SHORT), (1, LONG))]
    token_shapes = tuple(geometry_of(some, tokens) for some, tokens in by_tokens if len(some))
    return FusionPart(("a", "b"), rows_of(keys), token_shapes, "patients", is_partial, left_out)


def in_order(keys):
    return keys[hashed(keys, 0).argsort()]


KEYS = torch.arange(60)


def assert_same(columns, expected):
    assert set(columns) == set(expected)
    for name, values in expected.items():
        assert torch.equal(columns[name], values), name


@pytest.mark.parametrize("sizes", [(100, 100), (20, 7), (1, 1)])
def test_parts_of_several_processes_are_that_of_one(sizes):
    """The second has even samples alone, so that token_shapes do not stand in the same places."""
    parts = [KEYS[:20], KEYS[20:40:2], torch.cat([KEYS[21:40:2], KEYS[40:]])]
    merged = merge_parts([part_of(keys) for keys in parts], sizes)
    assert_same(merged.rows, rows_of(in_order(KEYS)[: sizes[0]]))
    assert len(merged.token_shapes) == 2
    for found, odd, tokens in zip(merged.token_shapes, (0, 1), (SHORT, LONG), strict=True):
        assert_same(found, geometry_of(in_order(KEYS[odd::2])[: sizes[1]], tokens))
    assert (merged.modalities, merged.group_noun) == (("a", "b"), "patients")
    assert (merged.is_partial, merged.left_out) == (False, 0)


@pytest.mark.parametrize("partial", [(True, False), (False, True)])
def test_what_one_process_left_out_is_left_out_of_all(partial):
    parts = [
        part_of(KEYS[places], is_partial=one, left_out=left_out)
        for places, one, left_out in zip((slice(30), slice(30, None)), partial, (2, 3), strict=True)
    ]
    merged = merge_parts(parts, (100, 100))
    assert (merged.is_partial, merged.left_out) == (True, 5)
    assert merge_parts(parts[:1], (1, 1)) is parts[0]


def test_a_part_without_labels_keeps_everything_else():
    part = part_of(KEYS, left_out=4)
    bare = part.without_labels()
    labels = {"class": -1, "target": -1, "prediction": -1, "correct": UNKNOWN}
    unknown = {name: torch.full_like(KEYS, value) for name, value in labels.items()}
    confidence = bare.rows.pop("confidence")
    assert confidence.isnan().all()
    assert_same(bare.rows, {name: one for name, one in part.rows.items() if name != "confidence"} | unknown)
    assert bare.token_shapes is part.token_shapes
    assert (bare.left_out, bare.group_noun, bare.modalities) == (4, "patients", ("a", "b"))
    moved = part.cpu()
    assert_same(moved.rows, part.rows)
    for ours, theirs in zip(moved.token_shapes, part.token_shapes, strict=True):
        assert_same(ours, theirs)
