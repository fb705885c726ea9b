"""What the labels of a step are: class ids, scores of classes, one score of two, several labels at once, or numbers.

A first batch, whose values may be looked at, decides it, and where they are. Later batches are read at the same places,
so the target never changes from batch to batch, and no device has to wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_xattn.capture.calls import same_numbers
from lightning_xattn.capture.labels.places import (
    ID_KEYS,
    LabelSetting,
    Place,
    Step,
    are_binary_labels,
    are_ids,
    are_rows,
    are_single,
    are_single_scores,
    count_samples,
    describe,
    find_misfits,
    find_several_labels,
    guess_ids,
    guess_predictions,
    guess_targets,
    list_items,
    named_place,
)
from lightning_xattn.core.attention import row_sum_tolerance
from lightning_xattn.core.errors import DiscoveryError, SettingError, ShapeError
from lightning_xattn.core.ids import group_keys
from lightning_xattn.core.notices import warn

SEVERAL_LABELS = "the targets are several labels at once, so no one class is predicted"
"""Why nothing of a softmax is computed, as the end of a sentence."""


SO_A_REGRESSION = "So it is a regression, which has no classes, or a binary head whose targets must be named."
"""What is concluded from predictions of one number and targets other than 0 and 1."""

SCALES = {"logits": "logits", "probabilities": "probabilities", "probs": "probabilities"}
"""The keys that say what scores are."""


LOSSES_OF_TWO_CLASSES = ("binary_cross_entropy", "binary_cross_entropy_with_logits", "soft_margin_loss")
"""Losses of a single score for two classes; the first reads probabilities, the others logits."""


CLOSE = 1e-3
"""Probabilities that agree within this are the same: half precision keeps no more."""


_BY_SAMPLE = ("predicted", "confidence", "target", "tied", "groups", "group_ids", "sample_ids", "query_mask")
"""What ``Labels`` have for each sample, beside the scores."""


class Classes(NamedTuple):
    """The classes of samples by a tensor of scores or labels.

    Attributes
    ----------
    ids
        ``(batch,)`` int64; -1 where the scores are NaN or infinite (but for classes that are ruled out, -inf).
    tied
        ``(batch,)`` bool, whether more than one class is on top; None of class ids.
    n_classes
        Number of classes, when the tensor shows it.
    """

    ids: Tensor | None = None
    tied: Tensor | None = None
    n_classes: int | None = None


def are_one_hot(rows: Any, samples: int) -> bool:
    """Whether each row has a single 1 among 0s, as far as a first batch shows. Looks at the values."""
    return are_rows(rows, samples) and bool(((rows == 0) | (rows == 1)).all() and (rows.float().sum(1) == 1).all())


def are_probabilities(scores: Tensor) -> bool:
    """Whether class scores ``(batch, classes)`` are probabilities already, and not logits. Looks at the values."""
    finite = scores[scores.isfinite().all(1)].float()
    sums_to_one = ((finite.sum(1) - 1).abs() <= row_sum_tolerance(scores.dtype)).all()
    return len(finite) > 0 and bool((finite >= 0).all() and sums_to_one)


def are_clear(scores: Any, samples: int) -> bool:
    """Whether scores show by themselves whether they are logits or probabilities. Looks at the values."""
    if are_rows(scores, samples) and scores.is_floating_point() and are_probabilities(scores):
        return True
    is_score = are_single(scores, samples) or are_rows(scores, samples)
    return is_score and scores.is_floating_point() and bool(((scores < 0) | (scores > 1)).any())


def classes_of(values: Tensor) -> Classes:
    """Read class ids ``(batch,)``, or scores or shares ``(batch, classes)``."""
    if values.dim() == 1:
        return Classes(values.long())
    top = values.amax(1, keepdim=True)
    # A class with a score of minus infinity is one that the model rules out.
    sound = (values < torch.inf).all(1) & (top[:, 0] > -torch.inf)
    return Classes(torch.where(sound, values.argmax(1), -1), (values == top).sum(1) > 1, values.shape[1])


def classes_of_scores(values: Tensor, threshold: float) -> Classes:
    """Class 1 above the threshold, class 0 up to it, of single scores ``(batch,)`` or ``(batch, 1)``."""
    values = values.reshape(-1)
    return Classes(torch.where(values.isfinite(), (values > threshold).long(), -1), n_classes=2)


def classes_of_labels(values: Tensor) -> Classes:
    """Class ids of binary labels of any type; -1 where they are neither 0 nor 1."""
    values = values.reshape(-1)
    return Classes(torch.where(values == 1, 1, torch.where(values == 0, 0, -1)), n_classes=2)


def confidence_of(scores: Tensor, probabilities: bool) -> Tensor:
    """Probability of the predicted class, of scores ``(batch, classes)``, or single ones of class 1.

    NaN where ``probabilities`` are none.
    """
    tolerance = row_sum_tolerance(scores.dtype)
    columns = columns_of(scores, probabilities)
    shares = columns if probabilities else columns.softmax(1)
    sound = (shares >= 0).all(1) & ((shares.sum(1) - 1).abs() <= tolerance)
    return torch.where(sound, shares.amax(1), torch.nan)


def find_scale(scores: Tensor, samples: int, key: str | int | None, loss: str) -> tuple[bool, str]:
    """Whether scores of a first batch are probabilities; and why that stays in doubt, "" if it does not.

    Parameters
    ----------
    scores
        The predictions: rows, one score a sample, or class ids, which have no scale.
    samples
        How many samples there are.
    key
        What they stand under in what the step returns.
    loss
        The name of the loss that reads them; "" without.
    """
    scale = SCALES.get(str(key), "")
    if are_single_scores(scores, samples):
        probabilities = scale == "probabilities" or loss == "binary_cross_entropy"
        is_said = loss in LOSSES_OF_TWO_CLASSES
        doubt = "one score for each sample, all between 0 and 1: they may be logits or probabilities."
    elif are_rows(scores, samples) and scores.is_floating_point():
        probabilities, is_said = are_probabilities(scores), loss in ("cross_entropy", "multi_margin_loss")
        doubt = (
            "scores between 0 and 1 whose rows do not sum to 1: they may be logits, or a probability for each class by "
            "itself. The class with the highest score counts as predicted, and there is no confidence."
        )
    else:
        return False, ""
    if probabilities or is_said or scale == "logits" or are_clear(scores, samples):
        return probabilities, ""
    return False, f"{doubt} Return them from the step as {{'logits': ...}}, or {{'probabilities': ...}} that sum to 1."


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores with a column for each class: logits or probabilities."""

    values: Tensor
    """``(batch, classes)``, float32."""
    are_probabilities: bool

    @property
    def logits(self) -> Tensor:
        """The logits; where only probabilities are known, their logarithms."""
        return self.values.log() if self.are_probabilities else self.values

    @property
    def probabilities(self) -> Tensor:
        """The probabilities."""
        return self.values if self.are_probabilities else self.values.softmax(1)

    def agree_with(self, predicted: Tensor, confidence: Tensor | None) -> bool:
        """Whether these classes were predicted, with this confidence where it is known. Looks at the values."""
        top, classes = self.probabilities.to(predicted.device).max(1)
        agrees = (classes == predicted) | (predicted < 0)
        if confidence is not None:
            agrees &= ((top - confidence).abs() < CLOSE) | confidence.isnan()
        return bool(agrees.all())


