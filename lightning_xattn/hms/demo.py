"""The demonstration: simulate, train the reference model with the callback attached, test, and say what came out."""

from __future__ import annotations

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
from lightning_xattn.core.progress import Stage
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
    """Train and test the reference model on recordings in the HMS layout, watched by the callback, and print a summary.

    Parameters
    ----------
    out
        Folder for everything that is written: simulated recordings, features, logs, figures.
    data
        Folder of recordings. None: only simulated ones.
    train_on
        "simulated": train on simulated recordings, validate and test on all of ``data``, and test on held-out
        simulated patients too; then say which number tells what on half as many other recordings, of which every other
        one is simulated to show another class in the spectrogram than in the EEG. "data": train, validate and test on
        patients of ``data``; nothing is simulated.
    samples
        How many recordings to simulate.
    epochs
        How long to train.
    seed
        Of the simulation, the folds and the weights.

    Returns
    -------
    Path
        The folder to give to ``tensorboard --logdir``.

    Raises
    ------
    SettingError
        If ``train_on`` is not one of ``TRAIN_ON``, or is "data" without any, or a number is out of range.
    DataError
        If ``data`` does not hold what it should.
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
        source, held_out = _simulated(out, samples, seconds, seed, disagreeing=0.2), data
    datamodule = HMSDataModule(source, test_data=held_out, cache_dir=out / "features", seed=seed)
    module = HMSLightningModule()
    # A folder of its own for each run: two runs in one would be drawn as one zigzag curve.
    logs = next(folder for i in count() if not (folder := out / f"run_{i}").exists())

    trainer, watch = _trainer(logs / f"train_on_{train_on}", epochs)
    trainer.fit(module, datamodule=datamodule)
    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
    trained_on = training_data(trainer.checkpoint_callback.best_model_path)
    sections = [_describe_test("Validation", datamodule.test_recordings, "val", trainer, watch)]
    _test(trainer, module, datamodule.test_dataloader(), datamodule.test_recordings)
    sections.append(_describe_test("Test", datamodule.test_recordings, "test", trainer, watch))
    if held_out is not None:
        # A trainer and logs of its own, so that two data sets do not share the names of their curves.
        trainer, watch = _trainer(logs / "test_on_simulated", epochs)
        _test(trainer, module, datamodule.source_test_dataloader(), datamodule.recordings)
        sections.append(_describe_test("Test", datamodule.recordings, "test", trainer, watch))
    written = {"Pictures": f"{logs}/*/csv/xattn_*"}
    if train_on == "simulated":
        folder, root = logs / "disagreeing", _simulated(out, samples // 2, seconds, seed + 1, disagreeing=0.5)
        disagreeing = HMSDataModule(root, test_data=root, cache_dir=out / "features")
        opening, explained = _explain_disagreeing(module, disagreeing, folder)
        explained = replace(explained, trained_on=trained_on)
        _write_report(opening, explained, folder)
        sections = [opening, *describe_dataset(explained).sections[:2], *sections]
        written["Pictures"] += f", {folder / 'figures'}"
        written |= {"Report": f"{folder}/report.md", "To open in a browser": f"{folder}/report.html"}

    print()
    print_markdown(as_markdown(Document("What the demo found", sections)))
    # As they are, however long: to be copied.
    where_it_is = [f"{what}: {where}" for what, where in written.items()]
    print("", *map(clean, [*where_it_is, f"tensorboard --logdir {logs}"]), sep="\n")
    return logs


def _simulated(out: Path, samples: int, eeg_seconds: int, seed: int, disagreeing: float) -> Path:
    """Simulated recordings; those of an earlier demo with the same settings are taken again."""
    folder = out / f"simulated_{samples}_of_{eeg_seconds}s_seed_{seed}_disagreeing_{disagreeing}"
    if folder.exists():
        return folder
    return simulate(folder, samples, eeg_seconds=eeg_seconds, seed=seed, disagreeing=disagreeing)


def _trainer(folder: Path, epochs: int) -> tuple[Trainer, AttentionExplainabilityCallback]:
    watch = AttentionExplainabilityCallback()
    # TensorBoard gets the figures as images; the CSV logger has no place for images, so it gets them as files.
    loggers = [
        TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False),
        CSVLogger(folder, name="", version="csv"),
    ]
    trainer = Trainer(
        max_epochs=epochs,
        logger=loggers,
        callbacks=[watch, _Epochs()],
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer, watch


class _Epochs(Callback):
    """A line for each epoch of a fit."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        title = f"Training, epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        self._stage = Stage(title, int(trainer.num_training_batches))
        self._stage.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self._stage.advance()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy, loss = (float(trainer.callback_metrics[name]) for name in ("val_acc", "val_loss"))
        self._stage.title += f" (validation: accuracy {accuracy:.2f}, loss {loss:.2f})"
        self._stage.__exit__(None, None, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_stage"):
            self._stage.__exit__(type(exception), exception, None)


def _test(trainer: Trainer, module: LightningModule, loader: DataLoader[Any], recordings: Recordings) -> None:
    with Stage(f"Testing on {recordings.root.name}"):
        trainer.test(module, loader, verbose=False)


def _describe_test(
    title: str, recordings: Recordings, stage: str, trainer: Trainer, watch: AttentionExplainabilityCallback
) -> Section:
    metrics, layer = trainer.callback_metrics, watch.summaries[stage]
    scores = Paragraph(
        f"Accuracy {metrics[f'{stage}_acc']:.2f} (chance {1 / len(CLASSES):.2f}), "
        f"macro F1 {metrics[f'{stage}_f1']:.2f}, loss {metrics[f'{stage}_loss']:.2f}."
    )
    classes_by, fusion = watch.settings.classes_by, watch.fusion_summaries.get(stage)
    result = DatasetResult({"": layer}, fusion, CLASSES, classes_by, {}, None)
    *sections, _ = describe_dataset(result).sections
    blocks = [block for section in sections for block in section.blocks]
    return Section(f"{title} on {recordings.root.name}", [scores, *blocks])


def _explain_disagreeing(
    module: HMSLightningModule, datamodule: HMSDataModule, folder: Path
) -> tuple[Section, DatasetResult]:
    """Which number tells what on recordings whose truth is known, and what else is to be said of them."""
    samples = len(datamodule.test_recordings)
    explainer = ExplainabilityCapture(module, contribution_samples=samples, axes=datamodule.attention_axes)
    explained = explainer.explain_loader(datamodule.test_dataloader(), folder / "table")
    blocks = list(describe_scores(folder / "table", datamodule.test_recordings))
    return Section("Which number tells what?", blocks), explained


def _write_report(opening: Section, explained: DatasetResult, folder: Path) -> None:
    with Stage("Drawing figures"):
        save_dataset_figures(explained, folder / "figures")
    with Stage("Writing the report"):
        create_explainability_report(explained, folder / "report.html")
        document = describe_dataset(explained)
        document = replace(document, sections=[opening, *document.sections])
        with complete_or_absent(folder / "report.md") as part:
            part.write_text(as_markdown(document), encoding="utf-8")
