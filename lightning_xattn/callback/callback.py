"""The Lightning callback: hooks and wiring only."""

from __future__ import annotations

import uuid
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_xattn.attribution.contribution import CONTRIBUTION_SAMPLES
from lightning_xattn.attribution.inputs import ModalitiesSetting
from lightning_xattn.attribution.kept_samples import MAX_SAMPLES
from lightning_xattn.callback.epoch_log import EpochLog, by_scope
from lightning_xattn.callback.findings import Findings, Handover
from lightning_xattn.callback.history import pack_history, unpack_history
from lightning_xattn.callback.trainer import (
    Monitor,
    Schedule,
    are_other_weights,
    attention_axes,
    describe_tensor_parallelism,
    join_namespaces,
    loaders_of,
    moment,
    monitors_of,
    processes_of,
    sample_weights,
    say_averages,
    say_other_weights,
    scope_of,
    stage_of,
    warn_of_monitors,
)
from lightning_xattn.capture import AttentionSetting
from lightning_xattn.capture.labels import LabelSetting, Step
from lightning_xattn.core.distributed import SINGLE_PROCESS, Processes, unique_sample_indices
from lightning_xattn.core.errors import DiscoveryError, SettingError, XAttnError
from lightning_xattn.core.notices import describe_error, info, warn
from lightning_xattn.evaluation.evaluation import Evaluation, Settings, summarise
from lightning_xattn.evaluation.fusion_samples import sample_columns
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import BatchResult, DatasetResult
from lightning_xattn.evaluation.step_recorder import Attentions, StepRecorder

if TYPE_CHECKING:
    from lightning_xattn.evaluation.table import TrainingTable


CURVES = ("main", "all")

READ_SETTINGS = ("predictions", "targets", "sample_ids", "groups", "query_mask", "fusion", "class_names")
"""Those that say how a batch is read, but for its attention."""


@dataclass(eq=False)
class _Run:
    """What a callback has while a Trainer runs, and is not copied with it."""

    resumes: bool = True
    name: str = ""
    processes: Processes = SINGLE_PROCESS
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    recorder: StepRecorder | None = None
    is_recording: bool = False
    monitors: list[Monitor] = field(default_factory=list)
    weights: list[tuple[Tensor, Tensor]] | None = None
    """A sample of them in the first recorded batch of this evaluation."""
    names: dict[str, None] = field(default_factory=dict)
    """Those of the curves that were logged."""
    layers: dict[str, None] = field(default_factory=dict)
    """The names of those that were recorded."""
    table: TrainingTable | None = None
    trainer: Callable[[], Trainer | None] = lambda: None
    """The Trainer that runs; None: none does, or it is gone."""
    has_recorded: bool = False
    """Whether a batch was recorded to its end."""
    refusal: str = ""
    """Why nothing of this run is recorded; "" if something may be."""
    doubt: str = ""
    """Why the steps so far, which returned nothing, may have nothing to record."""


def of_both_namespaces() -> type[AttentionExplainabilityCallback]:
    """The callback; of ``lightning.pytorch`` too once that is imported."""
    join_namespaces(AttentionExplainabilityCallback)
    return AttentionExplainabilityCallback


