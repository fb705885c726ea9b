"""Run a model once more, and restore its state."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.state import HOOKS, ModelState, torch_generators
from lightning_xattn.capture.attention_mode import run_uncompiled


@contextmanager
def restoring_state(
    state: ModelState, with_hooks: bool, generators: Sequence[Tensor], model: nn.Module
) -> Iterator[None]:
    """Put a model's state back however the block ends. In the block nothing is logged, compiled or differentiated.

    Parameters
    ----------
    state
        The model's, as it is now.
    with_hooks
        Whether what has been hooked on the model's modules, and on all modules, is called.
    generators
        The states in which torch's random generators begin.
    model
        The model, whose Trainer's loggers get nothing meanwhile.
    """
    kept = vars(torch.nn.modules.module)
    everywhere = [(kept[f"_global{name}"], dict(kept[f"_global{name}"])) for name in HOOKS if f"_global{name}" in kept]
    try:
        with ExitStack() as contexts:
            contexts.enter_context(torch.no_grad())
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import is slow
                contexts.enter_context(run_uncompiled())
            state.set_gradients_aside()
            for generator, begin in zip(torch_generators(), generators, strict=False):
                generator.set_state(begin)
            contexts.enter_context(_mute_loggers(model))
            for book, _ in () if with_hooks else everywhere:
                book.clear()
            for one in state.modules:
                if not with_hooks:
                    vars(one).update({name: OrderedDict() for name in HOOKS})
                if hasattr(one, "log_dict") and hasattr(one, "log"):
                    vars(one)["log"] = vars(one)["log_dict"] = lambda *args, **kwargs: None
            yield
    except Exception:  # raised again; an error of the restoring itself replaces it, as the state is then not whole
        _restore_all(everywhere, state)
        raise
    except BaseException:  # an interrupt, which must not be lost behind what cannot be put back
        with suppress(RuntimeError):
            _restore_all(everywhere, state)
        raise
    else:
        _restore_all(everywhere, state)


@contextmanager
def _mute_loggers(model: nn.Module) -> Iterator[None]:
    """In the block the Trainer's loggers, which a step may write to, do nothing."""
    trainer: Any = vars(model).get("_trainer")
    if not getattr(trainer, "loggers", None):
        yield
        return
    from pytorch_lightning.loggers.logger import DummyLogger  # here, as without a Trainer nobody has imported it

    before = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in before]
    try:
        yield
    finally:
        trainer.loggers = before


def _restore_all(books: Sequence[tuple[dict[Any, Any], dict[Any, Any]]], state: ModelState) -> None:
    for book, before in books:
        book.clear()
        book.update(before)
    state.restore()
