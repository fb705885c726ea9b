"""The modalities of single samples, in results, sentences, reports and beside the guide's thresholds."""

import json
import math
import warnings
from copy import copy

import pytest
import torch

from lightning_xattn import ExplainabilityCapture, create_explainability_report
from lightning_xattn.attribution.kept_samples import BottomKSample, KeptSamples
from lightning_xattn.core.errors import SettingError
from lightning_xattn.evaluation.fusion_samples import (
    SampleModalities,
    describe_modalities,
    most_confident_unsupported,
)
from lightning_xattn.functional.intervals import Estimate
from tests.attribution.models import (
    NAMED,
    Concatenation,
    Fusion,
    loader_of,
    said_data,
    sample_ids,
    trained,
    watch_of,
)

NAMES = ["a", "b", "c", "d"]


PROBES = "The probe on EEG predicts GPD (71 %), the one on Spec Seizure (64 %); the model predicts"
SIMILAR = " Of 124 such samples 72 % were right (95 % CI 63 to 81 %)."


def sample(**changed):
    known = {
        "support": -1.5,
        "probes": {"eeg": ("GPD", 0.71), "spec": ("Seizure", 0.64)},
        "supporters": ("eeg",),
        "similar": Estimate(0.72, 0.63, 0.81, count=124),
        "predicted": "GPD",
        "true": None,
        "confidence": 0.58,
        "contributions": {},
        "main": None,
    }
    return SampleModalities(**known | changed)


ALIKE = {"eeg": ("LPD", 0.9), "spec": ("LPD", 0.8)}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, f"{PROBES} GPD (58 %), supported by EEG only.{SIMILAR}"),
        ({"supporters": ("eeg", "spec")}, f"{PROBES} GPD (58 %), supported by both.{SIMILAR}"),
        ({"supporters": ()}, f"{PROBES} GPD (58 %), supported by neither.{SIMILAR}"),
        (
            {"supporters": (), "probes": ALIKE, "true": "Seizure"},
            "The probe on EEG predicts LPD (90 %), the one on Spec LPD (80 %); the model predicts GPD (58 %), "
            f"supported by neither, though their probes agree with each other; the true class is Seizure.{SIMILAR}",
        ),
        (
            {"contributions": {"eeg": 0.41, "spec": 0.09}, "main": "eeg", "similar": None},
            f"{PROBES} GPD (58 %), supported by EEG only; EEG contributes most (shares: EEG 82 %, Spec 18 %).",
        ),
        (
            {"contributions": {"eeg": 0.25, "spec": 0.25}, "similar": None},
            f"{PROBES} GPD (58 %), supported by EEG only; no modality clearly contributes more than two thirds "
            "(shares: EEG 50 %, Spec 50 %).",
        ),
        (
            {"contributions": {"eeg": 0.4, "spec": -0.1}, "main": "eeg", "similar": None},
            f"{PROBES} GPD (58 %), supported by EEG only; EEG contributes most (contributions: EEG +0.40, Spec -0.10).",
        ),
        (
            {"contributions": {"eeg": -0.1, "spec": -0.3}, "similar": None},
            f"{PROBES} GPD (58 %), supported by EEG only; no modality contributes (contributions: EEG -0.10, Spec "
            "-0.30).",
        ),
        (
            {"similar": Estimate(1.0, math.nan, math.nan, count=3), "similar_noun": "such samples of elsewhere"},
            f"{PROBES} GPD (58 %), supported by EEG only. Of 3 such samples of elsewhere 100 % were right.",
        ),
        (
            {"similar": Estimate(math.nan, math.nan, math.nan, count=0)},
            f"{PROBES} GPD (58 %), supported by EEG only. There were no such samples.",
        ),
        (
            {"probes": {}, "supporters": None, "similar": None, "confidence": math.nan},
            "The model predicts GPD.",
        ),
        ({"probes": {}, "supporters": None, "similar": None, "predicted": None, "confidence": math.nan}, ""),
    ],
)
def test_a_sample_in_a_sentence(changed, sentence):
    assert str(sample(**changed)) == sentence


