"""What a message must info: names, numbers and the remedy, in whatever words."""

from __future__ import annotations

import re


def tells(*facts: object) -> str:
    """A pattern for ``match=``: all of these occur, each by itself, in any order."""
    return r"(?s)\A" + "".join(rf"(?=.*{_alone(str(fact))})" for fact in facts)


def _alone(fact: str) -> str:
    # 3 is not in 13 or 3.5, nor a module in the name of one inside of it or around it.
    before = r"(?<![\w.])" if re.match(r"\w", fact) else ""
    after = r"(?!\w|\.\w)" if re.search(r"\w\Z", fact) else ""
    return before + re.escape(fact) + after
