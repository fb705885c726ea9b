"""Pictures into whichever loggers the Trainer has."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_xattn.errors import XAttnWarning
from lightning_xattn.files import complete_or_absent


def log_images(loggers: Sequence[Any], images: Iterable[tuple[str, NDArray[np.uint8]]], step: int) -> None:
    """Hand pictures to every logger: as images where it takes images, else as PNG files in its folder.

    A logger that fails is reported in a warning and skipped: a broken logger must never end a training run.

    Parameters
    ----------
    loggers
        Lightning loggers: TensorBoard's, those with a ``log_image`` method (such as Weights & Biases'), and any other
        with a ``log_dir``, which gets ``<log_dir>/<tag>/step_<step>.png``.
    images
        Tags and pictures ``(height, width, 3)``; may be lazy, and is not touched without loggers.
    step
        The Trainer's global step.
    """
    working = list(loggers)
    for tag, image in images if working else ():
        for logger in list(working):
            try:
                _log_image(logger, tag, image, step)
            except Exception as error:  # whatever a logger's backend, network or disk may raise
                message = f"{type(logger).__name__} could not take the picture '{tag}': {error!r}."
                warnings.warn(message, XAttnWarning, stacklevel=2)
                working.remove(logger)


def _log_image(logger: Any, tag: str, image: NDArray[np.uint8], step: int) -> None:
    if hasattr(logger, "log_image"):
        logger.log_image(key=tag, images=[image], step=step)
    elif hasattr(logger.experiment, "add_image"):
        logger.experiment.add_image(tag, image, global_step=step, dataformats="HWC")
    elif logger.log_dir is not None:
        path = Path(logger.log_dir) / tag / f"step_{step:06d}.png"
        with complete_or_absent(path) as part:
            Image.fromarray(image).save(part, format="png")
