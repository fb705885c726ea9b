"""The demo: simulate EEG recordings, train the reference model with the callback attached, and test it."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_xattn.callback import AttentionExplainabilityCallback
from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.files import complete_or_absent
from lightning_xattn.core.names import clean
from lightning_xattn.core.progress import report_time
from lightning_xattn.hms.datamodule import HMSDataModule
from lightning_xattn.hms.module import HMSLightningModule
from lightning_xattn.hms.recordings import Recordings
from lightning_xattn.hms.simulator import simulate
from lightning_xattn.hms.truth import describe_scores
from lightning_xattn.report.document import Document, Section, as_markdown, print_markdown

TITLE = "Demo on simulated EEG recordings"

TRAIN_ON = ("simulated", "data")

EEG_SECONDS = 10
"""Length of the simulated EEGs, unless the data's are longer."""

BATCH_SIZE = 16

VALIDATIONS = 3
"""So often a fit is validated at most; most of the time would go there."""


def run_demo(
    out: str | Path,
    data: str | Path | None = None,
    train_on: str = "simulated",
    samples: int = 160,
    epochs: int = 12,
    seed: int = 0,
) -> Path:
    """Train and test the reference model with the callback attached, and print what it found.

    Parameters
    ----------
    out
        Folder for simulated recordings, features, logs and figures. A second run reuses its recordings and features.
    data
        Folder of recordings. None: only simulated ones.
    train_on
        "simulated": train on simulated recordings, and test on four fifths as many others, half of which show another
        class in the spectrogram than in the EEG; then compare the scores with this truth. Validation takes ``data``,
        which is tested on too, or where there is none, the recordings of the test: nothing is chosen by them.
        "data": train, validate and test on patients of ``data``; nothing is simulated.
    samples, epochs
        Number of recordings to simulate for training, and of epochs to train.
    seed
        Of the simulation, the folds and the weights.

    Returns the folder to give to ``tensorboard --logdir``. Raises ``SettingError`` or ``DataError`` if a number is out
    of range, or ``data`` is missing or no folder of recordings.
    """
    if train_on not in TRAIN_ON:
        raise SettingError(f"train_on must be one of {', '.join(TRAIN_ON)}; got {train_on!r}.")
    for name, number, least in (("epochs", epochs, 1), ("samples", samples, 30), ("seed", seed, 0)):
        if number < least:
            raise SettingError(f"{name} must be at least {least}; got {number}.")
    out = Path(out)
    seed_everything(seed, verbose=False)
    print(TITLE if train_on == "simulated" else "Demo on your recordings")

    seconds = EEG_SECONDS
    if train_on == "data":
        if data is None:
            raise SettingError("train_on='data' needs a folder of recordings; name it with data (--data DIR).")
        datamodule = HMSDataModule(data, cache_dir=out / "features", seed=seed)
    else:
        if data is not None:
            seconds = int(Recordings.read(data).infer_geometry().seconds)
        truth = _simulate(out, samples * 4 // 5, seconds, seed + 1, disagreeing=0.5)
        datamodule = HMSDataModule(
            _simulate(out, samples, seconds, seed, disagreeing=0.2),
            test_data=truth if data is None else data,
            batch_size=BATCH_SIZE,
            n_folds=10,
            cache_dir=out / "features",
            seed=seed,
        )
    module = HMSLightningModule()
    # A folder of its own for each run: two runs in one would be drawn as one zigzag curve.
    logs = next(folder for i in count() if not (folder := out / f"run_{i}").exists())

    # Where the test takes the same recordings, it alone draws them: that saves a third of the time.
    is_drawn = int(data is not None)
    callback = AttentionExplainabilityCallback(figures_every_n_epochs=is_drawn, faithfulness_every_n_epochs=is_drawn)
    trainer = _make_trainer(logs / f"train_on_{train_on}", callback, epochs)
    trainer.fit(module, datamodule=datamodule)
    if data is not None:
        trainer.test(module, datamodule=datamodule, verbose=False)
    if train_on == "simulated":
        _compare_scores(module, HMSDataModule(truth, test_data=truth, cache_dir=out / "features"), logs / "truth")
    print(clean(f"tensorboard --logdir {logs}"))
    return logs


def _simulate(out: Path, samples: int, eeg_seconds: int, seed: int, disagreeing: float) -> Path:
    """Simulate recordings, unless an earlier demo with the same settings has."""
    folder = out / f"simulated_{samples}_of_{eeg_seconds}s_seed_{seed}_disagreeing_{disagreeing}"
    if folder.exists():
        return folder
    return simulate(folder, samples, eeg_seconds=eeg_seconds, seed=seed, disagreeing=disagreeing)


def _make_trainer(folder: Path, callback: AttentionExplainabilityCallback, epochs: int) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=-(-epochs // VALIDATIONS),
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        callbacks=[callback, _Epochs()],
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class _Epochs(Callback):
    """A line for each validated epoch of a fit."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1):
            return
        accuracy, loss = (float(trainer.callback_metrics[name]) for name in ("val_acc", "val_loss"))
        epoch = f"Training, epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        report_time(f"{epoch} (validation: accuracy {accuracy:.2f}, loss {loss:.2f})", self._started)
        self._started = time.monotonic()


def _compare_scores(module: HMSLightningModule, datamodule: HMSDataModule, folder: Path) -> None:
    """Test on recordings whose truth is known, and print how well each score finds it."""
    recordings = datamodule.test_recordings
    callback = AttentionExplainabilityCallback(contribution_samples=len(recordings), table=folder / "table")
    _make_trainer(folder, callback, 1).test(module, datamodule=datamodule, verbose=False)
    scores = Section("Which score answers which question?", [*describe_scores(folder / "table", recordings)])
    text = as_markdown(Document(TITLE, [scores]))
    with complete_or_absent(folder / "scores.md") as part:
        part.write_text(text, encoding="utf-8")
    print()
    print_markdown(text)
