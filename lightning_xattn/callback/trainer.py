"""What the callback asks of a Trainer: which epochs to record and to draw, and under which name and step to log."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.core.distributed import SINGLE_PROCESS, Processes
from lightning_xattn.core.errors import check_whole_number
from lightning_xattn.core.names import shown
from lightning_xattn.evaluation.curves import TOPICS

OUTPUT_FOLDER = "xattn_output"
"""Below the Trainer's root folder: figures and reports of a Trainer without a logger."""


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

    def ever_tests_attention(self, trainer: Trainer) -> bool:
        """Whether an evaluation of this run ends with a test of its attention."""
        return not _is_fitting(trainer) or self.faithfulness_every_n_epochs > 0

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
    return scope + (f"/{shown(layer)}" if layer else "")


def processes_of(trainer: Trainer) -> Processes:
    """Those that run the Trainer's evaluations together."""
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return SINGLE_PROCESS
    strategy: Any = trainer.strategy
    dealt = strategy.distributed_sampler_kwargs
    # By name, as Lightning has two namespaces. DeepSpeed's strategy is a child of DDP's, and may split the model.
    kinds = {kind.__name__ for kind in type(strategy).__mro__}
    hold_whole_model = "DDPStrategy" in kinds and "DeepSpeedStrategy" not in kinds
    return Processes(dealt["rank"], dealt["num_replicas"], hold_whole_model)


def describe_tensor_parallelism(trainer: Trainer) -> str:
    """Why nothing is recorded of a model whose heads or columns may be split among processes; "" if they are not."""
    if processes_of(trainer) is SINGLE_PROCESS:
        return ""
    dealt: Any = trainer.strategy.distributed_sampler_kwargs  # type: ignore[attr-defined]  # of parallel strategies
    if dealt["num_replicas"] == trainer.world_size:
        return ""
    return (
        f"{type(trainer.strategy).__name__} runs each sample on {trainer.world_size // dealt['num_replicas']} "
        "processes together (tensor parallelism), so that each may have a part of the heads. Evaluate a checkpoint of "
        "the model without tensor parallelism."
    )


@dataclass(frozen=True)
class Monitor:
    """What acts on a curve of ours while a model is fitted."""

    who: str
    """The name of its class."""
    curve: str
    passes_over_nan: bool
    """Whether it takes NaN for a number that nothing is worse than, and no more: neither stops nor counts."""
    paste: str = ""
    """How to make it so that it does not stop at NaN; "" where it does not stop."""


def monitors_of(trainer: Trainer, scope: str) -> list[Monitor]:
    """What monitors curves of a callback's scope, see `scope_of`: callbacks and schedulers of the learning rate.

    Parameters
    ----------
    trainer
        When a fit starts.
    scope
        Of the callback's first dataloader and all layers, as ``val`` or ``val/callback_1``.
    """
    ours = re.compile(rf"xattn_({'|'.join(TOPICS)})/{scope}/(?!callback_\d+/|.*dataloader_idx_\d).+")
    found = []
    everyone = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
    for one in everyone:
        curve = getattr(one, "monitor", None)
        if isinstance(curve, str) and ours.fullmatch(curve):
            # By what they have, as Lightning has two namespaces.
            stops = hasattr(one, "wait_count") or hasattr(one, "patience")
            paste = _early_stopping(one, curve) if stops and getattr(one, "check_finite", False) else ""
            found.append(Monitor(type(one).__name__, curve, not stops, paste))
    for scheduler in trainer.lr_scheduler_configs:
        if scheduler.reduce_on_plateau and ours.fullmatch(str(scheduler.monitor)):
            found.append(Monitor(type(scheduler.scheduler).__name__, str(scheduler.monitor), False))
    return found


def _early_stopping(stopping: Any, curve: str) -> str:
    """The line that makes the same, but for that it does not stop at NaN."""
    settings = {name: getattr(stopping, name) for name in ("mode", "patience") if hasattr(stopping, name)}
    settings |= {"min_delta": abs(stopping.min_delta)} if getattr(stopping, "min_delta", 0) else {}
    given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return f"{type(stopping).__name__}({curve!r}, {given}, check_finite=False)"


def warn_of_monitors(monitors: Iterable[Monitor], schedule: Schedule) -> Iterator[str]:
    """What users should know of what they monitor, each with the line that mends it."""
    for one in monitors:
        begins = f"{one.who} monitors '{one.curve}'"
        counts = "" if one.passes_over_nan else ", and counts it as no improvement"
        if one.paste:
            yield (
                f"{begins} and ends the fit at the first epoch in which it is NaN, as an undefined number is. Without "
                "check_finite it counts as an epoch without improvement: choose a patience that outlasts those. "
                f"So that it goes on: {one.paste}."
            )
        if schedule.every_n_epochs > 1:
            yield (
                f"{begins}, which is recorded in one of {schedule.every_n_epochs} validated epochs, from the first on. "
                f"In those between Lightning keeps the last value, so {one.who} judges other weights by it{counts}. "
                "Record each: AttentionExplainabilityCallback(every_n_epochs=1)."
            )
        every = schedule.faithfulness_every_n_epochs
        if one.curve.startswith("xattn_faithfulness/") and every != 1:
            when = f"in one of {every} recorded epochs, from the first on" if every else "in none"
            yield (
                f"{begins}, which is measured {when}, and else NaN, which {one.who} takes for the worst value{counts}. "
                "Measure it in each: AttentionExplainabilityCallback(faithfulness_every_n_epochs=1)."
            )


