"""Probes and support from arrays alone: features of each modality, logits, targets and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_xattn.attribution.kept_samples import CHOSEN, MAX_SAMPLES, NOT_KEPT, BottomKSample, KeptSamples
from lightning_xattn.attribution.ports import RESERVED_MODALITIES, is_modality_name
from lightning_xattn.core.distributed import NUMBER
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.core.ids import group_keys, hashed
from lightning_xattn.core.names import shown
from lightning_xattn.core.notices import begin_run, first_line, info
from lightning_xattn.evaluation.checks import check_fusion
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.functional import pooled_tokens, project
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT, UNKNOWN


def explain_features(
    features: Mapping[str, Any],
    logits: Any,
    targets: Any,
    groups: Sequence[Any] | Tensor | None = None,
    class_names: Sequence[str] | None = None,
    group_noun: str = "groups",
) -> DatasetResult:
    """What each modality's features predict, who supports the predictions, and what that adds to confidence.

    For models that no callback can watch: all it takes is arrays of one evaluation. What a model *uses* cannot be seen
    in them, so there are no contributions.

    Parameters
    ----------
    features
        By modality, the output of its encoder: ``(samples, width)``, or ``(samples, tokens, width)``, which is pooled
        to mean, maximum and standard deviation. Arrays or tensors without padding; at least two modalities. Samples
        with a number that is not finite are left out and counted.
    logits
        ``(samples, classes)``, of the whole model.
    targets
        ``(samples,)`` class ids; -1: not known.
    groups
        ``(samples,)`` the patient, subject or recording of each sample, as numbers or strings. None: samples are taken
        as independent.
    class_names
        A name for each class.
    group_noun
        What groups are called, in the plural.

    Returns
    -------
    DatasetResult
        For `create_explainability_report` and `save_dataset_figures`; its ``fusion`` has the numbers.

    Raises
    ------
    ShapeError
        If a shape does not fit.
    SettingError
        If there are fewer than two modalities, a target is outside of the classes, or the logits are probabilities.

    Examples
    --------
    >>> targets = torch.arange(200) % 2
    >>> eeg, spec = torch.randn(200, 8) + targets[:, None], torch.randn(200, 4, 5) + targets[:, None, None]
    >>> result = explain_features({"eeg": eeg, "spec": spec}, torch.randn(200, 2), targets)
    >>> [cell.name for cell in result.fusion.cells][:3]
    ['both', 'only EEG', 'only Spec']
    """
    begin_run()
    scores, target = _tensor(logits), _tensor(targets)
    if scores.dim() != 2 or scores.shape[1] < 2 or not scores.is_floating_point():
        raise ShapeError(
            f"logits must be (samples, classes), floats, of two classes or more; got {_describe(scores)}. Of a single "
            "logit make two: np.stack([0 * logit, logit], axis=1)."
        )
    samples, n_classes = scores.shape
    if bool(((scores >= 0) & (scores <= 1)).all() & ((scores.sum(1) - 1).abs() < 1e-3).all()):
        raise SettingError(
            "logits are probabilities: their rows sum to 1. Take logarithms: logits=np.log(probabilities)."
        )
    if target.shape != (samples,) or target.is_floating_point():
        raise ShapeError(
            f"targets must be ({samples},) whole numbers, one class id for each row of logits; got {_describe(target)}."
        )
    target = target.long()
    if bool((target >= n_classes).any()):
        raise SettingError(f"targets must be below {n_classes}, the number of classes; the largest is {target.max()}.")
    if not isinstance(features, Mapping) or len(features) < 2 or not all(map(is_modality_name, features)):
        raise SettingError(
            "features must map at least two modalities to arrays, {'eeg': ..., 'spec': ...}. A name has no '/' and no "
            f"space, and is none of {', '.join(RESERVED_MODALITIES)}; got {shown(list(features))}."
        )
    if class_names is not None and len(class_names) != n_classes:
        raise SettingError(f"class_names must have {n_classes} names, one for each class; got {len(class_names)}.")
    keys = torch.arange(samples)
    if groups is not None and not (hasattr(groups, "__len__") and len(groups) == samples):
        raise ShapeError(f"groups must have {samples} ids, one for each sample; got {shown(groups)}.")
    ids = keys if groups is None else group_keys(groups if isinstance(groups, Tensor) else list(groups), "cpu")
    pooled = {}
    for name, given in features.items():
        one = _tensor(given)
        if one.dim() not in (2, 3) or len(one) != samples or not one.is_floating_point():
            raise ShapeError(
                f"features['{name}'] must be ({samples}, width) or ({samples}, tokens, width), floats; got "
                f"{_describe(one)}."
            )
        pooled[f"features/{name}"] = project(pooled_tokens(one))
    confidence, predicted = scores.double().softmax(1).max(1)
    predicted = torch.where(confidence.isnan(), -1, predicted)
    outcome = torch.where(predicted == target, CORRECT, INCORRECT)
    finite = torch.stack([one.isfinite().flatten(1).all(1) for one in pooled.values()]).all(0)
    if samples > MAX_SAMPLES:
        info([f"Probes read {MAX_SAMPLES} of {samples} samples, chosen by a hash of their places."])
    kept = BottomKSample(MAX_SAMPLES)
    kept.add(
        {
            "hash": torch.where(finite, hashed(keys, CHOSEN), NOT_KEPT),
            "group": ids,
            "process": torch.zeros_like(keys),
            NUMBER: keys,
            "class": target,
            "target": target,
            "prediction": predicted,
            "confidence": confidence,
            "correct": torch.where((target < 0) | (predicted < 0), UNKNOWN, outcome),
            **pooled,
        }
    )
    noun = None if groups is None else group_noun
    whole = KeptSamples(kept, BottomKSample(1), tuple(features), noun, nonfinite=(~finite).sum())
    sources = tuple(f"{name} (features)" for name in features)
    fusion = FusionSummary(whole, sources, n_classes, "features alone do not show what the model uses", {})
    info(check_fusion(fusion))
    names = tuple(class_names) if class_names is not None else tuple(f"class_{i}" for i in range(n_classes))
    return DatasetResult({}, fusion, names, "target")


def _tensor(given: Any) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach().cpu()
    try:
        return torch.from_numpy(np.asarray(given))
    except (TypeError, ValueError) as error:  # strings, objects, rows of different lengths
        raise ShapeError(f"Expected an array of numbers; got {shown(repr(given))} ({first_line(error)}).") from None


def _describe(one: Tensor) -> str:
    return f"{tuple(one.shape)} of {str(one.dtype).removeprefix('torch.')}"
