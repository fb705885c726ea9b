"""The end of an epoch in a Trainer: curves, history, and what the loggers get beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning import LightningModule, Trainer

from lightning_xattn.callback.trainer import Monitor, logged_step, moment, root_folder, say_unknown, stage_of
from lightning_xattn.core.notices import info, warn
from lightning_xattn.evaluation.checks import Checks
from lightning_xattn.evaluation.classes import name_in_curves
from lightning_xattn.evaluation.curves import (
    best_epoch,
    epoch_curves,
    epoch_record,
    fusion_curves,
    fusion_record,
    main_curves,
    mean_curves,
)
from lightning_xattn.evaluation.evaluation import Evaluation
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import DatasetResult, EarlierTest
from lightning_xattn.loggers import LoggerWriter, LoggerWriters
from lightning_xattn.report import create_explainability_report
from lightning_xattn.report.figures import (
    SHOWN_CLASSES,
    distributions,
    epoch_figures,
    fusion_figures,
    limit_classes,
    limit_layers,
    overview_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class EpochLog:
    """Logs the epochs of a Trainer.

    Parameters
    ----------
    trainer, module
        Where to log.
    scope
        What a dataloader and a layer ("": all layers) are called in curves.
    checks
        Say each thing once.
    classes_by
        Whether the classes are those of the "target" or of the "prediction".
    all_curves
        Whether all curves are logged, and not those alone that are acted on.
    draws
        Whether there are figures, texts and distributions.
    permutes
        Whether contributions are measured at all.
    tests_attention
        Whether the faithfulness of the attention is tested, now or in another epoch.
    monitors
        What acts on curves.
    names
        Those that this run of the Trainer has logged so far: each is logged in every recorded evaluation.
    layers
        The names of those that this run has recorded so far, in this evaluation or before.
    """

    trainer: Trainer
    module: LightningModule
    scope: Callable[[int, str], str]
    checks: Checks
    classes_by: str
    all_curves: bool
    draws: bool
    permutes: bool
    tests_attention: bool
    monitors: Sequence[Monitor]
    names: dict[str, None]
    layers: Mapping[str, None]

    def log(
        self,
        ended: Mapping[int, DatasetResult],
        evaluations: Mapping[int, Evaluation],
        history: Sequence[Mapping[str, Any]],
        tables: Mapping[str, Path],
    ) -> list[dict[str, Any]]:
        """Log what has ended, by dataloader.

        The record of a dataloader's first layer has what is said of the modalities, too. A model without
        cross-attention has one record alone.

        Parameters
        ----------
        ended, evaluations
            By dataloader.
        history
            The records since the last fit began.
        tables
            The files of the sample table of this evaluation, by name.

        Returns
        -------
        list of dict
            A record of each layer that is shown, for the history.
        """
        several = len(self.layers) > 1
        found: dict[int, tuple[DatasetResult, list[dict[str, Any]]]] = {}
        curves, others = dict[str, float](), dict[str, float]()
        for number, whole in ended.items():
            if self.trainer.is_global_zero:
                for layer, summary in whole.summaries.items():
                    warn(self.checks.of_epoch(layer, summary))
            if evaluations[number].shown_classes is None:  # the same ones in every epoch
                evaluations[number].shown_classes = whole.largest_classes(SHOWN_CLASSES)
            shown = limit_classes(whole, evaluations[number].shown_classes)
            counts = {name: getattr(evaluations[number].totals, name) for name in ("repeats", "left_out_batches")}
            by_scope, new = self._collect(number, shown, whole, several, counts)
            found[number] = shown, new
            for scope, of_scope in by_scope:
                curves |= of_scope if self.all_curves else main_curves(of_scope, scope)
                others |= of_scope
        self._log(curves, others)
        records = [record for _, new in found.values() for record in new]
        sinks = self._writers()
        if sinks is not None and records:
            info(self.checks.of_folders(sinks.folders))
        for number, (shown, new) in found.items():
            if sinks is not None and new:
                past = [one for one in history if one["dataloader"] == number and one["layer"] == new[0]["layer"]]
                whole = ended[number]
                if whole.fusion is not None and not whole.fusion.replaced:
                    whole = replace(whole, earlier_test=EarlierTest.find(past))
                self._log_rest(sinks, number, whole, shown, several, [*past, new[0]])
        if sinks is not None:
            scope, step = self.scope(0, ""), logged_step(self.trainer)
            for name, path in tables.items():
                log_table = partial(_log_table, f"xattn_about/{scope}/{name}", step)
                sinks.log("tables", partial(Path, path), log_table)
        return records

    def log_absent(self) -> None:
        """After a validation that is not recorded, log what is monitored and has no value yet, as NaN."""
        absent = {one.curve: math.nan for one in self.monitors if one.curve not in self.trainer.callback_metrics}
        if absent and not self.trainer.barebones:
            self.module.log_dict(absent, on_step=False, on_epoch=True, batch_size=1)

    def log_best(self, history: Sequence[Mapping[str, Any]]) -> None:
        """At the end of a fit, log what its run is compared by with others; of the first dataloader and layer."""
        sinks = self._writers()
        ours = [one for one in history if one["dataloader"] == 0]
        if sinks is not None and ours:
            of_layer = [one for one in ours if one["layer"] == ours[0]["layer"]]
            best, step = partial(best_epoch, of_layer), logged_step(self.trainer)
            sinks.log("best values", best, lambda sink, made: sink.log_best(made, step) if made else None)

    def _writers(self) -> LoggerWriters | None:
        is_trial = self.trainer.fast_dev_run or self.trainer.barebones  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
        if is_trial or not (self.trainer.is_global_zero and self.draws):
            return None
        sinks = LoggerWriters(self.trainer.loggers, root_folder(self.trainer))
        return sinks if sinks else None

    def _collect(
        self, number: int, result: DatasetResult, whole: DatasetResult, several: bool, counts: dict[str, int]
    ) -> tuple[list[tuple[str, dict[str, float]]], list[dict[str, Any]]]:
        """By scope the curves of a dataloader; the records of its layers, whose comparisons are over all classes."""
        plain = any(kind.__name__ == "MLFlowLogger" for one in self.trainer.loggers for kind in type(one).__mro__)
        scope, classes = self.scope(number, ""), name_in_curves(result.class_names, self.classes_by, plain)
        about = moment(self.trainer) | {"dataloader": number}
        by_scope: list[tuple[str, dict[str, float]]] = []
        of_fusion: dict[str, Any] = {}
        if result.fusion is not None:
            first = next(iter(result.summaries.values()), None)
            tested = tuple(first.heads) if first is not None and self.tests_attention else ()
            curves = fusion_curves(result.fusion, scope, classes, bool(result.summaries), self.permutes, tested)
            by_scope.append((scope, curves))
            info(self.checks.of_fusion(result.fusion))
            assert whole.fusion is not None
            of_fusion = fusion_record(whole.fusion, scope, curves)
        if not result.summaries:
            return by_scope, [about | {"layer": None} | counts | of_fusion] if of_fusion else []
        records, of_layers, scopes = [], [], []
        shown = limit_layers(list(result.summaries))
        for layer, summary in result.summaries.items():
            scopes.append(self.scope(number, layer if several else ""))
            of_layers.append(epoch_curves(summary, scopes[-1], classes))
            if layer in shown:
                by_scope.append((scopes[-1], of_layers[-1]))
                record = epoch_record(whole.summaries[layer], scopes[-1], of_layers[-1])
                lengths = {"other_lengths": whole.other_lengths.get(layer, 0)}
                records.append(about | {"layer": layer} | counts | lengths | of_fusion | record)
                of_fusion = {}
        if several:
            by_scope.append((scope, mean_curves(of_layers, scopes, scope, len(self.layers))))
        return by_scope, records

    def _log(self, curves: Mapping[str, float], others: Mapping[str, float]) -> None:
        """Log curves, of all others those that are monitored, and as NaN what has no value in this evaluation."""
        monitored = {one.curve: others[one.curve] for one in self.monitors if one.curve in others}
        present = {**curves, **monitored}
        unknown = [one for one in self.monitors if one.curve not in present and one.curve not in self.names]
        warn(say_unknown(unknown, present))  # once, as they have a name from then on
        absent = [name for name in (*self.names, *(one.curve for one in unknown)) if name not in present]
        present |= dict.fromkeys(absent, math.nan)
        self.names.update(dict.fromkeys(present))
        if not self.trainer.barebones:  # where Lightning logs nothing, and warns of it
            self.module.log_dict(present, on_step=False, on_epoch=True, batch_size=1)

    def _log_rest(
        self,
        sinks: LoggerWriters,
        number: int,
        whole: DatasetResult,
        shown: DatasetResult,
        several: bool,
        past: Sequence[Mapping[str, Any]],
    ) -> None:
        """What the loggers get beside the curves: figures, a text, distributions; after a test a page."""
        step, scope = logged_step(self.trainer), self.scope(number, "")
        title, report = f"{scope}, epoch {self.trainer.current_epoch}", f"xattn_about/{scope}/report"
        sinks.log_figures(self._figures(number, shown, whole.class_names, several, past, title), step, scope)
        text = partial(create_explainability_report, whole, format="markdown")
        sinks.log("reports", text, lambda sink, made: sink.log_text(report, made, step))
        histograms = partial(distributions, whole, scope)
        sinks.log("distributions", lambda: dict(histograms()), lambda sink, made: sink.log_histograms(made, step))
        if stage_of(self.trainer) == "test":
            page = partial(create_explainability_report, whole, format="html")
            sinks.log("pages", page, lambda sink, made: sink.log_page(report, made, step))

    def _figures(
        self,
        number: int,
        result: DatasetResult,
        all_names: Sequence[str],
        several: bool,
        past: Sequence[Mapping[str, Any]],
        title: str,
    ) -> Iterator[tuple[str, Figure]]:
        scope, names = self.scope(number, ""), result.class_names
        about = f"{title}, layer {past[-1]['layer']}" if several else title
        yield f"xattn_about/{scope}/overview", overview_figure(past, about)
        if result.fusion is not None:
            yield from fusion_figures(
                result.fusion, scope, names, all_names=all_names, classes_by=self.classes_by, context=title
            )
        for layer in limit_layers(list(result.summaries)):
            of_layer = self.scope(number, layer if several else "")
            context = f"{title}, layer {layer}" if several else title
            yield from epoch_figures(
                result.summaries[layer], of_layer, names, classes_by=self.classes_by, axes=result.axes, context=context
            )


def _log_table(name: str, step: int, writer: LoggerWriter, path: Path) -> None:
    writer.log_table(name, path, step)


def by_scope(
    results: Mapping[int, DatasetResult], scope: Callable[[int, str], str], several: bool
) -> dict[str, LayerSummary]:
    """The summary of every layer of every dataloader, by its scope; an only layer's name goes without saying."""
    return {
        scope(number, layer if several else ""): summary
        for number, result in results.items()
        for layer, summary in result.summaries.items()
    }
