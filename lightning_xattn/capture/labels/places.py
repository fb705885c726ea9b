"""What a step gives, and where in it predictions, targets and sample ids may stand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.capture.calls import Path as KeyPath
from lightning_xattn.capture.calls import StepTrace, find_leaves, find_tensors, get_item, output_at, same_numbers
from lightning_xattn.capture.labels.scores import (
    Classes,
    Scores,
    are_binary_labels,
    are_clear,
    are_ids,
    are_predictions,
    are_probabilities,
    are_rows,
    are_several,
    are_shares,
    are_single,
    are_single_scores,
    scores_by_class,
    to_labels,
)
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

    def output_of(self, path: str, turn: int, leaf: KeyPath) -> Any:
        """A tensor that a module returned in this step."""
        return None if self.trace is None else output_at(self.trace.find(path, turn), leaf)

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

    def read(self, step: Step) -> Any:
        """What stands there; class ids of any form as a tensor ``(batch,)``."""
        return to_labels(self.get(step))


def named_place(setting: LabelSetting) -> Place | None:
    """The place that a setting names; None without one."""
    if setting is None:
        return None
    if callable(setting):
        if _takes_forward(setting):
            return Place(describe_setting(setting), lambda step: setting(step.outputs, step.batch, step.forward))
        return Place(describe_setting(setting), lambda step: setting(step.outputs, step.batch))

    def by_key(step: Step) -> Any:
        for holder in (step.outputs, step.batch, step.forward):
            found = _look_up(holder, setting)
            if found is not None:
                return found
        return _output_named(step, setting)

    return Place(describe_setting(setting), by_key, setting)


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


def _output_named(step: Step, setting: str) -> Tensor | None:
    named = None if step.model is None else module_named(step.model, setting)
    if named is None or step.trace is None:
        return None
    path, item, turn = named
    run = step.trace.find(path, turn)
    tensors = {} if run is None else {leaf: one for leaf, one in run.tensors.items() if leaf[: len(item)] == item}
    fitting = [one for one in tensors.values() if are_predictions(one, step.samples) or are_single(one, step.samples)]
    if len(fitting) > 1:
        items = " or ".join(f"'{name_call(step.model, path, 0, leaf)}'" for leaf in tensors)
        raise DiscoveryError(f"'{setting}' returns several tensors with a value for each sample: name one, {items}.")
    return fitting[0] if fitting else None


def name_call(model: nn.Module | None, path: str, turn: int, leaf: KeyPath) -> str:
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


def check_label_setting(name: str, setting: LabelSetting) -> None:
    """Refuse settings that name no place for labels.

    Raises
    ------
    SettingError
        Saying what was expected.
    """
    if setting is None or (isinstance(setting, str) and setting):
        return
    if not callable(setting):
        raise SettingError(f"{name} must be None, a key or a callable; got {setting!r}.")
    try:
        signature = inspect.signature(setting)
    except (TypeError, ValueError):  # as of some built-in ones
        return
    for count in (2, 3):
        with suppress(TypeError):
            signature.bind(*range(count))
            return
    raise SettingError(
        f"{name} must take (outputs, batch) or (outputs, batch, forward); its callable takes {signature}."
    )


def _takes_forward(function: Callable[..., Any]) -> bool:
    """Whether a function asks for a third argument, or takes any number."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # as of some built-in ones
        return False
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one for one in parameters if one.kind in by_position and one.default is inspect.Parameter.empty]
    return len(needed) == 3 or any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters)


def describe_setting(setting: LabelSetting) -> str:
    """A setting in words."""
    return f"the key '{setting}'" if isinstance(setting, str) else "the callable"


def _find_usual_keys(step: Step, sources: tuple[str, ...], keys: tuple[str, ...]) -> Iterator[Place]:
    """The places under a usual key, in the order of sources and keys."""
    for source in sources:
        holder = getattr(step, source)
        for key in keys:
            if _look_up(holder, key) is not None:
                yield Place(f"{source}['{key}']", _reader(source, key), key)


def _list_items(step: Step, source: str) -> list[Place]:
    """The items of a tuple or list, or the thing itself."""
    holder = getattr(step, source)
    if isinstance(holder, (tuple, list)):
        return [Place(f"{source}[{i}]", _reader(source, i)) for i in range(len(holder))]
    return [Place(source, attrgetter(source))]


def list_places(step: Step, source: str) -> list[Place]:
    """Every item of a mapping, tuple or list, or the thing itself."""
    holder = getattr(step, source)
    if isinstance(holder, Mapping):
        return [Place(f"{source}['{key}']", _reader(source, key), key) for key in holder]
    return _list_items(step, source)


