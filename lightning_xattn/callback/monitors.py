"""What monitors the callback's curves (checkpoints, early stopping, schedulers), and what its user should know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pytorch_lightning import Trainer

from lightning_xattn.callback.schedule import Schedule
from lightning_xattn.evaluation.curves import TOPICS


@dataclass(frozen=True)
class Monitor:
    """What acts on a curve of the callback while a model is fitted."""

    who: str
    """The name of its class."""
    curve: str
    passes_over_nan: bool
    """Whether NaN is only the worst value to it; else NaN stops the fit, or counts as an epoch without improvement."""
    paste: str = ""
    """The line that makes one that does not stop at NaN; "" where it does not stop."""


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
            # By what they have, as Lightning has two namespaces.
            stops = hasattr(callback, "wait_count") or hasattr(callback, "patience")
            paste = _early_stopping(callback, curve) if stops and getattr(callback, "check_finite", False) else ""
            found.append(Monitor(type(callback).__name__, curve, not stops, paste))
    for scheduler in trainer.lr_scheduler_configs:
        if scheduler.reduce_on_plateau and ours.fullmatch(str(scheduler.monitor)):
            found.append(Monitor(type(scheduler.scheduler).__name__, str(scheduler.monitor), False))
    return found


def _early_stopping(stopping: Any, curve: str) -> str:
    """The line that makes the same callback without its stop at NaN."""
    settings = {name: getattr(stopping, name) for name in ("mode", "patience") if hasattr(stopping, name)}
    settings |= {"min_delta": abs(stopping.min_delta)} if getattr(stopping, "min_delta", 0) else {}
    given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return f"{type(stopping).__name__}({curve!r}, {given}, check_finite=False)"


def describe_risks(monitors: Iterable[Monitor], schedule: Schedule) -> Iterator[str]:
    """What users should know of what they monitor, each with the line that changes it."""
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
