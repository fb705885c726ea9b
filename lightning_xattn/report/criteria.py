"""The guide's patterns and checklists for one sample: each threshold, met or not.

The thresholds are the guide's rules of thumb and no evidence: nobody tested that samples which meet them are predicted
correctly more often. The report of a whole data set tests that for the alignment and the entropy.

Where the guide gives a threshold, it is taken. For entropy and sparsity it only says "low", "high", "sparse" and
"diffuse", with an example of each (entropy 0.2 and 0.9, sparsity 85 % and 5 %). For the largest weight it gives
both: examples 0.95 and 0.35, thresholds 0.7 and 0.5, which lie 58 % and 25 % of the way from the diffuse to the focused
example. The same shares of the way are an entropy of 0.49 and 0.73 and a sparsity of 52 % and 25 %; rounded, they are
the thresholds here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lightning_xattn.core.attention import Direction
from lightning_xattn.core.wording import SINGLE_KEY, decimal, say_interval
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import AttentionStatistics, DatasetResult, SampleResult
from lightning_xattn.evaluation.statistics import ALIGNMENT, STATISTICS, Column, score_bins
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.functional.rows import SPARSITY_THRESHOLD
from lightning_xattn.report.undefined import NO_ROW, first_layer

HIGH_AGREEMENT, LOW_AGREEMENT = 0.7, 0.2
"""Modality agreement of patterns 3 and 4; the low one is in the checklist for an incorrect prediction too."""

CHECKLIST_AGREEMENT = 0.5
"""Modality agreement that the checklist for a correct prediction asks for."""

FOCUSED_MAX, DIFFUSE_MAX = 0.7, 0.5
"""Largest weight, of both checklists."""

LOW_ENTROPY, HIGH_ENTROPY = 0.5, 0.7
"""Normalised entropy; chosen here, see above."""

SPARSE, DIFFUSE_SPARSITY = 50.0, 25.0
"""Percentage of weights below 0.1; chosen here, see above."""

FOCUSED = "Pattern 1: focused attention"
DIFFUSE = "Pattern 2: diffuse attention"
AGREEING = "Pattern 3: high modality agreement"
DISAGREEING = "Pattern 4: low modality agreement"
PATTERNS = (FOCUSED, DIFFUSE, AGREEING, DISAGREEING)
IF_CORRECT = "Checklist for a correct prediction"
IF_INCORRECT = "Checklist for an incorrect prediction"


@dataclass(frozen=True)
class Criterion:
    """One threshold of the guide, held against one sample.

    Attributes
    ----------
    group
        The pattern or checklist that it belongs to: one of ``PATTERNS``, ``IF_CORRECT``, ``IF_INCORRECT``.
    criterion
        In words, e.g. ``"entropy < 0.5"``.
    value
        What the sample has, in the unit of the threshold; NaN where undefined. A criterion on attention has to hold in
        every recorded direction of the first layer, so this is the value farthest from meeting it.
    threshold
        What it is compared with.
    met
        None where the value is undefined.
    direction
        The direction that the value is from, e.g. ``"eeg_to_spec"``; None for the modality agreement.
    caveat
        Why the answer says less than it seems to; None where it does not.

    Examples
    --------
    >>> results = ExplainabilityCapture(model).explain_batch(batch)
    >>> one = interpret_sample(results["per_sample_explanations"][0])[0]
    >>> one.criterion, one.met == (one.value > one.threshold)
    ("mean of the rows' largest weights > 0.7", True)
    """

    group: str
    criterion: str
    value: float
    threshold: float
    met: bool | None
    direction: str | None
    caveat: str | None
    evidence: str | None
    """What the data set that the sample is of shows of this number in correct and incorrect predictions; None where
    that is not known."""


@dataclass(frozen=True)
class _Rule:
    group: str
    quantity: str  # a field of AttentionStatistics, or the agreement
    above: bool
    threshold: float


_AGREEMENT = "modality_agreement"
_RULES = (
    _Rule(FOCUSED, "max", True, FOCUSED_MAX),
    _Rule(FOCUSED, "entropy", False, LOW_ENTROPY),
    _Rule(FOCUSED, "sparsity", True, SPARSE),
    _Rule(DIFFUSE, "max", False, DIFFUSE_MAX),
    _Rule(DIFFUSE, "entropy", True, HIGH_ENTROPY),
    _Rule(DIFFUSE, "sparsity", False, DIFFUSE_SPARSITY),
    _Rule(AGREEING, _AGREEMENT, True, HIGH_AGREEMENT),
    _Rule(DISAGREEING, _AGREEMENT, False, LOW_AGREEMENT),
    _Rule(IF_CORRECT, _AGREEMENT, True, CHECKLIST_AGREEMENT),
    _Rule(IF_CORRECT, "entropy", False, LOW_ENTROPY),
    _Rule(IF_CORRECT, "sparsity", True, SPARSE),
    _Rule(IF_CORRECT, "max", True, FOCUSED_MAX),
    _Rule(IF_INCORRECT, _AGREEMENT, False, LOW_AGREEMENT),
    _Rule(IF_INCORRECT, "entropy", True, HIGH_ENTROPY),
    _Rule(IF_INCORRECT, "sparsity", False, DIFFUSE_SPARSITY),
    _Rule(IF_INCORRECT, "max", False, DIFFUSE_MAX),
)
_WORDS = {
    _AGREEMENT: "modality agreement",
    "entropy": "entropy",
    "sparsity": "sparsity",
    "max": "mean of the rows' largest weights",
}


def interpret_sample(explanation: SampleResult, dataset: DatasetResult | None = None) -> list[Criterion]:
    """Hold one sample against the guide's four patterns and the checklist that applies to it.

    The checklist is the one for a correct or for an incorrect prediction; both where the outcome is not known. The
    thresholds are the guide's rules of thumb, not evidence (see the module's docstring).

    Attention to a single key says nothing: it has a largest weight of 1 and no weight below 0.1 whatever the model
    learned, so criteria on it are undefined. Where the number of keys alone decides a criterion, its ``caveat`` says
    so: over more than ten keys even uniform attention is sparse, over two keys the largest weight is at least 0.5.

    Parameters
    ----------
    explanation
        The sample.
    dataset
        What ``explain_loader`` said of the data set that it is of: each criterion then has what this model's own
        numbers say, as ``evidence``.

    Returns
    -------
    list of Criterion
        In the guide's order: patterns first.

    Examples
    --------
    >>> results = ExplainabilityCapture(model).explain_batch(batch)
    >>> criteria = interpret_sample(results["per_sample_explanations"][0])
    >>> len(criteria)  # 8 of the four patterns, and 4 of the checklist that applies
    12
    """
    applies = {True: (IF_CORRECT,), False: (IF_INCORRECT,), None: (IF_CORRECT, IF_INCORRECT)}[explanation["correct"]]
    summary = None if dataset is None else next(iter(dataset.summaries.values()), None)
    return [_judge(rule, explanation, summary) for rule in _RULES if rule.group in (*PATTERNS, *applies)]


def uniform_is_sparse(statistics: AttentionStatistics) -> bool:
    """Whether uniform attention over this number of keys counts as sparse; the mean weight is one over it."""
    return not math.isnan(statistics.mean) and round(1 / statistics.mean) > 1 / SPARSITY_THRESHOLD


def _judge(rule: _Rule, explanation: SampleResult, summary: LayerSummary | None) -> Criterion:
    value, direction, caveat = explanation["modality_agreement"], None, None
    if rule.quantity != _AGREEMENT:
        statistics = first_layer(explanation["attention_stats"])
        value, direction = _farthest(rule, statistics)
        caveat = _caveat(rule.quantity, statistics[direction])
    met = None if math.isnan(value) else value > rule.threshold if rule.above else value < rule.threshold
    unit = " %" if rule.quantity == "sparsity" else ""
    words = f"{_WORDS[rule.quantity]} {'>' if rule.above else '<'} {rule.threshold:g}{unit}"
    evidence = None if summary is None else _evidence(rule, direction, summary)
    return Criterion(rule.group, words, value, rule.threshold, met, direction, caveat, evidence)


def _evidence(rule: _Rule, direction: str | None, summary: LayerSummary) -> str | None:
    """What a data set's numbers say of a quantity in correct and incorrect predictions."""
    column = ALIGNMENT if direction is None else Column(rule.quantity, Direction.parse(direction.rpartition("/")[2]))
    if column not in summary.columns:
        return None
    outcomes = {"correct": CORRECT, "incorrect": INCORRECT}
    known = {name: one for name, one in outcomes.items() if summary.count(column, outcome=one)}
    if not known:
        return None
    means = []
    for name, outcome in known.items():
        low, high = summary.interval(column, outcome=outcome)
        interval = "" if math.isnan(low) else f" (95 % CI {say_interval(low, high)})"
        means.append(f"{name} {decimal(summary.mean(column, outcome=outcome), 3)}{interval}")
    said = f"means in its data set: {', '.join(means)}"
    if column != ALIGNMENT:
        return said
    met = []
    for name, outcome in known.items():
        counts = summary.histogram(ALIGNMENT, outcome)
        edge = int(score_bins(torch.tensor(rule.threshold), *STATISTICS[ALIGNMENT.statistic].range))
        met.append(f"{int((counts[edge:] if rule.above else counts[:edge]).sum())} of {int(counts.sum())} {name}")
    found = summary.compare(ALIGNMENT)
    if not math.isnan(found.auroc):
        said += f"; AUROC {decimal(found.auroc, 3)} (95 % CI {say_interval(found.low, found.high)})"
    return f"met there by {' and '.join(met)} predictions; {said}"


def _farthest(rule: _Rule, statistics: dict[str, AttentionStatistics]) -> tuple[float, str]:
    """The value that is farthest from meeting the rule, an undefined one before all, and its direction."""
    # Where the entropy is undefined each row has a single key or there is none: then no statistic says anything.
    values = [
        (math.nan if math.isnan(of_one.entropy) else of_one[rule.quantity], name) for name, of_one in statistics.items()
    ]
    return min(values, key=lambda item: -math.inf if math.isnan(item[0]) else item[0] if rule.above else -item[0])


def _caveat(quantity: str, statistics: AttentionStatistics) -> str | None:
    if math.isnan(statistics.mean):
        return NO_ROW
    if math.isnan(statistics.entropy):
        return SINGLE_KEY
    keys = 1 / statistics.mean  # a row's mean weight is one over its number of keys
    if quantity == "sparsity" and uniform_is_sparse(statistics):
        return f"with {keys:.0f} keys even uniform attention has 100 %"
    if quantity == "max" and round(keys) <= 1 / DIFFUSE_MAX:
        return f"with {keys:.0f} keys a row's largest weight is at least {1 / keys:.2g}"
    return None
