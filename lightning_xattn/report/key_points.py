"""What a reader should know of a data set first, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_xattn.core.wording import decimal, describe_size, name_modality, percent, say_interval
from lightning_xattn.evaluation.layer_summary import Comparison
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from lightning_xattn.report.facts import BatchFacts, DatasetFacts, Subset, TrainingFacts
from lightning_xattn.report.modalities import FusionFacts, ModalityFacts

CONFIDENCE = "confidence"


def key_points(facts: DatasetFacts) -> Iterator[str]:
    """Can each modality be read, do they conflict, which is followed, what tells errors, is attention faithful?"""
    fusion, layers = facts["fusion"], facts["layers"]
    if layers:
        whole = layers[0]["groups"][0]
        known = whole["correct"] + whole["incorrect"]
        size = describe_size(layers[0]["samples"], whole["groups"], layers[0]["group_noun"])
        right = f"; {whole['correct']} of {known} are predicted correctly{_say_accuracy(whole)}" if known else ""
        yield f"{size}{right}."
    elif fusion is not None:
        yield f"{describe_size(fusion['samples'], fusion['groups'], fusion['group_noun'])}."
    if facts["table"]:
        yield describe_training(facts["training"])
    if fusion is not None:
        yield from (_say_probe(one, fusion) for one in fusion["modalities"])
        yield _say_conflict(fusion)
        # The verdict's sentences on what is used and shown; what is known has just been said at greater length.
        _, *others = fusion["verdict"]
        for title, sentence in zip(("What the model uses", "What its attention shows"), others, strict=False):
            yield f"{title}: {sentence.partition(': ')[2]}"
        if not fusion["attention"] and fusion["earlier_test"] is None:
            yield "What its attention shows was not tested." if layers else "It has no cross-attention."
    yield _say_errors(facts)


def key_points_of_batch(facts: BatchFacts) -> Iterator[str]:
    """How many samples, and how many of them are predicted correctly."""
    known = facts["correct"] + facts["incorrect"]
    yield f"{facts['samples']} samples" + (f", {facts['correct']} of {known} predicted correctly." if known else ".")
    if not math.isnan(facts["modality_alignment"]):
        yield f"Mean alignment of the two directions of attention: {decimal(facts['modality_alignment'])} (-1 to 1)."


def describe_training(facts: TrainingFacts | None) -> str:
    """Say how many of the samples the model knows from its training."""
    if facts is None:
        return "Which of these samples the model was trained on is not known."
    seen = f"The model was trained on {facts['seen'] or 'none'} of these {facts['samples']} samples"
    if facts["related"] is None:
        also = "; whether it was trained on others of their groups is not known"
    elif facts["related"]:
        also = f", and on others of the groups of {facts['related']} more"
    else:
        also = "" if facts["seen"] else ", nor on others of their groups"
    warning = (
        " Such samples do not show how well the model does on new ones." if facts["seen"] or facts["related"] else ""
    )
    return f"{seen}{also}.{warning}"


def _say_accuracy(whole: Subset) -> str:
    if math.isnan(whole["accuracy_low"]):
        return f" ({percent(whole['accuracy'])})"
    interval = say_interval(whole["accuracy_low"], whole["accuracy_high"], 1, as_percent=True)
    return f" ({percent(whole['accuracy'])}, 95 % CI {interval})"


def _say_probe(one: ModalityFacts, fusion: FusionFacts) -> str:
    name, found = name_modality(one["name"]), one["probe_accuracy"]
    if one["unreadable"]:
        return f"{name} cannot be read by itself: {one['unreadable']}."
    return (
        f"{name} can be read: by itself it is right in {percent(found.mean)} of the samples (95 % CI "
        f"{say_interval(found.low, found.high, 1, as_percent=True)}; the largest class has "
        f"{percent(fusion['largest_class'])})."
    )


def _say_conflict(fusion: FusionFacts) -> str:
    found = fusion["subsets"][0]["conflict"]
    if math.isnan(found.mean):
        return "Whether the modalities conflict cannot be told."
    return (
        f"Their probes conflict by {decimal(found.mean)} on average (0: they agree, 1: they differ; "
        f"95 % CI {say_interval(found.low, found.high, 2)})."
    )


def _say_errors(facts: DatasetFacts) -> str:
    """Whether confidence tells errors, and whether any score tells them better."""
    # Of all samples, rather than of those alone that were read.
    found = {} if facts["fusion"] is None else dict(facts["fusion"]["outcomes"])
    for layer in facts["layers"][:1]:
        found |= layer["outcomes"]
    if CONFIDENCE not in found:
        return "Whether a score tells errors cannot be said: confidence, the baseline, is not known."
    confidence = found.pop(CONFIDENCE)
    if math.isnan(confidence.low):
        return (
            f"Whether a score tells errors cannot be said of {confidence.correct} correct and {confidence.incorrect} "
            f"incorrect predictions: nothing is claimed of fewer than {MINIMUM_GROUP} groups, or samples, of either."
        )
    told = {name: one for name, one in found.items() if not math.isnan(one.low)}
    better = [name for name, one in told.items() if _tells(one) and _turned(one)[1] > confidence.high]
    which = " and ".join(better).capitalize() if better else "No score"
    verb = "tell" if len(better) > 1 else "tells"
    # Confidence is expected to be higher in correct predictions; another score may say either.
    said = [_say_score(CONFIDENCE, confidence, (confidence.auroc, confidence.low, confidence.high))]
    said += [_say_score(name, one, _turned(one)) for name, one in told.items()]
    return f"{which} {verb} errors clearly better than confidence. AUROC: {'; '.join(said)}."


def _say_score(name: str, one: Comparison, auroc: tuple[float, float, float]) -> str:
    which = "higher" if one.auroc >= 0.5 else "lower"
    what = f"{which} in correct predictions" if _tells(one) else "no difference shown"
    value, low, high = auroc
    return f"{name} {decimal(value)} (95 % CI {say_interval(low, high, 2)}; {what})"


def _tells(one: Comparison) -> bool:
    return one.low > 0.5 or one.high < 0.5


def _turned(one: Comparison) -> tuple[float, float, float]:
    """The AUROC for whichever side is higher, with its interval: unlike confidence a score may say either."""
    return (one.auroc, one.low, one.high) if one.auroc >= 0.5 else (1 - one.auroc, 1 - one.high, 1 - one.low)
