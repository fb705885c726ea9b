"""The headline claims what the summary's intervals support, in the summary's numbers."""

import math
from copy import copy
from dataclasses import replace

import pytest
import torch

from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.evaluation.support import estimate_unsupported
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.report.headline import describe_headline, describe_with_captions


def interval(one):
    return f"{100 * one.mean:.0f} % [{100 * one.low:.0f} to {100 * one.high:.0f}]"


def test_the_three_numbers_are_the_summarys(result):
    fusion, found = result.fusion, describe_headline(result)
    (first, probes), (second, shares), (third, support) = found.numbers
    assert (first, second, third) == ("Probe accuracy", "Contribution", "Support")
    right = [fusion.estimate(f"right/{name}") for name in (*fusion.modalities, "joint")]
    names = "Left", "Right", "joint"
    listed = [f"{name} {interval(one)}" for name, one in zip(names, right, strict=True)]
    assert probes == ", ".join([*listed, f"largest class {100 * fusion.largest_class:.0f} %"])
    of_names = {name: fusion.share(name) for name in fusion.modalities}
    assert shares == ", ".join(f"{name} {interval(one)}" for name, one in zip(names, of_names.values(), strict=False))
    assert support.startswith(f"both {100 * fusion.cells[0].share.mean:.0f} % (accuracy ")
    assert interval(fusion.cells[0].accuracy) in support


class Planted:
    """A summary whose shares and cells are as a test wants them."""

    def __init__(self, fusion, shares=None, both=None, none=None, **changed):
        self._fusion = fusion
        for name, value in changed.items():
            setattr(self, name, value)
        if shares is not None:
            self.share = lambda name: shares[fusion.modalities.index(name)]
            self.contribution_problem, self.is_regression = "", False
        if both is not None:
            self.cells = [replace(one, accuracy=both) if i == 0 else one for i, one in enumerate(fusion.cells)]
            known = fusion.estimate
            self.estimate = lambda number, *args, among=None, **kwargs: (
                none if among is not None and number == "correct" else known(number, *args, among=among, **kwargs)
            )

    def __getattr__(self, name):
        return getattr(self._fusion, name)


def sentence(result, **planted):
    return describe_headline(replace(result, fusion=Planted(result.fusion, **planted))).sentence


def around(mean, half=0.05):
    return Estimate(mean, mean - half, mean + half, 40)


def test_a_main_modality_is_one_whose_interval_lies_above_two_thirds(result):
    assert sentence(result, shares=[around(0.75), around(0.25)]).startswith(
        "The model mostly uses Left (75 % of the contribution)."
    )
    assert sentence(result, shares=[around(0.7), around(0.3)]).startswith(
        "The model uses Left (70 % of the contribution) and Right (30 %)."
    )
    unknown = Estimate(0.9, math.nan, math.nan, 3)
    assert not sentence(result, shares=[unknown, unknown]).startswith("The model")


def test_errors_differ_where_the_intervals_do(result):
    support = f"Both modalities support {100 * result.fusion.cells[0].share.mean:.0f} % of the predictions"
    apart = sentence(result, both=around(0.9), none=around(0.5))
    assert apart.endswith(f"{support} and 90 % of these are right, 50 % where neither does.")
    near = sentence(result, both=around(0.9), none=around(0.85))
    assert near.endswith(f"{support}; accuracy is not clearly lower where neither does (85 % against 90 %).")
    few = sentence(result, both=around(0.9), none=Estimate(0.0, math.nan, math.nan, 2))
    assert few.endswith(f"{support} and 90 % of these are right.")


def test_what_is_not_computed_has_its_reason(result):
    fusion = copy(result.fusion)
    fusion.contribution_problem = "needs 128 samples, this run had 97"
    fusion.support_problem = "it needs a linear probe of each modality that predicts better than chance"
    fusion.support_cell = torch.full_like(fusion.support_cell, -1)
    found = describe_headline(replace(result, fusion=fusion))
    assert found.numbers[1] == ("Contribution", "not computed: needs 128 samples, this run had 97")
    assert found.numbers[2][1].startswith("not computed: it needs a linear probe of each modality")
    assert found.sentence.startswith("Neither what the model uses nor who supports its predictions is known")


def test_a_model_that_is_no_better_than_a_guess_is_warned_of(result):
    fusion = Planted(result.fusion, largest_class=result.fusion.estimate("correct").low)
    warnings = describe_headline(replace(result, fusion=fusion)).warnings
    assert any("not clearly more than the largest class" in one for one in warnings)
    fusion = Planted(result.fusion, largest_class=result.fusion.estimate("correct").low - 0.01)
    warnings = describe_headline(replace(result, fusion=fusion)).warnings
    assert not any("largest class" in one for one in warnings)


def test_without_modalities_the_attention_alone_is_named(result):
    assert describe_headline(replace(result, fusion=None)).sentence.startswith("Attention alone was recorded (130 ")
    assert describe_headline(DatasetResult({}, None, (), "target")).sentence == "Nothing was recorded."


def test_the_text_has_the_meaning_of_each_number(result):
    text = describe_with_captions(result)
    found = describe_headline(result)
    assert text.startswith(f"**{found.sentence}**")
    for name, number in found.numbers:
        assert f"**{name}:** {number}" in text
    assert text.endswith("In brackets: 95 % CI.\n")


@pytest.mark.parametrize("number", ["correct"])
def test_the_unsupported_accuracy_is_that_of_both_last_cells(result, number):
    fusion = result.fusion
    none = fusion.support_cell >= len(fusion.cells) - 2
    known = fusion.numbers[number][none]
    assert estimate_unsupported(fusion).mean == pytest.approx(float(known[known.isfinite()].mean()), nan_ok=True)
