"""The samples of a page: what is known of each, and its pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_xattn.aggregation import CORRECT, INCORRECT
from lightning_xattn.fusion.samples import SampleModalities, of_sample
from lightning_xattn.fusion.summary import FusionSummary
from lightning_xattn.messages import name_modality
from lightning_xattn.report.facts import BatchFacts
from lightning_xattn.report.page import Picture, SampleEntry
from lightning_xattn.report.wording import describe_sample
from lightning_xattn.results import DatasetResult, ExplainedBatch

LISTED = 2000
"""So many samples are listed, so that the page stays light."""

_WIDTH, _QUALITY = 900, 60
"""Pixels of a picture, and what WebP makes of it: some 20 kB."""

Pictures = Mapping[str, Sequence[Path]]
"""By a sample's id, files with pictures of it."""


def entries_of_dataset(result: DatasetResult, pictures: Pictures) -> Iterator[SampleEntry]:
    """Those of its table, or without one those that were read of its fusion; at most ``LISTED``."""
    fusion = result.fusion
    if result.table is not None:
        from lightning_xattn.table import read_rows  # pyarrow, only where a table is read

        # Of the process that wrote it, the only one there is.
        said = {} if fusion is None else dict(_sentences(fusion, result.class_names))
        layer = next(iter(result.summaries), None)
        rows = (row for row in read_rows(result.table) if row.get("layer") == layer)
        for row, _ in zip(rows, range(LISTED), strict=False):
            yield _entry_of_row(row, result, said, pictures)
    elif fusion is not None:
        process = fusion.rows["process"]
        several = len(process.unique()) > 1
        identities = list(zip(process.tolist(), fusion.sample_numbers.tolist(), range(fusion.samples), strict=True))
        for place, (rank, number, i) in enumerate(sorted(identities)[:LISTED]):
            outcome = {CORRECT: True, INCORRECT: False}.get(int(fusion.outcomes[i]))
            name = f"{number} of process {rank}" if several else str(number)
            yield _entry(place, name, of_sample(fusion, i, result.class_names), outcome, {}, pictures)


def _sentences(fusion: FusionSummary, class_names: Sequence[str]) -> Iterator[tuple[int, SampleModalities]]:
    for i, number in enumerate(fusion.sample_numbers.tolist()):
        yield number, of_sample(fusion, i, class_names)


def _entry_of_row(
    row: Mapping[str, Any], result: DatasetResult, said: Mapping[int, SampleModalities], pictures: Pictures
) -> SampleEntry:
    place, names = row["sample_idx"], result.class_names

    def name(class_id: int | None) -> str | None:
        if class_id is None:
            return None
        return names[class_id] if class_id < len(names) else str(class_id)

    known = {key: math.nan if row.get(key) is None else row[key] for key in ("confidence", "alignment")}
    one = said.get(place)
    if one is None:
        one = SampleModalities(
            math.nan, {}, name(row["prediction"]), name(row["target"]), known["confidence"], {}, None
        )
    label = str(place) if row.get("sample_id") is None else row["sample_id"]
    return _entry(place, label, one, row["correct"], known, pictures)


def _entry(
    place: int,
    name: str,
    said: SampleModalities,
    correct: bool | None,
    numbers: Mapping[str, float],
    pictures: Pictures,
) -> SampleEntry:
    phi = list(said.contributions.values())
    share = phi[0] / sum(phi) if phi and min(phi) >= 0 and sum(phi) > 0 else math.nan
    return SampleEntry(
        place,
        name,
        said.predicted or "no class",
        said.true or "",
        {True: "correct", False: "incorrect", None: ""}[correct],
        {"confidence": said.confidence, "conflict": said.conflict, "share": share, **numbers},
        str(said) if said.says or said.contributions else "",
        pictures=[_shrunk(path) for path in pictures.get(name, ())],
    )


def entries_of_batch(results: ExplainedBatch, facts: BatchFacts, pictures: Pictures) -> Iterator[SampleEntry]:
    """Each sample with the maps of its first layer's directions."""
    from lightning_xattn.visualizations import map_picture  # matplotlib, only where a picture is wanted

    # Where a mask hides something there is NaN, which is drawn as nothing.
    weights, attention = results["attention_dict"], results.get("attention") or ()
    for i, sample in enumerate(facts["per_sample_explanations"]):
        name = str(sample["sample_idx"]) if sample["sample_id"] is None else str(sample["sample_id"])
        maps = [
            Picture(
                f"{name_modality(one.direction.query)} asks, from top to bottom; {name_modality(one.direction.key)} is "
                "attended to, from left to right; yellow: most",
                map_picture(weights[str(one.direction)][i].float().mean(0).numpy()),
                "png",
                is_map=True,
            )
            for pair in attention[:1]
            for one in pair.directions
        ]
        modalities = sample.get("modalities")
        numbers = {"confidence": sample["confidence"], "alignment": sample["modality_agreement"]}
        numbers |= {} if modalities is None else {"conflict": modalities.conflict}
        yield SampleEntry(
            i,
            name,
            sample["predicted_name"] or str(sample["predicted_class"]),
            sample["true_name"] or ("" if sample["true_class"] is None else str(sample["true_class"])),
            {True: "correct", False: "incorrect", None: ""}[sample["correct"]],
            {key: math.nan if value is None else value for key, value in numbers.items()},
            "",
            [describe_sample(sample)],
            [*maps, *(_shrunk(path) for path in pictures.get(name, ()))],
        )


def _shrunk(path: Path) -> Picture:
    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_WIDTH, 10 * _WIDTH))
        content = io.BytesIO()
        small.save(content, format="webp", quality=_QUALITY)
    return Picture(path.stem, content.getvalue(), "webp")
