"""What monitors the callback's curves (checkpoints, early stopping, schedulers), and what its user should know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pytorch_lightning import Trainer

from lightning_xattn.callback.schedule import Schedule
from lightning_xattn.evaluation.curves import TOPICS


@dataclass(frozen=True)
class Monitor:
    """What acts on a curve of the callback while a model is fitted."""

    who: str
    """The name of its class."""
    curve: str
    stops_at_nan: bool


def find_monitors(trainer: Trainer, scope: str) -> list[Monitor]:
    """Callbacks and learning-rate schedulers that monitor a curve.

    Parameters
    ----------
    trainer
        When a fit starts.
    scope
        Of the callback's first dataloader and all layers, as ``val`` or ``val/callback_1``.
    """
    ours = re.compile(rf"xattn_({'|'.join(TOPICS)})/{scope}/(?!callback_\d+/|.*dataloader_idx_\d).+")
    found = []
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
    for callback in callbacks:
        curve = getattr(callback, "monitor", None)
        if isinstance(curve, str) and ours.fullmatch(curve):
            found.append(Monitor(type(callback).__name__, curve, bool(getattr(callback, "check_finite", False))))
    for scheduler in trainer.lr_scheduler_configs:
        if scheduler.reduce_on_plateau and ours.fullmatch(str(scheduler.monitor)):
            found.append(Monitor(type(scheduler.scheduler).__name__, str(scheduler.monitor), False))
    return found


def describe_risks(monitors: Iterable[Monitor], schedule: Schedule) -> Iterator[str]:
    """What users should know of what they monitor, each with the line that changes it."""
    for one in monitors:
        begins = f"{one.who} monitors '{one.curve}'"
        if one.stops_at_nan:
            yield (
                f"{begins} and ends the fit at the first epoch in which it is NaN, as an undefined number is. Without "
                "check_finite it counts as an epoch without improvement: choose a patience that outlasts those. "
                f"So that it goes on: {one.who}({one.curve!r}, ..., check_finite=False)."
            )
        seldom = {
            "every_n_epochs": schedule.every_n_epochs > 1,
            "faithfulness_every_n_epochs": one.curve.startswith("xattn_faithfulness/")
            and schedule.faithfulness_every_n_epochs != 1,
        }
        for setting in (name for name, is_seldom in seldom.items() if is_seldom):
            yield (
                f"{begins}, which is measured with {setting}={getattr(schedule, setting)}. In other epochs it "
                f"is NaN or keeps its last value, by which {one.who} judges other weights. Measure it in each: "
                f"AttentionExplainabilityCallback({setting}=1)."
            )


def describe_unknown(unknown: Iterable[Monitor], present: Iterable[str]) -> Iterator[str]:
    """What monitors a curve that an evaluation with these curves does not have."""
    present = list(present)
    for one in unknown:
        topic, _, _ = one.curve.partition("/")
        similar = [name for name in present if name.startswith(f"{topic}/")] or present
        yield (
            f"{one.who} monitors '{one.curve}', of which this evaluation has no value, so it is logged as NaN. Curves "
            f"of this evaluation: {', '.join(similar[:12]) or 'none'}."
        )
