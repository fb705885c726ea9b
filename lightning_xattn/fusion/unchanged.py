"""Run a model once more, and leave it as it was."""

from __future__ import annotations

import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_xattn.capture.wrappers import run_uncompiled


@contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another forward."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
"""Where a module keeps the hooks of its forward; torch keeps those of all modules alike."""

_HOLDERS = (list, deque, set, dict, OrderedDict, defaultdict)
"""What is emptied and filled again."""


@contextmanager
def left_as_it_was(module: nn.Module, with_hooks: bool) -> Iterator[None]:
    """Whatever a forward does to random numbers, buffers and attributes is undone; nothing is logged or compiled.

    Attributes are what a module refers to, the tensors there, such as the states of metrics, and the contents of its
    lists, dicts and sets; not what lies deeper.

    Without hooks what has been hooked on the module, and on all modules, is not called.
    """
    kept = vars(torch.nn.modules.module)
    everywhere = [kept[f"_global{name}"] for name in _HOOKS if f"_global{name}" in kept]
    books = [
        (book, dict(book))
        for one in module.modules()
        for book in (vars(one), one._buffers, one._parameters, one._modules)
    ] + [(book, dict(book)) for book in everywhere]
    attributes = [value for one in module.modules() for value in vars(one).values()]
    held = [one for value in attributes if isinstance(value, list) for one in value]
    tensors = [(one, one.clone()) for one in (*module.buffers(), *attributes, *held) if isinstance(one, Tensor)]
    holders = [(value, copy(value)) for value in attributes if type(value) in _HOLDERS]
    try:
        with ExitStack() as contexts:
            contexts.enter_context(isolate_rng())
            contexts.enter_context(torch.no_grad())
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import is slow
                contexts.enter_context(run_uncompiled())
            for book in () if with_hooks else everywhere:
                book.clear()
            for one in module.modules():
                if not with_hooks:
                    vars(one).update({name: OrderedDict() for name in _HOOKS})
                if hasattr(one, "log_dict") and hasattr(one, "log"):
                    vars(one)["log"] = vars(one)["log_dict"] = lambda *args, **kwargs: None
            yield
    finally:
        for book, before in books:
            book.clear()
            book.update(before)
        for holder, content in holders:
            holder.clear()
            holder.extend(content) if isinstance(holder, (list, deque)) else holder.update(content)
        for tensor, content in tensors:
            if not tensor.equal(content):
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(content)
