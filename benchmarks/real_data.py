"""Real data of two modalities, and a small model of each: ``python -m benchmarks.real_data``.

Digits (scikit-learn): the upper and the lower half of an image. Watch (seglearn): acceleration and rotation during
seven shoulder exercises, with subjects as groups. Vowels (aeon): the lower and the higher cepstral coefficients of a
spoken vowel, of nine speakers, padded to the longest.
"""

from __future__ import annotations

import logging
import subprocess
import tempfile
import venv
import warnings
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback

FOLDER = Path(tempfile.gettempdir()) / "lightning_xattn_real_data"
"""Where the arrays stay between runs."""

WINDOW = 100
"""Measurements of a window of the watch: 2 s at 50 Hz."""

PATCH = 10
"""Measurements of a token of the watch: 0.2 s."""

_SAVE = """
import sys
import numpy as np
from aeon.datasets import load_japanese_vowels
from seglearn.datasets import load_watch
from sklearn.datasets import load_digits

digits = load_digits()
np.savez(sys.argv[1] + "/digits.npz", images=digits.images, target=digits.target)
watch = load_watch()
lengths = [len(one) for one in watch["X"]]
np.savez(sys.argv[1] + "/watch.npz", signals=np.concatenate(watch["X"]), lengths=lengths,
         target=watch["y"], subject=watch["subject"])
(train, of_train), (test, of_test) = (load_japanese_vowels(split) for split in ("train", "test"))
every = [*train, *test]
np.savez(sys.argv[1] + "/vowels.npz", series=np.concatenate([one.T for one in every]),
         lengths=[one.shape[1] for one in every], target=np.array([*of_train, *of_test]).astype(int) - 1,
         train=len(train))
"""


@dataclass(frozen=True)
class RealData:
    """Samples of two modalities, for training and for testing.

    Attributes
    ----------
    names
        The modalities.
    classes
        Number of classes.
    train, test
        Batches ``(first, second, mask, target, group)``: tokens ``(batch, tokens, width)`` of each modality, a mask
        ``(batch, tokens)`` that is True for a real token of both, class ids, and the group of each sample.
    """

    names: tuple[str, str]
    classes: int
    train: TensorDataset
    test: TensorDataset


def fetch() -> Path:
    """Save the arrays of the three packages, which an environment of their own gets, and give the folder."""
    if not all((FOLDER / f"{name}.npz").exists() for name in LOADERS):
        with tempfile.TemporaryDirectory() as temporary:
            FOLDER.mkdir(exist_ok=True)
            venv.create(temporary, with_pip=True)
            python = str(Path(temporary) / "bin" / "python")
            install = [python, "-m", "pip", "install", "--quiet", "aeon", "seglearn", "scikit-learn"]
            subprocess.run(install, check=True)
            subprocess.run([python, "-W", "ignore", "-c", _SAVE, str(FOLDER)], check=True)
    return FOLDER


def _split(
    names: tuple[str, str],
    streams: tuple[Tensor, Tensor],
    mask: Tensor,
    target: Tensor,
    group: Tensor,
    is_test: Tensor,
) -> RealData:
    """Standardise each number by the training samples' mean and deviation, and split."""
    scaled = []
    for stream in streams:
        real = stream[~is_test][mask[~is_test]]
        scaled.append((stream - real.mean(0)) / real.std(0).clamp_min(1e-3) * mask[..., None])
    parts = [TensorDataset(*(one[rows] for one in (*scaled, mask, target, group))) for rows in (~is_test, is_test)]
    return RealData(names, int(target.max()) + 1, *parts)


def load_digits() -> RealData:
    """1,797 digits of 8 x 8 pixels: tokens are the eight columns of a half, of four pixels each. Each third tests."""
    with np.load(fetch() / "digits.npz") as saved:
        images, target = torch.tensor(saved["images"]).float(), torch.tensor(saved["target"]).long()
    upper, lower = images[:, :4].transpose(1, 2), images[:, 4:].transpose(1, 2)
    every = torch.arange(len(images))
    mask = torch.ones(upper.shape[:2], dtype=torch.bool)
    return _split(("upper", "lower"), (upper, lower), mask, target, every, every % 3 == 0)


