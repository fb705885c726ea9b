"""A report as one HTML file that needs nothing beside it: key points, figures, numbers, then all samples."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from lightning_xattn.core.names import clean
from lightning_xattn.core.wording import decimal
from lightning_xattn.report.document import Block, Document, Items, Paragraph, Table

_HERE = Path(__file__).parent

NUMBERS = ("confidence", "support", "alignment")
"""The numbers by which samples can be sorted, beside their order."""


@dataclass(frozen=True)
class Picture:
    """A picture in the page."""

    title: str
    content: bytes
    kind: str
    """Format of the content: "svg+xml", "png" or "webp"."""
    axis: Sequence[str] = ()
    """Of a map, whose pixels are its cells: the left end, the axis, and the right end."""
    is_captioned: bool = True
    """Whether the title stands above the picture, which else has it."""


@dataclass(frozen=True)
class SampleEntry:
    """A sample in the list."""

    place: int
    name: str
    """The sample's id, or its place."""
    predicted: str
    true: str
    """Empty where it is not known."""
    outcome: str
    """"correct", "incorrect", or empty."""
    numbers: Mapping[str, float]
    """The known ones of ``NUMBERS``; NaN where undefined."""
    blocks: Sequence[Block] = ()
    pictures: Sequence[Picture] = ()


def as_page(document: Document, figures: Sequence[Picture], samples: Sequence[SampleEntry], note: str) -> str:
    """The report as HTML.

    Parameters
    ----------
    document
        The report. Figures come after its first section, samples before its last one.
    figures
        Figures of all samples.
    samples
        The samples to filter and to sort.
    note
        Why there is no list of samples, or not of all.
    """
    opening, *sections, last = [(one.title, "".join(map(block_as_html, one.blocks))) for one in document.sections]
    parts = [opening]
    if figures:
        parts.append(("Figures", f'<div class="figures">{"".join(map(_figure, figures))}</div>'))
    content = f"<p>{escape(note)}</p>" if note else ""
    parts += [*sections, ("Samples", content + "".join(_list(samples) if samples else [])), last]
    ids = [f"part-{i}" if title != "Samples" else "samples" for i, (title, _) in enumerate(parts)]
    page = Template((_HERE / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(document.title),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
        links="".join(f'<a href="#{one}">{escape(title)}</a>' for one, (title, _) in zip(ids, parts, strict=True)),
        sections="\n".join(
            f'<section id="{one}"><h2>{escape(title)}</h2>{content}</section>'
            for one, (title, content) in zip(ids, parts, strict=True)
        ),
    )


def escape(text: str) -> str:
    """A text as HTML that shows it, whatever it holds."""
    return html.escape(clean(text))


def block_as_html(block: Block) -> str:
    """A block as HTML."""
    match block:
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Items(items, title):
            heading = f"<h3>{escape(title)}</h3>" if title else ""
            lines = [
                f"<dt>{escape(label)}</dt><dd>{'<br>'.join(map(escape, (value, *below)))}</dd>"
                for label, value, below in items
            ]
            return f"{heading}<dl>{''.join(lines)}</dl>"
        case Table(header, rows):
            head = "".join(f'<th scope="col">{escape(title)}</th>' for title in header)
            body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
            table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            # What scrolls has to be reached by keyboard, too.
            return f'<div class="wide" tabindex="0">{table}</div>'


def _figure(picture: Picture) -> str:
    source = f"data:image/{picture.kind};base64,{base64.b64encode(picture.content).decode()}"
    kind = ' class="map"' if picture.axis else ""
    title = escape(picture.title)
    caption = f"<figcaption>{title}</figcaption>" if picture.is_captioned else ""
    ends = "".join(f"<span>{escape(text)}</span>" for text in picture.axis)
    axis = f'<div class="axis">{ends}</div>' if ends else ""
    return f'<figure>{caption}<img{kind} src="{source}" alt="{title}">{axis}</figure>'


def _list(samples: Sequence[SampleEntry]) -> Iterator[str]:
    known = [name for name in NUMBERS if any(math.isfinite(one.numbers.get(name, math.nan)) for one in samples)]
    orders = {"place up": "order of the data"}
    for name in known:
        orders |= {f"{name} up": f"{name}, lowest first", f"{name} down": f"{name}, highest first"}
    yield '<form id="choose" hidden>'
    yield _select("true", "true class", {"": "all"} | {name: name for name in _each(one.true for one in samples)})
    yield _select("outcome", "outcome", {"": "all"} | {name: name for name in _each(one.outcome for one in samples)})
    yield _select("order", "sort by", orders)
    yield '<div><label for="words">id contains</label><input id="words" name="words" type="search"></div>'
    yield '<button type="reset">show all</button><output id="shown" aria-live="polite"></output></form>'
    yield '<div id="list">'
    yield from (_sample(one, known) for one in samples)
    yield "</div>"


def _each(values: Iterable[str]) -> list[str]:
    return [value for value in dict.fromkeys(values) if value]


def _select(name: str, label: str, options: Mapping[str, str]) -> str:
    inside = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options.items())
    return f'<div><label for="{name}">{label}</label><select id="{name}" name="{name}">{inside}</select></div>'


def _sample(one: SampleEntry, known: Sequence[str]) -> str:
    numbers = {name: one.numbers.get(name, math.nan) for name in known}
    data = "".join(f' data-{name}="{value if math.isfinite(value) else ""}"' for name, value in numbers.items())
    data += f' data-place="{one.place}" data-name="{escape(one.name)}"'
    data += f' data-true="{escape(one.true)}" data-outcome="{one.outcome}"'
    classes = one.predicted + (f", true {one.true}" if one.true else "")
    more = f'<span class="outcome">{one.outcome}</span>' if one.outcome else ""
    texts = [f"{name} {decimal(value)}" for name, value in numbers.items() if math.isfinite(value)]
    more += "".join(f'<span class="number">{escape(text)}</span>' for text in texts)
    content = "".join([*map(block_as_html, one.blocks), *map(_figure, one.pictures)])
    return (
        f'<details class="sample {one.outcome}"{data}><summary><strong>{escape(one.name)}</strong>'
        f'<span class="classes">{escape(classes)}</span>{more}</summary>'
        f'<div class="content">{content or "<p>Nothing more is known about this sample.</p>"}</div></details>'
    )