def columns_of(scores: Tensor, probabilities: bool) -> Tensor:
    """Scores with a column a class, in float32; a single one is the probability of class 1, or a logit beside 0."""
    scores = scores.float()
    if scores.dim() == 2 and scores.shape[1] > 1:
        return scores
    scores = scores.reshape(-1)
    return torch.stack([1 - scores if probabilities else torch.zeros_like(scores), scores], dim=1)


def scores_by_class(found: Any, samples: int) -> Iterator[Scores]:
    """Both ways to read scores, as probabilities and as logits. Gradients pass."""
    if (are_rows(found, samples) or are_single(found, samples)) and found.is_floating_point():
        for probabilities in (True, False):
            yield Scores(columns_of(found, probabilities), probabilities)


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
    present
        By modality ``(batch,)`` bool, which samples have it; of those that were named.
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
    present: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Scores | None = None
    raw: Tensor | None = None
    """The predictions as the step has them; of a first step alone."""
    prediction_name: str = ""
    select: Callable[[Any, Any, Any], Any] | None = None
    """Gives the predictions of what a step returned, its batch and what ``forward`` returned, if a setting does."""

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
        present = {name: change(values) for name, values in self.present.items()}
        return replace(self, scores=scores, present=present, raw=None, **changed)


class LabelFinder:
    """Finds the predictions, targets, sample ids and groups of a step.

    Unless set, **predictions** are looked for in the step's outputs (under a usual key, or the outputs themselves)
    and then in what its losses read; **targets** in what its losses compare with, in the outputs and in the batch
    (under a usual key, or the one item of a tuple that can be a target). Class scores ``(batch, classes)`` and class
    ids ``(batch,)`` are understood; for targets also soft labels, rows of shares that sum to 1. One score a sample,
    ``(batch,)`` or ``(batch, 1)``, is that of a binary head where the targets are 0 and 1. Where several things could
    be meant, none is. A step that lacks what was found in the first one has no labels. **Sample ids** are looked
    for under ``sample_ids`` and **groups** under ``groups`` or ``patient_ids``, in the batch and then in the outputs.

    Parameters
    ----------
    predictions, targets, sample_ids, groups
        See ``LabelSetting``. Sample ids and groups may also be lists of numbers or strings.
    query_mask
        See ``LabelSetting``: which queries are real tokens, for models of one direction.
    present
        By modality a ``LabelSetting``: which samples have it.

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
        present: Mapping[str, LabelSetting] | None = None,
    ) -> None:
        settings = {"predictions": predictions, "targets": targets, "sample_ids": sample_ids, "groups": groups}
        settings["query_mask"] = query_mask
        self._named = {what: named_place(what, setting) for what, setting in settings.items()}
        if present is not None and not (isinstance(present, Mapping) and None not in present.values()):
            raise SettingError(
                "present must map modalities to keys or callables that say which samples have them, e.g. "
                f"present={{'xray': 'has_xray'}}; got {present!r}."
            )
        self._present = {
            name: place for name, one in (present or {}).items() if (place := named_place(f"present[{name!r}]", one))
        }
        if isinstance(predictions, str) and predictions == targets:
            raise SettingError(
                f"predictions and targets are both the key {predictions!r}, so every prediction would be correct. Name "
                "two keys."
            )
        self._places: dict[str, Place | None] = {}
        self._read_scores: ReadScores | None = None
        # Where the model's output is, also if it is no class.
        self._output: Place | None = None
        self._binary = self._probabilities = self._one_hot = self.are_several = False
        # Whether rows of targets that were one-hot in the first batch have none or several positives; on their device.
        self._several: Tensor | None = None
        self._doubts: dict[str, str] = {}

    @property
    def decided(self) -> bool:
        """Whether it is known where everything is."""
        return bool(self._places)

    @property
    def places(self) -> dict[str, str]:
        """Where predictions, targets and groups come from, in words; those that were not found are left out."""
        shown = ("predictions", "targets", "groups", "query_mask")
        known = {what: place.name for what, place in self._places.items() if place and what in shown}
        return {what: name.removeprefix("the key ") for what, name in known.items()}

    @property
    def group_noun(self) -> str | None:
        """What groups are called; None where there are none."""
        place = self._places.get("groups")
        if place is None:
            return None
        return "patients" if str(place.key).startswith("patient") else "groups"

    def reads(self) -> tuple[set[str], bool]:
        """The paths of the modules whose outputs are read in each step, and whether losses are."""
        places = [place for place in self._places.values() if place is not None]
        return {one.module for one in places if one.module is not None}, any(one.is_loss for one in places)

    def find(self, step: Step) -> Labels:
        """What is known of a batch's samples; the first step decides where everything is.

        Raises
        ------
        DiscoveryError
            If a setting names something that is not there.
        ShapeError
            If what it names has another form or length than expected.
        """
        first = not self.decided
        if first:
            self._places = self._find_places(step)
        scores, labels = (self._read(what, step, first) for what in ("predictions", "targets"))
        predicted, confidence, target = Classes(), None, Classes()
        if scores is not None:
            binary_at = 0.5 if self._probabilities else 0.0
            predicted = classes_of_scores(scores, binary_at) if self._binary else classes_of(scores)
            if scores.is_floating_point() and "confidence" not in self._doubts:
                confidence = confidence_of(scores, self._probabilities)
        if labels is not None:
            target = classes_of_labels(labels) if self._binary else classes_of(labels)
            if self._one_hot and target.ids is not None and target.tied is not None:
                several = labels.float().sum(1) != 1
                target = target._replace(ids=torch.where(several, -1, target.ids), tied=target.tied & ~several)
                self._several = several.any() if self._several is None else self._several | several.any()
        if predicted.n_classes and target.n_classes and predicted.n_classes != target.n_classes:
            raise ShapeError(
                f"Predictions have {predicted.n_classes} classes and targets {target.n_classes}; expected the same. "
                f"{step} Name the right ones with predictions=... and targets=...."
            )
        n_classes = predicted.n_classes or target.n_classes
        if first and scores is not None and "confidence" not in self._doubts:
            self._read_scores = _find_scores(step, scores, predicted._replace(n_classes=n_classes), confidence)
        raw = scores if scores is not None or self._output is None else self._output.read(step)
        ids = self._find_ids("groups", step, first)
        return Labels(
            predicted.ids,
            confidence,
            target.ids,
            target.tied,
            n_classes,
            self._doubts,
            None if self.group_noun is None else group_keys([None] * step.samples if ids is None else ids, step.device),
            ids,
            self.group_noun,
            self._find_ids("sample_ids", step, first),
            self.find_query_mask(step),
            {name: _find_present(name, place, step, first) for name, place in self._present.items()},
            None if self._read_scores is None else self._read_scores(step, scores),
            raw.detach() if isinstance(raw, Tensor) else None,
            "" if self._output is None else self._output.name,
            None if self._output is None else self._output.select,
        )

    @property
    def has_several(self) -> bool:
        """Whether targets that looked like classes turned out to be several labels at once. Waits for the device."""
        return self._several is not None and bool(self._several)

    def drop_targets(self) -> str:
        """Stop using targets that are no classes; gives the reason as a message."""
        place = self._places.get("targets")
        reason = (
            f"{'targets' if place is None else place.name} has one positive in each row of the first batch, but later "
            "rows have none or several. So they are several labels at once, and the evaluation has no classes, "
            "predictions, confidences and outcomes. If there are classes, name them: targets=<key or callable>."
        )
        self._places |= dict.fromkeys(("targets", "predictions"))
        self._several, self._one_hot, self._read_scores, self.are_several = None, False, None, True
        self._doubts |= {"targets": reason, "predictions": f"{SEVERAL_LABELS[0].upper()}{SEVERAL_LABELS[1:]}."}
        return reason

    def _read(self, what: str, step: Step, first: bool) -> Tensor | None:
        """Predictions or targets of a step; None where there are none.

        What is not as in the first step is none, but for what was named and is something else.
        """
        place = self._places[what]
        if place is None:
            return None
        found = place.read(step)
        # A model that squeezes its output takes the axis of a single sample off.
        ways = (found, found[None]) if step.samples == 1 and isinstance(found, Tensor) else (found,)
        for one in ways:
            is_single = self._binary and are_single(one, step.samples)
            if is_single or are_ids(one, step.samples) or are_rows(one, step.samples):
                return one.detach().to(step.device, non_blocking=True)
        if not first and (found is None or self._named[what] is None):
            warn(
                f"A step has no {what} in {place.name}, where the first step had them, so its samples have no class or "
                f"outcome. {step}",
                once=f"no {what} in {place.name}",
            )
            return None
        if not isinstance(found, Tensor):
            if found is None and place.select is None:
                raise DiscoveryError(
                    f"No {what}: {place.name} is in neither what the step returned, nor the batch, nor what forward "
                    f"returned, and names no module that ran. {step}"
                )
            raise DiscoveryError(f"No {what}: {place.name} gave {type(found).__name__}, expected a tensor. {step}")
        raise ShapeError(
            f"Expected {what} as class ids ({step.samples},) or one column a class ({step.samples}, classes); "
            f"{place.name} gave {found.dtype} of shape {tuple(found.shape)}. {step}"
        )

    def _find_ids(self, what: str, step: Step, first: bool) -> list[Any] | Tensor | None:
        place = self._places[what]
        found = None if place is None else place.read(step)
        if isinstance(found, Tensor) and found.dim() == 0:
            found = found[None]
        if found is not None and count_samples(found) == step.samples:
            return found if isinstance(found, Tensor) else list(found)
        if place is None or not first or self._named[what] is None:
            return None
        kind = DiscoveryError if found is None else ShapeError
        noun = what.replace("_", " ")
        raise kind(
            f"Expected {noun}, one for each of {step.samples} samples; {place.name} gave {describe(found)}. {step}"
        )

    def find_query_mask(self, step: Step) -> Tensor | None:
        """The named mask of a step's queries; None without one, or without attention."""
        place = self._places["query_mask"]
        if place is None or not step.tokens:
            return None
        mask, expected = place.read(step), (step.samples, step.tokens[0])
        if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
            kind = DiscoveryError if mask is None else ShapeError
            raise kind(
                f"Expected query_mask (batch, queries) {expected}, True or 1 for a real token; {place.name} gave "
                f"{describe(mask)}. {step}"
            )
        return mask.bool().to(step.device, non_blocking=True)

    def _find_places(self, step: Step) -> dict[str, Place | None]:
        """Decide in a first batch where everything is, and what the predictions and targets are."""
        places = dict(self._named)
        for what in ID_KEYS:
            places[what] = places[what] or guess_ids(step, what)
        guessed = places["predictions"] or guess_predictions(step)
        if isinstance(guessed, str):
            self._doubts["predictions"], guessed = guessed, None
        places["predictions"] = self._output = guessed
        scores = None if guessed is None else guessed.read(step)
        self._binary = are_single_scores(scores, step.samples)
        targets = places["targets"] = places["targets"] or guess_targets(step, scores)
        self._doubts |= find_misfits(step) if targets is None else {}
        labels = None if targets is None else targets.read(step)
        self._one_hot = not self._binary and are_one_hot(labels, step.samples)
        is_named = self._named["predictions"] is not None
        several = find_several_labels(step, scores, targets, is_named)
        if several:
            why = (
                f"The scores are of several labels at once, as {several}: no one class is predicted, and there are no "
                "classes, confidences and outcomes."
            )
            self._doubts |= {"predictions": why, "targets": why}
            self.are_several, self._one_hot = True, False
            return places | dict.fromkeys(("predictions", "targets"))
        is_binary = are_binary_labels(labels, step.samples, self._named["targets"] is None)
        if guessed is not None and isinstance(scores, Tensor):
            loss = next((one.name for one in step.losses if same_numbers(one.input, scores)), "")
            is_said = targets is None and (loss in LOSSES_OF_TWO_CLASSES or (is_named and guessed.key in SCALES))
            if self._binary and not is_binary and not is_said:
                self._doubts["predictions"] = (
                    f"{guessed.name} gives one number for each sample, but the first batch has no targets of 0 and 1 "
                    f"to go with it. {SO_A_REGRESSION}"
                )
                return places | dict.fromkeys(("predictions", "targets"))
            self._probabilities, doubt = find_scale(scores, step.samples, guessed.key, loss)
            if doubt:
                self._doubts["predictions" if self._binary else "confidence"] = f"{guessed.name} gives {doubt}"
        if "predictions" in self._doubts:
            if is_named:
                raise ShapeError(f"{self._doubts['predictions']} {step}")
            places["predictions"], self._binary = None, is_binary
        return places


