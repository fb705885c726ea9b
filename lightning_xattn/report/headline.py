"""The answer in ten seconds: one sentence about an evaluation, three numbers, and what needs an action."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lightning_xattn.core.wording import by_reason, decimal, describe_size, name_modality, percent, say_interval
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.evaluation.support import estimate_unsupported, unused
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.functional.probe import JOINT
from lightning_xattn.functional.shapley import MOSTLY


@dataclass(frozen=True)
class Headline:
    """What a reader should know of an evaluation.

    Attributes
    ----------
    sentence
        What the model uses, whether its modalities support its predictions, and whether errors differ in that.
    numbers
        Probe accuracy, contribution and support, each with its 95 % CI, or why it is not computed.
    warnings
        What needs an action, a sentence each.

    Examples
    --------
    >>> from lightning_xattn.report.headline import Headline
    >>> Headline("The model mostly uses EEG (88 % of the contribution).", (), ()).sentence
    'The model mostly uses EEG (88 % of the contribution).'
    """

    sentence: str
    numbers: Sequence[tuple[str, str]]
    warnings: Sequence[str]


def describe_headline(result: DatasetResult) -> Headline:
    """The headline of an evaluation. It claims nothing that a 95 % CI does not support.

    Parameters
    ----------
    result
        Of one dataloader.
    """
    fusion = result.fusion
    if fusion is None:
        return Headline(_describe_attention(result), (), ())
    numbers = (
        ("Probe accuracy", _explain_bracket(list_probes(fusion))),
        ("Contribution", _explain_bracket(list_shares(fusion))),
        ("Support", _explain_bracket(list_support(fusion))),
    )
    return Headline(_describe_fusion(fusion), numbers, tuple(_find_warnings(fusion)))


CAPTIONS = {
    "Probe accuracy": "How often a linear probe on each modality alone, and on all jointly, predicts the right class.",
    "Contribution": "Each modality's share of what moves the model's prediction when modalities are permuted. Below 0 "
    "it opposes the predictions, and another one is then above 100 %.",
    "Support": "Share of the predictions that the probes of all modalities predict, too, or none, with the model's "
    "accuracy there.",
}
"""What each number means."""


def describe_with_captions(result: DatasetResult) -> str:
    """The headline of an evaluation as Markdown, with the meaning of each number."""
    found = describe_headline(result)
    parts = [f"**{found.sentence}**"]
    parts += [f"**{name}:** {text}  \n*{CAPTIONS[name]}*" for name, text in found.numbers]
    parts += [f"**Warning:** {text}" for text in found.warnings]
    return "\n\n".join(parts) + "\n"


def _describe_attention(result: DatasetResult) -> str:
    """Of an evaluation of which the modalities are not known."""
    if not result.summaries:
        return "Nothing was recorded."
    one = result.headline
    size = describe_size(one.samples, one.groups(), one.group_noun)
    return f"Attention alone was recorded ({size}): what enters the fusion is not known."


def _describe_fusion(fusion: FusionSummary) -> str:
    use = [*_describe_use(fusion)]
    clauses = [
        *_describe_failure(fusion),
        *use,
        *_describe_agreement(fusion, "its" if use and not fusion.is_regression else "the model's"),
    ]
    if clauses:
        said = "; ".join(clauses)
        return f"{said[0].upper()}{said[1:]}."
    if not fusion.samples:
        return "Nothing is computed of the modalities: no sample has all of them."
    return f"Neither what the model uses nor who supports its predictions is known ({fusion.samples} samples)."


def _describe_failure(fusion: FusionSummary) -> Iterator[str]:
    """That the model learned nothing that shows, if so: what else is found is then of no use."""
    model, largest = fusion.estimate("correct"), fusion.largest_class
    if math.isfinite(model.low) and model.low <= largest < 1:
        right, guessed = percent(model.mean, 0), percent(largest, 0)
        yield f"the model is right for {right} of the samples, not clearly more than the largest class ({guessed})"


def _describe_use(fusion: FusionSummary) -> Iterator[str]:
    """What the model uses, if that is known."""
    if fusion.contribution_problem:
        return
    if fusion.is_regression:
        sizes = [f"{name_modality(name)} by {decimal(fusion.size(name).mean)}" for name in fusion.modalities]
        yield f"on average the output moves with {_join(sizes)}"
        return
    shares = {name: fusion.share(name) for name in fusion.modalities}
    known = {name: share for name, share in shares.items() if math.isfinite(share.low)}
    if len(known) < len(shares):
        return
    most = max(known, key=lambda name: known[name].mean)
    if known[most].low > MOSTLY:
        # Above 1 where another modality opposes the predictions.
        share = "all" if known[most].mean > 1 else percent(known[most].mean, 0)
        yield f"the model mostly uses {name_modality(most)} ({share} of the contribution)"
        return
    used = {name: share for name, share in known.items() if share.low > 0}
    if not used:
        return
    listed = [f"{name_modality(name)} ({percent(share.mean, 0)})" for name, share in used.items()]
    listed[0] = f"{listed[0][:-1]} of the contribution)"
    others = [name_modality(name) for name in known if name not in used]
    yield f"the model uses {_join(listed)}" + (f", not clearly {_join(others)}" if others else "")


def _describe_agreement(fusion: FusionSummary, whose: str) -> Iterator[str]:
    """Who supports the predictions, and whether errors are where nobody does, if that is known."""
    if not fusion.cells or not (fusion.support_cell >= 0).any():
        return
    first, none = fusion.cells[0], estimate_unsupported(fusion)
    is_pair = len(fusion.modalities) == 2
    who, nobody = ("both modalities support", "neither does") if is_pair else ("all modalities support", "none does")
    said = f"{who} {percent(first.share.mean, 0)} of {whose} predictions"
    right = percent(first.accuracy.mean, 0), percent(none.mean, 0)
    if not math.isfinite(first.accuracy.low):
        yield said
    elif not math.isfinite(none.low):
        yield f"{said}, right for {right[0]} of these (too few where {nobody} to compare)"
    elif first.accuracy.low > none.high:
        yield f"{said}, right for {right[0]} of these, against {right[1]} where {nobody}"
    else:
        yield f"{said}; accuracy is not clearly lower where {nobody} ({right[1]} against {right[0]})"


def _find_warnings(fusion: FusionSummary) -> Iterator[str]:
    """What needs an action."""
    if any(_describe_failure(fusion)):
        yield "The model is not clearly better than the largest class: train it longer before you read the rest."
    has_labels = bool((fusion.target >= 0).any())
    few = {
        name: why
        for name, why in fusion.probe_problems.items()
        if has_labels and math.isnan(fusion.estimate(f"right/{name}").low)
    }
    for why, names in by_reason(few).items():
        yield f"No linear probe on {_join([*map(name_modality, names)])}: {why}."
    joint = fusion.estimate(f"right/{JOINT}").mean
    for name in fusion.modalities:
        if unused(fusion, name) == 1:
            without = joint - fusion.estimate(f"joint_gain/{name}").mean
            yield (
                f"The model does not use {name_modality(name)}, though a joint linear probe is right for "
                f"{percent(joint, 0)} with it and for {percent(without, 0)} without it: see docs/acting.md."
            )


def list_probes(fusion: FusionSummary) -> str:
    """The accuracy of each modality's probe and of the model, or why there is none."""
    right = {name: fusion.estimate(f"right/{name}") for name in (*fusion.modalities, JOINT)}
    known = {name: one for name, one in right.items() if math.isfinite(one.mean)}
    if not known:
        reasons = list(dict.fromkeys(fusion.probe_problems.values()))
        return _not_computed(reasons[0] if reasons else "these samples have no labels that are classes")
    found = [f"{'joint' if name == JOINT else name_modality(name)} {_brief(one)}" for name, one in known.items()]
    found += [f"model {_brief(fusion.estimate('correct'))}"] if fusion.has_outcomes else []
    largest = fusion.largest_class
    found += [f"largest class {percent(largest, 0)}"] if math.isfinite(largest) else []
    return ", ".join(found)


