"""A planted task, without any download: images and captions that mostly name the same thing.

The data are simulated. An image shows one of four things, a caption names one, and in three of ten samples they differ.
The label is then that of either one, at random, so no model can predict it. So the truth is known: both modalities
predict the label equally well, and the model is wrong where they disagree. Compare the card with it::

    python examples/quick_start.py && tensorboard --logdir quick_start
"""

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback

THINGS = ["cat", "dog", "bird", "fish"]
PATCHES, WORDS, WIDTH = 12, 8, 32


def simulate(samples: int, seed: int) -> TensorDataset:
    """Tokens of images and captions: one token of each is the thing, the others are noise."""
    make = torch.Generator().manual_seed(seed)
    looks = nn.functional.one_hot(torch.arange(len(THINGS)), WIDTH).float()
    shown = torch.randint(len(THINGS), (samples,), generator=make)
    other = (shown + torch.randint(1, len(THINGS), (samples,), generator=make)) % len(THINGS)
    named = torch.where(torch.rand(samples, generator=make) < 0.3, other, shown)
    label = torch.where(torch.rand(samples, generator=make) < 0.5, shown, named)

    def tokens(thing: torch.Tensor, count: int) -> torch.Tensor:
        noise = 0.15 * torch.randn(samples, count, WIDTH, generator=make)
        place = torch.randint(count, (samples,), generator=make)
        noise[torch.arange(samples), place] += looks[thing]
        return noise

    return TensorDataset(tokens(shown, PATCHES), tokens(named, WORDS), label)


class Matching(pl.LightningModule):
    """Cross-attention in both directions, initialised so that tokens attend to similar tokens."""

    class_names = THINGS

    def __init__(self) -> None:
        super().__init__()
        self.image_to_text = nn.MultiheadAttention(WIDTH, 1, batch_first=True)
        self.text_to_image = nn.MultiheadAttention(WIDTH, 1, batch_first=True)
        with torch.no_grad():
            for attention in (self.image_to_text, self.text_to_image):
                nn.init.normal_(attention.in_proj_weight[: 2 * WIDTH], std=0.3)
                for weights in attention.in_proj_weight.split(WIDTH)[:2]:  # of queries, and of keys
                    weights[: len(THINGS), : len(THINGS)] = 5 * torch.eye(len(THINGS))
        self.head = nn.Linear(2 * WIDTH, len(THINGS))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        there, _ = self.image_to_text(image, text, text)
        back, _ = self.text_to_image(text, image, image)
        return self.head(torch.cat([(image + there).amax(1), (text + back).amax(1)], dim=1))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Cross-entropy."""
        image, text, label = batch
        return nn.functional.cross_entropy(self(image, text), label)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        """Log the loss."""
        self.log("val_loss", self.training_step(batch, 0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=TensorBoardLogger("quick_start", name="", default_hp_metric=False),
        callbacks=[AttentionExplainabilityCallback()],
        log_every_n_steps=30,
        enable_progress_bar=False,
    )
    trainer.fit(
        Matching(),
        DataLoader(simulate(2000, 0), batch_size=64, shuffle=True),
        DataLoader(simulate(500, 1), batch_size=64),
    )
