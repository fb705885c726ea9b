"""The demonstration: simulate, train the reference model with the callback attached, test, and say what came out."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_xattn import AttentionExplainabilityCallback, AttentionRecorder
from lightning_xattn.columns import STATISTICS, Column, sample_statistics
from lightning_xattn.errors import SettingError
from lightning_xattn.functional import grouped_separation, prepare_rows, score_bins
from lightning_xattn.hms.datamodule import HMSBatch, HMSDataModule
from lightning_xattn.hms.module import HMSLightningModule
from lightning_xattn.hms.montage import CLASSES
from lightning_xattn.hms.recordings import COMPETITION, Recordings
from lightning_xattn.hms.simulator import simulate
from lightning_xattn.messages import describe_size
from lightning_xattn.report import fusion_text, summary_text

TRAIN_ON = ("simulated", "data")


def run_demo(
    out: str | Path,
    data: str | Path | None = None,
    train_on: str = "simulated",
    samples: int = 240,
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
        simulated patients too. "data": train, validate and test on patients of ``data``; nothing is simulated.
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
        seconds = COMPETITION.seconds if data is None else Recordings.read(data).infer_geometry().seconds
        source, held_out = _simulated(out, samples, int(seconds), seed), data
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
    if train_on == "simulated":
        loaders = (datamodule.source_val_dataloader(), datamodule.source_test_dataloader())
        summary += _describe_agreement(module, loaders, datamodule.recordings)

    print("", *summary, "", f"Pictures: {logs}/*/csv/xattn_*", f"tensorboard --logdir {logs}", sep="\n")
    return logs


def _simulated(out: Path, samples: int, eeg_seconds: int, seed: int) -> Path:
    """Simulated recordings; those of an earlier demo with the same settings are taken again."""
    folder = out / f"simulated_{samples}_of_{eeg_seconds}s_seed_{seed}"
    return folder if folder.exists() else simulate(folder, samples, eeg_seconds=eeg_seconds, seed=seed)


def _trainer(folder: Path, epochs: int) -> tuple[Trainer, AttentionExplainabilityCallback]:
    watch = AttentionExplainabilityCallback()
    # TensorBoard gets the figures as images; the CSV logger has no place for images, so it gets them as files.
    loggers = [TensorBoardLogger(folder, name="", version="tensorboard"), CSVLogger(folder, name="", version="csv")]
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


def _describe_agreement(
    module: HMSLightningModule, loaders: Sequence[DataLoader[HMSBatch]], recordings: Recordings
) -> list[str]:
    """Does alignment see that a simulated sample's modalities show different classes?"""
    numbers: dict[Column, list[Tensor]] = {Column("alignment"): [], Column("interaction"): []}
    agrees, patients = [], []
    module.eval()
    with torch.no_grad(), AttentionRecorder(module) as recorder:
        for batch in (batch for loader in loaders for batch in loader):
            recorder.clear()
            module.predict_step(move_data_to_device(batch, module.device), 0)
            (pair,) = recorder.attention
            statistics = sample_statistics(*(prepare_rows(attention) for attention in pair.directions))
            for column, values in numbers.items():
                values.append(statistics[column].cpu())
            agrees += [recordings.by_label_id[label].extra["agrees"] for label in batch["sample_ids"].tolist()]
            patients.append(batch["patient_ids"])

    chosen, groups = torch.tensor(agrees), torch.cat(patients)
    lines = [
        f"Simulated samples not trained on, whose modalities agree (n = {int(chosen.sum())}) or show different classes "
        f"(n = {int((~chosen).sum())}), of {len(groups.unique())} patients:"
    ]
    for column, parts in numbers.items():
        scores = torch.cat(parts)
        defined = scores.isfinite()
        outcomes = torch.stack([chosen, ~chosen], dim=1)
        apart = grouped_separation(
            score_bins(scores[defined], *STATISTICS[column.statistic].range), groups[defined], outcomes[defined]
        )
        claim = (
            f"AUROC {apart.auroc:.2f}, 95 % interval by patients {apart.low:.2f} to {apart.high:.2f} (0.5: it does not "
            "see the difference)"
        )
        lines.append(
            f"  {column}: mean {scores[chosen].nanmean():.3f} against {scores[~chosen].nanmean():.3f}, "
            + (claim if math.isfinite(apart.auroc) else "too few to say whether it sees the difference")
        )
    return lines
