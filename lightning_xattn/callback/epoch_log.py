"""The end of an epoch in a Trainer: its curves, its records for the history, and what else the loggers get."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pytorch_lightning import LightningModule, Trainer

from lightning_xattn.callback.monitors import describe_unknown
from lightning_xattn.callback.pictures import Drawn, Pictures, Record, may_draw
from lightning_xattn.callback.run import Run
from lightning_xattn.callback.schedule import Schedule, logged_step, moment
from lightning_xattn.core.notices import info, warn
from lightning_xattn.evaluation.checks import check_fusion, check_layer, check_unused
from lightning_xattn.evaluation.classes import name_in_curves
from lightning_xattn.evaluation.curves import (
    epoch_curves,
    epoch_record,
    fusion_curves,
    fusion_record,
    main_curves,
    main_names,
    mean_curves,
)
from lightning_xattn.evaluation.evaluation import Evaluation
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.evaluation.settings import Settings
from lightning_xattn.report.figures import SHOWN_CLASSES, limit_classes, limit_layers
from lightning_xattn.report.headline import describe_headline

_ENDS = re.compile("_(low|high)$")


@dataclass(frozen=True)
class EpochLog:
    """Logs an epoch of a Trainer.

    Parameters
    ----------
    trainer, module
        Where to log.
    scope
        What a dataloader and a layer ("": all layers) are called in curves.
    run
        The run that the epoch is of: its monitors, and the curves and layers so far.
    settings, schedule
        Of the callback.
    all_curves
        Whether all curves are logged, and not those alone that are acted on.
    all_figures
        Whether an epoch of a fit is drawn whole, and not its two main figures alone.
    """

    trainer: Trainer
    module: LightningModule
    scope: Callable[[int, str], str]
    run: Run
    settings: Settings
    schedule: Schedule
    all_curves: bool
    all_figures: bool

    def log(
        self,
        ended: Mapping[int, DatasetResult],
        evaluations: Mapping[int, Evaluation],
        history: Sequence[Record],
        tables: Mapping[str, Path],
    ) -> list[Record]:
        """Log what has ended.

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
            A record of each layer that is shown, for the history. The first of a dataloader has the numbers of the
            modalities, too. A model without cross-attention has one record alone.
        """
        shown: dict[int, DatasetResult] = {}
        records: dict[int, list[Record]] = {}
        curves, others = dict[str, float](), dict[str, float]()
        for number, whole in ended.items():
            evaluation = evaluations[number]
            for layer, summary in whole.summaries.items():
                may_lack = bool(self.settings.present)
                warn(check_layer(layer, summary, layer in evaluations[number].lacking_query_mask, may_lack))
            if whole.fusion is not None:
                info(check_fusion(whole.fusion))
            if evaluation.shown_classes is None:  # the same ones in every epoch
                evaluation.shown_classes = whole.largest_classes(SHOWN_CLASSES)
            shown[number] = limit_classes(whole, evaluation.shown_classes)
            counts = {name: getattr(evaluation.totals, name) for name in ("repeats", "left_out_batches")}
            by_scope, records[number] = self._collect(number, shown[number], whole, counts)
            if whole.fusion is not None:
                past = [one for one in history if one["dataloader"] == number]
                warn(check_unused([*past, *records[number]], whole.fusion.modalities))
            for scope, of_scope in by_scope:
                curves |= of_scope if self.all_curves else main_curves(of_scope, scope)
                others |= of_scope
        self._log_curves(curves, others)
        drawn = [
            self._drawn(number, ended[number], shown[number], history, new) for number, new in records.items() if new
        ]
        tags = {f"xattn_about/{self.scope(0, '')}/{name}": path for name, path in tables.items()}
        if may_draw(self.trainer):
            self.run.headlines = {one.scope: describe_headline(one.whole) for one in drawn}
        self._draw(Pictures(drawn, tags, logged_step(self.trainer)))
        return [record for new in records.values() for record in new]

    def log_absent(self) -> None:
        """After a validation that is not recorded, log what is monitored and has no value yet, as NaN."""
        has_value = self.trainer.callback_metrics
        self._log_dict({one.curve: math.nan for one in self.run.monitors if one.curve not in has_value})

    @property
    def _has_several_layers(self) -> bool:
        return len(self.run.layers) > 1

    def _layer_scope(self, number: int, layer: str) -> str:
        """The scope of a layer; an only layer's name is left out."""
        return self.scope(number, layer if self._has_several_layers else "")

    def _collect(
        self, number: int, shown: DatasetResult, whole: DatasetResult, counts: Record
    ) -> tuple[list[tuple[str, dict[str, float]]], list[Record]]:
        """By scope the curves of a dataloader; the records of its layers, whose comparisons are over all classes."""
        plain = any(kind.__name__ == "MLFlowLogger" for one in self.trainer.loggers for kind in type(one).__mro__)
        scope, classes = self.scope(number, ""), name_in_curves(shown.class_names, self.settings.classes_by, plain)
        by_scope: list[tuple[str, dict[str, float]]] = []
        about: Record = moment(self.trainer) | {"dataloader": number}
        of_fusion: Record = {}
        if shown.fusion is not None and whole.fusion is not None:
            first = next(iter(shown.summaries.values()), None)
            ever_tests = self.schedule.ever_tests_attention(self.trainer)
            tested = tuple(first.heads) if first is not None and ever_tests else ()
            permutes = self.settings.permuted_samples > 0
            curves = fusion_curves(shown.fusion, scope, classes, bool(shown.summaries), permutes, tested)
            by_scope.append((scope, curves))
            of_fusion = fusion_record(whole.fusion, scope, curves)
        if not shown.summaries:
            return by_scope, [about | {"layer": None} | counts | of_fusion] if of_fusion else []
        scopes = {layer: self._layer_scope(number, layer) for layer in shown.summaries}
        of_layers = {layer: epoch_curves(one, scopes[layer], classes) for layer, one in shown.summaries.items()}
        records = []
        for layer in limit_layers(list(of_layers)):
            by_scope.append((scopes[layer], of_layers[layer]))
            record = epoch_record(whole.summaries[layer], scopes[layer], of_layers[layer])
            lengths = {"other_lengths": whole.other_lengths.get(layer, 0)}
            records.append(about | {"layer": layer} | counts | lengths | of_fusion | record)
            of_fusion = {}
        if self._has_several_layers:
            mean = mean_curves([*of_layers.values()], [*scopes.values()], scope, len(self.run.layers))
            by_scope.append((scope, mean))
        return by_scope, records

    def _log_curves(self, curves: Mapping[str, float], others: Mapping[str, float]) -> None:
        """Log curves, of all others those that are monitored, and as NaN what has no value in this evaluation."""
        monitors, known = self.run.monitors, self.run.curves
        present = {**curves, **{one.curve: others[one.curve] for one in monitors if one.curve in others}}
        unknown = [one for one in monitors if one.curve not in present and one.curve not in known]
        warn(describe_unknown(unknown, present))  # once, as they have a name from then on
        absent = [name for name in (*known, *(one.curve for one in unknown)) if name not in present]
        present |= dict.fromkeys(absent, math.nan)
        known.update(dict.fromkeys(present))
        self._log_dict(present)

    def _log_dict(self, curves: Mapping[str, float]) -> None:
        if curves and not self.trainer.barebones:  # where Lightning logs nothing, and warns of it
            self.module.log_dict(curves, on_step=False, on_epoch=True, batch_size=1)

    def _drawn(
        self, number: int, whole: DatasetResult, shown: DatasetResult, history: Sequence[Record], new: Sequence[Record]
    ) -> Drawn:
        """What is drawn of a dataloader."""
        scope, first = self.scope(number, ""), new[0]
        past = [one for one in history if (one["dataloader"], one["layer"]) == (number, first["layer"])]
        layers = {layer: self._layer_scope(number, layer) for layer in limit_layers(list(shown.summaries))}
        return Drawn(whole, shown, [*past, first], scope, layers, f"{scope}, epoch {self.trainer.current_epoch}")

    def _draw(self, pictures: Pictures) -> None:
        """Hand loggers what is due of an evaluation; of a fit's epoch the rest waits for the end of the fit."""
        if not pictures.drawn or not self.schedule.figures_every_n_epochs or not may_draw(self.trainer):
            return
        is_due, is_whole = self.schedule.draws(self.trainer), self.all_figures or not self.run.is_fit
        if is_due:
            self.run.places = pictures.log(self.trainer, main=True, rest=is_whole)
        # What is kept is the results that the callback keeps as its summaries.
        self.run.undrawn = None if is_due and is_whole else partial(pictures.log, main=not is_due, rest=True)


def main_history(records: Sequence[Record]) -> list[Record]:
    """The records without the curves that ``curves="main"`` does not log; the ends of intervals stay with the rest.

    Most of a record are the curves of heads and of many classes.
    """
    curves = {name for record in records for name in record if "/" in name}
    kept = main_names(_ENDS.sub("", name) for name in curves)
    dropped = {name for name in curves if _ENDS.sub("", name) not in kept}
    # A checkpoint stores each name once if it is one object.
    return [{sys.intern(name): value for name, value in record.items() if name not in dropped} for record in records]
