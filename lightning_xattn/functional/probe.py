"""What does each modality say on its own? A closed-form linear probe (Alain & Bengio 2016) on what enters the fusion.

Linear discriminant analysis with shrinkage, cross-fitted: no training, no optimiser, no gradient. Everything is
computed in float64 from counts, sums and sums of products, so several processes give what one gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKAGE = 0.1
"""How far the covariance is drawn towards a multiple of the identity, in [0, 1]."""

FOLDS = 5
"""How many folds, each predicted by a fit without it; no fit has seen the sample that it predicts, or its group."""

READING_WIDTH = 64
"""So many numbers of a sample and modality are kept; wider tokens are projected, see `project`."""

LEAST_OF_A_CLASS = 10
"""A probe needs two classes with at least this number of samples each."""


def pooled_tokens(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average the valid tokens of each sample.

    Parameters
    ----------
    tokens
        ``(batch, tokens, width)``, or ``(batch, width)`` of one token, which stays as it is.
    mask
        ``(batch, tokens)`` bool, True where a token is real; None: all are.

    Returns
    -------
    Tensor
        ``(batch, width)`` float32 or wider; NaN for a sample without a valid token.

    Examples
    --------
    >>> pooled_tokens(torch.tensor([[[1.0], [3.0], [9.0]]]), mask=torch.tensor([[True, True, False]]))
    tensor([[2.]])
    """
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    if tokens.dim() == 2:
        return tokens
    if mask is None:
        return tokens.mean(1)
    return tokens.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)


def project(features: Tensor) -> Tensor:
    """Project to `READING_WIDTH` dimensions where there are more, by a fixed Gaussian matrix.

    Parameters
    ----------
    features
        ``(batch, width)``.

    Returns
    -------
    Tensor
        ``(batch, min(width, READING_WIDTH))``; distances keep their expectation (Johnson & Lindenstrauss 1984).

    Examples
    --------
    >>> project(torch.rand(5, 1000)).shape, project(torch.rand(5, 16)).shape
    (torch.Size([5, 64]), torch.Size([5, 16]))
    """
    width = features.shape[1]
    return features if width <= READING_WIDTH else features @ _projection(width).to(features)


_PROJECTIONS: dict[int, Tensor] = {}


def _projection(width: int) -> Tensor:
    # Always drawn on the CPU: the same on every device, in every process and in every run.
    if width not in _PROJECTIONS:
        generator = torch.Generator().manual_seed(width)
        _PROJECTIONS[width] = torch.randn(width, READING_WIDTH, generator=generator) / READING_WIDTH**0.5
    return _PROJECTIONS[width]


def discriminant(counts: Tensor, sums: Tensor, products: Tensor, shrinkage: float = SHRINKAGE) -> tuple[Tensor, Tensor]:
    """Fit linear discriminant analysis with shrinkage.

    With class means ``mu_c``, the pooled within-class covariance ``S`` (n minus the number of classes in its
    denominator) and ``S' = (1 - shrinkage) S + shrinkage tr(S) / d I``, the log probability of class c is, but for a
    constant, ``x' S'^-1 mu_c - 1/2 mu_c' S'^-1 mu_c + ln prior_c``.

    Parameters
    ----------
    counts
        ``(classes,)`` samples of each class, float64.
    sums
        ``(classes, width)`` sums of their features.
    products
        ``(width, width)`` sum over all samples of the outer product of their features with themselves.
    shrinkage
        In [0, 1].

    Returns
    -------
    weights, bias
        ``(classes, width)`` and ``(classes,)``: ``softmax(x @ weights.T + bias)`` are the probabilities. The bias of a
        class without samples is minus infinity. NaN with fewer than two classes, no more samples than classes, or
        features that do not vary within classes.

    Examples
    --------
    >>> features = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64)  # two of each class
    >>> counts, sums = torch.tensor([2.0, 2.0]).double(), torch.tensor([[-2.0], [2.0]]).double()
    >>> coefficients, constants = discriminant(counts, sums, products=(features @ features)[None, None])
    >>> coefficients.tolist()  # the means, -1 and 1, over the variance within classes, 0.5
    [[-2.0], [2.0]]
    """
    present = counts > 0
    freedom = counts.sum() - present.sum()
    means = torch.where(present[:, None], sums / counts.clamp_min(1)[:, None], 0)
    within = (products - means.T @ (counts[:, None] * means)) / freedom
    width = len(products)
    shrunk = (1 - shrinkage) * within + shrinkage * within.trace() / width * torch.eye(width).to(within)
    if present.sum() < 2 or freedom < 1 or not bool(within.trace() > 0):
        return torch.full_like(means, torch.nan), torch.full_like(counts, torch.nan)
    weights = torch.linalg.solve(shrunk, means.T).T
    bias = (counts / counts.sum()).log() - (weights * means).sum(1) / 2
    return weights, bias


