"""What a logger does with what is no scalar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""``(height, width, 3)``: red, green and blue."""


class LoggerWriter(ABC):
    """Hands pictures, texts, pages and tables to one of the Trainer's loggers; scalars go through Lightning.

    A logger that `WRITERS` does not know gets files in its folder. To serve one in its own way, derive from this class
    and enter it under the name of the logger's class:

        class NeptuneWriter(LoggerWriter):
            def log_images(self, images, step):
                for name, picture in images.items():
                    self.logger.experiment[name].append(File.as_image(picture / 255), step=step)

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
    def log_page(self, name: str, html: str, step: int) -> None:
        """Take a page that needs nothing beside it."""

    # A logger need not have these.

    def log_table(self, name: str, path: Path, step: int) -> None:  # noqa: B027
        """Take a table that is in a Parquet file already."""
