"""The history as a checkpoint has it."""

import io

import pytest
import torch

from lightning_xattn.callback.history import pack_history, unpack_history

RECORDS = [
    {"stage": "val", "step": 9, "groups": None, "unreadable": {"a": "why"}, "alignment/all": 0.25, "alignment/x": 0.5},
    {"stage": "val", "step": 2**31 - 1, "groups": 7, "unreadable": {}, "conflict/all": -0.5, "late": 3},
    {"stage": "test", "step": 0, "groups": None, "alignment/all": 1.0, "alignment/all_low": 0.125, "late": 4},
]


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1], []])
def test_what_is_packed_is_there_again(records):
    buffer = io.BytesIO()
    torch.save(pack_history(records, keeps_all=True), buffer)
    buffer.seek(0)
    assert unpack_history(torch.load(buffer, weights_only=True)) == records


def test_what_is_undefined_is_not_what_a_record_lacks():
    records = [{"outcome/alignment_auroc": 0.5}, {"outcome/alignment_auroc": float("nan")}, {"late": 0.25}]
    first, second, third = unpack_history(pack_history(records, keeps_all=True))
    assert (first, third) == (records[0], records[2])
    assert second == pytest.approx(records[1], nan_ok=True)


def test_whole_numbers_that_every_record_has_stay_whole_and_others_take_four_bytes():
    packed = pack_history(RECORDS, keeps_all=True)
    single = ["alignment/all", "alignment/x", "conflict/all", "alignment/all_low"]
    other = ["stage", "groups", "unreadable", "late"]
    assert packed["names"] == {"whole": ["step"], "single": single, "other": other}
    assert (packed["whole"].dtype, packed["single"].dtype) == (torch.int64, torch.float32)


def test_curves_that_are_not_logged_are_left_out():
    """Those of heads, and those of more than ten classes."""
    of_heads = RECORDS[0] | {"entropy/a_to_b/head_0": 0.5, "entropy/a_to_b/x": 0.25}
    of_few = of_heads | {f"alignment/{i}": 0.5 for i in range(9)}
    of_many = of_few | {"entropy/a_to_b/y": 0.5}
    few, many = (unpack_history(pack_history([one], keeps_all=False))[0] for one in (of_few, of_many))
    assert few == {name: value for name, value in of_few.items() if name != "entropy/a_to_b/head_0"}
    assert many == {name: value for name, value in RECORDS[0].items() if name != "alignment/x"}


@pytest.mark.slow
def test_a_thousand_validations_of_a_large_model_are_a_megabyte():
    """Of 12 layers four have records, with a thousand curves of heads and classes between them."""
    curves = [f"{topic}/{which}" for topic in ("alignment", "conflict") for which in ("all", "correct", "incorrect")]
    curves += [f"{name}_{end}" for name in curves if "all" not in name for end in ("low", "high")]
    curves += ["entropy/correct", "entropy/a_to_b/all", "entropy/b_to_a/all", "outcome/alignment_auroc"]
    many = [f"entropy/a_to_b/head_{i}" for i in range(12)] + [f"alignment/class_{i}" for i in range(250)]
    facts = {"stage": "val", "layer": "blocks.3.a_to_b_attn", "epoch": 1, "step": 10, "samples": 23, "groups": None}
    values = torch.rand(4000, len(curves + many), dtype=torch.float64).tolist()
    records = [facts | dict(zip(curves + many, row, strict=True)) for row in values]
    buffer = io.BytesIO()
    torch.save(pack_history(records, keeps_all=False), buffer)
    assert buffer.info() < 2**20
