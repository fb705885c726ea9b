"""What is said of single samples, in results, sentences, reports and beside the guide's thresholds."""

import json
import math
import warnings
from copy import copy

import pytest
import torch

from lightning_xattn import ExplainabilityCapture, create_explainability_report
from lightning_xattn.errors import SettingError
from lightning_xattn.fusion.samples import SampleModalities, most_conflicting, of_sample
from lightning_xattn.report.criteria import interpret_sample
from tests.fusion.models import Concatenation, Fusion, loader_of, said_data, sample_ids, trained

NAMES = ["a", "b", "c", "d"]


def sample(**changed):
    known = {
        "conflict": 0.9,
        "says": {"eeg": ("GPD", 0.71), "spec": ("Seizure", 0.64)},
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
            "EEG says GPD (0.71), Spec says Seizure (0.64), the model says GPD and follows EEG (share 0.82); "
            "confidence 0.58, true class Seizure",
        ),
        (
            {"contributions": {"eeg": 0.5, "spec": -0.1}},
            "EEG says GPD (0.71), Spec says Seizure (0.64), the model says GPD and follows EEG (contributions EEG "
            "+0.50, Spec -0.10); confidence 0.58, true class Seizure",
        ),
        (
            {"contributions": {"eeg": 0.25, "spec": 0.25}, "followed": None, "true": None},
            "EEG says GPD (0.71), Spec says Seizure (0.64), the model says GPD and follows none more than another "
            "(shares EEG 0.50, Spec 0.50); confidence 0.58",
        ),
        (
            {"says": {}, "contributions": {}, "followed": None, "confidence": math.nan, "true": None},
            "the model says GPD",
        ),
    ],
    ids=["plain", "opposed", "even", "little known"],
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
        assert found.says["left"] == (
            NAMES[int(fusion.readings["left"][place].argmax())],
            float(fusion.readings["left"][place].max()),
        )
        phi = {name: float(numbers[f"phi/{name}"][place]) for name in ("left", "right")}
        assert found.contributions == ({} if math.isnan(phi["left"]) else phi)
        if found.contributions:
            said += 1
            leads = abs(phi["left"] - phi["right"]) > 0.02
            assert found.followed == (max(phi, key=phi.get) if leads else None)
    assert said > 8
    report = " ".join(create_explainability_report(results).split())
    assert f"Modalities: {results['per_sample_explanations'][0]['modalities']}" in report
    told = json.loads(create_explainability_report(results, format="json"))["per_sample_explanations"][0]["modalities"]
    assert told["says"]["left"][0] in NAMES
    assert all(one["modalities"] is None for one in explainer.explain_batch(batch)["per_sample_explanations"])


def test_the_guides_thresholds_stand_beside_the_models_own_numbers(explained):
    explainer, loader, dataset = explained
    (one, *_) = explainer.explain_batch(next(iter(loader)))["per_sample_explanations"]
    assert all(criterion.evidence is None for criterion in interpret_sample(one))
    summary = dataset.headline
    for criterion in interpret_sample(one, dataset):
        assert "means in its data set: correct " in criterion.evidence
        assert ("; AUROC " in criterion.evidence) == ("agreement" in criterion.criterion)
        assert criterion.evidence.startswith("met there by ") == ("agreement" in criterion.criterion)
    maps = torch.tensor(
        [
            sample["modality_agreement"]
            for batch in loader
            for sample in explainer.explain_batch(batch)["per_sample_explanations"]
            if sample["correct"]
        ]
    )
    (low,) = (one for one in interpret_sample(one, dataset) if one.criterion == "modality agreement < 0.2")
    assert f"met there by {int((maps < 0.2).sum())} of {len(maps)} correct" in low.evidence
    assert f"correct {maps.mean():.3f}" in low.evidence
    assert summary.samples == 140


def test_the_most_conflicting_samples_are_those_of_largest_conflict_whose_contributions_are_known(explained):
    fusion = copy(explained[2].fusion)
    conflicts = fusion.numbers["conflict"].tolist()
    exchanged = [i for i in range(140) if not math.isnan(float(fusion.numbers["phi/left"][i]))]
    assert len(exchanged) == 128
    assert most_conflicting(fusion) == sorted(exchanged, key=lambda i: -conflicts[i])[:10]
    fusion.uncontributed = "no reason"
    assert most_conflicting(fusion) == sorted(range(140), key=lambda i: -conflicts[i])[:10]
    fusion.numbers = fusion.numbers | {"conflict": torch.tensor([math.nan, 0.0, 1.0, 0.5, math.nan])}
    assert most_conflicting(fusion) == [2, 3, 1]


def test_numbers_of_some_samples_stand_in_their_places_and_those_of_others_nowhere(explained):
    fusion = explained[2].fusion
    places = [7, 139, 0]
    samples = torch.stack([fusion.rows["process"], fusion.sample_numbers], dim=1)[places]
    others = torch.tensor([[0, 10_000], [9, 3]])  # of no sample that was read
    spread = fusion._spreading(torch.cat([others[:1], samples, others[1:]]))(torch.tensor([5.0, 1.0, 2.0, 3.0, 6.0]))
    assert spread[places].tolist() == [1, 2, 3]
    assert spread.isnan().sum() == 137


@pytest.mark.parametrize(
    ("left", "right", "followed"),
    [(0.4, 0.1, "left"), (0.1, 0.4, "right"), (-0.3, 0.0, "right"), (0.2, 0.215, None), (0.225, 0.2, "left")],
)
def test_the_modality_that_is_followed_contributes_clearly_more(explained, left, right, followed):
    fusion = copy(explained[2].fusion)
    fusion.numbers = fusion.numbers | {
        f"phi/{name}": torch.full((140,), phi) for name, phi in (("left", left), ("right", right))
    }
    found = of_sample(fusion, 3, NAMES)
    assert found.followed == followed
    assert found.contributions == pytest.approx({"left": left, "right": right})


def test_a_class_without_a_name_is_told_by_its_number(explained):
    fusion = explained[2].fusion
    first = int((fusion.predicted == 1).nonzero()[0])
    assert of_sample(fusion, first, NAMES).predicted == of_sample(fusion, first, NAMES[:2]).predicted == "b"
    for names in (NAMES[:1], []):
        assert of_sample(fusion, first, names).predicted == "class 1"


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
