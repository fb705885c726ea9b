"""A document of a few kinds of block, and its text form, Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.markdown import Markdown

from lightning_xattn.core.names import clean


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


Item = tuple[str, str, Sequence[str]]
"""A label, its value, and lines below it."""


@dataclass(frozen=True)
class Items:
    """A list of labels with values; with a title when all are about one thing."""

    items: Sequence[Item]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; all but the first column are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


Block = Paragraph | Items | Table


@dataclass(frozen=True)
class Section:
    """A title, and the blocks below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    sections: Sequence[Section]


def as_markdown(document: Document) -> str:
    """Markdown with GitHub's tables; cells are padded, so that it can be read as plain text, too."""
    parts = [f"# {_escape(document.title)}"]
    for section in document.sections:
        parts.append(f"## {_escape(section.title)}")
        parts += ["\n".join(_markdown_lines(block)) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def print_markdown(text: str) -> None:
    """Print Markdown: laid out in a terminal or a notebook, as it is elsewhere."""
    console = Console()
    if console.is_terminal or console.is_jupyter:
        console.print(Markdown(text))
    else:
        print(text, end="")


def _markdown_lines(block: Block) -> Iterator[str]:
    match block:
        case Paragraph(text):
            yield _escape(text)
        case Items(items, title):
            if title:
                yield f"### {_escape(title)}\n"
            for label, value, below in items:
                yield f"- **{_escape(label)}:** {_escape(value)}"
                yield from (f"  - {_escape(text)}" for text in below)
        case Table(header, rows):
            cells = [[_escape(cell) for cell in row] for row in (header, *rows)]
            widths = [max(3, *map(cell_len, column)) for column in zip(*cells, strict=True)]
            first, *others = (_table_row(row, widths) for row in cells)
            yield first
            yield f"| {'-' * widths[0]} |" + "".join(f" {'-' * (width - 1)}: |" for width in widths[1:])
            yield from others


def _table_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    gaps = [" " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)]
    padded = [cells[0] + gaps[0], *(gap + cell for cell, gap in zip(cells[1:], gaps[1:], strict=True))]
    return f"| {' | '.join(padded)} |"


def _escape(text: str) -> str:
    """Markdown that shows a text in one line as it is, whatever characters it holds."""
    line = clean(" ".join(text.split()))
    # An underscore inside of a word is one: names and paths stay as they are, to be copied.
    escaped = re.sub(r"([\\`*|<\[\]~$&]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)
    # Characters that begin a heading, a quote or a list where they begin a line.
    return re.sub(r"^(?:(?=>)|(\d{1,9}|[-+=#]*)(?=[-+=#.)](?:\s|$)))", r"\1\\", escaped)
