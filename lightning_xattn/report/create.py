"""The report of a batch or a data set as Markdown, JSON or a page, into a file or just returned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.files import complete_or_absent
from lightning_xattn.core.names import escaped_in_json
from lightning_xattn.evaluation.results import DatasetResult, ExplainedBatch, Results
from lightning_xattn.report.batch import PER_SAMPLE, describe_batch
from lightning_xattn.report.dataset import describe_dataset, describe_page
from lightning_xattn.report.document import Paragraph, Picture, Section, as_markdown, print_markdown
from lightning_xattn.report.facts import collect_facts
from lightning_xattn.report.page import as_page, describe_order
from lightning_xattn.report.samples import find_limits, list_batch, list_dataset, maps_of_batch, maps_of_dataset

FORMATS = {".md": "markdown", ".json": "json", ".html": "html"}
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
    """The report of a batch or a data set, also written to a file.

    A batch has its statistics, and for each sample the prediction, the outcome, the modality agreement, the top pairs
    and the guide's patterns and checklists. A data set has its key points, the probes, contributions and conflict of
    its modalities, and counts and means with 95 % intervals by class and outcome.

    Parameters
    ----------
    results
        From ``explain_batch`` or ``explain_loader``.
    output_path
        A file for the report, in UTF-8; it is complete or absent, and its folder is made.
    format
        "markdown" (the report as text), "json" or "html". None: by the suffix of ``output_path`` (.md, .json, .html);
        Markdown without a path. HTML is one page that needs nothing beside it: key points, figures, numbers, and
        the samples (of a data set those of its table) to filter and sort. JSON has the keys that ``collect_facts``
        (``lightning_xattn.report.facts``) describes; undefined numbers are null.
    pictures
        Files with pictures of a sample, which a page shows, by the sample's id, or its place where it has none.

    Returns
    -------
    str
        The report.

    Raises
    ------
    SettingError
        If the format is none of these, or does not follow from the path's suffix, or the results are of another kind.

    Examples
    --------
    >>> results = ExplainabilityCapture(model).explain_batch(batch)  # of 5 samples
    >>> report = create_explainability_report(results, "explained/report.md")
    >>> report.splitlines()[0], report.count("### Sample")
    ('# Cross-modal attention report', 5)
    """
    path = None if output_path is None else Path(output_path)
    chosen = _choose_format(path, format)
    _require_results(results)
    if chosen == "json":
        text = json.dumps(collect_facts(results), allow_nan=False, ensure_ascii=False, indent=2)
        report = escaped_in_json(text) + "\n"
    elif chosen == "markdown":
        report = as_markdown(
            describe_dataset(results) if isinstance(results, DatasetResult) else describe_batch(results)
        )
    elif isinstance(results, DatasetResult):
        report = _page_of_dataset(results, pictures or {})
    else:
        report = _page_of_batch(results, pictures or {})
    if path is not None:
        with complete_or_absent(path) as part:
            part.write_text(report, encoding="utf-8")
    return report


def print_report(results: Results) -> None:
    """Print the report: laid out in a terminal or a notebook, as Markdown elsewhere."""
    print_markdown(create_explainability_report(results))


def _page_of_batch(results: ExplainedBatch | dict[str, Any], pictures: Mapping[str, Sequence[Path]]) -> str:
    document = describe_batch(results)
    samples = list(list_batch(results, pictures))
    about = describe_order(samples)
    # The samples stand in a list of their own.
    sections = [
        Section(PER_SAMPLE, [], about, has_samples=True) if one.title == PER_SAMPLE else one
        for one in document.sections
    ]
    return as_page(replace(document, sections=sections), samples, scale=find_limits(maps_of_batch(results).values()))


def _page_of_dataset(result: DatasetResult, pictures: Mapping[str, Sequence[Path]]) -> str:
    # Imported here as they take matplotlib.
    from lightning_xattn.report.figures import dataset_figures
    from lightning_xattn.visualizations import svg_picture

    figures = {
        name: Picture(" ".join(figure.get_suptitle().split()), svg_picture(figure), "svg+xml", is_captioned=False)
        for name, figure in dataset_figures(result)
    }
    card = figures.pop("card" if "card" in figures else "attention", None)
    samples = list(list_dataset(result, pictures))
    known = max([0, *(one.samples for one in [result.fusion, *result.summaries.values()] if one is not None)])
    notes = [] if samples else [NO_SAMPLES]
    if 0 < len(samples) < known:
        note = f"{len(samples)} of {known} samples, those with maps among them."
        notes.append(note if result.table is None else f"{note} The others are in the table.")
    listed = Section("Samples", [*map(Paragraph, notes)], describe_order(samples), has_samples=True)
    document = describe_page(result, figures, listed)
    return as_page(document, samples, card=card, scale=find_limits(maps_of_dataset(result)))


def _choose_format(path: Path | None, given: str | None) -> str:
    if given is None and path is not None:
        given = FORMATS.get(path.suffix.lower())
        if given is None:
            raise SettingError(
                f"The format follows from the suffix of output_path, one of {', '.join(FORMATS)}; got '{path}'. Use "
                f"one of them, or give format={' or '.join(map(repr, FORMATS.values()))}."
            )
    if given not in (None, *FORMATS.values()):
        raise SettingError(f"format must be one of {', '.join(FORMATS.values())}, or None; got {given!r}.")
    return given or "markdown"


def _require_results(results: Results) -> None:
    if isinstance(results, DatasetResult):
        return
    needed = ("attention_stats", "modality_alignment", "per_sample_explanations", "class_names", "axes")
    got = list(results) if isinstance(results, Mapping) else type(results).__name__
    missing = [key for key in needed if key not in got]
    if missing:
        raise SettingError(
            "A report needs the results of explain_batch or explain_loader, or a dict with the keys of the former; "
            f"got {got}, without {', '.join(missing)}."
        )
