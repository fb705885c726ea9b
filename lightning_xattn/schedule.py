"""Which epochs are recorded and which are drawn, and at which step they are logged."""

from __future__ import annotations

from dataclasses import dataclass

from pytorch_lightning import Trainer

from lightning_xattn.errors import SettingError


@dataclass(frozen=True)
class Schedule:
    """Every so many of the epochs that ``fit`` validates, from the first on; ``validate`` and ``test`` always.

    Of a recorded epoch, every so many of its batches.

    Parameters
    ----------
    every_n_epochs
        Record every so many, at least 1.
    figures_every_n_epochs
        Draw every so many of those that are recorded; 0: none.
    every_n_batches
        Record every so many batches of a recorded epoch, from the first on, at least 1.

    Raises
    ------
    SettingError
        If one is not a whole number, or too small.
    """

    every_n_epochs: int
    figures_every_n_epochs: int
    every_n_batches: int

    def __post_init__(self) -> None:
        for name, least in (("every_n_epochs", 1), ("figures_every_n_epochs", 0), ("every_n_batches", 1)):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < least:
                raise SettingError(f"{name} must be a whole number >= {least}; got {number!r}.")

    def records(self, trainer: Trainer) -> bool:
        """Whether the evaluation that begins is recorded."""
        return not _is_fitting(trainer) or _validations_before(trainer) % self.every_n_epochs == 0

    def samples(self, batch_idx: int) -> bool:
        """Whether a batch of a recorded evaluation is recorded."""
        return batch_idx % self.every_n_batches == 0

    def draws(self, trainer: Trainer) -> bool:
        """Whether a recorded evaluation is drawn."""
        every = self.figures_every_n_epochs
        recorded_before = _validations_before(trainer) // self.every_n_epochs
        return every > 0 and (not _is_fitting(trainer) or recorded_before % every == 0)


def logged_step(trainer: Trainer) -> int:
    """The step at which Lightning logs the scalars of an evaluation's end."""
    # Lightning has no public name for it: global_step counts every optimiser's steps.
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _is_fitting(trainer: Trainer) -> bool:
    return bool(trainer.state.fn == "fit")


def _validations_before(trainer: Trainer) -> int:
    """How many epochs of this fit were due for validation before this one."""
    return (trainer.current_epoch + 1) // (trainer.check_val_every_n_epoch or 1) - 1
