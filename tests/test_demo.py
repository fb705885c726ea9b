"""The demo as a new user runs it, smaller: on simulated recordings, and on real ones."""

import re
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_xattn.cli import main

# A model of one epoch has heads that are uniform still, and is warned of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(uniform attention|attend alike):lightning_xattn.XAttnWarning")


PICTURES = 7
"""Of an evaluation of few samples."""


def read_events(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


@pytest.mark.slow
def test_the_logs_and_the_report_hold_what_was_promised(tmp_path, capsys):
    """Of simulated recordings alone. That the model learns from them is in tests/hms/test_modalities.py."""
    assert main(["demo", "--samples", "60", "--epochs", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    logs = tmp_path / "run_0/train_on_simulated"
    events = read_events(logs / "tensorboard")
    for name in ("all", "correct", "incorrect"):
        assert events.Scalars(f"xattn_alignment/val/{name}"), name
    assert len(events.Scalars("xattn_alignment/val/all")) == 2
    assert len(events.Images("xattn_map/val/by_class")) == 2
    assert len(events.Images("xattn_map/val/eeg_to_spec")) == 1
    # The first epoch, the second with the end of the fit, and the test; of 12 samples too few for a probe, and for
    # contributions.
    assert len(list((logs / "csv").rglob("xattn_*/**/*.png"))) == 2 + 2 * PICTURES

    assert re.search(
        r"\n## Validation on simulated_60_.*\n\nAccuracy 0.*\n\n- \*\*Samples:\*\* 12 samples of \d+ patients;",
        printed,
    )
    stages, _ = printed.split("\n\n# What the demo found\n")
    assert [re.sub(r" \d+ s$", "", line) for line in stages.splitlines() if "Training" not in line] == [
        *("Simulating 60 recordings:", "Computing the features of 60 recordings:"),
        "Testing on simulated_60_of_50s_seed_0_disagreeing_0.2:",
        *("Simulating 30 recordings:", "Computing the features of 30 recordings:", "Explaining the data set:"),
        *("Computing contributions and summaries:", "Drawing figures:", "Writing the report:"),
    ]
    epochs = r"Training, epoch (\d) of 2 \(validation: accuracy 0\.\d\d, loss \d\.\d\d\): \d+ s"
    assert re.findall(epochs, stages) == ["1", "2"]
    table = printed[printed.index("| score") :].splitlines()
    del table[1]  # the line under the header
    scores = ["confidence", "alignment", "entropy"]
    assert [line.split("|")[1].strip() for line in table[:4]] == ["score", *scores]
    assert all(re.search(r"\d\.\d\d \(\d\.\d\d to \d\.\d\d\)", line) for line in table[1:4])
    assert printed.index("| score") < printed.index("**Probe:**") < printed.index("## Validation on")
    disagreeing = tmp_path / "run_0/disagreeing"
    report = (disagreeing / "report.md").read_text()
    assert report.index("## Which score answers which question?") < report.index("## Key points")
    assert "\n".join(table[1:4]) in report
    assert "class_comparison.png" in {path.name for path in (disagreeing / "figures").iterdir()}
    assert printed.rstrip().splitlines()[-1] == f"tensorboard --logdir {tmp_path / 'run_0'}"


@pytest.mark.slow
def test_real_recordings_are_validated_and_tested_on(iiic_irr, tmp_path, capsys, monkeypatch):
    # What follows the tests is the same as of simulated recordings alone.
    monkeypatch.setattr("lightning_xattn.hms.demo._write_report", lambda *args: None)
    assert main(["demo", "--data", str(iiic_irr), "--samples", "30", "--epochs", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    real, *others = printed.split("\n## Test on simulated_30_of_10s_seed_0_disagreeing_0.2\n")
    assert re.search(r"\d+ samples of \d+ patients", others[0])
    for stage in ("Validation", "Test"):
        section = real.split(f"\n## {stage} on {iiic_irr.name}\n")[1]
        assert "20 samples of 20 patients" in section
        assert "12; the first" in section  # samples with a tied top vote
    events = read_events(tmp_path / "run_0/train_on_simulated/tensorboard")
    for stage in ("val", "test"):
        assert events.Scalars(f"xattn_alignment/{stage}/all")
        assert events.Images(f"xattn_map/{stage}/spec_to_eeg")
    assert "xattn_alignment/val/incorrect" in events.Tags()["scalars"]


@pytest.mark.slow
def test_training_on_data_alone_in_a_second_run_in_which_lightning_is_not_heard(iiic_irr, tmp_path):
    """In a process of its own: pytest has its own ways with logging and warnings."""
    (tmp_path / "run_0").mkdir()
    command = [sys.executable, "-m", "lightning_xattn.cli", "demo", "--data", str(iiic_irr), "--train-on", "data"]
    ran = subprocess.run(
        [*command, "--epochs", "1", "--out", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert ran.stderr == "" or all("XAttnWarning" in line for line in ran.stderr.splitlines()[::2])
    assert ran.stdout.splitlines()[0].startswith("Computing the features of 20 recordings: ")
    assert "\r" not in ran.stdout + ran.stderr
    assert "simulated" not in ran.stdout
    assert f"tensorboard --logdir {tmp_path / 'run_1'}" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-on", "data"], "train_on='data' needs a folder"),
        (["--data", "nowhere"], "nowhere"),
        (["--samples", "9"], "samples must be at least 30; got 9"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--epochs", "0"], "epochs must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_status(arguments, message, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error
