"""What the callback has while a Trainer runs, and the guard that lets no error of ours end that run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytorch_lightning import Trainer
from torch import Tensor

from lightning_xattn.callback.monitors import Monitor
from lightning_xattn.callback.terminal import finish_progress_bar, list_lines
from lightning_xattn.core.distributed import SINGLE_PROCESS, Processes
from lightning_xattn.core.notices import describe_error, info, warn
from lightning_xattn.evaluation.batch import StepRecorder
from lightning_xattn.evaluation.evaluation import Evaluation
from lightning_xattn.evaluation.settings import Settings

if TYPE_CHECKING:
    from lightning_xattn.evaluation.table import TrainingTable
    from lightning_xattn.report.headline import Headline


@dataclass(eq=False)
class Run:
    """The state of one call of a Trainer; it is neither copied nor saved with the callback."""

    is_fit: bool = True
    trainer: Callable[[], Trainer | None] = lambda: None
    """The Trainer that runs; None: none does, or it is gone."""
    name: str = ""
    """Tells the run from others in the sample table."""
    processes: Processes = SINGLE_PROCESS
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    """By dataloader."""
    recorder: StepRecorder | None = None
    table: TrainingTable | None = None
    stage: str = "val"
    """The stage of the evaluation that runs: "val", "test" or "predict"."""
    is_recording: bool = False
    """Whether the evaluation that runs is recorded."""
    has_recorded: bool = False
    """Whether a batch was recorded to its end."""
    refusal: str = ""
    """Why nothing of this run is recorded; "" if something may be."""
    doubt: str = ""
    """Why the steps so far, which returned nothing, may have nothing to record."""
    weights: list[tuple[Tensor, Tensor]] | None = None
    """A sample of the model's weights in the first recorded batch of this evaluation."""
    monitors: list[Monitor] = field(default_factory=list)
    curves: dict[str, None] = field(default_factory=dict)
    """The names of the curves that were logged."""
    layers: dict[str, None] = field(default_factory=dict)
    """The names of the layers that were recorded."""
    undrawn: Callable[[Trainer], list[str]] | None = None
    """Draws what is left of the last recorded epoch of a fit; None: nothing is."""
    headlines: Mapping[str, Headline] = field(default_factory=dict)
    """By scope what the last recorded epoch says."""
    places: Sequence[str] = ()
    """Where a user sees its figures and its report, a line each."""

    def draw_rest(self) -> None:
        """At the end of a fit, hand its loggers what is left."""
        draw, self.undrawn, trainer = self.undrawn, None, self.trainer()
        if draw is not None and trainer is not None:
            self.places = draw(trainer)

    def print_summary(self) -> None:
        """Print what the last recorded epoch says, once."""
        headlines, self.headlines, trainer = self.headlines, {}, self.trainer()
        if headlines:
            if trainer is not None:
                finish_progress_bar(trainer)
            info("\n".join(list_lines(headlines, self.places)))

    @contextmanager
    def refusing(self, settings: Settings, *names: str, dataloader: int = 0) -> Iterator[None]:
        """Let no error end the run, unless one of these settings is given and the first batch does not meet it.

        If the first batch cannot be recorded, nothing of the run is. A later batch is left out.
        """
        try:
            yield
        except Exception as error:  # whatever it is, the user's run goes on
            if not self.has_recorded and any(getattr(settings, name) is not None for name in names):
                raise
            if self.recorder is not None:
                self.recorder.close()
            if self.has_recorded:
                self.evaluations[dataloader].totals.left_out_batches += 1
                described = describe_error(error)
                warn(
                    f"A batch is left out, and others like it will be without another warning. {described}",
                    once=f"batch: {type(error).__name__}",
                )
            else:
                self.refuse(describe_error(error))

    def refuse(self, reason: str) -> None:
        """Record nothing of this run, and warn of it."""
        self.refusal = reason
        warn(f"Nothing is recorded in this run. {reason}")

    def resolve_doubt(self, is_rehearsal: bool) -> None:
        """Warn at the end of an evaluation in which no step had anything to record; then none of the run has."""
        if not self.doubt or self.has_recorded or self.refusal:
            return
        if is_rehearsal:
            warn(f"Nothing was recorded in the sanity check. {self.doubt}")
        else:
            self.refuse(self.doubt)

    def stop(self) -> None:
        """Unwrap the model and let go of what was recorded; closing twice is harmless."""
        if self.recorder is not None:
            self.recorder.close()
            self.recorder.clear()
            self.recorder.reset()
        if self.table is not None:
            self.table.discard()
        self.is_recording, self.table, self.weights = False, None, None
        for evaluation in self.evaluations.values():
            evaluation.reset()
