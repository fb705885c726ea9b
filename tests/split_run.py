"""Run by test_split_models.py: a model that several processes hold together, and what each of them recorded of it."""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.core.errors import XAttnWarning
from tests.toy import WIDTH, ToyModule, quiet_trainer, toy_data

SAMPLES = 41
"""Two processes have 21 each, one of them a repeat."""

HEADS = 4


class Attention(nn.Module):
    """Multi-head attention as tensor parallelism splits it: how many heads there are follows from the projections."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        for projection in (self.query, self.key):
            nn.init.normal_(projection.weight, std=0.8)

    def forward(self, x, y):
        query, key, value = (
            project(tokens).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for project, tokens in ((self.query, x), (self.key, y), (self.value, y))
        )
        return self.out(nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Fusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.audio_to_text_attn, self.text_to_audio_attn = Attention(), Attention()

    def forward(self, audio, text):
        there, back = self.audio_to_text_attn(audio, text), self.text_to_audio_attn(text, audio)
        return torch.cat([there.mean(1), back.mean(1)], dim=1)


class SplitModule(ToyModule):
    """What ``split`` says is split: "parameters" (FSDP2), "heads" (tensor parallelism), or "" for nothing."""

    def __init__(self, split):
        super().__init__()
        del self.audio_to_text_attn, self.text_to_audio_attn
        self.split, self.is_configured, self.fusion = split, False, Fusion()

    def configure_model(self):
        if self.is_configured:
            return
        self.is_configured = True
        attentions = self.fusion.audio_to_text_attn, self.fusion.text_to_audio_attn
        if self.split == "heads":
            plan = {name: ColwiseParallel() for name in ("query", "key", "value")} | {"out": RowwiseParallel()}
            for one in attentions:
                parallelize_module(one, self.device_mesh["tensor_parallel"], plan)
            whole = ColwiseParallel(output_layouts=Replicate())
            parallelize_module(self.head, self.device_mesh["tensor_parallel"], whole)
        if self.split == "parameters":
            for one in (*attentions, self):
                fully_shard(one, mesh=self.device_mesh["data_parallel"])

    def forward(self, audio, text):
        return self.head(self.fusion(self.audio(audio), self.text(text)))


def run(split, settings, folder, **of_callback):
    """What a validation, a test and a fit record, warn of, and how they end."""
    torch.manual_seed(0)
    callback = AttentionExplainabilityCallback(curves="all", table=folder / "table", **of_callback)
    trainer = quiet_trainer(callbacks=[callback], num_sanity_val_steps=1, **settings)
    model, loader = SplitModule(split), DataLoader(toy_data(SAMPLES), batch_size=6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [trainer.validate(model, loader, verbose=False), trainer.test(model, loader, verbose=False)]
        trainer.fit(model, DataLoader(toy_data(12), batch_size=2), loader)
    return {
        "losses": losses,
        "history": callback.history,
        "warnings": [str(one.message) for one in caught if issubclass(one.category, XAttnWarning)],
        "fusion": {scope: repr(summary) for scope, summary in callback.fusion_summaries.items()},
        "heads": [count for summary in callback.summaries.values() for count in summary.heads.values()],
    }


if __name__ == "__main__":
    found = {}
    for split, sizes in (("parameters", (2, 1)), ("heads", (1, 2))):
        # A path that is wrong ends a run only where something could be recorded.
        of_callback = {"attention": {"audio_to_text": "no.such.module"}} if split == "heads" else {}
        strategy = ModelParallelStrategy(*sizes, process_group_backend="gloo")
        found[split] = run(split, {"strategy": strategy, "devices": 2}, Path(sys.argv[1]) / split, **of_callback)
    (Path(sys.argv[1]) / f"rank_{dist.get_rank()}.json").write_text(json.dumps(found))
