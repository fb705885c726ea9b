"""Probes and support from arrays alone: features of each modality, logits, targets and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_xattn.attribution.kept_samples import CHOSEN, MAX_SAMPLES, BottomKSample, KeptSamples
from lightning_xattn.core.distributed import NUMBER
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.core.ids import group_keys, hashed
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
        to mean, maximum and standard deviation. Arrays or tensors; at least two modalities.
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
        If there are fewer than two modalities, or a target is outside of the classes.

    Examples
    --------
    >>> targets = torch.arange(200) % 2
    >>> eeg, spec = torch.randn(200, 8) + targets[:, None], torch.randn(200, 4, 5) + targets[:, None, None]
    >>> result = explain_features({"eeg": eeg, "spec": spec}, torch.randn(200, 2), targets)
    >>> [cell.name for cell in result.fusion.cells][:3]
    ['both', 'only EEG', 'only Spec']
    """
    scores, target = _tensor(logits), _tensor(targets)
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ShapeError(f"logits must be (samples, classes), floats; got {_describe(scores)}.")
    samples, n_classes = scores.shape
    if target.shape != (samples,) or target.is_floating_point():
        raise ShapeError(f"targets must be ({samples},) whole numbers, as logits are; got {_describe(target)}.")
    target = target.long()
    if bool((target >= n_classes).any()):
        raise SettingError(f"targets must be below {n_classes}, the number of classes; the largest is {target.max()}.")
    if len(features) < 2:
        raise SettingError(f"features needs at least two modalities, {{'eeg': ..., 'spec': ...}}; got {len(features)}.")
    if class_names is not None and len(class_names) != n_classes:
        raise SettingError(f"class_names must have {n_classes} names, one for each class; got {len(class_names)}.")
    keys = torch.arange(samples)
    ids = keys if groups is None else group_keys(groups, "cpu")
    if len(ids) != samples:
        raise ShapeError(f"groups must have {samples} ids, one for each sample; got {len(ids)}.")
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
    kept = BottomKSample(MAX_SAMPLES)
    kept.add(
        {
            "hash": hashed(keys, CHOSEN),
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
    whole = KeptSamples(kept, BottomKSample(1), tuple(features), None if groups is None else group_noun)
    sources = tuple(f"{name} (features)" for name in features)
    fusion = FusionSummary(whole, sources, n_classes, "features alone do not show what the model uses", {})
    names = tuple(class_names) if class_names is not None else tuple(f"class_{i}" for i in range(n_classes))
    return DatasetResult({}, fusion, names, "target")


def _tensor(given: Any) -> Tensor:
    return given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.asarray(given))


def _describe(one: Tensor) -> str:
    return f"{tuple(one.shape)} of {str(one.dtype).removeprefix('torch.')}"
