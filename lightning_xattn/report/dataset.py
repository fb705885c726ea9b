"""The report of a data set: key points, its modalities, and the attention of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lightning_xattn.evaluation.results import REST, DatasetResult
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from lightning_xattn.report.document import Block, Document, Items, Paragraph, Picture, Section, Table
from lightning_xattn.report.estimates import GROUPED_BY
from lightning_xattn.report.headline import CAPTIONS, describe_headline
from lightning_xattn.report.key_points import key_points
from lightning_xattn.report.layers import describe_layer
from lightning_xattn.report.modalities import describe_classes, describe_fusion, tabulate_cells

TITLE = "Cross-modal attention report"

_FIRST = ("Samples", "Training")
"""The key points that stand at the top of a page."""

LISTED_CLASSES = 100
"""Of more classes, so many of the largest have rows of their own, and all others one."""


def describe_dataset(result: DatasetResult) -> Document:
    """Sections with the key points, the modalities, each layer's attention, and how to read them."""
    sections = [Section("Key points", [key_points(result)])]
    if result.fusion is not None:
        blocks = [*describe_fusion(result.fusion, result.class_names), *_describe_classes(result)]
        sections.append(Section("Modalities", blocks))
    sections += (Section(title, blocks) for title, blocks in _describe_layers(result))
    return Document(TITLE, [*sections, _explain(result)])


def describe_page(result: DatasetResult, figures: Mapping[str, Picture], samples: Section) -> Document:
    """The same for a page: the headline first; then the attention, classes and all else, each with its figures.

    ``figures``: by their names, those of ``dataset_figures`` without the one beside the headline. ``samples``: the
    section that lists them.
    """
    figures, fusion = dict(figures), result.fusion
    whole = key_points(result)
    found = describe_headline(result)
    opening: list[Block] = [Paragraph(found.sentence, "lead")]
    opening += [Paragraph(text, "warning") for text in found.warnings]
    opening.append(Items([(name, text, [CAPTIONS[name]]) for name, text in found.numbers]))
    if fusion is not None:
        opening += [one for one in tabulate_cells(fusion) if isinstance(one, Table)][:1]
    opening.append(Items([item for item in whole.items if item[0] in _FIRST]))

    def take(*begin: str) -> list[Picture]:
        return [figures.pop(name) for name in list(figures) if name.startswith(begin)]

    attention: list[Block] = [*take("attention", "map")]
    layers = [*_describe_layers(result)]
    for title, blocks in layers:
        attention += [*([Items((), title)] if len(layers) > 1 else []), *blocks]
    classes = [*take("contribution", "class_comparison"), *([] if fusion is None else _describe_classes(result))]
    rest = [] if fusion is None else [*describe_fusion(fusion, result.class_names)]
    sentences = Items([item for item in whole.items if item[0] not in _FIRST], "In sentences")
    rest = [one for one in rest if one not in opening]
    sections = [
        Section("Attention", attention, "alignment and entropy by class and outcome, the mean maps"),
        Section("Classes", classes, f"support and shares by {GROUPED_BY[result.classes_by]} and outcome"),
        samples,
        Section(
            "All other figures and numbers",
            [sentences, *rest, *figures.values()],
            "key points, probes, contributions, faithfulness, heads",
        ),
        _explain(result),
    ]
    return Document(TITLE, [Section("", opening), *(one for one in sections if one.blocks or one.has_samples)])


def _describe_classes(result: DatasetResult) -> Iterator[Block]:
    if result.fusion is not None:
        yield from describe_classes(result.fusion, result.class_names, result.classes_by, _find_largest(result))


def _describe_layers(result: DatasetResult) -> Iterator[tuple[str, list[Block]]]:
    for layer, summary in result.summaries.items():
        title = f"Attention (layer {layer})" if len(result.summaries) > 1 else "Attention"
        others = result.other_lengths.get(layer, 0)
        yield title, [*describe_layer(summary, result.class_names, result.classes_by, others, _find_largest(result))]


def _find_largest(result: DatasetResult) -> Sequence[int] | None:
    """The classes that have rows of their own; None: all."""
    many = len(result.class_names) > LISTED_CLASSES + 1
    return result.largest_classes(LISTED_CLASSES) if many else None


def _explain(result: DatasetResult) -> Section:
    """What holds for all tables."""
    how_to_read = []
    if _find_largest(result) is not None:
        how_to_read.append(
            f"Of {len(result.class_names)} classes the {LISTED_CLASSES} with the most samples have rows of their own; "
            f"{REST}: the others."
        )
    nouns = [summary.group_noun for summary in result.summaries.values()]
    nouns += [] if result.fusion is None else [result.fusion.group_noun]
    how_to_read += map(_describe_independence, dict.fromkeys(nouns))
    return Section("How to read this", [*map(Paragraph, how_to_read)], "what the intervals are by")


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
