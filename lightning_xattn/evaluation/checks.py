"""Messages about what is wrong with an evaluation: each names the place and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lightning_xattn.capture import Layer
from lightning_xattn.core.names import shown_tag
from lightning_xattn.core.notices import is_new
from lightning_xattn.core.wording import SINGLE_KEYS, by_reason, percent, say_wholly_masked
from lightning_xattn.evaluation.fusion_summary import NO_TARGETS, FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.statistics import Column
from lightning_xattn.evaluation.support import UNUSED_EPOCHS, UNUSED_SHARE
from lightning_xattn.functional import Rows, has_single_keys

UNIFORM = 0.999
"""A head whose mean entropy is above this is uniform for all samples, as no sample's entropy can be above 1."""

COLLAPSED = 0.01
"""A head whose mean entropy is below this attends to a single key for (nearly) all samples."""

ALIKE = 0.001
"""Heads whose mean diversity is below this attend alike."""

SINK = 0.5
"""A head whose mean ``sink_excess`` is above this gives most of its attention to one key."""

MEANINGS = {
    "broken": (
        "{rows} rows of attention are not finite or do not sum to 1, though neither their queries nor all of their "
        "keys are masked. They are left out of every number. Look for NaN or overflow before the softmax."
    ),
    "uniform": "uniform attention for all samples (entropy ~1): a dead head, which averages over all tokens.",
    "collapsed": (
        "attention to a single key for all samples (entropy ~0): a collapsed head. Look at the learning rate and at "
        "the scale of queries and keys."
    ),
    "sink": "most of the attention goes to one key: an attention sink.",
}
"""What a check of single heads found, and what to do."""


def check_directions(layers: Iterable[Layer]) -> Iterator[str]:
    """A message if layers have one direction alone."""
    alone = [layer for layer in layers if len(layer.sources) == 1]
    if alone:
        direction, source = alone[0].sources[0]
        sites = ", ".join(f"'{source}' ({direction})" for layer in alone for direction, source in layer.sources)
        yield (
            f"Found {sites} without {direction.opposite}, so there is no alignment. If the model has both directions, "
            f"name both: attention={{'{direction}': '{source}', '{direction.opposite}': ...}}."
        )


def explain_empty_evaluation(stage: str, has_recorded: bool) -> str:
    """The message of an evaluation in which no recorded step had attention, after others had or not."""
    if has_recorded:
        return (
            f"An evaluation ('{stage}') had no attention, though earlier steps had: the modules did not run, or "
            "returned none. The evaluation has no curves."
        )
    return (
        f"No recorded step of an evaluation ('{stage}') ran a module, so there is no curve: each returned before it "
        "called the model, or called it in a function that torch.compile made, which hides it. If other steps run the "
        "model, record more of them: every_n_batches=1."
    )


def explain_refusal(problem: str) -> str:
    """The message of one of several processes that records nothing, where others do."""
    return (
        "One of several processes records nothing in this run, so its samples are missing in every number "
        f"(left_out_batches in the history). {problem}"
    )


def check_layer(
    layer: str, summary: LayerSummary, lacks_query_mask: bool = False, may_lack: bool = False
) -> Iterator[str]:
    """Messages about a layer in an evaluation, those that this run has not given yet.

    Parameters
    ----------
    layer, summary
        Its name, and its evaluation.
    lacks_query_mask
        Whether one direction alone is recorded, and no mask marks its queries that are padding.
    may_lack
        Whether a setting says which samples lack a modality; then a wholly masked one needs no warning.
    """
    for about, message in _check_samples(layer, summary, lacks_query_mask, may_lack):
        if is_new((layer, about)):
            yield message
    for direction, heads in summary.heads.items():
        where = f"Layer '{layer}'" if layer == str(direction) else f"Layer '{layer}', {direction}"
        if summary.mean(Column("head_diversity", direction)) < ALIKE and is_new((where, "alike")):
            yield f"{where}: all {heads} heads attend alike. Fewer heads would do the same."
        entropy, sink = (
            [summary.mean(Column(name, direction, head)) for head in range(heads)]
            for name in ("entropy", "sink_excess")
        )
        broken = [summary.total(Column("broken", direction, head)) for head in range(heads)]
        found = {
            "broken": [rows > 0 for rows in broken],
            "uniform": [value > UNIFORM for value in entropy],
            "collapsed": [value < COLLAPSED for value in entropy],
            "sink": [value > SINK for value in sink],
        }
        for kind, which in found.items():
            new = [head for head in range(heads) if which[head] and is_new((where, kind, head))]
            if new:
                meaning = MEANINGS[kind].format(rows=int(sum(broken)))
                yield f"{where}, head {', '.join(map(str, new))}: {meaning}"


def check_rows(layer: str, rows: Sequence[Rows], may_lack: bool = False) -> Iterator[str]:
    """Messages about the directions of a layer in one batch, those that this run has not given yet.

    ``may_lack`` as ``check_layer`` takes it.
    """
    single = [str(one.direction) for one in rows if has_single_keys(one)]
    masked = torch.stack([one.wholly_masked for one in rows]).any(0)
    for about, message in _check_keys(layer, single, 0 if may_lack else int(masked.sum()), len(masked)):
        if is_new((layer, about)):
            yield message