def _reader(source: str, key: str | int) -> Callable[[Step], Any]:
    def read(step: Step) -> Any:
        holder = getattr(step, source)
        if isinstance(holder, Tensor):
            return None  # an item of a tensor would be a sample
        return _look_up(holder, key) if isinstance(key, str) else holder[key]

    return read


def guess_predictions(step: Step) -> Place | str | None:
    """Where a step has predictions: in what it returned, or else in what its loss reads.

    Returns
    -------
    Place, str or None
        A message where more than one thing can be meant; None where there is nothing.
    """
    keyed = next(_find_usual_keys(step, ("outputs",), PREDICTION_KEYS), None)
    if keyed is not None:
        # Named as predictions: if these do not fit, nothing else is meant.
        value = keyed.read(step)
        return keyed if are_predictions(value, step.samples) or are_single_scores(value, step.samples) else None
    read = find_read_by_losses(step)
    for fits in (are_predictions, are_single_scores):
        fitting = [place for place in list_places(step, "outputs") if fits(place.read(step), step.samples)]
        fitting = [place for place in fitting if place.key not in TARGET_KEYS and _is_given(step, place, read)]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    if read or (step.trace is not None and step.trace.losses):
        return read[0] if len(read) == 1 else _describe_several(read) if read else None
    for candidates in (
        list(_find_usual_keys(step, ("forward",), PREDICTION_KEYS))[:1],
        _list_items(step, "forward"),
    ):
        for fits in (are_predictions, are_single_scores):
            fitting = [place for place in candidates if fits(place.read(step), step.samples)]
            taken = [place for place in fitting if _is_read(step, place.read(step))]
            if len(taken) == 1:
                return taken[0]
            if fitting:
                names = " or ".join(f"predictions='{place.key or 'forward'}'" for place in fitting)
                return (
                    f"{' and '.join(place.name for place in fitting)} may be predictions, but no loss and no metric of "
                    f"the step reads them, and it does not return them: {names} says that they are."
                )
    return None


def _is_given(step: Step, place: Place, read: Sequence[Place]) -> bool:
    """Whether what a step returns under no usual key is what its loss reads, or follows from it.

    Without a loss it is what a step returns by itself, or in a dict what the model's own forward gave.
    """
    value = place.read(step)
    if not read and not isinstance(step.outputs, Mapping):
        return True
    others = [one.read(step) for one in read] or [one for _, one in find_tensors(step.forward)]
    for scores in (one for one in others if isinstance(one, Tensor)):
        made = [scores]
        if scores.dim() == 2 and scores.shape[1] > 1 and scores.is_floating_point():
            made += [scores.softmax(1), scores.argmax(1)]
        if scores.is_floating_point():
            made += [scores.sigmoid(), (scores > 0).long(), (scores > 0.5).long()]
        if any(same_numbers(value, one) for one in made):
            return True
    return False


def _is_read(step: Step, value: Any) -> bool:
    """Whether the step takes a tensor for class scores; True where that is not known."""
    return step.trace is None or any(same_numbers(value, one) for one in step.trace.read)


_OF_VALUES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "gaussian_nll_loss", "poisson_nll_loss")
"""Losses of numbers, which read no class scores."""


BINARY_LOSSES = ("binary_cross_entropy", "binary_cross_entropy_with_logits", "soft_margin_loss")
"""Losses of a single score for two classes; the first reads probabilities, the others logits."""


def find_loss_of(step: Step, scores: Tensor) -> str:
    """The name of the first loss that reads these scores; "" without one."""
    losses = () if step.trace is None else step.trace.losses
    return next((loss.name for loss in losses if same_numbers(loss.input, scores)), "")


def find_read_by_losses(step: Step) -> list[Place]:
    """The places of the tensors that losses read as predictions, each once.

    What a loss compares them with is one of these, too, where a module gave it, as of a teacher.
    """
    if step.trace is None:
        return []
    found: list[tuple[Tensor, Place]] = []
    of_classes = {tuple(loss.input.shape) for loss in step.trace.losses if loss.name not in _OF_VALUES}
    for number, loss in enumerate(step.trace.losses):
        given = [(loss.input, False)]
        is_taught = isinstance(loss.target, Tensor) and loss.target.is_floating_point()
        is_taught = is_taught and _find_call(step, loss.target) is not None
        given += [(loss.target, True)] if is_taught else []
        for tensor, is_target in given:
            is_single = are_single_scores(tensor, step.samples)
            is_score = loss.name not in _OF_VALUES or is_single
            is_score |= is_taught and (not of_classes or tuple(tensor.shape) in of_classes)
            fits = is_score and (is_single or are_predictions(tensor, step.samples))
            if not fits or any(same_numbers(tensor, other) for other, _ in found):
                continue
            made = _find_call(step, tensor)
            if made is not None:
                path, turn, leaf = made
                name = name_call(step.model, path, turn, leaf)
                place = Place(name, partial(_read_call, path, turn, leaf), module=path)
            else:
                place = _place_of_loss(step, number, is_target)
            found.append((tensor, place))
    return [place for _, place in found]


