"""Names that come from data, as text that can be shown whatever it holds."""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

LONGEST = 120
"""The number of characters of a name that are shown."""

_LONG_WORD = re.compile(r"(\S{1000})\S+")

_SPACES = re.compile(r"[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029]+")

_UNSHOWN = re.compile(
    "["
    r"\0-\x1f\x7f-\x9f"  # controls, with the one that begins escape sequences
    r"\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # unseen, or turning text
    r"\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"  # no characters at all
    r"\U000e0000-\U000e007f"  # unseen copies of ASCII
    "]"
)


def plain_id(one: Any) -> Any:
    """An id as a Python value, also from a tensor or an array of one."""
    return one.item() if callable(getattr(one, "item", None)) else one


def raw_text(one: Any) -> str:
    """An id as text, whatever its type; two ids of one type that differ have two texts."""
    one = plain_id(one)
    try:
        return repr(one) if isinstance(one, bytes) else str(one)
    except Exception:  # an integer of more than 4300 digits; whatever a user's object raises
        return hex(one) if isinstance(one, int) else object.__repr__(one)


def valid(text: str) -> str:
    r"""A text that every file takes: a half of a surrogate pair, which UTF-8 does not have, is written ``\ud800``."""
    return text.encode("utf-8", "backslashreplace").decode()


def clean(text: str) -> str:
    r"""A text of several lines, without what a terminal, a page or a figure would obey instead of showing it.

    Controls (but for the ends of lines), marks that turn the direction of text, unseen characters, and halves of
    surrogate pairs are written as Python writes them: ``\x1b``, ``\u202e``, ``\ud800``. A word of more than 1000
    characters is cut there.
    """
    text = _LONG_WORD.sub(r"\1…", text) if len(text) > 1000 else text
    if text.isascii() and text.isprintable():  # nearly always
        return text
    return "\n".join(_UNSHOWN.sub(_written_out, line) for line in text.split("\n"))


def escaped_in_json(text: str) -> str:
    """JSON with the characters escaped that ``clean`` writes out; reading it gives the names back."""
    return "\n".join(_UNSHOWN.sub(lambda found: json.dumps(found[0])[1:-1], line) for line in text.split("\n"))


def shown(name: Any, longest: int = LONGEST) -> str:
    """A name from data as it is shown: in one line, ``clean``, and not too long.

    For figures, reports, pages, terminals, and the names of curves. To find a sample again use ``id_text``.

    Parameters
    ----------
    name
        The name.
    longest
        The number of characters that are shown, at least 20. A longer name is cut and ends in an ellipsis and eight
        characters of a hash, which differ from name to name.

    Returns
    -------
    str
        One line.
    """
    text = raw_text(name)
    whole = clean(_SPACES.sub(" ", text if len(text) <= longest else text[: longest + 1]))
    if len(text) <= longest and len(whole) <= longest:
        return whole
    return f"{whole[: longest - 9]}…{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


def shown_tag(tag: str) -> str:
    """A name of a curve or a figure as loggers get it: each of its parts between slashes as ``shown``."""
    return "/".join(map(shown, tag.split("/")))


def _written_out(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
