"""The folder of an explained data set: rows so far, the sums behind them, and from where to go on."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.bottom_k import Columns
from lightning_xattn.attribution.kept_samples import FusionPart
from lightning_xattn.core.attention import Direction
from lightning_xattn.core.errors import DataError, SettingError
from lightning_xattn.core.files import complete_or_absent
from lightning_xattn.core.names import id_text
from lightning_xattn.evaluation.accumulators import KeyedSums, LayerAccumulator
from lightning_xattn.evaluation.results import BatchResult
from lightning_xattn.evaluation.statistics import Column
from lightning_xattn.evaluation.table import LateColumns, SampleTable, add_columns, count_rows
from lightning_xattn.functional import ROW_STATISTICS, pooled_tokens, prepare_rows

FILE = "_progress.pt"
"""Readers of Parquet folders pass over names that begin with an underscore."""

FORMAT = "10"
"""Raised when the file, or what a number in it means, changes."""

ALIKE = 1e-4
"""Numbers of one batch that are computed twice agree within this."""

Sums = Mapping[str, LayerAccumulator]
"""By layer."""


class ExplainedFolder:
    """Parquet files with the rows of the batches so far, and a file with their sums.

    The rows of some batches become visible together, as files that are complete or absent, and then the sums that
    contain these batches replace the ones before. A run that was killed in between leaves files that the sums do not
    name: they are removed when it goes on, so every row is there once.

    Parameters
    ----------
    folder
        Is made when it does not exist.
    identity
        What must be the same for a run to go on: in words, what it is and its value.

    Attributes
    ----------
    batches, samples
        How many the sums contain.
    seen
        How many samples there were, with those that were left out.
    other_lengths
        How many were left out, see ``Evaluation``.
    finished
        Whether these are all there are.
    sums
        The sums so far.
    fusion
        What was kept of the fusion's inputs; None where it is not known.
    maps
        Those of single samples; None without any.

    Raises
    ------
    SettingError
        If the folder was begun with another identity, or holds other Parquet files.
    DataError
        If its file with the sums cannot be read.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder = folder
        self._identity = {"format": FORMAT, **identity}
        self._first: dict[str, Any] | None = None
        self._load()
        damaged = [name for name, rows in self._parts.items() if count_rows(self.folder / name) != rows]
        if damaged:
            raise DataError(
                f"{self.folder} lacks rows: {', '.join(damaged)} is absent or damaged. Name another folder, or delete "
                "this one."
            )

    def _load(self) -> None:
        """Take what the file with the sums says, and remove rows that it does not name."""
        saved = self._read()
        self.batches: int = saved.get("batches", 0)
        self.samples: int = saved.get("samples", 0)
        self.seen: int = saved.get("seen", 0)
        self.other_lengths: dict[str, int] = saved.get("other_lengths", {})
        self.finished: bool = saved.get("finished", False)
        self.fusion = None if saved.get("fusion") is None else _part_of(saved["fusion"])
        self.maps: Columns | None = saved.get("maps")
        self.sums: Sums = {name: _sums_of(plain) for name, plain in saved.get("sums", {}).items()}
        self._first = saved.get("first", self._first)
        self._parts: dict[str, int] = saved.get("parts", {})
        for path in [*self.folder.glob("explained-*.parquet"), *self.folder.glob(".explained-*.part")]:
            if path.name not in self._parts:
                path.unlink()

    def check_first(self, batch: BatchResult) -> None:
        """Refuse a loader that does not begin as the one that the folder was begun with.

        Raises
        ------
        SettingError
            Saying so.
        """
        first = _describe_first(batch)
        if self._first is None:
            self._first = first
        shared = min(len(first["numbers"]), len(self._first["numbers"]))
        ours, theirs = (
            (None if x["sample_ids"] is None else x["sample_ids"][:shared], x["numbers"][:shared])
            for x in (first, self._first)
        )
        groups = [(x["group_noun"], x["groups"][:shared]) for x in (first, self._first)]
        if groups[0] != groups[1]:
            raise SettingError(
                f"{self.folder} was begun with {_say_groups(self._first)} in the loader's first batch, which now has "
                f"{_say_groups(first)}. Intervals are by group, so the folder can be neither continued nor read "
                "back. Name another folder, or delete this one."
            )
        same = ours[0] == theirs[0] and ours[1].shape == theirs[1].shape
        if not (same and torch.allclose(ours[1], theirs[1], rtol=ALIKE, atol=ALIKE, equal_nan=True)):
            raise SettingError(
                f"The loader's first batch is not the one that {self.folder} was begun with: another data set, another "
                "order (a loader that shuffles cannot be continued), or another precision. Pass the same loader, "
                "name another folder, or delete this one."
            )

    def save(
        self,
        batches: int,
        samples: int,
        seen: int,
        other_lengths: Mapping[str, int],
        sums: Sums,
        fusion: FusionPart | None,
        maps: Columns | None,
        rows: Iterable[Mapping[str, Any]],
        finished: bool = False,
    ) -> None:
        """Make the rows of further batches visible, then the sums that contain them.

        Parameters
        ----------
        batches, samples, seen, other_lengths, sums, fusion, maps, finished
            See the attributes.
        rows
            Those of the batches since the last call, as ``SampleTable.add`` takes them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._path.exists():
            self._write(
                {"identity": self._identity, "batches": 0}
            )  # so that whatever happens these rows are known as ours
        table = SampleTable(self.folder, f"explained-{self.batches:06d}", {})
        try:
            for row in rows:
                table.add(row)
            saved = {
                "identity": self._identity,
                "batches": batches,
                "samples": samples,
                "seen": seen,
                "other_lengths": dict(other_lengths),
                "finished": finished,
                "sums": {name: _plain_sums(of_layer.cpu()) for name, of_layer in sums.items()},
                "fusion": None if fusion is None else _plain_part(fusion.cpu()),
                "maps": maps,
                "first": self._first,
                "parts": self._parts | {path.name: count_rows(path) for path in table.close()},
            }
            self._write(saved)
        finally:
            # Whatever went wrong and wherever: what the file with the sums says is what there is.
            table.discard()
            self._load()
            if not self.batches:
                self._path.unlink()

    def finish(self, late: LateColumns | None) -> None:
        """Add what is known of the samples at the end to their rows; then there is nothing to go on with.

        A run that is killed meanwhile adds the same once more.
        """
        for path in (self.folder / name for name in self._parts):
            if late is not None:
                with complete_or_absent(path) as part:
                    add_columns(path, part, {None: late})
        counts = self.batches, self.samples, self.seen, self.other_lengths
        self.save(*counts, self.sums, self.fusion, self.maps, (), finished=True)

    @property
    def _path(self) -> Path:
        return self.folder / FILE

    def _write(self, saved: Mapping[str, Any]) -> None:
        content = io.BytesIO()
        torch.save(saved, content)
        with complete_or_absent(self._path) as part:
            part.write_bytes(zlib.compress(content.getbuffer()))  # most of the sums are 0

    def _read(self) -> dict[str, Any]:
        path = self._path
        if not path.exists():
            others = sorted(found.name for found in self.folder.glob("*.parquet"))
            if others:
                raise SettingError(
                    f"{self.folder} holds {', '.join(others[:3])}{', ...' if len(others) > 3 else ''} but no {FILE}, "
                    "so it is not an explained data set that can be continued. Name another folder, or empty this "
                    "one."
                )
            return {}
        try:
            content = io.BytesIO(zlib.decompress(path.read_bytes()))
            saved: dict[str, Any] = torch.load(content, weights_only=True)
            known: dict[str, str] = saved["identity"]
        except Exception as error:  # whatever torch and pickle raise for a file that is cut off or something else
            raise DataError(f"{path} cannot be read ({error!r}). Name another folder, or delete this one.") from error
        if not saved["batches"]:  # of a run that was killed in its first part
            return {}
        # What is not known of a loader, such as its length, is not there.
        other = [name for name in self._identity.keys() & known.keys() if self._identity[name] != known[name]]
        if other:
            found = "; ".join(
                f"{name}: {_cut(known[name])} there, {_cut(self._identity[name])} now" for name in sorted(other)
            )
            raise SettingError(
                f"{self.folder} was begun with something else ({found}), so it can be neither continued nor read back. "
                "Name another folder, or delete this one."
            )
        return saved


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's parameters and buffers with their names."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, values in model.state_dict().items():
        if isinstance(values, Tensor):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode("utf-8", "surrogatepass"))
            digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _describe_first(batch: BatchResult) -> dict[str, Any]:
    """What tells one first batch from another."""
    labels, inputs = batch.labels, batch.inputs
    numbers = [labels.target, labels.predicted, labels.confidence]
    numbers += [ROW_STATISTICS["max"](prepare_rows(pair.forward)).nanmean(1) for pair in batch.attention[:1]]
    if inputs is not None:
        numbers += [pooled_tokens(*tokens).mean(1) for tokens in inputs.tokens.values()]
    columns = [column.float().cpu() for column in numbers if column is not None]
    return {
        "sample_ids": None if labels.sample_ids is None else [*map(id_text, labels.sample_ids)],
        "numbers": torch.stack(columns, dim=1),
        "groups": [] if labels.groups is None else labels.groups.tolist(),
        "group_noun": labels.group_noun,
    }


def _say_groups(first: Mapping[str, Any]) -> str:
    return f"the {first['group_noun']} {first['groups'][:3]} ..." if first["group_noun"] else "no groups"


def _cut(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:12]}..."


def _plain_sums(sums: LayerAccumulator) -> dict[str, Any]:
    """Sums in plain types, so that a file with them loads with ``weights_only=True``."""
    plain = {**vars(sums.settled()), "columns": [*map(str, sums.columns)]}
    for name in ("heads", "maps", "outcome_maps"):
        plain[name] = {str(direction): value for direction, value in plain[name].items()}
    return plain | {name: [plain[name].keys, plain[name].sums] for name in ("by_group", "scores_by_group")}


def _sums_of(plain: Mapping[str, Any]) -> LayerAccumulator:
    values: dict[str, Any] = {**plain, "columns": tuple(map(Column.parse, plain["columns"]))}
    for name in ("heads", "maps", "outcome_maps"):
        values[name] = {Direction.parse(direction): value for direction, value in values[name].items()}
    for name in ("by_group", "scores_by_group"):
        values[name] = KeyedSums(*values[name])
    return LayerAccumulator(**values)


def _plain_part(part: FusionPart) -> dict[str, Any]:
    return {**vars(part), "modalities": [*part.modalities], "token_shapes": [*part.token_shapes]}


def _part_of(plain: Mapping[str, Any]) -> FusionPart:
    return FusionPart(
        **{**plain, "modalities": tuple(plain["modalities"]), "token_shapes": tuple(plain["token_shapes"])}
    )
