"""The demonstration: simulate, train the reference model with the callback attached, test, and say what came out."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture, create_explainability_report
from lightning_xattn.errors import SettingError
from lightning_xattn.explainer import save_dataset_figures
from lightning_xattn.files import complete_or_absent
from lightning_xattn.hms.datamodule import HMSDataModule
from lightning_xattn.hms.module import HMSLightningModule
from lightning_xattn.hms.montage import CLASSES
from lightning_xattn.hms.recordings import COMPETITION, Recordings
from lightning_xattn.hms.simulator import simulate
from lightning_xattn.hms.truth import describe_scores
from lightning_xattn.messages import describe_size
from lightning_xattn.report import fusion_text, summary_text
from lightning_xattn.report.facts import collect_facts
from lightning_xattn.report.rendering import Block, Section, as_markdown, as_text, blocks_as_text
from lightning_xattn.report.wording import dataset_document
from lightning_xattn.results import DatasetResult

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
    # Lightning 2.6 calls what torch 2.13 deprecates, at every evaluation; the user can do nothing about it.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
    # Loading from memory-mapped features takes a few milliseconds a batch: workers would not help.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
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
    summary = _describe_test("Validation", datamodule.test_recordings.root, "val", trainer, watch)
    trainer.test(module, datamodule=datamodule, verbose=False)
    summary += _describe_test("Test", datamodule.test_recordings.root, "test", trainer, watch)
    if held_out is not None:
        # A trainer and logs of its own, so that two data sets do not share the names of their curves.
        trainer, watch = _trainer(logs / "test_on_simulated", epochs)
        trainer.test(module, datamodule.source_test_dataloader(), verbose=False)
        summary += _describe_test("Test", datamodule.recordings.root, "test", trainer, watch)
    pictures = f"{logs}/*/csv/xattn_*"
    if train_on == "simulated":
        folder, root = logs / "disagreeing", _simulated(out, samples // 2, seconds, seed + 1, disagreeing=0.5)
        disagreeing = HMSDataModule(root, test_data=root, cache_dir=out / "features")
        opening, explained = _explain_disagreeing(module, disagreeing, folder)
        _write_report(opening, explained, folder)
        fusion = [] if explained.fusion is None else [fusion_text(explained.fusion, CLASSES, explained.group_by)]
        summary = [blocks_as_text(opening), "", *fusion, "", *summary]
        summary += [f"Report: {folder / 'report.txt'}, and to open in a browser: {folder / 'report.html'}"]
        pictures += f", {folder / 'figures'}"

    print("", *summary, f"Pictures: {pictures}", f"tensorboard --logdir {logs}", sep="\n")
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
        max_epochs=epochs, logger=loggers, callbacks=[watch], log_every_n_steps=1, default_root_dir=folder
    )
    return trainer, watch


def _describe_test(
    title: str, root: Path, stage: str, trainer: Trainer, watch: AttentionExplainabilityCallback
) -> list[str]:
    summary, metrics = watch.summaries[stage], trainer.callback_metrics
    fusion = watch.fusion_summaries.get(stage)
    ties = f" ({summary.ties} with a tied top vote, where the first class counts)" if summary.ties else ""
    return [
        f"{title} on {root}: {describe_size(summary.samples, summary.groups(), summary.group_noun)}{ties}",
        f"  accuracy {metrics[f'{stage}_acc']:.2f} (chance {1 / len(CLASSES):.2f}), "
        f"macro F1 {metrics[f'{stage}_f1']:.2f}, loss {metrics[f'{stage}_loss']:.2f}",
        *([] if fusion is None else [textwrap.indent(fusion_text(fusion, CLASSES, watch.settings.group_by), "  ")]),
        textwrap.indent(summary_text(summary, CLASSES, watch.settings.group_by), "  "),
        "",
    ]


def _explain_disagreeing(
    module: HMSLightningModule, datamodule: HMSDataModule, folder: Path
) -> tuple[list[Block], DatasetResult]:
    """Which number tells what on recordings whose truth is known, and what else is to be said of them."""
    samples = len(datamodule.test_recordings)
    explainer = ExplainabilityCapture(module, contribution_samples=samples, axes=datamodule.attention_axes)
    explained = explainer.explain_loader(datamodule.test_dataloader(), folder / "table", progress=False)
    save_dataset_figures(explained, folder / "figures")
    return list(describe_scores(folder / "table", datamodule.test_recordings)), explained


def _write_report(opening: Sequence[Block], explained: DatasetResult, folder: Path) -> None:
    facts = collect_facts(explained)
    assert facts["kind"] == "dataset"
    create_explainability_report(explained, folder / "report.html")
    document = dataset_document(facts)
    document = replace(document, sections=[Section("Which number tells what?", opening), *document.sections])
    for name, text in (("report.txt", as_text(document)), ("report.md", as_markdown(document))):
        with complete_or_absent(folder / name) as part:
            part.write_text(text, encoding="utf-8")
