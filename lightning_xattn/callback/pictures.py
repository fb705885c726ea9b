"""What loggers get of an evaluation beside its curves: figures, a summary, a report, tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning import Trainer

from lightning_xattn.callback.terminal import REPORT
from lightning_xattn.core.notices import describe_error, warn
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.loggers import LoggerWriters, shorten_path
from lightning_xattn.report import create_explainability_report
from lightning_xattn.report.figures import attention_figure, card_figure, epoch_figures, fusion_figures
from lightning_xattn.report.headline import describe_with_captions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUTPUT_FOLDER = "xattn_output"
"""Below the Trainer's root folder: figures and reports of a Trainer without a logger. Not the package's name, as the
root may be its repository."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """What is drawn of one dataloader.

    Parameters
    ----------
    whole, shown
        Its results, with all classes, and with those that are shown.
    records
        Of its first layer, since the fit began.
    scope, layers
        What it is called in tags, and what each layer that is shown is.
    title
        Where the numbers come from, such as ``"val, epoch 3"``.
    """

    whole: DatasetResult
    shown: DatasetResult
    records: Sequence[Record]
    scope: str
    layers: Mapping[str, str]
    title: str

    def main_figures(self) -> list[Iterator[tuple[str, Figure]]]:
        """The two cards that a fit draws in every epoch, tag and figure: each alone, as one may fail."""
        layer = self.records[-1]["layer"]
        return [self._card(), *([] if layer is None else [self._attention(layer)])]

    def _card(self) -> Iterator[tuple[str, Figure]]:
        figure = card_figure(self.whole, self.records, self.title)
        if figure is not None:
            yield f"{self._card_tag}/1_modalities", figure

    @property
    def _card_tag(self) -> str:
        """What sorts the cards of validations first, as loggers sort pictures by name, and then those of tests."""
        return f"xattn_cards_of_test/{self.scope}" if self.scope.startswith("test") else f"xattn_card/{self.scope}"

    def _attention(self, layer: str) -> Iterator[tuple[str, Figure]]:
        if layer in self.shown.summaries:
            figure = attention_figure(
                self.shown.summaries[layer],
                self.shown.class_names,
                classes_by=self.shown.classes_by,
                axes=self.shown.axes,
                context=self._context(layer),
            )
            yield f"{self._card_tag}/2_attention", figure

    def other_figures(self) -> list[Iterator[tuple[str, Figure]]]:
        """All others: those of the modalities, and those of each layer."""
        one = self.shown
        said = {"classes_by": one.classes_by}
        found = []
        if one.fusion is not None:
            found.append(fusion_figures(one.fusion, self.scope, one.class_names, context=self.title, **said))
        for layer, scope in self.layers.items():
            context = self._context(layer)
            found.append(
                epoch_figures(one.summaries[layer], scope, one.class_names, axes=one.axes, context=context, **said)
            )
        return found

    def _context(self, layer: str | None) -> str:
        has_several = layer is not None and self.layers[layer] != self.scope
        return f"{self.title}, layer {layer}" if has_several else self.title


@dataclass(frozen=True)
class Pictures:
    """What loggers get of an evaluation beside its curves.

    Parameters
    ----------
    drawn
        Of each dataloader.
    tables
        The files of the sample table, by tag.
    step
        Of the evaluation's scalars.
    """

    drawn: Sequence[Drawn]
    tables: Mapping[str, Path]
    step: int

    def log(self, trainer: Trainer, main: bool, rest: bool) -> list[str]:
        """Hand the two cards, all the rest, or both to the Trainer's loggers; what fails is a warning.

        Returns
        -------
        list of str
            Where a user sees them, a line each.
        """
        try:
            return self._log(trainer, main, rest)
        except Exception as error:  # whatever it is, the user's run goes on
            warn(f"'{self.drawn[0].title}' could not be drawn. {describe_error(error)}", once=True)
            return []

    def _log(self, trainer: Trainer, main: bool, rest: bool) -> list[str]:
        root = str(trainer.default_root_dir)
        writers = LoggerWriters(trainer.loggers, Path("." if "://" in root else root) / OUTPUT_FOLDER)
        if not writers:
            return []
        pages: list[Path] = []
        for one in self.drawn:
            writers.log_figures(
                [*(one.main_figures() if main else ()), *(one.other_figures() if rest else ())], self.step
            )
            if rest:
                pages += self._log_report(writers, one)
        for tag, path in self.tables.items() if rest else ():
            self._log_table(writers, tag, path)
        return [*writers.describe_places(), *(f"{REPORT}{shorten_path(page)}" for page in dict.fromkeys(pages))]

    def _log_report(self, writers: LoggerWriters, one: Drawn) -> list[Path]:
        """Hand over the summary and the report; returns the report's files."""
        tag, step = f"xattn_about/{one.scope}", self.step
        text = partial(describe_with_captions, one.whole)
        writers.log("summaries", text, lambda writer, made: writer.log_text(f"{tag}/summary", made, step))
        page = partial(create_explainability_report, one.whole, format="html")
        paths = writers.log("reports", page, lambda writer, made: writer.log_page(f"{tag}/report", made, step))
        return [path for path in paths if path is not None]

    def _log_table(self, writers: LoggerWriters, tag: str, path: Path) -> None:
        writers.log("tables", lambda: path, lambda writer, made: writer.log_table(tag, made, self.step))


def may_draw(trainer: Trainer) -> bool:
    """Whether this process hands figures and reports to loggers at all: the first one, unless the run is a trial."""
    is_trial = trainer.fast_dev_run or trainer.barebones  # type: ignore[attr-defined]  # set by a connector, unseen by mypy
    return bool(trainer.is_global_zero and not is_trial)
