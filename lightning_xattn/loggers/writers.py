"""What each kind of logger does with pictures, texts, pages and tables: one class a logger."""

from __future__ import annotations

import html as escaping
import io
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_xattn.core.files import complete_or_absent, path_of


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure as loggers get it, encoded once for all of them.

    Parameters
    ----------
    pixels
        ``(height, width, 3)``: red, green and blue in [0, 255].
    """

    pixels: NDArray[np.uint8]

    @cached_property
    def png(self) -> bytes:
        """The content of a PNG file."""
        content = io.BytesIO()
        # A higher level takes longer, and saves little of lines and letters.
        Image.fromarray(self.pixels).save(content, format="png", compress_level=1)
        return content.getvalue()


class LoggerWriter(ABC):
    """Hands pictures, texts, pages and tables to one of the Trainer's loggers; scalars go through Lightning.

    A logger that `WRITERS` does not know gets files in its folder. To serve one in its own way, derive from this class
    and enter it under the name of the logger's class:

        class NeptuneWriter(LoggerWriter):
            def log_images(self, images, step):
                for name, picture in images.items():
                    self.logger.experiment[name].append(File.from_content(picture.png, "png"), step=step)

            def log_text(self, name, text, step):
                self.logger.experiment[name].append(text, step=step)

            def log_page(self, name, html, step):
                self.logger.experiment[name].upload(File.from_content(html, "html"))

        WRITERS["NeptuneLogger"] = NeptuneWriter

    Whatever a method raises becomes a warning, and the logger gets nothing more of that evaluation.

    Parameters
    ----------
    logger
        The logger.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    @abstractmethod
    def log_images(self, images: Mapping[str, Picture], step: int) -> None:
        """Take all pictures of an evaluation, by name; ``step`` is that of its scalars."""

    @abstractmethod
    def log_text(self, name: str, text: str, step: int) -> None:
        """Take a text in Markdown."""

    @abstractmethod
    def log_page(self, name: str, html: str, step: int) -> Path | None:
        """Take a page that needs nothing beside it; returns its file, if it is one that the user can open."""

    def describe_place(self) -> str:
        """What a user opens or types to see the pictures, as the end of a run prints it; "" if that is not known."""
        return ""

    # A logger need not have these.

    def log_table(self, name: str, path: Path, step: int) -> None:  # noqa: B027
        """Take a table that is in a Parquet file already."""


class TensorBoardWriter(LoggerWriter):
    """Lightning's ``TensorBoardLogger``: images and text; pages lie in its folder."""

    def log_images(self, images: Mapping[str, Picture], step: int) -> None:
        """In the images tab."""
        experiment = self.logger.experiment
        if not type(experiment).__module__.startswith("torch."):  # tensorboardX, whose files have messages of its own
            for name, picture in images.items():
                experiment.add_image(name, picture.pixels, global_step=step, dataformats="HWC")
            return
        from tensorboard.compat.proto.summary_pb2 import Summary  # only where there is its logger

        for name, picture in images.items():
            height, width, _ = picture.pixels.shape
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=picture.png)
            # torch has no public way to add an image that is encoded already.
            experiment._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """In the text tab."""
        self.logger.experiment.add_text(name, text, global_step=step)

    def log_page(self, name: str, html: str, step: int) -> Path:
        """A file beside the event file: TensorBoard shows no pages."""
        path = Path(self.logger.log_dir) / path_of(f"{name}.html")
        with complete_or_absent(path) as part:
            part.write_text(html, encoding="utf-8")
        return path

    def describe_place(self) -> str:
        """The command that shows this run."""
        return f"tensorboard --logdir {shlex.quote(shorten_path(Path(self.logger.log_dir)))}"