def list_shares(fusion: FusionSummary) -> str:
    """Each modality's share of the contributions, or why there is none."""
    if fusion.contribution_problem:
        return _not_computed(fusion.contribution_problem)
    if fusion.is_regression:
        sizes = {name: fusion.size(name) for name in fusion.modalities}
        return ", ".join(f"{name_modality(name)} {_brief_size(size)}" for name, size in sizes.items())
    shares = {name: fusion.share(name) for name in fusion.modalities}
    if not any(math.isfinite(one.mean) for one in shares.values()):
        return _not_computed("the contributions do not clearly add up to more than 0")
    return ", ".join(f"{name_modality(name)} {_brief(share)}" for name, share in shares.items())


def list_support(fusion: FusionSummary) -> str:
    """Accuracy of the predictions that all modalities support, and of those that none supports, or why not."""
    if fusion.support_problem:
        reasons = [*dict.fromkeys(fusion.probe_problems.values()), fusion.support_problem]
        return _not_computed(reasons[0])
    if not (fusion.support_cell >= 0).any():
        return _not_computed("no sample has a prediction that the probes know")
    first, is_pair = fusion.cells[0], len(fusion.modalities) == 2
    none = fusion.proportion(fusion.support_cell >= len(fusion.cells) - 2, fusion.support_cell >= 0)
    rows: Mapping[str, tuple[Estimate, Estimate]] = {
        "both" if is_pair else "all": (first.share, first.accuracy),
        "neither" if is_pair else "none": (none, estimate_unsupported(fusion)),
    }
    return ", ".join(
        f"{name} {_brief(share)}" + (f" (accuracy {_brief(right)})" if math.isfinite(right.low) else "")
        for name, (share, right) in rows.items()
    )


def _brief(one: Estimate) -> str:
    """As ``79 % [73 to 84]``."""
    if math.isnan(one.mean):
        return "undefined"
    interval = "" if math.isnan(one.low) else f" [{say_interval(100 * one.low, 100 * one.high, 0)}]"
    return f"{percent(one.mean, 0)}{interval}"


def _brief_size(one: Estimate) -> str:
    """As ``0.97 [0.84 to 1.10]``."""
    if math.isnan(one.mean):
        return "undefined"
    return decimal(one.mean) + ("" if math.isnan(one.low) else f" [{say_interval(one.low, one.high, 2)}]")


def _explain_bracket(text: str) -> str:
    """The same with what brackets are in the first one."""
    return text.replace("[", "[95 % CI ", 1)


def _not_computed(reason: str) -> str:
    return f"not computed: {reason.removeprefix('it ')}"


def _join(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
