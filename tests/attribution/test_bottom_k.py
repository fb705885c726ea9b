"""Which samples are kept: the same whatever the order, the batches and the processes."""

import pytest
import torch

from lightning_xattn.attribution.kept_samples import NOT_KEPT, BottomKSample, hashed

KEYS = torch.arange(500) * 7 - 1000


def rows_of(keys):
    return {"hash": hashed(keys, 0), "key": keys}


def splitmix(number):
    """Steele, Lea and Flood 2014, in Python's whole numbers."""
    whole = 2**64
    x = (number + 0x9E3779B97F4A7C15) % whole
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % whole
    x = (x ^ x >> 27) * 0x94D049BB133111EB % whole
    return x ^ x >> 31


def test_the_hash_is_splitmix64():
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345])
    assert hashed(keys, 0).tolist() == [splitmix(key % 2**64) % 2**63 for key in keys.tolist()]


def test_hashes_are_even_and_differ_by_salt():
    first, second = hashed(KEYS, 0), hashed(KEYS, 1)
    assert len(first.unique()) == len(KEYS)
    assert first.min() >= 0
    assert first.max() < NOT_KEPT
    assert (first / 2**63).mean() == pytest.approx(0.5, abs=0.05)
    assert torch.corrcoef(torch.stack([first, second]).double())[0, 1].abs() < 0.1
    assert (hashed(KEYS, 1) % 5).bincount().tolist() == pytest.approx([100] * 5, abs=25)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_any_order_and_any_batches_keep_the_same(batch_size):
    expected = KEYS[hashed(KEYS, 0).argsort()[:60]]
    shuffled = KEYS[torch.randperm(500, generator=torch.Generator().manual_seed(batch_size))]
    whole, parts = BottomKSample(60), [BottomKSample(60), BottomKSample(60)]
    for i, batch in enumerate(shuffled.split(batch_size)):
        whole.add(rows_of(batch))
        parts[i % 2].add(rows_of(batch))
    for sample in (whole, parts[0] + parts[1]):
        (rows,) = sample.blocks()
        assert torch.equal(rows["key"], expected)


@pytest.mark.parametrize("lengths", [1, 7])
def test_memory_is_bounded_whatever_the_lengths_of_rows(lengths):
    sample = BottomKSample(20)
    for i, batch in enumerate(KEYS.split(5)):
        sample.add(rows_of(batch) | {"tokens": torch.zeros(len(batch), 1 + i % lengths, 2)})
        assert len(sample) < 45
    kept = {int(key) for rows in sample.blocks() for key in rows["key"]}
    assert kept == set(KEYS[hashed(KEYS, 0).argsort()[:20]].tolist())
    assert len(sample.blocks()) == lengths


@pytest.mark.parametrize("cut", [0, 1, 100, 250])
def test_a_size_that_shrinks_leaves_what_it_would_have_left_from_the_start(cut):
    parts = [BottomKSample(60), BottomKSample(60)]
    for sample, keys in zip(parts, (KEYS[:cut], KEYS[cut:]), strict=True):
        for batch in keys.split(7):
            sample.add(rows_of(batch))
    parts[1].size = 20
    (rows,) = (parts[0] + parts[1]).blocks()
    assert torch.equal(rows["key"], KEYS[hashed(KEYS, 0).argsort()[:20]])


def test_rows_that_must_not_be_kept_never_are():
    sample = BottomKSample(20)
    assert sample.blocks() == []
    sample.add({"hash": torch.tensor([NOT_KEPT, 3, NOT_KEPT]), "key": torch.arange(3)})
    assert [rows["key"].tolist() for rows in sample.blocks()] == [[1]]


def test_a_change_of_columns_leaves_the_sample_as_it_is():
    sample = BottomKSample(20)
    sample.add(rows_of(KEYS))
    (rows,), (changed,) = sample.blocks(), sample.map(lambda one: one | {"key": -one["key"]}).blocks()
    assert torch.equal(changed["key"], -rows["key"])
    assert torch.equal(sample.blocks()[0]["key"], rows["key"])
