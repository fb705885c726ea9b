"""``lightning-xattn explain`` of a model that is not ours."""

import json

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_xattn.cli import main
from tests.toy import ToyModule, quiet_trainer, toy_data, toy_loader

MINE = """
import torch
from tests.test_commands import Data
from tests.toy import ToyModule

class Logging(ToyModule):
    def test_step(self, batch, batch_idx):
        logits = self(*batch[:2])
        self.log("test_loss", torch.nn.functional.cross_entropy(logits, batch[2]))
        return {"logits": logits, "targets": batch[2]}

ready = Data()
"""


class Data(pl.LightningDataModule):
    """Its test data are made when it is set up."""

    def setup(self, stage):
        self.tested = toy_data(30, seed=3)

    def test_dataloader(self):
        return DataLoader(self.tested, 8)


class Two(Data):
    def test_dataloader(self):
        return [super().test_dataloader()] * 2


class Asking(Data):
    def __init__(self, folder):
        super().__init__()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a module of the user's own and a checkpoint, to run the command in."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    trainer = quiet_trainer()
    trainer.fit(ToyModule(), toy_loader(), toy_loader())
    trainer.save_checkpoint("toy.ckpt")
    return tmp_path


@pytest.mark.parametrize("datamodule", ["tests.test_commands:Data", "mine:ready"])
def test_a_model_of_ones_own(mine, datamodule, capsys):
    arguments = ["explain", "--checkpoint", "toy.ckpt", "--model", "mine:Logging", "--datamodule", datamodule]
    assert main([*arguments, "--out", "explained"]) == 0
    out = mine / "explained"
    assert (out / "report.txt").read_text() in capsys.readouterr().out
    assert (out / "report.html").read_text().count('<details class="sample') == 30
    assert json.loads((out / "report.json").read_text())["layers"][0]["samples"] == 30
    module, (audio, text, target) = ToyModule.load_from_checkpoint("toy.ckpt"), toy_data(30, seed=3).tensors
    table = pd.read_parquet(out / "table").sort_values("sample_idx")
    assert table["prediction"].tolist() == module(audio, text).argmax(1).tolist()
    assert table["target"].tolist() == target.tolist()
    assert list((out / "figures").glob("*.png"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--model": "mine:Absent"}, "import path such as 'package.module:Class'; got 'mine:Absent'"),
        ({"--model": "nowhere"}, "got 'nowhere'"),
        ({"--datamodule": "absent.module:Data"}, "got 'absent.module:Data'"),
        ({"--datamodule": "tests.test_commands:Two"}, "has 2 test dataloaders, and one can be explained"),
        (
            {"--datamodule": "tests.test_commands:Asking"},
            "tests.test_commands:Asking gives no test data: Asking.__init__()",
        ),
        ({"--datamodule": "mine"}, "got 'mine': there is no ':'"),
        ({"--checkpoint": "absent.ckpt"}, "absent.ckpt"),
        ({"--checkpoint": "mine.py"}, "mine.py is no checkpoint of mine:Logging"),
        ({"--data": "folder"}, "explain takes --model and --datamodule of your own model, or --data"),
    ],
)
def test_bad_input_is_one_line(mine, changed, message, capsys):
    given = {
        "--checkpoint": "toy.ckpt",
        "--model": "mine:Logging",
        "--datamodule": "mine:ready",
        "--out": "o",
    } | changed
    assert main(["explain", *(part for pair in given.items() for part in pair)]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (mine / "o").exists()
