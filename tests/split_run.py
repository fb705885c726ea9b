"""Run by test_split_models.py: a model that several processes hold together, and what each of them saw of it."""

import json
import sys
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
from lightning_xattn.core.errors import DataError
from tests.toy import WIDTH, ToyModule, quiet_trainer, toy_data

SAMPLES = 129
"""Dealt to two processes these are 65 and 64: 2 and 1 replays of 64."""

HEADS = 4


class Attention(nn.Module):
    """Multi-head attention as tensor parallelism splits it: how many heads there are follows from the projections."""

    def __init__(self, asks_a_part=False, std=0.8, masks=False):
        super().__init__()
        self.asks_a_part, self.masks = asks_a_part, masks
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        for projection in (self.query, self.key):
            nn.init.normal_(projection.weight, std=std)

    def forward(self, x, y):
        if self.asks_a_part:  # as context parallelism does
            x = x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
        query, key, value = (
            project(tokens).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for project, tokens in ((self.query, x), (self.key, y), (self.value, y))
        )
        seen = None
        if self.masks:  # one half of the heads does not see the first key, the other not the second
            seen = torch.ones(HEADS, x.shape[1], y.shape[1], dtype=torch.bool)
            seen[: HEADS // 2, :, 0] = seen[HEADS // 2 :, :, 1] = False
            first = dist.get_rank() * query.shape[1] if query.shape[1] < HEADS else 0
            seen = seen[first : first + query.shape[1]]
        fused = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return self.out(fused.transpose(1, 2).flatten(2))


class Fusion(nn.Module):
    def __init__(self, asks_a_part=False, std=0.8, masks=False):
        super().__init__()
        self.audio_to_text_attn = Attention(asks_a_part, std, masks)
        self.text_to_audio_attn = Attention(std=std, masks=masks)

    def forward(self, audio, text):
        there, back = self.audio_to_text_attn(audio, text), self.text_to_audio_attn(text, audio)
        return torch.cat([there.mean(1), back.mean(1)], dim=1)


class SplitModule(ToyModule):
    """What the words in ``split`` say is split.

    "parameters" (FSDP2), of a model that may have "noise" of its own in each process; "heads" (tensor parallelism) of
    one direction or "both", whose attention may be "faint", as before training, or "masked", by head; or what cannot be
    put together, "classes" and "queries".
    """

    def __init__(self, split):
        super().__init__()
        del self.audio_to_text_attn, self.text_to_audio_attn
        self.split, self.is_configured = split, False
        self.fusion = Fusion("queries" in split, 0.02 if "faint" in split else 0.8, "masked" in split)

    def configure_model(self):
        if self.is_configured or self.split in ("", "faint", "masked"):
            return
        self.is_configured = True
        tensor_parallel, data_parallel = self.device_mesh["tensor_parallel"], self.device_mesh["data_parallel"]
        attentions = self.fusion.audio_to_text_attn, self.fusion.text_to_audio_attn
        if "heads" in self.split:
            plan = {name: ColwiseParallel() for name in ("query", "key", "value")} | {"out": RowwiseParallel()}
            for one in attentions if "both" in self.split else attentions[:1]:
                parallelize_module(one, tensor_parallel, plan)
            parallelize_module(self.head, tensor_parallel, ColwiseParallel(output_layouts=Replicate()))
        if "classes" in self.split:
            parallelize_module(self.head, tensor_parallel, ColwiseParallel())
        if "parameters" in self.split:
            for one in (*attentions, self):
                fully_shard(one, mesh=data_parallel)

    def forward(self, audio, text):
        said = self.head(self.fusion(self.audio(audio), self.text(text)))
        return said + (torch.rand(()) < 0.5) * torch.eye(4)[0] if "noise" in self.split else said

    def on_validation_start(self):
        torch.manual_seed(self.global_rank + 101)

    def _loss(self, batch):
        audio, text, target = batch
        logits = self(audio, text)
        return nn.functional.cross_entropy(logits, target % logits.shape[1])


def explain(split, settings, folder):
    """What is logged by a fit, a validation and a test, and what the table has."""
    torch.manual_seed(0)
    callback = AttentionExplainabilityCallback(curves="all", contribution_samples=SAMPLES, table=folder / "table")
    trainer = quiet_trainer(callbacks=[callback], num_sanity_val_steps=1, **settings)
    model, loader = SplitModule(split), DataLoader(toy_data(SAMPLES), batch_size=6)
    trainer.validate(model, loader, verbose=False)
    trainer.test(model, loader, verbose=False)
    trainer.fit(model, DataLoader(toy_data(12), batch_size=2), loader)
    return {"history": callback.history, "heads": [*callback.summaries["val"].heads.values()]}


def validate(split, settings):
    """What one validation says."""
    torch.manual_seed(0)
    callback = AttentionExplainabilityCallback(curves="all")
    trainer = quiet_trainer(callbacks=[callback], **settings)
    trainer.validate(SplitModule(split), DataLoader(toy_data(20), batch_size=6), verbose=False)
    return {"history": callback.history, "said": repr(callback.fusion_summaries["val"])}


class Remembers(AttentionExplainabilityCallback):
    """Why nothing was recorded, on every process."""

    def teardown(self, *args, **kwargs):
        self.refusal = self._run.refusal
        super().teardown(*args, **kwargs)


def refused(split, settings):
    torch.manual_seed(0)
    # Of both directions it would be seen that the queries of one are not the keys of the other.
    callback = Remembers({"audio_to_text": "fusion.audio_to_text_attn"})
    trainer = quiet_trainer(callbacks=[callback], **settings)
    try:
        trainer.validate(SplitModule(split), DataLoader(toy_data(12), batch_size=6), verbose=False)
    except DataError as error:
        return str(error)
    return callback.refusal or "not refused"


def run(split, settings, folder):
    if split in ("classes", "queries", "faint queries"):
        return refused(split, settings)
    if split in ("heads", "masked heads", "faint both heads", "noise, parameters"):
        return validate(split, settings)
    return explain(split, settings, folder)


if __name__ == "__main__":
    folder, data_parallel, tensor_parallel = Path(sys.argv[1]), *map(int, sys.argv[2:4])
    sizes = {"data_parallel_size": data_parallel, "tensor_parallel_size": tensor_parallel}
    results = {}
    for split in sys.argv[4:]:
        strategy = ModelParallelStrategy(**sizes, process_group_backend="gloo")
        results[split] = run(split, {"strategy": strategy, "devices": data_parallel * tensor_parallel}, folder)
    (folder / f"rank_{dist.get_rank()}.json").write_text(json.dumps(results))
