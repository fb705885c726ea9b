"""A whole loader explained: the callback's numbers, and a folder that a run which was cut off goes on with."""

import os
import subprocess
import sys
import warnings
from argparse import Namespace
from functools import partial

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture, XAttnWarning
from lightning_xattn.core.errors import DataError, SettingError, XAttnError
from lightning_xattn.core.notices import named
from lightning_xattn.evaluation.statistics import ALIGNMENT
from lightning_xattn.explainer import dataset, progress
from tests.messages import tells
from tests.toy import NAMES, PaddedToyModule, ToyModule, padded_toy_data, run_toy, toy_data, toy_loader, validate


@pytest.fixture(autouse=True)
def _many_parts(monkeypatch):
    monkeypatch.setattr(dataset, "BATCHES_A_PART", 2)


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
    torch.testing.assert_close(ours.histograms, theirs.histograms, **tolerance)
    torch.testing.assert_close(ours.maps, theirs.maps, **tolerance)
    assert ours.alignment_null == pytest.approx(theirs.alignment_null, abs=tolerance["atol"], nan_ok=True)


EXACTLY = {"rtol": 0, "atol": 0}


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


def test_the_loader_says_what_its_batches_say():
    watch = explainer()
    summary = watch.explain_loader(toy_loader()).headline
    samples = [s for batch in toy_loader() for s in watch.explain_batch(batch)["per_sample_explanations"]]
    agreements = torch.tensor([s["modality_agreement"] for s in samples], dtype=torch.float64)
    assert summary.mean(ALIGNMENT) == pytest.approx(float(agreements.mean()), abs=1e-6)
    correct = torch.tensor([s["correct"] for s in samples])
    assert summary.mean(ALIGNMENT, outcome=1) == pytest.approx(float(agreements[correct].mean()), abs=1e-6)


def test_batches_in_parts_give_the_same():
    whole = explainer().explain_loader(toy_loader())
    assert_same_summary(explainer(max_batch_size=2).explain_loader(toy_loader()).headline, whole.headline, atol=1e-4)


def test_the_table_has_the_callbacks_rows(tmp_path):
    module = ToyModule()
    watch = AttentionExplainabilityCallback(table=tmp_path / "callback")
    validate(module, watch)
    explained = explainer(module).explain_loader(toy_loader(), tmp_path / "explained")
    assert explained.table == tmp_path / "explained"
    theirs, ours = pd.read_parquet(tmp_path / "callback"), pd.read_parquet(explained.table)
    assert ours["sample_idx"].tolist() == list(range(23))
    shared = [name for name in theirs if name not in ("run", "stage", "epoch", "step", "dataloader")]
    assert set(ours) == set(shared)
    pd.testing.assert_frame_equal(ours[shared], theirs[shared], rtol=1e-5, atol=1e-6)


