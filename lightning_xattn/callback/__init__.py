"""The Lightning callback: its hooks, its schedule, and what it logs at the end of an epoch."""

from lightning_xattn.callback.callback import AttentionExplainabilityCallback

__all__ = ["AttentionExplainabilityCallback"]
