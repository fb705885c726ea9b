"""Probes of a labelled evaluation, kept in a file and applied to samples without labels."""

import pickle

import numpy as np
import pytest
import torch

from lightning_xattn import ExplainabilityCapture, create_explainability_report, interpret_sample
from lightning_xattn.cli import main
from lightning_xattn.core.errors import DataError
from lightning_xattn.evaluation.saved_probes import SavedProbes, fingerprint
from lightning_xattn.functional import fit_probes
from lightning_xattn.functional.probe import assign_folds
from tests import reference
from tests.attribution.models import NAMED, loader_of, said_data, sample_ids, trained

pytestmark = pytest.mark.filterwarnings("ignore:.*samples have no class:lightning_xattn.XAttnWarning")


SETTINGS = {"predict": lambda model, batch: model(*batch[:2]), "sample_ids": sample_ids, **NAMED}


def explainer_of(model, **settings):
    """Without targets, unless these are given."""
    return ExplainabilityCapture(model, class_names=list("abcd"), **SETTINGS | settings)


def targets(outputs, batch):
    return batch[2]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A model, its explained labelled data, and the file with the probes."""
    data, _ = said_data(200, noise=1.5, disagreeing=0.4, seed=3)
    model = trained(None, data, epochs=15)
    explainer = explainer_of(model, targets=targets, contribution_samples=0)
    result = explainer.explain_loader(loader_of(data), progress=False)
    path = tmp_path_factory.mktemp("saved") / "probes.pt"
    explainer.save_probes(result, path)
    return model, data, result, path


@pytest.fixture(scope="module")
def new():
    """Other samples, and no labels."""
    left, right, _, ids = said_data(40, noise=1.5, disagreeing=0.4, seed=8)[0].tensors
    return [left, right, torch.full((40,), -1), ids]


def slow_fit(features, target, folds, n_classes):
    """Log probabilities of a function of features, fitted on all samples with one temperature."""
    scores, labels = [], []
    for fold in sorted(set(folds)):
        seen = [i for i, one in enumerate(folds) if one != fold]
        fit = reference.discriminant_scores(features[seen], [target[i] for i in seen], n_classes)
        for i, one in enumerate(folds):
            if one == fold:
                scores.append(fit(features[i]))
                labels.append(target[i])
    factor = reference.inverse_temperature(scores, labels)
    whole = reference.discriminant_scores(features, target, n_classes)

    def log_probabilities(one):
        given = factor * whole(one)
        return given - np.log(np.exp(given - given.max()).sum()) - given.max()

    return log_probabilities


def test_a_fit_for_others_is_the_references():
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(60) % 3
    features = 5 + torch.randn(60, 4, generator=generator).double() + 0.7 * target[:, None]
    folds = assign_folds(torch.arange(60) // 2)
    weights, bias = fit_probes({"eeg": features}, target, folds, 3)["eeg",]
    expected = slow_fit(features.numpy(), target.tolist(), folds.tolist(), 3)
    others = 5 + torch.randn(7, 4, generator=generator).double()
    ours = (others @ weights.T + bias).log_softmax(1)
    np.testing.assert_allclose(ours, [expected(one) for one in others.numpy()], atol=2e-3)
    assert fit_probes({"eeg": features}, torch.zeros(60).long(), folds, 3) == {}


def test_samples_without_labels_get_their_support(labelled, new):
    model, _, result, path = labelled
    explained = explainer_of(model).explain_batch(new, probes=path)
    fits, accuracies = SavedProbes.load(path).fits, [cell.accuracy for cell in result.fusion.cells]
    with torch.no_grad():
        tokens = {"left": model.left(new[0]), "right": model.right(new[1])}
        predicted = model(new[0], new[1]).argmax(1)
    for i, one in enumerate(explained["per_sample_explanations"]):
        said, classes = one["modalities"], {}
        for name, of_one in tokens.items():
            pooled = reference.pooled(of_one[i].numpy(), [True] * of_one.shape[1])
            weights, bias = (part.numpy() for part in fits[name,])
            p = np.exp(weights @ pooled + bias)
            classes[name] = int(p.argmax())
            assert said.probes[name] == ("abcd"[p.argmax()], pytest.approx(p.max() / p.sum(), abs=1e-5))
        supporters = tuple(name for name in tokens if classes[name] == predicted[i])
        assert (said.supporters, said.true) == (supporters, None)
        cells = {("left", "right"): 0, ("left",): 1, ("right",): 2}
        cell = cells.get(supporters, 3 if classes["left"] == classes["right"] else 4)
        assert (said.similar.mean, said.similar.count) == (accuracies[cell].mean, accuracies[cell].count)
        assert f"Of {accuracies[cell].count} such samples of the labelled evaluation" in str(said)
    first = explained["per_sample_explanations"][0]
    (support, *_) = interpret_sample(first)
    assert (support.group, support.criterion) == ("Support of the prediction", str(first["modalities"]))
    assert support.value == len(first["modalities"].supporters)
    assert str(first["modalities"]) in " ".join(create_explainability_report(explained).split())


def test_one_sample_and_a_loader_say_the_same_as_a_batch(labelled, new):
    model, _, _, path = labelled
    explainer = explainer_of(model)
    whole = [one["modalities"] for one in explainer.explain_batch(new, probes=path)["per_sample_explanations"]]
    alone = explainer.explain_single_sample([one[4:5] for one in new], 0, probes=path)["modalities"]
    assert str(alone) == str(whole[4])
    batches = [[one[start : start + 16] for one in new] for start in range(0, 40, 16)]
    result = explainer.explain_loader(batches, progress=False, probes=path)
    fusion = result.fusion
    assert fusion.cells[0].accuracy.count == 0
    assert fusion.numbers["support"].isfinite().all()
    cells = {int(number): int(cell) for number, cell in zip(fusion.sample_numbers, fusion.support_cell, strict=True)}
    for i, one in enumerate(whole):
        assert (cells[i] < 3) == bool(one.supporters)
    report = create_explainability_report(result)
    assert "fitted on another, labelled evaluation; these samples have no labels" in report


def test_probes_of_other_weights_are_refused(labelled, new, tmp_path):
    model, data, _, path = labelled
    other = trained(None, data, epochs=1)
    with pytest.raises(DataError, match="saved probes are of a model with other weights"):
        explainer_of(other).explain_batch(new, probes=path)
    compiled = torch.compile(model, backend="eager")
    assert fingerprint(compiled) == fingerprint(model) != fingerprint(other)


def test_probes_of_other_modalities_are_refused(labelled, new):
    model, _, _, path = labelled
    with pytest.raises(
        DataError, match="The saved probes read left = left of fusion, .* this run has west = left of fusion"
    ):
        explainer_of(model, modalities={"west": 0, "east": 1}).explain_batch(new, probes=path)


def test_probes_of_other_modules_or_class_names_are_refused(labelled, new):
    model, _, _, path = labelled
    swapped = explainer_of(model, modalities={"left": 1, "right": 0}, attention={})
    with pytest.raises(DataError, match="The saved probes read left = left of fusion, .* this run has left = right of"):
        swapped.explain_loader([new], progress=False, probes=path)
    explainer = ExplainabilityCapture(model, class_names=list("dcba"), **SETTINGS)
    with pytest.raises(
        DataError, match="saved probes are of the classes a, b, c, d; the explainer's class_names are d"
    ):
        explainer.explain_batch(new, probes=path)


def test_a_result_of_earlier_weights_is_not_saved(labelled, tmp_path):
    _, data, _, _ = labelled
    model = trained(None, data, epochs=15)
    explainer = explainer_of(model, targets=targets, contribution_samples=0)
    result = explainer.explain_loader(loader_of(data), progress=False)
    with torch.no_grad():
        model.head.bias += 1
    with pytest.raises(DataError, match="saved probes are of a model with other weights"):
        explainer.save_probes(result, tmp_path / "none.pt")


def test_a_batchs_result_has_no_probes_to_save(labelled, new, tmp_path):
    explainer = explainer_of(labelled[0])
    with pytest.raises(DataError, match="Expected the result of explain_loader; got a dict"):
        explainer.save_probes(explainer.explain_batch(new), tmp_path / "none.pt")


def test_labels_are_not_looked_at(labelled):
    """The probes may have been fitted on these very samples: their accuracy would mean nothing."""
    model, data, _, path = labelled
    result = explainer_of(model, targets=targets).explain_loader(loader_of(data), progress=False, probes=path)
    assert not result.fusion.has_outcomes
    assert result.fusion.numbers["right/left"].isnan().all()
    assert isinstance(result.fusion.added_value, str)
    report = create_explainability_report(result)
    assert "no prediction is known to be correct or not" in report
    assert report.count("such samples of the labelled evaluation") == 20  # the first ones


def test_what_has_no_probes_saves_none(labelled, new, tmp_path):
    model, _, _, path = labelled
    explainer = explainer_of(model)
    for loader, probes, reason in (
        ([new], None, "There are no probes to save: there are no targets"),
        ([new], path, "The probes of this evaluation come from a file"),
    ):
        result = explainer.explain_loader(loader, progress=False, probes=probes)
        with pytest.raises(DataError, match=reason):
            explainer.save_probes(result, tmp_path / "none.pt")
    assert not (tmp_path / "none.pt").exists()


class Evil:
    def __reduce__(self):
        return (print, ("evil",))


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps(Evil())])
def test_a_file_without_probes_is_refused_and_runs_nothing(labelled, new, content, tmp_path, capsys):
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(DataError, match="file.pt cannot be read as saved probes"):
        explainer_of(labelled[0]).explain_batch(new, probes=tmp_path / "file.pt")
    with pytest.raises(DataError, match="nowhere.pt cannot be read as saved probes"):
        explainer_of(labelled[0]).explain_batch(new, probes=tmp_path / "nowhere.pt")
    assert "evil" not in capsys.readouterr().out


def test_probes_of_another_format_are_refused(labelled, new, tmp_path):
    content = torch.load(labelled[3], weights_only=True) | {"format": 2}
    torch.save(content, tmp_path / "later.pt")
    with pytest.raises(DataError, match="has probes in format 2; this version reads format 1"):
        SavedProbes.load(tmp_path / "later.pt")


def test_the_command_saves_and_applies_probes(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr("lightning_xattn.explainer.command.explain_model", lambda *given: called.append(given))
    arguments = ["--model", "m", "--datamodule", "d", "--checkpoint", "c", "--out", "o"]
    assert main(["explain", *arguments, "--probes", "probes.pt"]) == 0
    assert called == [("m", "c", "d", "o", False, "probes.pt")]
