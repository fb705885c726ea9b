"""What a callback has found, and how it comes back from the processes that a Trainer starts."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
import weakref
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch

from lightning_xattn.core.files import complete_or_absent
from lightning_xattn.core.notices import warn
from lightning_xattn.evaluation.checks import Checks
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.layer_summary import LayerSummary


@dataclass(eq=False)
class Findings:
    """What a callback keeps from one run of a Trainer to the next."""

    history: list[dict[str, Any]] = field(default_factory=list)
    fit_begins: int = 0
    """The place in the history of what the last fit has added."""
    summaries: dict[str, LayerSummary] = field(default_factory=dict)
    fusion_summaries: dict[str, FusionSummary] = field(default_factory=dict)
    checks: Checks = field(default_factory=Checks)


class Handover:
    """The way back from a process that runs a copy of a callback to the one in which the callback was made.

    With ``ddp_spawn`` and ``ddp_notebook`` callbacks run in processes that the Trainer starts. The Trainer brings back
    a model's weights and its metrics, and of callbacks nothing. So the first of these processes leaves a file, which is
    looked for when the findings are asked for. Only this user can read it, and it goes with the callback.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._made_in = os.getpid()
        self._folder = Path(tempfile.gettempdir()) / f"lightning_xattn-{uuid.uuid4().hex}"
        self._known: tuple[int, ...] | None = None
        self._has_looked = False
        weakref.finalize(self, _remove, self._folder, self._made_in)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # In a process that is being started, parent_process() is not known yet.
        if os.getppid() != self._made_in:  # a copy, to which nothing comes that is the original's
            self._begin()

    def leave(self, findings: Findings) -> None:
        """Leave findings for the process that has started this one, if the callback was made there."""
        parent = parent_process()
        if parent is None or parent.pid != self._made_in:
            return
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            with complete_or_absent(self._file) as part:
                torch.save(findings, part)
        except Exception as error:  # a full disk, which ends no run
            warn([f"What the callback has found stays in process {os.getpid()}, which the Trainer started: {error!r}."])
        self._known = self._version()

    def take(self) -> Findings | None:
        """What was left since this was last asked; None if nothing.

        In a process that was started: what was left before it.
        """
        if os.getpid() != self._made_in:
            if self._has_looked:
                return None
            self._has_looked = True
        version = self._version()
        if version in (None, self._known):
            return None
        self._known = version
        findings: Findings = torch.load(self._file, map_location="cpu", weights_only=False)
        return findings

    @property
    def _file(self) -> Path:
        return self._folder / "findings.pt"

    def _version(self) -> tuple[int, ...] | None:
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino


def _remove(folder: Path, made_in: int) -> None:
    if os.getpid() == made_in:  # and not in a fork of that process
        shutil.rmtree(folder, ignore_errors=True)
