"""Where labels stand in a step, as a setting names it or as a first batch shows it by form and by what losses read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, reduce
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_xattn.capture.calls import (
    Loss,
    StepTrace,
    find_leaves,
    find_tensors,
    get_item,
    output_at,
    same_numbers,
)
from lightning_xattn.capture.calls import Path as KeyPath
from lightning_xattn.capture.sources import Source
from lightning_xattn.capture.tensors import are_same
from lightning_xattn.capture.wrappers import find_module, plain_path
from lightning_xattn.core.errors import DiscoveryError, SettingError

LabelSetting = str | Callable[..., Any] | None
"""None: look in the usual places; a key of the outputs, the batch or what ``forward`` returned, or of a dict in them; a
field of a dataclass or NamedTuple, an attribute of a graph's batch; a module's path, for what it returns; or a
callable ``(outputs, batch) -> tensor`` or ``(outputs, batch, forward) -> tensor``."""


PREDICTION_KEYS = ("logits", "probabilities", "probs", "predictions", "preds", "y_hat", "y_pred")


TARGET_KEYS = ("targets", "target", "labels", "label", "y")


ID_KEYS = {"sample_ids": ("sample_ids", "sample_id"), "groups": ("groups", "patient_ids")}


_OF_VALUES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "gaussian_nll_loss", "poisson_nll_loss")
"""Losses of numbers, which read no class scores."""


UNLABELLED = (-1, -100)
"""Class ids that usually mean "no label"; -100 is what torch's losses ignore."""


@dataclass(frozen=True)
class Step:
    """What there is to find labels in.

    Attributes
    ----------
    outputs
        What the step returned.
    batch
        The batch.
    forward
        What the module's own ``forward`` returned, or None.
    samples
        Number of samples, from the attention.
    device
        Where the attention is; labels are moved there.
    tokens
        Number of queries and of keys of the attention.
    loss_of_several
        The path of a loss in the model that is one for several labels at once; "" without.
    trace
        The calls of modules and what losses read.
    model
        The model, whose modules may be named.
    """

    outputs: Any
    batch: Any
    forward: Any
    samples: int
    device: torch.device | str = "cpu"
    tokens: tuple[int, ...] = ()
    loss_of_several: str = ""
    trace: StepTrace | None = None
    model: nn.Module | None = None

    @property
    def losses(self) -> Sequence[Loss]:
        """What losses of the step read, as far as that is traced."""
        return () if self.trace is None else self.trace.losses

    def __str__(self) -> str:
        return (
            f"The step has {self.samples} samples, and it returned {describe(self.outputs)}; the batch is "
            f"{describe(self.batch)}; forward returned {describe(self.forward)}."
        )


@dataclass(frozen=True)
class Place:
    """Where something is found in a step: a name for people, how to read it, and the key that it stands under."""

    name: str
    get: Callable[[Step], Any]
    key: str | int | None = None
    module: str | None = None
    """The path of the module that returns it."""
    is_loss: bool = False
    """Whether a loss reads it."""
    select: Callable[[Any, Any, Any], Any] | None = None
    """The user's function of (outputs, batch, forward), if it is one; its errors are theirs."""

    def read(self, step: Step) -> Any:
        """What stands there, class ids of any form as a tensor ``(batch,)``; None in a step of another form."""
        try:
            return to_labels(self.get(step))
        except (KeyError, IndexError, TypeError, AttributeError):
            if self.select is not None:
                raise
            return None


