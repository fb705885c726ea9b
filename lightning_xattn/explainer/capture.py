"""The offline explainer: one sample, one batch, or a whole loader of a trained model, with the callback's numbers."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningModule
from torch import nn

from lightning_xattn.attribution.contribution import CONTRIBUTION_SAMPLES, PARTNERS
from lightning_xattn.attribution.inputs import ModalitiesSetting
from lightning_xattn.attribution.kept_samples import MAX_SAMPLES
from lightning_xattn.capture import AttentionSetting
from lightning_xattn.capture.labels import LabelFinder, LabelSetting, Step
from lightning_xattn.core.attention import TokenAxis, fitting_axes
from lightning_xattn.core.errors import DataError, DiscoveryError, SettingError, check_whole_number
from lightning_xattn.core.notices import info, named, warn
from lightning_xattn.core.progress import Stage
from lightning_xattn.evaluation.checks import Checks
from lightning_xattn.evaluation.classes import name_classes, own_class_names
from lightning_xattn.evaluation.evaluation import Evaluation, Settings, read_batch
from lightning_xattn.evaluation.results import BatchResult, DatasetResult, ExplainedBatch, ExplainedSample
from lightning_xattn.evaluation.step_recorder import Attentions
from lightning_xattn.explainer.batches import count_samples, join_samples, take_samples, to_device
from lightning_xattn.explainer.dataset import LoaderRun, size_of
from lightning_xattn.explainer.describe import explain, require_finite
from lightning_xattn.functional import has_single_keys, prepare_rows, require_heads

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
    attention, class_names, classes_by, predictions, targets, sample_ids, groups, query_mask
        As ``AttentionExplainabilityCallback`` takes them; ``outputs`` are those of ``predict``, and ``classes_by`` is
        for ``explain_loader``.
    fusion, modalities, contribution_samples, max_samples
        The same, all for ``explain_loader``.
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
    >>> explainer = ExplainabilityCapture(model)  # a model of audio (5 tokens) and text (7) with 3 heads
    >>> results = explainer.explain_batch(batch)  # of 5 samples
    >>> len(results["per_sample_explanations"]), results["attention_dict"]["audio_to_text"].shape
    (5, torch.Size([5, 3, 5, 7]))
    >>> explainer.explain_loader(loader)  # of 23 samples
    DatasetResult(23 samples, 4 classes; layers audio_to_text; modalities audio, text)
    """

    def __init__(
        self,
        model: nn.Module,
        num_heads: int | None = None,
        *,
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
        axes: Mapping[str, TokenAxis] | None = None,
        predict: Callable[[Any, Any], Any] | None = None,
        max_batch_size: int | None = None,
        top_k: int = 5,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SettingError(f"model must be a torch module; got a {type(model).__name__}.")
        labels = predictions, targets, sample_ids, groups, query_mask
        fusion_inputs = fusion, modalities, contribution_samples, max_samples
        self.settings = Settings(attention, class_names, classes_by, *labels, *fusion_inputs)
        _check_predict(predict)
        check_whole_number("top_k", top_k)
        for name, count in (("num_heads", num_heads), ("max_batch_size", max_batch_size)):
            check_whole_number(name, count, optional=True)
        self.model = model
        self.num_heads = num_heads
        self.predict = predict
        self.max_batch_size = max_batch_size
        self.top_k = top_k
        self.class_names = self.settings.class_names or own_class_names(model)
        self.axes = _check_axes(getattr(model, "attention_axes", None) if axes is None else axes)
        self._checks = Checks()
        self._recorder = self.settings.recorder(model)

    def __repr__(self) -> str:
        return f"ExplainabilityCapture({type(self.model).__name__}, classes_by='{self.settings.classes_by}')"

    def explain_batch(self, batch: Any, among: DatasetResult | None = None) -> ExplainedBatch:
        """Explain every sample of a batch.

        Parameters
        ----------
        batch
            As the model's loader gives it; it needs no targets. Of the reference model the windows may also be lists
            of graphs, as ``window[[0]]`` gives them.
        among
            What ``explain_loader`` said of the data set that the samples are of. Then each sample that has an id has
            what its modalities say and contribute there, and a report says what the data set shows of the guide's
            thresholds. None: neither is known.

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
        finder = self.settings.finder()
        read = partial(_read_attended, finder=finder, checks=self._checks)
        with self._watching():
            runs = [(step, part.cpu()) for step, part in self._observe(batch, finder, read)]
        if not runs:
            raise DiscoveryError(
                "Nothing ran for this batch: the model, or predict, returned None before it called any module. Give a "
                "batch that the model runs on."
            )
        steps, parts = zip(*runs, strict=True)
        whole = BatchResult.joined(parts)
        for pair in whole.attention:
            rows = [prepare_rows(attention) for attention in pair.directions]
            single = [str(one.direction) for one in rows if has_single_keys(one)]
            warn(self._checks.of_single_keys(pair.layer, single))
            masked = torch.stack([one.wholly_masked for one in rows]).any(0)
            warn(self._checks.of_wholly_masked(pair.layer, int(masked.sum()), len(whole)))
        labels, scores = whole.labels, whole.scores
        warn(self._checks.of_doubts(labels.doubts))
        if scores is not None:
            labels = replace(labels, n_classes=scores.values.shape[1])
        names = name_classes(labels, self.class_names, "prediction" if labels.target is None else "target", steps[0])
        return explain(whole, names, self.axes, self.top_k, among)

    def explain_single_sample(self, batch: Any, sample_idx: int, among: DatasetResult | None = None) -> ExplainedSample:
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
        results = self.explain_batch(batch, among)
        _require_inside(chosen, len(results["per_sample_explanations"]))
        only = slice(chosen, chosen + 1)
        return {
            **results["per_sample_explanations"][chosen],
            "attention_dict": {name: weights[only] for name, weights in results["attention_dict"].items()},
            "attention": tuple(pair[only] for pair in results["attention"]),
            "class_names": results["class_names"],
            "axes": results["axes"],
        }

    def explain_loader(
        self,
        loader: Iterable[Any],
        table: str | Path | None = None,
        progress: bool = True,
        partners: int | str = PARTNERS,
    ) -> DatasetResult:
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
            Show how far it is, if stdout is a terminal.
        partners
            With how many others the modalities of each sample are permuted: an even number from 4 on, or "all" of
            the ``contribution_samples``, which takes as many replays as these have pairs.

        Raises
        ------
        DataError
            If the loader is empty or a sample's scores are not finite; the message says in which batch, and what is
            kept.
        SettingError
            If the loader is none, the folder was begun with another model, other settings or another loader, or
            ``partners`` is neither an even number from 4 on nor "all".
        XAttnError
            If a batch fails for another reason; the reason is its cause.
        """
        iterates = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
        if not iterates or isinstance(loader, (str, bytes, Mapping, torch.Tensor)):
            raise SettingError(
                f"loader must yield batches, as a DataLoader or a list of them does; got a {type(loader).__name__}."
            )
        if partners != "all" and not (isinstance(partners, int) and partners >= PARTNERS and partners % 2 == 0):
            raise SettingError(f"partners must be an even number from {PARTNERS} on, or 'all'; got {partners!r}.")
        settings = replace(self.settings, class_names=self.class_names, table=table)
        folder = None if table is None else self._open(settings, loader, partners)
        evaluation = Evaluation(settings, None, self._checks, keeps_maps=True)
        observe = partial(
            self._observe,
            finder=evaluation.finder,
            read=partial(evaluation.read, recorder=self._recorder),
            leave_out=evaluation.leave_out,
        )
        run = LoaderRun(observe, evaluation, folder)
        with self._watching():
            run.run(loader, progress)
            permuted = None if isinstance(partners, str) else partners
            with Stage("Summing up", shown=progress):
                explained = evaluation.summary(self._recorder, tests_attention=True, partners=permuted)
            run.finish(explained.fusion)
        warn(self._checks.of_directions(self._recorder.layers))
        for layer, summary in explained.layers.items():
            warn(self._checks.of_epoch(layer, summary))
        if explained.fusion is not None:
            info(self._checks.of_fusion(explained.fusion))
        axes = fitting_axes(self.axes, run.token_counts)
        kept = None if folder is None else folder.folder
        return DatasetResult(
            explained.layers,
            explained.fusion,
            evaluation.classes or (),
            settings.classes_by,
            axes,
            kept,
            explained.maps,
            other_lengths=dict(evaluation.other_lengths),
        )

    def _open(self, settings: Settings, loader: Iterable[Any], partners: int | str) -> ExplainedFolder:
        from lightning_xattn.explainer.progress import ExplainedFolder, fingerprint

        assert settings.table is not None
        identity = {"model weights": fingerprint(self.model), "predict": named(self.predict), "partners": partners}
        identity |= settings.named()
        identity["hyperparameters"] = named(getattr(self.model, "hparams", {}))
        dataset = getattr(loader, "dataset", None)
        sizes = {"batches": size_of(loader), "samples": size_of(dataset)}
        about = sizes | {"data": getattr(dataset, "fingerprint", None)}
        identity |= {name: known for name, known in about.items() if known is not None}
        return ExplainedFolder(Path(settings.table), {name: str(named(value)) for name, value in identity.items()})

    @contextmanager
    def _watching(self) -> Iterator[None]:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad(), self._recorder:
                yield
        finally:
            self._recorder.clear()
            self._recorder.reset()
            for module, training in modes.items():
                module.training = training

    def _observe(
        self,
        batch: Any,
        finder: LabelFinder,
        read: Callable[[Step, Attentions], BatchResult],
        leave_out: Callable[[Mapping[str, int], bool], None] | None = None,
    ) -> Iterator[tuple[Step, BatchResult]]:
        """Run the model over a batch, or over its parts, and read what it gave.

        ``leave_out`` counts what is left out, as ``Evaluation.leave_out`` does; None: nothing may be.
        """

        def run(batch: Any) -> tuple[Step, Attentions] | None:
            taken, left_out = self._run(batch), self._recorder.left_out
            if left_out and leave_out is not None:
                leave_out(left_out, taken is None)
            elif left_out:
                raise DataError(
                    f"The {max(left_out.values())} samples have a joint sequence of another length than the spans of "
                    "the JointSequence are for, so their attention cannot be told apart by modality."
                )
            return taken

        if self.max_batch_size is None:
            if (taken := run(batch)) is not None:
                yield taken[0], require_finite(read(*taken))
            return
        count = count_samples(batch)
        starts = range(0, count, self.max_batch_size)
        parts = [take_samples(batch, range(start, min(start + self.max_batch_size, count))) for start in starts]
        if not finder.decided:
            # A part may not show what the whole batch does, so the first one is run once more.
            steps = [taken[0] for taken in map(self._run, parts) if taken is not None]
            if len(steps) == len(parts):
                counts = [count_samples(part) for part in parts]
                outputs, forward = (
                    join_samples([getattr(step, of) for step in steps], counts) for of in ("outputs", "forward")
                )
                finder.decide(Step(outputs, to_device(batch, self.model), forward, count, steps[0].device))
            elif steps:
                finder.decide(steps[0])
            elif not self._recorder.left_out:
                return
        for part in parts:
            if (taken := run(part)) is None:
                continue
            step, attention = taken
            if step.samples != count_samples(part):
                raise DataError(
                    f"The batch was split into parts of {count_samples(part)} samples along its first axes, but the "
                    f"attention of one has {step.samples}: make smaller batches in the loader instead of "
                    "max_batch_size."
                )
            yield step, require_finite(read(step, attention))

    def _run(self, batch: Any) -> tuple[Step, Attentions] | None:
        """What the model did with a batch; None of one that is left out, or of which nothing ran."""
        self._recorder.clear()
        moved = to_device(batch, self.model)
        outputs = self._predict(moved)
        taken = self._recorder.collect_step(outputs, moved)
        if self._recorder.is_waiting:
            return self._run(batch)
        if taken is None and (self._recorder.left_out or outputs is None):
            return None
        if taken is None:
            raise DiscoveryError(
                "No attention ran for this batch, though it did for an earlier one. If the model has to be called in "
                "another way, say how: predict=lambda model, batch: ...."
            )
        for pair in taken[1]:
            for attention in pair.directions:
                where = f"{attention.direction} of layer '{pair.layer}'"
                require_heads(self.num_heads, attention.weights.shape[1], where)
        return taken

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


def _check_predict(predict: Any) -> None:
    if predict is None:
        return
    fits = callable(predict)
    with suppress(ValueError):  # built-in ones may not say what they take
        try:
            if fits:
                inspect.signature(predict).bind("model", "batch")
        except TypeError:
            fits = False
    if not fits:
        raise SettingError(f"predict must be a callable (model, batch) -> outputs, or None; got {predict!r}.")


def _read_attended(step: Step, attention: Attentions, finder: LabelFinder, checks: Checks) -> BatchResult:
    if not attention:
        raise DiscoveryError(
            "A batch is explained by its attention, and none is recorded: the model has none, or attention={} sets it "
            "aside. explain_loader tells what its modalities know and contribute."
        )
    return read_batch(step, attention, finder, checks)


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
