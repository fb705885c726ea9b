"""The context manager that owns every hook on a model and holds the current batch's attention."""

from __future__ import annotations

import warnings
from collections import defaultdict
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from lightning_xattn.attention import Attention, AttentionPair, Direction
from lightning_xattn.capture.discovery import AttentionPaths, locate_attention
from lightning_xattn.capture.sources import RecordedWeights, watch_multihead_attention
from lightning_xattn.errors import DiscoveryError, XAttnWarning


class AttentionRecorder:
    """Record the cross-attention of a model while it runs; the model's outputs stay bit for bit the same.

    Parameters
    ----------
    model
        Any module; its cross-attention layers are found at once, nothing is hooked yet.
    attention
        Module paths by direction, seen from ``model``; None: found by name (see ``locate_attention``).

    Raises
    ------
    DiscoveryError, SettingError
        As ``locate_attention``.

    Examples
    --------
    >>> with AttentionRecorder(model) as recorder:
    ...     model(batch)
    >>> recorder.attention[0].forward.weights.shape  # (batch, heads, queries, keys)
    """

    def __init__(self, model: nn.Module, attention: AttentionPaths | None = None) -> None:
        self.layers = locate_attention(model, attention)
        self._model = model
        self._hooks = ExitStack()
        self._calls: dict[str, list[RecordedWeights]] = defaultdict(list)
        self.output: Any = None
        """What the model's own ``forward`` returned first since the last ``clear``; None if it did not run."""

    def __enter__(self) -> AttentionRecorder:
        self.clear()
        # Hooks set before a failure half way leave with this stack; only a complete set is kept.
        with ExitStack() as hooks:
            for layer in self.layers:
                for _, path in layer.sites:
                    module = self._model.get_submodule(path)
                    assert isinstance(module, nn.MultiheadAttention)
                    watch_multihead_attention(module, partial(self._record, path), hooks)
            hooks.callback(self._model.register_forward_hook(self._keep_output).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook. What was recorded stays until ``clear``; closing twice is harmless."""
        self._hooks.close()

    def clear(self) -> None:
        """Forget what was recorded."""
        self._calls.clear()
        self.output = None

    @property
    def attention(self) -> tuple[AttentionPair, ...]:
        """What was recorded since the last ``clear``, one pair a layer; a layer that did not run is left out.

        Of a module that ran more than once, as with test-time augmentation, it is the first run, and a warning says so.

        Raises
        ------
        DiscoveryError
            If only one direction of a pair ran.
        ShapeError
            If the two directions of a layer do not fit each other.
        """
        pairs = []
        for layer in self.layers:
            ran = [path for _, path in layer.sites if self._calls.get(path)]
            if not ran:
                continue
            recorded = [self._first_call(layer.layer, direction, path) for direction, path in layer.sites]
            pairs.append(_pair(layer.layer, [direction for direction, _ in layer.sites], recorded))
        return tuple(pairs)

    def _record(self, path: str, call: RecordedWeights) -> None:
        self._calls[path].append(call)

    def _keep_output(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.output is None:
            self.output = output

    def _first_call(self, layer: str, direction: Direction, path: str) -> RecordedWeights:
        calls = self._calls.get(path, [])
        if not calls:
            raise DiscoveryError(
                f"Module '{path}' ({direction} of layer '{layer}') did not run, but its opposite direction did. Name "
                "the modules to record: attention={'<a>_to_<b>': 'path', ...}."
            )
        if len(calls) > 1:
            warnings.warn(
                f"Module '{path}' ran {len(calls)} times in one step; its first run is shown.",
                XAttnWarning,
                stacklevel=3,
            )
        return calls[0]


def _pair(layer: str, directions: list[Direction], recorded: list[RecordedWeights]) -> AttentionPair:
    """A token that is padding as a key of one direction is padding as a query of the other."""
    # Without an opposite direction nothing says which queries are padding.
    opposites = recorded[::-1] if len(recorded) == 2 else [None]
    attentions = [
        Attention(
            direction,
            call.weights,
            key_mask=call.key_mask,
            visible=call.visible,
            query_mask=None if opposite is None else _token_mask(opposite),
            extra_keys=call.extra_keys,
        )
        for direction, call, opposite in zip(directions, recorded, opposites, strict=True)
    ]
    return AttentionPair(layer, *attentions)


def _token_mask(call: RecordedWeights) -> Tensor | None:
    if call.key_mask is None:
        return None
    return call.key_mask[:, : call.key_mask.shape[1] - call.extra_keys]
