"""Which samples are kept: the same whatever the order, the batches and the processes."""

import pytest
import torch

from lightning_xattn.attribution.bottom_k import NOT_KEPT, BottomKSample, hashed, smallest

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
    pool = BottomKSample(60)
    for batch in shuffled.split(batch_size):
        pool.add(rows_of(batch))
    assert torch.equal(pool.settled()["key"], expected)
    parts = [BottomKSample(60), BottomKSample(60)]
    for i, batch in enumerate(shuffled.split(batch_size)):
        parts[i % 2].add(rows_of(batch))
    settled = [one.settled() for one in parts if one.settled() is not None]
    assert torch.equal(smallest(settled, 60)["key"], expected)


def test_memory_is_bounded_and_a_snapshot_stays():
    pool = BottomKSample(20)
    for batch in KEYS.split(5):
        pool.add(rows_of(batch))
        assert sum(len(part["hash"]) for part in pool._parts) < 45
    before = pool.snapshot()
    kept = before.settled()["key"]
    pool.add({"hash": torch.zeros(20, dtype=torch.int64), "key": torch.zeros(20, dtype=torch.int64)})
    assert torch.equal(before.settled()["key"], kept)
    assert (pool.settled()["key"] == 0).all()


def test_rows_that_are_not_to_be_kept_never_are():
    pool = BottomKSample(20)
    assert pool.settled() is None
    pool.add({"hash": torch.tensor([NOT_KEPT, 3, NOT_KEPT]), "key": torch.arange(3)})
    assert pool.settled()["key"].tolist() == [1]
