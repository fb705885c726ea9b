"""What the callback asks of a Trainer: which epochs to record and to draw, and under which name and step to log."""

from __future__ import annotations

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
from lightning_xattn.names import shown


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
        Test the attention every so many of those that are recorded; 0: never.
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
        """Whether a recorded evaluation ends with a test of its attention."""
        return self._is_due(trainer, self.faithfulness_every_n_epochs)

    def _is_due(self, trainer: Trainer, every: int) -> bool:
        recorded_before = _validations_before(trainer) // self.every_n_epochs
        return every > 0 and (not _is_fitting(trainer) or recorded_before % every == 0)


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
    return scope + (f"/{shown(layer)}" if layer else "")


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
