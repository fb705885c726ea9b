"""The predictions as a function of the modalities: activation patching of an evaluation's first call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.known_outputs import KnownOutputs
from lightning_xattn.attribution.outputs import ModelOutput, are_same_outputs
from lightning_xattn.attribution.ports import Column, Key, Place
from lightning_xattn.attribution.root import Intact, ReplayError, Root
from lightning_xattn.capture.attention_mode import AttentionMode
from lightning_xattn.capture.calls import Call, copy_tensors, find_tensors, replace_item, samples_axis, take_samples
from lightning_xattn.capture.events import Edit, Event, RecordLevel

MAX_ROWS = 64
"""How many pairs are replayed in a call, at most: few enough for the caches of a CPU."""

Values = Mapping[Column, Tensor]
"""What holds the modalities, and the further inputs; samples come first."""


@dataclass(frozen=True)
class AttentionPlace:
    """The attention of a direction in what is replayed.

    Attributes
    ----------
    module
        It is computed while this runs.
    call
        Which of the attentions that are computed meanwhile, from 1 on; None: the only one of its shape.
    queries, keys
        Their numbers; None: any number.
    """

    module: nn.Module
    call: int | None
    queries: int | None
    keys: int

    def picks(self, event: Event, number: int) -> bool:
        """Whether it is this one of those that are computed."""
        keys = event.shape[-1] - event.extra_keys
        return self.call in (None, number) and keys == self.keys and self.queries in (None, event.shape[-2])


EditRows = Callable[[Tensor], Edit]
"""Gets the indices ``(rows,)`` of the samples that are replayed in one call, and gives what to change of theirs."""


class _Samples(NamedTuple):
    """What is run for some samples, see ``Root.run``."""

    call: Call
    patch: dict[Place, Tensor]
    templates: dict[Key, object] | None


class Replay:
    """The predictions as a function of the modalities.

    The root runs again, in which what holds a modality returns the values of other samples instead of running. Inputs
    that reach the predictions otherwise are each sample's own.

    Parameters
    ----------
    root
        The call of an evaluation's first step.
    columns
        Where what is exchanged is in the root, and the further inputs that each sample keeps.
    intact
        What the call gave there; None: it runs once more.

    Attributes
    ----------
    rows
        How many pairs are replayed in a call, at most.
    skips
        Whether what holds the modalities does not run; if it does, each replay costs a whole run of the root.

    Raises
    ------
    ReplayError
        If the call's samples, in another order, do not give their outputs in that order.
    """

    def __init__(self, root: Root, columns: Mapping[Column, Place], intact: Intact | None = None) -> None:
        self._root, self._columns = root, columns
        self.rows, self.skips, self._exactly = MAX_ROWS, True, False
        with self._root.keeping_state():
            self._check(self._root.run_intact(columns) if intact is None else intact)

    def _check(self, run: Intact) -> None:
        """Find how the call's samples, in another order, give their outputs in that order."""
        values = {column: run.values[column] for column in self._columns}
        places, intact = {place.key for place in self._columns.values()}, run.model_output.cpu()
        self._templates = {key: output for key, output in run.outputs.items() if key in places}
        self._kinds = list(values.values())
        samples = self._root.samples
        # Fewer rows than the call has; if the model fails at that, as many; and at last nothing is skipped.
        failure = ReplayError("")
        for self.skips, self._exactly in ((True, False), (True, True), (False, True)):
            self.rows = samples if self._exactly else MAX_ROWS
            count = samples if self._exactly else (samples + 1) // 2
            order = torch.arange(samples - 1, samples - 1 - count, -1) if samples > 1 else torch.zeros(2).long()
            try:
                again = self({key: one.index_select(0, order.to(one.device)) for key, one in values.items()})
            except ReplayError as error:
                failure = error
                continue
            if are_same_outputs(intact[order], again, self.precision):
                return
            failure = ReplayError(
                "something besides the modalities reaches the prediction, or the model differs from run to run"
            )
        raise failure

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._kinds[0].device

    @property
    def precision(self) -> torch.dtype:
        """The coarser one of the modalities' and of autocast's."""
        return self._root.coarsest(self._kinds)

    def __call__(
        self, values: Values, place: AttentionPlace | None = None, edit: EditRows | None = None
    ) -> ModelOutput:
        """The model's output for samples with these values.

        Parameters
        ----------
        values
            What holds each modality, with any number of samples.
        place, edit
            An attention behind the modalities, and what to change of it.

        Raises
        ------
        ReplayError
            If it does not run, or gives no output, or there is not one such attention.
        """
        parts = []
        with self._root.restoring_once():
            for rows in self._chunks(values):
                parts.append(self._run(self._take(values, rows), rows, place, edit))
        return ModelOutput.joined(parts)

    def run_edits(self, values: Values, place: AttentionPlace, edits: Sequence[EditRows]) -> list[ModelOutput]:
        """The model's outputs for the same samples with each of several changes of an attention.

        What comes before the attention, or beside it, runs once for all, unless a whole run then gives other outputs.

        Parameters
        ----------
        values, place
            As `__call__` takes them.
        edits
            What to change of the attention, each by itself.

        Raises
        ------
        ReplayError
            As `__call__`.
        """
        if len(edits) > 2 and not self._root.changes_state:
            with suppress(ReplayError), self._root.restoring_once():
                return self._run_skipping(values, place, edits)
        return [self(values, place, edit) for edit in edits]

    def _run_skipping(self, values: Values, place: AttentionPlace, edits: Sequence[EditRows]) -> list[ModelOutput]:
        parts: list[list[ModelOutput]] = [[] for _ in edits]
        for rows in self._chunks(values):
            samples, known = self._take(values, rows), KnownOutputs(self._root.model, place.module)
            for part, edit in zip(parts, edits, strict=True):
                part.append(self._run(samples, rows, place, edit, known))
            if not int(rows[0]):  # what the model does to known tensors in place shows in the last run
                whole = self._run(self._take(values, rows), rows, place, edits[-1])
                if not are_same_outputs(whole, parts[-1][0], self.precision):
                    raise ReplayError("it gives other outputs where known ones are skipped")
        return list(map(ModelOutput.joined, parts))

    def restoring_once(self) -> AbstractContextManager[None]:
        """See ``Root.restoring_once``."""
        return self._root.restoring_once()

    def _chunks(self, values: Values) -> Iterator[Tensor]:
        """The indices of samples that are run together."""
        yield from torch.arange(len(next(iter(values.values())))).split(self.rows)

    def _take(self, values: Values, rows: Tensor) -> _Samples:
        """What is run for some samples; copies, which the model may change in place."""
        root, first = self._root, int(rows[0])
        chosen = {column: values[column][first : first + len(rows)].to(self.device) for column in self._columns}
        if self._exactly and len(rows) < self.rows:  # repeats of the last
            more = self.rows - len(rows)
            chosen = {column: torch.cat([one, one[-1:].expand(more, *one.shape[1:])]) for column, one in chosen.items()}
        patch = {
            place: chosen[column].movedim(0, place.axis).clone(memory_format=torch.contiguous_format)
            for column, place in self._columns.items()
        }
        if self._exactly:
            return _Samples(root.call, patch, self._templates if self.skips else None)
        own = torch.arange(len(rows)) % root.samples
        call = root.part(own, {place.where: one for place, one in patch.items() if place.kind == "input"})
        return _Samples(call, patch, self._cut_templates(own) if self.skips else None)

    def _run(
        self,
        samples: _Samples,
        rows: Tensor,
        place: AttentionPlace | None = None,
        edit: EditRows | None = None,
        known: KnownOutputs | None = None,
    ) -> ModelOutput:
        root, count = self._root, self.rows if self._exactly else len(rows)
        if count > len(rows):
            rows = torch.cat([rows, rows[-1:].expand(count - len(rows))])
        with root.restoring(), _editing(place, edit, rows):
            predictions, _, _ = root.run(samples.call, samples.patch, samples.templates, known=known)
            output = root.read_output(predictions)
        if len(output.values) != count:
            raise ReplayError(f"it gives {len(output.values)} predictions for {count} samples")
        return output.cpu()

    def _cut_templates(self, rows: Tensor) -> dict[Key, object]:
        """What calls return besides what is exchanged, with as many samples."""
        cut = dict(self._templates)
        exchanged = {(place.key, place.where) for place in self._columns.values() if place.kind == "output"}
        for key, output in self._templates.items():
            for path, tensor in find_tensors(output):
                axis = samples_axis(tensor, self._root.samples)
                if axis is not None and (key, path) not in exchanged:
                    cut[key] = replace_item(cut[key], path, take_samples(tensor, axis, rows))
        return cut

    def compute_key_slopes(self, values: Values, place: AttentionPlace, classes: Tensor) -> Tensor:
        """The signed gradient x attention of each key: how much its weights add to the probability of a class.

        Parameters
        ----------
        values
            What holds each modality.
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
            slopes = []
            with self._root.keeping_state():
                again = self._passing_gradients()
                for rows in torch.arange(len(classes)).split(again.rows):
                    own = {key: one.index_select(0, rows.to(one.device)).clone() for key, one in values.items()}
                    slopes.append(again._compute_slopes(own, place, classes[rows]))
        return torch.cat(slopes)

    def _passing_gradients(self) -> Replay:
        """The same of copies, as what comes from the step may be inference tensors, which no gradient can pass."""
        again, call = copy(self), self._root.call
        again._root = self._root.of_copies(call.copied(dict(call.tensors())))
        again._templates = {key: copy_tensors(output) for key, output in self._templates.items()}
        return again

    def _compute_slopes(self, values: Values, place: AttentionPlace, classes: Tensor) -> Tensor:
        scales: list[Tensor] = []

        def weigh(rows: Tensor) -> Edit:
            scales.append(torch.ones(len(rows), place.keys, device=self.device, requires_grad=True))
            torch.set_grad_enabled(True)  # from here on, until the replay's end
            return Edit(weights=scales[0])

        total = self(values, place, weigh).values.gather(1, classes[:, None]).sum()
        if not total.requires_grad:
            raise ReplayError("no gradient reaches its weights")
        try:
            (slope,) = torch.autograd.grad(total, scales, allow_unused=True)
        except RuntimeError as error:  # as of a model that changes in place what the gradient needs
            raise ReplayError(f"no gradient reaches its weights: {error}") from error
        if slope is None:
            raise ReplayError("the predictions do not depend on its weights")
        return slope[: len(classes)].cpu()

    def keeping_state(self) -> AbstractContextManager[None]:
        """See ``Root.keeping_state``."""
        return self._root.keeping_state()


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

    with ExitStack() as changes:
        AttentionMode({place.module: ""}, lambda *_: RecordLevel.NOTHING, lambda *_: None, change).attach(changes)
        yield
    if picked != 1:
        raise ReplayError(f"{picked or 'no'} attentions of its shape are computed")
