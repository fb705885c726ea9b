"""A whole loader, batch after batch: what the callback does to an evaluation, without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from tqdm import tqdm

from lightning_xattn.aggregation import LayerAccumulator, LayerSummary
from lightning_xattn.attention import TokenAxis
from lightning_xattn.errors import DataError, XAttnError, XAttnWarning
from lightning_xattn.explainer.describe import fitting_axes
from lightning_xattn.explainer.passes import Pass
from lightning_xattn.grouping import missing_labels, name_classes
from lightning_xattn.labels import LabelFinder
from lightning_xattn.sums import add_batch

if TYPE_CHECKING:
    from lightning_xattn.explainer.progress import ExplainedFolder, Sums

BATCHES_A_PART = 32
"""After so many batches their rows and sums are written: what a killed run repeats at most."""


class DatasetSums:
    """Running sums of every layer.

    Parameters
    ----------
    class_names
        As given by the user or the model; None: ``class_0``, ``class_1`` and so on.
    group_by
        One of ``GROUPINGS``.
    axes
        What the tokens of each modality may be.
    finder
        Where the labels come from.

    Attributes
    ----------
    classes : tuple of str
        The names of the classes, once ``begin`` was called; empty when what groups them is not known.
    axes : dict of str to TokenAxis
        Those that fit the first layer, once ``begin`` was called.
    """

    def __init__(
        self, class_names: Sequence[str] | None, group_by: str, axes: Mapping[str, TokenAxis], finder: LabelFinder
    ) -> None:
        self._class_names = class_names
        self._finder = finder
        self._all_axes = axes
        self._group_by = group_by
        self.classes: tuple[str, ...] = ()
        self.axes: dict[str, TokenAxis] = {}
        self._accumulators: dict[str, LayerAccumulator] = {}
        self._device = torch.device("cpu")

    def begin(self, first: Pass) -> Iterator[str]:
        """Take the names of the classes from a first pass; returns what cannot be shown, and why."""
        self._device = first.pairs[0].forward.weights.device
        self.axes = fitting_axes(self._all_axes, first.pairs)
        self.classes = name_classes(first.labels, self._class_names, self._group_by, first.step)
        return missing_labels(first.labels, self.classes, self._group_by, first.step)

    def add(self, run: Pass, first_index: int) -> list[dict[str, Any]]:
        """Add a pass; returns the columns of its rows of the sample table, by layer.

        Parameters
        ----------
        run
            The pass.
        first_index
            The place of its first sample in the loader.
        """
        places = torch.arange(first_index, first_index + run.step.samples)
        about = {"sample_idx": places, "sample_id": run.sample_ids, "group": run.labels.group_ids}
        columns = list(add_batch(self._accumulators, run.pairs, run.labels, self._group_by, len(self.classes)))
        if self._finder.has_several:
            warnings.warn(self._finder.drop_targets(), XAttnWarning, stacklevel=2)
            self.load({layer: of_layer.without_labels() for layer, of_layer in self.sums().items()})
            self.classes = ()
        return [of_layer | about for of_layer in columns]

    def sums(self) -> Sums:
        """What there is so far; ``add`` replaces these tensors and leaves them as they are."""
        return {layer: accumulator.sums() for layer, accumulator in self._accumulators.items()}

    def load(self, sums: Sums) -> None:
        """Go on from other sums, where the first pass was."""
        self._accumulators = {}
        for layer, of_layer in sums.items():
            self._accumulators[layer] = LayerAccumulator(of_layer.layout, self._device)
            self._accumulators[layer].load(of_layer)

    def summaries(self) -> dict[str, LayerSummary]:
        """By layer, in the order in which they ran."""
        return {layer: LayerSummary(of.sums().cpu()) for layer, of in self._accumulators.items()}


@dataclass(frozen=True, eq=False)
class _Done:
    """The batches that are explained to their end: an error or an interrupt in the next one does not touch this."""

    batches: int
    samples: int
    sums: Sums
    rows: list[dict[str, Any]]
    """Those that are not in the folder yet."""


class LoaderRun:
    """Goes through a loader, keeps the sums, and writes them and the rows into a folder.

    Parameters
    ----------
    observe
        Runs the model over a batch, in one pass or in several over its parts.
    sums
        Takes the passes.
    folder
        Where rows and sums are kept, and from where to go on; None: nowhere.
    tell
        Called with what a user should be warned of.
    """

    def __init__(
        self,
        observe: Callable[[Any], Iterator[Pass]],
        sums: DatasetSums,
        folder: ExplainedFolder | None,
        tell: Callable[[Iterable[str]], None],
    ) -> None:
        self._observe, self._sums, self._folder, self._tell = observe, sums, folder, tell
        self._done = _Done(0, 0, {}, []) if folder is None else _Done(folder.batches, folder.samples, folder.sums, [])
        self._reached = 0

    def run(self, loader: Iterable[Any], progress: bool) -> None:
        """Explain every batch that the folder does not have yet; the sums are then those of all.

        Raises
        ------
        DataError
            If the loader is empty, or yields fewer batches than the folder has.
        XAttnError
            If a batch fails: its number, why, and what is kept. An error that is raised on purpose keeps its kind.
        """
        try:
            # None: a bar where there is a terminal.
            with tqdm(loader, desc="Explaining", unit="batch", disable=None if progress else True) as bar:
                for batch in bar:
                    self._take(batch)
                    self._reached += 1
                    if self._folder is not None and self._folder.finished:
                        rank_zero_info(f"Read back from {self._folder.folder}, which is finished.")
                        return
            if self._reached < self._done.batches:
                raise DataError(f"The loader ends here; the folder has {self._done.batches} batches of it.")
            if self._reached:
                self._save(finished=True)
        except BaseException as error:
            kept = self._keep()
            if isinstance(error, XAttnError):
                raise type(error)(f"Batch {self._reached}: {error} {kept}") from error
            if isinstance(error, Exception):
                raise XAttnError(f"Batch {self._reached} could not be explained: {error!r}. {kept}") from error
            raise
        if not self._reached:
            raise DataError("The loader is empty: it yields no batch, so there is nothing to explain.")

    def _take(self, batch: Any) -> None:
        if self._reached == 0:
            # Looked at in every run: where labels are found is decided here, and whether the folder is this loader's.
            runs = self._observe(batch)
            first = next(runs)
            self._tell(self._sums.begin(first))
            if self._folder is not None:
                self._folder.check_first(first)
            self._sums.load(self._done.sums)
            runs = chain([first], runs)
        elif self._reached >= self._done.batches:
            runs = self._observe(batch)
        if self._reached >= self._done.batches:
            self._add(runs)

    def _add(self, runs: Iterable[Pass]) -> None:
        done, rows, samples = self._done, [], self._done.samples
        for run in runs:
            rows += self._sums.add(run, samples)
            samples += run.step.samples
        waiting = [] if self._folder is None else done.rows + rows
        self._done = _Done(done.batches + 1, samples, self._sums.sums(), waiting)
        if self._folder is not None and self._done.batches - self._folder.batches >= BATCHES_A_PART:
            self._save()

    def _save(self, finished: bool = False) -> None:
        if self._folder is not None:
            self._folder.save(self._done.batches, self._done.samples, self._done.sums, self._done.rows, finished)
            self._done = replace(self._done, rows=[])

    def _keep(self) -> str:
        """Write what is not written yet, and say what there is."""
        before = f"The {self._done.samples} samples of the {self._done.batches} batches before it"
        if self._folder is None:
            return f"{before} are not kept: name a folder, explain_loader(loader, table=...), to keep them."
        try:
            if self._done.batches > self._folder.batches:
                self._save()
        except Exception as error:  # a full disk: what was to be said first must not be lost
            return f"{before} could not be written into {self._folder.folder}: {error!r}."
        if not self._done.batches:
            return f"Nothing is in {self._folder.folder} yet."
        return f"{before} are kept in {self._folder.folder}: call explain_loader with the same folder to go on."