def say_unknown(unknown: Iterable[Monitor], present: Iterable[str]) -> Iterator[str]:
    """What is monitored and is no curve of an evaluation that has these."""
    present = list(present)
    for one in unknown:
        topic, _, _ = one.curve.partition("/")
        alike = [name for name in present if name.startswith(f"{topic}/")] or present
        yield (
            f"{one.who} monitors '{one.curve}', of which this evaluation has no value, so it is logged as NaN. Curves "
            f"of this evaluation: {', '.join(alike[:12]) or 'none'}."
        )


def callbacks_before(trainer: Trainer, callback: Callback) -> list[Callback]:
    """Those that run before this one."""
    everyone: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
    return everyone[: everyone.index(callback)] if callback in everyone else []


def say_averages(trainer: Trainer, callback: Callback) -> Iterator[str]:
    """The warning that weights are averaged by callbacks that come before this one."""
    for one in callbacks_before(trainer, callback):
        # By name, as Lightning has two namespaces.
        if any(kind.__name__ == "WeightAveraging" for kind in type(one).__mro__):
            name = type(one).__name__
            yield (
                f"{name} comes before AttentionExplainabilityCallback, so it puts the current weights back before the "
                "end of the epoch, where modalities are permuted, and there are no contributions. Let it come after: "
                f"callbacks=[AttentionExplainabilityCallback(...), {name}(...)]."
            )


WEIGHTS, MOST_VALUES = 8, 2**20
"""So many parameters of at most so many values show whether others were put in their places."""


def sample_weights(module: LightningModule) -> list[tuple[Tensor, Tensor]]:
    """Some of the parameters that are trained, each with the sum of its absolute values, on its device."""
    trained = [
        one
        for one in module.parameters()
        if one.requires_grad and not is_lazy(one) and not hasattr(one, "to_local") and one.numel() <= MOST_VALUES
    ]
    chosen = dict.fromkeys(round(i * (len(trained) - 1) / (WEIGHTS - 1)) for i in range(WEIGHTS)) if trained else ()
    with torch.no_grad():
        return [(trained[i], trained[i].abs().sum()) for i in chosen]


def are_other_weights(sample: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether parameters have other values than when they were sampled. A GPU waits for it."""
    with torch.no_grad():
        return any(not one.abs().sum().equal(before) for one, before in sample)


def say_other_weights(trainer: Trainer, callback: Callback) -> str:
    """Why nothing is replayed at the end of an evaluation whose batches had other weights, as the end of a sentence."""
    hook = f"on_{'test' if trainer.testing else 'validation'}_epoch_end"
    # Those that do something then.
    kinds = [type(one) for one in callbacks_before(trainer, callback)]
    before = [kind.__name__ for kind in kinds if getattr(kind, hook).__qualname__ != f"Callback.{hook}"]
    order = ", ".join(["AttentionExplainabilityCallback(...)", *(f"{name}(...)" for name in before)])
    remedy = f". Let those come later: callbacks=[{order}]" if before else ""
    return (
        "the model has other weights at the end of the evaluation than in its first batch: a callback that averages "
        f"weights has put others back, or the model's own forward changes them{remedy}"
    )


def root_folder(trainer: Trainer) -> Path:
    """Where files go that belong to no logger; not the package's name, as the root may be its repository."""
    root = str(trainer.default_root_dir)
    return Path("." if "://" in root else root) / OUTPUT_FOLDER  # a bucket is no folder here


def attention_axes(trainer: Trainer, module: LightningModule) -> dict[str, TokenAxis]:
    """What the tokens are, as the module or else its data module says."""
    holders = module, getattr(trainer, "datamodule", None)
    return next((axes for axes in (getattr(holder, "attention_axes", None) for holder in holders) if axes), {})


def _is_fitting(trainer: Trainer) -> bool:
    return bool(trainer.state.fn == "fit")


def _validations_before(trainer: Trainer) -> int:
    """How many epochs of this fit were due for validation before this one."""
    return (trainer.current_epoch + 1) // (trainer.check_val_every_n_epoch or 1) - 1


def join_namespaces(kind: type[Callback]) -> None:
    """Make a kind of callback one of ``lightning.pytorch`` too, where that is imported.

    Its Trainer and its command line take children of its own ``Callback`` alone, which is another class with the same
    hooks. Who imports ``pytorch_lightning`` alone is left with that.
    """
    other = getattr(sys.modules.get("lightning.pytorch.callbacks.callback"), "Callback", None)
    if other is not None and not issubclass(kind, other):
        with suppress(TypeError):  # where a child of it is one of the other already, before this one
            kind.__bases__ = (*kind.__bases__, other)
