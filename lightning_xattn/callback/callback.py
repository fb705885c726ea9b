"""The Lightning callback: its settings, and its hooks in the order in which a Trainer calls them."""

from __future__ import annotations

import inspect
import re
import sys
import uuid
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any
from zlib import crc32

from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils._pytree import tree_map

from lightning_xattn.attribution.contribution import FIT_SAMPLES
from lightning_xattn.attribution.kept_samples import MAX_SAMPLES
from lightning_xattn.attribution.ports import ModalitiesSetting
from lightning_xattn.callback.epoch_log import EpochLog, main_history
from lightning_xattn.callback.monitors import describe_risks, find_monitors
from lightning_xattn.callback.processes import describe_spawning, describe_tensor_parallelism, find_processes
from lightning_xattn.callback.run import Run
from lightning_xattn.callback.schedule import Schedule, moment, scope_of, stage_of
from lightning_xattn.callback.weights import describe_change, have_changed, sample_weights
from lightning_xattn.capture import AttentionSetting
from lightning_xattn.capture.labels import LabelSetting, Step
from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.core.distributed import SINGLE_PROCESS, unique_sample_indices
from lightning_xattn.core.errors import DiscoveryError, SettingError, XAttnError
from lightning_xattn.core.notices import begin_run, describe_error, end_run, info, warn
from lightning_xattn.evaluation.batch import Attentions
from lightning_xattn.evaluation.checks import check_directions, explain_empty_evaluation
from lightning_xattn.evaluation.evaluation import Evaluation, summarise_all
from lightning_xattn.evaluation.fusion_samples import sample_columns
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.evaluation.settings import Settings

CURVES = FIGURES = ("main", "all")

RECORDED = ("attention", "fusion")
"""The settings that say what of a step is recorded."""

STEPS = {"val": "validation", "test": "test", "predict": "predict"}
"""The name of a stage's step in a LightningModule."""

READ = (
    "predictions",
    "targets",
    "sample_ids",
    "groups",
    "query_mask",
    "present",
    "fusion",
    "modalities",
    "class_names",
)
"""The settings that say how a recorded step is read."""


def join_namespaces() -> None:
    """Make the callback one of ``lightning.pytorch`` too, where that is imported.

    Its Trainer and its command line take children of its own ``Callback`` alone, another class with the same hooks.
    Nobody who imports ``pytorch_lightning`` alone imports the other for it.
    """
    ours = AttentionExplainabilityCallback
    other = getattr(sys.modules.get("lightning.pytorch.callbacks.callback"), "Callback", None)
    if other is not None and not issubclass(ours, other):
        with suppress(TypeError):  # where a child of it is one of the other already, before this one
            ours.__bases__ = (*ours.__bases__, other)


