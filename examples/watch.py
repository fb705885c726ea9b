"""Real data: which exercise is it, by the accelerometer and the gyroscope of a smartwatch?

Ten people did seven shoulder exercises with each arm (Burns et al. 2018, https://arxiv.org/abs/1802.01489; the
recordings come with seglearn). The model trains on three people and is tested on the other seven::

    pip install -e ".[examples]" && python examples/watch.py && tensorboard --logdir watch
"""

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from seglearn.datasets import load_watch
from torch import nn
from torch.utils.data import DataLoader

from lightning_xattn import AttentionExplainabilityCallback

EXERCISES = [
    *("pendulum", "abduction", "forward elevation", "internal rotation", "external rotation"),
    *("trapezius extension", "upright row"),
]
WINDOW, STEP = 200, 100  # 4 s and 2 s at 50 samples a second
TRAINING_SUBJECTS = {1, 2, 3}
WIDTH = 32


def make_loader(part: str) -> DataLoader:
    """Windows of the people to train on ("train"), or of the others ("test")."""
    recordings, samples = load_watch(), []
    rows = zip(recordings["X"], recordings["y"], recordings["subject"], strict=True)
    for signals, exercise, subject in rows:
        if (subject in TRAINING_SUBJECTS) == (part == "test"):
            continue
        for window in torch.tensor(signals, dtype=torch.float32).unfold(0, WINDOW, STEP):
            accelerometer, gyroscope = window[:3], window[3:] / 2  # 3 axes each, now of about the same size
            samples.append((accelerometer, gyroscope, int(exercise), int(subject)))
    return DataLoader(samples, batch_size=32, shuffle=part == "train")


class Encoder(nn.Sequential):
    """From 200 samples of three axes to 20 tokens, one every 0.2 s."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(3, WIDTH, kernel_size=11, stride=5, padding=5),
            nn.ReLU(),
            nn.Conv1d(WIDTH, WIDTH, kernel_size=5, stride=2, padding=2),
            nn.ReLU(),
        )

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        """Tokens ``(batch, 20, WIDTH)`` of signals ``(batch, 3, 200)``."""
        return super().forward(signals).mT


class Watch(pl.LightningModule):
    """An encoder for each sensor, cross-attention in both directions, and a linear layer."""

    class_names = EXERCISES

    def __init__(self) -> None:
        super().__init__()
        self.accelerometer, self.gyroscope = Encoder(), Encoder()
        self.accelerometer_to_gyroscope = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.gyroscope_to_accelerometer = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.head = nn.Linear(2 * WIDTH, len(EXERCISES))

    def forward(self, accelerometer: torch.Tensor, gyroscope: torch.Tensor) -> torch.Tensor:
        """Scores of the exercises."""
        a, g = self.accelerometer(accelerometer), self.gyroscope(gyroscope)
        from_gyroscope, _ = self.accelerometer_to_gyroscope(a, g, g)
        from_accelerometer, _ = self.gyroscope_to_accelerometer(g, a, a)
        return self.head(torch.cat([(a + from_gyroscope).mean(1), (g + from_accelerometer).mean(1)], dim=1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        accelerometer, gyroscope, exercise, _ = batch
        return nn.functional.cross_entropy(self(accelerometer, gyroscope), exercise)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Log the loss."""
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    pl.seed_everything(0)
    # Windows of one person are not independent. With groups, every interval is by person; it needs five or more.
    callback = AttentionExplainabilityCallback(groups=lambda outputs, batch: batch[3])
    trainer = pl.Trainer(
        max_epochs=20,
        accelerator="cpu",
        logger=TensorBoardLogger("watch", name="", default_hp_metric=False),
        callbacks=[callback],
        log_every_n_steps=20,
        enable_progress_bar=False,
    )
    model = Watch()
    trainer.fit(model, make_loader("train"))
    trainer.test(model, make_loader("test"), verbose=False)
