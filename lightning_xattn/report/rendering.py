"""A document of a few kinds of block, laid out as plain text, in the terminal, or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Column
from rich.table import Table as Grid
from rich.text import Text

from lightning_xattn.core.names import clean

WIDTH = 100
"""Plain text, and what stands in the terminal, has at most so many columns."""

_NAME_WIDTH = 40
"""The first column of a table has at most so many; longer names go on in the next line."""

_GAP = 2
"""Between the columns of a table."""


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of labels, each with a value and perhaps some lines below it; with a title when it is about one thing."""

    items: Sequence[tuple[str, str, Sequence[str]]]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; all but the first column are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


Block = Paragraph | Items | Table


@dataclass(frozen=True)
class Section:
    """A title, perhaps the name of what it is about, and what stands below it."""

    title: str
    blocks: Sequence[Block]
    about: str = ""


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    sections: Sequence[Section]


def as_text(document: Document) -> str:
    """Lay out as plain text."""
    return _as_plain(_draw_document(document)) + "\n"


def print_document(document: Document) -> None:
    """Print what `as_text` writes; in a terminal with titles and labels in bold."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(_draw_document(document), width=min(WIDTH, console.width))
    else:
        print(as_text(document), end="")


def _as_plain(drawn: RenderableType) -> str:
    console = Console(
        file=StringIO(), width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False, highlight=False
    )
    with console.capture() as written:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in written.get().splitlines())


def _draw_document(document: Document) -> RenderableType:
    parts: list[RenderableType] = [_underlined(document.title.upper(), "=")]
    for section in document.sections:
        parts += [_underlined(f"{section.title.upper()} {section.about}", "-"), *map(_draw_block, section.blocks)]
    return _spaced(parts)


def _spaced(parts: Iterable[RenderableType]) -> RenderableType:
    """With an empty line between them."""
    first, *others = parts
    return Group(first, *(Padding(part, (1, 0, 0, 0)) for part in others))


def _draw_block(block: Block) -> RenderableType:
    match block:
        case Paragraph(text):
            return Text(_line(text))
        case Items(items, title):
            lines: list[RenderableType] = [Text(f"{_line(title)}:", "bold")] if title else []
            for label, value, below in items:
                said = Text.assemble((_line(label), "bold"), f": {_line(value)}")
                lines += [_hung("  " if title else "- ", said), *(_hung("    ", Text(_line(text))) for text in below)]
            return Group(*lines)
        case Table(header, rows):
            return _Columns([[_line(cell) for cell in column] for column in zip(header, *rows, strict=True)])


def _hung(mark: str, text: Text) -> RenderableType:
    """Text whose further lines begin where its first one does, after the mark."""
    grid = Grid.grid(Column(), Column(overflow="fold"))
    grid.add_row(mark, text)
    return grid


@dataclass(frozen=True)
class _Columns:
    """A table, as several below each other where it is too wide: each begins with the first column."""

    columns: Sequence[Sequence[str]]
    """Each with its header first."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names, *others = self.columns
        whole = options.max_width - _names_width(names)
        taken, room = [names], whole
        tables = []
        for column in others:
            needed = _GAP + _width(column)
            if needed > room and len(taken) > 1:
                tables.append(_draw_columns(taken))
                taken, room = [names], whole
            taken.append(column)
            room -= needed
        yield _spaced([*tables, _draw_columns(taken)])


def _width(column: Sequence[str]) -> int:
    """That of its widest cell, or of the longest word of its header, which may go on in the next line."""
    header, *cells = column
    return max(map(cell_len, [*header.split(), *cells]), default=0)


def _names_width(names: Sequence[str]) -> int:
    return min(max(map(cell_len, names)), _NAME_WIDTH)


def _draw_columns(columns: Sequence[Sequence[str]]) -> RenderableType:
    # The box has a column between two of ours, too.
    table = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    names, *others = columns
    table.add_column(Text(names[0]), overflow="fold", vertical="bottom", width=_names_width(names))
    for column in others:
        table.add_column(Text(column[0]), overflow="fold", vertical="bottom", justify="right", width=_width(column))
    for row in zip(*(cells for _, *cells in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def _underlined(title: str, stroke: str) -> Text:
    return Text(f"{_line(title)}\n{stroke * min(cell_len(_line(title)), WIDTH)}", "bold")


def as_markdown(document: Document) -> str:
    """Lay out as Markdown, with tables as GitHub's."""
    parts = [f"# {_escape(document.title)}"]
    for section in document.sections:
        parts.append(f"## {_escape(f'{section.title} {section.about}')}")
        parts += ["\n".join(_markdown_lines(block)) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


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
            yield _table_row(header)
            yield "| --- |" + " ---: |" * (len(header) - 1)
            yield from map(_table_row, rows)


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _line(text: str) -> str:
    """A name may hold line breaks, and what a terminal obeys; a line may not."""
    return clean(" ".join(text.split()))


def _escape(text: str) -> str:
    """Whatever a name holds, it is no markup."""
    escaped = re.sub(r"([\\`*_|<\[\]~$&])", r"\\\1", _line(text))
    # What begins a title, a quote, or a list where it begins a line.
    return re.sub(r"^(?:(?=>)|(\d{1,9}|[-+=#]*)(?=[-+=#.)](?:\s|$)))", r"\1\\", escaped)
