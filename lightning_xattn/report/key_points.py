"""What a reader should know of a data set first, a labelled sentence each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from lightning_xattn.core.attention import Direction
from lightning_xattn.core.wording import decimal, describe_size, name_modality, percent, say_interval
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.evaluation.statistics import SCORES, Column
from lightning_xattn.evaluation.support import estimate_unsupported, unused
from lightning_xattn.functional.intervals import MINIMUM_GROUP, Estimate
from lightning_xattn.functional.probe import JOINT
from lightning_xattn.functional.shapley import MOSTLY
from lightning_xattn.report.document import Items
from lightning_xattn.report.estimates import (
    Subset,
    count_outcomes,
    estimate_accuracy,
    format_estimate,
    format_percent,
)

CONFIDENCE = "confidence"
"""The baseline that any other score has to beat."""


def key_points(result: DatasetResult) -> Items:
    """Size and accuracy, then what the probes predict, what the model uses, and which scores detect errors."""
    return Items([(label, sentence, ()) for label, sentence in _key_points(result)])


def _key_points(result: DatasetResult) -> Iterator[tuple[str, str]]:
    fusion = result.fusion
    yield "Samples", _describe_samples(result)
    if result.table is not None:
        yield "Table", f"the numbers of each sample are in {result.table}."
        yield "Training", describe_training(count_training(result))
    if fusion is not None:
        yield "Probe", describe_probes(fusion)
        yield "Support", describe_support(fusion)
        yield "Contribution", describe_contributions(fusion)
        yield "Faithfulness", describe_faithfulness(result)
        yield "Errors", describe_added_value(fusion)
        yield from describe_limits(fusion)


def _describe_samples(result: DatasetResult) -> str:
    if not result.summaries:
        one = result.fusion
        if one is None:
            return "none."
        size = describe_size(one.samples, one.known_groups, one.group_noun)
        right = (
            f"; the model is right for {format_percent(one.estimate('correct'), '95 % CI ')}"
            if one.has_outcomes
            else ""
        )
        return f"{size}{right}."
    summary, everyone = result.headline, Subset("all", "all")
    size = describe_size(summary.samples, summary.groups(), summary.group_noun)
    correct, incorrect = count_outcomes(summary, everyone)
    if not correct + incorrect:
        return f"{size}."
    accuracy = format_percent(estimate_accuracy(summary, everyone), "95 % CI ")
    return f"{size}; the model predicts {correct} of {correct + incorrect} correctly: {accuracy}."


def count_training(result: DatasetResult) -> dict[str, int | None] | None:
    """Numbers of ``samples`` of the table, ``seen`` by the model in training, and ``related``; None: not known.

    Related samples are of groups of which the model was trained on others; None where groups are not known.
    """
    if result.table is None or result.trained_on is None:
        return None
    from lightning_xattn.evaluation.table import read_rows  # pyarrow, only where a table is read

    rows = list(read_rows(result.table, next(iter(result.summaries), None), ("sample_id", "group")))
    kinds = [result.trained_on.info(row.get("sample_id"), row.get("group")) for row in rows]
    if not any(kinds):
        return None
    has_groups = bool(result.trained_on.groups) and any(row.get("group") is not None for row in rows)
    related = kinds.count("related") if has_groups else None
    return {"samples": len(kinds), "seen": kinds.count("seen"), "related": related}


def describe_training(counts: dict[str, int | None] | None) -> str:
    """How many of the samples the model was trained on, with a warning where there are any."""
    if counts is None:
        return "it is not known which of these samples the model was trained on."
    said = f"the model was trained on {counts['seen'] or 'none'} of these {counts['samples']} samples"
    if counts["related"] is None:
        said += "; whether it was trained on others of their groups is not known"
    elif counts["related"]:
        said += f", and on others of the groups of {counts['related']} more"
    else:
        said += "" if counts["seen"] else ", nor on others of their groups"
    warning = " Such samples do not show how well the model does on new ones."
    return f"{said}.{warning if counts['seen'] or counts['related'] else ''}"


def describe_probes(fusion: FusionSummary) -> str:
    """How often the probe on each modality is right, or why it is not used."""
    if fusion.saved is not None and not fusion.estimate(f"right/{JOINT}").count:
        return "fitted on another, labelled evaluation; these samples have no labels."
    found = []
    for name in fusion.modalities:
        probe, accuracy = f"the probe on {name_modality(name)}", fusion.estimate(f"right/{name}")
        if name in fusion.probe_problems:
            found.append(f"{probe} is not used: {fusion.probe_problems[name]}")
        else:
            found.append(f"{probe} is right in {format_percent(accuracy, '95 % CI ')} of the samples")
    if not math.isnan(fusion.largest_class):
        largest = Estimate(fusion.largest_class, math.nan, math.nan, 0, None)
        found.append(f"the largest class has {format_percent(largest)}")
    return f"{'; '.join(found)}."


def describe_support(fusion: FusionSummary) -> str:
    """How many predictions the modalities support, and how often the model is right about those and the others."""
    if fusion.support_problem:
        return f"not computed: {fusion.support_problem}."
    if not (fusion.support_cell >= 0).any():
        return "not computed: no sample has a prediction that the probes know."
    first, both = fusion.cells[0], len(fusion.modalities) == 2
    none = fusion.support_cell >= len(fusion.cells) - 2
    share = fusion.proportion(none, fusion.support_cell >= 0)
    said = f"{'both probes support' if both else 'all probes support'} {percent(first.share.mean)} of the predictions"
    said += "" if math.isnan(first.accuracy.mean) else f", accuracy {format_percent(first.accuracy, '95 % CI ')}"
    said += f"; {'neither supports' if both else 'none supports'} {percent(share.mean)}"
    accuracy = estimate_unsupported(fusion)
    if not math.isnan(accuracy.mean):
        confidence = fusion.estimate("confidence", among=none).mean
        said += f", accuracy {format_percent(accuracy, '95 % CI ')} at a mean confidence of {percent(confidence)}"
    return f"{said}."


def describe_added_value(fusion: FusionSummary) -> str:
    """Whether support detects errors that confidence misses."""
    added = fusion.added_value
    if not fusion.has_outcomes:
        return "no prediction is known to be correct or not."
    if isinstance(added, str):
        return f"whether support detects errors that confidence misses is not computed: {added}."
    delta, loss = added.delta_auroc, added.delta_log_loss
    interval = "" if math.isnan(delta.low) else f", 95 % CI {say_interval(delta.low, delta.high, 2)}"
    but = ""
    if delta.low > 0 and not added.adds:
        but = f"; the log loss is not clearly better ({format_estimate(loss, signed=True)} nats)"
    claim = "support detects" if added.adds else "support is not shown to detect"
    return (
        f"in this evaluation {claim} errors that confidence misses: AUROC {decimal(added.baseline_auroc)} → "
        f"{decimal(added.auroc)} ({decimal(delta.mean, signed=True)}{interval}){but}."
    )


def describe_limits(fusion: FusionSummary) -> Iterator[tuple[str, str]]:
    """What the model does not use, and what it uses that the probes do not see, with a label each."""
    model, joint = fusion.estimate("correct"), fusion.estimate(f"right/{JOINT}")
    for name in fusion.modalities:
        if unused(fusion, name) == 1:
            who, share = name_modality(name), format_percent(fusion.share(name), "95 % CI ")
            without = joint.mean - fusion.estimate(f"joint_gain/{name}").mean
            gain = fusion.auroc_gains[name]
            yield (
                "Unused",
                f"the model does not use {who} (share {share}), though a linear probe of all modalities is right for "
                f"{percent(joint.mean)} with {who} and for {percent(without)} without it (macro AUROC "
                f"{decimal(gain.mean, 3, signed=True)} with it).",
            )
    if model.low > joint.high:
        said = (
            f"the model is right for {percent(model.mean)}, the joint probe for {percent(joint.mean)}: it uses what a "
            "linear probe of pooled features does not see"
        )
        if not fusion.contribution_problem and not fusion.is_regression:
            additive, whole = fusion.estimate("additive_right"), fusion.estimate("model_right")
            if additive.high < whole.low:
                said += (
                    f", part of it in how the modalities combine (without interactions it would be right for "
                    f"{percent(additive.mean)})"
                )
        yield "Beyond the probes", f"{said}."


def describe_contributions(fusion: FusionSummary) -> str:
    """How much each modality contributes, and which one the model mostly uses."""
    if fusion.contribution_problem:
        return f"not computed: {fusion.contribution_problem}."
    if fusion.is_regression:
        sizes = (
            f"{name_modality(one)} moves the output by {decimal(fusion.size(one).mean, 3)}" for one in fusion.modalities
        )
        return f"{', '.join(sizes)}, on average over samples."
    return describe_shares({name: fusion.share(name) for name in fusion.modalities}, fusion.group_noun)


def describe_shares(shares: Mapping[str, Estimate], noun: str | None) -> str:
    """Which modality the model mostly uses, if the 95 % CI of its share lies above `MOSTLY`, and all shares."""
    defined = {name: share for name, share in shares.items() if not math.isnan(share.mean)}
    if not defined:
        return "no shares, as the contributions do not add up to more than 0."
    most = max(defined, key=lambda name: defined[name].mean)
    if math.isnan(defined[most].low):
        claim = f"no claim about a main modality with fewer than {MINIMUM_GROUP} {noun or 'samples'}"
    elif defined[most].low > MOSTLY:
        claim = f"the model mostly uses {name_modality(most)}"
    else:
        claim = "no modality contributes clearly more than two thirds"
    listed = "; ".join(f"{name_modality(name)} {format_percent(one, '95 % CI ')}" for name, one in defined.items())
    return f"{claim}. Shares: {listed}."


def describe_faithfulness(result: DatasetResult) -> str:
    """Whether attention ranks the tokens that predictions depend on."""
    fusion = result.fusion
    if fusion is None or not fusion.replaced:
        return "not tested in this epoch." if result.summaries else "not tested: there is no attention."
    found = [
        describe_ranking(direction, fusion.faithfulness(direction), fusion.faithfulness_problem(direction))
        for direction in fusion.replaced
    ]
    return f"{'; '.join(found)}."


def describe_ranking(direction: Direction, found: Estimate, unfaithful: str) -> str:
    """Whether the attention of a direction ranks the keys that predictions depend on, or why that is not computed."""
    key = name_modality(direction.key)
    if unfaithful:
        return f"not computed for {key} ({unfaithful})"
    interval = f"({decimal(found.mean)}, 95 % CI {say_interval(found.low, found.high, 2)})"
    ranks = f"the {key} tokens by how much predictions depend on them"
    if found.low > 0:
        return f"attention ranks {ranks} {interval}"
    if found.high < 0:
        return f"attention ranks {ranks} the wrong way round {interval}"
    return f"attention is not shown to rank {ranks} {interval}"


def shown_scores(fusion: FusionSummary) -> list[str]:
    """The scores of the fusion that are compared between correct and incorrect predictions, confidence first."""
    known = fusion.estimate(CONFIDENCE).count and fusion.has_outcomes
    return [CONFIDENCE, *([] if fusion.support_problem else ["support"])] if known else []


def shown_layer_scores(summary: LayerSummary) -> list[Column]:
    """The same of a layer; none where no prediction is known to be correct or not."""
    known = sum(count_outcomes(summary, Subset("all", "all")))
    return [score for score in SCORES if score in summary.columns and known]
