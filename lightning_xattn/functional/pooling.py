"""What a probe reads of a modality: its tokens, pooled, and projected where they are wide."""

from __future__ import annotations

import math

import torch
from torch import Tensor

POOLED_WIDTH = 256
"""The mean, the maximum and the deviation of tokens keep so many numbers each; wider ones are projected."""


def pooled_tokens(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pool the valid tokens of each sample to their mean, maximum and standard deviation.

    Parameters
    ----------
    tokens
        ``(batch, tokens, width)``, or ``(batch, width)`` of one vector, which stays as it is.
    mask
        ``(batch, tokens)`` bool, True where a token is real; None: all are.

    Returns
    -------
    Tensor
        ``(batch, 3, width)``, or ``(batch, 1, width)`` of vectors; float32 or wider; NaN for a sample without a valid
        token.

    Examples
    --------
    >>> tokens = torch.tensor([[[1.0], [3.0], [9.0]]])
    >>> pooled_tokens(tokens, mask=torch.tensor([[True, True, False]])).flatten().tolist()
    [2.0, 3.0, 1.0]
    """
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    if tokens.dim() == 2:
        return tokens[:, None]
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    hidden, count = ~mask[..., None], mask.sum(1, keepdim=True)
    mean = tokens.masked_fill(hidden, 0).sum(1) / count
    largest = torch.where(count > 0, tokens.masked_fill(hidden, -math.inf).amax(1), torch.nan)
    # Differences to the mean: large numbers that differ little keep their digits.
    deviation = ((tokens - mean[:, None]).masked_fill(hidden, 0).square().sum(1) / count).sqrt()
    return torch.stack([mean, largest, deviation], dim=1)


def project(features: Tensor) -> Tensor:
    """Project to `POOLED_WIDTH` dimensions where there are more, by a fixed Gaussian matrix.

    Parameters
    ----------
    features
        ``(..., width)``.

    Returns
    -------
    Tensor
        ``(..., min(width, POOLED_WIDTH))``; distances keep their expectation (Johnson & Lindenstrauss 1984).

    Examples
    --------
    >>> project(torch.rand(5, 3, 1000)).shape, project(torch.rand(5, 16)).shape
    (torch.Size([5, 3, 256]), torch.Size([5, 16]))
    """
    width = features.shape[-1]
    return features if width <= POOLED_WIDTH else features @ _projection(width).to(features)


_PROJECTIONS: dict[int, Tensor] = {}


def _projection(width: int) -> Tensor:
    # Always drawn on the CPU: the same on every device, in every process and in every run.
    if width not in _PROJECTIONS:
        generator = torch.Generator().manual_seed(width)
        _PROJECTIONS[width] = torch.randn(width, POOLED_WIDTH, generator=generator) / POOLED_WIDTH**0.5
    return _PROJECTIONS[width]
