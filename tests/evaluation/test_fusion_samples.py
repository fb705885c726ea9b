"""The modalities of single samples, in results, sentences, reports and beside the guide's thresholds."""

import json
import math
import warnings
from copy import copy
from itertools import product

import pytest
import torch

from lightning_xattn import ExplainabilityCapture, create_explainability_report
from lightning_xattn.core.errors import SettingError
from lightning_xattn.evaluation.fusion_samples import (
    SampleModalities,
    _find_followed,
    describe_modalities,
    most_conflicting,
)
from tests.attribution.models import Concatenation, Fusion, loader_of, said_data, sample_ids, trained

NAMES = ["a", "b", "c", "d"]


PROBES = "EEG's probe predicts GPD (0.71), Spec's probe predicts Seizure (0.64), the model predicts"


def sample(**changed):
    known = {
        "conflict": 0.9,
        "probes": {"eeg": ("GPD", 0.71), "spec": ("Seizure", 0.64)},
        "predicted": "GPD",
        "true": "Seizure",
        "confidence": 0.58,
        "contributions": {"eeg": 0.41, "spec": 0.09},
        "followed": "eeg",
    }
    return SampleModalities(**known | changed)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {},
            PROBES + " GPD and follows EEG (share 82 %); confidence 0.58, true class Seizure",
        ),
        (
            {"contributions": {"eeg": 0.5, "spec": -0.1}},
            PROBES + " GPD and follows EEG (contributions EEG +0.50, Spec -0.10); confidence 0.58, true class Seizure",
        ),
        (
            {"contributions": {"eeg": 0.25, "spec": 0.25}, "followed": None, "true": None},
            PROBES + " GPD, no modality clearly for more than two thirds (shares EEG 50 %, Spec 50 %); confidence 0.58",
        ),
        (
            {"predicted": "Seizure", "contributions": {"eeg": 0.4, "spec": -0.1}},
            PROBES + " Seizure, mostly because of EEG "
            "(contributions EEG +0.40, Spec -0.10), though EEG's own probe predicts GPD; confidence 0.58, "
            "true class Seizure",
        ),
        (
            {"contributions": {"eeg": -0.1, "spec": -0.3}, "followed": None},
            PROBES + " GPD, to which no modality contributes "
            "(contributions EEG -0.10, Spec -0.30); confidence 0.58, true class Seizure",
        ),
        (
            {"probes": {}},
            "the model predicts GPD, mostly because of EEG (share 82 %); confidence 0.58, true class Seizure",
        ),
        (
            {"probes": {}, "contributions": {}, "followed": None, "confidence": math.nan, "true": None},
            "the model predicts GPD",
        ),
    ],
    ids=["plain", "opposed", "even", "against itself", "against all", "probe problem", "little known"],
)
def test_a_sample_in_a_sentence(changed, sentence):
    assert str(sample(**changed)) == sentence


