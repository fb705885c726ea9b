"""HTML of results in a notebook: the tables and lists of the report."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_xattn.core.notebook import as_html
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.report.dataset import describe_dataset
from lightning_xattn.report.document import Block
from lightning_xattn.report.layers import describe_layer
from lightning_xattn.report.modalities import describe_fusion
from lightning_xattn.report.page import block_as_html, escape


@as_html.register
def _dataset_as_html(result: DatasetResult) -> str:
    *sections, _ = describe_dataset(result).sections  # the last one is on how to read the others
    return "".join(f"<h3>{escape(one.title)}</h3>{_blocks_as_html(one.blocks)}" for one in sections)


@as_html.register
def _layer_as_html(summary: LayerSummary) -> str:
    return _blocks_as_html(describe_layer(summary, _number_classes(summary.n_classes), None))


@as_html.register
def _fusion_as_html(summary: FusionSummary) -> str:
    return _blocks_as_html(describe_fusion(summary, _number_classes(summary.n_classes), None))


def _blocks_as_html(blocks: Iterable[Block]) -> str:
    return "".join(map(block_as_html, blocks))


def _number_classes(classes: int) -> list[str]:
    return [f"class_{class_id}" for class_id in range(classes)]
