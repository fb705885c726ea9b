"""What an evaluation says of its modalities: what each says, whether they agree, and how much each contributes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_xattn.attribution.contribution import Contributions
from lightning_xattn.attribution.faithfulness import Replaced
from lightning_xattn.attribution.kept_samples import IDENTITY, FusionPart
from lightning_xattn.core.attention import Direction
from lightning_xattn.core.distributed import NUMBER
from lightning_xattn.core.group_keys import UNKNOWN_GROUP
from lightning_xattn.core.notebook import ShownInNotebooks
from lightning_xattn.core.wording import decimal, describe_size, percent, say_interval
from lightning_xattn.evaluation.layer_summary import Comparison
from lightning_xattn.functional import (
    class_adjusted_gap,
    conflict,
    contribution_shares,
    cross_fitted_probe,
    grouped_mean_interval,
    grouped_proportion_interval,
    grouped_separation,
    mean_interval,
    opposed,
    probe_right,
    proportion_interval,
    score_bins,
    separation,
    support_difference,
    within,
)
from lightning_xattn.functional.intervals import MINIMUM_GROUP
from lightning_xattn.functional.outcomes import BINS, CORRECT, INCORRECT
from lightning_xattn.functional.probe import LEAST_OF_A_CLASS


@dataclass(frozen=True)
class Estimate:
    """A mean, a proportion or a ratio with its 95 % CI; NaN where it is not defined."""

    mean: float
    low: float
    high: float
    count: int
    """Samples where it is defined."""
    groups: int | None
    """How many groups they belong to; None where groups are not known."""


PROPORTIONS = ("right", "probe_right", "supports_first", "opposed", "additive_right", "model_right")
"""The numbers that are 0 or 1 in each sample, so that their mean is a proportion."""

_LIMITS = {"confidence": (0.0, 1.0), "conflict": (0.0, 1.0), "cost": (-1.0, 1.0), "phi": (-1.0, 1.0)}
"""What other numbers can be; contributions those to a probability."""


class FusionSummary(ShownInNotebooks):
    """An evaluation's modalities: probes, conflict, and contributions where they were measured.

    Parameters
    ----------
    part
        What was collected, of all processes.
    n_classes
        How many classes there are; 0 when there are none.
    contributions
        Of some of the samples; a string says why there are none.
    replaced
        What replacing the keys of each direction does, where that was measured.

    Attributes
    ----------
    modalities
        Their names.
    numbers
        By name ``(samples,)`` float64, NaN where undefined: "confidence", "conflict", "support_difference",
        "supports_first" (whether the first modality's probe supports the prediction more), "probe_right",
        "right/<modality>" (whether its probe is right), and of the samples that were permuted "phi/<modality>", its
        standard error "error/<modality>" (as not all partners were run), "opposed", "followed", those of
        ``interactions``, "additive_right" and "model_right", and by direction "gain/<direction>",
        "reference/<direction>" and "cost/<direction>" of replaced keys.
    rows
        By name ``(samples,)``: what is kept of each sample, "hash" and ``IDENTITY`` among it.
    probes
        By modality ``(samples, classes)`` probabilities.
    classes, outcomes, groups, predicted, target, sample_numbers
        ``(samples,)`` int64: class by which samples are grouped, outcome, key of the group, class ids (-1: none), and
        which sample of its process each one is.
    unreadable
        By modality, why it cannot be read.
    uncontributed
        Why contributions cannot be told; "" where they can.
    interactions
        The names of the numbers that say what modalities do together that none does alone: "interaction" of two, or
        "interaction/<a>_<b>" of each two of more; empty where contributions cannot be told.
    of_value
        Whether contributions are to a value, and not to the probability of a class: over all samples they sum to
        nothing, so there is no share of their mean and nothing that they oppose.
    pairs, whole_runs
        How many pairs were replayed, and whether each replay ran all of the module around the fusion.
    left_out
        Samples that are left out because what enters the fusion is not finite.
    replaced
        As the parameter.
    """

    def __init__(
        self,
        part: FusionPart,
        n_classes: int,
        contributions: Contributions | str,
        replaced: Mapping[Direction, Replaced],
    ) -> None:
        self.modalities, self.group_noun, self.left_out = part.modalities, part.group_noun, part.left_out
        self.n_classes = n_classes
        rows = part.rows
        self.rows = {name: values for name, values in rows.items() if not name.startswith("features/")}
        self.classes, self.outcomes, self.groups = rows["class"], rows["correct"], rows["group"]
        self.predicted, self.target, self.sample_numbers = rows["prediction"], rows["target"], rows[NUMBER]
        self.numbers: dict[str, Tensor] = {"confidence": rows["confidence"].double()}
        self.unreadable: dict[str, str] = {}
        self._read(rows)
        self.uncontributed = contributions if isinstance(contributions, str) else ""
        self.pairs, self.whole_runs, self.of_value = 0, False, False
        self.interactions: tuple[str, ...] = ()
        if isinstance(contributions, Contributions):
            self._contribute(rows, contributions)
        self.replaced = replaced
        for direction, one in replaced.items():
            spread = self._spreading(one.samples)
            numbers = {"gain": one.gain, "reference": one.reference, "cost": one.cost}
            self.numbers |= {f"{name}/{direction}": spread(of) for name, of in numbers.items()}

    def __repr__(self) -> str:
        size = describe_size(self.samples, self.known_groups, self.group_noun)
        untold = f"; contributions cannot be told: {self.uncontributed}" if self.uncontributed else ""
        return f"FusionSummary({' and '.join(self.modalities)}: {size}, {self.n_classes} classes{untold})"

    def with_classes(self, kept: Sequence[int]) -> FusionSummary:
        """The same by these classes alone, in this order, and a last one that is all others."""
        of_class = torch.full((self.n_classes + 1,), len(kept))
        of_class[list(kept)] = torch.arange(len(kept))
        of_class[-1] = -1  # samples without a class
        same = copy(self)
        known = (self.classes >= 0) & (self.classes < self.n_classes)
        same.classes = of_class[torch.where(known, self.classes, -1)]
        same.n_classes = len(kept) + 1
        return same

    @property
    def samples(self) -> int:
        """How many samples were read."""
        return len(self.rows["hash"])

    @property
    def known_groups(self) -> int | None:
        """How many groups the samples belong to; None where groups are not known."""
        return None if self.group_noun is None else int((self.groups.unique() != UNKNOWN_GROUP).sum())

    def _read(self, rows: Mapping[str, Tensor]) -> None:
        target, predicted, folds = rows["target"], rows["prediction"], rows["fold"]
        # Class ids without names do not tell how many classes there are.
        n_classes = self.n_classes or 1 + max([0, *target.tolist()])
        logs = {
            name: cross_fitted_probe(rows[f"features/{name}"], target, folds, n_classes) for name in self.modalities
        }
        self.probes = {name: one.exp() for name, one in logs.items()}
        labelled = (target >= 0) & (target < n_classes)
        counts = target[labelled].bincount(minlength=n_classes)
        largest = float(counts.max() / counts.sum()) if labelled.any() else math.nan
        self.largest_class = largest
        for name, probe in self.probes.items():
            read = labelled & ~probe.isnan().any(1)
            right = (probe.argmax(1) == target).double()
            self.numbers[f"right/{name}"] = torch.where(read, right, torch.nan)
            accuracy = self.estimate(f"right/{name}")
            if not len(target):
                self.unreadable[name] = "what enters the fusion is not finite in any sample"
            elif not labelled.any():
                self.unreadable[name] = "there are no targets"
            elif (counts >= LEAST_OF_A_CLASS).sum() < 2:
                self.unreadable[name] = f"fewer than two classes have {LEAST_OF_A_CLASS} samples"
            elif not accuracy.count:
                self.unreadable[name] = "what it brings into the fusion does not vary, or is all of one group"
            elif math.isnan(accuracy.low):
                of_what = self.group_noun or "samples"
                there = accuracy.count if accuracy.groups is None else accuracy.groups
                self.unreadable[name] = f"there are {there} {of_what}, and it takes {MINIMUM_GROUP} to claim anything"
            elif not accuracy.low > largest:
                self.unreadable[name] = (
                    f"right for {percent(accuracy.mean)} of the samples, which is not clearly above the share of the "
                    f"largest class, {percent(largest)}"
                )
        several = torch.stack(list(self.probes.values()))
        undefined = torch.full_like(self.numbers["confidence"], torch.nan)
        known = not self.unreadable
        self.numbers["conflict"] = conflict(several) if known else undefined
        self.numbers["probe_right"] = probe_right(several, predicted, target) if known else undefined
        two = known and len(self.modalities) == 2
        supports = support_difference(torch.stack(list(logs.values())), predicted) if two else undefined
        self.numbers["support_difference"] = supports
        self.numbers["supports_first"] = torch.where(supports.isnan(), torch.nan, (supports > 0).double())

    def _spreading(self, samples: Tensor) -> Callable[[Tensor], Tensor]:
        """Puts numbers of some of the samples among all that were read, NaN elsewhere."""
        identities = torch.stack([self.rows[name] for name in IDENTITY], dim=1).tolist()
        place = {tuple(one): i for i, one in enumerate(identities)}
        places = torch.tensor([place.get(tuple(one), -1) for one in samples.tolist()], dtype=torch.long)
        known = places >= 0

        def spread(values: Tensor) -> Tensor:
            whole = torch.full((self.samples,), torch.nan, dtype=torch.float64)
            whole[places[known]] = values[known].double()
            return whole

        return spread

    def _contribute(self, rows: Mapping[str, Tensor], found: Contributions) -> None:
        spread = self._spreading(found.samples)
        for i, name in enumerate(self.modalities):
            self.numbers[f"phi/{name}"] = spread(found.phi[:, i])
            self.numbers[f"error/{name}"] = spread(found.error[:, i])
        if not found.of_value:
            self.numbers["opposed"] = spread(opposed(found.phi, found.error))
        self.numbers |= {name: spread(one) for name, one in found.interactions.items()}
        if len(self.modalities) == 2:
            self.numbers["followed"] = spread(found.phi[:, 0] - found.phi[:, 1])
        target = rows["target"]
        for number, predicted in (("additive_right", spread(found.additive)), ("model_right", spread(found.predicted))):
            known = (target >= 0) & (predicted >= 0)
            self.numbers[number] = torch.where(known, (predicted == target).double(), torch.nan)
        self.pairs, self.whole_runs, self.of_value = found.pairs, found.whole, found.of_value
        self.interactions = tuple(found.interactions)

    def chosen(self, class_id: int | None = None, outcome: int | None = None) -> Tensor:
        """``(samples,)`` bool: those of a class and an outcome."""
        everyone = torch.ones(self.samples, dtype=torch.bool)
        if class_id is not None:
            everyone &= self.classes == class_id
        return everyone if outcome is None else everyone & (self.outcomes == outcome)

    def estimate(self, number: str, class_id: int | None = None, outcome: int | None = None) -> Estimate:
        """Mean of a number over the samples of a class and an outcome where it is defined, with its 95 % CI.

        That of a number that is 0 or 1 is a proportion's, see `grouped_proportion_interval`; any other is within the
        number's range.
        """
        kind, values, chosen = number.partition("/")[0], self.numbers[number], self.chosen(class_id, outcome)
        if kind in PROPORTIONS:
            return self._estimate(values, chosen, is_proportion=True)
        found = self._estimate(values, chosen)
        if kind not in _LIMITS or (kind == "phi" and self.of_value):
            return found
        low, high = within((found.low, found.high), _LIMITS[kind])
        return replace(found, low=low, high=high)

    def share(self, modality: str, class_id: int | None = None, outcome: int | None = None) -> Estimate:
        """Share of the mean contribution that a modality has, see `contribution_shares`.

        NaN where the mean of all contributions is not clearly above 0, so that there is nothing to share: always so of
        a value.
        """
        phi = torch.stack([self.numbers[f"phi/{name}"] for name in self.modalities], dim=1)
        chosen = self.chosen(class_id, outcome) & phi.isfinite().all(1)
        nothing = self.of_value or self._estimate(phi.sum(1), chosen).low <= 0
        share = math.nan if nothing else float(contribution_shares(phi[chosen])[self.modalities.index(modality)])
        return self._ratio(share, phi[:, self.modalities.index(modality)], phi.sum(1), chosen)

    def size(self, modality: str, class_id: int | None = None, outcome: int | None = None) -> Estimate:
        """Mean of the absolute contribution of a modality: by how much it moves the output."""
        found = self._estimate(self.numbers[f"phi/{modality}"].abs(), self.chosen(class_id, outcome))
        return replace(found, low=within((found.low, found.high), (0.0, math.inf))[0])

    def faithfulness(self, direction: Direction, order: Literal["gain", "reference"] = "gain") -> Estimate:
        """How well an order of the keys ranks what the predictions depend on, with the interval of a ratio.

        1: the first keys hold all of it; 0: what a random order gives; NaN where it does not clearly cost anything to
        replace all keys.

        Parameters
        ----------
        direction
            One of ``replaced``.
        order
            That of the attention, or of the reference, signed gradient x attention.
        """
        gain, cost = self.numbers[f"{order}/{direction}"], self.numbers[f"cost/{direction}"]
        chosen = gain.isfinite() & cost.isfinite()
        matters = self.estimate(f"cost/{direction}").low > 0
        ratio = float(gain[chosen].mean() / cost[chosen].mean()) if matters else math.nan
        return self._ratio(ratio, gain, cost, chosen)

    def unfaithful(self, direction: Direction) -> str:
        """Why it is not told whether the attention ranks what the predictions depend on; "" where it is."""
        cost = self.estimate(f"cost/{direction}")
        if self.replaced[direction].problem or cost.low > 0:
            return self.replaced[direction].problem
        if math.isnan(cost.low):
            return "too few samples have several keys and a partner of another group"
        interval = f"95 % CI {say_interval(cost.low, cost.high)}"
        return f"bypassed: it costs {decimal(cost.mean, 3)} ({interval}) to replace all of its keys"

    def _ratio(self, ratio: float, part: Tensor, whole: Tensor, chosen: Tensor) -> Estimate:
        """A ratio of two means, with the interval of its linearisation (delta method)."""
        around = self._estimate((part - ratio * whole) / whole[chosen].mean(), chosen)
        return Estimate(ratio, ratio + around.low, ratio + around.high, around.count, around.groups)

    def _estimate(self, values: Tensor, chosen: Tensor, is_proportion: bool = False) -> Estimate:
        chosen = chosen & values.isfinite()
        values, count = values[chosen], int(chosen.sum())
        mean = float(values.mean()) if count else math.nan
        if self.group_noun is None:
            deviation = float(values.std()) if count > 1 else math.nan
            ends = mean_interval(mean, deviation, count)
            ends = proportion_interval(int(values.sum()), count) if is_proportion else ends
            return Estimate(mean, *ends, count, None)
        ids, index = self.groups[chosen].unique(return_inverse=True)
        known = int((ids != UNKNOWN_GROUP).sum())
        counts = torch.zeros(len(ids), dtype=torch.float64).index_add(0, index, torch.ones_like(values))
        sums = torch.zeros(len(ids), dtype=torch.float64).index_add(0, index, values)
        # Samples of unknown groups widen the interval as one group does, but are none that a claim may rest on.
        if known < MINIMUM_GROUP:
            return Estimate(mean, math.nan, math.nan, count, known)
        interval = grouped_proportion_interval if is_proportion else grouped_mean_interval
        return Estimate(mean, *interval(counts, sums), count, known)

    def compare(self, number: str) -> Comparison:
        """Does a number in [0, 1], "conflict" or "confidence", tell correct from incorrect predictions?"""
        values = self.numbers[number]
        defined = values.isfinite()
        bins, outcomes = score_bins(values[defined], 0.0, 1.0), self.outcomes[defined]
        counts = torch.stack([outcomes == CORRECT, outcomes == INCORRECT], dim=1).double()
        if self.group_noun is None:
            histograms = torch.zeros(BINS, 2, dtype=torch.float64).index_add(0, bins, counts)
            found = separation(*histograms.unbind(1))
        else:
            found = grouped_separation(bins, self.groups[defined], counts, unknown=UNKNOWN_GROUP)
        correct, incorrect = (self.estimate(number, outcome=outcome).mean for outcome in (CORRECT, INCORRECT))
        by_class = [
            [self._estimate(values, self.chosen(class_id, outcome)) for outcome in (CORRECT, INCORRECT)]
            for class_id in range(self.n_classes)
        ]
        within = torch.tensor([[[one.count, one.count * one.mean] for one in two] for two in by_class]).double()
        adjusted = class_adjusted_gap(within[..., 0], within[..., 1].nan_to_num()) if by_class else math.nan
        return Comparison(
            **vars(found), cliffs_delta=found.cliffs_delta, gap=correct - incorrect, class_adjusted_gap=adjusted
        )
