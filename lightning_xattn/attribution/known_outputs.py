"""What calls of modules gave for some samples: a replay that changes an attention need not run what comes before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.ports import Key
from lightning_xattn.capture.attention_mode import walk_modules
from lightning_xattn.capture.calls import Call, find_tensors

BUDGET = 2**28
"""How many bytes of outputs are kept at most: those of some dozen samples, until all changes of these have run."""

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


class KnownOutputs:
    """The outputs of calls by what they got, for several runs of the same samples in which one attention changes.

    A call that gets the very tensors of an earlier run gives what it gave then, and does not run. Nothing of the
    attention's module is skipped, nor what that module is part of. A run may still differ from one in which all calls
    run, as where a module leaves something in an attribute: see ``Replay.run_edits``, which compares the two.

    Parameters
    ----------
    model
        The whole model.
    attending
        The module in which the attention changes.
    """

    def __init__(self, model: nn.Module, attending: nn.Module) -> None:
        paths = {module: path for path, module in walk_modules(model)}
        own = f"{paths.get(attending, '')}."
        self.paths: Mapping[nn.Module, str] = {
            module: path
            for module, path in paths.items()
            if path and not f"{path}.".startswith(own) and not own.startswith(f"{path}.")
        }
        # By call what it got and gave; None: it gets other tensors in each run.
        self._known: dict[Key, tuple[Call, Any] | None] = {}
        self._left, self._is_inside = BUDGET, False

    def run(self, key: Key, forward: Callable[..., Any], call: Call) -> Any:
        """What a call gives: what it gave before, if it gets the same; else it runs."""
        if self._is_inside:
            return forward(*call.args, **call.kwargs)
        if key in self._known:
            known = self._known[key]
            if known is not None and _are_same(known[0].args, call.args) and _are_same(known[0].kwargs, call.kwargs):
                return known[1]
            self._known[key] = None
            return forward(*call.args, **call.kwargs)
        self._is_inside = True  # the calls that it makes are known with it
        try:
            output = forward(*call.args, **call.kwargs)
        finally:
            self._is_inside = False
        self._left -= sum(tensor.nbytes for _, tensor in find_tensors(output))
        self._known[key] = (call, output) if self._left > 0 else None
        return output


def _are_same(one: Any, other: Any) -> bool:
    """Whether two arguments hold the very same tensors and equal numbers; False of what may have changed meanwhile."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one is other
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_are_same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_are_same(value, other[key]) for key, value in one.items())
    return isinstance(one, _PLAIN) and bool(one == other)
