"""A whole loader, batch after batch: what the callback does to an evaluation, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from lightning_xattn.attribution.kept_samples import Collected
from lightning_xattn.capture.labels import Step
from lightning_xattn.core.errors import DataError, XAttnError
from lightning_xattn.core.notices import info
from lightning_xattn.core.progress import Stage
from lightning_xattn.evaluation.accumulators import LayerAccumulator
from lightning_xattn.evaluation.evaluation import Evaluation
from lightning_xattn.evaluation.fusion_samples import sample_columns
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.maps import SampleMaps
from lightning_xattn.evaluation.results import BatchResult

if TYPE_CHECKING:
    from lightning_xattn.explainer.progress import ExplainedFolder

BATCHES_A_PART = 32
"""After so many batches their rows and sums are written: what a killed run repeats at most."""


@dataclass(frozen=True, eq=False)
class _Done:
    """The batches that are explained to their end: an error or an interrupt in the next one does not touch this."""

    batches: int
    samples: int
    seen: int
    """With those that were left out."""
    other_lengths: Mapping[str, int]
    """See ``Evaluation``."""
    sums: Mapping[str, LayerAccumulator]
    collected: Collected
    maps: SampleMaps
    rows: list[dict[str, Any]]
    """Those that are not in the folder yet."""


class LoaderRun:
    """Goes through a loader, keeps the sums, and writes them and the rows into a folder.

    Parameters
    ----------
    observe
        Runs the model over a batch, or over its parts, and reads what it gave.
    evaluation
        Adds it up.
    folder
        Where rows and sums are kept, and from where to go on; None: nowhere.

    Attributes
    ----------
    token_counts : dict of str to int
        Number of tokens of each modality in the first layer of the first batch.
    """

    def __init__(
        self,
        observe: Callable[[Any], Iterator[tuple[Step, BatchResult]]],
        evaluation: Evaluation,
        folder: ExplainedFolder | None,
    ) -> None:
        self._observe, self._evaluation, self._folder = observe, evaluation, folder
        self.token_counts: dict[str, int] = {}
        collected, maps = evaluation.collected.snapshot(), evaluation.maps.snapshot()
        self._done = _Done(0, 0, 0, {}, {}, collected, maps, [])
        if folder is not None:
            if folder.fusion is not None:
                collected.load(folder.fusion)
            if folder.maps is not None:
                maps.load(folder.maps)
            counts = folder.batches, folder.samples, folder.seen, folder.other_lengths
            self._done = _Done(*counts, folder.sums, collected, maps, [])
        self._reached, self._has_begun = 0, False

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
            with Stage("Explaining", size_of(loader), shown=progress) as stage:
                for batch in loader:
                    self._take(batch)
                    self._reached += 1
                    if self._folder is not None and self._folder.finished and self._has_begun:
                        info([f"Read back from {self._folder.folder}, which is finished."])
                        return
                    stage.advance()
                stage.title = f"Explaining {self._done.samples} samples"
            if self._reached < self._done.batches:
                raise DataError(f"The loader ends here; the folder has {self._done.batches} batches of it.")
            if self._done.batches > (0 if self._folder is None else self._folder.batches):
                self._save()
        except BaseException as error:
            kept = self._keep()
            if isinstance(error, XAttnError):
                raise type(error)(f"Batch {self._reached}: {error} {kept}") from error
            if isinstance(error, Exception):
                raise XAttnError(f"Batch {self._reached} could not be explained: {error!r}. {kept}") from error
            raise
        if not self._reached:
            raise DataError("The loader is empty: it yields no batch, so there is nothing to explain.")
        if not self._has_begun:
            raise DataError(
                f"Nothing ran for any of the loader's {self._reached} batches: the model, or predict, returned None "
                "before it called any module, so there is nothing to explain."
            )

    def finish(self, fusion: FusionSummary | None) -> None:
        """Add to the folder what is known of its samples now that the loader has ended."""
        if self._folder is not None and not self._folder.finished:
            self._folder.finish(None if fusion is None else sample_columns(fusion, 0))

    def _take(self, batch: Any) -> None:
        is_new = self._reached >= self._done.batches
        runs = self._observe(batch) if is_new or not self._has_begun else iter(())
        # The first batch for which the model runs is looked at in every run: where labels are found is decided there,
        # and whether the folder is this loader's.
        first = None if self._has_begun else next(runs, None)
        if not self._has_begun and self._evaluation.other_lengths:
            raise DataError(
                "The first batch has a joint sequence of another length than the spans of its JointSequence are for."
            )
        if first is not None:
            self._has_begun = True
            if first[1].attention:
                self.token_counts = first[1].attention[0].forward.token_counts
            if self._folder is not None:
                self._folder.check_first(first[1])
            done = self._done
            before = done.seen, done.other_lengths, done.sums, done.collected, done.maps
            self._evaluation.load(*before, first[1].device)
            runs = chain([first], runs)
        if is_new:
            self._add(result for _, result in runs)

    def _add(self, results: Iterable[BatchResult]) -> None:
        done, rows, samples = self._done, [], self._done.samples
        for result in results:
            rows += self._evaluation.add(result)
            samples += len(result)
            if self._evaluation.finder.has_several:
                self._evaluation.drop_targets()
        waiting = [] if self._folder is None else done.rows + rows
        if self._evaluation.has_dropped:
            waiting = [row | dict.fromkeys(("target", "prediction", "confidence", "correct")) for row in waiting]
        kept = self._evaluation.collected.snapshot(), self._evaluation.maps.snapshot()
        counts = done.batches + 1, samples, self._evaluation.seen, dict(self._evaluation.other_lengths)
        self._done = _Done(*counts, self._evaluation.sums(), *kept, waiting)
        if self._folder is not None and self._done.batches - self._folder.batches >= BATCHES_A_PART:
            self._save()

    def _save(self) -> None:
        if self._folder is not None:
            done = self._done
            kept = done.collected.part(), done.maps.part()
            counts = done.batches, done.samples, done.seen, done.other_lengths
            self._folder.save(*counts, done.sums, *kept, done.rows)
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


def size_of(sized: Any) -> int | None:
    """How long something is; None of what does not know, as a loader over an iterable data set."""
    try:
        return len(sized)
    except TypeError:
        return None
