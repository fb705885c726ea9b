"""What modalities are called: by the modules that produce them, by arguments and by keys of the batch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_xattn.attribution.ports import RESERVED_MODALITIES

_DECORATION = frozenset(
    [
        "encoder",
        "enc",
        "encode",
        "proj",
        "projection",
        "projector",
        "embed",
        "embedding",
        "embeddings",
        "embedder",
        "net",
        "network",
        "backbone",
        "model",
        "module",
        "branch",
        "stream",
        "tower",
        "features",
        "feature",
        "feat",
        "extractor",
        "layer",
        "layers",
        "block",
        "linear",
        "fc",
        "mlp",
        "cnn",
        "rnn",
        "lstm",
        "gru",
        "transformer",
        "in",
        "input",
        "inputs",
        "x",
        "ids",
        "id",
        "tokens",
        "token",
        "raw",
        "data",
        "values",
        "batch",
        "mask",
        "masks",
        "attention",
        "padding",
        "pad",
        "key",
        "lengths",
        "length",
        "norm",
        "conv",
        "head",
        "to",
        "pooler",
        "graphs",
    ]
)
"""Words of paths and keys that name no modality."""


def plain_name(label: str) -> str:
    """The words of a path or key that may name a modality, ``"audio"`` of ``"model.audio_encoder.proj"``."""
    for part in reversed(re.split(r"[.\[\]]+", label)):
        words = [word for word in re.split(r"_|(?<=[a-z])(?=[A-Z])", part.strip("_'\"")) if word]
        kept = [word.lower() for word in words if word.lower() not in _DECORATION and not word.isdigit()]
        if kept and re.search("[a-z]", kept[0]):
            return "_".join(kept)
    return ""


def name_groups(groups: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[str]:
    """A name for each group of the paths of its modules and the names of its inputs.

    The modules' come first, unless they are single letters or the same for several groups.
    """
    by_module = [next(filter(None, map(plain_name, modules)), "") for modules, _ in groups]
    by_input = [next(filter(None, map(plain_name, inputs)), "") for _, inputs in groups]
    whole = [next(iter([*modules, *inputs]), "modality").replace(".", "_") for modules, inputs in groups]
    whole = [re.sub(r"[/\s\[\]']+", "_", one).strip("_") for one in whole]
    for names, least in ((by_module, 2), (by_input, 2), (whole, 1)):
        usable = all(len(name) >= least and name not in RESERVED_MODALITIES for name in names)
        if usable and len(set(names)) == len(names):
            return list(names)
    return [f"{name}_{number}" for number, name in enumerate(whole, start=1)]


def are_alike(name: str, other: str) -> bool:
    """Whether two names may be of one modality: one is the beginning of the other, or has it as a word."""
    one, two = name.lower(), other.lower()
    return one.startswith(two) or two.startswith(one) or one in two.split("_") or two in one.split("_")
