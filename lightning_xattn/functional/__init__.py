"""Every number's one definition, as pure functions of tensors (see their docstrings)."""

from lightning_xattn.functional.agreement import *
from lightning_xattn.functional.faithfulness import *
from lightning_xattn.functional.intervals import *
from lightning_xattn.functional.outcomes import *
from lightning_xattn.functional.pairs import *
from lightning_xattn.functional.probe import *
from lightning_xattn.functional.rows import *
from lightning_xattn.functional.shapley import *

__all__ = ["ROW_STATISTICS"]
# What the files define, without what they import.
__all__ += sorted(name for name, one in globals().items() if getattr(one, "__module__", "").startswith(f"{__name__}."))
