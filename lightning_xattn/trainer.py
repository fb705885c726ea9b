"""What the callback asks of a Trainer: which epochs to record and to draw, and under which name and step to log."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from packaging.version import Version
from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_xattn.attention import TokenAxis
from lightning_xattn.distributed import ALONE, Processes
from lightning_xattn.errors import XAttnError, check_whole_number


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
    faithfulness_every_n_epochs
        Test the attention every so many of those that are recorded, and at the last of a fit; 0: never.
    every_n_batches
        Record every so many batches of a recorded epoch, from the first on, at least 1.

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

    def samples(self, batch_idx: int) -> bool:
        """Whether a batch of a recorded evaluation is recorded."""
        return batch_idx % self.every_n_batches == 0

    def draws(self, trainer: Trainer) -> bool:
        """Whether a recorded evaluation is drawn."""
        return self._is_due(trainer, self.figures_every_n_epochs)

    def tests_attention(self, trainer: Trainer) -> bool:
        """Whether a recorded evaluation ends with a test of its attention: also the last one of a fit.

        Which one is the last is told by ``max_epochs`` and ``max_steps``, or by a stop that has been asked for. A fit
        that ends otherwise, as by early stopping after an evaluation, has been tested before.
        """
        every = self.faithfulness_every_n_epochs
        return self._is_due(trainer, every) or (every > 0 and self._is_last(trainer))

    def _is_due(self, trainer: Trainer, every: int) -> bool:
        recorded_before = _validations_before(trainer) // self.every_n_epochs
        return every > 0 and (not _is_fitting(trainer) or recorded_before % every == 0)

    def _is_last(self, trainer: Trainer) -> bool:
        """Whether no later evaluation of this fit is recorded; True where this may be so, but cannot be known."""
        place = _Place.of(trainer)
        if place.stops or (place.per_epoch == math.inf and place.is_last_epoch):
            return True
        if place.left == math.inf:
            return False
        if trainer.check_val_every_n_epoch is None and place.every < math.inf:
            # Validations are counted in batches, whatever epoch they are of.
            coming = range(int(place.next), int(place.left) + 1, int(place.every))
            later = (int((place.done + one - 1) // place.per_epoch) for one in coming)
            return not any((trainer.current_epoch + one) % self.every_n_epochs == 0 for one in later)
        if place.done + place.next <= place.per_epoch and place.next <= place.left:
            return False  # there is another one in this epoch
        recorded = _validations_before(trainer) // self.every_n_epochs
        validated = (recorded + 1) * self.every_n_epochs + 1
        epochs = validated * (trainer.check_val_every_n_epoch or 1) - 1 - trainer.current_epoch
        first = epochs * place.per_epoch - place.done + min(place.every, place.per_epoch)
        return first > place.left


@dataclass(frozen=True)
class _Place:
    """Where in a fit a validation is, in batches; ``inf`` is what is not known, or has no end."""

    done: int
    """Batches of this epoch that are trained on."""
    per_epoch: float
    every: float
    """A validation every so many; inf: at the end of an epoch."""
    next: float
    """So many batches on is the next one that this counts; inf: none."""
    left: float
    """So many are left of the fit."""
    is_last_epoch: bool
    """By ``max_epochs``."""
    stops: bool
    """Whether the fit stops after this validation, as somebody has asked for."""

    @classmethod
    def of(cls, trainer: Trainer) -> _Place:
        """Of the validation that runs."""
        loop, epoch = trainer.fit_loop.epoch_loop, trainer.current_epoch
        done, total, steps = loop.batch_idx + 1, loop.total_batch_idx + 1, trainer.global_step
        every = trainer.val_check_batch or math.inf  # None: by the clock
        per_epoch = float(trainer.num_training_batches)
        if every == per_epoch == math.inf:
            per_epoch = float(done)  # as it has just ended
        left, is_last_epoch = math.inf, False
        if trainer.max_epochs not in (None, -1):
            is_last_epoch = epoch + 1 >= trainer.max_epochs
            left = (trainer.max_epochs - epoch) * per_epoch - done
        if trainer.max_steps not in (None, -1) and steps:
            # How many batches a step takes depends on accumulation and on the number of optimisers: as many as so far.
            left = min(left, total * (trainer.max_steps - steps) / steps + 1e-6)
        counted = total if trainer.check_val_every_n_epoch is None else done
        following = math.inf if every == math.inf else every - counted % every
        ends = done + following > per_epoch
        enough = epoch + ends >= (trainer.min_epochs or 0) and steps >= (trainer.min_steps or 0)
        return cls(done, per_epoch, every, following, left, is_last_epoch, bool(trainer.should_stop and enough))


def logged_step(trainer: Trainer) -> int:
    """The step at which Lightning logs the scalars of an evaluation's end."""
    # Lightning has no public name for it: global_step counts every optimiser's steps.
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def stage_of(trainer: Trainer) -> str:
    """What the evaluation that runs is called in curves: "val" or "test"; "predict" has none."""
    return "predict" if trainer.predicting else "test" if trainer.testing else "val"


