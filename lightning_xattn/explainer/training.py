"""What a checkpoint says of the samples that its model was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lightning_xattn.core.names import id_text
from lightning_xattn.evaluation.results import TrainingData

IDS, GROUPS = "training_ids", "training_groups"
"""Keys of the state that a data module saves."""


def training_data(checkpoint: str | Path) -> TrainingData | None:
    """Read which samples a model was trained on.

    Lightning saves the ``state_dict()`` of a data module in each checkpoint. If it holds ``training_ids``, the ids of
    the training samples, and for samples in groups ``training_groups``, the group of each, they are read here.
    `HMSDataModule` saves both.

    Parameters
    ----------
    checkpoint
        A file of Lightning's.

    Returns
    -------
    TrainingData or None
        None where the checkpoint does not say.
    """
    try:
        saved: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception:  # whatever a file raises that is no checkpoint, or that holds more than plain types
        return None
    states = [one for one in saved.values() if isinstance(one, dict) and IDS in one]
    if not states:
        return None
    return TrainingData(_as_strings(states[0][IDS]), _as_strings(states[0].get(GROUPS, ())))


def _as_strings(ids: Iterable[Any]) -> frozenset[str]:
    """As the sample table has them."""
    return frozenset(text for text in map(id_text, ids) if text is not None)
