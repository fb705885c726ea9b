"""Models whose modalities are fused in a module of its own, and data whose truth is known."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from tests.toy import quiet_trainer

LEFT, RIGHT, WIDTH, HEADS, CLASSES = 5, 7, 12, 3, 4

NAMED = {"fusion": "fusion", "modalities": {"left": 0, "right": 1}}
"""What names the fusion of these models."""


class Fusion(nn.Module):
    """Cross-attention in both directions, pooled."""

    def __init__(self):
        super().__init__()
        self.left_to_right = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.right_to_left = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        for attention in (self.left_to_right, self.right_to_left):  # as after some training
            nn.init.normal_(attention.in_proj_weight, std=0.6)

    def forward(self, left, right, left_mask=None, right_mask=None):
        """Masks are True where a token is real."""
        left_hidden, right_hidden = (None if mask is None else ~mask for mask in (left_mask, right_mask))
        there, _ = self.left_to_right(left, right, right, key_padding_mask=right_hidden)
        back, _ = self.right_to_left(right, left, left, key_padding_mask=left_hidden)
        return torch.cat([_mean(left + there, left_mask), _mean(right + back, right_mask)], dim=1)


def _mean(tokens, mask):
    return tokens.mean(1) if mask is None else (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class TwoStreams(pl.LightningModule):
    """Encoders of the left and the right tokens, a fusion, a head; a step in which nothing is learned."""

    def __init__(self, fusion=None, outputs=CLASSES):
        super().__init__()
        self.left, self.right = nn.Linear(3, WIDTH), nn.Linear(2, WIDTH)
        self.fusion = Fusion() if fusion is None else fusion
        self.head = nn.Linear(2 * WIDTH, outputs)

    def forward(self, left, right):
        return self.head(self.fusion(self.left(left), self.right(right)))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        left, right, target, *_ = batch
        return {"logits": self(left, right), "targets": target}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Concatenation(nn.Module):
    """No attention at all: pooled tokens side by side through a hidden layer."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(2 * WIDTH, 2 * WIDTH)

    def forward(self, left, right):
        return self.hidden(torch.cat([left.mean(1), right.mean(1)], dim=1)).tanh()


class Sum(nn.Module):
    """Additive: each modality by itself."""

    def forward(self, left, right):
        return torch.cat([left.mean(1), right.mean(1)], dim=1)


def said_data(samples=160, disagreeing=0.25, seed=0, noise=0.8):
    """Left and right tokens that each say a class, of which the target is the left's; whether they agree."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(samples) % CLASSES
    shown = target.clone()
    differs = torch.rand(samples, generator=generator) < disagreeing
    shown[differs] = (shown[differs] + 1 + torch.randint(CLASSES - 1, (int(differs.sum()),), generator=generator)) % 4
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    left = torch.cat([corners[target], torch.zeros(samples, 1)], dim=1)[:, None].repeat(1, LEFT, 1)
    right = corners[shown][:, None].repeat(1, RIGHT, 1)
    left, right = (x + noise * torch.randn(x.shape, generator=generator) for x in (left, right))
    return TensorDataset(left, right, target, torch.arange(samples) + 1000), ~differs


def loader_of(data, batch_size=16, order=None):
    tensors = data.tensors if order is None else [one[order] for one in data.tensors]
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size)


def sample_ids(outputs, batch):
    return batch[3]


def trained(fusion, data, epochs=60):
    """A model that follows its left tokens, as the target does."""
    torch.manual_seed(0)
    module = TwoStreams(fusion)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    left, right, target, _ = data.tensors
    for _ in range(epochs):
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(left, right), target).backward()
        optimiser.step()
    return module


def watch_of(module, data, batch_size=16, order=None, **settings):
    callback = AttentionExplainabilityCallback(**{"sample_ids": sample_ids, "figures_every_n_epochs": 0} | settings)
    quiet_trainer(callbacks=[callback]).validate(module, loader_of(data, batch_size, order), verbose=False)
    return callback


def summary_of(module, data, **settings):
    return watch_of(module, data, **settings).fusion_summaries["val"]
