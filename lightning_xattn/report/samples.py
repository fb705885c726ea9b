"""The samples of a page: classes, numbers and pictures of each."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from lightning_xattn.core.attention import Direction, TokenAxis, fitting_axes
from lightning_xattn.core.names import shown
from lightning_xattn.core.wording import decimal, name_modality
from lightning_xattn.evaluation.fusion_samples import SampleModalities, describe_modalities
from lightning_xattn.evaluation.maps import kept_lift_map
from lightning_xattn.evaluation.results import DatasetResult, ExplainedBatch
from lightning_xattn.evaluation.support import name_cells
from lightning_xattn.functional import prepare_rows
from lightning_xattn.functional.bins import bin_sizes
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.report.batch import describe_sample
from lightning_xattn.report.document import Paragraph, Picture
from lightning_xattn.report.page import SampleEntry

Item = TypeVar("Item")

LISTED = 2000
"""How many samples are listed at most, so that the page stays light."""

_BRIGHTEST = 0.995
"""The colours of maps end at this quantile of all lifts: a single cell must not darken all maps."""

_WIDTH, _QUALITY = 800, 40
"""Pixels of a picture, and its WebP quality: 150 kB of signals, with legible labels."""

Pictures = Mapping[str, Sequence[Path]]
"""Files with pictures of a sample, by its id."""

_OUTCOMES = {True: "correct", False: "incorrect", None: ""}


Limits = tuple[float, float]


def find_limits(maps: Iterable[Tensor]) -> Limits | None:
    """The lifts of the darkest and the brightest colour, the same in all maps of a page; None without a map."""
    lifts = torch.cat([torch.zeros(0), *(one.float().flatten() for one in maps)])
    lifts = lifts[lifts.isfinite()].sort().values
    return (float(lifts[0]), float(lifts[round(_BRIGHTEST * (len(lifts) - 1))])) if len(lifts) else None


def maps_of_dataset(result: DatasetResult) -> Iterator[Tensor]:
    """The lift maps of all samples."""
    for of_one in result.maps.values():
        yield from of_one.values()


def maps_of_batch(results: ExplainedBatch | dict[str, Any]) -> dict[Direction, Tensor]:
    """By direction of the first layer, the lift maps ``(samples, queries, keys)``."""
    attention = results.get("attention") or ()
    return {one.direction: kept_lift_map(prepare_rows(one)) for pair in attention[:1] for one in pair.directions}


def list_dataset(result: DatasetResult, pictures: Pictures) -> Iterator[SampleEntry]:
    """The samples of its table, or without one those of its fusion; at most ``LISTED``, preferring those with maps."""
    fusion, identities = result.fusion, dict[tuple[int, int], int]()
    if fusion is not None:
        pairs = zip(fusion.rows["process"].tolist(), fusion.sample_numbers.tolist(), strict=True)
        identities = {identity: i for i, identity in enumerate(pairs)}
    rows: Iterable[Mapping[str, Any]] = ({"process": rank, "sample_idx": number} for rank, number in sorted(identities))
    if result.table is not None:
        from lightning_xattn.evaluation.table import read_rows  # pyarrow, only where a table is read

        rows = read_rows(result.table, next(iter(result.summaries), None))
    limits = find_limits(maps_of_dataset(result)) or (0.0, 1.0)
    several = len({rank for rank, _ in identities}) > 1
    # A table is of one process, the only one there is.
    listed = _choose_listed(rows, lambda row: (row.get("process", 0), row["sample_idx"]) in result.maps)
    for place, row in enumerate(listed):
        identity = row.get("process", 0), row["sample_idx"]
        i = identities.get(identity)
        if fusion is not None and i is not None:
            known = describe_modalities(fusion, i, result.class_names)
            correct = {CORRECT: True, INCORRECT: False}.get(int(fusion.outcomes[i]))
        else:
            known, correct = _read_row(row, result.class_names), row["correct"]
        name = str(row["sample_idx"]) if row.get("sample_id") is None else row["sample_id"]
        if row.get("sample_id") is None and fusion is not None and i is not None:
            name = fusion.name_sample(i)
        name += f" of process {identity[0]}" if several else ""
        alignment = math.nan if row.get("alignment") is None else row["alignment"]
        yield SampleEntry(
            place,
            shown(name),
            known.predicted or "no class",
            known.true or "",
            _OUTCOMES[correct],
            {"support": known.support, "confidence": known.confidence, "alignment": alignment},
            _name_cell(known),
            [Paragraph(str(known))] if known.probes or known.contributions else [],
            [*_draw_maps(result, identity, limits), *_shrink(pictures, name)],
        )


def _choose_listed(samples: Iterable[Item], has_maps: Callable[[Item], bool]) -> list[Item]:
    """At most ``LISTED`` samples, in their order; of more those with maps before others."""
    whole = list(samples)
    chosen = sorted(range(len(whole)), key=lambda i: not has_maps(whole[i]))[:LISTED]
    return [whole[i] for i in sorted(chosen)]


def _read_row(row: Mapping[str, Any], names: Sequence[str]) -> SampleModalities:
    """The classes of a sample that the fusion lacks."""
    predicted, true = (
        None if one is None else names[one] if one < len(names) else str(one)
        for one in (row["prediction"], row["target"])
    )
    confidence = math.nan if row.get("confidence") is None else row["confidence"]
    return SampleModalities(math.nan, {}, None, None, predicted, true, confidence, {}, None)


def list_batch(results: ExplainedBatch | dict[str, Any], pictures: Pictures) -> Iterator[SampleEntry]:
    """Each sample with the maps of its first layer's directions."""
    attention, maps = results.get("attention") or (), maps_of_batch(results)
    limits = find_limits(maps.values()) or (0.0, 1.0)
    tokens = {one.direction: (one.shape[2], one.tokens) for pair in attention[:1] for one in pair.directions}
    for i, sample in enumerate(results["per_sample_explanations"]):
        name = str(sample["sample_idx"]) if sample["sample_id"] is None else str(sample["sample_id"])
        modalities = sample.get("modalities")
        numbers = {"confidence": sample["confidence"], "alignment": sample["modality_agreement"]}
        numbers |= {} if modalities is None else {"support": modalities.support}
        drawn = [_map(one, lifts[i], results["axes"], tokens[one], limits) for one, lifts in maps.items()]
        yield SampleEntry(
            i,
            shown(name),
            sample["predicted_name"] or str(sample["predicted_class"]),
            sample["true_name"] or ("" if sample["true_class"] is None else str(sample["true_class"])),
            _OUTCOMES[sample["correct"]],
            {key: math.nan if value is None else float(value) for key, value in numbers.items()},
            "" if modalities is None else _name_cell(modalities),
            [replace(describe_sample(sample), title="")],  # its line has the name
            [*drawn, *_shrink(pictures, name)],
        )


