"""The settings that the callback and the explainer share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

from torch import nn

from lightning_xattn.attribution.contribution import CONTRIBUTION_SAMPLES
from lightning_xattn.attribution.kept_samples import MAX_SAMPLES
from lightning_xattn.attribution.ports import ModalitiesSetting, check_modalities
from lightning_xattn.capture import AttentionSetting, check_attention
from lightning_xattn.capture.labels import LabelFinder, LabelSetting
from lightning_xattn.core.distributed import SINGLE_PROCESS, Processes
from lightning_xattn.core.errors import SettingError, check_whole_number
from lightning_xattn.evaluation.batch import StepRecorder
from lightning_xattn.evaluation.classes import GROUPINGS, check_class_names


@dataclass(frozen=True)
class Settings:
    """The settings of an evaluation; `AttentionExplainabilityCallback` documents each of them.

    Raises
    ------
    SettingError
        If a value is not allowed.
    """

    attention: AttentionSetting | None = None
    class_names: Sequence[str] | None = None
    classes_by: str = "target"
    predictions: LabelSetting = None
    targets: LabelSetting = None
    sample_ids: LabelSetting = None
    groups: LabelSetting = None
    query_mask: LabelSetting = None
    present: Mapping[str, LabelSetting] | None = None
    fusion: str | None = None
    modalities: ModalitiesSetting | None = None
    contribution_samples: int | None = None
    max_samples: int = MAX_SAMPLES
    table: str | Path | None = None
    """Stored as a string, so that a ``Path`` and a string give the same state key."""

    def __post_init__(self) -> None:
        if self.attention is not None:
            check_attention(self.attention)
        if self.class_names is not None:
            object.__setattr__(self, "class_names", check_class_names(self.class_names))
        if self.classes_by not in GROUPINGS:
            raise SettingError(f"classes_by must be one of {', '.join(GROUPINGS)}; got {self.classes_by!r}.")
        if self.table is not None and not (isinstance(self.table, (str, PathLike)) and str(self.table).strip()):
            raise SettingError(
                f"table must be a folder's path, as in table='samples', or None for no table; got {self.table!r}."
            )
        if self.table is not None and find_spec("pyarrow") is None:
            raise SettingError('table writes Parquet files with pyarrow: pip install "lightning-xattn[table]".')
        check_modalities(self.fusion, self.modalities)
        if self.contribution_samples is not None:
            check_whole_number("contribution_samples", self.contribution_samples, 0)
        check_whole_number("max_samples", self.max_samples)
        if self.contribution_samples == 1:
            raise SettingError(
                "contribution_samples must be 0 (no contributions) or at least 2, as modalities are permuted between "
                "samples; got 1."
            )
        if self.contribution_samples is not None and self.max_samples < self.contribution_samples:
            fewer = self.max_samples if self.max_samples > 1 else 0
            raise SettingError(
                f"max_samples must be at least contribution_samples, {self.contribution_samples}, which are taken from "
                f"them; got {self.max_samples}. Take fewer: contribution_samples={fewer}."
            )
        object.__setattr__(self, "table", None if self.table is None else str(self.table))
        self.finder()  # checks the settings of the labels

    @property
    def permuted_samples(self) -> int:
        """How many samples are kept to be permuted at an evaluation's end; 0: none are."""
        if self.contribution_samples is None:
            return min(CONTRIBUTION_SAMPLES, self.max_samples)
        return self.contribution_samples

    def finder(self) -> LabelFinder:
        """What finds the labels of an evaluation's steps."""
        return LabelFinder(self.predictions, self.targets, self.sample_ids, self.groups, self.query_mask, self.present)

    def recorder(self, model: nn.Module, processes: Processes = SINGLE_PROCESS) -> StepRecorder:
        """What records a model's steps."""
        labels = self.predictions, self.targets
        return StepRecorder(
            model,
            self.attention,
            self.fusion,
            self.modalities,
            labels,
            processes,
            replays=self.permuted_samples > 0,
        )
