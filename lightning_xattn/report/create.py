"""The report: what was found, as text, Markdown or JSON, into a file or just returned."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from lightning_xattn.errors import SettingError
from lightning_xattn.files import complete_or_absent
from lightning_xattn.fusion.summary import FusionSummary
from lightning_xattn.report.facts import collect_facts, collect_layer
from lightning_xattn.report.modalities import collect_fusion, describe_fusion
from lightning_xattn.report.rendering import as_markdown, as_text, blocks_as_text
from lightning_xattn.report.wording import batch_document, dataset_document, describe_layer
from lightning_xattn.results import Results
from lightning_xattn.summary import LayerSummary

FORMATS = {".txt": "text", ".md": "markdown", ".json": "json"}
"""The format of a file by its suffix."""


def create_explainability_report(
    results: Results,
    output_path: str | Path | None = None,
    format: str | None = None,  # noqa: A002  # the public name; this function formats no string
) -> str:
    """Report what a batch or a data set shows.

    A batch has its statistics, and for each sample the prediction, the outcome, the modality agreement, the top pairs
    and the guide's patterns and checklists. A data set has counts and means with 95 % intervals by class and outcome,
    and whether alignment or entropy tells correct from incorrect predictions.

    Parameters
    ----------
    results
        From ``explain_batch`` or ``explain_loader``.
    output_path
        Where to write the report too, in UTF-8: the file is complete or absent, and its folder is made.
    format
        "text", "markdown" or "json". None: as the suffix of ``output_path`` says (.txt, .md, .json); text without one.
        JSON has the keys of ``BatchFacts`` or ``DatasetFacts`` (``lightning_xattn.report.facts``), which one is said
        under ``kind``; undefined numbers are null.

    Returns
    -------
    str
        The report.

    Raises
    ------
    SettingError
        If the format is not one of these, or not told by the path's suffix, or the results are of another kind.
    """
    path = None if output_path is None else Path(output_path)
    chosen = _choose_format(path, format)
    facts = collect_facts(results)
    if chosen == "json":
        report = json.dumps(_as_json(facts), allow_nan=False, ensure_ascii=False, indent=2) + "\n"
    else:
        document = batch_document(facts) if facts["kind"] == "batch" else dataset_document(facts)
        report = as_text(document) if chosen == "text" else as_markdown(document)
    if path is not None:
        with complete_or_absent(path) as part:
            part.write_text(report, encoding="utf-8")
    return report


def summary_text(summary: LayerSummary, class_names: Sequence[str], group_by: str) -> str:
    """One layer's part of a data set's report as text, as after an epoch.

    Parameters
    ----------
    summary
        The epoch.
    class_names
        As many as the summary has classes.
    group_by
        Whether the classes are those of the "target" or of the "prediction".
    """
    return blocks_as_text(list(describe_layer(collect_layer("", summary, class_names), group_by)))


def fusion_text(summary: FusionSummary, class_names: Sequence[str], group_by: str) -> str:
    """The part of a data set's report on its modalities as text, as after an epoch; parameters as `summary_text`."""
    return blocks_as_text(list(describe_fusion(collect_fusion(summary, class_names), group_by)))


def _choose_format(path: Path | None, given: str | None) -> str:
    if given is None:
        if path is None:
            return "text"
        given = FORMATS.get(path.suffix.lower())
        if given is None:
            raise SettingError(
                f"The suffix of output_path tells the format, one of {', '.join(FORMATS)}; got '{path}'. Use one of "
                f"them, or give format={' or '.join(repr(name) for name in FORMATS.values())}."
            )
    if given not in FORMATS.values():
        raise SettingError(f"format must be one of {', '.join(FORMATS.values())}, or None; got {given!r}.")
    return given


def _as_json(value: Any) -> Any:
    """What JSON knows: dataclasses as dicts, tuples as lists, undefined numbers as None."""
    if is_dataclass(value):
        value = vars(value)
    elif hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
