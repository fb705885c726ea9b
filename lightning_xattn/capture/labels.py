"""Predictions and targets of a step: as told, or from where Lightning modules usually have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_xattn.errors import DiscoveryError, ShapeError

LabelSetting = str | Callable[[Any, Any], Tensor] | None
"""None: look in the usual places; a key; or a callable ``(outputs, batch) -> tensor``."""

PREDICTION_KEYS = ("logits", "probabilities", "probs", "predictions", "preds", "y_hat", "y_pred")
TARGET_KEYS = ("targets", "target", "labels", "label", "y")


@dataclass(frozen=True, eq=False)
class Labels:
    """What is known of a batch's classes; each field None when it was not found.

    Attributes
    ----------
    predicted, target
        ``(batch,)`` int64 class ids.
    tied
        ``(batch,)`` bool: the soft target has more than one top class.
    n_classes
        Number of classes, when the predictions or the targets show it.
    """

    predicted: Tensor | None
    target: Tensor | None
    tied: Tensor | None
    n_classes: int | None


@dataclass(frozen=True)
class LabelFinder:
    """Finds the predictions and targets of a step.

    Unless told, predictions are looked for in the step's outputs and then in the output of the module's own
    ``forward``; targets in the step's outputs and then in the batch (a key such as ``targets``, or the last item
    of a tuple). Class scores ``(batch, classes)`` and class ids ``(batch,)`` are understood, for targets also soft
    labels ``(batch, classes)``.

    Parameters
    ----------
    predictions, targets
        See ``LabelSetting``.
    """

    predictions: LabelSetting = None
    targets: LabelSetting = None

    def find(self, outputs: Any, batch: Any, forward_output: Any, batch_size: int) -> Labels:
        """Find and check the labels of one batch.

        Parameters
        ----------
        outputs
            What the step returned.
        batch
            The batch.
        forward_output
            What the module's ``forward`` returned, or None.
        batch_size
            Number of samples, from the attention.

        Raises
        ------
        DiscoveryError
            If a setting names something that is not there.
        ShapeError
            If what it names has another form or length than expected.
        """
        scores = self._named("predictions", self.predictions, (outputs, batch), outputs, batch)
        if self.predictions is None:
            places = [*_by_key(outputs, PREDICTION_KEYS), outputs, *_by_key(forward_output, PREDICTION_KEYS)]
            places += forward_output if isinstance(forward_output, (tuple, list)) else [forward_output]
            scores = _first(places, lambda found: _are_predictions(found, batch_size))
        labels = self._named("targets", self.targets, (batch, outputs), outputs, batch)
        if self.targets is None:
            places = [*_by_key(outputs, TARGET_KEYS), *_by_key(batch, TARGET_KEYS)]
            places += batch[-1:] if isinstance(batch, (tuple, list)) else []
            labels = _first(places, lambda found: _are_targets(found, batch_size))

        predicted, _, predicted_classes = _class_ids("predictions", scores, batch_size)
        target, tied, target_classes = _class_ids("targets", labels, batch_size)
        if predicted_classes and target_classes and predicted_classes != target_classes:
            raise ShapeError(
                f"Predictions have {predicted_classes} classes and targets {target_classes}; expected the same. "
                "Name the right ones with predictions=... and targets=...."
            )
        return Labels(predicted, target, tied, predicted_classes or target_classes)

    @staticmethod
    def _named(what: str, setting: LabelSetting, places: tuple[Any, Any], outputs: Any, batch: Any) -> Tensor | None:
        if setting is None:
            return None
        if callable(setting):
            found = setting(outputs, batch)
        else:
            found = _first(
                [place[setting] for place in places if isinstance(place, Mapping) and setting in place],
                lambda value: isinstance(value, Tensor),
            )
        if not isinstance(found, Tensor):
            how = f"key '{setting}'" if isinstance(setting, str) else "the callable"
            raise DiscoveryError(
                f"No {what}: {how} gave {type(found).__name__}, expected a tensor. The step returned "
                f"{describe(outputs)}; the batch is {describe(batch)}."
            )
        return found


def describe(value: Any) -> str:
    """What a step returned or a batch holds, in a few words for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "a dict of " + ", ".join(f"'{key}': {describe(item)}" for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} x {type(value[0]).__name__ if value else 'nothing'}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _by_key(place: Any, keys: tuple[str, ...]) -> list[Any]:
    return [place[key] for key in keys if key in place] if isinstance(place, Mapping) else []


def _first(places: Iterable[Any], fits: Callable[[Any], bool]) -> Any:
    return next((place for place in places if fits(place)), None)


def _are_predictions(value: Any, batch_size: int) -> bool:
    return isinstance(value, Tensor) and (
        (value.is_floating_point() and value.dim() == 2 and value.shape[1] > 1 and len(value) == batch_size)
        or _are_class_ids(value, batch_size)
    )


def _are_targets(value: Any, batch_size: int) -> bool:
    return isinstance(value, Tensor) and (
        (value.dim() == 2 and value.shape[1] > 1 and len(value) == batch_size) or _are_class_ids(value, batch_size)
    )


def _are_class_ids(value: Tensor, batch_size: int) -> bool:
    return not value.is_floating_point() and value.dim() == 1 and len(value) == batch_size


def _class_ids(what: str, values: Tensor | None, batch_size: int) -> tuple[Tensor | None, Tensor | None, int | None]:
    """Class ids, ties of the top class, and the number of classes when ``values`` has one column a class."""
    if values is None:
        return None, None, None
    fits = _are_targets if what == "targets" else _are_predictions
    if not fits(values, batch_size):
        raise ShapeError(
            f"Expected {what} as class ids ({batch_size},) or one column a class ({batch_size}, classes); "
            f"got {values.dtype} of shape {tuple(values.shape)}."
        )
    values = values.detach()
    if values.dim() == 1:
        return values.long(), None, None
    top = values.amax(1, keepdim=True)
    return values.argmax(1), (values == top).sum(1) > 1, values.shape[1]
