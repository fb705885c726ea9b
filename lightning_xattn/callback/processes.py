"""The processes that run a Trainer's evaluations together, and what their strategy rules out."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from pytorch_lightning import Trainer

from lightning_xattn.core.distributed import SINGLE_PROCESS, Processes


def find_processes(trainer: Trainer) -> Processes:
    """Those that run the Trainer's evaluations together."""
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return SINGLE_PROCESS
    strategy: Any = trainer.strategy
    dealt = strategy.distributed_sampler_kwargs
    # By name, as Lightning has two namespaces. DeepSpeed's strategy is a child of DDP's, and may split the model.
    kinds = {kind.__name__ for kind in type(strategy).__mro__}
    hold_whole_model = "DDPStrategy" in kinds and "DeepSpeedStrategy" not in kinds
    return Processes(dealt["rank"], dealt["num_replicas"], hold_whole_model)


def describe_tensor_parallelism(trainer: Trainer, processes: Processes) -> str:
    """Why nothing is recorded of a model whose heads or columns may be split among processes; "" if they are not."""
    if processes is SINGLE_PROCESS or processes.count == trainer.world_size:
        return ""
    together = trainer.world_size // processes.count
    return (
        f"{type(trainer.strategy).__name__} runs each sample on {together} processes together (tensor parallelism), so "
        "that each may have a part of the heads. Evaluate the model without tensor parallelism: trainer.validate(...) "
        "of its checkpoint with another strategy."
    )


def describe_spawning(trainer: Trainer) -> str:
    """Why a callback's ``history`` is empty after a run in processes that the Trainer spawns; "" after any other."""
    kinds = {kind.__name__ for kind in type(trainer.strategy.launcher).__mro__}
    if "_MultiProcessingLauncher" not in kinds:
        return ""
    return (
        "The Trainer's strategy runs AttentionExplainabilityCallback in processes that it spawns, so history and "
        "summaries stay empty in the process that made the callback. The loggers have the curves, figures and reports, "
        'and checkpoints the history. strategy="ddp" keeps them in the callback, too.'
    )
