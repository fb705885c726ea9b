"""The history as a checkpoint has it."""

import io

import pytest
import torch

from lightning_xattn.callback.epoch_log import main_history

FACTS = {"stage": "val", "layer": "blocks.3.a_to_b_attn", "epoch": 1, "step": 10, "samples": 23, "groups": None}
MAIN = {"alignment/all": 0.25, "probe/left": 0.5, "probe/left_low": 0.125, "entropy/a_to_b/all": 1.0}


def test_main_curves_with_their_interval_ends_come_back():
    records = [FACTS | MAIN | {"probe_problems": {"a": "why"}}, FACTS]
    buffer = io.BytesIO()
    torch.save(main_history(records), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == records


def test_curves_of_heads_and_of_many_classes_are_left_out():
    few = FACTS | MAIN | {f"alignment/{i}": 0.5 for i in range(10)}
    assert main_history([few | {"entropy/a_to_b/head_0": 0.5, "entropy/a_to_b/head_0_low": 0.25}]) == [few]
    assert main_history([few | {"alignment/10": 0.5}]) == [FACTS | MAIN]


@pytest.mark.slow
def test_a_thousand_validations_of_a_large_model_are_three_megabytes():
    """Of 12 layers four have records, with 260 curves of heads and classes each."""
    curves = [f"{topic}/{which}" for topic in ("alignment", "conflict") for which in ("all", "correct", "incorrect")]
    curves += [f"{name}_{end}" for name in curves if "all" not in name for end in ("low", "high")]
    curves += ["entropy/correct", "entropy/a_to_b/all", "entropy/b_to_a/all", "outcome/alignment_auroc"]
    many = [f"entropy/a_to_b/head_{i}" for i in range(12)] + [f"alignment/class_{i}" for i in range(250)]
    records = []
    for row in torch.rand(4000, len(curves + many), dtype=torch.float64).tolist():
        names = [f"{name}" for name in map(str.strip, (f"{one} " for one in curves + many))]  # new objects each time
        records.append(FACTS | dict(zip(names, row, strict=True)))
    buffer = io.BytesIO()
    torch.save(main_history(records), buffer)
    assert buffer.tell() < 3 * 2**20
