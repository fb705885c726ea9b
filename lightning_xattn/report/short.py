"""What is to be known of a data set first, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_xattn.messages import decimal, describe_size, name_modality
from lightning_xattn.report.facts import BatchFacts, DatasetFacts
from lightning_xattn.report.modalities import FusionFacts, ModalityFacts
from lightning_xattn.summary import Comparison


def in_short(facts: DatasetFacts) -> Iterator[str]:
    """Can each modality be read, do they conflict, which is followed, what tells errors, is attention faithful?"""
    fusion, layers = facts["fusion"], facts["layers"]
    if layers:
        whole = layers[0]["groups"][0]
        size = describe_size(layers[0]["samples"], whole["groups"], layers[0]["group_noun"])
        known = not math.isnan(whole["accuracy"])
        yield f"{size}; {decimal(100 * whole['accuracy'], 0)} % are predicted correctly." if known else f"{size}."
    if fusion is not None:
        yield from (_say_reading(one, fusion) for one in fusion["modalities"])
        yield _say_conflict(fusion)
        # The verdict's sentences, but for the first, which has just been said at greater length.
        _, _, rest = fusion["verdict"].partition("Uses: ")
        uses, _, shows = rest.partition(" Shows: ")
        yield f"The model uses {uses[0].lower()}{uses[1:]}"
        yield f"{shows[0].upper()}{shows[1:]}" if shows else "Whether its attention shows what it uses was not tested."
    yield _say_errors(facts)


def in_short_of_batch(facts: BatchFacts) -> Iterator[str]:
    """How many samples, and how many of them are predicted correctly."""
    known = facts["correct"] + facts["incorrect"]
    yield f"{facts['samples']} samples" + (f", {facts['correct']} of {known} predicted correctly." if known else ".")
    if not math.isnan(facts["modality_alignment"]):
        yield f"Mean alignment of the two directions of attention: {decimal(facts['modality_alignment'])} (-1 to 1)."


def _say_reading(one: ModalityFacts, fusion: FusionFacts) -> str:
    name, found = name_modality(one["name"]), one["reading_accuracy"]
    if one["unreadable"]:
        return f"{name} cannot be read by itself: {one['unreadable']}."
    return (
        f"{name} can be read: by itself it is right in {decimal(100 * found.mean, 0)} % of the samples "
        f"({decimal(100 * found.low, 0)} to {decimal(100 * found.high, 0)} %; the largest class has "
        f"{decimal(100 * fusion['largest_class'], 0)} %)."
    )


def _say_conflict(fusion: FusionFacts) -> str:
    found = fusion["subsets"][0]["conflict"]
    if math.isnan(found.mean):
        return "Whether the modalities conflict cannot be told."
    return (
        f"Their readings conflict by {decimal(found.mean)} on average (0: they agree, 1: they differ; "
        f"{decimal(found.low)} to {decimal(found.high)})."
    )


def _say_errors(facts: DatasetFacts) -> str:
    """Whether any score finds errors better than confidence does."""
    found: dict[str, Comparison] = {}
    for layer in facts["layers"][:1]:
        found |= layer["outcomes"]
    found |= {} if facts["fusion"] is None else facts["fusion"]["outcomes"]
    told = {name: _told(one) for name, one in found.items() if not math.isnan(one.auroc)}
    if not told:
        return "What tells errors cannot be said: too few predictions of either outcome are known."
    confidence = told.pop("confidence", None)
    if confidence is None:
        return "The model's confidence is not known, so no score can be compared with it."
    of_each = ", ".join(f"{name} {_with_interval(one)}" for name, one in told.items())
    better = [name for name, one in told.items() if one[1] > confidence[2]]
    which = " and ".join(better).capitalize() if better else "No score"
    verdict = f"{which} tells errors clearly better than confidence"
    return f"{verdict}: AUROC of confidence {_with_interval(confidence)}" + (f"; of {of_each}." if of_each else ".")


def _with_interval(found: tuple[float, float, float]) -> str:
    value, low, high = map(decimal, found)
    return f"{value} ({low} to {high})"


def _told(one: Comparison) -> tuple[float, float, float]:
    """The AUROC for whichever side has the errors, with its interval."""
    return (one.auroc, one.low, one.high) if one.auroc >= 0.5 else (1 - one.auroc, 1 - one.high, 1 - one.low)
