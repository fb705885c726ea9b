"""A report as one HTML file that needs nothing beside it: what is to be known first, figures, then all samples."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_xattn.core.names import clean
from lightning_xattn.core.wording import decimal
from lightning_xattn.report.rendering import Block, Document, Items, Paragraph, Table

_HERE = Path(__file__).parent

TRAINING = {
    "seen": "trained on",
    "related": "trained on others of its group",
    "new": "new to the model",
}
"""What `TrainingData.tell` says, in words."""

NUMBERS = ("confidence", "conflict", "alignment", "share")
"""What samples can be sorted by, beside their order."""


@dataclass(frozen=True)
class Picture:
    """A picture in the page."""

    title: str
    content: bytes
    kind: str
    """Of the content: "svg+xml", "png", "webp"."""
    axis: Sequence[str] = ()
    """Of a map, whose pixels are its cells: what its left end is, its axis, and its right end."""
    is_captioned: bool = True
    """Whether the title stands below it; else the picture has it."""


@dataclass(frozen=True)
class SampleEntry:
    """A sample in the list."""

    place: int
    name: str
    """Its id, or its place."""
    predicted: str
    true: str
    """Empty where it is not known."""
    outcome: str
    """"correct", "incorrect", or empty."""
    numbers: Mapping[str, float]
    """Those of ``NUMBERS`` that are known; NaN where undefined."""
    says: str
    """In words; may be empty."""
    blocks: Sequence[Block] = ()
    pictures: Sequence[Picture] = ()
    training: str = ""
    """What the model was trained on, as `TrainingData.tell` says; empty where that is not known."""


def as_page(
    document: Document,
    short: Sequence[str],
    figures: Sequence[Picture],
    samples: Sequence[SampleEntry],
    missing: str,
    first: str = "",
) -> str:
    """Lay out as HTML.

    Parameters
    ----------
    document
        The report. Its last section says how to read it, and stands after the samples.
    short
        What is to be known first, a sentence or two each.
    figures
        Of all samples.
    samples
        To be filtered and sorted.
    missing
        Why there is no list of samples, or not of all.
    first
        The modality whose share is one of the samples' numbers.
    """
    title = escape(document.title)
    *sections, last = document.sections
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Its own icon: a browser would ask for one.
        '<link rel="icon" href="data:,">',
        f"<title>{title}</title><style>{(_HERE / 'page.css').read_text(encoding='utf-8')}</style></head><body>",
        f"<header><h1>{title}</h1>",
        '<nav aria-label="Parts"><a href="#short">In short</a>',
        '<a href="#figures">Figures</a>' if figures else "",
        '<a href="#numbers">Numbers</a><a href="#samples">Samples</a><a href="#probe">How to read this</a>',
        '</nav></header><main><section id="short"><h2>In short</h2><ul class="short">',
        *(f"<li>{escape(sentence)}</li>" for sentence in short),
        "</ul></section>",
    ]
    if figures:
        parts += [
            '<section id="figures"><h2>Figures</h2><div class="figures">',
            *map(_figure, figures),
            "</div></section>",
        ]
    parts.append('<section id="numbers">')
    for section in sections:
        parts.append(f"<h2>{escape(f'{section.title} {section.about}'.strip())}</h2>")
        parts += map(block_as_html, section.blocks)
    parts += ["</section>", '<section id="samples"><h2>Samples</h2>']
    parts += [f"<p>{escape(missing)}</p>"] if missing else []
    parts += _list(samples, first) if samples else []
    parts += ["</section>", f'<section id="probe"><h2>{escape(last.title)}</h2>', *map(block_as_html, last.blocks)]
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    parts += ["</section></main>", f"<script>{script}</script></body></html>"]
    return "\n".join(filter(None, parts)) + "\n"


def escape(text: str) -> str:
    """A text as HTML shows it, whatever it holds."""
    return html.escape(clean(text))


def block_as_html(block: Block) -> str:
    """Lay out a block; markup in a name is escaped."""
    match block:
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Items(items, title):
            lines = [f"<h3>{escape(title)}</h3>"] if title else []
            for label, value, below in items:
                more = "".join(f"<br>{escape(text)}" for text in below)
                lines.append(f"<dt>{escape(label)}</dt><dd>{escape(value)}{more}</dd>")
            heading = lines.pop(0) if title else ""
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


def _list(samples: Sequence[SampleEntry], first: str) -> Iterator[str]:
    known = [name for name in NUMBERS if any(math.isfinite(one.numbers.get(name, math.nan)) for one in samples)]
    orders = [("place up", "order of the data")]
    for name in known:
        words = f"share of {first}" if name == "share" else name
        orders += [(f"{name} up", f"{words}, lowest first"), (f"{name} down", f"{words}, highest first")]
    yield '<form id="choose" hidden>'
    yield _select("true", "true class", [("", "all"), *((name, name) for name in _each(one.true for one in samples))])
    yield _select("outcome", "outcome", [("", "all"), *((name, name) for name in _each(o.outcome for o in samples))])
    of_training = _each(one.training for one in samples)
    if of_training:
        yield _select("training", "training", [("", "all"), *((one, TRAINING[one]) for one in of_training)])
    yield _select("order", "sort by", orders)
    yield '<div><label for="words">id contains</label><input id="words" name="words" type="search"></div>'
    yield '<button type="reset">show all</button><output id="shown" aria-live="polite"></output></form>'
    yield '<div id="list">'
    for one in samples:
        yield _sample(one, known, first)
    yield "</div>"


def _each(values: Iterable[str]) -> list[str]:
    return [value for value in dict.fromkeys(values) if value]


def _select(name: str, label: str, options: Sequence[tuple[str, str]]) -> str:
    inside = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)
    return f'<div><label for="{name}">{label}</label><select id="{name}" name="{name}">{inside}</select></div>'


def _sample(one: SampleEntry, known: Sequence[str], first: str) -> str:
    numbers = {name: one.numbers.get(name, math.nan) for name in known}
    data = "".join(f' data-{name}="{value if math.isfinite(value) else ""}"' for name, value in numbers.items())
    data += f' data-place="{one.place}" data-name="{escape(one.name)}"'
    data += f' data-true="{escape(one.true)}" data-outcome="{one.outcome}" data-training="{one.training}"'
    said = one.predicted + (f", true {one.true}" if one.true else "")
    shown = "".join(
        f'<span class="number">{f"share of {escape(first)}" if name == "share" else name} {decimal(value)}</span>'
        for name, value in numbers.items()
        if math.isfinite(value)
    )
    outcome = f'<span class="outcome">{one.outcome}</span>' if one.outcome else ""
    outcome += f'<span class="number">{TRAINING[one.training]}</span>' if one.training else ""
    content = f"<p>{escape(one.says)}</p>" if one.says else ""
    content += "".join(map(_figure, one.pictures)) + "".join(map(block_as_html, one.blocks))
    return (
        f'<details class="sample {one.outcome}"{data}><summary><strong>{escape(one.name)}</strong>'
        f'<span class="says">{escape(said)}</span>{outcome}{shown}</summary>'
        f'<div class="content">{content or "<p>Nothing more is known of it.</p>"}</div></details>'
    )
