"""Predictions, targets and sample ids of a step: as told, or from where Lightning modules usually have them.

Where they are is decided on a first batch, whose values may be looked at, and then read from there: what is taken for
the target never changes from batch to batch, and no GPU is made to wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.capture.scores import (
    Classes,
    are_binary_labels,
    are_ids,
    are_predictions,
    are_probabilities,
    are_rows,
    are_shares,
    are_single,
    are_single_scores,
    are_surely_logits,
    classes_of,
    classes_of_labels,
    classes_of_scores,
    confidence_of,
)
from lightning_xattn.errors import DiscoveryError, SettingError, ShapeError

LabelSetting = str | Callable[[Any, Any], Any] | None
"""None: look in the usual places; a key; or a callable ``(outputs, batch) -> tensor``."""

PREDICTION_KEYS = ("logits", "probabilities", "probs", "predictions", "preds", "y_hat", "y_pred")
TARGET_KEYS = ("targets", "target", "labels", "label", "y")
SAMPLE_ID_KEYS = ("sample_ids", "sample_id")


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
    """

    outputs: Any
    batch: Any
    forward: Any
    samples: int
    device: torch.device | str = "cpu"

    def __str__(self) -> str:
        return (
            f"The attention has {self.samples} samples; the step returned {_describe(self.outputs)}; the batch is "
            f"{_describe(self.batch)}; forward returned {_describe(self.forward)}."
        )


@dataclass(frozen=True, eq=False)
class Labels:
    """What is known of a batch's classes; each field None when it was not found.

    Attributes
    ----------
    predicted, target
        ``(batch,)`` int64 class ids; -1 where the scores are not finite.
    confidence
        ``(batch,)`` probability of the predicted class, when the predictions are scores: the scores themselves where
        those of the first batch were probabilities, else their softmax (of a single score its sigmoid).
    tied
        ``(batch,)`` bool: the soft target has more than one top class.
    n_classes
        Number of classes, when the predictions or the targets show it.
    doubt
        Why predictions were not taken though there is something that could be meant; empty when there is no doubt.
    """

    predicted: Tensor | None
    confidence: Tensor | None
    target: Tensor | None
    tied: Tensor | None
    n_classes: int | None
    doubt: str = ""

    def __getitem__(self, samples: slice) -> Labels:
        """The labels of some of the samples."""
        fields = ("predicted", "confidence", "target", "tied")
        known = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return replace(self, **{name: values[samples] for name, values in known.items()})


@dataclass(frozen=True)
class Place:
    """Where something is found in a step: a name for people, how to read it, and the key that it stands under."""

    name: str
    read: Callable[[Step], Any]
    key: str | int | None = None