def _name_cell(known: SampleModalities) -> str:
    """The name of a sample's cell of support."""
    if known.supporters is None:
        return ""
    names, count = [name for _, name in name_cells(tuple(known.probes))], len(known.supporters)
    if not count:
        return names[-2 if len({name for name, _ in known.probes.values()}) == 1 else -1]
    if count == 1 and len(known.probes) == 2:
        return f"only {name_modality(known.supporters[0])}"
    return names[len(known.probes) - count]


def _draw_maps(result: DatasetResult, identity: tuple[int, int], limits: Limits) -> Iterator[Picture]:
    for name, values in result.maps.get(identity, {}).items():
        direction = Direction.parse(name)
        of_layer = next((one.tokens for one in result.summaries.values()), {})
        tokens = of_layer.get(direction, values.shape)
        tokens = tokens if bin_sizes(*tokens) != (1, 1) else values.shape
        yield _map(direction, values, result.axes, tokens, limits)


def _map(
    direction: Direction, lifts: Tensor, axes: Mapping[str, TokenAxis], tokens: Sequence[int], limits: Limits
) -> Picture:
    """A sample's map of so many queries and keys, its longer side horizontal."""
    from lightning_xattn.visualizations import map_picture  # matplotlib, only where a picture is wanted

    known = lifts[lifts.isfinite()]
    span = f"lift {decimal(float(known.min()))} to {decimal(float(known.max()))}" if len(known) else "undefined"
    queries, keys = tokens
    down, across = _describe_axis(direction.query, queries, axes), _describe_axis(direction.key, keys, axes)
    if queries > keys:
        lifts, down, across = lifts.T, across, down
    title = (
        f"{name_modality(direction.query)} → {name_modality(direction.key)}, {span} (1: uniform). "
        f"From top to bottom: {down[1]}, {down[0]} … {down[2]}"
    )
    if lifts.numel() < queries * keys:
        by_query, by_key = bin_sizes(queries, keys)
        title += f". Each cell is the mean of {by_query} x {by_key} tokens"
    return Picture(title, map_picture(lifts.float().numpy(), limits), "png", (across[0], f"{across[1]} →", across[2]))


def _describe_axis(modality: str, tokens: int, axes: Mapping[str, TokenAxis]) -> tuple[str, str, str]:
    """Where an axis begins, its title, and where it ends."""
    axis = fitting_axes(axes, {modality: tokens}).get(modality)
    if axis is None:
        return "0", f"{name_modality(modality)} token", str(tokens - 1)
    return axis.place(0), axis.title, axis.place(tokens - 1)


def _shrink(pictures: Pictures, name: str) -> Iterator[Picture]:
    """The pictures of a sample, as small as a page has them."""
    for path in pictures.get(name, ()):
        with Image.open(path) as picture:
            small = picture.convert("RGB")
            small.thumbnail((_WIDTH, 10 * _WIDTH))
            content = io.BytesIO()
            small.save(content, format="webp", quality=_QUALITY, method=6)
        yield Picture(path.stem, content.getvalue(), "webp")
