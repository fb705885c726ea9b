"""What is logged of an epoch: curves under their names, figures, and a record for the history."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from pytorch_lightning import LightningModule, Trainer

from lightning_xattn.aggregation import CORRECT, INCORRECT
from lightning_xattn.checks import Checks
from lightning_xattn.classes import name_in_curves
from lightning_xattn.columns import ALIGNMENT, CONFIDENCE, INVALID_ROWS, SCORES, STATISTICS, Column
from lightning_xattn.evaluation import Evaluation, EvaluationSummary
from lightning_xattn.figures import epoch_figures, fusion_figures
from lightning_xattn.fusion.summary import FusionSummary
from lightning_xattn.messages import tell, warn
from lightning_xattn.sinks import log_figures
from lightning_xattn.summary import LayerSummary
from lightning_xattn.trainer import attention_axes, logged_step, moment

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class EpochLog:
    """Logs the epochs of a Trainer.

    Parameters
    ----------
    trainer, module
        Where to log.
    scope
        What a dataloader and a layer ("": the first, or none) are called in curves.
    checks
        Say each thing once.
    group_by
        Whether the classes are those of the "target" or of the "prediction".
    draws
        Whether there are figures.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        scope: Callable[[int, str], str],
        checks: Checks,
        group_by: str,
        draws: bool,
    ) -> None:
        self._trainer, self._module, self._scope = trainer, module, scope
        self._checks, self._group_by, self._draws = checks, group_by, draws

    def log(
        self, ended: Mapping[int, EvaluationSummary], evaluations: Mapping[int, Evaluation]
    ) -> Iterator[tuple[str, dict[str, Any], LayerSummary | None]]:
        """Log what has ended, by dataloader: scope and record of each layer, and its summary.

        The record of a dataloader's first layer has what is said of the modalities, too. A model without
        cross-attention has one record alone, and no summary of a layer.
        """
        first = next((layer for one in ended.values() for layer in one.layers), None)
        for number, summary in ended.items():
            evaluation, scope = evaluations[number], self._scope(number, "")
            about = moment(self._trainer) | {"dataloader": number}
            of_fusion = self._log_fusion(summary, scope, evaluation)
            figures = self._draw_fusion(summary, scope, evaluation)
            if not summary.layers and of_fusion:
                self._log_figures(figures, scope)
                yield scope, about | {"layer": None} | of_fusion, None
            for layer, of_layer in summary.layers.items():
                scope = self._scope(number, "" if layer == first else layer)
                record = self._log_layer(layer, of_layer, scope, evaluation)
                # Together, so that a logger that fails is reported once.
                self._log_figures(chain(figures, self._draw_layer(of_layer, scope, evaluation)), scope)
                yield scope, about | {"layer": layer, "repeats": evaluation.repeats} | record | of_fusion, of_layer
                of_fusion = {}

    def _log_fusion(self, summary: EvaluationSummary, scope: str, evaluation: Evaluation) -> dict[str, Any]:
        if summary.fusion is None:
            return {}
        classes = name_in_curves(evaluation.classes or (), self._group_by)
        curves = fusion_curves(summary.fusion, scope, classes, has_attention=bool(summary.layers))
        self._module.log_dict(curves, on_step=False, on_epoch=True, batch_size=1)
        tell(self._checks.of_fusion(summary.fusion))
        return fusion_record(summary.fusion, scope, curves)

    def _log_layer(self, layer: str, summary: LayerSummary, scope: str, evaluation: Evaluation) -> dict[str, Any]:
        curves = epoch_curves(summary, scope, name_in_curves(evaluation.classes or (), self._group_by))
        self._module.log_dict(curves, on_step=False, on_epoch=True, batch_size=1)
        if self._trainer.is_global_zero:
            warn(self._checks.of_epoch(layer, summary))
        return epoch_record(summary, scope, curves)

    def _draw_fusion(
        self, summary: EvaluationSummary, scope: str, evaluation: Evaluation
    ) -> Iterator[tuple[str, Figure]]:
        if summary.fusion is not None:
            names, context = evaluation.classes or (), f"{scope}, epoch {self._trainer.current_epoch}"
            yield from fusion_figures(summary.fusion, scope, names, group_by=self._group_by, context=context)

    def _draw_layer(self, summary: LayerSummary, scope: str, evaluation: Evaluation) -> Iterator[tuple[str, Figure]]:
        names, context = evaluation.classes or (), f"{scope}, epoch {self._trainer.current_epoch}"
        axes = attention_axes(self._trainer, self._module)
        yield from epoch_figures(summary, scope, names, group_by=self._group_by, axes=axes, context=context)

    def _log_figures(self, figures: Iterator[tuple[str, Figure]], scope: str) -> None:
        trainer = self._trainer
        if trainer.is_global_zero and trainer.loggers and self._draws:
            log_figures(trainer.loggers, figures, logged_step(trainer), scope)


def epoch_curves(summary: LayerSummary, scope: str, class_names: Sequence[str]) -> dict[str, float]:
    """Scalars of one layer's epoch, as ``xattn_<topic>/<scope>/<what>``; undefined numbers are left out.

    Parameters
    ----------
    summary
        The epoch.
    scope
        Stage, followed by the dataloader and the layer where there are several, e.g. ``val`` or ``test/fusion.1``.
    class_names
        What the classes are called in curves.
    """
    curves = {}
    for name, value in _numbers(summary, class_names):
        topic, _, what = name.partition("/")
        if math.isfinite(value):
            curves[f"xattn_{topic}/{scope}/{what}"] = value
    return curves


