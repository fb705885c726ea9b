"""What users should be warned of in an epoch, once, in words that name the layer and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lightning_xattn.capture import Layer
from lightning_xattn.core.attention import AttentionPair
from lightning_xattn.core.notices import describe_error
from lightning_xattn.core.wording import SINGLE_KEYS, by_reason, say_wholly_masked
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.statistics import Column

UNIFORM = 0.999
"""A head whose mean entropy is above this is uniform for all samples, as no sample's entropy can be above 1."""

COLLAPSED = 0.01
"""A head whose mean entropy is below this attends to a single key for (nearly) all samples."""

ALIKE = 0.001
"""Heads whose mean diversity is below this attend alike."""

SINK = 0.5
"""A head whose mean ``sink`` is above this gives most of every query's attention to one key."""


class Checks:
    """Finds what is wrong with a layer's attention, and tells each thing once."""

    def __init__(self) -> None:
        self._told: set[tuple[str | int, ...]] = set()
        # By layer, the number of queries in a first batch.
        self._queries: dict[str, int] = {}

    def of_directions(self, layers: Iterable[Layer]) -> Iterator[str]:
        """A new warning that the layers themselves give."""
        alone = [layer for layer in layers if layer.backward is None]
        if alone and self._is_new("", "", "alone", 0):
            direction, source = alone[0].forward
            sites = ", ".join(f"'{source}' ({direction})" for direction, source in (layer.forward for layer in alone))
            yield (
                f"Found {sites} without {direction.opposite}, so there is no alignment. If the model has both "
                f"directions, name both: attention={{'{direction}': '{source}', '{direction.opposite}': ...}}."
            )

    def of_padding(self, pairs: Iterable[AttentionPair]) -> Iterator[str]:
        """A new warning that a batch gives whose queries may be padding, as nothing says which are."""
        for pair in pairs:
            attention, queries = pair.forward, pair.forward.weights.shape[2]
            if pair.backward is not None or attention.query_mask is not None or attention.cross_modal_mass is not None:
                continue
            before = self._queries.setdefault(pair.layer, queries)
            if before != queries and self._is_new(pair.layer, "", "padding", 0):
                yield (
                    f"Layer '{pair.layer}': the number of {attention.direction.query} queries changes from batch to "
                    f"batch ({before}, {queries}), and nothing says which of them are padding, so all count. If some "
                    "are padding, say which: query_mask=<key or callable>, (batch, queries), True for a real token."
                )

    def of_doubts(self, doubts: Mapping[str, str]) -> Iterator[str]:
        """New warnings of what could be labels and was not taken, see ``Labels.doubts``."""
        yield from (doubt for doubt in doubts.values() if self._is_new("", "", doubt, 0))

    def of_nothing(self, stage: str, ever: bool) -> Iterator[str]:
        """The warning that a recorded evaluation without any attention gives, after one with attention (``ever``)."""
        if not ever and self._is_new("", "", "never", 0):
            yield (
                f"No recorded step of an evaluation ('{stage}') ran a module, so there is no curve: each returned "
                "before it called the model, or called it in a function that torch.compile made, which hides it. If "
                "other steps run the model, record more of them: every_n_batches=1."
            )
        if ever and self._is_new("", "", "nothing", 0):
            yield (
                f"An evaluation ('{stage}') had no attention, though earlier steps had: the modules did not run, or "
                "returned none. The evaluation has no curves."
            )

    def of_a_batch(self, error: Exception) -> Iterator[str]:
        """The warning that a batch gives that cannot be recorded, once for each kind of error."""
        if self._is_new("", "", f"batch: {type(error).__name__}", 0):
            yield f"A batch is left out, and others like it will be without another warning. {describe_error(error)}"

    def of_a_process(self, refusal: str) -> Iterator[str]:
        """The warning of one of several processes that records nothing, where others do."""
        if refusal and self._is_new("", "", "process", 0):
            yield (
                "One of several processes records nothing in this run, so its samples are missing in every number "
                f"(left_out_batches in the history). {refusal}"
            )

    def of_epoch(self, layer: str, summary: LayerSummary) -> Iterator[str]:
        """New warnings that an epoch gives."""
        yield from self._of_samples(layer, summary)
        for direction, heads in summary.heads.items():
            where = f"Layer '{layer}', {direction}"
            if summary.mean(Column("head_diversity", direction)) < ALIKE and self._is_new(
                layer, str(direction), "alike", 0
            ):
                yield f"{where}: all {heads} heads attend alike. Fewer heads would do the same."
            broken = [summary.total(Column("broken", direction, head)) for head in range(heads)]
            entropy = [summary.mean(Column("entropy", direction, head)) for head in range(heads)]
            sink = [summary.mean(Column("sink", direction, head)) for head in range(heads)]
            for kind, found, meaning in (
                (
                    "broken",
                    [value > 0 for value in broken],
                    f"{int(sum(broken))} rows of attention are not finite or do not sum to 1, though neither their "
                    "queries nor all of their keys are masked. They are left out of every number. Look for NaN or "
                    "overflow before the softmax.",
                ),
                (
                    "uniform",
                    [value > UNIFORM for value in entropy],
                    "uniform attention for all samples (entropy ~1): a dead head, which averages over all tokens.",
                ),
                (
                    "collapsed",
                    [value < COLLAPSED for value in entropy],
                    "attention to a single key for all samples (entropy ~0): a collapsed head. Look at the learning "
                    "rate and at the scale of queries and keys.",
                ),
                (
                    "sink",
                    [value > SINK for value in sink],
                    "most of every query's attention goes to one key: an attention sink, which does not tell queries "
                    "apart.",
                ),
            ):
                new = [h for h in range(heads) if found[h] and self._is_new(layer, str(direction), kind, h)]
                if new:
                    yield f"{where}, head {', '.join(map(str, new))}: {meaning}"

    def of_single_keys(self, layer: str, directions: Sequence[str]) -> Iterator[str]:
        """New warnings that these directions, of which every row has a single valid key, give."""
        if directions and self._is_new(layer, "", "single key", 0):
            yield f"Layer '{layer}': {' and '.join(directions)} {SINGLE_KEYS}"

    def of_wholly_masked(self, layer: str, masked: int, samples: int) -> Iterator[str]:
        """New warnings that samples give of which one modality is wholly masked."""
        if masked and self._is_new(layer, "", "wholly masked", 0):
            yield say_wholly_masked(layer, masked, samples)

    def of_probe(self, described: str) -> Iterator[str]:
        """The message of what was taken for what, where it is not what it was before."""
        if self._is_new("", "", f"takes {described}", 0):
            yield f"AttentionExplainabilityCallback takes {described}."

    def of_folders(self, folders: Iterable[Path]) -> Iterator[str]:
        """New messages of where figures and reports are that no logger takes."""
        for folder in folders:
            if self._is_new("", "", f"folder {folder}", 0):
                yield f"Figures and reports are written to {folder}."

    def of_fusion(self, summary: FusionSummary) -> Iterator[str]:
        """New messages of what cannot be told of the modalities."""
        for reason, names in self._new_by_reason("unreadable", summary.probe_problems):
            who, alone = " and ".join(map(repr, names)), "itself" if len(names) == 1 else "themselves"
            yield f"{who} cannot be read by {alone}: {reason}. So there is no conflict and no support_difference."
        if summary.nonfinite and self._is_new("", "", "left out", 0):
            yield (
                f"{summary.nonfinite} samples are left out of probes and contributions: what they bring into the "
                "fusion is not finite."
            )
        if summary.whole_runs and self._is_new("", "", "whole runs", 0):
            yield (
                "Permuting modalities runs the whole model again, as what comes before the fusion cannot be skipped: "
                f"at the end of each evaluation it costs as much as {summary.pairs} samples. contribution_samples=0 "
                "turns it off."
            )
        if summary.contribution_problem and self._is_new("", "", summary.contribution_problem, 0):
            yield f"The contributions of the modalities cannot be told: {summary.contribution_problem}."
        replaced = {str(direction): one for direction, one in summary.replaced.items()}
        for reason, names in self._new_by_reason("faithfulness", {name: one.problem for name, one in replaced.items()}):
            yield f"The faithfulness of the attention {' and '.join(names)} cannot be told: {reason}."
        told = {name: one.without_reference for name, one in replaced.items() if not one.problem}
        for reason, names in self._new_by_reason("reference", told):
            yield f"The faithfulness of the attention {' and '.join(names)} has no reference: {reason}."

    def _of_samples(self, layer: str, summary: LayerSummary) -> Iterator[str]:
        single = [
            str(direction)
            for direction in summary.heads
            # Valid rows without an entropy are rows of a single key, whether the others are masked or do not exist.
            if summary.count(Column("max", direction)) and not summary.count(Column("entropy", direction))
        ]
        yield from self.of_single_keys(layer, single)
        yield from self.of_wholly_masked(layer, summary.wholly_masked, summary.samples)
        if not summary.maps and self._is_new(layer, "", "ragged", 0):
            yield (
                f"Layer '{layer}': the number of tokens changes from batch to batch, so there are no mean maps and no "
                "alignment between different samples. Pad all batches to one length to see them."
            )
        if summary.unclassified and self._is_new(layer, "", "unclassified", 0):
            yield (
                f"{summary.unclassified} of {summary.samples} samples have no class: a label that is missing or not in "
                f"0 ... {summary.n_classes - 1}, or scores that are not finite. They count in 'all' only."
            )

        if summary.ungrouped and self._is_new(layer, "", "ungrouped", 0):
            yield (
                f"{summary.ungrouped} of {summary.samples} samples have no group, though others have one: they are "
                "taken as one group, which makes intervals wider. Give each sample a group."
            )

    def _new_by_reason(self, kind: str, reasons: Mapping[str, str]) -> Iterable[tuple[str, list[str]]]:
        """The names that have a reason and were not told yet, by their reason."""
        new = {name: why for name, why in reasons.items() if why and self._is_new("", name, kind, 0)}
        return by_reason(new).items()

    def _is_new(self, *warning: str | int) -> bool:
        new = warning not in self._told
        self._told.add(warning)
        return new