class Interrupted:
    """A loader that breaks off before a batch."""

    def __init__(self, error, before=3):
        self.error, self.before = error, before

    def __len__(self):
        return 5

    def __iter__(self):
        for i, batch in enumerate(toy_loader()):
            if i == self.before:
                raise self.error
            yield batch


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no such disk")])
def test_a_run_that_was_cut_off_goes_on(tmp_path, error):
    whole = explainer().explain_loader(toy_loader(), tmp_path / "whole")
    expected = XAttnError if isinstance(error, Exception) else type(error)
    with pytest.raises(expected) as raised:
        explainer().explain_loader(Interrupted(error), tmp_path / "parts")
    if isinstance(error, Exception):
        assert "Batch 3 could not be explained: OSError('no such disk')" in str(raised.value)
        assert "The 15 samples of the 3 batches before it are kept" in str(raised.value)
    assert len(pd.read_parquet(tmp_path / "parts")) == 15
    watch = explainer()
    runs = []
    watch.model.register_forward_hook(lambda *_: runs.append(1))
    again = watch.explain_loader(toy_loader(), tmp_path / "parts")
    assert len(runs) == 3  # the first batch to see that it is the same, and the last two
    assert_same_summary(again.headline, whole.headline, **EXACTLY)
    rows = [
        pd.read_parquet(tmp_path / folder).sort_values("sample_idx", ignore_index=True) for folder in ("parts", "whole")
    ]
    pd.testing.assert_frame_equal(*rows)
    assert rows[0]["sample_idx"].tolist() == list(range(23))


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on(tmp_path):
    code = f"""
import os, torch
from lightning_xattn import ExplainabilityCapture
from lightning_xattn.explainer import dataset, progress
from tests.toy import ToyModule, run_toy, toy_loader
dataset.BATCHES_A_PART = 2
def loader():
    for i, batch in enumerate(toy_loader()):
        if i == 3:
            os._exit(9)
        yield batch
torch.manual_seed(0)
class Sized:
    __len__ = lambda self: 5
    __iter__ = lambda self: loader()
ExplainabilityCapture(ToyModule(), predict=run_toy).explain_loader(Sized(), {str(tmp_path / "killed")!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    killed = tmp_path / "killed"
    assert len(pd.read_parquet(killed)) == 10
    # As if it had been killed between the rows and the sums of a further part, and in the middle of one.
    (part,) = killed.glob("explained-*.parquet")
    (killed / "explained-000002-deadbeef.parquet").write_bytes(part.read_bytes())
    (killed / ".explained-000002-deadbeef.parquet.part").write_bytes(b"half")
    again = explainer().explain_loader(toy_loader(), killed)
    assert_same_summary(again.headline, explainer().explain_loader(toy_loader()).headline, **EXACTLY)
    assert sorted(pd.read_parquet(killed)["sample_idx"]) == list(range(23))
    assert not list(killed.glob(".*.part"))


def test_a_finished_folder_is_read_back(tmp_path):
    first = explainer().explain_loader(toy_loader(), tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    watch, runs = explainer(), []
    watch.model.register_forward_hook(lambda *_: runs.append(1))
    again = watch.explain_loader(toy_loader(), tmp_path)
    assert len(runs) == 1
    assert_same_summary(again.headline, first.headline, **EXACTLY)
    assert again.class_names == first.class_names
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


def test_a_folder_of_something_else_is_refused(tmp_path):
    explainer().explain_loader(toy_loader(), tmp_path)
    other = explainer()
    with torch.no_grad():
        other.model.head.bias[0] += 1e-3
    for watch, loader, message in (
        (other, toy_loader(), "begun with something else \\(model weights: .*delete this one"),
        (explainer(class_names=NAMES), toy_loader(), "class_names: None there, \\['a', 'b', 'c', 'd'\\] now"),
        (explainer(classes_by="prediction"), toy_loader(), "classes_by: target there, prediction now"),
        (explainer(), toy_loader(samples=31), "batches: 5 there, 7 now"),
        (explainer(), toy_loader(seed=1), "Batch 0: The loader's first batch is not the one.*another data set"),
        (explainer(), DataLoader(toy_data(), 5, shuffle=True), "a loader that shuffles cannot be continued"),
    ):
        with pytest.raises(SettingError, match=message):
            watch.explain_loader(loader, tmp_path)
    assert len(pd.read_parquet(tmp_path)) == 23


def test_folders_that_are_no_explained_data_set(tmp_path):
    table = tmp_path / "callback"
    validate(ToyModule(), AttentionExplainabilityCallback(table=table))
    with pytest.raises(SettingError, match="holds .*-val-epoch=0.*but no _progress.pt"):
        explainer().explain_loader(toy_loader(), table)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "_progress.pt").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(DataError, match=r"_progress.pt cannot be read.*delete this one"):
        explainer().explain_loader(toy_loader(), broken)


def test_samples_that_are_not_finite_end_it_and_what_came_before_is_kept(tmp_path):
    audio, text, target = toy_data().tensors
    audio[17] = torch.nan
    bad = DataLoader(TensorDataset(audio, text, target), batch_size=5)
    message = r"Batch 3: The class scores of sample 2 \(1 of 5\) are not finite.*The 15 samples of the 3 batches.*kept"
    with pytest.raises(DataError, match=message):
        explainer().explain_loader(bad, tmp_path)
    assert pd.read_parquet(tmp_path)["sample_idx"].max() == 14
    with pytest.raises(DataError, match="are not kept: name a folder"):
        explainer().explain_loader(bad)
    # Mended, it goes on where it stopped.
    mended = explainer().explain_loader(toy_loader(), tmp_path)
    assert_same_summary(mended.headline, explainer().explain_loader(toy_loader()).headline, **EXACTLY)


def test_a_batch_that_fails_in_its_second_part_leaves_nothing(tmp_path):
    audio, text, target = toy_data().tensors
    audio[19] = torch.nan  # the last of batch 3, in the last of its parts
    bad = DataLoader(TensorDataset(audio, text, target), batch_size=5)
    with pytest.raises(DataError, match="Batch 3.*15 samples of the 3 batches"):
        explainer(max_batch_size=2).explain_loader(bad, tmp_path)
    mended = explainer(max_batch_size=2).explain_loader(toy_loader(), tmp_path)
    assert_same_summary(mended.headline, explainer(max_batch_size=2).explain_loader(toy_loader()).headline, **EXACTLY)


def test_loaders_that_are_empty_or_end_early(tmp_path):
    with pytest.raises(DataError, match="^The loader is empty: it yields no batch"):
        explainer().explain_loader([])

    class Stream(IterableDataset):
        def __init__(self, samples):
            self.samples = samples

        def __iter__(self):
            return iter(toy_data()[i] for i in range(self.samples))

    with pytest.raises(XAttnError):
        explainer().explain_loader(_failing(DataLoader(Stream(23), 5)), tmp_path)
    with pytest.raises(DataError, match="Batch 2: The loader ends here; the folder has 4 batches of it"):
        explainer().explain_loader(DataLoader(Stream(10), 5), tmp_path)
    assert explainer().explain_loader(DataLoader(Stream(23), 5), tmp_path).headline.samples == 23


def _failing(loader):
    yield from list(loader)[:4]
    raise OSError("gone")


def test_a_folder_that_cannot_be_written_is_named_beside_the_first_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(XAttnError, match=tells("Batch ", "written into", "file")):
        explainer().explain_loader(toy_loader(), tmp_path / "file" / "below")


def test_without_targets_there_are_no_outcomes_and_one_warning_says_so():
    loader = DataLoader(TensorDataset(*toy_data().tensors[:2]), batch_size=5)
    with pytest.warns(XAttnWarning, match="No targets found.*targets=<key or callable>"):
        explained = explainer().explain_loader(loader)
    assert explained.class_names == ()
    assert explained.headline.samples == 23
    with pytest.warns(XAttnWarning, match=tells("No targets", "correct and incorrect", "targets=<key or callable>")):
        explained = explainer(classes_by="prediction").explain_loader(loader)
    assert explained.class_names == ("class_0", "class_1", "class_2", "class_3")


def test_alarms_ring_as_in_the_callback():
    module = ToyModule()
    with torch.no_grad():
        module.audio_to_text_attn.in_proj_weight[:24] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        explainer(module).explain_loader(toy_loader())
    messages = [str(w.message) for w in caught if w.category is XAttnWarning]
    assert len(messages) == 2
    assert "audio_to_text, head 0, 1, 2: uniform attention" in messages[1]


def test_a_progress_bar_only_where_there_is_a_terminal(capsys):
    explainer().explain_loader(toy_loader())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failure_while_the_sums_are_written_leaves_every_row_once(error, at, tmp_path, monkeypatch):
    saves = []

    def save(*args):
        saves.append(args)
        if len(saves) == at:
            raise error
        torch_save(*args)

    torch_save = torch.save
    monkeypatch.setattr(progress.torch, "save", save)
    with pytest.raises((KeyboardInterrupt, XAttnError)):
        explainer().explain_loader(toy_loader(), table=tmp_path)
    if list(tmp_path.glob("*.parquet")):
        assert not pd.read_parquet(tmp_path).duplicated(["sample_idx"]).any()
    explained = explainer().explain_loader(toy_loader(), table=tmp_path)
    rows = pd.read_parquet(tmp_path)
    assert sorted(rows["sample_idx"]) == list(range(23))
    assert_same_summary(explained.headline, explainer().explain_loader(toy_loader()).headline, **EXACTLY)


@pytest.mark.slow
def test_a_disk_that_is_full_in_the_first_part_is_said_and_leaves_nothing(tmp_path):
    """No file may grow beyond 18 kB, which the rows fit in and the sums do not."""
    code = f"""
