"""Where tensors are, and what it costs to look at their values."""

from __future__ import annotations

from torch import Tensor


def reads_at_once(tensor: Tensor) -> bool:
    """Whether a value can be read without waiting: not so on a GPU, which may have much to do before."""
    return tensor.device.type == "cpu"
