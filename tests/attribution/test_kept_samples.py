"""Which samples are kept: the same whatever the order, the batches and the processes."""

import pickle
from functools import reduce
from operator import add

import pytest
import torch

from lightning_xattn.attribution.kept_samples import NOT_KEPT, BottomKSample, KeptSamples, TokenSource
from lightning_xattn.attribution.outputs import ModelOutput
from lightning_xattn.attribution.recorder import FusionRecord
from lightning_xattn.core.attention import Direction
from lightning_xattn.core.ids import hashed
from lightning_xattn.functional.outcomes import UNKNOWN

SHORT, LONG = 3, 5

KEYS = torch.arange(60)


def kept_of(keys, sizes=(100, 100)):
    """What one process keeps of samples, in one batch each; odd samples have more tokens than even ones."""
    kept = KeptSamples(BottomKSample(sizes[0]), BottomKSample(sizes[1]))
    for key in keys.tolist():
        one = torch.tensor([key])
        tokens = one[:, None, None].expand(-1, LONG if one % 2 else SHORT, 2).float()
        tokens = tokens / (one % 30 != 29)  # two samples are not finite
        output = ModelOutput(one[:, None] / 60 + torch.zeros(1, 2), torch.zeros(1, 2))
        facts = {"class": one % 3, "target": one % 3, "prediction": one % 3, "correct": one % 2, "confidence": one / 60}
        facts |= {"process": torch.zeros_like(one), "sample_idx": one}
        kept.add(FusionRecord({"a": (tokens, None)}, {("a", 0): tokens}, output), one, one // 4, "patients", facts, {})
    return kept


def in_order(keys):
    finite = keys[keys % 30 != 29]
    return finite[hashed(finite, 0).argsort()].tolist()


def samples_of(sample):
    return [rows["sample_idx"].tolist() for rows in sample.blocks()]


@pytest.mark.parametrize("sizes", [(100, 100), (20, 7), (1, 1)])
def test_those_of_several_processes_are_those_of_one(sizes):
    """The second process has even samples alone, and the last one nothing."""
    parts = [KEYS[:20], KEYS[20:40:2], torch.cat([KEYS[21:40:2], KEYS[40:]]), KEYS[:0]]
    several = [pickle.loads(pickle.dumps(kept_of(keys, sizes).cpu())) for keys in parts]
    merged, whole = reduce(add, several), kept_of(KEYS, sizes)
    assert samples_of(merged.probed) == samples_of(whole.probed) == [in_order(KEYS)[: sizes[0]]]
    permuted = in_order(KEYS)[: sizes[1]]
    by_length = [[one for one in permuted if one % 2 == odd] for odd in (0, 1)]
    assert samples_of(merged.permuted) == samples_of(whole.permuted) == [one for one in by_length if one]
    for ours, theirs in zip(merged.permuted.blocks(), whole.permuted.blocks(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (merged.modalities, merged.group_noun, int(merged.nonfinite)) == (("a",), "patients", 2)


def test_what_is_left_out_is_counted_over_processes():
    """Each of four processes leaves some out; the first and the last have not found the modalities."""
    parts = [KeptSamples(BottomKSample(9), BottomKSample(9), unrecorded=2), kept_of(KEYS[:30]), kept_of(KEYS[30:])]
    parts += [KeptSamples(BottomKSample(9), BottomKSample(9), unrecorded=5)]
    parts[1].unrecorded, parts[2].unrecorded = 7, 11
    parts[1].missing, parts[2].missing = {"a": torch.tensor(3)}, {"a": torch.tensor(4)}
    merged = reduce(add, [part.cpu() for part in parts])
    assert (merged.unrecorded, int(merged.nonfinite), merged.missing) == (25, 2, {"a": torch.tensor(7)})
    assert (parts[0] + parts[3]).unrecorded == 7
    assert reduce(add, parts[::-1]).unrecorded == 25


def test_samples_that_lack_a_modality_are_counted_for_each():
    """Of six samples a mask hides the second modality of two; one of these and another lack the first."""
    kept, keys = KeptSamples(BottomKSample(9), BottomKSample(9)), torch.arange(6)
    mask = torch.tensor([[True, False]] * 4 + [[False, False]] * 2)
    tokens = torch.ones(6, 2, 3)
    facts = {"process": torch.zeros(6).long(), "sample_idx": keys}
    present = {"a": keys % 4 != 0}
    inputs = FusionRecord({"a": (tokens, None), "b": (tokens, mask)}, {}, None)
    kept.add(inputs, keys, None, None, facts, {}, present)
    kept.add(inputs, keys + 6, None, None, facts, {})
    assert {name: int(count) for name, count in kept.missing.items()} == {"a": 2, "b": 4}
    (rows,) = kept.probed.blocks()
    assert sorted(rows["sample_idx"].tolist()) == [0, 1, 1, 2, 2, 3, 3]
    assert (int(kept.nonfinite), len(kept.permuted)) == (0, 0)


def test_a_direction_that_was_not_recorded_has_no_number_of_tokens():
    kept, keys = KeptSamples(BottomKSample(9), BottomKSample(9)), torch.arange(4)
    tokens = torch.ones(4, 2, 3)
    facts = {"process": torch.zeros(4).long(), "sample_idx": keys}
    inputs = FusionRecord({"a": (tokens, None)}, {}, ModelOutput(torch.zeros(4, 2), torch.zeros(4, 2)))
    kept.add(inputs, keys, None, None, facts, {"a_to_b": torch.ones(4, 7)})
    source, there = TokenSource(kept.permuted.blocks()), Direction("a", "b")
    assert source.token_count(there, torch.tensor([1, 2])) == 7
    assert source.token_count(there.opposite, torch.tensor([1, 2])) is None


def test_without_labels_everything_else_stays():
    kept = kept_of(KEYS)
    (rows,), (bare,) = kept.probed.blocks(), kept.without_labels().probed.blocks()
    for name, value in {"class": -1, "target": -1, "prediction": -1, "correct": UNKNOWN}.items():
        assert (bare[name] == value).all()
    assert bare["confidence"].isnan().all()
    labels = {"class", "target", "prediction", "correct", "confidence"}
    assert bare.keys() == rows.keys()
    assert all(torch.equal(bare[name], rows[name]) for name in rows.keys() - labels)
    assert kept.without_labels().permuted is kept.permuted


MANY = torch.arange(500) * 7 - 1000


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
    first, second = hashed(MANY, 0), hashed(MANY, 1)
    assert len(first.unique()) == len(MANY)
    assert first.min() >= 0
    assert first.max() < NOT_KEPT
    assert (first / 2**63).mean() == pytest.approx(0.5, abs=0.05)
    assert torch.corrcoef(torch.stack([first, second]).double())[0, 1].abs() < 0.1
    assert (hashed(MANY, 1) % 5).bincount().tolist() == pytest.approx([100] * 5, abs=25)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_any_order_and_any_batches_keep_the_same(batch_size):
    expected = MANY[hashed(MANY, 0).argsort()[:60]]
    shuffled = MANY[torch.randperm(500, generator=torch.Generator().manual_seed(batch_size))]
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
    for i, batch in enumerate(MANY.split(5)):
        sample.add(rows_of(batch) | {"tokens": torch.zeros(len(batch), 1 + i % lengths, 2)})
        assert len(sample) < 45
    kept = {int(key) for rows in sample.blocks() for key in rows["key"]}
    assert kept == set(MANY[hashed(MANY, 0).argsort()[:20]].tolist())
    assert len(sample.blocks()) == lengths


@pytest.mark.parametrize("cut", [0, 1, 100, 250])
def test_a_size_that_shrinks_leaves_what_it_would_have_left_from_the_start(cut):
    parts = [BottomKSample(60), BottomKSample(60)]
    for sample, keys in zip(parts, (MANY[:cut], MANY[cut:]), strict=True):
        for batch in keys.split(7):
            sample.add(rows_of(batch))
    parts[1].size = 20
    (rows,) = (parts[0] + parts[1]).blocks()
    assert torch.equal(rows["key"], MANY[hashed(MANY, 0).argsort()[:20]])


def test_rows_that_must_not_be_kept_never_are():
    sample = BottomKSample(20)
    assert sample.blocks() == []
    sample.add({"hash": torch.tensor([NOT_KEPT, 3, NOT_KEPT]), "key": torch.arange(3)})
    assert [rows["key"].tolist() for rows in sample.blocks()] == [[1]]


def test_a_change_of_columns_leaves_the_sample_as_it_is():
    sample = BottomKSample(20)
    sample.add(rows_of(MANY))
    (rows,), (changed,) = sample.blocks(), sample.map(lambda one: one | {"key": -one["key"]}).blocks()
    assert torch.equal(changed["key"], -rows["key"])
    assert torch.equal(sample.blocks()[0]["key"], rows["key"])


def test_tokens_of_many_lengths_are_kept_of_no_more_samples_than_are_exchanged():
    kept = KeptSamples(BottomKSample(8192), BottomKSample(8))
    generator = torch.Generator().manual_seed(0)
    for i in range(200):
        tokens = torch.zeros(4, 2 + i % 20, 3)
        inputs = FusionRecord(
            {"a": (tokens, None)}, {("a", 0): tokens}, ModelOutput(torch.zeros(4, 2), torch.zeros(4, 2))
        )
        keys = torch.randint(2**40, (4,), generator=generator)
        facts = {name: torch.arange(4) for name in ("process", "sample_idx")}
        kept.add(inputs, keys, None, None, facts, {})
        assert len(kept.permuted) < 2 * 8
    (probed,), hashes = kept.probed.blocks(), torch.cat([rows["hash"] for rows in kept.permuted.blocks()])
    assert hashes.sort().values.tolist() == probed["hash"][:8].tolist()
