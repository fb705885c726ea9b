"""The demo as a new user runs it, smaller: on simulated recordings, and on real ones."""

import re
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_xattn.cli import main
from lightning_xattn.hms import simulate

# A model of one epoch has heads that are uniform still, and is warned of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(uniform attention|attend alike):lightning_xattn.XAttnWarning")


def read_events(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


@pytest.mark.slow
def test_the_terminal_ends_with_the_scores_and_the_logs_hold_the_cards(tmp_path, capsys):
    """Of simulated recordings alone. That the model learns from them is in tests/hms/test_modalities.py."""
    assert main(["demo", "--samples", "60", "--epochs", "3", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert len(lines) + len(told.err.splitlines()) <= 40
    assert lines[0] == "Demo on simulated EEG recordings"
    assert lines[-1] == f"tensorboard --logdir {tmp_path / 'run_0'}"
    assert [re.sub(r" \d+ s$", "", line) for line in lines if line.startswith(("Simulating", "Computing the f"))] == [
        *("Simulating 48 recordings:", "Simulating 60 recordings:"),
        *("Computing the features of 60 recordings:", "Computing the features of 48 recordings:"),
    ]
    epochs = r"Training, epoch (\d) of 3 \(validation: accuracy 0\.\d\d, loss \d\.\d\d\): \d+ s"
    assert re.findall(epochs, told.out) == ["1", "2", "3"]
    table = [line for line in lines if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[:1] + table[2:5]] == [
        *("score", "confidence", "alignment", "entropy")
    ]
    assert all(re.search(r"\d\.\d\d \(\d\.\d\d to \d\.\d\d\)", line) for line in table[2:5])
    assert lines.index(table[0]) > len(lines) - 12, "the table has not scrolled away"
    logs = tmp_path / "run_0"
    assert "\n".join(table) in (logs / "truth/scores.md").read_text()
    events = read_events(logs / "train_on_simulated")
    for name in ("all", "correct", "incorrect"):
        assert len(events.Scalars(f"xattn_alignment/val/{name}")) == 3
    assert not events.Tags()["images"], "the test draws the same recordings"
    assert "xattn_cards_of_test/test/1_modalities" in read_events(logs / "truth").Tags()["images"]


@pytest.mark.slow
def test_recordings_are_small(tmp_path):
    """160 and 128 of them, as the demo simulates, and their features fit into 150 MB."""
    simulate(tmp_path / "simulated", 8, eeg_seconds=10)
    sizes = [path.stat().st_size for path in (tmp_path / "simulated").rglob("*.parquet")]
    assert sum(sizes) / 8 * 288 < 130e6


@pytest.mark.slow
def test_real_recordings_are_validated_and_tested_on(iiic_irr, tmp_path, capsys):
    assert main(["demo", "--data", str(iiic_irr), "--samples", "30", "--epochs", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Simulating 24 recordings" in printed
    assert "24 simulated recordings" in printed
    events = read_events(tmp_path / "run_0/train_on_simulated")
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
    assert "GPU available" not in ran.stderr
    assert "val: " in ran.stderr
    title, features, *_ = ran.stdout.splitlines()
    assert title == "Demo on your recordings"
    assert features.startswith("Computing the features of 20 recordings: ")
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
