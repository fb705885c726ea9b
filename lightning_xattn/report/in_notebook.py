"""What a notebook shows of a result: the parts of the report's page, without its figures and samples."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_xattn.core.notebook import as_html
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.report.facts import collect_facts, collect_layer
from lightning_xattn.report.key_points import key_points
from lightning_xattn.report.modalities import collect_fusion, describe_fusion
from lightning_xattn.report.page import block_as_html, escape
from lightning_xattn.report.rendering import Block
from lightning_xattn.report.wording import dataset_document, describe_layer


@as_html.register
def _of_dataset(result: DatasetResult) -> str:
    facts = collect_facts(result)
    assert facts["kind"] == "dataset"
    *sections, _ = dataset_document(facts).sections  # the last one says how to read the others
    parts = [f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in key_points(facts))}</ul>"]
    for section in sections:
        parts += [f"<h3>{escape(f'{section.title} {section.about}'.strip())}</h3>", _blocks_as_html(section.blocks)]
    return "".join(parts)


@as_html.register
def _of_one_layer(summary: LayerSummary) -> str:
    return _blocks_as_html(describe_layer(collect_layer("", summary, _numbered(summary.n_classes)), None))


@as_html.register
def _of_fusion(summary: FusionSummary) -> str:
    return _blocks_as_html(describe_fusion(collect_fusion(summary, _numbered(summary.n_classes)), None))


def _blocks_as_html(blocks: Iterable[Block]) -> str:
    return "".join(map(block_as_html, blocks))


def _numbered(classes: int) -> list[str]:
    return [f"class_{class_id}" for class_id in range(classes)]
