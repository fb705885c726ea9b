"""``lightning-xattn explain`` of a model that is not ours."""

import json
import pickle
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import PurePosixPath

import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_xattn.cli import main
from lightning_xattn.core.errors import DataError
from lightning_xattn.explainer import load_checkpoint, training_data
from tests.messages import tells
from tests.toy import ToyModule, quiet_trainer, toy_data, toy_loader

MINE = """
import torch
from tests.explainer.test_command import Data
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    trainer = quiet_trainer()
    trainer.fit(ToyModule(), toy_loader(), toy_loader())
    path = tmp_path_factory.mktemp("trained") / "toy.ckpt"
    trainer.save_checkpoint(path)
    return path


@pytest.fixture
def mine(checkpoint, tmp_path, monkeypatch):
    """A folder with a module of the user's own and a checkpoint, to run the command in."""
    (tmp_path / "mine.py").write_text(MINE)
    shutil.copy(checkpoint, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_model_of_ones_own(mine, capsys):
    datamodule = "tests.explainer.test_command:Data"
    arguments = ["explain", "--checkpoint", "toy.ckpt", "--model", "mine:Logging", "--datamodule", datamodule]
    assert main([*arguments, "--out", "explained"]) == 0
    out = mine / "explained"
    assert (out / "report.md").read_text() in capsys.readouterr().out
    assert (out / "report.html").read_text().count('<details class="sample') == 30
    assert json.loads((out / "report.json").read_text())["layers"][0]["samples"] == 30
    module, (audio, text, target) = ToyModule.load_from_checkpoint("toy.ckpt"), toy_data(30, seed=3).tensors
    table = pd.read_parquet(out / "table/attention").sort_values("sample_idx")
    assert table["prediction"].tolist() == module(audio, text).argmax(1).tolist()
    assert table["target"].tolist() == target.tolist()
    assert list((out / "figures").glob("*.png"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--model": "mine:Absent"}, "import path such as 'package.module:Class'; got 'mine:Absent'"),
        ({"--model": "nowhere"}, "got 'nowhere'"),
        ({"--datamodule": "absent.module:Data"}, "got 'absent.module:Data'"),
        ({"--datamodule": "tests.explainer.test_command:Two"}, "has 2 test dataloaders; expected one"),
        (
            {"--datamodule": "tests.explainer.test_command:Asking"},
            "tests.explainer.test_command:Asking gives no test data: Asking.__init__()",
        ),
        ({"--datamodule": "mine"}, "got 'mine': there is no ':'"),
        ({"--checkpoint": "absent.ckpt"}, "absent.ckpt"),
        ({"--checkpoint": "mine.py"}, "mine.py is no checkpoint of Logging"),
        ({"--model": "mine:ready"}, "Expected the import path of a LightningModule class; mine:ready is"),
        (
            {"--checkpoint": "https://a.org/b.ckpt"},
            "https://a.org/b.ckpt cannot be read as a checkpoint",
        ),
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


# Checkpoints that hold code


class Marking:
    """What a pickle of it does when it is read: it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class OfOldLightning(ToyModule):
    """Lightning before 2.6 reads any pickle."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path, map_location=None):
        module = cls()
        module.load_state_dict(torch.load(checkpoint_path, map_location, weights_only=False)["state_dict"])
        return module


def save_crafted(path, checkpoint, how, marker):
    """A checkpoint that has code run when it is read as any pickle."""
    whole = torch.load(checkpoint, weights_only=True)
    if how == "pickle":
        path.write_bytes(pickle.dumps(Marking(marker), protocol=2))
    else:
        whole["hyper_parameters"] = {"crafted": Marking(marker)}
        torch.save(whole, path, _use_new_zipfile_serialization=how == "zip")


@pytest.mark.parametrize(
    ("kind", "how"), [(ToyModule, "zip"), (ToyModule, "legacy"), (ToyModule, "pickle"), (OfOldLightning, "zip")]
)
def test_code_in_a_checkpoint_is_not_run_unless_it_is_trusted(kind, how, mine):
    save_crafted(mine / "crafted.ckpt", "toy.ckpt", how, mine / "marker")
    with pytest.raises(DataError, match=tells("crafted.ckpt", "--trust-checkpoint", "runs code")) as refused:
        load_checkpoint(kind, "crafted.ckpt")
    assert not (mine / "marker").exists()
    assert not re.search("weights_only|safe_globals", str(refused.value))
    assert training_data("crafted.ckpt") is None
    assert not (mine / "marker").exists()
    loaded = load_checkpoint(kind, "toy.ckpt").state_dict()
    assert loaded.keys() == torch.load("toy.ckpt", weights_only=True)["state_dict"].keys()
    with warnings.catch_warnings(), suppress(DataError):  # what it makes is none of the model's hyperparameters
        warnings.simplefilter("ignore", ResourceWarning)
        load_checkpoint(kind, "crafted.ckpt", trust_checkpoint=True)
    assert (mine / "marker").exists()  # or nothing was crafted


@pytest.mark.parametrize(
    ("where", "form"), [("hyper_parameters", dict), ("hparams", list), ("module_arguments", tuple)]
)
def test_hyperparameters_that_name_code_are_not_called(mine, where, form):
    """Lightning makes a dict of pairs, too; before 2.6 it imports and calls any function."""
    whole = torch.load("toy.ckpt", weights_only=True)
    whole[where] = form({"_instantiator": "os.mkdir", "_class_path": "marker"}.items())
    torch.save(whole, "crafted.ckpt")
    with pytest.raises(DataError, match=tells("_instantiator", "--trust-checkpoint")) as refused:
        load_checkpoint(ToyModule, "crafted.ckpt")
    assert "_ALLOWED" not in str(refused.value)


def test_what_is_no_checkpoint_is_said_in_a_sentence(mine):
    torch.save({"weights": torch.zeros(2)}, "other.ckpt")
    with pytest.raises(DataError, match="other.ckpt is no checkpoint of Lightning's: expected .* 'state_dict'"):
        load_checkpoint(ToyModule, "other.ckpt")
    whole = torch.load("toy.ckpt", weights_only=True)
    whole["state_dict"].popitem()
    torch.save(whole, "less.ckpt")
    with pytest.raises(DataError, match="Error.* in loading state_dict for ToyModule: Missing key"):
        load_checkpoint(ToyModule, "less.ckpt")


def test_the_command_runs_no_code_of_a_checkpoint(mine, capsys):
    save_crafted(mine / "crafted.ckpt", "toy.ckpt", "zip", mine / "marker")
    arguments = ["explain", "--checkpoint", "crafted.ckpt", "--model", "mine:Logging", "--datamodule", "mine:ready"]
    assert main([*arguments, "--out", "o"]) == 1
    assert main(["explain", "--checkpoint", "crafted.ckpt", "--data", "x", "--out", "o"]) == 1
    said = capsys.readouterr().err
    assert said.count("objects of io.open") == 2
    assert len(said.splitlines()) == 2
    assert not {"marker", "o"} & {path.name for path in mine.iterdir()}


def test_a_checkpoint_of_objects_is_loaded_where_it_is_trusted(mine):
    whole = torch.load("toy.ckpt", weights_only=True)
    torch.save(whole | {"made_by": PurePosixPath("me")}, "objects.ckpt")
    with pytest.raises(DataError, match=tells("objects of", "pathlib.PurePosixPath")):
        load_checkpoint(ToyModule, "objects.ckpt")
    loaded = load_checkpoint(ToyModule, "objects.ckpt", trust_checkpoint=True)
    assert all(torch.equal(values, whole["state_dict"][name]) for name, values in loaded.state_dict().items())
