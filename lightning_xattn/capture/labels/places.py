"""What a step gives, and where in it predictions, targets and sample ids may stand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

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
    are_single_scores,
    scores_by_class,
)
from lightning_xattn.core.errors import DiscoveryError, SettingError

LabelSetting = str | Callable[..., Any] | None
"""None: look in the usual places; a key of the outputs, the batch or what ``forward`` returned; or a callable
``(outputs, batch) -> tensor`` or ``(outputs, batch, forward) -> tensor``."""

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
    """

    outputs: Any
    batch: Any
    forward: Any
    samples: int
    device: torch.device | str = "cpu"
    tokens: tuple[int, ...] = ()
    loss_of_several: str = ""

    def __str__(self) -> str:
        return (
            f"The attention has {self.samples} samples; the step returned {describe(self.outputs)}; the batch is "
            f"{describe(self.batch)}; forward returned {describe(self.forward)}."
        )


@dataclass(frozen=True)
class Place:
    """Where something is found in a step: a name for people, how to read it, and the key that it stands under."""

    name: str
    read: Callable[[Step], Any]
    key: str | int | None = None


def named_place(setting: LabelSetting) -> Place | None:
    """The place that a setting names; None without one."""
    if setting is None:
        return None
    if callable(setting):
        if _takes_forward(setting):
            return Place(describe_setting(setting), lambda step: setting(step.outputs, step.batch, step.forward))
        return Place(describe_setting(setting), lambda step: setting(step.outputs, step.batch))

    def by_key(step: Step) -> Any:
        holders = (step.outputs, step.batch, step.forward)
        return next((held[setting] for held in holders if isinstance(held, Mapping) and setting in held), None)

    return Place(describe_setting(setting), by_key, setting)


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
            if isinstance(holder, Mapping) and key in holder:
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
        return None if isinstance(holder, Tensor) else holder[key]  # an item of a tensor would be a sample

    return read


def guess_predictions(step: Step) -> Place | None:
    """Where a step has predictions; None where nothing, or more than one thing, can be meant."""
    keyed = next(_find_usual_keys(step, ("outputs",), PREDICTION_KEYS), None)
    if keyed is not None:
        # Named as predictions: if these do not fit, nothing else is meant.
        value = keyed.read(step)
        return keyed if are_predictions(value, step.samples) or are_single_scores(value, step.samples) else None
    for candidates in (
        _list_items(step, "outputs"),
        list(_find_usual_keys(step, ("forward",), PREDICTION_KEYS))[:1],
        _list_items(step, "forward"),
    ):
        for fits in (are_predictions, are_single_scores):
            fitting = [place for place in candidates if fits(place.read(step), step.samples)]
            if fitting:
                return fitting[0] if len(fitting) == 1 else None
    return None


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

    keyed = next(_find_usual_keys(step, ("outputs", "batch"), TARGET_KEYS), None)
    if keyed is not None:
        return keyed if fits(keyed.read(step)) else None
    fitting = [place for place in _list_items(step, "batch") if fits(place.read(step))]
    return fitting[0] if len(fitting) == 1 else None


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