class AttentionExplainabilityCallback(Callback):
    """Log how a model's modalities attend to each other, and what each of them predicts and contributes.

    Every validated and tested epoch it logs head entropy and modality alignment, per class and for correct against
    incorrect predictions: as scalars with ``LightningModule.log`` (so ``ModelCheckpoint`` and ``EarlyStopping`` can
    monitor them) and as figures in the Trainer's loggers: two in every epoch of a fit, and all of them when it ends.
    The model's outputs stay bit for bit the same. The sanity check before training checks the settings against a real
    batch; nothing of it is kept or logged.

    If the LightningModule or its data module has an attribute ``attention_axes``, a mapping from modality to
    ``TokenAxis``, the figures label the tokens with it.

    Parameters
    ----------
    attention
        Module paths by direction, seen from the LightningModule, e.g.
        ``{"eeg_to_spec": "model.fusion.eeg_to_spec_attn", "spec_to_eeg": "model.fusion.spec_to_eeg_attn"}``, or a
        ``JointSequence``, or callables (see ``docs/own-model.md``). None: found by name or, where no name says it, in
        the first batch. ``{}``: none is recorded.
    class_names
        A name for each class. None: the LightningModule's attribute ``class_names``, or ``class_0``, ``class_1``, ...
    classes_by
        "target" groups samples by their true class, "prediction" by the predicted one.
    predictions, targets
        Where a step's predictions (class scores or ids) and targets (class ids or soft labels) are. None: what the
        step returns, or else what its loss reads. A string: a key, field or attribute of the step's outputs, the batch
        or what ``forward`` returned; or a module's path, ``"model"`` or ``"model[logits]"``, for what it returns.
        A callable: ``(outputs, batch) -> tensor``, or ``(outputs, batch, forward) -> tensor`` with what ``forward``
        returned.
    sample_ids
        Where the samples' ids (numbers or strings) are, given as ``predictions`` is. None: the batch's ``sample_ids``.
    groups
        Where each sample's group is (a number or a string), given as ``predictions`` is. A group, such as a patient or
        a recording, holds samples that are not independent; every interval is then by group. None: the batch's
        ``groups`` or ``patient_ids``; without them samples count as independent.
    query_mask
        Which queries are real tokens, ``(batch, queries)``, True or 1, given as ``predictions`` is. It is for the
        queries of the first layer that is recorded in one direction only. Two directions that pair up give each other's
        padding; of a single one it is taken from a self-attention of the same tokens or from an argument of the module,
        where there is one. Else padding counts as any query does, and a warning says so.
    present
        Which samples have a modality that others lack, by modality, ``{"xray": "has_xray"}``: keys or callables, as for
        ``predictions``, that give ``(batch,)``, True or 1 for a sample that has it, False or 0 for one that lacks it.
        Samples that lack one are left out of probes and contributions, and are counted; in the attention their tokens
        of it are masked. A sample lacks a modality, too, if a mask of the attention or of a named ``fusion`` hides all
        of its tokens.
    fusion, modalities
        What holds each of two to four modalities: paths of modules, items of what they return and keys of the batch,
        ``modalities={"audio": "audio_encoder", "text": ["tokens", "text_encoder"]}``; or arguments of a fusion, by
        position or name, ``fusion="model.fusion", modalities={"eeg": 0, "spec": "spec_tokens"}``. None: the inputs
        that reach the predictions by modules of their own. Cross-attention is not needed.
    contribution_samples
        How many samples of an evaluation have their modalities permuted at its end, to measure how much each modality
        contributes; 0: none. None: 128, but 64 in those epochs of a fit that do not test faithfulness, where the
        standard error of a modality's share is then about .029 and not .024.
    max_samples
        How many samples of an evaluation the linear probes are fitted on, at most.
    curves
        "main": log the curves that are acted on: about twenty, and of up to ten classes the alignment and the entropies
        of each. "all": also those of single heads, of the ten largest of more classes, and the rest. What is monitored
        is logged in any case.
    every_n_epochs
        During ``fit``, record every n-th of the epochs that are validated, from the first on.
        ``trainer.validate`` and ``trainer.test`` always record.
    figures_every_n_epochs
        Hand figures to the loggers in every n-th recorded epoch of a fit; 0: never, also not at its end, and none of
        ``trainer.validate`` and ``trainer.test``, which else always do.
    figures
        "main": in an epoch of a fit these are the card (probe accuracy, contribution, support) and the attention card
        (alignment, entropy and mean maps by class). All others, the summary, the report and the files of the table are
        of the last recorded epoch and come when the fit ends, also by
        ``EarlyStopping``, ``max_steps`` or Ctrl-C; after an error there are none. "all": each of those epochs has all.
    faithfulness_every_n_epochs
        Test whether the attention ranks the keys that the model uses, in every n-th recorded epoch and in the last one
        of a fit by ``max_epochs``; 0: never. It takes 128 permuted samples, see ``contribution_samples``.
        ``trainer.validate`` and ``trainer.test`` always do.
    every_n_batches
        Record every n-th batch of each evaluation, from the first on. All numbers, also the count of samples, are then
        of the recorded batches alone.
    table
        A folder for one row per sample, epoch and layer, as Parquet files (see ``SampleTable``). The column ``run``
        identifies a run of a Trainer; the latest sorts last. None: no table.

    Attributes
    ----------
    history : list of dict
        One record per recorded epoch, dataloader and layer: ``stage``, ``epoch``, ``step``, ``dataloader``, ``layer``,
        ``samples``, ``groups`` (a count; None where they are not known), ``repeats`` (samples dropped because another
        process had them), ``left_out_batches`` (that could not be recorded), ``other_lengths`` (samples left out
        because their joint sequence has another length than its spans are for), ``ties`` and ``unclassified`` samples,
        ``wholly_masked`` (samples of which one modality is), ``accuracy``, the comparisons of correct with incorrect
        predictions, and the epoch's curves by their names without the scope. It is saved in checkpoints. With
        ``strategy="ddp_spawn"`` or ``"ddp_notebook"`` it stays empty, as the callback runs in other processes.
    summaries : dict of str to LayerSummary
        The last epoch of each scope, such as ``val``, ``test`` or ``val/dataloader_1``.
    fusion_summaries : dict of str to FusionSummary
        What each modality predicts and contributes in the last epoch of each scope.

    Raises
    ------
    SettingError
        If a setting has a value that is not allowed.

    Examples
    --------
    >>> callback = AttentionExplainabilityCallback()
    >>> trainer = Trainer(callbacks=[callback], logger=False, enable_progress_bar=False)
    >>> losses = trainer.validate(model, loader, verbose=False)  # of 23 samples
    >>> callback.summaries["val"]
    LayerSummary(23 samples, 4 classes; audio_to_text of 3 heads, text_to_audio of 3 heads)
    >>> callback.history[0]["stage"], callback.history[0]["samples"]
    ('val', 23)
    """

    def __init__(
        self,
        attention: AttentionSetting | None = None,
        *,
        class_names: Sequence[str] | None = None,
        classes_by: str = "target",
        predictions: LabelSetting = None,
        targets: LabelSetting = None,
        sample_ids: LabelSetting = None,
        groups: LabelSetting = None,
        query_mask: LabelSetting = None,
        present: Mapping[str, LabelSetting] | None = None,
        fusion: str | None = None,
        modalities: ModalitiesSetting | None = None,
        contribution_samples: int | None = None,
        max_samples: int = MAX_SAMPLES,
        curves: str = "main",
        every_n_epochs: int = 1,
        figures_every_n_epochs: int = 1,
        figures: str = "main",
        faithfulness_every_n_epochs: int = 10,
        every_n_batches: int = 1,
        table: str | Path | None = None,
    ) -> None:
        join_namespaces()
        super().__init__()
        labels = predictions, targets, sample_ids, groups, query_mask, present
        fusion_inputs = fusion, modalities, contribution_samples, max_samples
        self.settings = Settings(attention, class_names, classes_by, *labels, *fusion_inputs, table)
        if curves not in CURVES:
            raise SettingError(f"curves must be one of {', '.join(CURVES)}; got {curves!r}.")
        if figures not in FIGURES:
            raise SettingError(
                f"figures must be one of {', '.join(FIGURES)}; got {figures!r}. For none: figures_every_n_epochs=0."
            )
        self.curves, self.figures = curves, figures
        self.schedule = Schedule(every_n_epochs, figures_every_n_epochs, faithfulness_every_n_epochs, every_n_batches)
        self.history: list[dict[str, Any]] = []
        self.summaries: dict[str, LayerSummary] = {}
        self.fusion_summaries: dict[str, FusionSummary] = {}
        self._fit_begins = 0
        self._run = Run()

    def __repr__(self) -> str:
        recorded = ", ".join({**self.summaries, **self.fusion_summaries}) or "nothing"
        return f"AttentionExplainabilityCallback(classes_by='{self.settings.classes_by}'; recorded so far: {recorded})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run, whose first batch settles anew what is recorded.

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
        end_run(self._run)
        self._run = run = Run(stage == "fit", weakref.ref(trainer), processes=find_processes(trainer))
        begin_run(run)
        if run.is_fit:
            self._fit_begins = len(self.history)
        make = partial(
            Evaluation,
            self.settings,
            pl_module,
            expects_targets=stage != "predict",
            keeps_maps=stage == "test",  # after which there is a page
            processes=run.processes,
        )
        first = make()
        # One for each dataloader, as their batches may differ; their classes are those of the first.
        run.evaluations = defaultdict(partial(make, first), {0: first})
        if reason := describe_tensor_parallelism(trainer, run.processes):
            run.refuse(reason)
        if self.settings.table is not None:
            now = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:4]}"
            run.name = trainer.strategy.broadcast(now)
        if trainer.world_size > 1:
            # What is logged is the same on every process already; Lightning cannot know, and says so for each name.
            warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\('xattn_")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the attention before training starts, so that a wrong path fails at once; warn of what monitors curves.

        Raises
        ------
        XAttnError
            If ``attention`` or ``fusion`` names what the model does not have.
        """
        self._make_recorder(pl_module)
        self._run.monitors = find_monitors(trainer, self._scope(trainer)(0, ""))
        warn(describe_risks(self._run.monitors, self.schedule))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to record, if this epoch is one to record."""
        run = self._run
        run.stop()
        run.stage = stage_of(trainer)
        if not self.schedule.records(trainer):
            return
        run.is_recording = True
        self._make_recorder(pl_module)
        is_rehearsal = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
        if self.settings.table is not None and not is_rehearsal and run.recorder is not None:
            from lightning_xattn.evaluation.table import TrainingTable  # pyarrow, only where a table is wanted

            about = {"run": run.name} | moment(trainer)
            name = "{run}-{stage}-epoch={epoch}-step={step}".format(**about)
            name += f"-rank={run.processes.rank}-of-{run.processes.count}"
            run.table = TrainingTable(Path(self.settings.table), name, about)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Wrap the model's modules, if this batch is one to record."""
        if self._records(batch_idx):
            assert self._run.recorder is not None
            with self._run.refusing(self.settings, *RECORDED, dataloader=dataloader_idx):
                step = getattr(pl_module, f"{STEPS[self._run.stage]}_step")
                args = (batch, batch_idx, dataloader_idx)
                finder = self._run.evaluations[dataloader_idx].finder
                self._run.recorder.begin(step, _fitting_arguments(step, args), finder)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Unwrap the model's modules, read what was recorded, and add it to the running sums."""
        run, evaluation, taken = self._run, self._run.evaluations[dataloader_idx], None
        if not self._records(batch_idx):
            evaluation.totals.left_out_batches += int(self._is_due(batch_idx) and bool(run.refusal))
            return
        recorder = run.recorder
        assert recorder is not None
        recorder.close()
        loaders = getattr(trainer, f"{run.stage}_dataloaders")
        own_samples = partial(unique_sample_indices, loaders, dataloader_idx, batch_idx)
        with run.refusing(self.settings, *RECORDED, dataloader=dataloader_idx):
            taken = self._take(outputs, batch)
            if left_out := recorder.left_out:
                evaluation.leave_out(left_out, taken is None, own_samples(max(left_out.values())))
        if taken is not None:
            with run.refusing(self.settings, *READ, dataloader=dataloader_idx):
                if run.weights is None:
                    run.weights = sample_weights(pl_module)
                result = evaluation.read(*taken, recorder)
                if not run.has_recorded:
                    run.has_recorded = True
                    warn(check_directions(recorder.layers), once=True)
                    described = evaluation.describe(result, recorder)
                    info(f"AttentionExplainabilityCallback: recording {described}.", once=True)
                for columns in evaluation.add(result, own_samples(len(result)), run.table is not None):
                    assert run.table is not None
                    run.table.add(columns | {"dataloader": dataloader_idx})
        recorder.clear()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum the evaluation up, and log its curves and figures; of the sanity check nothing is logged."""
        if self._run.is_recording:
            self._run.resolve_doubt(bool(trainer.sanity_checking))
        if self._run.is_recording and not trainer.sanity_checking:
            self._end_evaluation(trainer, pl_module, logs=True)
        elif not trainer.sanity_checking:
            self._log(trainer, pl_module).log_absent()
        self._run.stop()

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
        """Write the table; ``summaries`` and ``fusion_summaries`` have what is known of all samples."""
        if self._run.is_recording:
            self._run.resolve_doubt(is_rehearsal=False)
            self._end_evaluation(trainer, pl_module, logs=False)
        self._run.stop()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the loggers what the epochs did not: all figures and the report of the last one that was recorded."""
        self._run.draw_rest()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unwrap the model: after a crash Lightning does not call ``teardown``. Ctrl-C ends a fit as usual."""
        if self._run.trainer() in (None, trainer):
            if isinstance(exception, KeyboardInterrupt):
                self._run.draw_rest()
                self._run.print_summary()
            self._run.undrawn = None
            self._run.stop()
            end_run(self._run)
            self._run.trainer = lambda: None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print what the last recorded epoch says; unwrap the model, and forget it and the Trainer."""
        self._run.stop()
        self._run.print_summary()
        end_run(self._run)
        self._run = Run()
        if reason := describe_spawning(trainer):
            info(reason, once=True)

    def __getstate__(self) -> dict[str, Any]:
        """What was found, but nothing of a run, its model and its Trainer."""
        # Lightning puts the model's own methods here.
        of_run = "_run", "log", "log_dict"
        return {name: value for name, value in vars(self).items() if name not in of_run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._run = Run()

    @cached_property
    def state_key(self) -> str:  # Lightning asks hundreds of times an epoch
        """The name of the state in a checkpoint: the same for the same measurements, whatever schedule and table."""
        measured = {name: value for name, value in vars(self.settings).items() if name != "table"}
        described = self._generate_state_key(**tree_map(_identify_function, measured))
        return re.sub(" at 0x[0-9a-fA-F]+", "", described)  # of other callables the names

    def state_dict(self) -> dict[str, Any]:
        """The history, in plain types: a checkpoint with it loads with ``weights_only=True``.

        Of the history it has the main curves alone, whatever ``curves`` is.
        """
        return {"history": main_history(self.history), "fit_begins": self._fit_begins}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's history, unless there is one already and the checkpoint is only tested."""
        if "history" in state_dict and (self._run.is_fit or not self.history):
            self.history = state_dict["history"]
            self._fit_begins = state_dict["fit_begins"]

    def _make_recorder(self, module: LightningModule) -> None:
        run = self._run
        if run.recorder is None and not run.refusal:
            with run.refusing(self.settings, *RECORDED):
                run.recorder = self.settings.recorder(module, run.processes)

    def _is_due(self, batch_idx: int) -> bool:
        return self._run.is_recording and batch_idx % self.schedule.every_n_batches == 0

    def _records(self, batch_idx: int) -> bool:
        return self._is_due(batch_idx) and not self._run.refusal

    def _take(self, outputs: Any, batch: Any) -> tuple[Step, Attentions] | None:
        """What the recorder has of a step; None if the step may have ended before it ran what is looked for."""
        assert self._run.recorder is not None
        try:
            return self._run.recorder.collect_step(outputs, batch)
        except DiscoveryError as error:
            is_named = self.settings.attention is not None or self.settings.fusion is not None
            if outputs is not None or self._run.has_recorded or is_named:
                raise
            self._run.doubt = str(error)
            return None

    def _end_evaluation(self, trainer: Trainer, pl_module: LightningModule, logs: bool) -> None:
        """Sum the evaluation up and log it; what goes wrong is a warning, unless other processes wait for this one."""
        run, action = self._run, "summed up"
        try:
            results, tables = self._sum_up(trainer, pl_module)
            if logs:
                action, past = "logged", self.history[self._fit_begins :]
                self.history += self._log(trainer, pl_module).log(results, run.evaluations, past, tables)
        except Exception as error:  # whatever it is, the user's run goes on
            # Other processes wait for this one while they sum up; what is raised on purpose is raised on all of them.
            if action == "summed up" and run.processes is not SINGLE_PROCESS and not isinstance(error, XAttnError):
                raise
            warn(f"An evaluation ('{stage_of(trainer)}') could not be {action}. {describe_error(error)}", once=True)
            return
        is_known = run.recorder is not None and run.recorder.has_nothing  # which was said in the first step
        if not run.refusal and not is_known and not any(one.summaries or one.fusion for one in results.values()):
            ever = any(one.classes is not None for one in run.evaluations.values())
            warn(explain_empty_evaluation(stage_of(trainer), ever), once=f"empty evaluation {ever}")

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> EpochLog:
        settings = self.settings, self.schedule, self.curves == "all", self.figures == "all"
        return EpochLog(trainer, pl_module, self._scope(trainer), self._run, *settings)

    def _scope(self, trainer: Trainer) -> Callable[[int, str], str]:
        return partial(scope_of, trainer, self, AttentionExplainabilityCallback)

    def _sum_up(self, trainer: Trainer, pl_module: LightningModule) -> tuple[dict[int, DatasetResult], dict[str, Path]]:
        run, scope = self._run, self._scope(trainer)
        if run.recorder is None:  # the same on all processes
            return {}, {}
        change = describe_change(trainer, self) if have_changed(run.weights or ()) else ""
        for evaluation in run.evaluations.values():
            evaluation.totals.recording_problem, evaluation.totals.replay_problem = run.refusal, change
        tests_attention = self.schedule.tests_attention(trainer)
        is_quick = run.is_fit and not tests_attention and self.settings.contribution_samples is None
        permuted = FIT_SAMPLES if is_quick else None
        ended = dict(summarise_all(run.evaluations, run.recorder, run.processes, tests_attention, permuted))
        axes = _attention_axes(trainer, pl_module)
        results = {number: replace(one, axes=axes) for number, one in ended.items()}
        run.layers.update(dict.fromkeys(layer for one in results.values() for layer in one.summaries))
        for number, one in results.items():
            for layer, summary in one.summaries.items():
                self.summaries[scope(number, layer if len(run.layers) > 1 else "")] = summary
            if one.fusion is not None:
                self.fusion_summaries[scope(number, "")] = one.fusion
        return results, self._close_table(results)

    def _close_table(self, results: Mapping[int, DatasetResult]) -> dict[str, Path]:
        """The files of the sample table of this evaluation, which are complete now."""
        run = self._run
        if run.table is None:
            return {}
        if any(one.has_dropped for one in run.evaluations.values()):
            run.table.discard()
            warn("The sample table lacks this evaluation, whose first rows took several labels at once for a class.")
            return {}
        fusions = {number: one.fusion for number, one in results.items() if one.fusion is not None}
        is_first = run.processes.rank == 0  # which knows the samples of all processes
        samples = [{"dataloader": number, **sample_columns(one)} for number, one in fusions.items() if is_first]
        return run.table.close(samples)


def _fitting_arguments(step: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those of a step's arguments that it takes, as Lightning passes them."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return args[:2]
    by_position = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    takes_any = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    return args[:2] if takes_any else args[: len(by_position)]


def _identify_function(setting: Any) -> Any:
    """A function's name and a number of its code, as lambdas of one place share a name; anything else as it is."""
    if not isinstance(setting, FunctionType):
        return setting
    code = setting.__code__
    constants = [one.co_code if isinstance(one, CodeType) else one for one in code.co_consts]
    return f"{setting.__qualname__}#{crc32(repr((code.co_code, code.co_names, constants)).encode()):08x}"


def _attention_axes(trainer: Trainer, module: LightningModule) -> dict[str, TokenAxis]:
    """The axes of the tokens, from the module's or else its data module's attribute ``attention_axes``."""
    holders = module, getattr(trainer, "datamodule", None)
    return next((axes for axes in (getattr(holder, "attention_axes", None) for holder in holders) if axes), {})
