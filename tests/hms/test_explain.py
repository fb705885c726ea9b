"""``lightning-xattn explain``: from a checkpoint and a folder of recordings to report, figures and table."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from lightning_xattn.cli import main
from lightning_xattn.core.errors import DataError, SettingError
from lightning_xattn.evaluation.saved_probes import SavedProbes, fingerprint
from lightning_xattn.explainer import load_checkpoint
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.hms import CLASSES, HMSDataModule, HMSLightningModule, explain
from lightning_xattn.hms.explain import run_explain
from lightning_xattn.hms.montage import ELECTRODES, VOTE_COLUMNS
from tests.hms.conftest import table_rows
from tests.toy import ToyModule

# Of a model that has hardly been trained, or not at all, the heads are alike or uniform, and alarms say so.
pytestmark = pytest.mark.filterwarnings("ignore:Layer 'model.fusion'")


SOURCES = "eeg = model.eeg_encoder", "spec = model.spec_encoder"


@pytest.fixture
def without_pictures(monkeypatch):
    """Most of the time goes into drawing."""
    write = explain.create_explainability_report
    monkeypatch.setattr(explain, "_draw_sample", lambda *args: None)
    monkeypatch.setattr(explain, "save_dataset_figures", lambda explained, folder: None)
    monkeypatch.setattr(
        explain, "create_explainability_report", lambda *args, **more: write(*args) if "pictures" not in more else None
    )


@pytest.fixture
def drawn(monkeypatch):
    """The sample ids, names of traces, regions and montages that are drawn; the first sample truly is."""
    drawn, draw_sample, plot = [], explain._draw_sample, explain.plot_attention_over_signals

    def note(results, i, *args):
        name = results["per_sample_explanations"][i]["sample_id"]
        draw_sample(results, i, *args) if not drawn else drawn.append((name, None))

    def plot_and_note(traces, spectrograms, pair, i, **settings):
        name = Path(settings["save_path"]).parent.name
        drawn.append((name, (traces.names, spectrograms.regions, settings["montage"])))
        plot(traces, spectrograms, pair, i, **settings)

    monkeypatch.setattr(explain, "_draw_sample", note)
    monkeypatch.setattr(explain, "plot_attention_over_signals", plot_and_note)
    return drawn


@pytest.mark.slow
def test_from_checkpoint_and_real_recordings_to_report_figures_and_table(
    hms_checkpoint, iiic_irr, tmp_path, capsys, drawn
):
    arguments = ["explain", "--checkpoint", str(hms_checkpoint), "--data", str(iiic_irr), "--out", str(tmp_path)]
    assert main(arguments) == 0
    report = (tmp_path / "report.md").read_text()
    assert report in capsys.readouterr().out
    facts = json.loads((tmp_path / "report.json").read_text())
    table = pd.read_parquet(tmp_path / "table/attention")
    assert sorted(table["sample_id"].astype(int)) == list(range(3001, 3021))
    layer = facts["layers"][0]
    (everyone,) = (group for group in layer["groups"] if group["name"] == "all")
    assert everyone["numbers"]["alignment"]["mean"] == pytest.approx(table["alignment"].mean(), abs=1e-6)
    assert len(list((tmp_path / "figures").glob("*.png"))) == 7

    first = table.sort_values("sample_idx").groupby(["target", "correct"])["sample_id"].first()
    assert sorted(name for name, _ in drawn) == sorted(first)
    name, what = drawn[0]
    regions = ["left lateral", "right lateral", "left parasagittal", "right parasagittal"]
    assert what == (ELECTRODES, regions, "bipolar")
    files = {path.name for path in (tmp_path / "samples" / name).iterdir()}
    assert files == {"signals.png", "attention.png", "alignment.png"}
    for name in first:
        place = int(table.set_index("sample_id")["sample_idx"][name])
        assert f"Sample {place} (id {name})" in (tmp_path / "samples.md").read_text()


@pytest.mark.parametrize(("arguments", "montage"), [([], "bipolar"), (["--montage", "referential"], "referential")])
def test_the_montage_is_bipolar_unless_another_is_asked_for(arguments, montage, monkeypatch):
    called = []
    monkeypatch.setattr("lightning_xattn.hms.explain.run_explain", lambda *args: called.append(args))
    assert main(["explain", "--checkpoint", "c", "--data", "d", "--out", "o", *arguments]) == 0
    assert called == [("c", "d", "o", montage, False, None)]


@pytest.mark.usefixtures("without_pictures")
def test_recordings_without_votes_are_read_by_saved_probes(hms_checkpoint, make_folder, tmp_path, capsys):
    model = load_checkpoint(HMSLightningModule, hms_checkpoint)
    generator = torch.Generator().manual_seed(0)
    width = 3 * 256
    fits = {
        names: (torch.randn(6, len(names) * width, generator=generator).double(), torch.zeros(6).double())
        for names in (("eeg",), ("spec",), ("eeg", "spec"))
    }
    accuracies = tuple(Estimate(0.8, 0.7, 0.9, count) for count in (50, 40, 30, 20, 10))
    probes = SavedProbes(("eeg", "spec"), SOURCES, tuple(CLASSES), fits, accuracies, fingerprint(model))
    probes.save(tmp_path / "probes.pt")
    rows = [{name: cell for name, cell in row.items() if name not in VOTE_COLUMNS} for row in table_rows(5)]
    arguments = ["--checkpoint", str(hms_checkpoint), "--data", str(make_folder(rows=rows)), "--out", str(tmp_path)]
    assert main(["explain", *arguments, "--probes", str(tmp_path / "probes.pt")]) == 0
    assert "fitted on another, labelled evaluation" in capsys.readouterr().out
    said = (tmp_path / "samples.md").read_text()
    assert (
        said.count("The probe on EEG predicts ")
        == said.count(" such samples of the labelled evaluation 80 % were")
        == 5
    )
    table = pd.read_parquet(tmp_path / "table/samples")
    assert table["support"].notna().all()
    assert main(["explain", *arguments]) == 1
    assert "missing column(s) seizure_vote" in capsys.readouterr().err


def test_recordings_without_votes_cannot_be_trained_on(make_folder, tmp_path):
    data = HMSDataModule(make_folder(), cache_dir=tmp_path / "features", labelled=False)
    with pytest.raises(SettingError, match="labelled=False: the data have no targets to train on"):
        data.train_dataloader()
    assert next(iter(HMSDataModule(make_folder("other"), labelled=False).recordings.rows)).votes == ()


def test_what_is_no_montage_is_said_before_anything_is_read(tmp_path):
    with pytest.raises(SettingError, match="montage must be one of 'bipolar', 'referential'; got 'transverse'"):
        run_explain(tmp_path / "none.ckpt", tmp_path / "none", tmp_path / "out", "transverse")


@pytest.mark.usefixtures("without_pictures")
def test_recordings_that_cannot_be_used_are_left_out_and_said(hms_checkpoint, make_folder, tmp_path):
    data = make_folder()
    (data / "train_eegs/102.parquet").unlink()
    with pytest.warns(UserWarning, match="Left out 1 of 5 rows.*missing file"):
        run_explain(hms_checkpoint, data, tmp_path / "out")
    assert len(pd.read_parquet(tmp_path / "out/table/attention")) == 4


def test_what_is_no_checkpoint_is_said(hms_checkpoint, iiic_irr, tmp_path, capsys):
    for path, message in (
        (tmp_path / "none.ckpt", "none.ckpt cannot be read as a checkpoint"),
        (iiic_irr / "train.csv", "train.csv is no checkpoint of HMSLightningModule"),
    ):
        with pytest.raises(DataError, match=message):
            load_checkpoint(HMSLightningModule, path)
    other = torch.load(hms_checkpoint, weights_only=True)
    other["state_dict"] = ToyModule().state_dict()
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(DataError, match="another architecture|does not fit|checkpoint"):
        load_checkpoint(HMSLightningModule, tmp_path / "other.ckpt")
    assert main(["explain", "--checkpoint", str(tmp_path / "none.ckpt"), "--data", "x", "--out", str(tmp_path)]) == 1
    assert "none.ckpt cannot be read as a checkpoint" in capsys.readouterr().err
    assert main(["explain", "--checkpoint", str(hms_checkpoint), "--data", "x", "--out", str(tmp_path)]) == 1
    assert "train.csv does not exist" in capsys.readouterr().err


def test_out_that_is_a_file_is_said(hms_checkpoint, make_folder, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="out is a file; expected a folder"):
        run_explain(hms_checkpoint, make_folder(), tmp_path / "out")