def _find_present(name: str, place: Place, step: Step, first: bool) -> Tensor:
    """Which samples of a step have a modality."""
    found, given = place.read(step), ""
    if isinstance(found, Tensor) and tuple(found.shape) in ((step.samples,), (step.samples, 1)):
        found = found.reshape(-1)
        # Only a first step may make a device wait.
        is_checked = found.dtype != torch.bool and (first or not found.is_cuda)
        if not is_checked or bool(((found == 0) | (found == 1)).all()):
            return found.bool().to(step.device, non_blocking=True)
        given = f" with {found[(found != 0) & (found != 1)][0].item()}"
    kind = DiscoveryError if found is None else ShapeError
    raise kind(
        f"Expected present[{name!r}] (batch,) ({step.samples},), True or 1 for a sample that has the modality, False "
        f"or 0 for one that lacks it; {place.name} gave {describe(found)}{given}. {step}"
    )


ReadScores = Callable[[Step, Tensor | None], Scores | None]
"""Gives the scores of a step with these predictions; None where it has none like those of the first step."""


def _find_scores(step: Step, predictions: Tensor, predicted: Classes, confidence: Tensor | None) -> ReadScores | None:
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
    for place in (*list_items(step, "forward"), *list_items(step, "outputs"), None):
        found = predictions if place is None else place.read(step)
        if confidence is None and not are_clear(found, step.samples):
            continue
        for scores in scores_by_class(found, step.samples):
            classes, is_share = scores.values.shape[1], scores.are_probabilities
            fits = predicted.n_classes in (None, classes) and (not is_share or are_probabilities(scores.values))
            if fits and predicted.ids is not None and scores.agree_with(predicted.ids, confidence):
                return partial(_read_scores, place, classes, is_share)
    return None


def _read_scores(
    place: Place | None, n_classes: int, are_probabilities: bool, step: Step, predictions: Tensor | None
) -> Scores | None:
    found = predictions if place is None else place.read(step)
    for scores in scores_by_class(found, step.samples):
        if scores.are_probabilities == are_probabilities and scores.values.shape[1] == n_classes:
            return Scores(scores.values.detach().to(step.device, non_blocking=True), are_probabilities)
    return None