def check_fusion(summary: FusionSummary) -> Iterator[str]:
    """Messages about what was not computed of the modalities, those that this run has not given yet."""
    for reason, names in _new_by_reason("probe", summary.probe_problems):
        if reason == NO_TARGETS:
            continue  # which no setting changes; the numbers at the end say so
        who = " and ".join(map(repr, names))
        yield f"Linear probe of {who} not used: {reason}. So support is not computed."
    if summary.unrecorded and is_new(("unrecorded", summary.unrecorded)):
        yield (
            f"{summary.unrecorded} samples are left out of probes and contributions: the modalities of their steps "
            "could not be recorded."
        )
    for name, count in summary.missing.items():
        if is_new(("missing", name, count)):
            yield f"{count} samples lack {name}: they are left out of probes and contributions."
    if summary.nonfinite and is_new("left out"):
        yield (
            f"{summary.nonfinite} samples are left out of probes and contributions: what they bring into the fusion is "
            "not finite."
        )
    if summary.whole_runs and is_new("whole runs"):
        yield (
            "Permuting modalities runs the whole model again, as what comes before the fusion cannot be skipped: at "
            f"the end of each evaluation it costs as much as {summary.pairs} samples. contribution_samples=0 turns it "
            "off."
        )
    if summary.contribution_problem and is_new(summary.contribution_problem):
        yield f"Contributions not computed: {summary.contribution_problem}."
    replaced = {str(direction): one for direction, one in summary.replaced.items()}
    for reason, names in _new_by_reason("faithfulness", {name: one.problem for name, one in replaced.items()}):
        yield f"Faithfulness of the attention {' and '.join(names)} not computed: {reason}."
    computed = {name: one.without_reference for name, one in replaced.items() if not one.problem}
    for reason, names in _new_by_reason("reference", computed):
        yield f"The faithfulness of the attention {' and '.join(names)} has no reference: {reason}."


def check_unused(records: Sequence[Mapping[str, Any]], modalities: Sequence[str]) -> Iterator[str]:
    """A message about each modality that the model has not used in the last `UNUSED_EPOCHS` records of validations.

    None where the last record is not of a validation.
    """
    if not records or records[-1]["stage"] != "val":
        return
    probed = [one for one in records if one["stage"] == "val" and "probed_samples" in one]
    # Of several validations of the same weights the last one counts.
    last = [*{(one["epoch"], one["step"]): one for one in probed}.values()][-UNUSED_EPOCHS:]
    for name in modalities:
        found = [one.get(f"health/unused/{shown_tag(name)}") for one in last]
        if found == [1.0] * UNUSED_EPOCHS and is_new(("unused", name)):
            yield (
                f"The model does not use '{name}': in the last {UNUSED_EPOCHS} recorded validations a linear probe of "
                f"all modalities is clearly better with it than without it, yet its share of the contributions is "
                f"below {percent(UNUSED_SHARE, 0)}. Training may have stopped at the modality that is learned first: "
                "try a loss on each modality's own features, dropout of whole modalities, or a smaller learning rate "
                "for the others' encoders."
            )


def _check_samples(
    layer: str, summary: LayerSummary, lacks_query_mask: bool, may_lack: bool
) -> Iterator[tuple[str, str]]:
    """What a message is about, and the message."""
    single = [
        str(direction)
        for direction in summary.heads
        # Valid rows without an entropy are rows of a single key, whether the others are masked or do not exist.
        if summary.count(Column("max", direction)) and not summary.count(Column("entropy", direction))
    ]
    yield from _check_keys(layer, single, 0 if may_lack else summary.wholly_masked, summary.samples)
    if not summary.maps:
        hint = (
            " Queries that are padding count unless a mask marks them: query_mask=<key or callable>, (batch, queries), "
            "True for a real token."
            if lacks_query_mask
            else ""
        )
        yield (
            "token counts",
            f"Layer '{layer}': the number of tokens changes from batch to batch, so there are no mean maps and no "
            f"alignment between different samples. Pad each modality to one length in all batches to see them.{hint}",
        )
    if summary.unclassified:
        yield (
            "unclassified",
            f"{summary.unclassified} of {summary.samples} samples have no class: a label that is missing or not in 0 "
            f"... {summary.n_classes - 1}, or scores that are not finite. They count in 'all' only.",
        )
    if summary.ungrouped:
        yield (
            "ungrouped",
            f"{summary.ungrouped} of {summary.samples} samples have no group, though others have one: they are taken "
            "as one group, which makes intervals wider. Give each sample a group.",
        )


def _check_keys(layer: str, single: Sequence[str], masked: int, samples: int) -> Iterator[tuple[str, str]]:
    if single:
        yield "single keys", f"Layer '{layer}': {' and '.join(single)} {SINGLE_KEYS}"
    if masked:
        yield "wholly masked", say_wholly_masked(layer, masked, samples)


def _new_by_reason(kind: str, reasons: Mapping[str, str]) -> Iterable[tuple[str, list[str]]]:
    """The names that have a reason, and none that this run has given, by their reason."""
    return by_reason({name: why for name, why in reasons.items() if why and is_new((kind, name))}).items()
