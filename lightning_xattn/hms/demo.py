"""The demo: simulate, train the reference model with the callback attached, test it, and print a summary."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_xattn.callback import AttentionExplainabilityCallback
from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.files import complete_or_absent
from lightning_xattn.core.names import clean
from lightning_xattn.core.progress import report_time, timed
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.explainer import ExplainabilityCapture, training_data
from lightning_xattn.hms.datamodule import HMSDataModule
from lightning_xattn.hms.module import HMSLightningModule
from lightning_xattn.hms.montage import CLASSES
from lightning_xattn.hms.recordings import COMPETITION, Recordings
from lightning_xattn.hms.simulator import simulate
from lightning_xattn.hms.truth import describe_scores
from lightning_xattn.report import create_explainability_report, save_dataset_figures
from lightning_xattn.report.dataset import describe_dataset
from lightning_xattn.report.document import Document, Paragraph, Section, as_markdown, print_markdown

TRAIN_ON = ("simulated", "data")


def run_demo(
    out: str | Path,
    data: str | Path | None = None,
    train_on: str = "simulated",
    samples: int = 480,
    epochs: int = 10,
    seed: int = 0,
) -> Path:
    """Train and test the reference model with the callback attached, and print a summary.

    Parameters
    ----------
    out
        Folder for simulated recordings, features, logs and figures.
    data
        Folder of recordings. None: only simulated ones.
    train_on
        "simulated": train on simulated recordings; validate and test on all of ``data``, and test on held-out
        simulated patients too; then compare the scores on half as many other recordings, half of which are simulated
        to show another class in the spectrogram than in the EEG. "data": train, validate and test on patients of
        ``data``; nothing is simulated.
    samples, epochs
        Number of recordings to simulate, and of epochs to train.
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

    held_out: str | Path | None = None
    if train_on == "data":
        if data is None:
            raise SettingError("train_on='data' needs a folder of recordings; name it with data (--data DIR).")
        source = Path(data)
    else:
        seconds = int(COMPETITION.seconds if data is None else Recordings.read(data).infer_geometry().seconds)
        source, held_out = _simulate(out, samples, seconds, seed, disagreeing=0.2), data
    datamodule = HMSDataModule(source, test_data=held_out, cache_dir=out / "features", seed=seed)
    module = HMSLightningModule()
    # A folder of its own for each run: two runs in one would be drawn as one zigzag curve.
    logs = next(folder for i in count() if not (folder := out / f"run_{i}").exists())

    trainer, callback = _make_trainer(logs / f"train_on_{train_on}", epochs)
    trainer.fit(module, datamodule=datamodule)
    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
    trained_on = training_data(trainer.checkpoint_callback.best_model_path)
    sections = [_describe_test("Validation", datamodule.test_recordings, "val", trainer, callback)]
    _test(trainer, module, datamodule.test_dataloader(), datamodule.test_recordings)
    sections.append(_describe_test("Test", datamodule.test_recordings, "test", trainer, callback))
    if held_out is not None:
        # A trainer and logs of its own, so that two data sets do not share the names of their curves.
        trainer, callback = _make_trainer(logs / "test_on_simulated", epochs)
        _test(trainer, module, datamodule.source_test_dataloader(), datamodule.recordings)
        sections.append(_describe_test("Test", datamodule.recordings, "test", trainer, callback))
    written = {"Pictures": f"{logs}/*/csv/xattn_*"}
    if train_on == "simulated":
        folder, root = logs / "disagreeing", _simulate(out, samples // 2, seconds, seed + 1, disagreeing=0.5)
        disagreeing = HMSDataModule(root, test_data=root, cache_dir=out / "features")
        opening, explained = _explain_disagreeing(module, disagreeing, folder)
        explained = replace(explained, trained_on=trained_on)
        _write_report(opening, explained, folder)
        sections = [opening, *describe_dataset(explained).sections[:2], *sections]
        written["Pictures"] += f", {folder / 'figures'}"
        written |= {"Report": f"{folder}/report.md", "To open in a browser": f"{folder}/report.html"}

    print()
    print_markdown(as_markdown(Document("What the demo found", sections)))
    # Unwrapped, however long: to be copied.
    print("", *(clean(f"{what}: {where}") for what, where in written.items()), sep="\n")
    print(clean(f"tensorboard --logdir {logs}"))
    return logs


def _simulate(out: Path, samples: int, eeg_seconds: int, seed: int, disagreeing: float) -> Path:
    """Simulate recordings, unless an earlier demo with the same settings has."""
    folder = out / f"simulated_{samples}_of_{eeg_seconds}s_seed_{seed}_disagreeing_{disagreeing}"
    if folder.exists():
        return folder
    return simulate(folder, samples, eeg_seconds=eeg_seconds, seed=seed, disagreeing=disagreeing)


def _make_trainer(folder: Path, epochs: int) -> tuple[Trainer, AttentionExplainabilityCallback]:
    callback = AttentionExplainabilityCallback()
    # TensorBoard gets the figures as images; the CSV logger has no place for images, so it gets them as files.
    loggers = [
        TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False),
        CSVLogger(folder, name="", version="csv"),
    ]
    trainer = Trainer(
        max_epochs=epochs,
        logger=loggers,
        callbacks=[callback, _Epochs()],
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, callback


class _Epochs(Callback):
    """A line for each epoch of a fit."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy, loss = (float(trainer.callback_metrics[name]) for name in ("val_acc", "val_loss"))
        epoch = f"Training, epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        report_time(f"{epoch} (validation: accuracy {accuracy:.2f}, loss {loss:.2f})", self._started)


def _test(trainer: Trainer, module: LightningModule, loader: DataLoader[Any], recordings: Recordings) -> None:
    with timed(f"Testing on {recordings.root.name}"):
        trainer.test(module, loader, verbose=False)


def _describe_test(
    title: str, recordings: Recordings, stage: str, trainer: Trainer, callback: AttentionExplainabilityCallback
) -> Section:
    metrics, layer = trainer.callback_metrics, callback.summaries[stage]
    scores = Paragraph(
        f"Accuracy {metrics[f'{stage}_acc']:.2f} (chance {1 / len(CLASSES):.2f}), "
        f"macro F1 {metrics[f'{stage}_f1']:.2f}, loss {metrics[f'{stage}_loss']:.2f}."
    )
    classes_by, fusion = callback.settings.classes_by, callback.fusion_summaries.get(stage)
    result = DatasetResult({"": layer}, fusion, CLASSES, classes_by, {}, None)
    *sections, _ = describe_dataset(result).sections
    blocks = [block for section in sections for block in section.blocks]
    return Section(f"{title} on {recordings.root.name}", [scores, *blocks])


def _explain_disagreeing(
    module: HMSLightningModule, datamodule: HMSDataModule, folder: Path
) -> tuple[Section, DatasetResult]:
    """Explain recordings whose truth is known; with a section that compares the scores."""
    samples = len(datamodule.test_recordings)
    explainer = ExplainabilityCapture(module, contribution_samples=samples, axes=datamodule.attention_axes)
    explained = explainer.explain_loader(datamodule.test_dataloader(), folder / "table")
    blocks = list(describe_scores(folder / "table", datamodule.test_recordings))
    return Section("Which score answers which question?", blocks), explained


def _write_report(opening: Section, explained: DatasetResult, folder: Path) -> None:
    with timed("Drawing figures"):
        save_dataset_figures(explained, folder / "figures")
    with timed("Writing the report"):
        create_explainability_report(explained, folder / "report.html")
        document = describe_dataset(explained)
        document = replace(document, sections=[opening, *document.sections])
        with complete_or_absent(folder / "report.md") as part:
            part.write_text(as_markdown(document), encoding="utf-8")
