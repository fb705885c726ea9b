"""The samples of a page: what is known of each, and its pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from lightning_xattn.core.attention import Direction, TokenAxis, fitting_axes
from lightning_xattn.core.names import shown
from lightning_xattn.core.wording import decimal, name_modality
from lightning_xattn.evaluation.fusion_samples import SampleModalities, describe_modalities
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.results import DatasetResult, ExplainedBatch
from lightning_xattn.functional import lift_map, prepare_rows
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.report.facts import BatchFacts
from lightning_xattn.report.page import Picture, SampleEntry
from lightning_xattn.report.wording import describe_sample

Item = TypeVar("Item")

LISTED = 2000
"""So many samples are listed, so that the page stays light."""

_WIDTH, _QUALITY = 800, 40
"""Pixels of a picture, and what WebP makes of it: 150 kB of signals, and their labels can still be read."""

Pictures = Mapping[str, Sequence[Path]]
"""By a sample's id, files with pictures of it."""

_OUTCOMES = {True: "correct", False: "incorrect", None: ""}


def entries_of_dataset(result: DatasetResult, pictures: Pictures) -> Iterator[SampleEntry]:
    """Those of its table, or without one those that were read of its fusion; at most ``LISTED``, with maps first."""
    fusion = result.fusion
    if result.table is not None:
        from lightning_xattn.evaluation.table import read_rows  # pyarrow, only where a table is read

        # Of the process that wrote it, the only one there is.
        said = {} if fusion is None else dict(_sentences(fusion, result.class_names))
        rows = read_rows(result.table, next(iter(result.summaries), None))
        for row in _listed(rows, lambda row: (0, row["sample_idx"]) in result.maps):
            yield _entry_of_row(row, result, said, pictures)
    elif fusion is not None:
        process = fusion.rows["process"]
        several = len(process.unique()) > 1
        identities = sorted(zip(process.tolist(), fusion.sample_numbers.tolist(), range(fusion.samples), strict=True))
        for place, (rank, number, i) in enumerate(_listed(identities, lambda one: one[:2] in result.maps)):
            outcome = {CORRECT: True, INCORRECT: False}.get(int(fusion.outcomes[i]))
            name = f"{number} of process {rank}" if several else str(number)
            more = [*_maps_of(result, (rank, number)), *_shrunk(pictures, name)]
            yield _entry(place, name, describe_modalities(fusion, i, result.class_names), outcome, {}, more)


def _listed(samples: Iterable[Item], has_maps: Callable[[Item], bool]) -> list[Item]:
    """As many as are listed, in their order; of more those that have maps before others."""
    whole = list(samples)
    chosen = sorted(range(len(whole)), key=lambda i: not has_maps(whole[i]))[:LISTED]
    return [whole[i] for i in sorted(chosen)]


def _sentences(fusion: FusionSummary, class_names: Sequence[str]) -> Iterator[tuple[int, SampleModalities]]:
    for i, number in enumerate(fusion.sample_numbers.tolist()):
        yield number, describe_modalities(fusion, i, class_names)


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
    training = "" if result.trained_on is None else result.trained_on.info(row.get("sample_id"), row.get("group"))
    more = [*_maps_of(result, (0, place)), *_shrunk(pictures, label)]
    return _entry(place, label, one, row["correct"], known, more, training)


def _entry(
    place: int,
    name: str,
    said: SampleModalities,
    correct: bool | None,
    numbers: Mapping[str, float],
    pictures: Sequence[Picture],
    training: str = "",
) -> SampleEntry:
    phi = list(said.contributions.values())
    # Contributions to a value rather than a class may add up to anything.
    is_share = said.predicted is not None and bool(phi) and min(phi) >= 0 and sum(phi) > 0
    share = phi[0] / sum(phi) if is_share else math.nan
    return SampleEntry(
        place,
        shown(name),
        said.predicted or "no class",
        said.true or "",
        _OUTCOMES[correct],
        {"confidence": said.confidence, "conflict": said.conflict, "share": share, **numbers},
        str(said) if said.probes or said.contributions else "",
        pictures=pictures,
        training=training,
    )


def entries_of_batch(results: ExplainedBatch, facts: BatchFacts, pictures: Pictures) -> Iterator[SampleEntry]:
    """Each sample with the maps of its first layer's directions."""
    attention = results.get("attention") or ()
    maps = {str(one.direction): lift_map(prepare_rows(one)) for pair in attention[:1] for one in pair.directions}
    for i, sample in enumerate(facts["per_sample_explanations"]):
        name = str(sample["sample_idx"]) if sample["sample_id"] is None else str(sample["sample_id"])
        modalities = sample.get("modalities")
        numbers = {"confidence": sample["confidence"], "alignment": sample["modality_agreement"]}
        numbers |= {} if modalities is None else {"conflict": modalities.conflict}
        yield SampleEntry(
            i,
            shown(name),
            sample["predicted_name"] or str(sample["predicted_class"]),
            sample["true_name"] or ("" if sample["true_class"] is None else str(sample["true_class"])),
            _OUTCOMES[sample["correct"]],
            {key: math.nan if value is None else value for key, value in numbers.items()},
            "",
            [describe_sample(sample)],
            [
                *(_map(direction, of_direction[i], results["axes"]) for direction, of_direction in maps.items()),
                *_shrunk(pictures, name),
            ],
        )


def _maps_of(result: DatasetResult, identity: tuple[int, int]) -> Iterator[Picture]:
    for direction, values in result.maps.get(identity, {}).items():
        yield _map(direction, values, result.axes)


def _map(name: str, lifts: Tensor, axes: Mapping[str, TokenAxis]) -> Picture:
    """A sample's map, its longer side horizontal."""
    from lightning_xattn.visualizations import map_picture  # matplotlib, only where a picture is wanted

    direction = Direction.parse(name)
    known = lifts[lifts.isfinite()]
    span = f"lift {decimal(float(known.min()))} to {decimal(float(known.max()))}" if len(known) else "undefined"
    queries, keys = lifts.shape
    down, across = _say_axis(direction.query, queries, axes), _say_axis(direction.key, keys, axes)
    if queries > keys:
        lifts, down, across = lifts.T, across, down
    title = (
        f"{name_modality(direction.query)} asks {name_modality(direction.key)}: {span} (1: uniform; yellow: most). "
        f"From top to bottom: {down[1]}, {down[0]} … {down[2]}"
    )
    return Picture(title, map_picture(lifts.float().numpy()), "png", (across[0], f"{across[1]} →", across[2]))


def _say_axis(modality: str, tokens: int, axes: Mapping[str, TokenAxis]) -> tuple[str, str, str]:
    """Where an axis begins, what it is, and where it ends."""
    axis = fitting_axes(axes, {modality: tokens}).get(modality)
    if axis is None:
        return "0", f"{name_modality(modality)} token", str(tokens - 1)
    return axis.place(0), axis.title, axis.place(tokens - 1)


def _shrunk(pictures: Pictures, name: str) -> Iterator[Picture]:
    """The pictures of a sample, as small as a page has them."""
    for path in pictures.get(name, ()):
        with Image.open(path) as picture:
            small = picture.convert("RGB")
            small.thumbnail((_WIDTH, 10 * _WIDTH))
            content = io.BytesIO()
            small.save(content, format="webp", quality=_QUALITY, method=6)
        yield Picture(path.stem, content.getvalue(), "webp")
