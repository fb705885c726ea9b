"""A document of a few kinds of block, and its text form, Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.cells import cell_len
from rich.console import Console
from rich.markdown import Markdown

from lightning_xattn.core.names import clean

TEMPLATES: dict[str, Any] = {
    "loader": FileSystemLoader(Path(__file__).parent),
    "trim_blocks": True,
    "lstrip_blocks": True,
    "keep_trailing_newline": True,
    "undefined": StrictUndefined,
}
"""Settings of both templates, the page's and the text's."""


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str
    role: str = ""
    """Of a page's first paragraphs: "lead" or "warning"."""
    shape: ClassVar[str] = "paragraph"


Item = tuple[str, str, Sequence[str]]
"""A label, its value, and lines below it."""


@dataclass(frozen=True)
class Items:
    """A list of labels with values; with a title when all are about one thing."""

    items: Sequence[Item]
    title: str = ""
    shape: ClassVar[str] = "items"


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; all but the first column are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    """What the columns mean. A document has each note once, beside or below its first table."""
    shape: ClassVar[str] = "table"


@dataclass(frozen=True)
class Picture:
    """A picture in a page; the text form leaves it out."""

    title: str
    content: bytes
    kind: str
    """Format of the content: "svg+xml", "png" or "webp"."""
    axis: Sequence[str] = ()
    """Of a map, whose pixels are its cells: the left end, the axis, and the right end."""
    is_captioned: bool = True
    """Whether the title stands above the picture, which else has it."""
    shape: ClassVar[str] = "picture"


Block = Paragraph | Items | Table | Picture


@dataclass(frozen=True)
class Section:
    """A title, and the blocks below it."""

    title: str
    blocks: Sequence[Block]
    about: str = ""
    """What is in it, beside the title of a folded section."""
    has_samples: bool = False
    """Whether a page lists the samples below the blocks."""


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    sections: Sequence[Section]


def as_markdown(document: Document) -> str:
    """Markdown with GitHub's tables; cells are padded, so that it can be read as plain text, too."""
    return _MARKDOWN.get_template("report.md.jinja").render(document=document, seen=[])


def print_markdown(text: str) -> None:
    """Print Markdown: laid out in a terminal or a notebook, as it is elsewhere."""
    console = Console()
    if console.is_terminal or console.is_jupyter:
        console.print(Markdown(text))
    else:
        print(text, end="")


def _lay_out(table: Table) -> Markup:
    """The lines of a table, its columns as wide as their longest cell."""
    cells = [[_escape(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(3, *map(cell_len, column)) for column in zip(*cells, strict=True)]
    first, *others = (_table_row(row, widths) for row in cells)
    rule = f"| {'-' * widths[0]} |" + "".join(f" {'-' * (width - 1)}: |" for width in widths[1:])
    return Markup("\n".join([first, rule, *others]))


def _table_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    gaps = [" " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)]
    padded = [cells[0] + gaps[0], *(gap + cell for cell, gap in zip(cells[1:], gaps[1:], strict=True))]
    return f"| {' | '.join(padded)} |"


def _escape(text: str) -> str:
    """Markdown that shows a text in one line as it is, whatever characters it holds."""
    if isinstance(text, Markup):
        return text
    line = clean(" ".join(text.split()))
    # An underscore inside of a word is one: names and paths stay as they are, to be copied.
    escaped = re.sub(r"([\\`*|<\[\]~$&]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)
    # Characters that begin a heading, a quote or a list where they begin a line.
    return re.sub(r"^(?:(?=>)|(\d{1,9}|[-+=#]*)(?=[-+=#.)](?:\s|$)))", r"\1\\", escaped)


# Markdown has its own escapes: every expression of the template passes `_escape`, as HTML's pass autoescape.
_MARKDOWN = Environment(**TEMPLATES, autoescape=False, finalize=_escape)
_MARKDOWN.filters["lay_out"] = _lay_out
