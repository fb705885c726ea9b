"""Run what lies behind a fusion once more, with other tokens at its inputs; the model's state is restored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.outputs import RULED_OUT, ModelOutput, ReadOutput
from lightning_xattn.attribution.restoring import replacing_forward, restoring_state
from lightning_xattn.attribution.state import ModelState
from lightning_xattn.capture.attention_mode import AttentionMode
from lightning_xattn.capture.calls import Call, Path, Precision
from lightning_xattn.capture.readers import Edit, Event, RecordLevel

MAX_ROWS = 64
"""How many pairs are replayed in a call, at most: few enough for the caches of a CPU."""

ROUNDED = {False: (1e-3, 1e-5), True: (3e-2, torch.finfo(torch.bfloat16).eps)}
"""By whether a model computes in half precision: by how much of their standard deviation between samples logits may
differ in a replay, and by how much of the largest logit they always may, as other numbers of rows round otherwise."""


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """A call of a module around a fusion, or of the fusion, to be repeated with the tokens of other samples."""

    module: nn.Module
    call: Call
    precision: Precision
    model_output: ModelOutput
    """What the call gave."""


class ReplayError(Exception):
    """Why what lies behind a fusion cannot be replayed, as the end of a sentence."""


@dataclass(frozen=True)
class AttentionPlace:
    """The attention of a direction in what is replayed."""

    module: nn.Module
    """It is computed while this runs."""
    call: int | None
    """Which of the attentions that are computed meanwhile, from 1 on; None: the only one of its shape."""
    queries: int | None
    """Its number of queries; None: any number."""
    keys: int

    def picks(self, event: Event, number: int) -> bool:
        """Whether it is this one of those that are computed."""
        keys = event.shape[-1] - event.extra_keys
        return self.call in (None, number) and keys == self.keys and self.queries in (None, event.shape[-2])


EditRows = Callable[[Tensor], Edit]
"""Gets the indices ``(rows,)`` of the samples that are replayed in one call, and gives what to change of theirs."""


class Replay:
    """What lies behind a fusion, as a function of the tokens that enter it.

    The recorded call is repeated, with other tokens at the fusion. What runs before the fusion is skipped: its outputs
    are those of one run that is made first.

    Parameters
    ----------
    fusion
        The fusion.
    axes
        Where its tokens are among its arguments, and what goes with them; and which axis is that of the samples.
    recorded_call
        A run of a module around it.
    read
        Finds the model's output in what that module returns.

    Attributes
    ----------
    rows
        How many pairs are replayed in a call, at most.
    skips
        Whether what runs before the fusion is skipped; if not, each replay costs a whole run of the module.

    Raises
    ------
    ReplayError
        If the recorded call's samples, in another order, do not give their outputs in that order.
    """

    def __init__(
        self, fusion: nn.Module, axes: Mapping[Path, int], recorded_call: RecordedCall, read: ReadOutput
    ) -> None:
        self._fusion, self._axes, self._recorded_call, self._read = fusion, axes, recorded_call, read
        self._made: dict[nn.Module, list[Any]] = {}
        self._state: ModelState | None = None
        self.rows, self.skips, self._exactly = MAX_ROWS, True, False
        with self.keeping_state():
            self._check()

    def _check(self) -> None:
        """Find how the recorded call's samples, in another order, give their outputs in that order."""
        axes = self._axes
        entered, intact = self._run_intact()
        self._tokens = {path: entered[path] for path in axes}
        path, axis = next(iter(axes.items()))
        samples = entered[path].shape[axis]
        # Fewer rows than the recorded call has; if the model fails at that, as many; and at last nothing is skipped.
        for self.skips, self._exactly in ((True, False), (True, True), (False, True)):
            self.rows = samples if self._exactly else MAX_ROWS
            count = samples if self._exactly else (samples + 1) // 2
            order = torch.arange(samples - 1, samples - 1 - count, -1)
            try:
                again = self(
                    {
                        path: entered[path].index_select(axis, order.to(entered[path].device))
                        for path, axis in axes.items()
                    }
                )
            except ReplayError as error:
                failure = error
                continue
            if are_same_outputs(intact[order], again, self.precision):
                return
            failure = ReplayError(
                "something besides the fusion's tokens reaches the prediction, or the model differs from run to run"
            )
        raise failure

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        first: Tensor = next(iter(self._tokens.values()))
        return first.device

    @property
    def precision(self) -> torch.dtype:
        """The coarser one of the tokens' and of autocast's."""
        return self._coarsest(self._tokens.values())

    def _coarsest(self, tokens: Iterable[Tensor]) -> torch.dtype:
        kinds = [self._recorded_call.precision.dtype or torch.float32, *(one.dtype for one in tokens)]
        return max((kind for kind in kinds if kind.is_floating_point), key=lambda kind: torch.finfo(kind).eps)

    def __call__(
        self, tokens: Mapping[Path, Tensor], place: AttentionPlace | None = None, edit: EditRows | None = None
    ) -> ModelOutput:
        """The model's output for samples with these tokens.

        Parameters
        ----------
        tokens
            What stands at each of the places, with any number of samples.
        place, edit
            An attention behind the fusion's inputs, and what to change of it.

        Raises
        ------
        ReplayError
            If it does not run, or gives no output, or there is not one such attention.
        """
        path, axis = next(iter(self._axes.items()))
        samples, parts = tokens[path].shape[axis], []
        with self._in_step_conditions():
            for start in range(0, samples, self.rows):
                places = torch.arange(start, min(start + self.rows, samples))
                count = len(places)
                if self._exactly:  # repeats of the last
                    places = torch.cat([places, places[-1:].expand(self.rows - count)])
                chosen = {
                    where: one.index_select(self._axes[where], places.to(one.device)).to(self._tokens[where].device)
                    for where, one in tokens.items()
                }
                with _editing(place, edit, places):
                    parts.append(self._run(chosen)[:count])
        return ModelOutput.joined(parts)

    def compute_key_slopes(self, tokens: Mapping[Path, Tensor], place: AttentionPlace, classes: Tensor) -> Tensor:
        """The signed gradient x attention of each key: how much its weights add to the probability of a class.

        Parameters
        ----------
        tokens
            What stands at each of the places.
        place
            The attention.
        classes
            ``(samples,)`` int64.

        Returns
        -------
        Tensor
            ``(samples, keys)`` the sum over heads and queries of the weights that a key gets, each times the gradient
            of the probability by it.

        Raises
        ------
        ReplayError
            As `__call__`, or if no gradient reaches the weights.
        """
        with torch.inference_mode(False):
            again, slopes = self._passing_gradients, []
            with again.keeping_state():
                for rows in torch.arange(len(classes)).split(again.rows):
                    chosen = {
                        path: one.index_select(self._axes[path], rows.to(one.device)) for path, one in tokens.items()
                    }
                    own = {path: one.clone() for path, one in chosen.items()}
                    slopes.append(again._compute_slopes(own, place, classes[rows]))
        return torch.cat(slopes)

    @cached_property
    def _passing_gradients(self) -> Replay:
        """The same of copies, as what comes from the step may be inference tensors, which no gradient can pass."""
        call = self._recorded_call.call
        recorded_call = replace(self._recorded_call, call=call.copied({path for path, _ in call.tensors()}))
        return Replay(self._fusion, self._axes, recorded_call, self._read)

    def _compute_slopes(self, tokens: Mapping[Path, Tensor], place: AttentionPlace, classes: Tensor) -> Tensor:
        scales: list[Tensor] = []

        def weigh(rows: Tensor) -> Edit:
            scales.append(torch.ones(len(rows), place.keys, device=self.device, requires_grad=True))
            torch.set_grad_enabled(True)  # from here on, until the replay's end
            return Edit(weights=scales[0])

        total = self(tokens, place, weigh).values.gather(1, classes[:, None]).sum()
        if not total.requires_grad:
            raise ReplayError("no gradient reaches its weights")
        try:
            (slope,) = torch.autograd.grad(total, scales)
        except RuntimeError as error:  # as of a model that changes in place what the gradient needs
            raise ReplayError(f"no gradient reaches its weights: {error}") from error
        return slope[: len(classes)].cpu()

    def _run(self, tokens: Mapping[Path, Tensor]) -> ModelOutput:
        module, call = self._recorded_call.module, self._recorded_call.call
        with ExitStack() as changes:
            forward = self._fusion.forward

            def fusion(*args: Any, **kwargs: Any) -> Any:
                permuted = Call(args, kwargs).replaced(tokens)
                return forward(*permuted.args, **permuted.kwargs)

            changes.enter_context(replacing_forward(self._fusion, fusion))
            for skipped, outputs in self._made.items() if self.skips else ():
                changes.enter_context(replacing_forward(skipped, _return_first(outputs, skipped.forward)))
            try:
                output = self._read(module(*call.args, **call.kwargs))
            except ReplayError:
                raise
            except Exception as error:  # whatever a user's module raises for other tokens or another number of them
                raise ReplayError(f"it fails with other tokens: {error!r}") from error
        if output is None:
            raise ReplayError("it gives no class scores with other tokens")
        return output.cpu()

    @contextmanager
    def keeping_state(self) -> Iterator[None]:
        """Keep the model's state once, for all replays in the block to restore: nothing else runs the model meanwhile.

        Raises
        ------
        ReplayError
            If the state cannot be kept.
        """
        if self._state is not None:
            yield
            return
        call = self._recorded_call.call
        try:
            self._state = ModelState(self._recorded_call.module, call.args, call.kwargs)
        except Exception as error:  # no memory for a copy, or an object of the user's that cannot be read
            raise ReplayError(f"the model's state cannot be kept, to be restored afterwards: {error!r}") from error
        try:
            yield
        finally:
            self._state = None

    @contextmanager
    def _in_step_conditions(self) -> Iterator[None]:
        with self.keeping_state():
            assert self._state is not None
            try:
                with restoring_state(self._state, self._with_hooks), self._recorded_call.precision.entered():
                    yield
            except RuntimeError as error:
                raise ReplayError(str(error)) from error

    def _run_intact(self) -> tuple[Call, ModelOutput]:
        """What enters the fusion, and the model's output, when the recorded call is repeated as it is."""
        # Users' hooks note what a model does, and must not note this; but some change what it does.
        for self._with_hooks in (False, True):
            try:
                with self._in_step_conditions():
                    entered, intact = self._run_once()
            except ReplayError as error:
                failure = error
                continue
            if are_same_outputs(
                self._recorded_call.model_output.cpu(), intact, self._coarsest(entered[path] for path in self._axes)
            ):
                return entered, intact
            failure = ReplayError("it gives other outputs when it is run again")
        raise failure

    def _run_once(self) -> tuple[Call, ModelOutput]:
        """Repeat the recorded call as it is, and keep what is made before the fusion."""
        module, call = self._recorded_call.module, self._recorded_call.call
        entered: list[Call] = []
        running: list[nn.Module] = []
        # What ended before the fusion began, each with the modules that it ran in.
        done: list[tuple[nn.Module, Any, tuple[nn.Module, ...]]] = []

        def begin(one: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running.append(one)
            if one is self._fusion:
                entered.append(Call(args, kwargs).copied(self._axes))

        def end(one: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            running.pop()
            if not entered:
                done[:] = [other for other in done if one not in other[2]]
                done.append((one, output, tuple(running)))

        with ExitStack() as hooks:
            for one in module.modules():
                if not isinstance(one, torch.jit.ScriptModule):
                    hooks.callback(one.register_forward_pre_hook(begin, with_kwargs=True).remove)
                    hooks.callback(one.register_forward_hook(end).remove)
            try:
                found = self._read(module(*call.args, **call.kwargs))
            except Exception as error:  # whatever a user's module raises
                raise ReplayError(f"it fails when it is run again: {error!r}") from error
        if found is None or len(entered) != 1:
            raise ReplayError("it gives no class scores" if found is None else f"the fusion runs {len(entered)} times")
        by_module = defaultdict(list)
        for one, output, _ in done:
            by_module[one].append(output)
        self._made = dict(by_module)
        return entered[0], found.cpu()


def are_same_outputs(intact: ModelOutput, again: ModelOutput, precision: torch.dtype) -> bool:
    """Whether a replay gave the same logits, within what rounding does to the differences between samples.

    Logits, as a model that is sure of itself gives the same probabilities whatever reaches it.

    Parameters
    ----------
    intact, again
        Of the same samples, in the step and in the replay.
    precision
        In which the model computes, see `Replay.precision`.
    """
    logits = intact.logits.double()
    finite = logits[logits.isfinite().all(1)]
    if not len(finite):
        return True  # nothing is kept of such samples
    part, rounding = ROUNDED[precision.itemsize < 4]
    largest = float(torch.where(finite == RULED_OUT, 0, finite).abs().max())
    spread = float(finite.std(0).max()) if len(finite) > 1 else largest
    return torch.allclose(
        again.logits.double(), logits, rtol=0, atol=max(part * spread, rounding * largest), equal_nan=True
    )


def _return_first(outputs: list[Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that returns these outputs, one in each run, and then runs itself."""
    waiting = list(outputs)

    def skipped(*args: Any, **kwargs: Any) -> Any:
        return waiting.pop(0) if waiting else forward(*args, **kwargs)

    return skipped


@contextmanager
def _editing(place: AttentionPlace | None, edit: EditRows | None, rows: Tensor) -> Iterator[None]:
    """In the block an attention of these samples is changed.

    Raises
    ------
    ReplayError
        At the end, if not exactly one such attention was computed.
    """
    if place is None or edit is None:
        yield
        return
    events: list[Event] = []
    picked = 0

    def change(event: Event) -> Edit | None:
        nonlocal picked
        events.append(event)
        if not place.picks(event, len(events)):
            return None
        picked += 1
        if event.shape[0] != len(rows):
            raise ReplayError(f"an attention has {event.shape[0]} rows for {len(rows)} samples")
        return edit(rows)

    with ExitStack() as hooks:
        AttentionMode({place.module: ""}, lambda *_: RecordLevel.NOTHING, lambda *_: None, change).attach(
            place.module, hooks
        )
        yield
    if picked != 1:
        raise ReplayError(f"{picked or 'no'} attentions of its shape are computed")
