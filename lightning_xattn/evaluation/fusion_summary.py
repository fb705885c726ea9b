"""The modalities of an evaluation: their probes, whether these agree, and how much each modality contributes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from lightning_xattn import functional
from lightning_xattn.attribution.contribution import Contributions
from lightning_xattn.attribution.faithfulness import Replaced
from lightning_xattn.attribution.kept_samples import IDENTITY, KeptSamples
from lightning_xattn.core.attention import Direction
from lightning_xattn.core.distributed import NUMBER
from lightning_xattn.core.ids import UNKNOWN_GROUP, id_text
from lightning_xattn.core.wording import decimal, describe_size, percent, say_interval
from lightning_xattn.evaluation.layer_summary import Comparison
from lightning_xattn.evaluation.probe_numbers import ProbeNumbers, find_places
from lightning_xattn.evaluation.saved_probes import SavedProbes
from lightning_xattn.evaluation.statistics import ERROR_SIDES, score_bins
from lightning_xattn.evaluation.support import Cell, describe_right, describe_support, measure_added_value
from lightning_xattn.functional.intervals import MINIMUM_GROUP, Estimate
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT, UNKNOWN
from lightning_xattn.functional.probe import JOINT, LEAST_OF_A_CLASS

PROPORTIONS = ("right", "correct", "supports", "additive_right", "model_right")
"""The numbers that are 0 or 1 in each sample, so that their means are proportions."""

_LIMITS = {
    **dict.fromkeys(("confidence", "conflict"), (0.0, 1.0)),
    **dict.fromkeys(("cost", "phi", "calibration_gap", "joint_gain"), (-1.0, 1.0)),
    "support": (-math.inf, 0.0),
}
"""The ranges of other numbers; contributions are to a probability."""


def say_missing(missing: Mapping[str, int]) -> str:
    """How many samples lack each modality, in words."""
    return " and ".join(f"{count} lack {name}" for name, count in missing.items())


def interaction_names(modalities: Sequence[str]) -> list[str]:
    """The names of the numbers with the joint effect of two modalities."""
    pairs = [f"interaction/{a}_{b}" for a, b in combinations(modalities, 2)]
    return pairs if len(modalities) > 2 else ["interaction"]


def _flatten_pooled(features: Tensor, width: int | None) -> Tensor:
    """Pooled features ``(samples, blocks, width)`` in a row; of single tokens the mean alone says it all.

    ``width``: that of saved probes, which tells the two apart; None: not known.
    """
    is_single = features.shape[1] > 1 and not bool(features[:, -1].any())
    if width in (features.shape[2], features.shape[1] * features.shape[2]):
        is_single = width == features.shape[2]
    return features[:, 0] if is_single else features.flatten(1)


NO_TARGETS = "there are no targets that are single classes"
"""Why there is no probe for a regression, or without labels."""


class FusionSummary:
    """An evaluation's modalities: probes, conflict, contributions, and the faithfulness of attention.

    Parameters
    ----------
    kept
        The samples of all processes.
    sources
        What holds each modality, and what is permuted instead, as ``audio = audio_encoder (permuted: x)``.
    n_classes
        Number of classes; 0 when there are none.
    contributions
        Of some of the samples; or why there are none.
    replaced
        By direction, the effect of replacing keys; empty where that was not measured.
    saved
        Probes of an earlier evaluation, which read these samples; None: probes are cross-fitted on them.

    Attributes
    ----------
    modalities
        Their names.
    sources
        As the parameter.
    numbers
        By name ``(samples,)`` float64, NaN where undefined: "confidence", "correct" (whether the prediction is),
        "calibration_gap" (correct minus confidence), "conflict", "support" (in nats), "supports/<modality>" (whether
        its probe predicts what the model predicts), "right/<modality>" (whether its probe is right), "right/joint"
        (the probe on all modalities) and "joint_gain/<modality>" (that minus whether the probe on all others is
        right); of the samples that were permuted "phi/<modality>", its standard error "error/<modality>" (as not all
        partners were run), those of ``interactions``, "additive_right" and "model_right"; and by direction
        "gain/<direction>", "reference/<direction>" and "cost/<direction>" of replaced keys.
    support_cell, right_cell
        ``(samples,)`` int64, see `functional.support_cells` and `functional.right_cells`; -1 where undefined.
    support_problem
        Why support is not computed; "" where it is.
    added_value
        What support adds to confidence in detecting errors, or why that is not computed.
    auroc_gains
        By modality, by how much the joint probe's macro AUROC is above that of the joint probe without it.
    folds
        ``(samples,)`` int64, those of the probes.
    rows
        By name ``(samples,)``: what is kept of each sample, with "hash" and ``IDENTITY``.
    probe_classes, probe_probabilities
        By modality ``(samples,)``: the most probable class of its probe (-1: not read), and its probability.
    probe_aurocs, calibration_errors
        By modality, and of "joint", the macro AUROC of the probe, and how far its confidences are from its accuracies.
    classes, outcomes, groups, predicted, target, sample_numbers
        ``(samples,)`` int64: class by which samples are grouped, outcome, key of the group, class ids (-1: none), and
        index of each sample in its process.
    probe_problems
        By modality, why its probe's predictions are not shown; only modalities that have such a problem.
    contribution_problem
        Why contributions are not computed; "" where they are.
    interactions
        The names of the numbers with the joint effect of two modalities: "interaction" of two modalities, or
        "interaction/<a>_<b>" of each pair of more; empty where contributions are not computed.
    is_regression
        Whether contributions are to a value, and not to the probability of a class. Over all samples they add up to 0,
        so there is no share of their mean.
    pairs, whole_runs
        Number of pairs replayed, and whether each replay ran all of the module around the fusion.
    nonfinite
        Samples left out because what enters the fusion is not finite.
    missing
        By modality, samples left out because they lack it; only modalities that some lack.
    unrecorded
        Samples left out because the modalities of their steps could not be recorded.
    replaced, saved
        As the parameters.
    """

    def __init__(
        self,
        kept: KeptSamples,
        sources: Sequence[str],
        n_classes: int,
        contributions: Contributions | str,
        replaced: Mapping[Direction, Replaced],
        saved: SavedProbes | None = None,
    ) -> None:
        self.modalities, self.group_noun, self.sources = kept.modalities, kept.group_noun, sources
        self.nonfinite, self._names = int(kept.nonfinite), kept.names
        self.unrecorded = kept.unrecorded
        self.missing = {name: int(count) for name, count in kept.missing.items() if count}
        self.n_classes = n_classes
        (rows,) = kept.probed.cpu().blocks()
        self.rows = {name: values for name, values in rows.items() if not name.startswith("features/")}
        widths = {} if saved is None else saved.widths
        self._features = {name: _flatten_pooled(rows[f"features/{name}"], widths.get(name)) for name in self.modalities}
        self.saved = saved
        if saved is not None:  # which may have been fitted on these very samples
            rows["target"] = torch.full_like(rows["target"], -1)
            rows["correct"] = torch.full_like(rows["correct"], UNKNOWN)
        self.classes, self.outcomes, self.groups = rows["class"], rows["correct"], rows["group"]
        self.predicted, self.target, self.sample_numbers = rows["prediction"], rows["target"], rows[NUMBER]
        self.numbers: dict[str, Tensor] = {"confidence": rows["confidence"].double()}
        self.folds = functional.assign_folds(self.groups)
        self.probe_problems: dict[str, str] = {}
        self.support_problem = ""
        self.probe_aurocs: dict[str, Estimate] = {}
        self.auroc_gains: dict[str, Estimate] = {}
        self.calibration_errors: dict[str, float] = {}
        self._add_probes()
        self.added_value = measure_added_value(self)
        self.contribution_problem = contributions if isinstance(contributions, str) else ""
        if self.contribution_problem and self.missing and not self.samples:
            self.contribution_problem = self._explain_no_samples()
        self.pairs, self.whole_runs, self.is_regression = 0, False, False
        self.interactions: tuple[str, ...] = ()
        if isinstance(contributions, Contributions):
            self._add_contributions(contributions)
        self.replaced = replaced
        for direction, one in replaced.items():
            spread = self._spreader(one.samples)
            self.numbers |= {
                f"{name}/{direction}": spread(getattr(one, name)) for name in ("gain", "reference", "cost")
            }

    def __repr__(self) -> str:
        size = describe_size(self.samples, self.known_groups, self.group_noun)
        problem = f"; contributions not computed: {self.contribution_problem}" if self.contribution_problem else ""
        return f"FusionSummary({' and '.join(self.modalities)}: {size}, {self.n_classes} classes{problem})"

    def merge_classes(self, kept: Sequence[int]) -> FusionSummary:
        """The same with these classes, in this order, and a last one that is all others."""
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
        """Number of samples that the probes read."""
        return len(self.rows["hash"])

    def name_sample(self, i: int) -> str:
        """The id of a sample as text, or where it has none its number."""
        if "id" in self.rows and (kind := int(self.rows["id_kind"][i])):
            number = self.rows["id"][i]
            name = id_text((number if kind == 1 else number.view(torch.float64)).item())
            return str(int(self.sample_numbers[i])) if name is None else name
        identity = int(self.rows["process"][i]), int(self.sample_numbers[i])
        return self._names.get(identity, str(identity[1]))

    @property
    def has_outcomes(self) -> bool:
        """Whether any prediction is known to be correct or not."""
        return bool(self.numbers["correct"].isfinite().any())

    @property
    def known_groups(self) -> int | None:
        """Number of groups of these samples; None where groups are not known."""
        return None if self.group_noun is None else int((self.groups.unique() != UNKNOWN_GROUP).sum())

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells of support, in the order of their numbers; empty where support is not computed."""
        return describe_support(self)

    @cached_property
    def right_cells(self) -> list[Cell]:
        """The cells of whose probe is right; empty where a probe has a problem, or there are no targets."""
        return describe_right(self)

    def fit_probes(self) -> dict[tuple[str, ...], tuple[Tensor, Tensor]]:
        """Probes for samples of other evaluations, see `functional.fit_probes`."""
        return functional.fit_probes(self._features, self.target, self.folds, self._n_probed, self._joints)

    @property
    def _joints(self) -> list[tuple[str, ...]]:
        """The modalities of joint probes: all, and all but one."""
        names = self.modalities
        return [names, *(tuple(one for one in names if one != name) for name in names)]

    @property
    def _n_probed(self) -> int:
        # Class ids without names do not show how many classes there are.
        return self.n_classes or 1 + max([0, *self.target.tolist()])

    def _add_probes(self) -> None:
        target, names = self.target, self.modalities
        if self.saved is None:
            probes = functional.cross_fitted_probes(self._features, target, self.folds, self._n_probed, self._joints)
        else:
            probes = self.saved.read(self._features)
        n_classes = probes[names].n_classes
        read = ProbeNumbers.of(probes, names, self.predicted, target, self.folds)
        self.probe_classes = {name: read.most_probable[name,] for name in names}
        self.probe_probabilities = {name: read.probability[name,] for name in names}
        labelled = (target >= 0) & (target < n_classes)
        counts = target[labelled].bincount(minlength=n_classes)
        self.largest_class = float(counts.max() / counts.sum()) if labelled.any() else math.nan
        ranked: dict[tuple[tuple[str, ...], bytes], tuple[float, Tensor]] = {}

        def rank(several: tuple[str, ...], chosen: Tensor) -> tuple[float, Tensor]:
            """The macro AUROC of a probe among some samples."""
            key = several, chosen.numpy().tobytes()
            if key not in ranked:
                of_target, probe = read.of_target[several][chosen], probes[several]
                own = find_places(probe.classes, target[chosen])
                ranked[key] = functional.macro_auroc_by_class(
                    lambda places: probe.of_known_class(places)[chosen], of_target, own, len(probe.classes)
                )
            return ranked[key]

        groups = None if self.group_noun is None else self.groups
        for name in (*names, JOINT):
            several = names if name == JOINT else (name,)
            chosen = labelled & read.is_read(several)
            right = (read.most_probable[several] == target).double()
            self.numbers[f"right/{name}"] = torch.where(chosen, right, torch.nan)
            of_read = None if groups is None else groups[chosen]
            self.probe_aurocs[name] = functional.estimate_by_influence(*rank(several, chosen), of_read, (0.0, 1.0))
            probability = read.probability[several]
            self.calibration_errors[name] = functional.calibration_error(probability[chosen], right[chosen])
            if self.saved is None and name != JOINT:  # saved probes were checked in their own evaluation
                problem = self._find_probe_problem(name, counts, int((labelled & ~chosen).sum()))
                self.probe_problems |= {name: problem} if problem else {}
        for name, others in zip(names, self._joints[1:], strict=True):
            both = labelled & read.is_read(names) & read.is_read(others)
            right = torch.where(both, (read.most_probable[others] == target).double(), torch.nan)
            self.numbers[f"joint_gain/{name}"] = self.numbers[f"right/{JOINT}"] - right
            (whole, influence), (less, of_less) = rank(names, both), rank(others, both)
            of_both, gain = None if groups is None else groups[both], (whole - less, influence - of_less)
            self.auroc_gains[name] = functional.estimate_by_influence(*gain, of_both, (-1.0, 1.0))
        self._add_support(read)

    def _add_support(self, read: ProbeNumbers) -> None:
        """Who supports the predictions, and who is right, unless a probe has a problem."""
        undefined = torch.full_like(self.numbers["confidence"], torch.nan)
        for name, supports in zip(self.modalities, read.supports, strict=True):
            self.numbers[f"supports/{name}"] = undefined if name in self.probe_problems else supports
        if self.samples and not (self.predicted >= 0).any():
            self.support_problem = "the model predicts no single class, as in a regression or with several labels"
        elif self.probe_problems:
            self.support_problem = "it needs a linear probe of each modality that predicts better than chance"
        none = torch.full_like(self.predicted, -1)
        self.numbers["conflict"] = undefined if self.probe_problems else read.conflict
        self.right_cell = none if self.probe_problems else read.right_cell
        self.numbers["support"] = undefined if self.support_problem else read.support
        self.support_cell = none if self.support_problem else read.support_cell
        known = (self.outcomes == CORRECT) | (self.outcomes == INCORRECT)
        correct = torch.where(known, (self.outcomes == CORRECT).double(), torch.nan)
        self.numbers |= {"correct": correct, "calibration_gap": correct - self.numbers["confidence"]}

    def _find_probe_problem(self, name: str, class_counts: Tensor, unread: int) -> str:
        accuracy, auroc = self.estimate(f"right/{name}"), self.probe_aurocs[name]
        if not self.samples:
            return self._explain_no_samples()
        if not class_counts.any():
            return NO_TARGETS
        if (class_counts >= LEAST_OF_A_CLASS).sum() < 2:
            return f"fewer than two classes have {LEAST_OF_A_CLASS} samples"
        if not accuracy.count:
            return "what it brings into the fusion does not vary within classes, or is all of one group"
        if unread:
            return (
                f"{unread} of {int(class_counts.sum())} samples cannot be read, as the others, without their fold, are "
                "of a single class or do not vary: there are too few groups of each class"
            )
        if math.isnan(accuracy.low):
            count = accuracy.count if accuracy.groups is None else accuracy.groups
            return f"it needs {MINIMUM_GROUP} {self.group_noun or 'samples'}, this run had {count}"
        if accuracy.low > self.largest_class or auroc.low > 0.5:
            return ""
        return (
            f"a linear probe of its pooled features is right for {percent(accuracy.mean)} of the samples, not clearly "
            f"better than the largest class ({percent(self.largest_class)}), and does not clearly rank the classes "
            f"(macro AUROC {decimal(auroc.mean)})"
        )

    def _explain_no_samples(self) -> str:
        if self.missing:
            return f"no sample has all modalities: {say_missing(self.missing)}"
        return "what enters the fusion is not finite in any sample"

    def _spreader(self, samples: Tensor) -> Callable[[Tensor], Tensor]:
        """Puts the values of some samples, ``(n, 2)`` of ``IDENTITY``, in the places of all; NaN elsewhere."""
        identities = torch.stack([self.rows[name] for name in IDENTITY], dim=1).tolist()
        place = {tuple(one): i for i, one in enumerate(identities)}
        places = torch.tensor([place.get(tuple(one), -1) for one in samples.tolist()], dtype=torch.long)
        known = places >= 0

        def spread(values: Tensor) -> Tensor:
            whole = torch.full((self.samples,), torch.nan, dtype=torch.float64)
            whole[places[known]] = values[known].double()
            return whole

        return spread

    def _add_contributions(self, found: Contributions) -> None:
        spread = self._spreader(found.samples)
        self.pairs, self.whole_runs, self.is_regression = found.pairs, found.whole, found.is_regression
        for i, name in enumerate(self.modalities):
            self.numbers[f"phi/{name}"] = spread(found.phi[:, i])
            self.numbers[f"error/{name}"] = spread(found.error[:, i])
        self.interactions = tuple(found.interactions)
        self.numbers |= {name: spread(one) for name, one in found.interactions.items()}
        for number, predicted in (("additive_right", spread(found.additive)), ("model_right", spread(found.predicted))):
            known = (self.target >= 0) & (predicted >= 0)
            self.numbers[number] = torch.where(known, (predicted == self.target).double(), torch.nan)

    def chosen(self, class_id: int | None = None, outcome: int | None = None) -> Tensor:
        """``(samples,)`` bool: which samples are of a class and an outcome."""
        everyone = torch.ones(self.samples, dtype=torch.bool)
        if class_id is not None:
            everyone &= self.classes == class_id
        return everyone if outcome is None else everyone & (self.outcomes == outcome)

    def estimate(
        self, number: str, class_id: int | None = None, outcome: int | None = None, among: Tensor | None = None
    ) -> Estimate:
        """The mean of a number over the samples of a class and an outcome ``among`` some of all, with its 95 % CI.

        The interval of a number that is 0 or 1 is that of a proportion, see `grouped_proportion_interval`; any other
        interval is within the number's range.
        """
        kind, values, chosen = number.partition("/")[0], self.numbers[number], self.chosen(class_id, outcome)
        chosen = chosen if among is None else chosen & among
        if kind in PROPORTIONS:
            return self._estimate(values, chosen, is_proportion=True)
        found = self._estimate(values, chosen)
        if kind not in _LIMITS or (kind == "phi" and self.is_regression):
            return found
        low, high = functional.within((found.low, found.high), _LIMITS[kind])
        return replace(found, low=low, high=high)

    def proportion(self, holds: Tensor, among: Tensor) -> Estimate:
        """The share of those among some samples for which something holds, both ``(samples,)`` bool."""
        return self._estimate(holds.double(), among, is_proportion=True)

    def share(self, modality: str, class_id: int | None = None, outcome: int | None = None) -> Estimate:
        """A modality's share of the mean contribution, see `contribution_shares`.

        NaN where the sum of all contributions is not clearly above 0, and for a regression.
        """
        phi, chosen = self._contributions(class_id, outcome)
        share = self._shares(phi, chosen)[modality]
        return self._ratio(share, phi[:, self.modalities.index(modality)], phi.sum(1), chosen)

    def shares(self, class_id: int | None = None, outcome: int | None = None) -> dict[str, float]:
        """The shares of all modalities without their intervals, see `share`."""
        return self._shares(*self._contributions(class_id, outcome))

    def _contributions(self, class_id: int | None, outcome: int | None) -> tuple[Tensor, Tensor]:
        """``(samples, modalities)``, and which samples of a class and an outcome have them."""
        phi = torch.stack([self.numbers[f"phi/{name}"] for name in self.modalities], dim=1)
        return phi, self.chosen(class_id, outcome) & phi.isfinite().all(1)

    def _shares(self, phi: Tensor, chosen: Tensor) -> dict[str, float]:
        if self.is_regression or self._estimate(phi.sum(1), chosen).low <= 0:
            return dict.fromkeys(self.modalities, math.nan)
        return dict(zip(self.modalities, functional.contribution_shares(phi[chosen]).tolist(), strict=True))

    def size(self, modality: str, class_id: int | None = None, outcome: int | None = None) -> Estimate:
        """The mean absolute contribution of a modality: by how much it moves the output."""
        found = self._estimate(self.numbers[f"phi/{modality}"].abs(), self.chosen(class_id, outcome))
        return replace(found, low=functional.within((found.low, found.high), (0.0, math.inf))[0])

    def faithfulness(self, direction: Direction, order: Literal["gain", "reference"] = "gain") -> Estimate:
        """How well an order of the keys ranks what the predictions depend on.

        1: the first keys hold all of it; 0: as a random order; NaN where replacing all keys does not clearly change the
        predictions.

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

    def faithfulness_problem(self, direction: Direction) -> str:
        """The reason why the faithfulness of a direction is not defined; "" where it is."""
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
        values = values[chosen]
        count = len(values)
        mean = float(values.mean()) if count else math.nan
        if self.group_noun is None and (count < MINIMUM_GROUP or not is_proportion):  # each sample is a group
            spread = float(values.std()) if count >= MINIMUM_GROUP else math.nan
            return Estimate(mean, *functional.mean_interval(mean, spread, count), count)
        index, groups = torch.arange(count), None
        if self.group_noun is not None:
            ids, index = self.groups[chosen].unique(return_inverse=True)
            groups = int((ids != UNKNOWN_GROUP).sum())
        # Samples of unknown groups widen the interval as one group, but do not count towards the minimum of groups.
        if groups is not None and groups < MINIMUM_GROUP:
            return Estimate(mean, math.nan, math.nan, count, groups)
        counts = index.bincount().double()
        sums = torch.zeros_like(counts).index_add(0, index, values)
        interval = functional.grouped_proportion_interval if is_proportion else functional.grouped_mean_interval
        return Estimate(mean, *interval(counts, sums), count, groups)

    def compare(self, number: str) -> Comparison:
        """Compare "confidence" or "support" between correct and incorrect predictions."""
        values = self.numbers[number]
        # Bins are of [0, 1]: the geometric mean of the probes' probabilities is in the order of support.
        scores = (values / len(self.modalities)).exp() if number == "support" else values
        defined = values.isfinite()
        outcomes = torch.stack([self.outcomes == CORRECT, self.outcomes == INCORRECT], dim=1)
        groups = None if self.group_noun is None else self.groups[defined]
        bins = score_bins(scores[defined], 0.0, 1.0)
        found = functional.separation(bins, outcomes[defined].double(), groups, ERROR_SIDES[number])
        correct, incorrect = (self.estimate(number, outcome=outcome).mean for outcome in (CORRECT, INCORRECT))
        counted = (outcomes & defined[:, None]).double()
        # Samples without a class (-1) come last.
        classes = torch.where(self.classes < 0, self.n_classes, self.classes).clamp_max(self.n_classes)
        counts, sums = (
            torch.zeros(self.n_classes + 1, 2, dtype=torch.float64).index_add(0, classes, terms)[:-1]
            for terms in (counted, counted * values.nan_to_num()[:, None])
        )
        adjusted = functional.class_adjusted_gap(counts, sums)
        return Comparison(**vars(found), gap=correct - incorrect, class_adjusted_gap=adjusted)
