"""What the terminal shows after a fit, a validation or a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from pytorch_lightning import Trainer

from lightning_xattn.report.headline import Headline

MAX_LINES = 8
"""A run ends with at most this number of lines."""

REPORT = "Report: "
"""What the line with the report's path begins with."""


def list_lines(headlines: Mapping[str, Headline], places: Sequence[str]) -> list[str]:
    r"""Sentence, numbers and warnings of one scope, or sentences and warnings of several; then the places.

    Parameters
    ----------
    headlines
        By scope, such as ``val``.
    places
        Where a user sees the figures and the report: the first one is printed, and the first report.

    Examples
    --------
    >>> from lightning_xattn.callback.terminal import list_lines
    >>> from lightning_xattn.report.headline import Headline
    >>> one = Headline("The model mostly uses EEG.", [("Support", "both 28 %")], [])
    >>> print(*list_lines({"val": one}, ["tensorboard --logdir logs"]), sep="\n")
    val: The model mostly uses EEG.
      Support: both 28 %
      tensorboard --logdir logs
    """
    lines = [f"{scope}: {one.sentence}" for scope, one in headlines.items()]
    if len(headlines) == 1:
        (one,) = headlines.values()
        lines += [f"  {name}: {text}" for name, text in one.numbers]
        lines += [f"  Warning: {text}" for text in one.warnings]
    else:
        lines += [f"  Warning ({scope}): {text}" for scope, one in headlines.items() for text in one.warnings]
    reports = [place for place in places[1:] if place.startswith(REPORT)]
    last = [f"  {place}" for place in [*places[:1], *(reports or places[1:])[:1]]]
    room = MAX_LINES - len(last)
    if len(lines) > room:
        left_out = len(lines) - room + 1
        lines = [*lines[: room - 1], f"  {left_out} more: see the report."]
    return [*lines, *last]


def finish_progress_bar(trainer: Trainer) -> None:
    """Let a bar of rich draw its last lines before ours: it does that in its teardown, which comes after ours."""
    bar = trainer.progress_bar_callback
    for kind in () if bar is None else type(bar).__mro__:
        if kind.__name__ == "RichProgressBar":  # not a subclass's own teardown, which may happen only once
            with suppress(Exception):  # whatever the bar may raise
                kind.teardown(bar, trainer, trainer.lightning_module, "")  # type: ignore[attr-defined]
            return
