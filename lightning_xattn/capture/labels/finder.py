"""Predictions, targets, sample ids and groups of a step: as set, or from where Lightning modules usually have them.

A first batch, whose values may be looked at, decides where they are. Later batches are read at the same places, so the
target never changes from batch to batch, and no device has to wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_xattn.capture.labels.places import (
    BINARY_LOSSES,
    LabelSetting,
    Place,
    ReadScores,
    Step,
    check_label_setting,
    describe,
    describe_setting,
    find_loss_of,
    find_misfits,
    find_scores,
    find_several_labels,
    guess_ids,
    guess_predictions,
    guess_targets,
    named_place,
)
from lightning_xattn.capture.labels.scores import (
    Classes,
    Scores,
    are_binary_labels,
    are_ids,
    are_one_hot,
    are_probabilities,
    are_rows,
    are_several,
    are_single,
    are_single_scores,
    are_surely_logits,
    classes_of,
    classes_of_labels,
    classes_of_scores,
    confidence_of,
)
from lightning_xattn.core.errors import DiscoveryError, SettingError, ShapeError
from lightning_xattn.core.ids import group_keys
from lightning_xattn.core.notices import warn

SEVERAL_LABELS = "the targets are several labels at once, so no one class is predicted"
"""Why nothing of a softmax is computed, as the end of a sentence."""

_NAMES = {"sample_ids": "sample id", "groups": "group"}
_BY_SAMPLE = ("predicted", "confidence", "target", "tied", "groups", "group_ids", "sample_ids", "query_mask")
"""What ``Labels`` have for each sample, beside the scores."""


@dataclass(frozen=True, eq=False)
class Labels:
    """What is known of a batch's classes; each field None when it was not found.

    Attributes
    ----------
    predicted, target
        ``(batch,)`` int64 class ids; -1 where there is none, or the scores are NaN or infinite.
    confidence
        ``(batch,)`` probability of the predicted class, when the predictions are scores: the scores themselves where
        those of the first batch were probabilities, else their softmax (of a single score its sigmoid); None where
        the first batch did not show which of the two they are.
    tied
        ``(batch,)`` bool: the soft target has more than one top class.
    n_classes
        Number of classes, when the predictions or the targets show it.
    doubts
        Why "predictions", their "confidence" or "targets" are missing though there is a candidate.
    groups
        ``(batch,)`` int64 key of each sample's group, see ``group_keys``.
    group_ids
        The groups' ids as they were found, a tensor or a list.
    group_noun
        What groups are called.
    sample_ids
        The samples' ids, a tensor or a list.
    query_mask
        ``(batch, queries)`` bool, which queries are real tokens; None unless it was named.
    scores
        The class scores that the predictions were made of, wherever in the step they are.
    """

    predicted: Tensor | None
    confidence: Tensor | None
    target: Tensor | None
    tied: Tensor | None
    n_classes: int | None
    doubts: Mapping[str, str] = field(default_factory=dict)
    groups: Tensor | None = None
    group_ids: Tensor | list[Any] | None = None
    group_noun: str | None = None
    sample_ids: Tensor | list[Any] | None = None
    query_mask: Tensor | None = None
    scores: Scores | None = None
    raw: Tensor | None = None
    """The predictions as the step has them; of a first step alone."""
    prediction_name: str = ""

    @property
    def are_ids(self) -> bool:
        """Whether the predictions are class ids, behind which there may be scores."""
        return self.raw is None or not self.raw.is_floating_point()

    def __getitem__(self, samples: slice) -> Labels:
        """The labels of some of the samples."""
        return self._map(lambda values: values[samples])

    def cpu(self) -> Labels:
        """The same, on the CPU."""
        return self._map(lambda values: values.detach().cpu() if isinstance(values, Tensor) else values)

    def _map(self, change: Callable[[Any], Any]) -> Labels:
        """The same with each field changed that has a value for each sample."""
        fields = {name: getattr(self, name) for name in _BY_SAMPLE}
        changed: dict[str, Any] = {name: None if values is None else change(values) for name, values in fields.items()}
        scores = None if self.scores is None else replace(self.scores, values=change(self.scores.values))
        return replace(self, scores=scores, raw=None, **changed)


class LabelFinder:
    """Finds the predictions, targets, sample ids and groups of a step.

    Unless set, **predictions** are looked for in the step's outputs (under a usual key, or the outputs themselves)
    and then in what the module's own ``forward`` returned; **targets** in the outputs and then in the batch (under a
    usual key, or the one item of a tuple that can be a target). Class scores ``(batch, classes)`` and class ids
    ``(batch,)`` are understood; for targets also soft labels, rows of shares that sum to 1. One score a sample,
    ``(batch,)`` or ``(batch, 1)``, is that of a binary head where the targets are 0 and 1. Where several things could
    be meant, none is. A step that lacks what was found in the first one has no labels. **Sample ids** are looked
    for under ``sample_ids`` and **groups** under ``groups`` or ``patient_ids``, in the batch and then in the outputs.

    Parameters
    ----------
    predictions, targets, sample_ids, groups
        See ``LabelSetting``. Sample ids and groups may also be lists of numbers or strings.
    query_mask
        See ``LabelSetting``: which queries are real tokens, for models of one direction.

    Attributes
    ----------
    are_several : bool
        Whether the targets are several labels at once: then there are no predictions, classes and confidences.

    Raises
    ------
    SettingError
        If one is none of these.
    """

    def __init__(
        self,
        predictions: LabelSetting = None,
        targets: LabelSetting = None,
        sample_ids: LabelSetting = None,
        groups: LabelSetting = None,
        query_mask: LabelSetting = None,
    ) -> None:
        self._settings = {"predictions": predictions, "targets": targets, "sample_ids": sample_ids, "groups": groups}
        self._settings["query_mask"] = query_mask
        for name, setting in self._settings.items():
            check_label_setting(name, setting)
        if isinstance(predictions, str) and predictions == targets:
            raise SettingError(
                f"predictions and targets are both the key {predictions!r}, so every prediction would be correct. Name "
                "two keys."
            )
        self._places: dict[str, Place | None] | None = None
        self._scores_of: ReadScores | None = None
        # Where the model's output is, also if it is no class.
        self._output: Place | None = None
        self._binary = self._probabilities = self._one_hot = self.are_several = self._is_regression = False
        # Whether rows of targets that were one-hot in the first batch have none or several positives; on their device.
        self._several: Tensor | None = None
        self._doubts: dict[str, str] = {}
        self._found: set[str] = set()
        self._warned: set[str] = set()

    @property
    def places(self) -> dict[str, str]:
        """Where predictions, targets and groups come from, in words; those that were not found are left out."""
        shown = ("predictions", "targets", "groups", "query_mask")
        known = {what: place.name for what, place in (self._places or {}).items() if place and what in shown}
        return {what: name.removeprefix("the key ") for what, name in known.items()}

    @property
    def group_noun(self) -> str | None:
        """What groups are called; None where there are none."""
        place = (self._places or {}).get("groups")
        if place is None:
            return None
        return "patients" if str(place.key).startswith("patient") else "groups"

    def reads(self) -> tuple[set[str], bool]:
        """The paths of the modules whose outputs are read in each step, and whether losses are."""
        places = [place for place in (self._places or {}).values() if place is not None]
        return {one.module for one in places if one.module is not None}, any(one.is_loss for one in places)

    @property
    def decided(self) -> bool:
        """Whether it is known where everything is."""
        return self._places is not None

    def decide(self, step: Step) -> None:
        """Look where everything is, which ``find`` else does in its first step."""
        self._places = self._find_places(step)
        place = self._places["predictions"]
        if place is not None and "confidence" not in self._doubts:
            found = self._fitting(place.read(step), step.samples)
            if found is not None:
                predicted, confidence = self._find_classes(found)
                n_classes = predicted.n_classes or self._classes_of_targets(step)
                self._scores_of = find_scores(step, found, predicted._replace(n_classes=n_classes), confidence)

    def find(self, step: Step) -> Labels:
        """What is known of a batch's samples.

        Raises
        ------
        DiscoveryError
            If a setting names something that is not there.
        ShapeError
            If what it names has another form or length than expected.
        """
        first = not self.decided
        if first:
            self.decide(step)
        scores, labels = (self._read(what, step, first) for what in ("predictions", "targets"))
        predicted, confidence = (Classes(), None) if scores is None else self._find_classes(scores)
        target = Classes() if labels is None else classes_of_labels(labels) if self._binary else classes_of(labels)
        if self._one_hot and labels is not None and target.ids is not None and target.tied is not None:
            several = labels.float().sum(1) != 1
            target = target._replace(ids=torch.where(several, -1, target.ids), tied=target.tied & ~several)
            self._several = several.any() if self._several is None else self._several | several.any()
        if predicted.n_classes and target.n_classes and predicted.n_classes != target.n_classes:
            raise ShapeError(
                f"Predictions have {predicted.n_classes} classes and targets {target.n_classes}; expected the same. "
                f"{step} Name the right ones with predictions=... and targets=...."
            )
        ids = self._find_ids("groups", step)
        return Labels(
            predicted.ids,
            confidence,
            target.ids,
            target.tied,
            predicted.n_classes or target.n_classes,
            self._doubts,
            None if self.group_noun is None else group_keys([None] * step.samples if ids is None else ids, step.device),
            ids,
            self.group_noun,
            self._find_ids("sample_ids", step),
            self._find_query_mask(step),
            None if self._scores_of is None else self._scores_of(step, scores),
            scores if scores is not None else self._read_output(step),
            "" if self._output is None else self._output.name,
        )

    def _read_output(self, step: Step) -> Tensor | None:
        """The model's output where it is no classes."""
        found = None if self._output is None else self._output.read(step)
        return found.detach() if isinstance(found, Tensor) else None

    def _classes_of_targets(self, step: Step) -> int | None:
        """How many classes the targets show, as shares do and ids do not."""
        place = (self._places or {}).get("targets")
        found = None if place is None or self._binary else self._fitting(place.read(step), step.samples)
        return None if found is None else classes_of(found).n_classes

    def _find_classes(self, scores: Tensor) -> tuple[Classes, Tensor | None]:
        """The classes that scores or ids predict, and how confidently."""
        predicted = (
            classes_of_scores(scores, 0.5 if self._probabilities else 0.0) if self._binary else classes_of(scores)
        )
        has_confidence = scores.is_floating_point() and "confidence" not in self._doubts
        return predicted, confidence_of(scores, self._probabilities) if has_confidence else None

    def _find_query_mask(self, step: Step) -> Tensor | None:
        place = named_place(self._settings["query_mask"])
        if place is None:
            return None
        mask = place.read(step)
        if mask is None:
            raise DiscoveryError(f"No query mask: {place.name} gave nothing. {step}")
        expected = step.samples, step.tokens[0]
        if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
            raise ShapeError(
                f"Expected query_mask (batch, queries) {expected}, True or 1 for a real token; {place.name} gave "
                f"{describe(mask)}. {step}"
            )
        return mask.bool().to(step.device, non_blocking=True)

    @property
    def has_several(self) -> bool:
        """Whether targets that looked like classes turned out to be several labels at once. Waits for the device."""
        return self._several is not None and bool(self._several)

    def drop_targets(self) -> str:
        """Stop using targets that are no classes; gives the reason as a message."""
        place = (self._places or {}).get("targets")
        name = "targets" if place is None else place.name
        reason = (
            f"{name} has one positive in each row of the first batch, but later rows have none or several. So they are "
            "several labels at once, and the evaluation has no classes, predictions, confidences and outcomes. If "
            "there are classes, name them: targets=<key or callable>."
        )
        if self._places is not None:
            self._places |= dict.fromkeys(("targets", "predictions"))
        self._several, self._one_hot, self._scores_of, self.are_several = None, False, None, True
        self._doubts = self._doubts | {
            "targets": reason,
            "predictions": f"{SEVERAL_LABELS[0].upper()}{SEVERAL_LABELS[1:]}.",
        }
        return reason

    def _find_ids(self, what: str, step: Step) -> list[Any] | Tensor | None:
        place = (self._places or {}).get(what)
        found = None if place is None else self._at(place, what, step)
        if isinstance(found, Tensor) and found.dim() == 0:
            found = found[None]
        count = _count(found)
        if found is not None and count == step.samples:
            self._found.add(what)
            return found if isinstance(found, Tensor) else list(found)
        setting = self._settings[what]
        if setting is None or what in self._found:
            return None
        if found is None:
            raise DiscoveryError(f"No {_NAMES[what]}s: {describe_setting(setting)} gave nothing. {step}")
        got = describe(found) if count is None else count
        raise ShapeError(f"Expected a {_NAMES[what]} for each of {step.samples} samples; got {got}.")

    def _find_places(self, step: Step) -> dict[str, Place | None]:
        places = {what: named_place(setting) for what, setting in self._settings.items()}
        if self._settings["predictions"] is None:
            guessed = guess_predictions(step)
            places["predictions"] = None if isinstance(guessed, str) else guessed
        self._output = places["predictions"]
        if self._settings["predictions"] is None and isinstance(guessed, str):
            self._doubts |= {"predictions": guessed}
        scores = None if places["predictions"] is None else places["predictions"].read(step)
        self._binary = are_single_scores(scores, step.samples)
        if self._settings["targets"] is None:
            places["targets"] = guess_targets(step, scores)
            if places["targets"] is None:
                self._doubts |= find_misfits(step)
        labels = None if places["targets"] is None else places["targets"].read(step)
        if isinstance(labels, Tensor) and not self._binary:
            self._one_hot = are_rows(labels, step.samples) and are_one_hot(labels)
        for what in ("sample_ids", "groups"):
            if self._settings[what] is None:
                place = guess_ids(step, what)
                places[what] = place if place is not None and _count(place.read(step)) == step.samples else None
        several = self._describe_several_labels(scores, places["targets"], step)
        if several:
            self._doubts |= {"predictions": several, "targets": several}
            self.are_several, self._one_hot = True, False
            return places | dict.fromkeys(("predictions", "targets"))
        if places["predictions"] is not None and isinstance(scores, Tensor):
            self._doubts |= self._find_doubts(scores, places["predictions"], places["targets"], step)
        if "predictions" in self._doubts:
            if self._settings["predictions"] is not None and not self._is_regression:
                raise ShapeError(f"{self._doubts['predictions']} {step}")
            places["predictions"] = None
            if self._is_regression:
                return places | {"targets": None}
            labels = None if places["targets"] is None else places["targets"].read(step)
            self._binary = are_binary_labels(labels, step.samples, self._settings["targets"] is None)
        return places

    def _describe_several_labels(self, scores: Any, targets: Place | None, step: Step) -> str:
        """Why a first batch seems to have several labels at once; "" without evidence."""
        classes = scores.shape[1] if are_rows(scores, step.samples) and scores.is_floating_point() else None
        labels = None if targets is None else targets.read(step)
        rows = isinstance(labels, Tensor) and are_rows(labels, step.samples)
        if isinstance(labels, Tensor) and rows and classes in (None, labels.shape[1]) and are_several(labels):
            found = targets
        else:
            found = find_several_labels(step, classes) if classes and targets is None else None
        if found is not None:
            why = f"{found.name} has rows of numbers from 0 to 1 that do not sum to 1"
        elif classes and targets is None and self._settings["predictions"] is None and step.loss_of_several:
            why = f"the step has no targets, and the model's loss '{step.loss_of_several}' is one for several labels"
        else:
            return ""
        return (
            f"{why[0].upper()}{why[1:]}. So the scores are of several labels at once: no one class is predicted, and "
            "there are no classes, confidences and outcomes."
        )

    def _find_doubts(self, scores: Tensor, place: Place, targets: Place | None, step: Step) -> dict[str, str]:
        """Decide what the scores of a first batch are; gives what stays in doubt, and why."""
        if not self._binary:
            scale = scores.dim() == 2 and scores.is_floating_point()
            self._probabilities = scale and are_probabilities(scores)
            is_clear = self._probabilities or place.key == "logits" or are_surely_logits(scores)
            if not scale or is_clear or find_loss_of(step, scores) in ("cross_entropy", "multi_margin_loss"):
                return {}
            text = (
                f"{place.name} gives scores between 0 and 1 whose rows do not sum to 1: they may be logits, or a "
                "probability for each class by itself. The class with the highest score counts as predicted, and there "
                "is no confidence. Return the scores from the step as {'logits': ...}, or as {'probabilities': ...} "
                "whose rows sum to 1."
            )
            return {"confidence": text}
        labels = None if targets is None else targets.read(step)
        binary = are_binary_labels(labels, step.samples, self._settings["targets"] is None)
        loss = find_loss_of(step, scores)
        is_named = self._settings["predictions"] is not None and place.key in ("probabilities", "probs", "logits")
        if not binary and not (targets is None and (is_named or loss in BINARY_LOSSES)):
            self._is_regression = True
            text = (
                f"{place.name} gives one number for each sample, but the first batch has no targets of 0 and 1 to go "
                "with it. So it is a regression, which has no classes, or a binary head whose targets must be named."
            )
            return {"predictions": text}
        self._probabilities = place.key in ("probabilities", "probs") or loss == "binary_cross_entropy"
        is_clear = self._probabilities or place.key == "logits" or are_surely_logits(scores)
        if is_clear or loss in BINARY_LOSSES:
            return {}
        text = (
            f"{place.name} gives one score for each sample, all between 0 and 1: they may be logits or probabilities. "
            "Return them from the step as {'logits': ...} or {'probabilities': ...}."
        )
        return {"predictions": text}

    def _at(self, place: Place, what: str, step: Step) -> Any:
        """What stands at a place; None where a step lacks what an earlier one had."""
        try:
            return place.read(step)
        except (KeyError, IndexError, TypeError):
            if self._settings[what] is None:
                return None
            raise  # from a callable of the user's

    def _read(self, what: str, step: Step, first: bool) -> Tensor | None:
        """Predictions or targets of a step; None where there are none.

        What is not as in the first step is none, but for what was named and is something else.
        """
        place = (self._places or {}).get(what)
        if place is None:
            return None
        found = self._at(place, what, step)
        fitting = self._fitting(found, step.samples)
        if not first and fitting is None and (found is None or self._settings[what] is None):
            if what not in self._warned:
                self._warned.add(what)
                warn(
                    f"A step has no {what} in {place.name}, where the first step had them, so its samples have no "
                    f"class or outcome. {step}"
                )
            return None
        if not isinstance(found, Tensor):
            raise DiscoveryError(f"No {what}: {place.name} gave {type(found).__name__}, expected a tensor. {step}")
        if fitting is None:
            raise ShapeError(
                f"Expected {what} as class ids ({step.samples},) or one column a class ({step.samples}, classes); "
                f"{place.name} gave {found.dtype} of shape {tuple(found.shape)}. {step}"
            )
        return fitting.detach().to(step.device, non_blocking=True)

    def _fitting(self, found: Any, samples: int) -> Tensor | None:
        """Ids or scores of this number of samples, in one of the forms that are understood; None of anything else."""
        # A model that squeezes its output takes the axis of a single sample off.
        for values in (found, found[None]) if samples == 1 and isinstance(found, Tensor) else (found,):
            single = self._binary and are_single(values, samples)
            if single or are_ids(values, samples) or are_rows(values, samples):
                return values
        return None


def _count(found: Any) -> int | None:
    """For how many samples there are ids; None for what is no sequence of ids."""
    if isinstance(found, Tensor):
        return found.numel() if found.numel() == (len(found) if found.dim() else 1) else None
    return len(found) if hasattr(found, "__len__") and not isinstance(found, (str, bytes, Mapping)) else None