def _describe_several(places: Sequence[Place]) -> str:
    settings = " or ".join(f"predictions='{place.name}'" for place in places if place.module)
    return (
        f"The losses read several tensors with scores of the samples: {', '.join(place.name for place in places)}. Say "
        f"which are the predictions: {settings or 'return them from the step, or give predictions=<callable>'}."
    )


def _find_call(step: Step, tensor: Tensor) -> tuple[str, int, KeyPath] | None:
    """The outermost call that returned a tensor, the very one or the same numbers."""
    runs = [] if step.trace is None else step.trace.runs
    outermost_first = sorted(runs, key=lambda run: sum(1 for _ in run.outwards()))
    given = [(run, leaf, one) for run in outermost_first for leaf, one in run.tensors.items()]
    found = [(run, leaf) for run, leaf, one in given if are_same(one.detach(), tensor)]
    found = found or [(run, leaf) for run, leaf, one in given if same_numbers(one, tensor)]
    if not found:
        return None
    run, leaf = found[0]
    return run.path, [other for other in runs if other.path == run.path].index(run), leaf


def _read_call(path: str, turn: int, leaf: KeyPath, step: Step) -> Any:
    return step.output_of(path, turn, leaf)


def _read_loss(number: int, is_target: bool, names: tuple[str, ...], step: Step) -> Any:
    losses = () if step.trace is None else step.trace.losses
    if tuple(loss.name for loss in losses) != names:
        return None
    return losses[number].target if is_target else losses[number].input


def guess_targets(step: Step, scores: Any) -> Place | None:
    """Where a step has targets that go with its scores; None where nothing, or more than one thing, can be meant."""
    classes = scores.shape[1] if are_rows(scores, step.samples) else None

    def fits(value: Any) -> bool:
        if are_single_scores(scores, step.samples):
            return are_binary_labels(value, step.samples, guessed=True)
        # Numbers beyond the classes, such as lengths, are no class ids.
        ids = are_ids(value, step.samples) and bool(value.max() < (classes or torch.inf))
        return ids or (
            are_rows(value, step.samples) and value.shape[1] == (classes or value.shape[1]) and are_shares(value)
        )

    compared = _find_compared(step, scores)
    if compared is not None and not compared.is_loss and fits(compared.read(step)):
        return compared
    keyed = next(_find_usual_keys(step, ("outputs", "batch"), TARGET_KEYS), None)
    if keyed is not None:
        return keyed if fits(keyed.read(step)) else None
    fitting = [place for place in _list_items(step, "batch") if fits(place.read(step))]
    if len(fitting) == 1 and compared is None:
        return fitting[0]
    # The samples themselves, each the only one of its class, are no targets.
    is_contrastive = classes == step.samples and step.samples > 1
    return compared if compared is not None and not is_contrastive and fits(compared.read(step)) else None


def _find_compared(step: Step, scores: Any) -> Place | None:
    """Where what a loss compares these scores with is: in the batch, or in the loss itself."""
    losses = step.trace.losses if step.trace is not None else []
    of_scores = [loss for loss in losses if isinstance(scores, Tensor) and same_numbers(loss.input, scores)]
    chosen = of_scores[0] if of_scores else losses[0] if len(losses) == 1 else None
    target = None if chosen is None else to_labels(chosen.target)
    if chosen is None or not isinstance(target, Tensor) or _find_call(step, target) is not None:
        return None
    leaves = {path: to_labels(leaf) for path, leaf in find_leaves(step.batch)}
    tensors = {path: one for path, one in leaves.items() if isinstance(one, Tensor)}
    found = [path for path, one in tensors.items() if are_same(one, target)]
    found = found or [path for path, one in tensors.items() if _are_same_targets(one, target)]
    named = [path for path in found if path and path[-1] in TARGET_KEYS]
    if len(named) == 1 or len(found) == 1:
        path = named[0] if len(named) == 1 else found[0]
        name = "batch" + "".join(f"[{key!r}]" for key in path)
        return Place(name, partial(_read_batch, path), path[-1] if path else None)
    return _place_of_loss(step, losses.index(chosen), True) if of_scores else None


