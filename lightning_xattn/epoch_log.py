"""The end of an epoch in a Trainer: curves, history, and what the loggers get beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning import LightningModule, Trainer

from lightning_xattn.checks import Checks
from lightning_xattn.classes import name_in_curves
from lightning_xattn.curves import (
    best_epoch,
    charts,
    epoch_curves,
    epoch_record,
    fusion_curves,
    fusion_record,
    main_curves,
    mean_curves,
)
from lightning_xattn.evaluation import Evaluation
from lightning_xattn.figures import (
    SHOWN_CLASSES,
    distributions,
    epoch_figures,
    few_classes,
    few_layers,
    fusion_figures,
    overview_figure,
)
from lightning_xattn.messages import tell, warn
from lightning_xattn.report import create_explainability_report
from lightning_xattn.results import DatasetResult, EarlierTest
from lightning_xattn.sinks import Sinks
from lightning_xattn.summary import LayerSummary
from lightning_xattn.trainer import logged_step, moment, root_folder, stage_of

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
    group_by
        Whether the classes are those of the "target" or of the "prediction".
    all_curves
        Whether all curves are logged, and not those alone that are acted on.
    draws
        Whether there are figures, texts and distributions.
    """

    trainer: Trainer
    module: LightningModule
    scope: Callable[[int, str], str]
    checks: Checks
    group_by: str
    all_curves: bool
    draws: bool

    def log(
        self,
        ended: Mapping[int, DatasetResult],
        evaluations: Mapping[int, Evaluation],
        history: Sequence[Mapping[str, Any]],
        tables: Sequence[Path],
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
            The files of the sample table of this evaluation.

        Returns
        -------
        list of dict
            A record of each layer that is shown, for the history.
        """
        several = _have_several_layers(ended)
        records: list[dict[str, Any]] = []
        sinks = self._sinks()
        for number, whole in ended.items():
            if self.trainer.is_global_zero:
                for layer, summary in whole.summaries.items():
                    warn(self.checks.of_epoch(layer, summary))
            if evaluations[number].shown_classes is None:  # the same ones in every epoch
                evaluations[number].shown_classes = whole.largest_classes(SHOWN_CLASSES)
            shown = few_classes(whole, evaluations[number].shown_classes)
            new = self._log_curves(number, shown, whole, several, evaluations[number].repeats)
            records += new
            if sinks is not None and new:
                past = [one for one in history if one["dataloader"] == number and one["layer"] == new[0]["layer"]]
                if whole.fusion is not None and not whole.fusion.replaced:
                    whole = replace(whole, earlier_test=EarlierTest.find(past))
                self._log_rest(sinks, number, whole, shown, several, [*past, new[0]])
        if sinks is not None:
            name = f"xattn_about/{self.scope(0, '')}/samples"
            step = logged_step(self.trainer)
            for path in tables:
                sinks.log("tables", partial(Path, path), lambda sink, made: sink.log_table(name, made, step))
        return records

    def log_best(self, history: Sequence[Mapping[str, Any]]) -> None:
        """At the end of a fit, log what its run is compared by with others; of the first dataloader and layer."""
        sinks = self._sinks()
        ours = [one for one in history if one["dataloader"] == 0]
        if sinks is not None and ours:
            of_layer = [one for one in ours if one["layer"] == ours[0]["layer"]]
            best, step = partial(best_epoch, of_layer), logged_step(self.trainer)
            sinks.log("best values", best, lambda sink, made: sink.log_best(made, step) if made else None)

    def _sinks(self) -> Sinks | None:
        is_trial = self.trainer.fast_dev_run or self.trainer.barebones  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
        if is_trial or not (self.trainer.is_global_zero and self.draws):
            return None
        sinks = Sinks(self.trainer.loggers, root_folder(self.trainer))
        tell(self.checks.of_folders(sinks.folders))
        return sinks if sinks else None

    def _log_curves(
        self, number: int, result: DatasetResult, whole: DatasetResult, several: bool, repeats: int
    ) -> list[dict[str, Any]]:
        """Log the curves of a dataloader; the records of its layers, whose comparisons are over all classes."""
        scope, classes = self.scope(number, ""), name_in_curves(result.class_names, self.group_by)
        about = moment(self.trainer) | {"dataloader": number}
        of_fusion: dict[str, Any] = {}
        if result.fusion is not None:
            curves = fusion_curves(result.fusion, scope, classes, has_attention=bool(result.summaries))
            self._log(curves, scope)
            tell(self.checks.of_fusion(result.fusion))
            assert whole.fusion is not None
            of_fusion = fusion_record(whole.fusion, scope, curves)
        if not result.summaries:
            return [about | {"layer": None} | of_fusion] if of_fusion else []
        records, of_layers, scopes = [], [], []
        shown = few_layers(list(result.summaries))
        for layer, summary in result.summaries.items():
            scopes.append(self.scope(number, layer if several else ""))
            of_layers.append(epoch_curves(summary, scopes[-1], classes))
            if layer in shown:
                self._log(of_layers[-1], scopes[-1])
                record = epoch_record(whole.summaries[layer], scopes[-1], of_layers[-1])
                records.append(about | {"layer": layer, "repeats": repeats} | of_fusion | record)
                of_fusion = {}
        if several:
            self._log(mean_curves(of_layers, scopes, scope), scope)
        return records

    def _log(self, curves: Mapping[str, float], scope: str) -> None:
        curves = curves if self.all_curves else main_curves(curves, scope)
        if not self.trainer.barebones:  # where Lightning logs nothing, and warns of it
            self.module.log_dict(dict(curves), on_step=False, on_epoch=True, batch_size=1)

    def _log_rest(
        self,
        sinks: Sinks,
        number: int,
        whole: DatasetResult,
        shown: DatasetResult,
        several: bool,
        past: Sequence[Mapping[str, Any]],
    ) -> None:
        """What the loggers get beside the curves: figures, a text, distributions; after a test a page."""
        step, scope = logged_step(self.trainer), self.scope(number, "")
        title, report = f"{scope}, epoch {self.trainer.current_epoch}", f"xattn_about/{scope}/report"
        sinks.log("charts", charts, lambda sink, made: sink.arrange(made))
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
                result.fusion, scope, names, all_names=all_names, group_by=self.group_by, context=title
            )
        for layer in few_layers(list(result.summaries)):
            of_layer = self.scope(number, layer if several else "")
            context = f"{title}, layer {layer}" if several else title
            yield from epoch_figures(
                result.summaries[layer], of_layer, names, group_by=self.group_by, axes=result.axes, context=context
            )


def by_scope(results: Mapping[int, DatasetResult], scope: Callable[[int, str], str]) -> dict[str, LayerSummary]:
    """The summary of every layer of every dataloader, by its scope; an only layer's name goes without saying."""
    several = _have_several_layers(results)
    return {
        scope(number, layer if several else ""): summary
        for number, result in results.items()
        for layer, summary in result.summaries.items()
    }


def _have_several_layers(results: Mapping[int, DatasetResult]) -> bool:
    return len({layer for result in results.values() for layer in result.summaries}) > 1
