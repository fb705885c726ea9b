"""The kept samples of several processes are those of one."""

import pickle
from functools import reduce
from operator import add

import pytest
import torch

from lightning_xattn.attribution.kept_samples import BottomKSample, KeptSamples, hashed
from lightning_xattn.attribution.outputs import ModelOutput
from lightning_xattn.attribution.recorder import FusionRecord
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
