"""Hand pictures, texts, pages and tables to the Trainer's loggers: one class for each kind of logger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_xattn.core.names import shown_tag
from lightning_xattn.core.notices import warn
from lightning_xattn.loggers.writers import (
    CometWriter,
    FolderWriter,
    LoggerWriter,
    MLFlowWriter,
    Picture,
    TensorBoardWriter,
    WandbWriter,
    shorten_path,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Content = TypeVar("Content")
Result = TypeVar("Result")

__all__ = ["WRITERS", "LoggerWriter", "LoggerWriters", "Picture", "shorten_path"]

WRITERS: dict[str, Callable[[Any], LoggerWriter] | None] = {
    "TensorBoardLogger": TensorBoardWriter,
    "WandbLogger": WandbWriter,
    "MLFlowLogger": MLFlowWriter,
    "CometLogger": CometWriter,
    # Of Lightning's trial runs, which leave nothing behind.
    "DummyLogger": None,
}
"""By the name of a logger's class, or of one that it derives from: what hands it pictures and the rest; None: it gets
nothing.

By name, as ``lightning`` and ``pytorch_lightning`` have classes of their own, and none is imported for it.
"""


class LoggerWriters:
    """All loggers of a Trainer. One that fails is reported in a warning and skipped; it may not end a training run.

    Parameters
    ----------
    loggers
        Lightning loggers; those that ``WRITERS`` does not know get files in their folder.
    root
        Where files go without any logger.

    Attributes
    ----------
    folders : list of Path
        Where files go.
    """

    def __init__(self, loggers: Sequence[Any], root: Path) -> None:
        self._working: list[LoggerWriter] = [] if loggers else [FolderWriter(None, root)]
        for logger in loggers:
            try:
                writer = _writer_of(logger, root)
            except Exception as error:  # whatever asking a logger for its folder, or making a user's writer, may raise
                warn([f"{type(logger).__name__} gets no pictures and reports: {error!r}."])
                continue
            self._working += [] if writer is None else [writer]
        self.folders = [writer.folder for writer in self._working if isinstance(writer, FolderWriter)]

    def __bool__(self) -> bool:
        return bool(self._working)

    def log_figures(self, parts: Iterable[Iterable[tuple[str, Figure]]], step: int) -> None:
        """Draw figures, by tag and maybe lazy, and hand over their pictures at once, at the step of the scalars.

        A part that fails leaves the others as they are.
        """
        from lightning_xattn.visualizations import render  # matplotlib, only where figures are wanted

        def draw() -> dict[str, Picture]:
            drawn: dict[str, Picture] = {}
            for part in parts:
                try:
                    drawn |= {shown_tag(tag): Picture(render(figure)) for tag, figure in part}
                except Exception as error:  # whatever is wrong in it: a training run does not end of it
                    warn([f"Some pictures of this evaluation are missing: {error!r}."])
            return drawn

        self.log("pictures", draw, lambda writer, made: writer.log_images(made, step))

    def describe_places(self) -> list[str]:
        """What a user opens or types to see the pictures, of each logger that knows."""
        places: list[str] = []
        for writer in self._working:
            with suppress(Exception):  # whatever asking a logger for its address may raise
                places.append(writer.describe_place())
        return list(dict.fromkeys(filter(None, places)))

    def log(
        self, what: str, make: Callable[[], Content], log: Callable[[LoggerWriter, Content], Result]
    ) -> list[Result]:
        """Make something, and hand it over to each that still works; returns what each gives back."""
        results: list[Result] = []
        try:
            content = make()
        except Exception as error:  # whatever is wrong in it: a training run does not end of it
            warn([f"There are no {what} of this evaluation: {error!r}."])
            return results
        for writer in list(self._working):
            try:
                results.append(log(writer, content))
            except Exception as error:  # whatever a logger's backend, network or disk may raise
                name = "Writing files" if writer.logger is None else type(writer.logger).__name__
                warn([f"{name} failed with {what}, and gets nothing more of this evaluation: {error!r}."])
                self._working.remove(writer)
        return results


def _writer_of(logger: Any, root: Path) -> LoggerWriter | None:
    for kind in type(logger).__mro__:
        if kind.__name__ in WRITERS:
            make = WRITERS[kind.__name__]
            return None if make is None else make(logger)
    folders = (getattr(logger, name, None) for name in ("log_dir", "save_dir"))
    # An address, as of a bucket, is no folder here.
    return FolderWriter(logger, Path(next((one for one in folders if one and "://" not in str(one)), root)))
