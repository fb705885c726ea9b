"""Which evaluation of a Trainer runs, the name and step of its numbers, and whether it is recorded and drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pytorch_lightning import Callback, Trainer

from lightning_xattn.core.errors import check_whole_number
from lightning_xattn.core.names import shown


@dataclass(frozen=True)
class Schedule:
    """Every n-th of the epochs that ``fit`` validates, from the first on; ``validate`` and ``test`` always.

    Parameters
    ----------
    every_n_epochs
        Record every n-th validated epoch, n at least 1.
    figures_every_n_epochs
        Draw every n-th recorded epoch; 0: none.
    faithfulness_every_n_epochs
        Test the attention in every n-th recorded epoch and in the last one of a fit; 0: never.
    every_n_batches
        Record every n-th batch of a recorded evaluation, from the first on, n at least 1.

    Raises
    ------
    SettingError
        If one is not a whole number, or too small.
    """

    every_n_epochs: int
    figures_every_n_epochs: int
    faithfulness_every_n_epochs: int
    every_n_batches: int

    def __post_init__(self) -> None:
        for name in ("every_n_epochs", "every_n_batches"):
            check_whole_number(name, getattr(self, name))
        for name in ("figures_every_n_epochs", "faithfulness_every_n_epochs"):
            check_whole_number(name, getattr(self, name), 0)

    def records(self, trainer: Trainer) -> bool:
        """Whether the evaluation that begins is recorded."""
        return not _is_fitting(trainer) or _validations_before(trainer) % self.every_n_epochs == 0

    def draws(self, trainer: Trainer) -> bool:
        """Whether a recorded evaluation is drawn."""
        return self._is_due(trainer, self.figures_every_n_epochs)

    def tests_attention(self, trainer: Trainer) -> bool:
        """Whether a recorded evaluation ends with a test of its attention's faithfulness."""
        every = self.faithfulness_every_n_epochs
        return self._is_due(trainer, every) or (every > 0 and self._is_last(trainer))

    def ever_tests_attention(self, trainer: Trainer) -> bool:
        """Whether any evaluation of this run ends with a test of its attention."""
        return not _is_fitting(trainer) or self.faithfulness_every_n_epochs > 0

    def _is_due(self, trainer: Trainer, every: int) -> bool:
        recorded_before = _validations_before(trainer) // self.every_n_epochs
        return every > 0 and (not _is_fitting(trainer) or recorded_before % every == 0)

    def _is_last(self, trainer: Trainer) -> bool:
        """Whether no later epoch of this fit is recorded, as ``max_epochs`` or a stop that was asked for shows."""
        epoch, most = trainer.current_epoch, trainer.max_epochs
        has_enough = epoch + 1 >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
        next_epoch = epoch + self.every_n_epochs * (trainer.check_val_every_n_epoch or 1)
        return (trainer.should_stop and has_enough) or (most not in (None, -1) and next_epoch >= most)


def _is_fitting(trainer: Trainer) -> bool:
    return bool(trainer.state.fn == "fit")


def _validations_before(trainer: Trainer) -> int:
    """How many epochs of this fit were due for validation before this one."""
    return (trainer.current_epoch + 1) // (trainer.check_val_every_n_epoch or 1) - 1


def stage_of(trainer: Trainer) -> str:
    """The stage of the evaluation that runs: "val", "test" or "predict"."""
    return "predict" if trainer.predicting else "test" if trainer.testing else "val"


def logged_step(trainer: Trainer) -> int:
    """The step at which Lightning logs the scalars of an evaluation's end."""
    # Lightning has no public name for it: global_step counts every optimiser's steps.
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def moment(trainer: Trainer) -> dict[str, Any]:
    """The stage, epoch and step of the evaluation that runs."""
    return {"stage": stage_of(trainer), "epoch": trainer.current_epoch, "step": logged_step(trainer)}


def scope_of(trainer: Trainer, callback: Callback, kind: type[Callback], dataloader: int, layer: str) -> str:
    """The part of a curve's name that names its origin, as ``val/callback_1/dataloader_1/<layer>``.

    The first callback of its kind, dataloader 0 and a layer "" are left out.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
    ours = [other for other in callbacks if isinstance(other, kind)]
    scope = stage_of(trainer)
    scope += f"/callback_{ours.index(callback)}" if callback in ours[1:] else ""
    scope += f"/dataloader_{dataloader}" if dataloader else ""
    return scope + (f"/{shown(layer)}" if layer else "")
