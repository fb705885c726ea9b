"""The callback as configuration files make it: LightningCLI and Hydra."""

import subprocess
import sys

import pytest
import yaml

from lightning_xattn import AttentionExplainabilityCallback, JointSequence
from tests.loggers.test_loggers import client
from tests.toy import ToyModule, toy_loader

SETTINGS = {
    "attention": {"audio_to_text": "audio_to_text_attn", "text_to_audio": "text_to_audio_attn"},
    "class_names": ["a", "b", "c", "d"],
    "classes_by": "prediction",
    "predictions": None,
    "targets": "labels",
    "sample_ids": "ids",
    "groups": "patients",
    "query_mask": "mask",
    "present": {"audio": "has_audio"},
    "fusion": "",
    "modalities": {"audio": 0, "text": ["text", "text_mask"]},
    "contribution_samples": 64,
    "max_samples": 100,
    "curves": "all",
    "every_n_epochs": 2,
    "figures_every_n_epochs": 3,
    "figures": "all",
    "faithfulness_every_n_epochs": 0,
    "every_n_batches": 4,
    "table": "folder",
}


def same(watch):
    """Whether it has all of them."""
    plain = AttentionExplainabilityCallback(**SETTINGS)
    assert watch.settings == plain.settings
    assert watch.schedule == plain.schedule
    assert watch.curves == plain.curves


def test_every_setting_is_tried():
    import inspect

    assert set(SETTINGS) == set(inspect.signature(AttentionExplainabilityCallback).parameters)


@pytest.fixture
def _no_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["fit.py"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls it in an old way


NAMESPACES = pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
"""Each of Lightning's has a ``Callback`` of its own, and command line and Trainer that take no other."""

WATCH = "lightning_xattn.AttentionExplainabilityCallback"


def configured(namespace, arguments):
    """What the command line of a namespace makes, of a module of its own kind."""
    client("jsonargparse")
    cli = pytest.importorskip(f"{namespace}.cli")
    kind = cli.LightningModule

    class Module(kind):
        def __init__(self):
            super().__init__()
            self.toy = ToyModule()

        def forward(self, audio, text):
            return self.toy(audio, text)

        def validation_step(self, batch, batch_idx):
            return {"logits": self(*batch[:2])}

    return cli.LightningCLI(Module, run=False, args=arguments, save_config_callback=None, seed_everything_default=0)


def written(tmp_path, **settings):
    """A configuration with the callback in a file."""
    config = {"trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}}
    config["trainer"]["callbacks"] = [{"class_path": WATCH, "init_args": settings}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(tmp_path / "config.yaml")]


def watch_in(trainer):
    (watch,) = (one for one in trainer.callbacks if isinstance(one, AttentionExplainabilityCallback))
    return watch


@pytest.mark.usefixtures("_no_arguments")
@NAMESPACES
def test_lightning_cli(namespace, tmp_path):
    cli = configured(namespace, written(tmp_path, **SETTINGS))
    same(watch_in(cli.trainer))
    # What is dumped, as --print_config does, has all of them and makes the same again.
    dumped = cli.parser.dump(cli.config)
    (callback,) = yaml.safe_load(dumped)["trainer"]["callbacks"]
    assert callback["class_path"] == WATCH
    assert {name: callback["init_args"].get(name) for name in SETTINGS} == SETTINGS
    (tmp_path / "again.yaml").write_text(dumped)
    same(watch_in(configured(namespace, ["--config", str(tmp_path / "again.yaml")]).trainer))


@pytest.mark.usefixtures("_no_arguments")
@NAMESPACES
def test_lightning_cli_without_settings_runs(namespace, tmp_path):
    arguments = [f"--trainer.callbacks={WATCH}", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    cli = configured(namespace, [*arguments, f"--trainer.default_root_dir={tmp_path}"])
    cli.trainer.validate(cli.model, toy_loader(), verbose=False)
    assert "xattn_alignment/val/all" in cli.trainer.callback_metrics


@pytest.mark.usefixtures("_no_arguments")
@NAMESPACES
def test_a_joint_sequence_in_a_configuration(namespace, tmp_path):
    spans = {"audio": [0, 5], "text": [5, None]}
    attention = {"class_path": "lightning_xattn.JointSequence", "init_args": {"attention": "joint", "spans": spans}}
    watch = watch_in(configured(namespace, written(tmp_path, attention=attention)).trainer)
    assert isinstance(watch.settings.attention, JointSequence)
    assert watch.settings.attention.slices(None) == {"audio": slice(0, 5), "text": slice(5, None)}


@pytest.mark.usefixtures("_no_arguments")
@NAMESPACES
@pytest.mark.parametrize("settings", [{"contribution_samples": 1}, {"table": ""}])
def test_a_wrong_setting_in_a_configuration_is_reported(namespace, settings, tmp_path, capsys):
    (name,) = settings
    with pytest.raises((SystemExit, ValueError)) as ended:
        configured(namespace, written(tmp_path, **settings))
    assert f"{name} must be" in capsys.readouterr().err + str(ended.value)


@pytest.mark.parametrize(("namespace", "own_kinds"), [("pytorch_lightning", True), ("lightning.pytorch", False)])
def test_hydra(namespace, own_kinds, tmp_path):
    """Also with lists and dicts of Hydra's own kinds."""
    client("hydra")
    pytest.importorskip(namespace)
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = {"_target_": f"{namespace}.Trainer", "accelerator": "cpu", "default_root_dir": str(tmp_path)} | quiet
    trainer["callbacks"] = [{"_target_": WATCH} | SETTINGS]
    same(watch_in(instantiate(OmegaConf.create(trainer)) if own_kinds else instantiate(trainer, _convert_="all")))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["lightning_xattn", "lightning.pytorch"])
def test_a_namespace_that_is_imported_later_takes_it_and_none_is_imported_for_it(first):
    pytest.importorskip("lightning.pytorch")
    code = f"""
import importlib, pickle, sys
importlib.import_module("{first}")
import lightning_xattn
assert ("lightning.pytorch" in sys.modules) == ("{first}" == "lightning.pytorch")
early = lightning_xattn.AttentionExplainabilityCallback
class Mine(early):
    pass
import lightning.pytorch, pytorch_lightning
for kind in (lightning_xattn.AttentionExplainabilityCallback, early, Mine):
    assert issubclass(kind, (lightning.pytorch.Callback)) and issubclass(kind, pytorch_lightning.Callback)
    for namespace in (lightning.pytorch, pytorch_lightning):
        watch = pickle.loads(pickle.dumps(kind(curves="all")))
        assert isinstance(watch, namespace.Callback)
        trainer = namespace.Trainer(accelerator="cpu", callbacks=watch, logger=False)
        assert watch in trainer.callbacks
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
