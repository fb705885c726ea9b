"""The report: what was found, as text, Markdown, JSON or a page, into a file or just returned."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.files import complete_or_absent
from lightning_xattn.core.names import escaped_in_json, valid
from lightning_xattn.core.wording import name_modality
from lightning_xattn.evaluation.results import DatasetResult, ExplainedBatch, Results
from lightning_xattn.report.facts import BatchFacts, DatasetFacts, collect_facts
from lightning_xattn.report.key_points import key_points, key_points_of_batch
from lightning_xattn.report.listing import entries_of_batch, entries_of_dataset
from lightning_xattn.report.page import Picture, as_page
from lightning_xattn.report.rendering import Document, as_markdown, as_text, print_document
from lightning_xattn.report.wording import PER_SAMPLE, batch_document, dataset_document

FORMATS = {".txt": "text", ".md": "markdown", ".json": "json", ".html": "html"}
"""The format of a file by its suffix."""

NO_SAMPLES = (
    "Single samples are not known here. With a table they are listed: explain_loader(loader, table='folder'), or "
    "lightning-xattn explain."
)


def create_explainability_report(
    results: Results,
    output_path: str | Path | None = None,
    format: str | None = None,  # noqa: A002  # the public name; this function formats no string
    pictures: Mapping[str, Sequence[Path]] | None = None,
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
        "text", "markdown", "json" or "html". None: as the suffix of ``output_path`` says (.txt, .md, .json, .html);
        text without one. HTML is one page that needs nothing beside it: what is to be known first, figures, numbers,
        and the samples (of a data set those of its table) to be filtered and sorted.
        JSON has the keys of ``BatchFacts`` or ``DatasetFacts`` (``lightning_xattn.report.facts``), which one is said
        under ``kind``; undefined numbers are null.
    pictures
        By a sample's id, or its place where it has none, files with pictures of it, which a page shows.

    Returns
    -------
    str
        The report.

    Raises
    ------
    SettingError
        If the format is not one of these, or not told by the path's suffix, or the results are of another kind.

    Examples
    --------
    >>> results = ExplainabilityCapture(model).explain_batch(batch)  # of 5 samples
    >>> report = create_explainability_report(results, "explained/report.md")
    >>> report.splitlines()[0], report.count("### Sample")
    ('# Cross-modal attention report', 5)
    """
    path = None if output_path is None else Path(output_path)
    chosen = _choose_format(path, format)
    facts = collect_facts(results)
    if chosen == "json":
        report = escaped_in_json(json.dumps(_as_json(facts), allow_nan=False, ensure_ascii=False, indent=2)) + "\n"
    elif chosen == "html":
        report = _page(results, facts, pictures or {})
    else:
        report = as_text(_document(facts)) if chosen == "text" else as_markdown(_document(facts))
    if path is not None:
        with complete_or_absent(path) as part:
            part.write_text(report, encoding="utf-8")
    return report


def print_report(results: Results) -> None:
    """Print the report as text; in a terminal within its width, with titles and labels in bold."""
    print_document(_document(collect_facts(results)))


def _document(facts: BatchFacts | DatasetFacts) -> Document:
    return batch_document(facts) if facts["kind"] == "batch" else dataset_document(facts)


def _page(results: Results, facts: BatchFacts | DatasetFacts, pictures: Mapping[str, Sequence[Path]]) -> str:
    # Imported here as they take matplotlib.
    from lightning_xattn.report.figures import dataset_figures
    from lightning_xattn.visualizations import svg_picture

    if facts["kind"] == "batch":
        whole = batch_document(facts)
        # The samples stand in a list of their own.
        document = replace(whole, sections=[one for one in whole.sections if one.title != PER_SAMPLE])
        samples = list(entries_of_batch(cast(ExplainedBatch, results), facts, pictures))
        return as_page(document, list(key_points_of_batch(facts)), [], samples, "No samples.")
    assert isinstance(results, DatasetResult)
    figures = [
        Picture(" ".join(figure.get_suptitle().split()), svg_picture(figure), "svg+xml", is_captioned=False)
        for _, figure in dataset_figures(results)
    ]
    samples = list(entries_of_dataset(results, pictures))
    known = max([0, *(one.samples for one in [results.fusion, *results.summaries.values()] if one is not None)])
    missing = "" if samples else NO_SAMPLES
    if 0 < len(samples) < known:
        missing = f"{len(samples)} of {known} samples, those with maps among them."
        missing += "" if results.table is None else " The others are in the table."
    first = "" if results.fusion is None else name_modality(results.fusion.modalities[0])
    return as_page(dataset_document(facts), list(key_points(facts)), figures, samples, missing, first)


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
        return {valid(str(key)): _as_json(item) for key, item in value.items()}
    if isinstance(value, str):
        return valid(value)  # as the sample table has it
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