def loaders_of(trainer: Trainer) -> Any:
    """The dataloaders of the evaluation that runs."""
    of_stage = {"val": "val_dataloaders", "test": "test_dataloaders", "predict": "predict_dataloaders"}
    return getattr(trainer, of_stage[stage_of(trainer)])


def moment(trainer: Trainer) -> dict[str, Any]:
    """Which evaluation this is: its stage, epoch and step."""
    return {"stage": stage_of(trainer), "epoch": trainer.current_epoch, "step": logged_step(trainer)}


def scope_of(trainer: Trainer, callback: Callback, kind: type[Callback], dataloader: int, layer: str) -> str:
    """The stage, and what tells this apart; the first of its kind, dataloader 0 and a layer "" go without saying."""
    everyone = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
    ours = [one for one in everyone if isinstance(one, kind)]
    scope = stage_of(trainer)
    scope += f"/callback_{ours.index(callback)}" if callback in ours[1:] else ""
    scope += f"/dataloader_{dataloader}" if dataloader else ""
    return scope + (f"/{layer}" if layer else "")


def processes_of(trainer: Trainer) -> Processes:
    """Those that run the Trainer's evaluations together."""
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return ALONE
    strategy: Any = trainer.strategy
    dealt = strategy.distributed_sampler_kwargs
    has_peers = dealt["num_replicas"] < trainer.world_size
    peers = strategy.device_mesh["tensor_parallel"].get_group() if has_peers else None
    # By name, as Lightning has two namespaces. DeepSpeed's strategy is a child of DDP's, and may split the model.
    kinds = {kind.__name__ for kind in type(strategy).__mro__}
    run_alone = "DDPStrategy" in kinds and "DeepSpeedStrategy" not in kinds
    return Processes(dealt["rank"], dealt["num_replicas"], peers, run_alone)


def root_folder(trainer: Trainer) -> Path:
    """Where files go that belong to no logger."""
    return Path(trainer.default_root_dir) / "lightning_xattn"


def attention_axes(trainer: Trainer, module: LightningModule) -> dict[str, TokenAxis]:
    """What the tokens are, as the module or else its data module says."""
    holders = module, getattr(trainer, "datamodule", None)
    return next((axes for axes in (getattr(holder, "attention_axes", None) for holder in holders) if axes), {})


def _is_fitting(trainer: Trainer) -> bool:
    return bool(trainer.state.fn == "fit")


def _validations_before(trainer: Trainer) -> int:
    """How many epochs of this fit were due for validation before this one."""
    return (trainer.current_epoch + 1) // (trainer.check_val_every_n_epoch or 1) - 1


def require_lightning_that_takes_it() -> None:
    """Refuse a ``lightning`` whose Trainer ends with "Expected a parent", before any code of ours could say why.

    This callback is a child of ``pytorch_lightning.Callback``, which to ``lightning.pytorch`` is a stranger.
    """
    lightning = sys.modules.get("lightning")
    if lightning is not None and "lightning.pytorch" in sys.modules and Version(lightning.__version__) < Version("2.6"):
        raise XAttnError(
            f"The Trainer of lightning {lightning.__version__} takes no callback that is made for pytorch_lightning; "
            'expected lightning 2.6 or later. Update it: pip install "lightning>=2.6". Or import pytorch_lightning '
            "instead."
        )