def test_three_modalities_in_a_sentence():
    probes = dict.fromkeys(("eeg", "spec"), ("GPD", 0.5)) | {"ecg": ("LPD", 0.5)}
    for supporters, said in ((("eeg", "spec"), "EEG and Spec only"), (tuple(probes), "all"), ((), "none")):
        assert f", supported by {said}." in str(sample(probes=probes, supporters=supporters))


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
            NAMES[int(fusion.probe_classes["left"][place])],
            float(fusion.probe_probabilities["left"][place]),
        )
        supports = tuple(name for name in ("left", "right") if found.probes[name][0] == found.predicted)
        assert found.supporters == supports
        assert found.similar == fusion.cells[int(fusion.support_cell[place])].accuracy
        assert found.support == float(numbers["support"][place])
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
            assert found.main == (leads[0] if leads else None)
    assert said > 8
    report = " ".join(create_explainability_report(results).split())
    assert f"**Modalities:** {results['per_sample_explanations'][0]['modalities']}" in report
    told = json.loads(create_explainability_report(results, format="json"))["per_sample_explanations"][0]["modalities"]
    assert told["probes"]["left"][0] in NAMES
    assert all(one["modalities"] is None for one in explainer.explain_batch(batch)["per_sample_explanations"])


def test_unsupported_predictions_are_listed_most_confident_first(explained):
    fusion = copy(explained[2].fusion)
    supported = (fusion.numbers["supports/left"] == 1) | (fusion.numbers["supports/right"] == 1)
    confidence = fusion.numbers["confidence"].tolist()
    none = sorted((~supported).nonzero()[:, 0].tolist(), key=lambda i: -confidence[i])
    assert most_confident_unsupported(fusion) == none[:10] != []
    fusion.support_cell = torch.tensor([3, 0, -1, 4, 2])
    fusion.numbers = fusion.numbers | {"confidence": torch.tensor([0.3, 0.9, 0.8, 0.7, 0.9])}
    assert most_confident_unsupported(fusion) == [3, 0]


def test_numbers_of_some_samples_stand_in_their_places_and_those_of_others_nowhere(explained):
    fusion = explained[2].fusion
    places = [7, 139, 0]
    samples = torch.stack([fusion.rows["process"], fusion.sample_numbers], dim=1)[places]
    others = torch.tensor([[0, 10_000], [9, 3]])  # of no kept sample
    values = torch.tensor([5.0, 1.0, 2.0, 3.0, 6.0])
    spread = fusion._spreader(torch.cat([others[:1], samples, others[1:]]))(values)
    assert spread[places].tolist() == [1, 2, 3]
    assert spread.isnan().sum() == 137


@pytest.mark.parametrize(
    ("left", "right", "error", "main"),
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
def test_the_main_modality_has_clearly_more_than_two_thirds(explained, left, right, error, main):
    fusion = copy(explained[2].fusion)
    fusion.numbers = fusion.numbers | {
        f"{kind}/{name}": torch.full((140,), float(value))
        for name, phi in (("left", left), ("right", right))
        for kind, value in (("phi", phi), ("error", error))
    }
    found = describe_modalities(fusion, 3, NAMES)
    assert found.main == main
    assert found.contributions == pytest.approx({"left": left, "right": right})
    fusion.is_regression = True  # of which a contribution below 0 is no objection
    assert describe_modalities(fusion, 3, NAMES).main is None


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


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (lambda outputs, batch: batch[3], lambda i: str(1000 + i)),
        (lambda outputs, batch: batch[3].double() / 2, lambda i: str(500 + i / 2)),
        (lambda outputs, batch: [f"scan-{one:04d}x" for one in batch[3].tolist()], lambda i: f"scan-{1000 + i:04d}x"),
        (
            lambda outputs, batch: [None if i else "one" for i in range(len(batch[3]))],
            lambda i: str(i) if i % 16 else "one",
        ),
        (None, str),
    ],
)
def test_samples_have_the_names_that_the_callback_is_given(ids, named):
    data, _ = said_data(40)
    summary = watch_of(
        trained(Concatenation(), data, epochs=1), data, sample_ids=ids, max_samples=24, contribution_samples=8, **NAMED
    )
    fusion = summary.fusion_summaries["val"]
    assert fusion.samples == 24
    assert [fusion.name_sample(i) for i in range(24)] == [named(int(n)) for n in fusion.sample_numbers]


def test_names_of_samples_that_are_not_kept_do_not_pile_up():
    kept = KeptSamples(BottomKSample(5), BottomKSample(1))
    for first in range(0, 100, 10):
        numbers = torch.arange(first, first + 10)
        kept.probed.add({"hash": numbers, "process": torch.zeros(10).long(), "sample_idx": numbers})
        kept.add_names({(0, n): f"n{n}" for n in numbers.tolist()})
    assert len(kept.names) < 20
    assert {(0, n): f"n{n}" for n in range(5)}.items() <= kept.names.items()
