"""What one would write instead of the callback: a hook with numpy, and captum's Shapley values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

PARTNERS = 4
"""With so many others each sample is permuted, as by the callback."""


class HandWrittenHook(Callback):
    """The mean entropy of each attention's weights by class, by forward hooks and numpy.

    Parameters
    ----------
    find_target
        Gets a batch and gives the class ids of its samples.

    Attributes
    ----------
    found
        After a validation, by module and class the mean entropy over samples, heads and queries.
    """

    def __init__(self, find_target: Callable[[Any], Tensor]) -> None:
        self.found: dict[str, dict[int, float]] = {}
        self._find_target = find_target
        self._weights: dict[str, list[NDArray[np.float32]]] = {}
        self._targets: list[NDArray[np.int64]] = []
        self._handles: list[Any] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._weights, self._targets = {}, []
        for name, module in pl_module.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                self._handles.append(module.register_forward_pre_hook(self._ask, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._keep_of(name)))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._targets.append(self._find_target(args[1]).cpu().numpy())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, targets = [], np.concatenate(self._targets)
        for name, several in self._weights.items():
            weights = np.concatenate(several)
            entropy = -(weights * np.log(np.maximum(weights, 1e-12))).sum(-1).mean((1, 2))
            self.found[name] = {int(c): float(entropy[targets == c].mean()) for c in np.unique(targets)}

    @staticmethod
    def _ask(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

    def _keep_of(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
            self._weights.setdefault(name, []).append(output[1].detach().cpu().numpy())

        return keep


@torch.no_grad()
def captum_contributions(module: nn.Module, image: Tensor, text: Tensor, method: str) -> Tensor:
    """``(samples, 2)`` the Shapley values of two inputs for the probability of the predicted class.

    Each sample's baselines are `PARTNERS` other samples in turn.

    Parameters
    ----------
    module
        Gets both inputs and gives class scores.
    image, text
        ``(samples, tokens, width)``.
    method
        "ShapleyValueSampling" with captum's number of draws, or "ShapleyValues", all orders of the inputs.
    """
    from captum import attr

    shapley = getattr(attr, method)(lambda *inputs: module(*inputs).softmax(1))
    predicted = module(image, text).argmax(1)
    mask = torch.zeros(image[:1].shape).long(), torch.ones(text[:1].shape).long()
    total = torch.zeros(len(image), 2)
    for shift in range(1, PARTNERS + 1):
        partners = image.roll(shift, 0), text.roll(shift, 0)
        found = shapley.attribute((image, text), baselines=partners, target=predicted, feature_mask=mask)
        # Every number of an input has the value of the whole input.
        total += torch.stack([one[:, 0, 0] for one in found], 1)
    return total / PARTNERS
