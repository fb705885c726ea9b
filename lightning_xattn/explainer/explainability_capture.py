"""The offline explainer: one sample, one batch, or a whole loader of a trained model, with the callback's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_xattn.attribution.contribution import PARTNERS
from lightning_xattn.attribution.kept_samples import MAX_SAMPLES
from lightning_xattn.attribution.ports import ModalitiesSetting
from lightning_xattn.capture import AttentionSetting
from lightning_xattn.capture.labels import LabelSetting
from lightning_xattn.core.attention import TokenAxis, fitting_axes
from lightning_xattn.core.errors import DataError, DiscoveryError, SettingError, XAttnError, check_whole_number
from lightning_xattn.core.notices import begin_run, info, warn
from lightning_xattn.core.progress import timed, track
from lightning_xattn.evaluation.batch import check_present, read_batch
from lightning_xattn.evaluation.checks import check_directions, check_fusion, check_layer, check_rows
from lightning_xattn.evaluation.classes import name_classes, own_class_names
from lightning_xattn.evaluation.evaluation import Evaluation
from lightning_xattn.evaluation.fusion_samples import SampleModalities, describe_modalities
from lightning_xattn.evaluation.results import DatasetResult, ExplainedBatch, ExplainedSample
from lightning_xattn.evaluation.saved_probes import SavedProbes, fingerprint
from lightning_xattn.evaluation.settings import Settings
from lightning_xattn.explainer.model_runner import ModelRunner, Predict
from lightning_xattn.explainer.samples import explain_samples, find_modalities, require_finite
from lightning_xattn.explainer.table import close_table, open_table
from lightning_xattn.functional import prepare_rows

if TYPE_CHECKING:
    from lightning_xattn.evaluation.table import SampleTable


class ExplainabilityCapture:
    """Explain what a trained model's two modalities attend to, sample by sample.

    The model is in eval mode while it is explained; afterwards every module is back in its mode. Its outputs stay bit
    for bit the same. Batches are moved to the model's device; results are on the CPU. Numbers are the callback's: the
    same functions over the same samples.

    Parameters
    ----------
    model
        Any module whose attention ``AttentionRecorder`` finds.
    attention, class_names, classes_by, predictions, targets, sample_ids, groups, query_mask, present
        As in ``AttentionExplainabilityCallback``; ``outputs`` are those of ``predict``, and ``classes_by`` is for
        ``explain_loader``.
    fusion, modalities, contribution_samples, max_samples
        As in the callback; all are for ``explain_loader``.
    num_heads
        The number of heads that the attention must have; None: any number.
    axes
        What the tokens of each modality are, e.g. ``datamodule.attention_axes``, so that pairs get places. None: the
        model's attribute ``attention_axes``.
    predict
        How to run the model: ``(model, batch) -> outputs``. None: its ``predict_step(batch, 0)``, which unless
        overridden is ``model(batch)``; of other modules ``model(batch)``.
    top_k
        The number of pairs to name for each sample and direction.

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
        num_heads: int | None = None,
        axes: Mapping[str, TokenAxis] | None = None,
        predict: Predict | None = None,
        top_k: int = 5,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SettingError(f"model must be a torch module; got a {type(model).__name__}.")
        labels = predictions, targets, sample_ids, groups, query_mask, present
        fusion_inputs = fusion, modalities, contribution_samples, max_samples
        self.settings = Settings(attention, class_names, classes_by, *labels, *fusion_inputs)
        check_whole_number("top_k", top_k)
        check_whole_number("num_heads", num_heads, optional=True)
        begin_run()
        self.model = model
        self.top_k = top_k
        self.class_names = self.settings.class_names or own_class_names(model)
        self.axes = _check_axes(getattr(model, "attention_axes", None) if axes is None else axes)
        self._recorder = self.settings.recorder(model)
        self._runner = ModelRunner(model, self._recorder, predict, num_heads)

    def __repr__(self) -> str:
        return f"ExplainabilityCapture({type(self.model).__name__}, classes_by='{self.settings.classes_by}')"

    def explain_batch(
        self, batch: Any, among: DatasetResult | None = None, probes: str | Path | None = None
    ) -> ExplainedBatch:
        """Explain every sample of a batch.

        Parameters
        ----------
        batch
            As the model's loader yields it; it needs no targets. For the reference model the windows may also be lists
            of graphs, as ``window[[0]]`` gives them.
        among
            The result of ``explain_loader`` for the data set that the samples are from. Then each sample that has an
            id gets the probes and contributions of its modalities in that data set. None: these are not known.
        probes
            A file of ``save_probes``, for samples that have no label yet: which modalities support the prediction, and
            how often the model was right for such samples of the labelled evaluation.

        Raises
        ------
        DataError
            If a sample's scores are not finite, the batch is None, or the probes are of other weights or modalities.
        SettingError
            If the attention has another number of heads than ``num_heads``.
        DiscoveryError, ShapeError
            If the attention, or what a setting names, is not there or does not fit.
        """
        if batch is None:
            raise DataError("The batch is None; expected one as the model's loader yields it.")
        with self._runner.recording():
            settings = self.settings if probes is None else replace(self.settings, targets=None)
            finder = settings.finder()
            recorded = self._runner.run(batch, finder, needs_attention=True)
            if left_out := self._recorder.left_out:
                raise DataError(
                    f"The joint sequences of {max(left_out.values())} samples do not have the length that the spans of "
                    "the JointSequence are for, so their attention cannot be split by modality."
                )
            if recorded is None:
                raise DiscoveryError(
                    "Nothing ran for this batch: the model, or predict, returned None before it called any module. "
                    "Give a batch that the model runs on."
                )
            step, attention = recorded
            if not attention:
                raise DiscoveryError(
                    "A batch is explained by its attention, and none is recorded: the model has none, or attention={} "
                    "turns it off. explain_loader reports probes and contributions without attention."
                )
            result = require_finite(read_batch(step, attention, finder)).cpu()
        found = [one.name for one in self._recorder.fusion.modalities]
        # A modality that is in no attention is known if it is named, or explain_loader has found it.
        check_present(result.labels.present, result.attention, found or list(self.settings.modalities or ()))
        for pair in result.attention:
            rows = [prepare_rows(attention) for attention in pair.directions]
            warn(check_rows(pair.layer, rows, bool(self.settings.present)))
        labels, scores = result.labels, result.scores
        warn(labels.doubts.values(), once=True)
        if scores is not None:
            labels = replace(labels, n_classes=scores.values.shape[1])
        names = name_classes(labels, self.class_names, "prediction" if labels.target is None else "target", step)
        if probes is None:
            modalities = find_modalities(result, among)
        else:
            modalities = self._read_modalities(batch, len(result), probes)
        return explain_samples(result, names, self.axes, self.top_k, modalities)

    def _read_modalities(self, batch: Any, samples: int, probes: str | Path) -> list[SampleModalities | None]:
        """What saved probes say of each sample of a batch."""
        found: list[SampleModalities | None] = [None] * samples
        known = self._explain_batches([batch], None, PARTNERS, self._load_probes(probes), permutes=False)
        if known.fusion is not None:
            for place, number in enumerate(known.fusion.sample_numbers.tolist()):
                found[number] = describe_modalities(known.fusion, place, known.class_names)
        return found

    def _load_probes(self, path: str | Path) -> SavedProbes:
        saved = SavedProbes.load(path)
        saved.require_model(self.model)
        return saved

    def save_probes(self, result: DatasetResult, path: str | Path) -> None:
        """Save the probes of a labelled evaluation, to explain samples that have no label yet.

        Parameters
        ----------
        result
            What this explainer's ``explain_loader`` gave for the labelled samples.
        path
            The file, such as ``probes.pt``: fits of a few hundred kB, and a fingerprint of the model's weights.

        Raises
        ------
        DataError
            If the result has no linear probe of each modality, or is of other weights; the message says why.

        Examples
        --------
        >>> explainer = ExplainabilityCapture(model)
        >>> result = explainer.explain_loader(labelled_loader)
        >>> explainer.save_probes(result, "probes.pt")
        >>> explained = explainer.explain_batch(batch, probes="probes.pt")
        >>> print(explained["per_sample_explanations"][0]["modalities"])
        The probe on Audio predicts ...
        """
        if not isinstance(result, DatasetResult):
            raise DataError(f"Expected the result of explain_loader; got a {type(result).__name__}.")
        probes = SavedProbes.of(result.fusion, result.class_names, result.fingerprint)
        probes.require_model(self.model)
        probes.save(path)

    def explain_single_sample(
        self,
        batch: Any,
        sample_idx: int,
        among: DatasetResult | None = None,
        probes: str | Path | None = None,
    ) -> ExplainedSample:
        """Explain one sample of a batch, and return its attention, in which it is sample 0.

        The whole batch runs, so the numbers and the labels that are found are those of ``explain_batch``. For several
        samples call that once.

        Raises
        ------
        SettingError
            If ``sample_idx`` is no whole number from 0 to the number of samples - 1.
        DataError, DiscoveryError, ShapeError
            As ``explain_batch``.
        """
        results = self.explain_batch(batch, among, probes)
        count = len(results["per_sample_explanations"])
        if isinstance(sample_idx, bool) or not isinstance(sample_idx, Integral) or not 0 <= sample_idx < count:
            raise SettingError(
                f"sample_idx must be a whole number, 0 to {count - 1} in this batch of {count} samples; got "
                f"{sample_idx!r}."
            )
        only = slice(sample_idx, sample_idx + 1)
        return {
            **results["per_sample_explanations"][sample_idx],
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
        probes: str | Path | None = None,
    ) -> DatasetResult:
        """Explain a whole data set in running sums: memory does not grow with its length.

        Parameters
        ----------
        loader
            A DataLoader, a list of batches, or anything else that yields batches.
        table
            A folder for one row per sample and layer, as Parquet files (see ``SampleTable``). The table appears when
            all samples are explained, and replaces one of an earlier call; a run that fails leaves the folder as it
            was. None: no table.
        progress
            Whether a bar shows the progress, if stdout is a terminal.
        partners
            The number of other samples that the modalities of each sample are permuted with: an even number from 4 on,
            or "all" of the ``contribution_samples``, which takes as many replays as these have pairs.
        probes
            A file of ``save_probes``. Its probes read the samples, which then need no labels; None: probes are fitted
            on these samples.

        Raises
        ------
        DataError
            If the loader is empty or a sample's scores are not finite (the message says in which batch), or the probes
            are of other weights or modalities.
        SettingError
            If the loader is none, the folder holds another table than an earlier call's, or ``partners`` is neither an
            even number from 4 on nor "all".
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
        saved = None if probes is None else self._load_probes(probes)
        batches = track(loader, "Explaining the data set") if progress else loader
        return self._explain_batches(batches, table, None if isinstance(partners, str) else partners, saved)

    def _explain_batches(
        self,
        batches: Iterable[Any],
        table: str | Path | None,
        partners: int | None,
        saved: SavedProbes | None,
        permutes: bool = True,
    ) -> DatasetResult:
        names = self.class_names or (saved.class_names if saved else ())
        if saved is not None and saved.class_names and tuple(names) != saved.class_names:
            raise DataError(
                f"The saved probes are of the classes {', '.join(saved.class_names)}; the explainer's class_names are "
                f"{', '.join(names)}."
            )
        settings = replace(self.settings, class_names=names or None, table=table)
        settings = settings if permutes else replace(settings, contribution_samples=0)
        settings = settings if saved is None else replace(settings, targets=None)
        folder = None if table is None else Path(table)
        evaluation = Evaluation(settings, None, expects_targets=saved is None, keeps_maps=True)
        with nullcontext() if folder is None else open_table(folder) as rows, self._runner.recording():
            token_counts = self._add_batches(batches, evaluation, rows)
            with timed("Computing contributions and summaries"):
                explained = evaluation.summarise(
                    self._recorder, tests_attention=permutes, partners=partners, saved=saved
                )
            if evaluation.has_dropped and rows is not None:
                warn(["There is no table of this run, whose first rows took several labels at once for a class."])
                rows.discard()
                folder = None
            elif folder is not None and rows is not None:
                close_table(rows, folder, explained.fusion)
        if permutes:
            self._check(explained, evaluation)
        # Probes of a file are not saved again, and of a large model a fingerprint takes seconds.
        made_by = "" if explained.fusion is None or saved is not None else fingerprint(self.model)
        return replace(explained, axes=fitting_axes(self.axes, token_counts), table=folder, fingerprint=made_by)

    def _check(self, explained: DatasetResult, evaluation: Evaluation) -> None:
        warn(check_directions(self._recorder.layers), once=True)
        for layer, summary in explained.summaries.items():
            warn(check_layer(layer, summary, layer in evaluation.lacking_query_mask, bool(self.settings.present)))
        if explained.fusion is not None:
            info(check_fusion(explained.fusion))

    def _add_batches(self, batches: Iterable[Any], evaluation: Evaluation, table: SampleTable | None) -> dict[str, int]:
        """Add every batch to the evaluation and the table; returns the token counts of the first recorded step."""
        number, token_counts = 0, None
        try:
            for batch in batches:
                recorded = self._runner.run(batch, evaluation.finder)
                if left_out := self._recorder.left_out:
                    if token_counts is None:
                        raise DataError(
                            "The first batch has a joint sequence of another length than the spans of its "
                            "JointSequence are for."
                        )
                    evaluation.leave_out(left_out, recorded is None)
                if recorded is not None:
                    result = require_finite(evaluation.read(*recorded, recorder=self._recorder))
                    if token_counts is None:
                        token_counts = result.attention[0].forward.token_counts if result.attention else {}
                    for columns in evaluation.add(result):
                        if table is not None:
                            table.add(columns)
                number += 1
        except XAttnError as error:
            raise type(error)(f"Batch {number}: {error}") from error
        except Exception as error:
            raise XAttnError(f"Batch {number} could not be explained: {error!r}.") from error
        if not number:
            raise DataError("The loader is empty: it yields no batch, so there is nothing to explain.")
        if token_counts is None:
            raise DataError(
                f"Nothing ran for any of the loader's {number} batches: the model, or predict, returned None before "
                "it called any module, so there is nothing to explain."
            )
        return token_counts


def _check_axes(axes: Any) -> dict[str, TokenAxis]:
    if axes is None:
        return {}
    if not isinstance(axes, Mapping) or not all(isinstance(axis, TokenAxis) for axis in axes.values()):
        raise SettingError(
            "axes must map modalities to TokenAxis, e.g. {'eeg': TokenAxis('EEG window (s)', spans=[...])}; got "
            f"{axes!r}."
        )
    return dict(axes)
