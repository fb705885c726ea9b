"""The probes of a labelled evaluation, kept in a file for recordings that have no label yet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_xattn.core.errors import DataError
from lightning_xattn.core.files import complete_or_absent
from lightning_xattn.core.names import shown
from lightning_xattn.core.notices import first_line
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.functional.linear_probe import LinearProbe

if TYPE_CHECKING:
    from lightning_xattn.evaluation.fusion_summary import FusionSummary

FORMAT = 1
"""The version of the file's format."""


@dataclass(frozen=True, eq=False)
class SavedProbes:
    """Linear probes fitted on all samples of a labelled evaluation, and how often the model was right there.

    Attributes
    ----------
    modalities, sources, class_names
        Of the evaluation: names, what holds each modality, and the names of the classes.
    fits
        By modalities, of each alone and of several together: weights ``(classes, features)`` and bias ``(classes,)``,
        so that ``(features @ weights.T + bias).log_softmax(1)`` are log probabilities.
    accuracies
        Of each cell of support, in the order of `functional.support_cells`, the model's accuracy.
    fingerprint
        Of the model's weights, see `fingerprint`.
    """

    modalities: tuple[str, ...]
    sources: tuple[str, ...]
    class_names: tuple[str, ...]
    fits: dict[tuple[str, ...], tuple[Tensor, Tensor]]
    accuracies: tuple[Estimate, ...]
    fingerprint: str

    @classmethod
    def of(cls, fusion: FusionSummary | None, class_names: tuple[str, ...], made_by: str) -> SavedProbes:
        """The probes of a labelled evaluation of a model with a fingerprint.

        Raises
        ------
        DataError
            If support was not computed, or the evaluation was itself read by saved probes.
        """
        if fusion is None:
            raise DataError("There are no probes to save: the modalities are not known.")
        if problem := next(iter(fusion.probe_problems.values()), fusion.support_problem):
            raise DataError(f"There are no probes to save: {problem}.")
        if fusion.saved is not None:
            raise DataError("The probes of this evaluation come from a file. Save those of a labelled evaluation.")
        accuracies = tuple(cell.accuracy for cell in fusion.cells)
        sources = tuple(map(_place, fusion.sources))
        return cls(fusion.modalities, sources, class_names, fusion.fit_probes(), accuracies, made_by)

    def __repr__(self) -> str:
        return f"SavedProbes({' and '.join(self.modalities)}, {len(self.fits[self.modalities][1])} classes)"

    @property
    def widths(self) -> dict[str, int]:
        """By modality the number of its features."""
        return {name: self.fits[name,][0].shape[1] for name in self.modalities}

    def require_sources(self, sources: Sequence[str]) -> None:
        """Raise a DataError if the modalities are held by other modules than those of the probes."""
        if tuple(map(_place, sources)) != self.sources:
            raise DataError(
                f"The saved probes read {', '.join(self.sources)}; this run has {', '.join(map(_place, sources))}. "
                "Name the modalities as in the labelled evaluation: modalities={...}."
            )

    def read(self, features: Mapping[str, Tensor]) -> dict[tuple[str, ...], LinearProbe]:
        """By modalities what these probes predict of samples; NaN for samples whose features are not finite.

        Raises
        ------
        DataError
            If the features are of other modalities, or have other widths.
        """
        widths = {name: one.shape[1] for name, one in features.items()}
        found = {}
        for names, (weights, bias) in self.fits.items():
            width = sum(widths.get(name, -1) for name in names)
            if tuple(features) != self.modalities or width != weights.shape[1]:
                raise DataError(
                    f"The saved probes are of {' and '.join(self.modalities)}, with {weights.shape[1]} features of "
                    f"{' and '.join(names)}; this run has {' and '.join(features)}, with {width}."
                )
            score = partial(_score, [features[name] for name in names], weights, bias)
            samples = len(features[names[0]])
            found[names] = LinearProbe(score, samples, torch.arange(len(bias)), len(bias))
        return found

    def save(self, path: str | Path) -> None:
        """Write the probes to a file, which is complete or absent."""
        content = {
            "format": FORMAT,
            "modalities": list(self.modalities),
            "sources": list(self.sources),
            "class_names": list(self.class_names),
            "fits": [(list(names), weights, bias) for names, (weights, bias) in self.fits.items()],
            "accuracies": [vars(one) for one in self.accuracies],
            "fingerprint": self.fingerprint,
        }
        with complete_or_absent(Path(path)) as part:
            torch.save(content, part)

    @classmethod
    def load(cls, path: str | Path) -> SavedProbes:
        """The probes of a file. No code that is in the file runs.

        Raises
        ------
        DataError
            If there is no such file, or it holds no probes.
        """
        try:
            content: dict[str, Any] = torch.load(Path(path), map_location="cpu", weights_only=True)
            if content["format"] != FORMAT:
                raise DataError(
                    f"{shown(path)} has probes in format {content['format']}; this version reads format {FORMAT}. "
                    "Save them again."
                )
            return cls(
                tuple(content["modalities"]),
                tuple(content["sources"]),
                tuple(content["class_names"]),
                {tuple(names): (weights, bias) for names, weights, bias in content["fits"]},
                tuple(Estimate(**one) for one in content["accuracies"]),
                content["fingerprint"],
            )
        except DataError:
            raise
        except Exception as error:  # torch, pickle and a dict each have their own for a file that is something else
            raise DataError(
                f"{shown(path)} cannot be read as saved probes: {first_line(error)}. Expected a file that "
                "ExplainabilityCapture.save_probes wrote."
            ) from error

    def require_model(self, model: nn.Module) -> None:
        """Raise a DataError if the model has other weights than that of the probes."""
        if fingerprint(model) != self.fingerprint:
            raise DataError(
                "The saved probes are of a model with other weights, so they say nothing about this one. Save probes "
                "of this model: explainer.save_probes(explainer.explain_loader(labelled_loader), path)."
            )


def _score(features: Sequence[Tensor], weights: Tensor, bias: Tensor, rows: Tensor, classes: Tensor | slice) -> Tensor:
    """Scores as a `LinearProbe` takes them."""
    return torch.cat([one[rows].double() for one in features], dim=1) @ weights[classes].T + bias[classes]


def _place(source: str) -> str:
    """What holds a modality, without what is permuted in its place."""
    return source.partition(" (")[0]


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and values of a model's parameters and persistent buffers."""
    found = hashlib.blake2b(digest_size=16)
    # torch.compile puts a name of its own before the others.
    state = {name.replace("_orig_mod.", ""): one for name, one in model.state_dict().items()}
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor):
            found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
            found.update(dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
