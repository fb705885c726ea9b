"""A small two-modality LightningModule as a user would write it, and data for it."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn.capture.attention_mode import WrappedForward

AUDIO, TEXT, WIDTH, HEADS, CLASSES = 5, 7, 12, 3, 4
NAMES = ["a", "b", "c", "d"]


class ToyModule(pl.LightningModule):
    """Audio and text, 5 and 7 tokens, fused by two nn.MultiheadAttention of 3 heads."""

    def __init__(self, need_weights=True):
        super().__init__()
        self.need_weights = need_weights
        self.audio, self.text = nn.Linear(3, WIDTH), nn.Linear(2, WIDTH)
        self.audio_to_text_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.text_to_audio_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        # Attention as after some training: heads that are neither uniform nor alike.
        for attention in (self.audio_to_text_attn, self.text_to_audio_attn):
            nn.init.normal_(attention.in_proj_weight, std=0.6)
        self.head = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, audio, text):
        audio, text = self.audio(audio), self.text(text)
        there, _ = self.audio_to_text_attn(audio, text, text, need_weights=self.need_weights)
        back, _ = self.text_to_audio_attn(text, audio, audio, need_weights=self.need_weights)
        return self.head(torch.cat([there.mean(1), back.mean(1)], dim=1))

    def training_step(self, batch, _):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return self._loss(batch)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return self._loss(batch)

    def _loss(self, batch):
        audio, text, target = batch
        return nn.functional.cross_entropy(self(audio, text), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class PaddedToyModule(ToyModule):
    """A token whose first feature is 0 is padding."""

    def forward(self, audio, text):
        silent, blank = audio[..., 0] == 0, text[..., 0] == 0
        audio, text = self.audio(audio), self.text(text)
        there, _ = self.audio_to_text_attn(audio, text, text, key_padding_mask=blank)
        back, _ = self.text_to_audio_attn(text, audio, audio, key_padding_mask=silent)
        return self.head(torch.cat([there.mean(1), back.mean(1)], dim=1))


def run_toy(module, batch):
    """How to run a ToyModule on a batch of ``toy_data``."""
    return module(*batch[:2])


def toy_data(samples=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(samples, AUDIO, 3, generator=generator),
        torch.randn(samples, TEXT, 2, generator=generator),
        torch.randint(CLASSES, (samples,), generator=generator),
    )


def toy_loader(samples=23, batch_size=5, seed=0):
    return DataLoader(toy_data(samples, seed), batch_size=batch_size)


def labelled_loader(samples=120):
    """Of samples whose tokens show their class in both modalities."""
    audio, text, target = toy_data(samples).tensors
    steps = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])[target][:, None]
    shown = audio[..., :2] + steps, text + steps
    return DataLoader(TensorDataset(torch.cat([shown[0], audio[..., 2:]], 2), shown[1], target), batch_size=20)


def padded_toy_data(samples=23):
    audio, text, target = toy_data(samples).tensors
    for i in range(samples):
        audio[i, AUDIO - i % 3 :, 0] = 0
        text[i, TEXT - i % 4 :, 0] = 0
    return TensorDataset(audio, text, target)


def quiet_trainer(**settings):
    """A Trainer that writes nothing unless asked to."""
    defaults = {
        "accelerator": "cpu",
        "logger": DummyLogger(),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**(defaults | settings))


def validate(module, callback, loader=None, **settings):
    """What a validation with the callback logs, by name, without what is undefined."""
    trainer = quiet_trainer(callbacks=[callback], **settings)
    trainer.validate(module, toy_loader() if loader is None else loader, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if not value.isnan()}


def count_hooks(module):
    """Hooks of any kind on the module and all below it, and wrapped forwards."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)
    wrapped = ("forward", "_compiled_call_impl")
    return hooks + sum(isinstance(vars(m).get(name), WrappedForward) for m in module.modules() for name in wrapped)


def count_global_hooks():
    """Entries in torch's books of hooks on every module; they have no public name, and torch 2.6 no sum of them."""
    books = [book for name, book in vars(torch_module).items() if name.startswith("_global_") and "_hooks" in name]
    assert books
    return sum(len(book) for book in books)


def runs_compiled():
    """Whether torch runs what is compiled compiled, as it does unless a recorder is at work."""
    return bool(torch.compile(lambda x: x + torch.compiler.is_compiling(), backend="eager")(torch.zeros(1)))