class LabelFinder:
    """Finds the predictions, targets and sample ids of a step.

    Unless told, **predictions** are looked for in the step's outputs (under a usual key, or the outputs themselves)
    and then in what the module's own ``forward`` returned; **targets** in the outputs and then in the batch (under a
    usual key, or the one item of a tuple that can be a target). Class scores ``(batch, classes)`` and class ids
    ``(batch,)`` are understood; for targets also soft labels, rows of shares that sum to 1. One score a sample,
    ``(batch,)`` or ``(batch, 1)``, is that of a binary head where the targets are 0 and 1. Where several things could
    be meant, none is taken.

    Parameters
    ----------
    predictions, targets, sample_ids
        See ``LabelSetting``. Sample ids may also be a list of numbers or strings.

    Raises
    ------
    SettingError
        If one is none of these.
    """

    def __init__(
        self, predictions: LabelSetting = None, targets: LabelSetting = None, sample_ids: LabelSetting = None
    ) -> None:
        self._settings = {"predictions": predictions, "targets": targets, "sample_ids": sample_ids}
        for name, setting in self._settings.items():
            if not (setting is None or isinstance(setting, str) or callable(setting)):
                raise SettingError(f"{name} must be None, a key or a callable; got {setting!r}.")
        self._places: dict[str, Place | None] | None = None
        self._binary = self._probabilities = False
        self._doubt = ""

    @property
    def places(self) -> dict[str, str]:
        """Where predictions and targets come from, in words; those that were not found are left out."""
        return {what: place.name for what, place in (self._places or {}).items() if place and what != "sample_ids"}

    def find(self, step: Step) -> Labels:
        """Predictions and targets of a batch.

        Raises
        ------
        DiscoveryError
            If a setting names something that is not there.
        ShapeError
            If what it names has another form or length than expected.
        """
        if self._places is None:
            self._places = self._look(step)
        scores, labels = (self._read(what, step) for what in ("predictions", "targets"))
        predicted, target = self._classes(scores, labels)
        if predicted.n_classes and target.n_classes and predicted.n_classes != target.n_classes:
            raise ShapeError(
                f"Predictions have {predicted.n_classes} classes and targets {target.n_classes}; expected the same. "
                f"{step} Name the right ones with predictions=... and targets=...."
            )
        has_scores = scores is not None and scores.is_floating_point()
        confidence = confidence_of(scores, self._probabilities) if scores is not None and has_scores else None
        n_classes = predicted.n_classes or target.n_classes
        return Labels(predicted.ids, confidence, target.ids, target.tied, n_classes, self._doubt)

    def _classes(self, scores: Tensor | None, labels: Tensor | None) -> tuple[Classes, Classes]:
        if not self._binary:
            predicted, target = (Classes() if values is None else classes_of(values) for values in (scores, labels))
            return predicted, target
        assert scores is not None
        predicted = classes_of_scores(scores, threshold=0.5 if self._probabilities else 0.0)
        return predicted, Classes() if labels is None else classes_of_labels(labels)

    def find_sample_ids(self, step: Step) -> list[Any] | Tensor | None:
        """The samples' ids, as a tensor or a list; None when there are none.

        Raises
        ------
        DiscoveryError
            If ``sample_ids`` was given and gives nothing.
        ShapeError
            If their number is not that of the samples.
        """
        place = (self._places or self._look(step))["sample_ids"]
        found = None if place is None else place.read(step)
        if found is None and self._settings["sample_ids"] is not None:
            raise DiscoveryError(f"No sample ids: {_said(self._settings['sample_ids'])} gave nothing. {step}")
        if found is not None and len(found) != step.samples:
            raise ShapeError(f"Expected a sample id for each of {step.samples} samples; got {len(found)}.")
        return found if found is None or isinstance(found, Tensor) else list(found)

    def _look(self, step: Step) -> dict[str, Place | None]:
        places = {what: _told(setting) for what, setting in self._settings.items()}
        if self._settings["predictions"] is None:
            places["predictions"] = _guess_predictions(step)
        scores = None if places["predictions"] is None else places["predictions"].read(step)
        self._binary = are_single_scores(scores, step.samples)
        if self._settings["targets"] is None:
            places["targets"] = _guess_targets(step, scores)
        if self._settings["sample_ids"] is None:
            places["sample_ids"] = next(_keyed(step, ("batch", "outputs"), SAMPLE_ID_KEYS), None)
        if places["predictions"] is not None and isinstance(scores, Tensor):
            self._doubt = self._decide(scores, places["predictions"], places["targets"], step)
            if self._doubt and self._settings["predictions"] is not None:
                raise ShapeError(f"{self._doubt} {step}")
            if self._doubt:
                places["predictions"], self._binary = None, False
        return places

    def _decide(self, scores: Tensor, place: Place, targets: Place | None, step: Step) -> str:
        """Decide what the scores of a first batch are; what cannot be told is said."""
        if not self._binary:
            self._probabilities = scores.dim() == 2 and scores.is_floating_point() and are_probabilities(scores)
            return ""
        labels = None if targets is None else targets.read(step)
        if not are_binary_labels(labels, step.samples) and (targets or self._settings["predictions"] is None):
            return (
                f"{place.name} gives one number a sample, but no targets of 0 and 1 were found to go with it: this is "
                "a regression, which has no classes, or a binary head whose targets must be named."
            )
        if place.key in ("probabilities", "probs"):
            self._probabilities = True
        elif place.key != "logits" and not are_surely_logits(scores):
            return (
                f"{place.name} gives one score a sample, all between 0 and 1, which may be logits or probabilities: "
                "return them from the step as {'logits': ...} or {'probabilities': ...}."
            )
        return ""

    def _read(self, what: str, step: Step) -> Tensor | None:
        place = (self._places or {}).get(what)
        if place is None:
            return None
        found = place.read(step)
        if not isinstance(found, Tensor):
            raise DiscoveryError(f"No {what}: {place.name} gave {type(found).__name__}, expected a tensor. {step}")
        single = self._binary and are_single(found, step.samples)
        if not (single or are_ids(found, step.samples) or are_rows(found, step.samples)):
            raise ShapeError(
                f"Expected {what} as class ids ({step.samples},) or one column a class ({step.samples}, classes); "
                f"{place.name} gave {found.dtype} of shape {tuple(found.shape)}. {step}"
            )
        return found.detach().to(step.device, non_blocking=True)


