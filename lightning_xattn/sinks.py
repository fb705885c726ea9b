"""Pictures into whichever loggers the Trainer has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_xattn.files import complete_or_absent
from lightning_xattn.messages import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figures(loggers: Sequence[Any], figures: Iterable[tuple[str, Figure]], step: int, scope: str) -> None:
    """Hand figures to every logger: as images where it takes images, else as PNG files in its folder.

    A logger that fails is reported in a warning and skipped, and so are figures that cannot be drawn: neither may end a
    training run.

    Parameters
    ----------
    loggers
        Lightning loggers: TensorBoard's, those with a ``log_image`` method (such as Weights & Biases'), and any other
        with a ``log_dir``, which gets ``<log_dir>/<tag>/step_<step>.png``.
    figures
        Tags and figures; may be lazy, and is not touched without loggers.
    step
        The Trainer's global step.
    scope
        What they are of, for a warning.
    """
    from lightning_xattn.visualizations import render  # matplotlib, only where figures are wanted

    working = list(loggers)
    try:
        for tag, figure in figures if working else ():
            image = render(figure)
            for logger in list(working):
                try:
                    _log_image(logger, tag, image, step)
                except Exception as error:  # whatever a logger's backend, network or disk may raise
                    warn([f"{type(logger).__name__} could not take the picture '{tag}': {error!r}."])
                    working.remove(logger)
    except Exception as error:  # whatever drawing may raise
        warn([f"The figures of {scope} could not be drawn: {error!r}."])


def _log_image(logger: Any, tag: str, image: NDArray[np.uint8], step: int) -> None:
    if hasattr(logger, "log_image"):
        logger.log_image(key=tag, images=[image], step=step)
    elif hasattr(logger.experiment, "add_image"):
        logger.experiment.add_image(tag, image, global_step=step, dataformats="HWC")
    elif logger.log_dir is not None:
        path = Path(logger.log_dir) / tag / f"step_{step:06d}.png"
        with complete_or_absent(path) as part:
            Image.fromarray(image).save(part, format="png")
