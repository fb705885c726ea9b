"""The examples run as scripts, and leave what they say."""

import runpy
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_xattn import ExplainabilityCapture
from lightning_xattn.hms import CLASSES, HMSDataModule, HMSLightningModule
from tests.pictures import read_picture, shades_of

EXAMPLES = Path(__file__).parents[1] / "examples"


# Warnings that a user would see and act on, as of heads that are uniform still, do not end an example.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.slow]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as a script with these arguments; gives what it prints."""

    def run_script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_script


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_example_analysis(run, hms_checkpoint, iiic_irr, tmp_path):
    printed = run("example_analysis.py", hms_checkpoint, iiic_irr, tmp_path)
    assert "- **Samples:** 20 samples of 20 patients" in printed
    assert (tmp_path / "report.md").read_text() in printed
    assert "# " in (tmp_path / "samples.md").read_text()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        *("map_eeg_to_spec.png", "map_spec_to_eeg.png", "entropy_by_head.png"),
        *(
            "attention.png",
            "card.png",
            "class_comparison.png",
            "contribution_shares.png",
            "sample_0.pdf",
            "sample_0_alignment.png",
        ),
    }
    assert list((tmp_path / "table/attention").glob("*.parquet"))


def test_correct_vs_incorrect(run, hms_checkpoint, iiic_irr):
    printed = run("correct_vs_incorrect.py", hms_checkpoint, iiic_irr)
    assert printed.count("gap ") == 2
    assert sum(int(line.split("n = ")[1].split()[0]) for line in printed.splitlines() if "n = " in line) == 40


def test_head_specialization(run, hms_checkpoint, iiic_irr, tmp_path):
    printed = run("head_specialization.py", hms_checkpoint, iiic_irr, tmp_path / "heads.png")
    assert printed.count("query selectivity") == 16
    colours = read_picture(tmp_path / "heads.png")
    assert (colours == (0x00, 0x61, 0x4A)).all(-1).any(), "bars of the first direction"
    assert (colours == (0xE7, 0xB6, 0xD1)).all(-1).any(), "bars of the second"


def test_class_patterns(run, hms_checkpoint, iiic_irr, tmp_path):
    datamodule = HMSDataModule(iiic_irr, test_data=iiic_irr)
    explainer = ExplainabilityCapture(HMSLightningModule.load_from_checkpoint(hms_checkpoint))
    (batch,) = datamodule.test_dataloader()
    predicted = explainer.explain_batch(batch)["predictions"].bincount(minlength=6)
    most = int(predicted.argmax())
    printed = run("class_patterns.py", hms_checkpoint, iiic_irr, CLASSES[most], tmp_path / "class.png")
    assert f"{predicted[most]} samples of" in printed
    assert f"patients are predicted as {CLASSES[most]}" in printed
    assert shades_of(read_picture(tmp_path / "class.png")) > 50


def test_explain_own_model(run, tmp_path):
    printed = run("explain_own_model.py", tmp_path)
    assert "- **Samples:** 300 samples" in printed
    assert "rain" in printed
    assert (tmp_path / "report.md").exists()
    assert shades_of(read_picture(tmp_path / "alignment.png")) > 50


def test_watch_tests_on_people_it_was_not_trained_on():
    pytest.importorskip("seglearn")
    example = runpy.run_path(str(EXAMPLES / "watch.py"))
    people = {part: {subject for *_, subject in example["make_loader"](part).dataset} for part in ("train", "test")}
    assert people["train"] == example["TRAINING_SUBJECTS"]
    assert people["train"].isdisjoint(people["test"])
    assert len(people["train"] | people["test"]) == 10


def test_watch_ends_with_the_summary_and_a_card(run, tmp_path, monkeypatch):
    pytest.importorskip("seglearn")
    monkeypatch.chdir(tmp_path)
    run("watch.py")
    events = EventAccumulator("watch/version_0", size_guidance={"images": 0}).Reload()
    assert sorted(events.Tags()["images"])[0] == "xattn_cards_of_test/test/1_modalities"
    shares = [
        events.Scalars(f"xattn_contribution/test/share/{sensor}")[-1].value for sensor in ("accelerometer", "gyroscope")
    ]
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert Path("watch/version_0/xattn_about/test/report.html").exists()