def load_watch(by_set: bool = False) -> RealData:
    """Windows of 2 s of 140 sets of an exercise, in tokens of 0.2 s. Each third subject tests.

    The ten subjects are the groups, or ``by_set`` the sets: of the seven exercises, by each subject and with each arm.
    """
    with np.load(fetch() / "watch.npz") as saved:
        signals, target, subject = (torch.tensor(saved[name]) for name in ("signals", "target", "subject"))
        lengths = saved["lengths"].tolist()
    windows, rows = [], []
    for number, one in enumerate(signals.float().split(lengths)):
        parts = one[: len(one) // WINDOW * WINDOW].unflatten(0, (-1, WINDOW // PATCH, PATCH))
        windows.append(parts)
        rows += [number] * len(parts)
    tokens, of_set = torch.cat(windows), torch.tensor(rows)
    streams = tokens[..., :3].flatten(2), tokens[..., 3:].flatten(2)
    subjects = subject.long()[of_set]
    group = of_set if by_set else subjects
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    order = {one: i for i, one in enumerate(subjects.unique().tolist())}
    is_test = torch.tensor([order[subject] % 3 == 0 for subject in subjects.tolist()])
    return _split(("acceleration", "rotation"), streams, mask, target.long()[of_set], group, is_test)


def load_vowels() -> RealData:
    """640 utterances of 7 to 29 time steps, which are tokens; nine speakers are the classes. Split as published."""
    with np.load(fetch() / "vowels.npz") as saved:
        series, target = torch.tensor(saved["series"]).float(), torch.tensor(saved["target"]).long()
        lengths, train = saved["lengths"].tolist(), int(saved["train"])
    padded = nn.utils.rnn.pad_sequence(list(series.split(lengths)), batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    every = torch.arange(len(padded))
    return _split(("low", "high"), (padded[..., :6], padded[..., 6:]), mask, target, every, every >= train)


LOADERS = {"digits": load_digits, "watch": load_watch, "vowels": load_vowels}


class TwoStreams(LightningModule):
    """Two projections, cross-attention in both directions, means over tokens, and a linear head.

    Parameters
    ----------
    data
        Decides the widths and the number of classes.
    width, heads
        Of the attention.
    """

    def __init__(self, data: RealData, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        first, second = (one.shape[-1] for one in data.train.tensors[:2])
        self.first_encoder = nn.Sequential(nn.Linear(first, width), nn.ReLU(), nn.Linear(width, width))
        self.second_encoder = nn.Sequential(nn.Linear(second, width), nn.ReLU(), nn.Linear(width, width))
        self.first_to_second = nn.MultiheadAttention(width, heads, batch_first=True)
        self.second_to_first = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(2 * width, data.classes)

    def forward(self, first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
        """Class scores ``(batch, classes)``."""
        x, y = self.first_encoder(first), self.second_encoder(second)
        there, _ = self.first_to_second(x, y, y, key_padding_mask=~mask)
        back, _ = self.second_to_first(y, x, x, key_padding_mask=~mask)
        weights = mask[..., None] / mask.sum(1)[:, None, None]
        scores: Tensor = self.head(torch.cat([((x + there) * weights).sum(1), ((y + back) * weights).sum(1)], 1))
        return scores

    def _step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        first, second, mask, target, group = batch
        logits = self(first, second, mask)
        loss = F.cross_entropy(logits, target)
        return {"loss": loss, "logits": logits, "targets": target, "groups": group}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss."""
        return self._step(batch)["loss"]

    def test_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Scores, targets and groups."""
        return self._step(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), 2e-3)


def make_trainer(**settings: Any) -> Trainer:
    """A Trainer on the CPU that writes nothing."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**quiet, enable_checkpointing=False, accelerator="cpu", **settings)


def train(data: RealData, seed: int = 0, epochs: int = 15, width: int = 32) -> TwoStreams:
    """A trained model."""
    torch.manual_seed(seed)
    model = TwoStreams(data, width)
    loader = DataLoader(data.train, batch_size=64, shuffle=True)
    make_trainer(max_epochs=epochs).fit(model, loader)
    return model


def observe(data: RealData, model: TwoStreams, **settings: Any) -> dict[str, Any]:
    """What the callback finds in the test data: a record of its history."""
    first, second = data.names
    callback = AttentionExplainabilityCallback(
        attention={f"{first}_to_{second}": "first_to_second", f"{second}_to_{first}": "second_to_first"},
        modalities={first: "first_encoder", second: "second_encoder"},
        **{"figures_every_n_epochs": 0, "curves": "all", **settings},
    )
    make_trainer(callbacks=[callback]).test(model, DataLoader(data.test, batch_size=64), verbose=False)
    return callback.history[-1]


def main() -> None:
    """Train a model on each, and print what the callback finds in the test data."""
    # Lightning's advice to load with more workers: the data are in memory.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    for name in ("pytorch_lightning", "lightning_xattn"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name, load in LOADERS.items():
        data = load()
        record = observe(data, train(data))
        print(f"{name}: {len(data.train)} samples for training, {len(data.test)} for testing, {data.classes} classes")
        print(f"  accuracy of the model             {record['accuracy']:.3f}")
        for modality in data.names:
            probe, share = (record.get(f"{what}/{modality}", nan) for what in ("probe", "contribution/share"))
            print(f"  {modality:12} probe accuracy      {probe:.3f}")
            print(f"  {'':12} contribution share  {share:.3f}")


if __name__ == "__main__":
    main()
