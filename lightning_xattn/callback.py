"""The Lightning callback: hooks and wiring only."""

from __future__ import annotations

import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from lightning_xattn.aggregation import LayerAccumulator, LayerSummary, merge_sums
from lightning_xattn.alarms import Alarms
from lightning_xattn.attention import AttentionPair, mask_queries
from lightning_xattn.capture import AttentionRecorder, AttentionSetting, check_attention
from lightning_xattn.distributed import count_repeats, gather
from lightning_xattn.epoch import epoch_counts, epoch_curves, epoch_figures
from lightning_xattn.errors import SettingError, XAttnError, XAttnWarning
from lightning_xattn.grouping import (
    GROUPINGS,
    check_class_names,
    missing_labels,
    name_classes,
    name_groups,
    usable_names,
)
from lightning_xattn.labels import LabelFinder, LabelSetting, Step
from lightning_xattn.phrases import named
from lightning_xattn.schedule import Schedule, logged_step
from lightning_xattn.sinks import log_images
from lightning_xattn.sums import add_batch

if TYPE_CHECKING:
    from lightning_xattn.table import SampleTable


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
        ``JointSequence``, or callables (see the README). None: found by name or, where no name tells, in the first
        batch.
    class_names
        A name for each class. None: the LightningModule's attribute ``class_names``, or ``class_0``, ``class_1``, ...
    group_by
        "target" groups samples by their true class, "prediction" by the predicted one.
    predictions, targets
        Where a step's predictions (class scores or ids) and targets (class ids or soft labels) are. None: found in
        the step's outputs, the module's own ``forward``, the batch. A string: a key of one of these.
        A callable: ``(outputs, batch) -> tensor``, or ``(outputs, batch, forward) -> tensor`` with what ``forward``
        returned.
    sample_ids
        Where the samples' ids (numbers or strings) are, for the table: as ``predictions``. None: the batch's
        ``sample_ids``, if there are any.
    groups
        Where the group of each sample is (a number or a string), of which the samples are not independent, such as a
        patient or a recording: as ``predictions``. Every interval is then by group. None: the batch's ``groups`` or
        ``patient_ids``; without them samples are taken as independent.
    query_mask
        Which queries are real tokens, ``(batch, queries)``, True or 1: as ``predictions``; of the modality that asks in
        the first layer of which only one direction is recorded. Of two directions that pair up each tells it of the
        other; of one alone it is taken from a self-attention of the same tokens or from an argument of the module,
        where there is one. Else padding counts as any query does, and a warning says so.
    every_n_epochs
        During ``fit``, record every so many of the epochs that are validated, from the first on.
        ``trainer.validate`` and ``trainer.test`` always record.
    figures_every_n_epochs
        Draw figures every so many epochs, of those that are recorded; 0: never.
    every_n_batches
        Record every so many batches of each evaluation, from the first on. All numbers, also the count of samples, are
        then of the recorded batches alone.
    table
        A folder for one row per sample, epoch and layer, as Parquet files (see ``SampleTable``). None: no table.

    Attributes
    ----------
    history : list of dict
        One record per recorded epoch, dataloader and layer: ``stage``, ``epoch``, ``step``, ``dataloader``, ``layer``,
        ``samples``, ``groups`` (how many; None where they are not known), ``repeats`` (samples dropped because another
        process had them), ``ties`` and ``unclassified`` samples, the intervals and gaps of ``epoch_counts``, and the
        epoch's curves by their names without the scope. It is saved in checkpoints.
        ``pandas.DataFrame(callback.history)``.
    summaries : dict of str to LayerSummary
        The last epoch of each scope, such as ``val``, ``test`` or ``val/dataloader_1``.

    Raises
    ------
    SettingError
        If a setting has a value that is not allowed.
    XAttnError
        If ``lightning`` is imported in a version whose Trainer does not take this callback.

    Examples
    --------
    >>> trainer = Trainer(callbacks=[AttentionExplainabilityCallback()])
    """

    def __init__(
        self,
        attention: AttentionSetting | None = None,
        class_names: Sequence[str] | None = None,
        group_by: str = "target",
        predictions: LabelSetting = None,
        targets: LabelSetting = None,
        sample_ids: LabelSetting = None,
        groups: LabelSetting = None,
        query_mask: LabelSetting = None,
        every_n_epochs: int = 1,
        figures_every_n_epochs: int = 1,
        every_n_batches: int = 1,
        table: str | Path | None = None,
    ) -> None:
        super().__init__()
        _require_lightning_that_takes_it()
        if attention is not None:
            check_attention(attention)
        if group_by not in GROUPINGS:
            raise SettingError(f"group_by must be one of {', '.join(GROUPINGS)}; got {group_by!r}.")
        self.attention = attention
        self.class_names = None if class_names is None else check_class_names(class_names)
        self.group_by = group_by
        self.schedule = Schedule(every_n_epochs, figures_every_n_epochs, every_n_batches)
        if table is not None and find_spec("pyarrow") is None:
            raise SettingError('table writes Parquet files with pyarrow: pip install "lightning-xattn[table]".')
        self.table = None if table is None else Path(table)
        # What tells two callbacks apart in a checkpoint; a callable by its name, which stays from run to run.
        labels = {"predictions": predictions, "targets": targets, "sample_ids": sample_ids, "groups": groups}
        labels["query_mask"] = query_mask
        self._settings = {name: named(value) for name, value in ({"attention": attention} | labels).items()}
        self._settings |= {"class_names": self.class_names, "group_by": group_by}
        self._settings |= {"schedule": self.schedule, "table": None if table is None else str(table)}
        self.history: list[dict[str, Any]] = []
        self.summaries: dict[str, LayerSummary] = {}
        # One for each dataloader, as their batches may differ.
        new_finder = partial(LabelFinder, **labels)
        self._labels = defaultdict[int, LabelFinder](new_finder, {0: new_finder()})
        self._recorder: AttentionRecorder | None = None
        self._recording = False
        # One for each layer of each dataloader.
        self._accumulators = defaultdict[int, dict[str, LayerAccumulator]](dict)
        self._table: SampleTable | None = None
        self._repeats: Counter[int] = Counter()
        # The names of the classes, once a first batch has passed the checks.
        self._classes: tuple[str, ...] | None = None
        self._alarms = Alarms()
        self._resumes = True

    @property
    def state_key(self) -> str:
        """Tells callbacks with different settings apart in a checkpoint."""
        return self._generate_state_key(**self._settings)

    def state_dict(self) -> dict[str, Any]:
        """The history, in plain types: a checkpoint with it loads with ``weights_only=True``."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's history; only a fit does, a checkpoint that is tested has nothing to add."""
        if self._resumes or not self.history:
            self.history = list(state_dict["history"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look anew at the first batch of what is to run."""
        self._resumes = stage == "fit"
        self._classes = self._recorder = None
        self._labels.clear()
        if trainer.world_size > 1:
            # What is logged is the same on every process already; Lightning cannot know, and says so for each name.
            warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\('xattn_")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the attention before training starts, so that a wrong path fails at once."""
        self._recorder = AttentionRecorder(pl_module, self.attention)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to record, if this epoch is one to record."""
        self._start(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to record."""
        self._start(trainer, pl_module, "test")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put the hooks on the model, if this batch is one to record."""
        self._watch(batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put the hooks on the model, if this batch is one to record."""
        self._watch(batch_idx)

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
        self._add_batch(pl_module, outputs, batch, batch_idx, dataloader_idx, trainer.val_dataloaders)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch to the running sums."""
        self._add_batch(pl_module, outputs, batch, batch_idx, dataloader_idx, trainer.test_dataloaders)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's curves and figures."""
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's curves and figures."""
        self._finish(trainer, pl_module, "test")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take every hook off the model: after a crash Lightning does not call ``teardown``."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take every hook off the model, and let go of it."""
        self._stop()
        self._recorder = None

    def _start(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()
        if not self.schedule.records(trainer):
            return
        self._recording = True
        if self._recorder is None:
            self._recorder = AttentionRecorder(pl_module, self.attention)
        rehearsal = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
        if self.table is not None and not rehearsal:
            from lightning_xattn.table import SampleTable  # pyarrow, only where a table is wanted

            epoch, step, rank = trainer.current_epoch, logged_step(trainer), trainer.global_rank
            name = f"{stage}-epoch={epoch}-step={step}-rank={rank}"
            self._table = SampleTable(self.table, name, {"stage": stage, "epoch": epoch, "step": step})

    def _watch(self, batch_idx: int) -> None:
        if self._recording and self.schedule.samples(batch_idx):
            assert self._recorder is not None
            self._recorder.__enter__()

    def _stop(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder.clear()
        if self._table is not None:
            self._table.discard()
        self._recording, self._table = False, None
        self._accumulators.clear()
        self._repeats = Counter()

    def _add_batch(
        self, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int, loaders: Any
    ) -> None:
        if not (self._recording and self.schedule.samples(batch_idx)):
            return
        assert self._recorder is not None
        self._recorder.close()
        self._recorder.batch = batch
        pairs, forward_output = self._recorder.attention, self._recorder.output
        self._recorder.clear()
        if not pairs:
            return
        first = pairs[0].forward.weights
        batch_size = len(first)
        step = Step(outputs, batch, forward_output, batch_size, first.device, tuple(first.shape[2:]))
        several = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
        loader = several[dataloader_idx] if isinstance(several, (list, tuple)) else several
        repeats = count_repeats(loader, batch_idx, batch_size)
        self._repeats[dataloader_idx] += repeats
        kept = slice(batch_size - repeats)
        finder = self._labels[dataloader_idx]
        labels, query_mask = finder.find(step)[kept], finder.find_query_mask(step)
        pairs = mask_queries(pairs, query_mask)
        _warn(self._alarms.of_padding(pairs))
        if self._classes is None:
            self._classes = name_classes(labels, self.class_names or self._own_names(pl_module), self.group_by, step)
            _warn(missing_labels(labels, self._classes, self.group_by, step))
            _warn(self._alarms.of_directions(self._recorder.layers))
            rank_zero_info(f"AttentionExplainabilityCallback takes {_found(pairs, finder.places, labels.n_classes)}.")

        about: dict[str, Any] = {"dataloader": dataloader_idx}
        if self.table is not None:  # also in the sanity check, to fail early
            ids = finder.find_sample_ids(step)
            about |= {"sample_id": None if ids is None else ids[kept], "group": labels.group_ids}
        accumulators, kept_pairs = self._accumulators[dataloader_idx], [pair[kept] for pair in pairs]
        for columns in add_batch(accumulators, kept_pairs, labels, self.group_by, len(self._classes)):
            if self._table is not None:
                self._tabulate(partial(self._table.add, columns | about))

    def _finish(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._recording:
            return
        if not trainer.sanity_checking:
            if self._table is not None:
                self._tabulate(self._table.close)
            self._log_epoch(trainer, pl_module, stage)
        self._stop()

    def _tabulate(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # a full disk, a folder that is a file: no table must end a training run
            _warn([f"The sample table in {self.table} lacks this evaluation: {error!r}."])
            assert self._table is not None
            self._table.discard()
            self._table = None

    def _log_epoch(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        sums = {
            (dataloader_idx, layer): accumulator.sums().cpu()
            for dataloader_idx, layers in self._accumulators.items()
            for layer, accumulator in layers.items()
        }
        several = [dataloader_idx for dataloader_idx, finder in self._labels.items() if finder.has_several]
        processes = gather((self._classes, self._repeats, sums, several))
        self._classes = next((classes for classes, *_ in processes if classes is not None), None)
        repeats: Counter[int] = sum((counted for _, counted, *_ in processes), Counter())
        no_classes = {dataloader_idx for *_, several in processes for dataloader_idx in several}
        # In the order of the first process that has them, so that every process logs the same names in one order.
        keys = sorted({key: None for _, _, sums, _ in processes for key in sums}, key=lambda key: key[0])
        for dataloader_idx in sorted(no_classes):
            _warn([self._labels[dataloader_idx].drop_targets()])
        if not keys:
            _warn(self._alarms.of_nothing(stage))
        for dataloader_idx, layer in keys:
            parts = [sums[dataloader_idx, layer] for _, _, sums, _ in processes if (dataloader_idx, layer) in sums]
            merged, classes = merge_sums(parts), self._classes or ()
            if dataloader_idx in no_classes:
                merged, classes = merged.without_labels(), ()
            summary = LayerSummary(merged)
            scope = self._scope(trainer, stage, dataloader_idx, layer, first=keys[0][1])
            self.summaries[scope] = summary
            curves = epoch_curves(summary, scope, name_groups(classes, self.group_by))
            pl_module.log_dict(curves, on_step=False, on_epoch=True, batch_size=1)
            self.history.append(
                {
                    "stage": stage,
                    "epoch": trainer.current_epoch,
                    "step": logged_step(trainer),
                    "dataloader": dataloader_idx,
                    "layer": layer,
                    "samples": summary.samples,
                    "groups": summary.groups() if summary.group_noun else None,
                    "repeats": repeats[dataloader_idx],
                }
                | epoch_counts(summary)
                | {name.removeprefix("xattn_").replace(f"/{scope}/", "/"): value for name, value in curves.items()}
            )
            if trainer.is_global_zero:
                _warn(self._alarms.of_epoch(layer, summary))
                self._draw(trainer, pl_module, summary, scope, classes)
        if no_classes >= self._labels.keys():
            self._classes = ()

    def _scope(self, trainer: Trainer, stage: str, dataloader_idx: int, layer: str, first: str) -> str:
        """The stage, and what tells this apart: the first callback, dataloader and layer go without saying."""
        everyone = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
        ours = [callback for callback in everyone if isinstance(callback, AttentionExplainabilityCallback)]
        scope = stage
        scope += f"/callback_{ours.index(self)}" if self in ours[1:] else ""
        scope += f"/dataloader_{dataloader_idx}" if dataloader_idx else ""
        return scope + (f"/{layer}" if layer != first else "")

    def _draw(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        summary: LayerSummary,
        scope: str,
        classes: tuple[str, ...],
    ) -> None:
        if not trainer.loggers or not self.schedule.draws(trainer):
            return
        from lightning_xattn.visualizations import render  # matplotlib, only where figures are wanted

        axes = getattr(pl_module, "attention_axes", None)
        axes = axes or getattr(getattr(trainer, "datamodule", None), "attention_axes", None) or {}
        figures = epoch_figures(
            summary,
            scope,
            classes,
            group_by=self.group_by,
            axes=axes,
            context=f"{scope}, epoch {trainer.current_epoch}",
        )
        try:
            log_images(trainer.loggers, ((tag, render(figure)) for tag, figure in figures), logged_step(trainer))
        except Exception as error:  # a figure that cannot be drawn must not end a training run
            _warn([f"The figures of {scope} could not be drawn: {error!r}."])

    @staticmethod
    def _own_names(pl_module: LightningModule) -> tuple[str, ...] | None:
        names, refusal = usable_names(getattr(pl_module, "class_names", None))
        _warn(f"The class_names of {type(pl_module).__name__} are not used: {why}" for why in refusal)
        return names


def _require_lightning_that_takes_it() -> None:
    """Refuse a ``lightning`` whose Trainer ends with "Expected a parent", before any code of ours could say why.

    This callback is a child of ``pytorch_lightning.Callback``, which to ``lightning.pytorch`` is a stranger.
    """
    lightning = sys.modules.get("lightning")
    if lightning is not None and "lightning.pytorch" in sys.modules and Version(lightning.__version__) < Version("2.6"):
        raise XAttnError(
            f"lightning {lightning.__version__} is imported, whose Trainer takes no callback that is made for "
            'pytorch_lightning; expected lightning 2.6 or later. Update it: pip install "lightning>=2.6". Or '
            "import pytorch_lightning in its place."
        )


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        rank_zero_warn(message, category=XAttnWarning, stacklevel=3)


def _found(pairs: Sequence[AttentionPair], places: Mapping[str, str], n_classes: int | None) -> str:
    """What was taken for what, in a few words, so that a name that means something else is seen at once."""
    first = [
        f"{one.direction} ({one.weights.shape[2]} queries ask {one.tokens} keys)" for one in pairs[0].directions
    ] + ([f"{len(pairs) - 1} more layer(s)"] if len(pairs) > 1 else [])
    labels = ", ".join(f"{what} from {place}" for what, place in places.items()) or "no labels"
    return f"{', '.join(first)}; {labels}" + (f", of {n_classes} classes" if n_classes else "")