class WandbWriter(LoggerWriter):
    """Lightning's ``WandbLogger``, which sends each call as a step of its own: all pictures go in one."""

    def log_images(self, images: Mapping[str, Picture], step: int) -> None:
        """As media, in one call."""
        import wandb  # only where there is its logger

        self.logger.log_metrics({name: wandb.Image(picture.pixels) for name, picture in images.items()}, step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """As a panel that keeps its lines."""
        self.log_page(name, f"<pre>{escaping.escape(text)}</pre>", step)

    def log_page(self, name: str, html: str, step: int) -> None:
        """As a panel."""
        import wandb

        self.logger.log_metrics({name: wandb.Html(html)}, step)

    def describe_place(self) -> str:
        """The address of the run, or the folder of one that is offline."""
        run = self.logger.experiment
        return str(getattr(run, "url", None) or getattr(run, "dir", None) or "")

    def log_table(self, name: str, path: Path, step: int) -> None:
        """As a table to filter and to sort."""
        import pyarrow.parquet as pq
        import wandb

        columns = pq.read_table(path).to_pydict()
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.logger.log_metrics({name: wandb.Table(columns=list(columns), data=rows)}, step)


class MLFlowWriter(LoggerWriter):
    """Lightning's ``MLFlowLogger``: images by step, the rest as artifacts. Needs MLflow 2.11."""

    def log_images(self, images: Mapping[str, Picture], step: int) -> None:
        """In the tab of model metrics, with a slider for the step."""
        for name, picture in images.items():
            key = path_of(name).as_posix()  # MLflow takes letters, digits and a few signs
            self.logger.experiment.log_image(self.logger.run_id, picture.pixels, key=key, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """As an artifact."""
        self._write(name, text, step, "md")

    def log_page(self, name: str, html: str, step: int) -> None:
        """As an artifact, which MLflow shows as a page."""
        self._write(name, html, step, "html")

    def log_table(self, name: str, path: Path, step: int) -> None:
        """As an artifact."""
        self.logger.experiment.log_artifact(self.logger.run_id, str(path), path_of(name).as_posix())

    def describe_place(self) -> str:
        """The server's address or folder, and the run."""
        address = re.sub("//[^/]*@", "//", str(self.logger._tracking_uri))  # without a user's name and password
        return f"MLflow run {self.logger.run_id} at {address}"

    def _write(self, name: str, content: str, step: int, suffix: str) -> None:
        place = path_of(name) / f"step_{step:06d}.{suffix}"
        self.logger.experiment.log_text(self.logger.run_id, content, place.as_posix())


class CometWriter(LoggerWriter):
    """Lightning's ``CometLogger``: images by step, the rest as assets."""

    def log_images(self, images: Mapping[str, Picture], step: int) -> None:
        """In the graphics tab."""
        for name, picture in images.items():
            self.logger.experiment.log_image(io.BytesIO(picture.png), name=name, image_format="png", step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """As an asset."""
        self.logger.experiment.log_asset_data(text, name=f"{name}.md", step=step)

    def log_page(self, name: str, html: str, step: int) -> None:
        """As an asset."""
        self.logger.experiment.log_asset_data(html, name=f"{name}.html", step=step)

    def log_table(self, name: str, path: Path, step: int) -> None:
        """As an asset."""
        self.logger.experiment.log_asset(str(path), file_name=f"{name}/{path.name}", step=step)

    def describe_place(self) -> str:
        """The address of the experiment."""
        return str(getattr(self.logger.experiment, "url", None) or "")


class FolderWriter(LoggerWriter):
    """Writes ``<folder>/<name>/step_<step>.png``, ``.md`` and ``.html``, each complete or absent.

    Parameters
    ----------
    logger
        The logger; None without any.
    folder
        Where to write.
    """

    def __init__(self, logger: Any, folder: Path) -> None:
        super().__init__(logger)
        self.folder = folder

    def log_images(self, images: Mapping[str, Picture], step: int) -> None:
        """One file each."""
        for name, picture in images.items():
            self._write(name, step, "png", picture.png)

    def log_text(self, name: str, text: str, step: int) -> None:
        """One file."""
        self._write(name, step, "md", text)

    def log_page(self, name: str, html: str, step: int) -> Path:
        """One file."""
        return self._write(name, step, "html", html)

    def describe_place(self) -> str:
        """The folder."""
        return f"Figures: {shorten_path(self.folder)}"

    def _write(self, name: str, step: int, suffix: str, content: bytes | str) -> Path:
        path = self.folder / path_of(name) / f"step_{step:06d}.{suffix}"
        with complete_or_absent(path) as part:
            if isinstance(content, str):
                part.write_text(content, encoding="utf-8")
            else:
                part.write_bytes(content)
        return path


def shorten_path(path: Path) -> str:
    """A path as the user types it: relative where it is below the working folder."""
    whole, here = path.absolute(), Path.cwd()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) else str(whole)