@pytest.fixture(scope="module")
def explained():
    data, _ = said_data(140, noise=1.2)
    explainer = ExplainabilityCapture(
        trained(Fusion(), data, epochs=8),
        class_names=NAMES,
        predict=lambda model, batch: model.validation_step(batch, 0),
        sample_ids=sample_ids,
    )
    loader = loader_of(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads that little training has left dead
        return explainer, loader, explainer.explain_loader(loader, progress=False)


def test_a_batch_of_a_data_set_that_was_explained(explained):
    explainer, loader, dataset = explained
    batch = list(loader)[3]
    results = explainer.explain_batch(batch, among=dataset)
    numbers, fusion = dataset.fusion.numbers, dataset.fusion
    said = 0
    for i, one in enumerate(results["per_sample_explanations"]):
        place = fusion.sample_numbers.tolist().index(3 * 16 + i)
        found = one["modalities"]
        assert found.predicted == one["predicted_name"]
        assert found.confidence == pytest.approx(one["confidence"], abs=1e-6)
        assert found.probes["left"] == (
            NAMES[int(fusion.probes["left"][place].argmax())],
            float(fusion.probes["left"][place].max()),
        )
        phi = {name: float(numbers[f"phi/{name}"][place]) for name in ("left", "right")}
        assert found.contributions == ({} if math.isnan(phi["left"]) else phi)
        if found.contributions:
            said += 1
            error = {name: float(numbers[f"error/{name}"][place]) for name in ("left", "right")}
            clearly = {
                one: phi[one] - 2 * error[one] > 2 * (max(phi[other], 0) + 2 * error[other])
                for one, other in (("left", "right"), ("right", "left"))
            }
            leads = [one for one in phi if clearly[one] and phi[one] - 2 * error[one] > 0.02]
            assert found.followed == (leads[0] if leads else None)
    assert said > 8
    report = " ".join(create_explainability_report(results).split())
    assert f"**Modalities:** {results['per_sample_explanations'][0]['modalities']}" in report
    told = json.loads(create_explainability_report(results, format="json"))["per_sample_explanations"][0]["modalities"]
    assert told["probes"]["left"][0] in NAMES
    assert all(one["modalities"] is None for one in explainer.explain_batch(batch)["per_sample_explanations"])


def test_the_most_conflicting_samples_are_those_of_largest_conflict_whose_contributions_are_known(explained):
    fusion = copy(explained[2].fusion)
    conflicts = fusion.numbers["conflict"].tolist()
    permuted = [i for i in range(140) if not math.isnan(float(fusion.numbers["phi/left"][i]))]
    assert len(permuted) == 128
    assert most_conflicting(fusion) == sorted(permuted, key=lambda i: -conflicts[i])[:10]
    fusion.contribution_problem = "no reason"
    assert most_conflicting(fusion) == sorted(range(140), key=lambda i: -conflicts[i])[:10]
    fusion.numbers = fusion.numbers | {"conflict": torch.tensor([math.nan, 0.0, 1.0, 0.5, math.nan])}
    assert most_conflicting(fusion) == [2, 3, 1]


def test_numbers_of_some_samples_stand_in_their_places_and_those_of_others_nowhere(explained):
    fusion = explained[2].fusion
    places = [7, 139, 0]
    samples = torch.stack([fusion.rows["process"], fusion.sample_numbers], dim=1)[places]
    others = torch.tensor([[0, 10_000], [9, 3]])  # of no kept sample
    values = torch.tensor([5.0, 1.0, 2.0, 3.0, 6.0])
    spread = fusion._spread(torch.cat([others[:1], samples, others[1:]]), values)
    assert spread[places].tolist() == [1, 2, 3]
    assert spread.isnan().sum() == 137


@pytest.mark.parametrize(
    ("left", "right", "error", "followed"),
    [
        (0.4, 0.1, 0, "left"),
        (0.1, 0.4, 0, "right"),
        (0.4, 0.21, 0, None),  # less than two thirds
        (0.4, 0.1, 0.03, "left"),  # 0.34 is more than twice 0.16
        (0.4, 0.1, 0.04, None),
        (0.4, -0.2, 0.06, "left"),
        (0.01, -0.3, 0, None),  # hardly anything
        (-0.3, 0.0, 0, None),
        (-0.3, -0.1, 0, None),
        (0.4, 0.1, math.nan, None),
    ],
)
def test_the_modality_that_is_followed_has_clearly_more_than_two_thirds(explained, left, right, error, followed):
    fusion = copy(explained[2].fusion)
    fusion.numbers = fusion.numbers | {
        f"{kind}/{name}": torch.full((140,), float(value))
        for name, phi in (("left", left), ("right", right))
        for kind, value in (("phi", phi), ("error", error))
    }
    found = describe_modalities(fusion, 3, NAMES)
    assert found.followed == followed
    assert found.contributions == pytest.approx({"left": left, "right": right})
    fusion.is_regression = True  # of which a contribution below 0 is no objection
    assert describe_modalities(fusion, 3, NAMES).followed is None


CLASSES_SAID = {"eeg": ("GPD", "LPD"), "spec": ("GPD", "LPD", "GRDA")}
PHI = [{"eeg": a, "spec": b} for a in (0.5, 0.1, -0.2) for b in (0.5, 0.1, -0.2)]


@pytest.mark.parametrize("confidence", [0.3, 0.98])
@pytest.mark.parametrize("true", ["GPD", "LPD", None])
def test_no_sentence_contradicts_the_prediction(confidence, true):
    """Modalities agree or not, with each other and the model, which is right or wrong, sure or not."""
    followed = 0
    for eeg, spec, phi in product(CLASSES_SAID["eeg"], CLASSES_SAID["spec"], PHI):
        one = sample(
            probes={"eeg": (eeg, 0.7), "spec": (spec, 0.7)},
            true=true,
            confidence=confidence,
            contributions=phi,
            followed=_find_followed(phi, {"eeg": 0.0, "spec": 0.0}),
        )
        for name, said in (("EEG", eeg), ("Spec", spec)):
            share = phi[name.lower()] / sum(max(of, 0) for of in phi.values()) if max(phi.values()) > 0 else 0
            follows = share > 2 / 3 and said == "GPD"
            assert (f"follows {name}" in str(one)) == follows, str(one)
            against = share > 2 / 3 and said != "GPD"
            assert (f"mostly because of {name}" in str(one)) == against, str(one)
            assert (f"though {name}'s own probe predicts {said}" in str(one)) == against, str(one)
            followed += follows
        assert ("no modality contributes" in str(one)) == (max(phi.values()) <= 0)
    assert followed


def test_a_class_without_a_name_is_told_by_its_number(explained):
    fusion = explained[2].fusion
    first = int((fusion.predicted == 1).nonzero()[0])
    assert (
        describe_modalities(fusion, first, NAMES).predicted
        == describe_modalities(fusion, first, NAMES[:2]).predicted
        == "b"
    )
    for names in (NAMES[:1], []):
        assert describe_modalities(fusion, first, names).predicted == "class 1"


def test_all_partners():
    data, _ = said_data(40)
    module = trained(Concatenation(), data, epochs=20).eval()
    explainer = ExplainabilityCapture(
        module,
        predict=lambda model, batch: model.validation_step(batch, 0),
        sample_ids=sample_ids,
        fusion="fusion",
        modalities={"left": 0, "right": 1},
    )
    summary = explainer.explain_loader(loader_of(data), progress=False, partners="all").fusion
    assert summary.pairs == 40 * 39
    left, right, _, _ = data.tensors
    with torch.no_grad():
        a, b = module.left(left), module.right(right)
        table = torch.stack([module.head(module.fusion(a[[i]].expand_as(a), b)).softmax(1) for i in range(40)]).double()
    others = 1 - torch.eye(40)
    for place, i in enumerate(summary.sample_numbers.tolist()):
        c = int(table[i, i].argmax())
        own, with_left = table[i, i, c], (table[i, :, c] * others[i]).sum() / 39
        with_right, none = (table[:, i, c] * others[i]).sum() / 39, (table.diagonal()[c] * others[i]).sum() / 39
        phi = 0.5 * (with_left - none) + 0.5 * (own - with_right)
        assert float(summary.numbers["phi/left"][place]) == pytest.approx(float(phi), abs=1e-6)


@pytest.mark.parametrize("partners", [3, 5, 2, 0, "some", None, 4.0])
def test_numbers_of_partners_that_are_none(explained, partners):
    explainer, loader, _ = explained
    with pytest.raises(SettingError, match=r"partners must be an even number from 4 on, or 'all'; got"):
        explainer.explain_loader(loader, progress=False, partners=partners)