def epoch_record(summary: LayerSummary, scope: str, curves: dict[str, float]) -> dict[str, Any]:
    """What the history says of an epoch: its curves, how many samples are behind them, and how sure comparisons are."""
    groups = summary.groups() if summary.group_noun else None
    record: dict[str, Any] = {"samples": summary.samples, "groups": groups}
    record |= {"ties": summary.ties, "unclassified": summary.unclassified}
    for score in _scores(summary):
        compared = dict(vars(summary.compare(score)))
        ends = {"auroc_low": compared.pop("low"), "auroc_high": compared.pop("high")}
        del compared["auroc"]  # a curve
        record |= {f"outcome/{score}_{name}": value for name, value in (compared | ends).items()}
    return record | {name.removeprefix("xattn_").replace(f"/{scope}/", "/"): value for name, value in curves.items()}


def fusion_curves(
    summary: FusionSummary, scope: str, class_names: Sequence[str], has_attention: bool
) -> dict[str, float]:
    """Scalars of what the modalities say and contribute, named as in ``epoch_curves``, which has what both have."""
    curves = {}
    for name, value in _fusion_numbers(summary, class_names):
        topic, _, what = name.partition("/")
        if math.isfinite(value) and not (has_attention and what == f"{CONFIDENCE}_auroc"):
            curves[f"xattn_{topic}/{scope}/{what}"] = value
    return curves


def fusion_record(summary: FusionSummary, scope: str, curves: dict[str, float]) -> dict[str, Any]:
    """What the history says of the modalities: their curves, why what is missing is missing, and how sure it is."""
    record: dict[str, Any] = {"read_samples": summary.samples, "unreadable": dict(summary.unreadable)}
    record["uncontributed"] = summary.uncontributed
    for score in ("conflict", "confidence"):
        compared = summary.compare(score)
        if f"xattn_outcome/{scope}/{score}_auroc" in curves:
            record |= {f"outcome/{score}_auroc_low": compared.low, f"outcome/{score}_auroc_high": compared.high}
    return record | {name.removeprefix("xattn_").replace(f"/{scope}/", "/"): value for name, value in curves.items()}


def _fusion_numbers(summary: FusionSummary, class_names: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name in summary.modalities:
        yield f"reading/{name}", summary.estimate(f"right/{name}").mean
    subsets: dict[str, tuple[int | None, int | None]]
    subsets = {"all": (None, None), "correct": (None, CORRECT), "incorrect": (None, INCORRECT)}
    subsets |= {name: (class_id, None) for class_id, name in enumerate(class_names)}
    for topic, number in (("conflict", "conflict"), ("lean", "leans_first")):
        for which, subset in subsets.items():
            yield f"{topic}/{which}", summary.estimate(number, *subset).mean
    for score in ("conflict", "confidence"):
        yield f"outcome/{score}_auroc", summary.compare(score).auroc
    if summary.uncontributed:
        return
    for name in summary.modalities:
        if summary.of_value:
            yield f"contribution/size/{name}", summary.size(name).mean
        else:
            yield f"contribution/{name}", summary.estimate(f"phi/{name}").mean
            yield f"contribution/share/{name}", summary.share(name).mean
    if not summary.of_value:
        yield "contribution/opposed", summary.estimate("opposed").mean
        yield "contribution/emap_accuracy", summary.estimate("additive_right").mean
    for name in summary.interactions:
        yield f"contribution/{name}", summary.estimate(name).mean
    for direction in summary.replaced:
        yield f"faithfulness/{direction}", summary.faithfulness(direction).mean
        yield f"faithfulness/reference/{direction}", summary.faithfulness(direction, "reference").mean
        yield f"faithfulness/cost/{direction}", summary.estimate(f"cost/{direction}").mean


def _numbers(summary: LayerSummary, class_names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """``<topic>/<what>`` and value of each curve."""
    for column in summary.columns:
        curve = STATISTICS[column.statistic].curve
        if curve is not None and (column.direction is not None or "{direction}" not in curve):
            for which, value in _by_samples(summary, column, class_names):
                if which == "all" or "{which}" in curve:
                    yield curve.format(direction=column.direction, which=which), value
    if ALIGNMENT in summary.columns:
        yield "alignment/null", summary.alignment_null
    for score in _scores(summary):
        yield f"outcome/{score}_auroc", summary.compare(score).auroc
    yield "health/undefined_share", summary.undefined_share()
    yield "health/invalid_rows", summary.total(INVALID_ROWS)


def _by_samples(summary: LayerSummary, column: Column, class_names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """The means of a number over all samples, each class, and where it is compared, each outcome."""
    if column.head is not None:
        yield f"head_{column.head}", summary.mean(column)
        return
    yield "all", summary.mean(column)
    for class_id, name in enumerate(class_names):
        yield name, summary.mean(column, class_id)
    if column in SCORES:
        yield "correct", summary.mean(column, outcome=CORRECT)
        yield "incorrect", summary.mean(column, outcome=INCORRECT)
        yield "gap", summary.gap(column)


def _scores(summary: LayerSummary) -> list[Column]:
    return [score for score in SCORES if score in summary.columns]
