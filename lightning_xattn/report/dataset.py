"""The report of a data set: key points, its modalities, and the attention of each layer."""

from __future__ import annotations

from lightning_xattn.evaluation.results import REST, DatasetResult
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from lightning_xattn.report.document import Document, Paragraph, Section
from lightning_xattn.report.key_points import key_points
from lightning_xattn.report.layers import HOW_TO_READ_ATTENTION, HOW_TO_READ_LAYER, describe_layer
from lightning_xattn.report.modalities import HOW_TO_READ_MODALITIES, describe_fusion

LISTED_CLASSES = 100
"""Of more classes, so many of the largest have rows of their own, and all others one."""


def describe_dataset(result: DatasetResult) -> Document:
    """Sections with the key points, the modalities, each layer's attention, and how to read them."""
    names, classes_by, fusion = result.class_names, result.classes_by, result.fusion
    sections, how_to_read = [Section("Key points", [key_points(result)])], list[str]()
    largest = result.largest_classes(LISTED_CLASSES) if len(names) > LISTED_CLASSES + 1 else None
    if fusion is not None:
        sections.append(Section("Modalities", [*describe_fusion(fusion, names, classes_by, largest)]))
        how_to_read += HOW_TO_READ_MODALITIES
    for layer, summary in result.summaries.items():
        title = f"Attention (layer {layer})" if len(result.summaries) > 1 else "Attention"
        blocks = describe_layer(summary, names, classes_by, result.other_lengths.get(layer, 0), largest)
        sections.append(Section(title, [*blocks]))
    if result.summaries:
        how_to_read += [HOW_TO_READ_ATTENTION, *HOW_TO_READ_LAYER]
    if largest is not None:
        how_to_read.append(
            f"Of {len(names)} classes the {LISTED_CLASSES} with the most samples have rows of their own; {REST}: the "
            "others."
        )
    nouns = [summary.group_noun for summary in result.summaries.values()]
    nouns += [] if fusion is None else [fusion.group_noun]
    how_to_read += map(_describe_independence, dict.fromkeys(nouns))
    sections.append(Section("How to read this", [*map(Paragraph, how_to_read)]))
    return Document("Cross-modal attention report", sections)


def _describe_independence(group_noun: str | None) -> str:
    if group_noun is None:
        return (
            "Samples are taken as independent of each other, since no groups are known. With several samples of one "
            "patient or one recording every interval is too narrow: name their groups, groups=<key or callable>."
        )
    return (
        f"Intervals are by {group_noun}: samples of one {group_noun.removesuffix('s')} may resemble each other, so "
        f"many samples of few {group_noun} are weak evidence. Fewer than {MINIMUM_GROUP} {group_noun} have no interval."
    )