def to_labels(value: Any) -> Any:
    """Arrays and lists of numbers as tensors, and class ids ``(batch, 1)`` as ``(batch,)``; anything else as it is."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
        value = torch.from_numpy(value)
    elif isinstance(value, (list, tuple)) and value and all(isinstance(one, (bool, int, float)) for one in value):
        value = torch.tensor(value)
    elif isinstance(value, (list, tuple)) and value and all(isinstance(one, Tensor) and not one.dim() for one in value):
        value = torch.stack(list(value))
    is_column = isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == 1
    return value[:, 0] if is_column and not value.is_floating_point() else value


def are_ids(value: Any, samples: int) -> bool:
    """Class ids ``(batch,)``."""
    whole = isinstance(value, Tensor) and not (value.is_floating_point() or value.dtype == torch.bool)
    return whole and tuple(value.shape) == (samples,)


def are_rows(value: Any, samples: int) -> bool:
    """One column a class, ``(batch, classes)``."""
    rows = isinstance(value, Tensor) and value.dim() == 2 and value.dtype != torch.bool
    return rows and len(value) == samples and value.shape[1] > 1


def are_predictions(value: Any, samples: int) -> bool:
    """Class scores or class ids."""
    return (are_rows(value, samples) and value.is_floating_point()) or are_ids(value, samples)


def are_single(value: Any, samples: int) -> bool:
    """One number a sample, ``(batch,)`` or ``(batch, 1)``: the score of a binary head, or a regression."""
    return isinstance(value, Tensor) and tuple(value.shape) in ((samples,), (samples, 1))


def are_single_scores(value: Any, samples: int) -> bool:
    """One floating number a sample."""
    return are_single(value, samples) and value.is_floating_point()


def are_binary_labels(value: Any, samples: int, guessed: bool) -> bool:
    """Labels of two classes, 0 and 1, of any type; ``UNLABELLED`` ones too. Looks at the values.

    Where -1 and 1 occur but no 0, -1 may be the other class: such labels are refused. Floating numbers that are
    merely guessed to be labels must show both classes, as those to regress may all be 0.
    """
    if not are_single(value, samples):
        return False
    negative, positive = value == 0, value == 1
    unlabelled = torch.stack([value == label for label in UNLABELLED]).any(0)
    certain = negative.any() | ~(value == -1).any()
    if guessed and value.is_floating_point():
        certain &= negative.any() & positive.any()
    return bool((negative | positive | unlabelled).all() & (negative | positive).any() & certain)


def are_shares(rows: Tensor) -> bool:
    """Soft or one-hot labels; several labels at once, or numbers to regress, are not. Looks at the values."""
    return bool((rows >= 0).all() and ((rows.float().sum(1) - 1).abs() < 1e-3).all())


def are_several(rows: Tensor) -> bool:
    """Several labels at once: shares between 0 and 1 of which rows do not sum to 1. Looks at the values."""
    return bool(((rows >= 0) & (rows <= 1)).all()) and not are_shares(rows)


def count_samples(found: Any) -> int | None:
    """For how many samples there are ids; None for what is no sequence of ids."""
    if isinstance(found, Tensor):
        return len(found) if found.dim() and found.numel() == len(found) else None
    return len(found) if hasattr(found, "__len__") and not isinstance(found, (str, bytes, Mapping)) else None


def named_place(name: str, setting: LabelSetting) -> Place | None:
    """The place that a setting names; None without one.

    Raises
    ------
    SettingError
        If it names no place for labels.
    """
    if setting is None:
        return None
    if isinstance(setting, str) and setting:
        return Place(f"the key '{setting}'", partial(_read_named, setting), setting)
    if not callable(setting):
        raise SettingError(f"{name} must be None, a key or a callable; got {setting!r}.")
    select = setting if _takes_forward(name, setting) else _without_forward(setting)
    return Place("the callable", lambda step: select(step.outputs, step.batch, step.forward), select=select)


def _takes_forward(name: str, function: Callable[..., Any]) -> bool:
    """Whether a setting's function asks for a third argument, or takes any number."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # as of some built-in ones
        return False
    takes_any = any(one.kind is one.VAR_POSITIONAL for one in signature.parameters.values())
    for count in (3, 2) if takes_any else (2, 3):
        with suppress(TypeError):
            signature.bind(*range(count))
            return count == 3
    raise SettingError(
        f"{name} must take (outputs, batch) or (outputs, batch, forward); its callable takes {signature}."
    )


