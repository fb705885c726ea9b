"""What the terminal shows after a fit, a validation or a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pytorch_lightning import Trainer

from lightning_xattn.report.headline import Headline

MAX_LINES = 8
"""So many lines at most."""


def list_lines(headlines: Mapping[str, Headline], places: Sequence[str]) -> list[str]:
    r"""The lines: of one scope its sentence, numbers and warnings, of several the sentence of each; then the places.

    Parameters
    ----------
    headlines
        By scope, such as ``val``.
    places
        Where a user sees the figures and the report.

    Examples
    --------
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
    last = [f"  {place}" for place in places[:2]]
    room = MAX_LINES - len(last)
    if len(lines) > room:
        left_out = len(lines) - room + 1
        lines = [*lines[: room - 1], f"  {left_out} more: see the report."]
    return [*lines, *last]


def finish_progress_bar(trainer: Trainer) -> None:
    """Let a bar of rich draw its last lines before ours: it does that in its teardown, which comes after ours."""
    bar = trainer.progress_bar_callback
    if bar is not None and any(kind.__name__ == "RichProgressBar" for kind in type(bar).__mro__):
        bar.teardown(trainer, trainer.lightning_module, "")
