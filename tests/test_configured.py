"""The callback as configuration files make it: LightningCLI and Hydra."""

import pytest
import yaml

from lightning_xattn import AttentionExplainabilityCallback
from tests.test_sinks import client
from tests.toy import ToyModule, toy_loader

SETTINGS = {
    "attention": {"audio_to_text": "audio_to_text_attn", "text_to_audio": "text_to_audio_attn"},
    "class_names": ["a", "b", "c", "d"],
    "group_by": "prediction",
    "predictions": None,
    "targets": "labels",
    "sample_ids": "ids",
    "groups": "patients",
    "query_mask": "mask",
    "fusion": "",
    "modalities": {"audio": 0, "text": ["text", "text_mask"]},
    "contribution_samples": 64,
    "max_samples": 100,
    "curves": "all",
    "every_n_epochs": 2,
    "figures_every_n_epochs": 3,
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


@pytest.mark.usefixtures("_no_arguments")
def test_lightning_cli(tmp_path):
    client("jsonargparse")
    from pytorch_lightning.cli import LightningCLI

    config = {
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [{"class_path": "lightning_xattn.AttentionExplainabilityCallback", "init_args": SETTINGS}],
        }
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = LightningCLI(
        ToyModule,
        run=False,
        args=["--config", str(tmp_path / "config.yaml")],
        save_config_callback=None,
        seed_everything_default=0,
    )
    (watch,) = (one for one in cli.trainer.callbacks if isinstance(one, AttentionExplainabilityCallback))
    same(watch)


@pytest.mark.usefixtures("_no_arguments")
def test_lightning_cli_without_settings_runs(tmp_path):
    client("jsonargparse")
    from pytorch_lightning.cli import LightningCLI

    arguments = ["--trainer.callbacks=lightning_xattn.AttentionExplainabilityCallback", "--trainer.logger=false"]
    arguments += ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(ToyModule, run=False, args=arguments, save_config_callback=None, seed_everything_default=0)
    cli.trainer.validate(cli.model, toy_loader(), verbose=False)
    assert "xattn_alignment/val/all" in cli.trainer.callback_metrics


def test_hydra():
    client("hydra")
    from hydra.utils import instantiate

    target = {"_target_": "lightning_xattn.AttentionExplainabilityCallback"}
    same(instantiate(target | SETTINGS, _convert_="all"))
    assert isinstance(instantiate(target), AttentionExplainabilityCallback)


def test_hydra_with_its_own_lists_and_dicts():
    client("hydra")
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    same(instantiate(OmegaConf.create({"_target_": "lightning_xattn.AttentionExplainabilityCallback"} | SETTINGS)))


@pytest.mark.parametrize("curves", ["some", "", None])
def test_curves_are_main_or_all(curves):
    with pytest.raises(ValueError, match="curves must be one of main, all; got"):
        AttentionExplainabilityCallback(curves=curves)
