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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_xattn.core.wording import SINGLE_KEY
from lightning_xattn.evaluation.results import AttentionStatistics, SampleResult
from lightning_xattn.functional.row_collector import SPARSITY_THRESHOLD
from lightning_xattn.report.undefined import NO_ROW, first_layer

FOCUSED = "Pattern 1: focused attention"
DIFFUSE = "Pattern 2: diffuse attention"
AGREEING = "Pattern 3: high modality agreement"
DISAGREEING = "Pattern 4: low modality agreement"
PATTERNS = (FOCUSED, DIFFUSE, AGREEING, DISAGREEING)
SUPPORT = "Support of the prediction"
IF_CORRECT = "Checklist for a correct prediction"
IF_INCORRECT = "Checklist for an incorrect prediction"


@dataclass(frozen=True)
class Criterion:
    """One threshold of the guide, compared with one sample.

    Attributes
    ----------
    group
        What it belongs to: one of ``PATTERNS``, ``IF_CORRECT``, ``IF_INCORRECT``, or ``SUPPORT``.
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
        Why the answer is weaker than it seems; None where it is not.

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


_AGREEMENT = "modality_agreement"
_RULES: dict[str, tuple[tuple[str, Literal[">", "<"], float], ...]] = {
    FOCUSED: (("max", ">", 0.7), ("entropy", "<", 0.5), ("sparsity", ">", 50.0)),
    DIFFUSE: (("max", "<", 0.5), ("entropy", ">", 0.7), ("sparsity", "<", 25.0)),
    AGREEING: ((_AGREEMENT, ">", 0.7),),
    DISAGREEING: ((_AGREEMENT, "<", 0.2),),
    IF_CORRECT: ((_AGREEMENT, ">", 0.5), ("entropy", "<", 0.5), ("sparsity", ">", 50.0), ("max", ">", 0.7)),
    IF_INCORRECT: ((_AGREEMENT, "<", 0.2), ("entropy", ">", 0.7), ("sparsity", "<", 25.0), ("max", "<", 0.5)),
}
"""By pattern or checklist: the agreement or a field of `AttentionStatistics`, and its threshold."""
_WORDS = {
    _AGREEMENT: "modality agreement",
    "entropy": "entropy",
    "sparsity": "sparsity",
    "max": "mean of the rows' largest weights",
}


def interpret_sample(explanation: SampleResult) -> list[Criterion]:
    """Compare one sample with the guide's four patterns and the checklist that applies to it.

    The checklist is the one for a correct or for an incorrect prediction; both where the outcome is not known. The
    thresholds are the guide's rules of thumb, not evidence (see the module's docstring).

    Attention to a single key holds no information: whatever the model learned, its largest weight is 1 and no weight is
    below 0.1, so criteria on it are undefined. Where the number of keys alone decides a criterion, its ``caveat`` says
    so: over more than ten keys even uniform attention is sparse, over two keys the largest weight is at least 0.5.

    Parameters
    ----------
    explanation
        The sample.

    Returns
    -------
    list of Criterion
        First, where the sample's probes are known, which modalities support the prediction, as a sentence; then in the
        guide's order, patterns first.

    Examples
    --------
    >>> results = ExplainabilityCapture(model).explain_batch(batch)
    >>> criteria = interpret_sample(results["per_sample_explanations"][0])
    >>> len(criteria)  # 8 of the four patterns, and 4 of the checklist that applies
    12
    """
    applies = {True: (IF_CORRECT,), False: (IF_INCORRECT,), None: (IF_CORRECT, IF_INCORRECT)}[explanation["correct"]]
    criteria = [_judge(explanation, group, *rule) for group in (*PATTERNS, *applies) for rule in _RULES[group]]
    return [*_judge_support(explanation), *criteria]


def _judge_support(explanation: SampleResult) -> Iterator[Criterion]:
    """Who supports the prediction, where it is known: the number of modalities that do, and all of them."""
    modalities = explanation.get("modalities")
    if modalities is not None and modalities.supporters is not None:
        supporters, count = len(modalities.supporters), len(modalities.probes)
        yield Criterion(SUPPORT, str(modalities), supporters, count, supporters == count, None, None)


def uniform_is_sparse(statistics: AttentionStatistics) -> bool:
    """Whether uniform attention over this number of keys counts as sparse; the mean weight is one over it."""
    return not math.isnan(statistics.mean) and round(1 / statistics.mean) > 1 / SPARSITY_THRESHOLD


def _judge(
    explanation: SampleResult, group: str, quantity: str, relation: Literal[">", "<"], threshold: float
) -> Criterion:
    value, direction, caveat = explanation["modality_agreement"], None, None
    if quantity != _AGREEMENT:
        statistics = first_layer(explanation["attention_stats"])
        # Where the entropy is undefined each row has a single key or none, so no statistic holds information.
        values = {name: math.nan if math.isnan(one.entropy) else one[quantity] for name, one in statistics.items()}
        # The direction that is farthest from meeting the rule, an undefined one before all.
        farthest = min if relation == ">" else max
        direction = next(
            (name for name in values if math.isnan(values[name])), farthest(values, key=values.__getitem__)
        )
        value, caveat = values[direction], _caveat(quantity, statistics[direction])
    met = None if math.isnan(value) else value > threshold if relation == ">" else value < threshold
    words = f"{_WORDS[quantity]} {relation} {threshold:g}{' %' if quantity == 'sparsity' else ''}"
    return Criterion(group, words, value, threshold, met, direction, caveat)


def _caveat(quantity: str, statistics: AttentionStatistics) -> str | None:
    if math.isnan(statistics.mean):
        return NO_ROW
    if math.isnan(statistics.entropy):
        return SINGLE_KEY
    keys = 1 / statistics.mean  # a row's mean weight is one over its number of keys
    if quantity == "sparsity" and uniform_is_sparse(statistics):
        return f"with {keys:.0f} keys even uniform attention has 100 %"
    if quantity == "max" and round(keys) <= 2:
        return f"with {keys:.0f} keys a row's largest weight is at least {1 / keys:.2g}"
    return None
