"""What stands around a user's modules: prefixes in their paths, compilation, TorchScript."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightning_xattn.capture.attention_mode import step_into, walk_modules

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Where ``torch.compile``, FSDP and activation checkpointing keep the module that they wrap."""


def plain_path(root: nn.Module, path: str) -> str:
    """A module's path without the components that wrappers add, such as ``_orig_mod`` and DDP's ``module``."""
    parent: Any = root
    kept = []
    for part in path.split(".") if path else []:
        is_wrapper = part == "module" and isinstance(parent, nn.Module) and list(parent._modules) == ["module"]
        if part not in _WRAPPED and not is_wrapper:
            kept.append(part)
        parent = step_into(parent, part)
    return ".".join(kept)


def find_module(root: nn.Module, path: str) -> str | None:
    """The full path of the module at ``path``, whether that names the wrappers or not; None if there is none."""
    paths = [full for full, _ in root.named_modules(remove_duplicate=False)]
    if path in paths:
        return path
    paths += [full for full, _ in walk_modules(root) if full not in paths]
    return next((full for full in paths if plain_path(root, full) == path), None)


def compiled_modules(root: nn.Module) -> list[str]:
    """Paths of what is compiled; calls in there are not seen."""
    found = [
        plain_path(root, path) or "the model"
        for path, module in root.named_modules()
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None
    ]
    # Lightning takes a compiled LightningModule out of its wrapper and compiles its steps instead.
    return found or (["the model"] if getattr(root, "_compiler_ctx", None) is not None else [])


def scripted_modules(root: nn.Module) -> Iterator[str]:
    """Paths of TorchScript modules that are in no other one; whose calls Python does not see."""
    inside: list[str] = []
    for path, module in root.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and not any(path.startswith(outer) for outer in inside):
            inside.append(f"{path}." if path else "")
            yield path or "the model"