import resource, signal, torch
from lightning_xattn import ExplainabilityCapture
from tests.toy import ToyModule, run_toy, toy_loader
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (18_000, 18_000))
torch.manual_seed(0)
ExplainabilityCapture(ToyModule(), predict=run_toy).explain_loader(toy_loader(), {str(tmp_path / "full")!r})
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "OSError: [Errno 27] File too large" in ended.stderr
    assert list((tmp_path / "full").iterdir()) == []
    again = explainer().explain_loader(toy_loader(), tmp_path / "full")
    assert_same_summary(again.headline, explainer().explain_loader(toy_loader()).headline, **EXACTLY)


def test_a_run_that_was_killed_in_its_first_part_begins_anew(tmp_path):
    """Between its rows and their sums; also with other settings, as nothing of it is known."""
    explainer().explain_loader(toy_loader(), tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    folder = progress.ExplainedFolder(tmp_path / "killed", {})
    folder._write({"identity": {"format": progress.FORMAT}, "batches": 0})
    rows = min((tmp_path / "whole").glob("*.parquet"))
    (tmp_path / "killed" / rows.name).write_bytes(rows.read_bytes())
    explainer(top_k=3).explain_loader(toy_loader(), tmp_path / "killed")
    assert sorted(pd.read_parquet(tmp_path / "killed")["sample_idx"]) == list(range(23))


def test_the_sums_are_small_beside_what_they_are_of(tmp_path):
    explainer().explain_loader(toy_loader(), table=tmp_path)
    assert (tmp_path / progress.FILE).stat().st_size < 40_000


def test_rows_that_are_lost_or_damaged_are_noticed(tmp_path):
    explainer().explain_loader(toy_loader(), table=tmp_path)
    part = min(tmp_path.glob("*.parquet"))
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    with pytest.raises(DataError, match=f"lacks rows: {part.name} is absent or damaged"):
        explainer().explain_loader(toy_loader(), table=tmp_path)
    part.unlink()
    with pytest.raises(DataError, match=f"lacks rows: {part.name} is absent or damaged"):
        explainer().explain_loader(toy_loader(), table=tmp_path)
    part.write_bytes(whole)
    assert explainer().explain_loader(toy_loader(), table=tmp_path).headline.samples == 23


def test_a_data_set_that_says_it_is_another_is_refused(tmp_path):
    loader = toy_loader()
    loader.dataset.fingerprint = "one"
    explainer().explain_loader(loader, table=tmp_path)
    explainer().explain_loader(loader, table=tmp_path)
    loader.dataset.fingerprint = "two"
    with pytest.raises(SettingError, match="data: one there, two now"):
        explainer().explain_loader(loader, table=tmp_path)


class Reader:
    """A callable object; its address is another one in each run."""

    def __call__(self, module, *_):
        return module


def test_settings_have_the_same_name_in_every_run():
    def settings():
        return {
            "a": lambda model: model,
            "b": [partial(Reader(), 1, key=Reader()), Reader()],
            "c": ("x", 1, None, Reader),
            "d": Namespace(x=object(), y=[1.5]),
        }

    first, second = str(named(settings())), str(named(settings()))
    assert first == second
    assert " at 0x" not in first
    assert "Reader" in first
    assert "{'x': 'object', 'y': [1.5]}" in first


def test_functions_that_call_themselves_have_a_name():
    def down(number):
        return down(number - 1) if number else later

    assert named(down) == named(down)
    later = 1
    assert named(down).startswith(down.__qualname__)


@pytest.mark.slow
def test_a_lambda_has_the_same_name_whatever_the_order_of_a_set():
    code = "from lightning_xattn.core.notices import named; print(named(lambda x: x in {'a', 'b', 'c', 'd', 'e'}))"
    names = set()
    for seed in "123":
        settings = {"capture_output": True, "text": True, "check": True, "env": os.environ | {"PYTHONHASHSEED": seed}}
        names.add(subprocess.run([sys.executable, "-c", code], **settings).stdout)
    assert len(names) == 1


def test_a_loader_without_labels_after_one_with_labels_is_refused(tmp_path):
    explainer().explain_loader(toy_loader(), table=tmp_path)
    audio, text, _ = toy_data().tensors
    loader = DataLoader(TensorDataset(audio, text), batch_size=5)
    with (
        pytest.warns(XAttnWarning, match="No targets"),
        pytest.raises(SettingError, match=tells("first batch", str(tmp_path), "shuffles")),
    ):
        explainer().explain_loader(loader, table=tmp_path)


def test_other_predictions_under_the_same_name_are_noticed(tmp_path):
    class Signed:
        def __init__(self, sign):
            self.sign = sign

        def __call__(self, outputs, batch):
            return self.sign * outputs

    explainer(predictions=Signed(1)).explain_loader(toy_loader(), table=tmp_path)
    with pytest.raises(SettingError, match=tells("first batch", str(tmp_path), "shuffles")):
        explainer(predictions=Signed(-1)).explain_loader(toy_loader(), table=tmp_path)


def test_other_lambdas_are_other_settings(tmp_path):
    explainer(predictions=lambda outputs, batch: outputs).explain_loader(toy_loader(), table=tmp_path)
    with pytest.raises(SettingError, match=tells("was begun with something else", "predictions")):
        explainer(predictions=lambda outputs, batch: -outputs).explain_loader(toy_loader(), table=tmp_path)
