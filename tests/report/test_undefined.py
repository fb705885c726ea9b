"""Each number that is undefined has its reason, under its own name, and no other has one."""

from __future__ import annotations

import pytest

from lightning_xattn.core.wording import SINGLE_KEY as ONE_KEY
from lightning_xattn.functional.outcomes import CORRECT
from lightning_xattn.report.undefined import (
    NO_NULL,
    NO_VARIATION,
    ONE_DIRECTION,
    first_layer,
    undefined_in_batch,
    undefined_in_layer,
    undefined_in_sample,
)
from lightning_xattn.report.undefined import (
    NO_ROW as NOTHING,
)
from tests.explained import NAN, NO_ROW, SINGLE_KEY, batch, sample, statistics, summary

KNOWN = statistics()


@pytest.mark.parametrize(
    ("directions", "expected"),
    [
        ({"a_to_b": KNOWN, "b_to_a": SINGLE_KEY}, {"b_to_a": ONE_KEY, "modality_agreement": ONE_KEY}),
        ({"a_to_b": NO_ROW, "b_to_a": KNOWN}, {"a_to_b": NOTHING, "modality_agreement": NOTHING}),
        ({"a_to_b": KNOWN, "b_to_a": KNOWN}, {"modality_agreement": NO_VARIATION}),
        ({"a_to_b": NO_ROW}, {"a_to_b": NOTHING, "modality_agreement": ONE_DIRECTION}),
        # Of the second layer there is no agreement.
        (
            {"x/a_to_b": KNOWN, "x/b_to_a": KNOWN, "y/a_to_b": SINGLE_KEY},
            {"y/a_to_b": ONE_KEY, "modality_agreement": NO_VARIATION},
        ),
    ],
)
def test_reasons_of_a_sample_and_of_a_batch_of_it(directions, expected):
    one = sample(modality_agreement=NAN, attention_stats=directions)
    assert undefined_in_sample(one) == expected
    of_batch = dict(expected)
    of_batch["modality_alignment"] = of_batch.pop("modality_agreement")
    assert undefined_in_batch(batch(one)) == of_batch


def test_what_is_defined_has_no_reason():
    assert undefined_in_sample(sample()) == {}
    assert undefined_in_batch(batch(sample())) == {}


def test_a_batch_has_each_reason_of_its_samples_once():
    directions = {"a_to_b": KNOWN, "b_to_a": NO_ROW}, {"a_to_b": KNOWN, "b_to_a": KNOWN}
    samples = [sample(modality_agreement=NAN, attention_stats=one) for one in (*directions, *directions)]
    assert undefined_in_batch(batch(*samples, attention_stats=directions[1])) == {
        "modality_alignment": f"{NO_VARIATION}; {NOTHING}"
    }
    nothing = batch(sample(), per_sample_explanations=[], modality_alignment=NAN)
    assert undefined_in_batch(nothing) == {"modality_alignment": "no samples"}


def test_the_first_layer_is_that_of_the_first_direction():
    given = {"x.1/a_to_b": KNOWN, "x.1/b_to_a": NO_ROW, "y/a_to_b": SINGLE_KEY}
    assert first_layer(given) == {"x.1/a_to_b": KNOWN, "x.1/b_to_a": NO_ROW}
    assert first_layer({"a_to_b": KNOWN, "y/a_to_b": SINGLE_KEY}) == {"a_to_b": KNOWN}


def test_reasons_of_a_layer():
    """Of nine samples."""
    classes, outcomes = [0, 1, 2] * 3, [CORRECT] * 9
    assert undefined_in_layer(summary(classes, outcomes)) == {}
    nothing, single = f"2 of 9 samples with {NOTHING}", f"9 of 9 samples with {ONE_KEY}"
    assert undefined_in_layer(summary(classes, outcomes, broken=(1, 4))) == {"eeg_to_spec": nothing}
    assert undefined_in_layer(summary(classes, outcomes, keys=1)) == {"eeg_to_spec": single, "alignment_null": NO_NULL}
    assert undefined_in_layer(summary(classes, outcomes, keys=1, both=False, broken=(1, 4))) == {
        "eeg_to_spec": f"7 of 9 samples with {ONE_KEY}; {nothing}",
        "alignment": ONE_DIRECTION,
    }
