"""What a message must tell, whatever its sentence is."""

import re


def telling(*facts):
    """A pattern of all these facts, in any order: what was expected, what came, where, and what to do."""
    return "(?s)" + "".join(f"(?=.*{re.escape(fact)})" for fact in facts)
