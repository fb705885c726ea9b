"""The table of ``python -m benchmarks``: its rows, their text, and their place in ``docs/costs.md``."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.timing import Quartiles

COSTS = Path(__file__).parents[1] / "docs" / "costs.md"
BEGIN = "<!-- benchmarks: python -m benchmarks --write -->"
END = "<!-- end of benchmarks -->"

HEADER = ("model", "what", "over", "ratio (quartiles)", "conditions")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes
    ----------
    model
        "small", "middle" or "long".
    what, over
        What is compared with what.
    conditions
        Shapes, samples, and what else the numbers hold for.
    found
        Lower quartile, median and upper quartile over the turns; None: not run.
    turns
        How many of them.
    unit
        That of the numbers; "": they are ratios.
    problem
        Why it was not run.
    """

    model: str
    what: str
    over: str
    conditions: str
    found: Quartiles | None = None
    turns: int = 0
    unit: str = ""
    problem: str = ""

    def __post_init__(self) -> None:
        if (self.found is None) == (not self.problem):
            raise ValueError(f"A row has either numbers or the reason why it has none; got {self}")

    @property
    def ratio(self) -> str:
        """The numbers as text, ``1.26 (1.20 to 1.31)``."""
        if self.found is None:
            return f"not run: {self.problem}"
        low, middle, high = (f"{round_to_digits(one)}" for one in self.found)
        return f"{middle}{f' {self.unit}' if self.unit else ''} ({low} to {high})"

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """What `HEADER` names."""
        turns = f"; {self.turns} turns" if self.turns else ""
        return self.model, self.what, self.over, self.ratio, f"{self.conditions}{turns}"


@dataclass(frozen=True)
class Benchmark:
    """Some rows that are measured in one run.

    Attributes
    ----------
    rows
        What is measured, without numbers yet.
    measure
        Gets about how many seconds it may take, and gives the quartiles, the number of turns and further conditions of
        each row; or the reason why it is not run. Where it takes longer, it takes the least number of turns.
    seconds
        How many it may take in the whole table.
    """

    rows: tuple[Row, ...]
    measure: Callable[[float], Sequence[Measured] | str]
    seconds: float

    def run(self, seconds: float | None = None) -> list[Row]:
        """The rows with their numbers."""
        found = self.measure(self.seconds if seconds is None else seconds)
        if isinstance(found, str):
            return [replace(row, problem=found) for row in self.rows]
        return [
            replace(
                row,
                found=one.found,
                turns=one.turns,
                problem="",
                conditions="; ".join(filter(None, (row.conditions, one.conditions))),
            )
            for row, one in zip(self.rows, found, strict=True)
        ]


@dataclass(frozen=True)
class Measured:
    """The numbers of a row."""

    found: Quartiles
    turns: int
    conditions: str = ""


NOT_RUN = "has not run"
"""The problem of a row before it is measured."""


def plan(model: str, what: str, over: str, conditions: str, unit: str = "") -> Row:
    """A row that has not been measured yet."""
    return Row(model, what, over, conditions, unit=unit, problem=NOT_RUN)


def round_to_digits(value: float) -> str:
    """Two digits behind the point of what is below 10, none of what is 100 or more."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def describe_machine() -> str:
    """Where and when this runs, in a sentence."""
    cores, gpu = os.cpu_count(), torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"Measured on {datetime.date.today():%d %B %Y} with torch {torch.__version__} and Python "
        f"{platform.python_version()} on {platform.machine()}, {cores} cores, {torch.get_num_threads()} of torch's "
        f"threads, {gpu}."
    )


def format_row(cells: Sequence[str]) -> str:
    """A row of the table in Markdown."""
    return f"| {' | '.join(cells)} |"


def make_table(rows: Iterable[Row]) -> str:
    """The table in Markdown."""
    return "\n".join(map(format_row, (HEADER, ("---",) * len(HEADER), *(row.cells for row in rows))))


def write_table(rows: Iterable[Row], path: Path = COSTS) -> None:
    """Put the table between the two markers of a page.

    Raises
    ------
    ValueError
        If the page does not have each marker once.
    """
    text = path.read_text()
    if (text.count(BEGIN), text.count(END)) != (1, 1):
        raise ValueError(f"{path} must have {BEGIN} and {END}, each once")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{describe_machine()}\n\n{make_table(rows)}\n{END}{after}")