def _place_of_loss(step: Step, number: int, is_target: bool) -> Place:
    """What a loss reads, in steps that compute the same losses in the same order."""
    losses = () if step.trace is None else step.trace.losses
    name = f"what {losses[number].name} {'compares with' if is_target else 'reads'}"
    names = tuple(loss.name for loss in losses)
    return Place(name, partial(_read_loss, number, is_target, names), is_loss=True)


def _are_same_targets(value: Tensor, target: Tensor) -> bool:
    if value.numel() != target.numel() or value.device != target.device:
        return False
    return same_numbers(value.float(), target.float())


def _read_batch(path: KeyPath, step: Step) -> Any:
    value = step.batch
    for key in path:
        value = get_item(value, key)
    return value


def find_several_labels(step: Step, classes: int) -> Place | None:
    """Where a step without targets has several labels at once for this number of classes; None where it has none."""

    def fits(value: Any) -> bool:
        return are_rows(value, step.samples) and value.shape[1] == classes and are_several(value)

    keyed = next(_find_usual_keys(step, ("outputs", "batch"), TARGET_KEYS), None)
    places = [keyed] if keyed is not None else _list_items(step, "batch")
    return next((place for place in places if fits(place.read(step))), None)


def guess_ids(step: Step, what: str) -> Place | None:
    """Where a step has "sample_ids" or "groups"."""
    return next(_find_usual_keys(step, ("batch", "outputs"), ID_KEYS[what]), None)


def find_misfits(step: Step) -> dict[str, str]:
    """A doubt about targets that have another length than there are samples; empty without one.

    Raises
    ------
    DiscoveryError
        If there are as many as tokens: then the attention goes from sample to sample.
    """
    keyed = list(_find_usual_keys(step, ("outputs", "batch"), TARGET_KEYS))
    items = [place for place in _list_items(step, "batch") if _are_whole_numbers(place.read(step))]
    for place in keyed + items:
        value = place.read(step)
        if isinstance(value, Tensor) and value.dim() and len(value) != step.samples:
            if len(value) in step.tokens:
                raise DiscoveryError(
                    f"The attention has {step.samples} samples of {' and '.join(map(str, step.tokens))} tokens, but "
                    f"{place.name} has {len(value)} targets: it seems to go from sample to sample, as that of an "
                    "nn.MultiheadAttention that gets (batch, tokens, width) without batch_first=True."
                )
            return {"targets": f"{place.name} is {describe(value)}: no targets for {step.samples} samples."}
    return {}


def _are_whole_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point()


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


ReadScores = Callable[[Step, Tensor | None], Scores | None]
"""Gives the scores of a step with these predictions; None where it has none like those of the first step."""


def find_scores(step: Step, predictions: Tensor, predicted: Classes, confidence: Tensor | None) -> ReadScores | None:
    """How to read the scores behind predictions, as a first step shows where they are. Looks at the values.

    What ``forward`` returned comes first, as many a step makes probabilities or class ids of it.

    Parameters
    ----------
    step
        The step.
    predictions
        Its predictions: scores or class ids.
    predicted, confidence
        Their classes; the scores must agree with them, and be clear by themselves where there is no confidence.
    """
    for place in (*list_places(step, "forward"), *list_places(step, "outputs"), None):
        found = predictions if place is None else place.read(step)
        if confidence is None and not are_clear(found, step.samples):
            continue
        for scores in scores_by_class(found, step.samples):
            classes = scores.values.shape[1]
            fits = predicted.n_classes in (None, classes) and (
                not scores.are_probabilities or are_probabilities(scores.values)
            )
            if fits and predicted.ids is not None and scores.agree_with(predicted.ids, confidence):
                return partial(_read, place, classes, scores.are_probabilities)
    return None


def _read(
    place: Place | None, n_classes: int, are_probabilities: bool, step: Step, predictions: Tensor | None
) -> Scores | None:
    try:
        found = predictions if place is None else place.read(step)
    except (KeyError, IndexError, TypeError):
        return None
    for scores in scores_by_class(found, step.samples):
        if scores.are_probabilities == are_probabilities and scores.values.shape[1] == n_classes:
            return Scores(scores.values.detach().to(step.device, non_blocking=True), are_probabilities)
    return None
