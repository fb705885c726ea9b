"""One callback for both of Lightning's namespaces, ``pytorch_lightning`` and ``lightning.pytorch``."""

from __future__ import annotations

import sys
from contextlib import suppress

from pytorch_lightning import Callback


def join_namespaces(kind: type[Callback]) -> None:
    """Make a kind of callback one of ``lightning.pytorch`` too, where that is imported.

    Its Trainer and its command line take children of its own ``Callback`` alone, another class with the same hooks.
    Nobody who imports ``pytorch_lightning`` alone imports the other for it.
    """
    other = getattr(sys.modules.get("lightning.pytorch.callbacks.callback"), "Callback", None)
    if other is not None and not issubclass(kind, other):
        with suppress(TypeError):  # where a child of it is one of the other already, before this one
            kind.__bases__ = (*kind.__bases__, other)