def cross_fitted_probe(features: Tensor, target: Tensor, folds: Tensor, n_classes: int) -> Tensor:
    """Log probability of each class from one modality's features, each sample by a fit that has not seen its fold.

    Parameters
    ----------
    features
        ``(samples, width)``; samples whose features are not finite are neither fitted nor read.
    target
        ``(samples,)`` int64 class ids; those outside of [0, n_classes) are read, but not fitted.
    folds
        ``(samples,)`` int64 in [0, FOLDS), the same for all samples of a group.
    n_classes
        How many classes there are.

    Returns
    -------
    Tensor
        ``(samples, classes)`` float64, natural logarithms, as a probability far from the data is too small for a
        number; minus infinity for a class that the fit does not know. NaN where a sample cannot be read, and for all
        samples where fewer than two classes have `LEAST_OF_A_CLASS` samples.

    Examples
    --------
    >>> target = torch.arange(100) % 2
    >>> features = target[:, None] + 0.1 * torch.randn(100, 3)
    >>> probe = cross_fitted_probe(features, target, folds=torch.arange(100) // 20, n_classes=2)
    >>> bool((probe.argmax(1) == target).all())
    True
    """
    features = features.double()
    finite = features.isfinite().all(1)
    fitted = finite & (target >= 0) & (target < n_classes)
    probe = features.new_full((len(features), n_classes), torch.nan)
    if (target[fitted].bincount() >= LEAST_OF_A_CLASS).sum() < 2:
        return probe
    # Differences to the mean of all: large features that differ little keep their digits.
    features = features - features[fitted].mean(0)
    parts = []
    for fold in range(FOLDS):
        chosen = fitted & (folds == fold)
        x, member = features[chosen], torch.nn.functional.one_hot(target[chosen], n_classes).double()
        parts.append((member.sum(0), member.T @ x, x.T @ x))
    totals = [torch.stack(terms).sum(0) for terms in zip(*parts, strict=True)]
    for fold, part in enumerate(parts):
        counts, sums, products = (total - of_fold for total, of_fold in zip(totals, part, strict=True))
        weights, bias = discriminant(counts, sums, products)
        read = finite & (folds == fold)
        probe[read] = (features[read] @ weights.T + bias).log_softmax(1)
    return probe


def conflict(probes: Tensor) -> Tensor:
    """The chance that two modalities, each drawing a class from its probe, draw different ones: ``1 - sum p_a p_b``.

    Parameters
    ----------
    probes
        ``(modalities, samples, classes)`` probabilities of at least two modalities.

    Returns
    -------
    Tensor
        ``(samples,)`` in [0, 1], the mean over all pairs of modalities; NaN where a probe is undefined.

    Examples
    --------
    >>> conflict(torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]))  # two samples
    tensor([1.0000, 0.5000])
    """
    modalities = len(probes)
    # The squared sum has each pair twice, and each modality with itself.
    same = (probes.sum(0).square() - probes.square().sum(0)).sum(1) / (modalities * (modalities - 1))
    return (1 - same).clamp(0, 1)


def support_difference(probes: Tensor, predicted: Tensor) -> Tensor:
    """Whose probe supports the model's prediction: ``ln p_a(y) - ln p_b(y)``, in nats.

    Parameters
    ----------
    probes
        ``(2, samples, classes)`` log probabilities of two modalities.
    predicted
        ``(samples,)`` int64 predicted classes; those outside of the classes have no support_difference.

    Returns
    -------
    Tensor
        ``(samples,)``; above 0: the first modality's. NaN where a probe is undefined or no fit knew the class.

    Examples
    --------
    >>> probes = torch.tensor([[[0.8, 0.2]], [[0.4, 0.6]]]).log()
    >>> support_difference(probes, predicted=torch.tensor([0]))  # ln 0.8 / 0.4
    tensor([0.6931])
    """
    known = (predicted >= 0) & (predicted < probes.shape[2])
    place = torch.where(known, predicted, 0)[:, None]
    first, second = (one.gather(1, place)[:, 0] for one in probes)
    return torch.where(known, first - second, torch.nan)


def only_probe_right(probes: Tensor, predicted: Tensor, target: Tensor) -> Tensor:
    """Of a wrong prediction, whether a modality's own probe was right.

    Parameters
    ----------
    probes
        ``(modalities, samples, classes)``.
    predicted, target
        ``(samples,)`` int64 class ids.

    Returns
    -------
    Tensor
        ``(samples,)`` 1 or 0; NaN where the prediction is right or not known, or a probe is undefined.

    Examples
    --------
    >>> probes = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]])
    >>> only_probe_right(probes, predicted=torch.tensor([1]), target=torch.tensor([0])).tolist()
    [1.0]
    """
    right = (probes.argmax(2) == target).any(0)
    wrong = (predicted != target) & (predicted >= 0) & (target >= 0) & ~probes.isnan().any(2).any(0)
    return torch.where(wrong, right.to(probes.dtype), torch.nan)