def _told(setting: LabelSetting) -> Place | None:
    if setting is None:
        return None
    if callable(setting):
        return Place(_said(setting), lambda step: setting(step.outputs, step.batch))

    def by_key(step: Step) -> Any:
        holders = [place for place in (step.outputs, step.batch) if isinstance(place, Mapping) and setting in place]
        return holders[0][setting] if holders else None

    return Place(_said(setting), by_key, setting)


def _said(setting: LabelSetting) -> str:
    return f"the key '{setting}'" if isinstance(setting, str) else "the callable"


def _keyed(step: Step, sources: tuple[str, ...], keys: tuple[str, ...]) -> Iterator[Place]:
    """The places under a usual key, in the order of sources and keys."""
    for source in sources:
        holder = getattr(step, source)
        for key in keys:
            if isinstance(holder, Mapping) and key in holder:
                yield Place(f"{source}['{key}']", _reader(source, key), key)


def _items(step: Step, source: str) -> list[Place]:
    """The items of a tuple or list, or the thing itself."""
    holder = getattr(step, source)
    if isinstance(holder, (tuple, list)):
        return [Place(f"{source}[{i}]", _reader(source, i)) for i in range(len(holder))]
    return [Place(source, attrgetter(source))]


def _reader(source: str, key: str | int) -> Callable[[Step], Any]:
    return lambda step: getattr(step, source)[key]


def _guess_predictions(step: Step) -> Place | None:
    keyed = next(_keyed(step, ("outputs",), PREDICTION_KEYS), None)
    if keyed is not None:
        # Named as predictions: if these do not fit, nothing else is meant.
        value = keyed.read(step)
        return keyed if are_predictions(value, step.samples) or are_single_scores(value, step.samples) else None
    for candidates in (
        _items(step, "outputs"),
        list(_keyed(step, ("forward",), PREDICTION_KEYS))[:1],
        _items(step, "forward"),
    ):
        for fits in (are_predictions, are_single_scores):
            fitting = [place for place in candidates if fits(place.read(step), step.samples)]
            if fitting:
                return fitting[0] if len(fitting) == 1 else None
    return None


def _guess_targets(step: Step, scores: Any) -> Place | None:
    classes = scores.shape[1] if are_rows(scores, step.samples) else None

    def fits(value: Any) -> bool:
        if are_single_scores(scores, step.samples):
            return are_binary_labels(value, step.samples)
        return are_ids(value, step.samples) or (
            are_rows(value, step.samples) and value.shape[1] == (classes or value.shape[1]) and are_shares(value)
        )

    keyed = next(_keyed(step, ("outputs", "batch"), TARGET_KEYS), None)
    if keyed is not None:
        return keyed if fits(keyed.read(step)) else None
    fitting = [place for place in _items(step, "batch") if fits(place.read(step))]
    return fitting[0] if len(fitting) == 1 else None


def _describe(value: Any) -> str:
    """What a step returned or a batch holds, in a few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"'{key}': {_describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        items = [_describe(item) for item in value[:4]] + (["..."] if len(value) > 4 else [])
        return f"[{', '.join(items)}]"
    return "nothing" if value is None else f"a {type(value).__name__}"
