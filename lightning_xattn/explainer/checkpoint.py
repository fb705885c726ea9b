"""Read a trained model, and what it was trained on, from a checkpoint without running code that is in the file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, TypeVar

import torch

from lightning_xattn.core.errors import DataError, XAttnError
from lightning_xattn.core.ids import id_text
from lightning_xattn.core.names import shown
from lightning_xattn.core.notices import first_line
from lightning_xattn.evaluation.results import TrainingData

Model = TypeVar("Model")

TRAINING_IDS, TRAINING_GROUPS = "training_ids", "training_groups"
"""Keys of the state that a data module saves."""

_TENSORS = ("state_dict", "optimizer_states")
"""Parts of a checkpoint from which Lightning reads no hyperparameters."""

_NAMES_CODE = "_instantiator"
"""The hyperparameter that holds the name of a function that Lightning imports and calls to make the model."""


def load_checkpoint(kind: type[Model], checkpoint: str | Path, trust_checkpoint: bool = False) -> Model:
    """The model of one of Lightning's checkpoints, on a GPU if there is one.

    A checkpoint is a pickle, which can hold any code and run it when it is read. So only weights and plain values are
    read, whichever version of Lightning is installed, unless ``trust_checkpoint`` is set.

    Parameters
    ----------
    kind
        The ``LightningModule`` class.
    checkpoint
        A file on this machine. Addresses are never fetched.
    trust_checkpoint
        Whether code in the file may run, with all rights of this process. Only for files of people whose programs you
        would run.

    Returns
    -------
    The model, an instance of ``kind``.

    Raises
    ------
    DataError
        If there is no such file, it is no checkpoint of ``kind``, or it needs ``trust_checkpoint``.
    """
    name = shown(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _open(checkpoint) as file:
        try:
            if not trust_checkpoint:
                _require_plain(file, name)
                file.seek(0)
            # Before 2.6 Lightning reads any pickle, without such an argument. The file read above holds no code.
            takes = signature(kind.load_from_checkpoint).parameters  # type: ignore[attr-defined]  # of two namespaces
            options = {"weights_only": not trust_checkpoint} if "weights_only" in takes else {}
            model: Model = kind.load_from_checkpoint(file, map_location=device, **options)  # type: ignore[attr-defined]
        except XAttnError:
            raise
        except Exception as error:  # torch, pickle and Lightning each have their own for a file that is something else
            raise DataError(f"{name} is no checkpoint of {kind.__name__}: {first_line(error)}") from error
    return model


def training_data(checkpoint: str | Path) -> TrainingData | None:
    """The samples that a model was trained on; None if the checkpoint does not have them.

    Lightning saves the ``state_dict()`` of a data module in each checkpoint. If it holds ``training_ids``, the ids of
    the training samples, and for samples in groups ``training_groups``, the group of each, they are read here.
    `HMSDataModule` saves both.

    Parameters
    ----------
    checkpoint
        One of Lightning's files.
    """
    try:
        saved: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception:  # any error of a file that is no checkpoint, or that holds more than plain types
        return None
    state = next((one for one in saved.values() if isinstance(one, dict) and TRAINING_IDS in one), None)
    if state is None:
        return None
    return TrainingData(_ids_as_text(state[TRAINING_IDS]), _ids_as_text(state.get(TRAINING_GROUPS, ())))


def _ids_as_text(ids: Iterable[Any]) -> frozenset[str]:
    """Ids as they are in the sample table."""
    return frozenset(text for text in map(id_text, ids) if text is not None)


def _open(checkpoint: str | Path) -> IO[bytes]:
    try:
        return Path(checkpoint).open("rb")
    except (OSError, ValueError) as error:  # no file, a folder, no permission, a name that no file can have
        raise DataError(
            f"{shown(checkpoint)} cannot be read as a checkpoint: {first_line(error)}. Expected a file on this machine."
        ) from None


def _require_plain(file: IO[bytes], name: str) -> None:
    """Refuse a file that would run code, with a DataError, without running it."""
    try:
        saved: Any = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        classes = re.findall(r"GLOBAL ([^\s`]+)", str(error))
        if not classes:  # no pickle at all
            raise
        raise DataError(_needs_trust(name, f"objects of {shown(classes[0], 60)}")) from None
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise DataError(f"{name} is no checkpoint of Lightning's: expected a dict with 'state_dict'.")
    # LightningCLI writes it, into one of several places, as a dict or as pairs.
    if _NAMES_CODE in repr([value for key, value in saved.items() if key not in _TENSORS]):
        raise DataError(_needs_trust(name, f"hyperparameters that name code to be called ('{_NAMES_CODE}')"))


def _needs_trust(name: str, what: str) -> str:
    return (
        f"{name} holds more than weights and plain values: {what}. Loading it runs code that the file's maker chose, "
        "which can do all that you can do on this machine, so nothing of it was run. If you made the file, or would "
        "run any program of its maker, add --trust-checkpoint (in Python: trust_checkpoint=True)."
    )
