"""A document of a few kinds of block, laid out as plain text or as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_WIDTH = 100
"""Paragraphs of plain text are broken into lines of this many letters."""


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
    parts = [_underlined(document.title.upper(), "=")]
    for section in document.sections:
        parts += [_underlined(f"{section.title.upper()} {section.about}", "-"), blocks_as_text(section.blocks)]
    return "\n\n".join(parts) + "\n"


def blocks_as_text(blocks: Sequence[Block]) -> str:
    """Lay out blocks as plain text, an empty line between them."""
    return "\n\n".join("\n".join(_text_lines(block)) for block in blocks)


def _text_lines(block: Block) -> Iterator[str]:
    match block:
        case Paragraph(text):
            yield from textwrap.wrap(text, _WIDTH)
        case Items(items, title):
            if title:
                yield f"{_line(title)}:"
            for label, value, below in items:
                yield f"{'  ' if title else '- '}{_line(label)}: {_line(value)}"
                yield from (f"    {_line(text)}" for text in below)
        case Table(header, rows):
            cells = [[_line(cell) for cell in row] for row in (header, *rows)]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            for first, *others in cells:
                numbers = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
                yield "  ".join((f"{first:{widths[0]}}", *numbers)).rstrip()


def _underlined(title: str, stroke: str) -> str:
    return f"{_line(title)}\n{stroke * len(_line(title))}"


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
    """A name may hold line breaks; a line may not."""
    return " ".join(text.split())


def _escape(text: str) -> str:
    """Whatever a name holds, it is no markup."""
    return re.sub(r"([\\`*_|<\[\]~$&])", r"\\\1", _line(text))
