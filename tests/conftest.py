"""What every test may rely on, and what none may leave behind."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

IIIC_IRR = Path(__file__).parents[2] / "shared/data/iiic_irr"


@pytest.fixture(scope="session")
def iiic_irr() -> Path:
    """The folder of 20 real recordings; where it is absent its tests skip, in CI they fail."""
    if not IIIC_IRR.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI needs the real recordings at {IIIC_IRR}.")
        pytest.skip(f"No real recordings at {IIIC_IRR}.")
    return IIIC_IRR


@pytest.fixture(scope="session")
def hms_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of the reference model, trained on a few simulated recordings for an epoch."""
    import pytorch_lightning as pl

    from lightning_xattn.hms import HMSDataModule, HMSLightningModule, simulate

    folder = tmp_path_factory.mktemp("trained")
    datamodule = HMSDataModule(simulate(folder / "simulated", n_samples=30, eeg_seconds=10), cache_dir=folder / "cache")
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(HMSLightningModule(), datamodule=datamodule)
    trainer.save_checkpoint(folder / "hms.ckpt")
    return folder / "hms.ckpt"


@pytest.fixture(autouse=True)
def _same_weights_in_every_run():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    assert not dist.is_initialized(), "a process group was left behind"
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums(), "a figure was left with pyplot"
