"""What stands around a user's modules: prefixes in their paths, compilation, TorchScript."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Where ``torch.compile``, FSDP and activation checkpointing keep the module that they wrap."""


def plain_path(root: nn.Module, path: str) -> str:
    """A module's path without the components that wrappers add, such as ``_orig_mod`` and DDP's ``module``."""
    parent, kept = root, []
    for part in path.split(".") if path else []:
        if not _is_wrapper(parent, part):
            kept.append(part)
        parent = getattr(parent, part)
    return ".".join(kept)


def find_module(root: nn.Module, path: str) -> str | None:
    """The full path of the module at ``path``, whether that names the wrappers or not; None if there is none."""
    paths = [full for full, _ in root.named_modules(remove_duplicate=False)]
    if path in paths:
        return path
    return next((full for full in paths if plain_path(root, full) == path), None)


def compiled_modules(root: nn.Module) -> list[str]:
    """Paths of what is compiled; hooks set after a first compiled call never fire in there."""
    found = [
        plain_path(root, path) or "the model"
        for path, module in root.named_modules()
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None
    ]
    # Lightning takes a compiled LightningModule out of its wrapper and compiles its steps instead.
    return found or (["the model"] if getattr(root, "_compiler_ctx", None) is not None else [])


def scripted_modules(root: nn.Module) -> Iterator[str]:
    """Paths of TorchScript modules that are in no other one; hooks cannot see into them."""
    inside: list[str] = []
    for path, module in root.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and not any(path.startswith(outer) for outer in inside):
            inside.append(f"{path}." if path else "")
            yield path or "the model"


def _is_wrapper(parent: nn.Module, child: str) -> bool:
    return child in _WRAPPED or (child == "module" and list(parent._modules) == ["module"])
