"""The headline claims what the summary's intervals support, in the summary's numbers."""

import math
from copy import copy
from dataclasses import replace

import pytest
import torch

from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.evaluation.support import estimate_unsupported
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.report.headline import CAPTIONS, describe_headline, describe_with_captions


def interval(one):
    return f"{100 * one.mean:.0f} % [{100 * one.low:.0f} to {100 * one.high:.0f}]"


def explained(text):
    """What brackets are is said in the first."""
    return text.replace("[", "[95 % CI ", 1)


def test_the_three_numbers_are_the_summarys(result):
    fusion, found = result.fusion, describe_headline(result)
    (first, probes), (second, shares), (third, support) = found.numbers
    assert (first, second, third) == ("Probe accuracy", "Contribution", "Support")
    right = [fusion.estimate(f"right/{name}") for name in (*fusion.modalities, "joint")]
    names = "Left", "Right", "joint"
    listed = [f"{name} {interval(one)}" for name, one in zip(names, right, strict=True)]
    listed += [f"model {interval(fusion.estimate('correct'))}", f"largest class {100 * fusion.largest_class:.0f} %"]
    assert probes == explained(", ".join(listed))
    of_names = {name: fusion.share(name) for name in fusion.modalities}
    listed = [f"{name} {interval(one)}" for name, one in zip(names, of_names.values(), strict=False)]
    assert shares == explained(", ".join(listed))
    both = f"both {interval(fusion.cells[0].share)} (accuracy {interval(fusion.cells[0].accuracy)})"
    assert support.startswith(f"{explained(both)}, neither ")


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
        "The model mostly uses Left (75 % of the contribution); both"
    )
    assert sentence(result, shares=[around(0.7), around(0.3)]).startswith(
        "The model uses Left (70 % of the contribution) and Right (30 %); both"
    )
    assert sentence(result, shares=[around(0.6, 0.2), around(0.04)]).startswith(
        "The model uses Left (60 % of the contribution), not clearly Right; both"
    )
    unknown = Estimate(0.9, math.nan, math.nan, 3)
    assert not sentence(result, shares=[unknown, unknown]).startswith("The model")


def test_errors_differ_where_the_intervals_do(result):
    support = f"both modalities support {100 * result.fusion.cells[0].share.mean:.0f} % of its predictions"
    apart = sentence(result, both=around(0.9), none=around(0.5))
    assert apart.endswith(f"{support}, right for 90 % of these, against 50 % where neither does.")
    near = sentence(result, both=around(0.9), none=around(0.85))
    assert near.endswith(f"{support}; accuracy is not clearly lower where neither does (85 % against 90 %).")
    few = sentence(result, both=around(0.9), none=Estimate(0.0, math.nan, math.nan, 2))
    assert few.endswith(f"{support}, right for 90 % of these (too few where neither does to compare).")
    assert max(map(len, (apart, near, few))) <= 220


def test_a_regression_has_sizes_in_place_of_shares(result):
    fusion = copy(result.fusion)
    fusion.is_regression, fusion.support_problem = True, "the model predicts no single class"
    fusion.support_cell = torch.full_like(fusion.support_cell, -1)
    found, sizes = describe_headline(replace(result, fusion=fusion)), [fusion.size(name) for name in fusion.modalities]
    left, right = (f"{one.mean:.2f}" for one in sizes)
    assert found.sentence == f"On average the output moves with Left by {left} and Right by {right}."
    assert found.numbers[1][1].startswith(f"Left {left} [95 % CI {sizes[0].low:.2f} to {sizes[0].high:.2f}], Right ")


def test_probes_that_lack_samples_are_warned_of(result):
    known = result.fusion.estimate
    few = Estimate(0.9, math.nan, math.nan, 3)
    fusion = Planted(result.fusion, probe_problems={"left": "it needs 5 groups, this run had 3"})
    assert not any("No linear probe" in one for one in describe_headline(replace(result, fusion=fusion)).warnings)
    fusion.estimate = lambda number, *args, **kwargs: few if number == "right/left" else known(number, *args, **kwargs)
    warnings = describe_headline(replace(result, fusion=fusion)).warnings
    assert "No linear probe on Left: it needs 5 groups, this run had 3." in warnings


def test_what_is_not_computed_has_its_reason(result):
    fusion = copy(result.fusion)
    fusion.contribution_problem = "needs 128 samples, this run had 97"
    fusion.support_problem = "it needs a linear probe of each modality that predicts better than chance"
    fusion.support_cell = torch.full_like(fusion.support_cell, -1)
    found = describe_headline(replace(result, fusion=fusion))
    assert found.numbers[1] == ("Contribution", "not computed: needs 128 samples, this run had 97")
    assert found.numbers[2][1].startswith("not computed: needs a linear probe of each modality")
    assert found.sentence.startswith("Neither what the model uses nor who supports its predictions is known")


def test_a_model_that_is_no_better_than_a_guess_is_warned_of(result):
    fusion = Planted(result.fusion, largest_class=result.fusion.estimate("correct").low)
    warnings = describe_headline(replace(result, fusion=fusion)).warnings
    assert any("not clearly better than the largest class" in one for one in warnings)
    said = describe_headline(replace(result, fusion=fusion)).sentence
    model = 100 * result.fusion.estimate("correct").mean
    largest = 100 * fusion.largest_class
    clause = f"{model:.0f} % of the samples, not clearly more than the largest class ({largest:.0f} %);"
    assert said.startswith(f"The model is right for {clause}")
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
    assert all(f"*{CAPTIONS[name]}*" in text for name, _ in found.numbers)


@pytest.mark.parametrize("number", ["correct"])
def test_the_unsupported_accuracy_is_that_of_both_last_cells(result, number):
    fusion = result.fusion
    none = fusion.support_cell >= len(fusion.cells) - 2
    known = fusion.numbers[number][none]
    assert estimate_unsupported(fusion).mean == pytest.approx(float(known[known.isfinite()].mean()), nan_ok=True)


def test_a_sentence_without_what_the_model_uses_names_the_model(result):
    said = sentence(result, contribution_problem="it needs 20 samples")
    assert said.startswith("Both modalities support")
    assert "of the model's predictions" in said


def test_a_share_above_all_is_all(result):
    assert sentence(result, shares=[around(1.05), around(-0.05)]).startswith(
        "The model mostly uses Left (all of the contribution)"
    )
