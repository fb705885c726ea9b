"""What every test may rely on, and what none may leave behind."""

import logging
import os
import sys
from pathlib import Path

# Before torch is imported, and for the processes that tests start: as many test processes run as there are cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock

IIIC_IRR = Path(__file__).parents[2] / "shared/data/iiic_irr"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests: at the end one of them would keep a single process busy."""
    items.sort(key=lambda item: item.path.name not in ("test_demo.py", "test_modalities.py"))


@pytest.fixture(scope="session")
def iiic_irr() -> Path:
    """The folder of 20 real recordings, which is not in the repository."""
    return require_recordings(IIIC_IRR)


def require_recordings(folder: Path) -> Path:
    """Where they are absent their tests skip, as on any machine; in `.ci/run`, which has them, they fail."""
    if not folder.is_dir():
        if "XATTN_CI" in os.environ:
            pytest.fail(f".ci/run needs the real recordings at {folder}.")
        pytest.skip(f"No real recordings at {folder}.")
    return folder


@pytest.fixture(scope="session")
def hms_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of the reference model after an epoch on simulated recordings; one for all processes."""
    root = tmp_path_factory.getbasetemp()
    # The parent of each process's folder is that of the whole run.
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "trained"
    checkpoint = folder / "hms.ckpt"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not checkpoint.exists():
            _train(folder, checkpoint)
    return checkpoint


def _train(folder: Path, checkpoint: Path) -> None:
    from lightning_xattn.hms import HMSDataModule, HMSLightningModule, simulate
    from tests.toy import quiet_trainer

    datamodule = HMSDataModule(simulate(folder / "simulated", n_samples=30, eeg_seconds=10), cache_dir=folder / "cache")
    trainer = quiet_trainer(limit_val_batches=0)
    torch.manual_seed(0)  # whichever test needs it first
    trainer.fit(HMSLightningModule(), datamodule=datamodule)
    trainer.save_checkpoint(checkpoint)


@pytest.fixture
def infos(monkeypatch, caplog) -> pytest.LogCaptureFixture:
    """What is told. Its logger keeps it where nobody has set up logging."""
    monkeypatch.setattr(logging.getLogger("lightning_xattn"), "propagate", True)
    return caplog


@pytest.fixture(autouse=True)
def _no_notices_given():
    # Imported here, when pytest has set up logging, in which the package then joins.
    from lightning_xattn.core import notices

    notices._running.clear()  # of a run that another test did not end
    notices.begin_run()


@pytest.fixture(autouse=True)
def _same_weights_in_every_run():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    assert not dist.is_initialized(), "a process group was left behind"
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums(), "a figure was left with pyplot"