class AttentionExplainabilityCallback(Callback):
    """Log how a model's two modalities attend to each other while it is validated and tested.

    Every epoch it logs head entropy and modality alignment, per class and for correct against incorrect predictions,
    as scalars with ``LightningModule.log`` (so ``ModelCheckpoint`` and ``EarlyStopping`` can monitor them) and as
    figures in the Trainer's loggers. The model's outputs stay bit for bit the same. The sanity check before training
    is used to check the settings against a real batch; nothing of it is kept or logged.

    If the LightningModule or its data module has an attribute ``attention_axes``, a mapping from modality to
    ``TokenAxis``, the figures label the tokens with it.

    Parameters
    ----------
    attention
        Module paths by direction, seen from the LightningModule, e.g.
        ``{"eeg_to_spec": "model.fusion.eeg_to_spec_attn", "spec_to_eeg": "model.fusion.spec_to_eeg_attn"}``, or a
        ``JointSequence``, or callables (see ``docs/own-model.md``). None: found by name or, where no name tells, in
        the first batch. ``{}``: none is recorded; ``fusion`` and ``modalities`` must then be named.
    class_names
        A name for each class. None: the LightningModule's attribute ``class_names``, or ``class_0``, ``class_1``, ...
    classes_by
        "target" groups samples by their true class, "prediction" by the predicted one.
    predictions, targets
        Where a step's predictions (class scores or ids) and targets (class ids or soft labels) are. None: found in
        the step's outputs, the module's own ``forward``, the batch. A string: a key of one of these.
        A callable: ``(outputs, batch) -> tensor``, or ``(outputs, batch, forward) -> tensor`` with what ``forward``
        returned.
    sample_ids
        Where the samples' ids (numbers or strings) are: as ``predictions``. None: the batch's ``sample_ids``.
    groups
        Where the group of each sample is (a number or a string), of which the samples are not independent, such as a
        patient or a recording: as ``predictions``. Every interval is then by group. None: the batch's ``groups`` or
        ``patient_ids``; without them samples are taken as independent.
    query_mask
        Which queries are real tokens, ``(batch, queries)``, True or 1: as ``predictions``; of the modality that asks in
        the first layer of which only one direction is recorded. Of two directions that pair up each tells it of the
        other; of one alone it is taken from a self-attention of the same tokens or from an argument of the module,
        where there is one. Else padding counts as any query does, and a warning says so.
    fusion, modalities
        The module that fuses the modalities, ``"model.fusion"``, and which of its arguments, by position or name, hold
        whose tokens, ``{"eeg": 0, "spec": "spec_tokens"}``. None: found from the attention. A model whose fusion is
        named needs no cross-attention.
    contribution_samples
        Of so many samples of an evaluation the modalities are permuted at its end, to say how much each contributes;
        0: of none.
    max_samples
        So many samples of an evaluation are read, at most.
    curves
        "main": log the curves that are acted on: about twenty, and of up to ten classes the alignment and the entropies
        of each. "all": also those of single heads, of the ten largest of more classes, and the rest. What is monitored
        is logged in any case.
    every_n_epochs
        During ``fit``, record every so many of the epochs that are validated, from the first on.
        ``trainer.validate`` and ``trainer.test`` always record.
    figures_every_n_epochs
        Hand figures, distributions and a report to the loggers every so many epochs, of those that are recorded; 0:
        never. ``trainer.validate`` and ``trainer.test`` always do.
    faithfulness_every_n_epochs
        Test every so many epochs, of those that are recorded, and at the last of a fit by ``max_epochs`` or
        ``max_steps``, whether the attention ranks the keys that the model uses, which takes 128
        ``contribution_samples``; 0: never. ``trainer.validate`` and ``trainer.test`` always do.
    every_n_batches
        Record every so many batches of each evaluation, from the first on. All numbers, also the count of samples, are
        then of the recorded batches alone.
    table
        A folder for one row per sample, epoch and layer, as Parquet files (see ``SampleTable``). The column ``run``
        tells one run of a Trainer from another; the latest sorts last. None: no table.

    Raises
    ------
    SettingError
        If a setting has a value that is not allowed.

    Examples
    --------
    >>> watch = AttentionExplainabilityCallback()
    >>> trainer = Trainer(callbacks=[watch], logger=False, enable_progress_bar=False)
    >>> losses = trainer.validate(model, loader, verbose=False)  # of 23 samples
    >>> watch.summaries["val"]
    LayerSummary(23 samples, 4 classes; audio_to_text of 3 heads, text_to_audio of 3 heads)
    >>> watch.history[0]["stage"], watch.history[0]["samples"]
    ('val', 23)
    """

    def __init__(
        self,
        attention: AttentionSetting | None = None,
        class_names: Sequence[str] | None = None,
        classes_by: str = "target",
        predictions: LabelSetting = None,
        targets: LabelSetting = None,
        sample_ids: LabelSetting = None,
        groups: LabelSetting = None,
        query_mask: LabelSetting = None,
        fusion: str | None = None,
        modalities: ModalitiesSetting | None = None,
        contribution_samples: int = CONTRIBUTION_SAMPLES,
        max_samples: int = MAX_SAMPLES,
        curves: str = "main",
        every_n_epochs: int = 1,
        figures_every_n_epochs: int = 1,
        faithfulness_every_n_epochs: int = 10,
        every_n_batches: int = 1,
        table: str | Path | None = None,
    ) -> None:
        of_both_namespaces()
        super().__init__()
        labels = predictions, targets, sample_ids, groups, query_mask
        fusion_inputs = fusion, modalities, contribution_samples, max_samples
        self.settings = Settings(attention, class_names, classes_by, *labels, *fusion_inputs, table)
        if curves not in CURVES:
            raise SettingError(f"curves must be one of {', '.join(CURVES)}; got {curves!r}.")
        self.curves = curves
        self.schedule = Schedule(every_n_epochs, figures_every_n_epochs, faithfulness_every_n_epochs, every_n_batches)
        self._handover, self._found = Handover(), Findings()
        self._run = _Run()

    def __repr__(self) -> str:
        recorded = ", ".join({**self.summaries, **self.fusion_summaries}) or "nothing"
        return f"AttentionExplainabilityCallback(classes_by='{self.settings.classes_by}'; recorded so far: {recorded})"

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record per recorded epoch, dataloader and layer.

        ``stage``, ``epoch``, ``step``, ``dataloader``, ``layer``, ``samples``, ``groups`` (how many; None where they
        are not known), ``repeats`` (samples dropped because another process had them), ``left_out_batches`` (that could
        not be recorded), ``other_lengths`` (samples left out because their joint sequence has another length than its
        spans are for), ``ties`` and ``unclassified``
        samples, ``wholly_masked`` (samples of which one modality is), ``accuracy``, the comparisons of correct with
        incorrect predictions, and the epoch's curves by their names without the scope. It is saved in checkpoints.
        """
        return self._findings.history

    @property
    def summaries(self) -> dict[str, LayerSummary]:
        """The last epoch of each scope, such as ``val``, ``test`` or ``val/dataloader_1``."""
        return self._findings.summaries

    @property
    def fusion_summaries(self) -> dict[str, FusionSummary]:
        """The same of what the modalities say and contribute."""
        return self._findings.fusion_summaries

    @property
    def _findings(self) -> Findings:
        self._found = self._handover.take() or self._found
        return self._found

    def __getstate__(self) -> dict[str, Any]:
        """What was found, but nothing of a run, its model and its Trainer."""
        # Lightning puts the model's own methods here.
        of_run = "_run", "log", "log_dict"
        state = vars(self) | {"_found": self._findings}
        return {name: value for name, value in state.items() if name not in of_run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._run = _Run()

    @property
    def state_key(self) -> str:
        """Tells callbacks with different settings apart in a checkpoint."""
        return self._generate_state_key(**self.settings.named(), schedule=self.schedule, table=self.settings.table)

    def state_dict(self) -> dict[str, Any]:
        """The history, in plain types: a checkpoint with it loads with ``weights_only=True``.

        Of the history it has what ``curves`` has logged, in single precision.
        """
        packed = pack_history(self.history, keeps_all=self.curves == "all")
        return {"history": packed, "fit_begins": self._findings.fit_begins, "measured": str(self.settings.named())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's history, unless there is one already and the checkpoint is only tested."""
        if "history" in state_dict and (self._run.resumes or not self.history):
            self._findings.history = unpack_history(state_dict["history"])
            self._findings.fit_begins = state_dict["fit_begins"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from the history of a callback that measured the same with another schedule or table."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
        present = {one.state_key for one in callbacks}
        saved = checkpoint["callbacks"]
        if self.state_key in saved:  # Lightning has loaded it
            return
        measured, kind = str(self.settings.named()), type(self).__qualname__
        ours = {key: state for key, state in saved.items() if key.startswith(kind) and key not in present}
        alike = [state for state in ours.values() if state.get("measured") == measured]
        if len(alike) == 1:
            self.load_state_dict(alike[0])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look anew at the first batch of what is to run.

        Raises
        ------
        XAttnError
            If another Trainer still runs this callback.
        """
        if self._run.trainer() not in (None, trainer):
            raise XAttnError(
                "This callback still records another Trainer, inside of which this one runs. Give the inner Trainer a "
                "callback of its own: Trainer(callbacks=[AttentionExplainabilityCallback()])."
            )
        self._run = _Run(stage == "fit", processes=processes_of(trainer), trainer=weakref.ref(trainer))
        self._run.refusal = describe_tensor_parallelism(trainer)
        if self._run.refusal:
            warn([f"Nothing is recorded in this run. {self._run.refusal}"])
        if self._run.resumes:
            self._findings.fit_begins = len(self.history)
        make = partial(
            Evaluation,
            self.settings,
            pl_module,
            self._findings.checks,
            expects_targets=stage != "predict",
            keeps_maps=stage == "test",  # after which there is a page
            processes=self._run.processes,
        )
        first = make()
        # One for each dataloader, as their batches may differ; their classes are those of the first.
        self._run.evaluations = defaultdict(partial(make, first), {0: first})
        if self.settings.table is not None:
            now = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:4]}"
            self._run.name = trainer.strategy.broadcast(now)
        if trainer.world_size > 1:
            # What is logged is the same on every process already; Lightning cannot know, and says so for each name.
            warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\('xattn_")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the attention before training starts, so that a wrong path fails at once."""
        if not self._run.refusal:
            with self._refusing("attention", "fusion"):
                self._run.recorder = self.settings.recorder(pl_module, self._run.processes)
        self._run.monitors = monitors_of(trainer, self._scope(trainer)(0, ""))
        warn(warn_of_monitors(self._run.monitors, self.schedule))
        warn(say_averages(trainer, self))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to record, if this epoch is one to record."""
        self._stop()
        if not self.schedule.records(trainer):
            return
        self._run.is_recording = True
        if self._run.recorder is None and not self._run.refusal:
            with self._refusing("attention", "fusion"):
                self._run.recorder = self.settings.recorder(pl_module, self._run.processes)
        rehearsal = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
        if self.settings.table is not None and not rehearsal and self._run.recorder is not None:
            from lightning_xattn.evaluation.table import TrainingTable  # pyarrow, only where a table is wanted

            about = {"run": self._run.name} | moment(trainer)
            name = "{run}-{stage}-epoch={epoch}-step={step}".format(**about)
            name += f"-rank={self._run.processes.rank}-of-{self._run.processes.count}"
            self._run.table = TrainingTable(Path(self.settings.table), name, about)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put the hooks on the model, if this batch is one to record."""
        if self._records(batch_idx):
            assert self._run.recorder is not None
            with self._refusing("attention", "fusion"):
                self._run.recorder.__enter__()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch to the running sums."""
        evaluation, taken = self._run.evaluations[dataloader_idx], None
        if not self._records(batch_idx):
            is_due = self._run.is_recording and self.schedule.samples(batch_idx)
            evaluation.left_out_batches += int(is_due and bool(self._run.refusal))
            return
        recorder = self._run.recorder
        assert recorder is not None
        recorder.close()
        with self._refusing("attention", "fusion", dataloader=dataloader_idx):
            taken = self._take(recorder, outputs, batch)
            if left_out := recorder.left_out:
                places = unique_sample_indices(loaders_of(trainer), dataloader_idx, batch_idx, max(left_out.values()))
                evaluation.leave_out(left_out, taken is None, places)
        if taken is not None:
            with self._refusing(*READ_SETTINGS, dataloader=dataloader_idx):
                if self._run.weights is None:
                    self._run.weights = sample_weights(pl_module)
                self._add(trainer, evaluation.read(*taken, recorder), batch_idx, dataloader_idx)
        recorder.clear()

    def _take(self, recorder: StepRecorder, outputs: Any, batch: Any) -> tuple[Step, Attentions] | None:
        """What the recorder has of a step; None of one that may have ended before it came to what is looked for."""
        try:
            return recorder.collect_step(outputs, batch)
        except DiscoveryError as error:
            is_named = self.settings.attention is not None or self.settings.fusion is not None
            if outputs is not None or self._run.has_recorded or is_named:
                raise
            self._run.doubt = str(error)
            return None

    def _end_doubt(self, rehearsal: bool) -> None:
        """Say at the end of an evaluation what no step of it has shown."""
        if self._run.doubt and not self._run.has_recorded and not self._run.refusal:
            what = "was recorded in the sanity check" if rehearsal else "is recorded in this run"
            warn([f"Nothing {what}. {self._run.doubt}"])
            self._run.refusal = "" if rehearsal else self._run.doubt

    def _add(self, trainer: Trainer, result: BatchResult, batch_idx: int, dataloader_idx: int) -> None:
        recorder, evaluation = self._run.recorder, self._run.evaluations[dataloader_idx]
        assert recorder is not None
        if not self._run.has_recorded:
            self._run.has_recorded = True
            warn(self._findings.checks.of_directions(recorder.layers))
            info(self._findings.checks.of_probe(evaluation.describe(result, recorder)))
        for columns in evaluation.add(
            result, unique_sample_indices(loaders_of(trainer), dataloader_idx, batch_idx, len(result))
        ):
            if self._run.table is not None:
                self._run.table.add(columns | {"dataloader": dataloader_idx})

    def _records(self, batch_idx: int) -> bool:
        return self._run.is_recording and not self._run.refusal and self.schedule.samples(batch_idx)

    @contextmanager
    def _refusing(self, *settings: str, dataloader: int = 0) -> Iterator[None]:
        """Let no error end the run, unless one of these settings is given and the first batch does not meet it.

        If the first batch cannot be recorded, nothing of the run is. A later batch is left out.
        """
        try:
            yield
        except Exception as error:  # whatever it is, the user's run goes on
            is_given = any(getattr(self.settings, name) is not None for name in settings)
            if not self._run.has_recorded and is_given:
                raise
            if self._run.recorder is not None:
                self._run.recorder.close()
            if self._run.has_recorded:
                self._run.evaluations[dataloader].left_out_batches += 1
                warn(self._findings.checks.of_a_batch(error))
            else:
                self._run.refusal = describe_error(error)
                warn([f"Nothing is recorded in this run. {self._run.refusal}"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's curves and figures."""
        if self._run.is_recording:
            self._end_doubt(rehearsal=bool(trainer.sanity_checking))
        if self._run.is_recording and not trainer.sanity_checking:
            self._log_epoch(trainer, pl_module)
            self._hand_over(trainer)  # now, as an exception in a process that a Trainer has started calls no hook there
        elif not trainer.sanity_checking:
            self._log(trainer, pl_module, draws=False).log_absent()
        self._stop()

    # A test is recorded as a validation is.
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    # So is a prediction, but for what is logged: Lightning logs nothing then.
    on_predict_epoch_start = on_validation_epoch_start
    on_predict_batch_start = on_validation_batch_start
    on_predict_batch_end = on_validation_batch_end

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table; what is known of all samples is in ``summaries`` and ``fusion_summaries``."""
        if self._run.is_recording:
            self._end_doubt(rehearsal=False)
            ended = self._end_epoch(trainer, pl_module)
            if ended is not None:
                self._warn_of_nothing(trainer, any(one.summaries or one.fusion for one in ended[0].values()))
        self._stop()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values of the best epoch, by which runs are compared."""
        self._log(trainer, pl_module, self.schedule.figures_every_n_epochs > 0).log_best(
            self.history[self._findings.fit_begins :]
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take every hook off the model: after a crash Lightning does not call ``teardown``."""
        if self._run.trainer() in (None, trainer):
            self._stop()
            self._run.trainer = lambda: None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take every hook off the model, and let go of it."""
        self._stop()
        self._hand_over(trainer)
        self._run = _Run()

    def _stop(self) -> None:
        if self._run.recorder is not None:
            self._run.recorder.close()
            self._run.recorder.clear()
            self._run.recorder.reset()
        if self._run.table is not None:
            self._run.table.discard()
        self._run.is_recording, self._run.table, self._run.weights = False, None, None
        for evaluation in self._run.evaluations.values():
            evaluation.reset()

    def _hand_over(self, trainer: Trainer) -> None:
        if trainer.local_rank == 0:
            self._handover.leave(self._found)

    def _scope(self, trainer: Trainer) -> Callable[[int, str], str]:
        return partial(scope_of, trainer, self, AttentionExplainabilityCallback)

    def _end_epoch(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[dict[int, DatasetResult], list[Path]] | None:
        """What the evaluation says, by dataloader, and the files of its sample table; None if that goes wrong."""
        try:
            return self._sum_up(trainer, pl_module)
        except Exception as error:  # as above
            # The others wait for this one; what is raised on purpose is raised on all of them.
            if self._run.processes is not SINGLE_PROCESS and not isinstance(error, XAttnError):
                raise
            warn([f"An evaluation ('{stage_of(trainer)}') could not be summed up. {describe_error(error)}"])
            return None

    def _sum_up(self, trainer: Trainer, pl_module: LightningModule) -> tuple[dict[int, DatasetResult], list[Path]]:
        if self._run.recorder is None:  # the same on all processes
            return {}, []
        for evaluation in self._run.evaluations.values():
            evaluation.refusal = self._run.refusal
        if are_other_weights(self._run.weights or ()):
            for evaluation in self._run.evaluations.values():
                evaluation.refused = say_other_weights(trainer, self)
        ended = dict(
            summarise(
                self._run.evaluations, self._run.recorder, self._run.processes, self.schedule.tests_attention(trainer)
            )
        )
        fusions = {number: summary.fusion for number, summary in ended.items() if summary.fusion is not None}
        tables = []
        if self._run.table is not None and any(one.has_dropped for one in self._run.evaluations.values()):
            self._run.table.discard()
            warn(["The sample table lacks this evaluation, whose first rows took several labels at once for a class."])
        if self._run.table is not None:
            tables = self._run.table.close(
                {number: sample_columns(one, self._run.processes.rank) for number, one in fusions.items()}
            )
        for number, one in fusions.items():
            self.fusion_summaries[self._scope(trainer)(number, "")] = one
        classes_by, axes = self.settings.classes_by, attention_axes(trainer, pl_module)
        results = {
            number: DatasetResult(
                one.layers,
                one.fusion,
                self._run.evaluations[number].classes or (),
                classes_by,
                axes,
                None,
                one.maps,
                other_lengths=dict(self._run.evaluations[number].other_lengths),
            )
            for number, one in ended.items()
        }
        self._run.layers.update(dict.fromkeys(layer for one in results.values() for layer in one.summaries))
        self.summaries.update(by_scope(results, self._scope(trainer), len(self._run.layers) > 1))
        return results, tables

    def _log(self, trainer: Trainer, pl_module: LightningModule, draws: bool) -> EpochLog:
        names = self._scope(trainer)
        run = self._run
        return EpochLog(
            trainer,
            pl_module,
            names,
            self._findings.checks,
            self.settings.classes_by,
            all_curves=self.curves == "all",
            draws=draws,
            permutes=self.settings.contribution_samples > 0,
            tests_attention=self.schedule.ever_tests_attention(trainer),
            monitors=run.monitors,
            names=run.names,
            layers=run.layers,
        )

    def _log_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ended = self._end_epoch(trainer, pl_module)
        if ended is None:
            return
        results, tables = ended
        log = self._log(trainer, pl_module, self.schedule.draws(trainer))
        try:
            records = log.log(results, self._run.evaluations, self.history[self._findings.fit_begins :], tables)
        except Exception as error:  # as above
            warn([f"An evaluation ('{stage_of(trainer)}') could not be logged. {describe_error(error)}"])
            return
        self.history.extend(records)
        self._warn_of_nothing(trainer, bool(records))

    def _warn_of_nothing(self, trainer: Trainer, found: bool) -> None:
        if not found and not self._run.refusal:
            ever = any(one.classes is not None for one in self._run.evaluations.values())
            warn(self._findings.checks.of_nothing(stage_of(trainer), ever))