def _without_forward(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    return lambda outputs, batch, forward: function(outputs, batch)


def _read_named(setting: str, step: Step) -> Any:
    """What stands under a key, or is what a module returned."""
    for holder in (step.outputs, step.batch, step.forward):
        found = _look_up(holder, setting)
        if found is not None:
            return found
    named = None if step.model is None else module_named(step.model, setting)
    if named is None or step.trace is None:
        return None
    path, item, turn = named
    run = step.trace.find(path, turn)
    tensors = {} if run is None else {leaf: one for leaf, one in run.tensors.items() if leaf[: len(item)] == item}
    fitting = [one for one in tensors.values() if are_predictions(one, step.samples) or are_single(one, step.samples)]
    if len(fitting) > 1:
        items = " or ".join(f"'{_name_output(step.model, path, 0, leaf)}'" for leaf in tensors)
        raise DiscoveryError(f"'{setting}' returns several tensors with a value for each sample: name one, {items}.")
    return fitting[0] if fitting else None


def module_named(model: nn.Module, setting: str) -> tuple[str, tuple[int | str, ...], int] | None:
    """The module that a setting names, the item of what it returns, and the number of its call; None if it is none.

    ``"path"``, ``"path[item]"``, ``"path#2"``; "forward" is the model's own.
    """
    try:
        source = Source.parse(setting)
    except SettingError:
        return None
    path = find_module(model, source.path)
    if path is None and source.path == "forward":
        path = ""
    return None if path is None else (path, source.item, (source.call or 1) - 1)


def _name_output(model: nn.Module | None, path: str, turn: int, leaf: KeyPath) -> str:
    """A tensor that a module returns, as a setting names it."""
    name = (path if model is None else plain_path(model, path)) or "forward"
    return name + (f"#{turn + 1}" if turn else "") + "".join(f"[{key}]" for key in leaf)


def _look_up(holder: Any, key: str) -> Any:
    """What a mapping has under a key, or a dataclass, NamedTuple or graph as an attribute; also in what it holds."""
    if isinstance(holder, Mapping):
        if key in holder:
            return holder[key]
    elif not isinstance(holder, (Tensor, list, str, bytes, nn.Module)) and holder is not None:
        found = None if key.startswith("_") or not key.isidentifier() else getattr(holder, key, None)
        if found is not None and not callable(found):
            return found
    if isinstance(holder, (Mapping, list, tuple)):
        items = holder.values() if isinstance(holder, Mapping) else holder
        for item in items:
            found = _look_up(item, key) if isinstance(item, Mapping) else None
            if found is not None:
                return found
    return None


def _find_usual_key(step: Step, sources: tuple[str, ...], keys: tuple[str, ...]) -> Place | None:
    """The place under a usual key, the first in the order of sources and keys."""
    found = (
        Place(f"{source}['{key}']", partial(_read_item, source, key), key)
        for source in sources
        for key in keys
        if _look_up(getattr(step, source), key) is not None
    )
    return next(found, None)


def list_items(step: Step, source: str) -> list[Place]:
    """The items of a mapping, tuple or list, or the thing itself."""
    holder = getattr(step, source)
    if isinstance(holder, Mapping):
        keys = () if source == "batch" else holder  # those of a batch name inputs, too
        return [Place(f"{source}['{key}']", partial(_read_item, source, key), key) for key in keys]
    if isinstance(holder, (tuple, list)):
        return [Place(f"{source}[{i}]", partial(_read_item, source, i)) for i in range(len(holder))]
    return [Place(source, attrgetter(source))]


def _read_item(source: str, key: str | int, step: Step) -> Any:
    holder = getattr(step, source)
    if isinstance(holder, Tensor):
        return None  # an item of a tensor would be a sample
    return _look_up(holder, key) if isinstance(key, str) else holder[key]


def guess_ids(step: Step, what: str) -> Place | None:
    """Where a step has "sample_ids" or "groups", one for each sample."""
    place = _find_usual_key(step, ("batch", "outputs"), ID_KEYS[what])
    return place if place is not None and count_samples(place.read(step)) == step.samples else None


def guess_predictions(step: Step) -> Place | str | None:
    """Where a step has predictions: in what it returned, or else in what its loss reads.

    Returns
    -------
    Place, str or None
        A message where more than one thing can be meant; None where there is nothing.
    """

    def fitting(places: Sequence[Place]) -> list[Place]:
        """Those of class scores or ids; where there are none, those of one number a sample."""
        for fits in (are_predictions, are_single_scores):
            found = [place for place in places if fits(place.read(step), step.samples)]
            if found:
                return found
        return []

    keyed = _find_usual_key(step, ("outputs",), PREDICTION_KEYS)
    if keyed is not None:
        # Named as predictions: if these do not fit, nothing else is meant.
        return next(iter(fitting([keyed])), None)
    read = _find_read_by_losses(step)
    given = [place for place in list_items(step, "outputs") if place.key not in TARGET_KEYS]
    given = fitting([place for place in given if _is_given(step, place.read(step), read)])
    if given:
        return given[0] if len(given) == 1 else None
    if len(read) > 1:
        settings = " or ".join(f"predictions='{place.name}'" for place in read if place.module)
        return (
            f"The losses read several tensors with scores of the samples: {', '.join(place.name for place in read)}. "
            f"Say which are the predictions: {settings or 'return them from the step, or give predictions=<callable>'}."
        )
    if _list_losses(step):
        return next(iter(read), None)
    keyed = _find_usual_key(step, ("forward",), PREDICTION_KEYS)
    found = fitting([] if keyed is None else [keyed]) or fitting(list_items(step, "forward"))
    taken = [place for place in found if step.trace is None or _is_among(place.read(step), step.trace.read)]
    if found and len(taken) != 1:
        names = " or ".join(f"predictions='{place.key or 'forward'}'" for place in found)
        return (
            f"{' and '.join(place.name for place in found)} may be predictions, but no loss and no metric of the step "
            f"reads them, and it does not return them: {names} says that they are."
        )
    return next(iter(taken), None)


def _is_among(value: Tensor, others: Iterable[Tensor]) -> bool:
    return any(same_numbers(value, one) for one in others)


def _is_given(step: Step, value: Any, read: Sequence[Place]) -> bool:
    """Whether what a step returns under no usual key is what its loss reads, or follows from it.

    Without a loss it is what a step returns by itself, or in a dict what the model's own forward gave.
    """
    if not isinstance(value, Tensor):
        return False
    if not read and not isinstance(step.outputs, Mapping):
        return True
    others = [one.read(step) for one in read] or [one for _, one in find_tensors(step.forward)]
    return any(_follows_from(value, one) for one in others if isinstance(one, Tensor))


def _follows_from(value: Tensor, scores: Tensor) -> bool:
    """Whether a tensor is these scores, their probabilities, or the classes that they predict."""
    return _is_same_scores(value, scores) or _is_among(value, _predict(scores))


def _is_same_scores(value: Tensor, scores: Tensor) -> bool:
    """Whether a tensor is these scores or their probabilities."""
    made = [scores]
    if scores.is_floating_point():
        made += [scores.sigmoid()]
        made += [scores.softmax(1)] if scores.dim() == 2 and scores.shape[1] > 1 else []
    return _is_among(value, made)


def _predict(scores: Tensor) -> list[Tensor]:
    """The classes that scores may predict."""
    if not scores.is_floating_point():
        return []
    has_classes = scores.dim() == 2 and scores.shape[1] > 1
    return [(scores > 0).long(), (scores > 0.5).long(), *([scores.argmax(1)] if has_classes else [])]


def _list_losses(step: Step) -> list[tuple[int, Loss]]:
    """The losses of a step with their numbers, without those that compare samples with each other.

    The target of a contrastive loss is each sample's own number, which the batch does not hold.
    """

    def is_contrastive(loss: Loss) -> bool:
        scores, target = loss.input, loss.target
        if not isinstance(target, Tensor) or target.dim() != 1 or tuple(scores.shape) != (len(target),) * 2:
            return False
        own = torch.arange(len(target), device=target.device)
        leaves = (to_labels(leaf) for _, leaf in find_leaves(step.batch))
        return target.equal(own) and not _is_among(target, (leaf for leaf in leaves if isinstance(leaf, Tensor)))

    return [(number, loss) for number, loss in enumerate(step.losses) if not is_contrastive(loss)]


def _find_read_by_losses(step: Step) -> list[Place]:
    """The places of the tensors that losses read as predictions, each once.

    What a loss compares them with is one of these, too, where a module gave it, as of a teacher.
    """
    found: list[tuple[Tensor, Place]] = []
    of_classes = {tuple(loss.input.shape) for loss in step.losses if loss.name not in _OF_VALUES}
    for number, loss in _list_losses(step):
        given = [(loss.input, loss.name not in _OF_VALUES)]
        is_taught = isinstance(loss.target, Tensor) and loss.target.is_floating_point()
        if is_taught and _find_output(step, loss.target) is not None:
            given = [(one, not of_classes or tuple(one.shape) in of_classes) for one in (loss.input, loss.target)]
        for tensor, is_score in given:
            is_single = are_single_scores(tensor, step.samples)
            fits = is_single or (is_score and are_predictions(tensor, step.samples))
            if fits and not _is_among(tensor, (other for other, _ in found)):
                found.append(
                    (tensor, _find_output(step, tensor) or _place_of_loss(step, number, tensor is not loss.input))
                )
    return [place for _, place in found]


def _find_output(step: Step, tensor: Tensor) -> Place | None:
    """The outermost call that returned a tensor, the very one or the same numbers."""
    runs = [] if step.trace is None else step.trace.runs
    outermost_first = sorted(runs, key=lambda run: sum(1 for _ in run.outwards()))
    given = [(run, leaf, one) for run in outermost_first for leaf, one in run.tensors.items()]
    found = [(run, leaf) for run, leaf, one in given if are_same(one.detach(), tensor)]
    found = found or [(run, leaf) for run, leaf, one in given if same_numbers(one, tensor)]
    if not found:
        return None
    run, leaf = found[0]
    turn = [other for other in runs if other.path == run.path].index(run)
    return Place(
        _name_output(step.model, run.path, turn, leaf), partial(_read_output, run.path, turn, leaf), module=run.path
    )


def _read_output(path: str, turn: int, leaf: KeyPath, step: Step) -> Tensor | None:
    return None if step.trace is None else output_at(step.trace.find(path, turn), leaf)


def _place_of_loss(step: Step, number: int, is_target: bool) -> Place:
    """What a loss reads, in steps that compute the same losses in the same order."""
    names = tuple(loss.name for loss in step.losses)
    name = f"what {names[number]} {'compares with' if is_target else 'reads'}"
    return Place(name, partial(_read_loss, number, is_target, names), is_loss=True)


def _read_loss(number: int, is_target: bool, names: tuple[str, ...], step: Step) -> Any:
    if tuple(loss.name for loss in step.losses) != names:
        return None
    return step.losses[number].target if is_target else step.losses[number].input


def guess_targets(step: Step, scores: Any) -> Place | None:
    """Where a step has targets that go with its scores; None where nothing, or more than one thing, can be meant."""
    classes = scores.shape[1] if are_rows(scores, step.samples) else None

    def fits(place: Place) -> bool:
        value = place.read(step)
        if are_single_scores(scores, step.samples):
            return are_binary_labels(value, step.samples, guessed=True)
        if are_rows(value, step.samples):
            return classes in (None, value.shape[1]) and are_shares(value)
        # Numbers beyond the classes, such as lengths, are no class ids.
        return are_ids(value, step.samples) and bool(value.max() < (classes or torch.inf))

    # A step may change the labels of its batch before its loss compares them, as from 1, 2, ... to 0, 1, ....
    compared = _find_compared(step, scores)
    if compared is not None and fits(compared):
        return compared
    keyed = _find_usual_key(step, ("outputs", "batch"), TARGET_KEYS)
    if keyed is not None:
        return keyed if fits(keyed) else None
    fitting = list(filter(fits, list_items(step, "batch")))
    return fitting[0] if len(fitting) == 1 and compared is None else None


def _find_compared(step: Step, scores: Any) -> Place | None:
    """Where what a loss compares these scores with is: in the batch, or in the loss itself."""
    losses = _list_losses(step)
    of_scores = [] if not isinstance(scores, Tensor) else [p for p in losses if _is_same_scores(scores, p[1].input)]
    if not of_scores and isinstance(scores, Tensor):
        # Two heads that are not trained yet may predict the same classes: then class ids do not show whose they are.
        of_scores = [pair for pair in losses if _is_among(scores, _predict(pair[1].input))]
        if any(not same_numbers(pair[1].target, of_scores[0][1].target) for pair in of_scores[1:]):
            return None
    number, chosen = of_scores[0] if of_scores else losses[0] if len(losses) == 1 else (0, None)
    target = None if chosen is None else to_labels(chosen.target)
    if chosen is None or not isinstance(target, Tensor) or _find_output(step, target) is not None:
        return None
    leaves = {path: to_labels(leaf) for path, leaf in find_leaves(step.batch)}
    tensors = {path: one for path, one in leaves.items() if isinstance(one, Tensor)}
    found = [path for path, one in tensors.items() if are_same(one, target)]
    found = found or [path for path, one in tensors.items() if same_numbers(one.float(), target.float())]
    named = [path for path in found if path and path[-1] in TARGET_KEYS]
    for paths in (named, found):
        if len(paths) == 1:
            name = "batch" + "".join(f"[{key!r}]" for key in paths[0])
            return Place(name, partial(_read_batch, paths[0]), paths[0][-1] if paths[0] else None)
    return _place_of_loss(step, number, True) if of_scores else None


def _read_batch(path: KeyPath, step: Step) -> Any:
    return reduce(get_item, path, step.batch)


def find_several_labels(step: Step, scores: Any, targets: Place | None, is_named: bool) -> str:
    """Why a first batch seems to have several labels at once, as a clause; "" without evidence."""
    classes = scores.shape[1] if are_rows(scores, step.samples) and scores.is_floating_point() else None
    if targets is not None:
        candidates = [targets]
    elif classes:
        keyed = _find_usual_key(step, ("outputs", "batch"), TARGET_KEYS)
        candidates = list_items(step, "batch") if keyed is None else [keyed]
    else:
        return ""
    for place in candidates:
        value = place.read(step)
        if are_rows(value, step.samples) and classes in (None, value.shape[1]) and are_several(value):
            return f"{place.name} has rows of numbers from 0 to 1 that do not sum to 1"
    if targets is None and not is_named and step.loss_of_several:
        return f"the step has no targets, and the model's loss '{step.loss_of_several}' is one for several labels"
    return ""


def find_misfits(step: Step) -> dict[str, str]:
    """A doubt about targets that have another length than there are samples; empty without one.

    Raises
    ------
    DiscoveryError
        If there are as many as tokens: then the attention goes from sample to sample.
    """
    keyed = _find_usual_key(step, ("outputs", "batch"), TARGET_KEYS)
    for place in [keyed] if keyed is not None else list_items(step, "batch"):
        value = place.read(step)
        is_target = isinstance(value, Tensor) and (
            place is keyed or (value.dim() == 1 and not value.is_floating_point())
        )
        if is_target and value.dim() and len(value) != step.samples:
            if len(value) in step.tokens:
                raise DiscoveryError(
                    f"The attention has {step.samples} samples of {' and '.join(map(str, step.tokens))} tokens, but "
                    f"{place.name} has {len(value)} targets: it seems to go from sample to sample, as that of an "
                    "nn.MultiheadAttention that gets (batch, tokens, width) without batch_first=True."
                )
            return {"targets": f"{place.name} is {describe(value)}: no targets for {step.samples} samples."}
    return {}


def describe(value: Any) -> str:
    """What a step returned or a batch holds, in a few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"'{key}': {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        items = [describe(item) for item in value[:4]] + (["..."] if len(value) > 4 else [])
        return f"[{', '.join(items)}]"
    return "nothing" if value is None else f"a {type(value).__name__}"
