"""A whole loader explained: the callback's numbers, and a table that is complete or absent."""

import warnings

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture, XAttnWarning
from lightning_xattn.core.errors import DataError, SettingError, XAttnError
from lightning_xattn.evaluation import table as table_module
from lightning_xattn.evaluation.statistics import ALIGNMENT
from tests.messages import tells
from tests.toy import NAMES, PaddedToyModule, ToyModule, padded_toy_data, run_toy, toy_data, toy_loader, validate


def explainer(module=None, **settings):
    torch.manual_seed(0)
    return ExplainabilityCapture(module or ToyModule(), **({"predict": run_toy} | settings))


def assert_same_summary(ours, theirs, **tolerance):
    """Every number there is: all that a summary says is made of these."""
    tolerance = {"rtol": 1e-6, "atol": 1e-6, "equal_nan": True} | tolerance
    assert (ours.columns, ours.heads, ours.n_classes, ours.ties) == (
        theirs.columns,
        theirs.heads,
        theirs.n_classes,
        theirs.ties,
    )
    torch.testing.assert_close(ours.moments, theirs.moments, **tolerance)
    torch.testing.assert_close(ours.maps, theirs.maps, **tolerance)
    assert ours.alignment_null == pytest.approx(theirs.alignment_null, abs=tolerance["atol"], nan_ok=True)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("classes_by", ["target", "prediction"])
def test_callback_and_explainer_agree(padded, classes_by):
    module = PaddedToyModule() if padded else ToyModule()
    loader = DataLoader(padded_toy_data() if padded else toy_data(), batch_size=5)
    watch = AttentionExplainabilityCallback(class_names=NAMES, classes_by=classes_by)
    validate(module, watch, loader)
    explained = explainer(module, class_names=NAMES, classes_by=classes_by).explain_loader(loader)
    assert_same_summary(explained.headline, watch.summaries["val"])
    assert (explained.class_names, explained.classes_by, explained.table) == (tuple(NAMES), classes_by, None)
    assert explained.headline.samples == 23


def test_the_loader_has_the_numbers_of_its_batches():
    watch = explainer()
    summary = watch.explain_loader(toy_loader()).headline
    samples = [s for batch in toy_loader() for s in watch.explain_batch(batch)["per_sample_explanations"]]
    agreements = torch.tensor([s["modality_agreement"] for s in samples], dtype=torch.float64)
    assert summary.mean(ALIGNMENT) == pytest.approx(float(agreements.mean()), abs=1e-6)
    correct = torch.tensor([s["correct"] for s in samples])
    assert summary.mean(ALIGNMENT, outcome=1) == pytest.approx(float(agreements[correct].mean()), abs=1e-6)


def test_the_table_has_the_callbacks_rows(tmp_path):
    module = ToyModule()
    watch = AttentionExplainabilityCallback(table=tmp_path / "callback")
    validate(module, watch)
    explained = explainer(module).explain_loader(toy_loader(), tmp_path / "explained")
    assert explained.table == tmp_path / "explained"
    theirs, ours = pd.read_parquet(tmp_path / "callback/attention"), pd.read_parquet(explained.table / "attention")
    assert ours["sample_idx"].tolist() == list(range(23))
    shared = [name for name in theirs if name not in ("run", "stage", "epoch", "step", "dataloader")]
    assert set(ours) == set(shared)
    pd.testing.assert_frame_equal(ours[shared], theirs[shared], rtol=1e-5, atol=1e-6)


class Failing:
    """A loader that fails before its fourth batch."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        for i, batch in enumerate(toy_loader()):
            if i == 3:
                raise self.error
            yield batch


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no such disk")])
def test_a_run_that_fails_leaves_the_folder_as_it_was_and_can_run_again(tmp_path, monkeypatch, error):
    monkeypatch.setattr(table_module, "ROWS_IN_MEMORY", 6)  # so that rows are written before it fails
    folder = tmp_path / "table"
    expected = XAttnError if isinstance(error, Exception) else type(error)
    for _ in range(2):  # into an empty folder, then beside a table
        before = contents(folder)
        with pytest.raises(expected) as raised:
            explainer().explain_loader(Failing(error), folder)
        if isinstance(error, Exception):
            assert str(raised.value) == "Batch 3 could not be explained: OSError('no such disk')."
        assert contents(folder) == before
        explainer().explain_loader(toy_loader(), folder)
        assert pd.read_parquet(folder / "attention")["sample_idx"].tolist() == list(range(23))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_table_replaces_the_one_of_an_earlier_call(tmp_path):
    explainer().explain_loader(toy_loader(), tmp_path)
    explained = explainer(class_names=NAMES).explain_loader(toy_loader(samples=31), tmp_path)
    assert explained.table == tmp_path
    assert pd.read_parquet(tmp_path / "attention")["sample_idx"].tolist() == list(range(31))


def test_a_folder_with_another_table_is_refused(tmp_path):
    validate(ToyModule(), AttentionExplainabilityCallback(table=tmp_path))
    before = contents(tmp_path)
    with pytest.raises(SettingError, match="holds .*-val-epoch=0.*, and not from explain_loader.*Name another folder"):
        explainer().explain_loader(toy_loader(), tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_named_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    runs = []
    with pytest.raises(NotADirectoryError, match="file"):
        explainer(predict=lambda *args: runs.append(args)).explain_loader(toy_loader(), tmp_path / "file" / "below")
    assert not runs


def test_samples_that_are_not_finite_are_named_with_their_batch(tmp_path):
    audio, text, target = toy_data().tensors
    audio[17] = torch.nan
    bad = DataLoader(TensorDataset(audio, text, target), batch_size=5)
    with pytest.raises(DataError, match=r"^Batch 3: The class scores of sample 2 \(1 of 5\) are not finite"):
        explainer().explain_loader(bad, tmp_path)
    assert not contents(tmp_path)


def test_a_loader_without_batches_or_without_a_length():
    with pytest.raises(DataError, match="^The loader is empty: it yields no batch"):
        explainer().explain_loader([])

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(toy_data()[i] for i in range(23))

    assert explainer().explain_loader(DataLoader(Stream(), 5)).headline.samples == 23


def test_without_targets_there_are_no_outcomes_and_one_warning():
    loader = DataLoader(TensorDataset(*toy_data().tensors[:2]), batch_size=5)
    with pytest.warns(XAttnWarning, match="No targets found.*targets=<key or callable>"):
        explained = explainer().explain_loader(loader)
    assert explained.class_names == ()
    assert explained.headline.samples == 23
    with pytest.warns(XAttnWarning, match=tells("No targets", "correct and incorrect", "targets=<key or callable>")):
        explained = explainer(classes_by="prediction").explain_loader(loader)
    assert explained.class_names == ("class_0", "class_1", "class_2", "class_3")


def test_warnings_are_those_of_the_callback():
    module = ToyModule()
    with torch.no_grad():
        module.audio_to_text_attn.in_proj_weight[:24] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        explainer(module).explain_loader(toy_loader())
    messages = [str(w.message) for w in caught if w.category is XAttnWarning]
    assert len(messages) == 2
    assert "Layer 'audio_to_text', head 0, 1, 2: uniform attention" in messages[1]
