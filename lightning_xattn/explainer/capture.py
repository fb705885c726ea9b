"""The offline explainer: one sample, one batch, or a whole loader of a trained model, with the callback's numbers."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningModule
from torch import nn

from lightning_xattn.alarms import Alarms
from lightning_xattn.attention import AttentionPair, TokenAxis
from lightning_xattn.attention_analysis import check_count
from lightning_xattn.capture import AttentionRecorder, AttentionSetting, check_attention
from lightning_xattn.errors import DataError, DiscoveryError, SettingError, XAttnWarning
from lightning_xattn.explainer.batches import count_samples, join_samples, take_samples, to_device
from lightning_xattn.explainer.dataset import DatasetSums, LoaderRun
from lightning_xattn.explainer.describe import describe_batch, single_keys
from lightning_xattn.explainer.passes import Explained, Pass
from lightning_xattn.explanation import BatchExplanation, DatasetExplanation, SingleExplanation
from lightning_xattn.functional import require_heads
from lightning_xattn.grouping import GROUPINGS, check_class_names, name_classes, usable_names
from lightning_xattn.labels import LabelFinder, LabelSetting, Step
from lightning_xattn.phrases import named

if TYPE_CHECKING:
    from lightning_xattn.explainer.progress import ExplainedFolder


class ExplainabilityCapture:
    """Explain what a trained model's two modalities attend to, sample by sample.

    The model is put into eval mode for as long as it is explained, every module is put back into the mode it had, and
    its outputs stay bit for bit the same. Batches are moved to where the model is; what is returned is on the CPU.
    Numbers are those of the callback: the same functions over the same samples.

    Parameters
    ----------
    model
        Any module whose attention ``AttentionRecorder`` finds.
    num_heads
        How many heads the attention must have; None: as many as it has.
    attention, class_names, group_by, predictions, targets, sample_ids, groups, query_mask
        As ``AttentionExplainabilityCallback`` takes them; ``outputs`` are those of ``predict``, and ``group_by`` is
        for ``explain_loader``.
    axes
        What the tokens of each modality are, e.g. ``datamodule.attention_axes``, so that pairs get places. None: the
        model's attribute ``attention_axes``.
    predict
        How to run the model: ``(model, batch) -> outputs``. None: its ``predict_step(batch, 0)``, which unless
        overridden is ``model(batch)``; of other modules ``model(batch)``.
    max_batch_size
        Run the model over at most so many samples at once: a larger batch is split. None: over whole batches.
    top_k
        How many pairs to name for each sample and direction.

    Raises
    ------
    SettingError
        If a setting has a value that is not allowed.
    DiscoveryError
        If the model has no cross-attention that is found.

    Examples
    --------
    >>> explainer = ExplainabilityCapture(model, axes=datamodule.attention_axes)
    >>> results = explainer.explain_batch(next(iter(datamodule.test_dataloader())))
    >>> results["per_sample_explanations"][0]["top_attention_places"]["eeg_to_spec"][0]
    """

    def __init__(
        self,
        model: nn.Module,
        num_heads: int | None = None,
        *,
        attention: AttentionSetting | None = None,
        class_names: Sequence[str] | None = None,
        group_by: str = "target",
        predictions: LabelSetting = None,
        targets: LabelSetting = None,
        sample_ids: LabelSetting = None,
        groups: LabelSetting = None,
        query_mask: LabelSetting = None,
        axes: Mapping[str, TokenAxis] | None = None,
        predict: Callable[[Any, Any], Any] | None = None,
        max_batch_size: int | None = None,
        top_k: int = 5,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SettingError(f"model must be a torch module; got a {type(model).__name__}.")
        if attention is not None:
            check_attention(attention)
        if group_by not in GROUPINGS:
            raise SettingError(f"group_by must be one of {', '.join(GROUPINGS)}; got {group_by!r}.")
        self._labels = {"predictions": predictions, "targets": targets, "sample_ids": sample_ids, "groups": groups}
        self._labels["query_mask"] = query_mask
        self._finder()  # checks them
        if predict is not None and not callable(predict):
            raise SettingError(f"predict must be a callable (model, batch) -> outputs, or None; got {predict!r}.")
        for name, count in (("num_heads", num_heads), ("max_batch_size", max_batch_size), ("top_k", top_k)):
            check_count(name, count)
        self._alarms = Alarms()
        self._told: set[str] = set()
        self.model = model
        self.num_heads = num_heads
        self.attention = attention
        self.group_by = group_by
        self.predict = predict
        self.max_batch_size = max_batch_size
        self.top_k = top_k
        self.class_names = self._own_names() if class_names is None else check_class_names(class_names)
        self.axes = _check_axes(getattr(model, "attention_axes", None) if axes is None else axes)
        self._recorder = AttentionRecorder(model, attention)

    def explain_batch(self, batch: Any) -> BatchExplanation:
        """Explain every sample of a batch.

        Parameters
        ----------
        batch
            As the model's loader gives it; it needs no targets. Of the reference model the windows may also be lists
            of graphs, as ``window[[0]]`` gives them.

        Raises
        ------
        DataError
            If a sample's scores are not finite, or ``max_batch_size`` is set and the batch cannot be split.
        SettingError
            If the attention has another number of heads than ``num_heads``.
        DiscoveryError, ShapeError
            If the attention or what a setting names is not there, or does not fit.
        """
        if batch is None:
            raise DataError("The batch is None; expected one as the model's loader gives it.")
        finder = self._finder()
        with self._watching():
            runs = [(run.step, Explained.of(run, self._labels["predictions"])) for run in self._observe(batch, finder)]
        explained = Explained.join([part for _, part in runs])
        for layer, directions in single_keys(explained).items():
            _warn(self._alarms.of_single_keys(layer, directions))
        known = "prediction" if explained.labels.target is None else "target"
        names = name_classes(explained.labels, self.class_names, known, runs[0][0])
        doubts = set(explained.labels.doubts.values())
        _warn(doubts - self._told)
        self._told |= doubts
        return describe_batch(explained, names, self.axes, self.top_k)

    def explain_single_sample(self, batch: Any, sample_idx: int) -> SingleExplanation:
        """Explain one sample of a batch, and give its attention, of which it is sample 0.

        The whole batch is run, so that the numbers, and what is taken for its labels, are those of ``explain_batch``;
        take several samples from there.

        Raises
        ------
        SettingError
            If ``sample_idx`` is no whole number from 0 to the number of samples - 1.
        DataError, DiscoveryError, ShapeError
            As ``explain_batch``.
        """
        try:
            chosen = operator.index(sample_idx)
        except TypeError:
            chosen = None
        if chosen is None or isinstance(sample_idx, bool):
            raise SettingError(f"sample_idx must be a whole number; got {sample_idx!r}.")
        results = self.explain_batch(batch)
        _require_inside(chosen, len(results["per_sample_explanations"]))
        only = slice(chosen, chosen + 1)
        pairs = (AttentionPair(pair.layer, *(a[only] for a in pair.directions)) for pair in results["attention"])
        return {
            **results["per_sample_explanations"][chosen],
            "attention_dict": {name: weights[only] for name, weights in results["attention_dict"].items()},
            "attention": tuple(pairs),
            "class_names": results["class_names"],
            "axes": results["axes"],
        }

    def explain_loader(
        self, loader: Iterable[Any], table: str | Path | None = None, progress: bool = True
    ) -> DatasetExplanation:
        """Explain a whole data set in running sums: memory does not grow with its length.

        Parameters
        ----------
        loader
            A DataLoader, a list of batches, or anything else that yields batches.
        table
            A folder for one row per sample and layer, as Parquet files (see ``SampleTable``), written in parts. A run
            that was cut off goes on after the last part when it is called again with the same folder, model, settings
            and loader, and gives what an uninterrupted run gives; a folder that is finished is read back. Its first
            batch is run anew each time to see that it is the same, and so must be the data set's attribute
            ``fingerprint``, if it has one. None: no table, and nothing to go on from.
        progress
            Show a progress bar on stderr, if that is a terminal.

        Raises
        ------
        DataError
            If the loader is empty or a sample's scores are not finite; the message says in which batch, and what is
            kept.
        SettingError
            If the folder was begun with another model, other settings or another loader.
        XAttnError
            If a batch fails for another reason; the reason is its cause.
        """
        if table is not None and find_spec("pyarrow") is None:
            raise SettingError('table writes Parquet files with pyarrow: pip install "lightning-xattn[table]".')
        folder = None if table is None else self._open(Path(table), loader)
        finder = self._finder()
        sums = DatasetSums(self.class_names, self.group_by, self.axes, finder)
        with self._watching():
            LoaderRun(partial(self._observe, finder=finder), sums, folder, _warn).run(loader, progress)
        _warn(self._alarms.of_directions(self._recorder.layers))
        summaries = sums.summaries()
        for layer, summary in summaries.items():
            _warn(self._alarms.of_epoch(layer, summary))
        return DatasetExplanation(
            summaries, sums.classes, self.group_by, sums.axes, None if folder is None else folder.folder
        )

    def _open(self, folder: Path, loader: Iterable[Any]) -> ExplainedFolder:
        from lightning_xattn.explainer.progress import (  # pyarrow, only where a table is wanted
            ExplainedFolder,
            fingerprint,
        )

        settings: dict[str, Any] = {
            **self._labels,
            "predict": self.predict,
            "attention": self.attention,
            "group_by": self.group_by,
        }
        settings |= {
            "class_names": self.class_names,
            "hyperparameters": getattr(self.model, "hparams", {}),
        }
        dataset = getattr(loader, "dataset", None)
        about = {"batches": _length(loader), "samples": _length(dataset), "data": getattr(dataset, "fingerprint", None)}
        settings |= {name: known for name, known in about.items() if known is not None}
        return ExplainedFolder(
            folder,
            {"model weights": fingerprint(self.model)} | {name: str(named(value)) for name, value in settings.items()},
        )

    def _finder(self) -> LabelFinder:
        return LabelFinder(**self._labels)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad(), self._recorder:
                yield
        finally:
            self._recorder.clear()
            for module, training in modes.items():
                module.training = training

    def _observe(self, batch: Any, finder: LabelFinder) -> Iterator[Pass]:
        """Run the model over a batch, or over its parts."""
        if self.max_batch_size is None:
            run = Pass.of(*self._run(batch), finder)
            _warn(self._alarms.of_padding(run.pairs))
            yield run
            return
        count = count_samples(batch)
        starts = range(0, count, self.max_batch_size)
        parts = [take_samples(batch, range(start, min(start + self.max_batch_size, count))) for start in starts]
        if not finder.decided:
            # A part may not show what the whole batch does, so the first one is run once more.
            steps = [step for step, _ in map(self._run, parts)]
            counts = [count_samples(part) for part in parts]
            outputs, forward = (
                join_samples([getattr(step, of) for step in steps], counts) for of in ("outputs", "forward")
            )
            finder.decide(Step(outputs, to_device(batch, self.model), forward, count, steps[0].device))
        for part in parts:
            step, pairs = self._run(part)
            if step.samples != count_samples(part):
                raise DataError(
                    f"The batch was split into parts of {count_samples(part)} samples along its first axes, but the "
                    f"attention of one has {step.samples}: make smaller batches in the loader instead of "
                    "max_batch_size."
                )
            run = Pass.of(step, pairs, finder)
            _warn(self._alarms.of_padding(run.pairs))
            yield run

    def _run(self, batch: Any) -> tuple[Step, tuple[AttentionPair, ...]]:
        self._recorder.clear()
        moved = to_device(batch, self.model)
        outputs = self._predict(moved)
        self._recorder.batch = moved
        pairs, forward_output = self._recorder.attention, self._recorder.output
        if self._recorder.is_waiting:
            return self._run(batch)
        self._recorder.clear()
        if not pairs:
            raise DiscoveryError(
                "No attention ran for this batch, though it did for an earlier one. If the model has to be called in "
                "another way, say how: predict=lambda model, batch: ...."
            )
        self._require_heads(pairs)
        weights = pairs[0].forward.weights
        step = Step(outputs, moved, forward_output, len(weights), weights.device, tuple(weights.shape[2:]))
        return step, pairs

    def _predict(self, batch: Any) -> Any:
        if self.predict is not None:
            return self.predict(self.model, batch)
        step = getattr(self.model, "predict_step", None)
        # Lightning's own predict_step calls forward with the batch.
        if getattr(type(self.model), "predict_step", None) in (None, LightningModule.predict_step):
            try:
                inspect.signature(self.model.forward).bind(batch)
            except TypeError as error:
                raise DiscoveryError(
                    f"The forward of {type(self.model).__name__} cannot be called with a batch alone ({error}); the "
                    f"batch is a {type(batch).__name__}. Say how to call it: ExplainabilityCapture(model, "
                    "predict=lambda model, batch: model(batch[0], batch[1]))."
                ) from error
        return self.model(batch) if step is None else step(batch, 0)

    def _require_heads(self, pairs: Iterable[AttentionPair]) -> None:
        for pair in pairs:
            for attention in pair.directions:
                where = f"{attention.direction} of layer '{pair.layer}'"
                require_heads(self.num_heads, attention.weights.shape[1], where)

    def _own_names(self) -> tuple[str, ...] | None:
        names, refusal = usable_names(getattr(self.model, "class_names", None))
        _warn(f"The class_names of {type(self.model).__name__} are not used: {why}" for why in refusal)
        return names


def _check_axes(axes: Any) -> dict[str, TokenAxis]:
    if axes is None:
        return {}
    if not isinstance(axes, Mapping) or not all(isinstance(axis, TokenAxis) for axis in axes.values()):
        raise SettingError(
            "axes must map modalities to TokenAxis, e.g. {'eeg': TokenAxis('EEG window (s)', spans=[...])}; got "
            f"{axes!r}."
        )
    return dict(axes)


def _require_inside(place: int, count: int) -> None:
    if not 0 <= place < count:
        raise SettingError(f"sample_idx must be 0 to {count - 1} in this batch of {count} samples; got {place}.")


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:  # as of a loader over an iterable data set
        return None


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        warnings.warn(message, XAttnWarning, stacklevel=4)
