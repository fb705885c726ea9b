"""Which pooling, width and shrinkage suit the linear probes, and what they cost: ``python -m benchmarks.probe``.

The features are what trained encoders give: those of ``benchmarks.real_data``, 128 wide, and of the reference model on
simulated recordings, 256 wide (``benchmarks.simulated``). The first run takes about eight minutes, later ones five.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks import real_data, simulated
from benchmarks.support import REAL
from benchmarks.timing import median_seconds
from lightning_xattn import functional
from lightning_xattn.functional import pooling as token_pooling
from lightning_xattn.functional import probe
from lightning_xattn.functional.discriminant import SHRINKAGE
from lightning_xattn.functional.support import LEAST_LOG_PROBABILITY
from lightning_xattn.hms import HMSLightningModule

SEEDS = (0, 1)

MODEL_WIDTH = 128
"""Of the models on real data, so that projecting to 64 and to 256 differ."""

POOLINGS = {"mean": 1, "mean, max, sd": 3}
"""How many of the blocks of ``pooled_tokens`` are taken."""

WIDTHS = (64, 256)

LEDOIT_WOLF = "L-W"

SHRINKAGES = (0.03, 0.1, 0.3, LEDOIT_WOLF)


class Encoded(NamedTuple):
    """The tokens of a modality as its encoder gives them, and the class and the group of each sample."""

    tokens: Tensor
    mask: Tensor | None
    target: Tensor
    group: Tensor


class Score(NamedTuple):
    """Of a probe: log loss in nats, accuracy, and mean confidence minus accuracy."""

    loss: float
    accuracy: float
    overconfidence: float


def encode_real(name: str) -> Iterator[Encoded]:
    """Both modalities of the test samples, by models of each seed."""
    data = REAL[name]()
    *streams, mask, target, group = data.test.tensors
    for seed in SEEDS:
        model = real_data.train(data, seed, width=MODEL_WIDTH).eval()
        for stream, encoder in zip(streams, (model.first_encoder, model.second_encoder), strict=True):
            with torch.no_grad():
                yield Encoded(encoder(stream), mask, target, group)


def encode_simulated(models: list[HMSLightningModule], test: str) -> Iterator[Encoded]:
    """The same of simulated recordings."""
    for model in models:
        found = simulated.encode(model, test)
        for tokens in found.tokens.values():
            yield Encoded(tokens, None, found.target, found.group)


def pool(encoded: Encoded, blocks: int, width: int) -> Tensor:
    """``(samples, features)`` as the product pools and projects them, but for the number of blocks and the width."""
    with patch.object(token_pooling, "POOLED_WIDTH", width), patch.dict(token_pooling._PROJECTIONS, clear=True):
        pooled = functional.pooled_tokens(encoded.tokens, encoded.mask)[:, :blocks]
        return functional.project(pooled).flatten(1).double()


def ledoit_wolf(features: Tensor, target: Tensor, group: Tensor) -> float:
    """Shrinkage of Ledoit & Wolf (2004) of standardised features, with groups in the place of samples.

    ``sum_g ||Z_g' Z_g - n_g S||^2 / n^2`` over ``||S - I||^2``, Z being what is left of the features without their
    class means and S its covariance.
    """
    member = nn.functional.one_hot(target).double()
    left = features - (member @ (member.T @ features / member.sum(0)[:, None].clamp_min(1)))
    deviation = left.square().mean(0).sqrt()
    z = left[:, deviation > 0] / deviation[deviation > 0]
    correlations = z.T @ z / len(z)
    size, spread = correlations.square().sum(), torch.tensor(0.0).double()
    # ||Z'Z||^2 = ||ZZ'||^2, and ZZ' of a group is small.
    for rows in (group == key for key in group.unique()):
        own, n = z[rows], int(rows.sum())
        spread += (own @ own.T).square().sum() - 2 * n * ((own @ correlations) * own).sum() + n**2 * size
    distance = (correlations - torch.eye(len(correlations))).square().sum()
    return min(1.0, float(spread / len(z) ** 2 / distance))


def cross_fit(features: Tensor, encoded: Encoded, shrinkage: float | str, tempered: bool = True) -> Tensor:
    """``cross_fitted_probe`` with another shrinkage, or without a temperature."""
    target, folds = encoded.target, functional.assign_folds(encoded.group)
    if isinstance(shrinkage, str):
        return cross_fit_ledoit_wolf(features, encoded, folds)
    with (
        patch.object(probe, "discriminant", partial(probe.discriminant, shrinkage=shrinkage)),
        patch.object(probe, "discriminant_of_few", partial(probe.discriminant_of_few, shrinkage=shrinkage)),
        patch.object(probe, "inverse_temperatures", probe.inverse_temperatures if tempered else lambda _, first: first),
    ):
        return functional.cross_fitted_probe(features, target, folds, int(target.max()) + 1)


def cross_fit_ledoit_wolf(features: Tensor, encoded: Encoded, folds: Tensor) -> Tensor:
    """The same with `ledoit_wolf` in each fit, which needs the samples and not only their sums."""
    target, n_classes, every = encoded.target, int(encoded.target.max()) + 1, range(probe.FOLDS)
    features = features - features.mean(0)

    def fit(seen: Tensor) -> tuple[Tensor, Tensor]:
        x, member = features[seen], nn.functional.one_hot(target[seen], n_classes).double()
        shrinkage = ledoit_wolf(x, target[seen], encoded.group[seen])
        return functional.discriminant(member.sum(0), member.T @ x, x.T @ x, shrinkage)

    inner = {(i, j): fit((folds != i) & (folds != j)) for i in every for j in range(i)}
    found = torch.empty(len(features), n_classes, dtype=torch.float64)
    for fold in every:
        scores, targets = [], []
        for other in every:
            if other != fold:
                weights, bias = inner[max(fold, other), min(fold, other)]
                scores.append(features[folds == other] @ weights.T + bias)
                targets.append(target[folds == other])
        factor = functional.inverse_temperature(torch.cat(scores), torch.cat(targets))
        weights, bias = fit(folds != fold)
        found[folds == fold] = (factor * (features[folds == fold] @ weights.T + bias)).log_softmax(1)
    return found


def score(log_probabilities: Tensor, target: Tensor) -> Score:
    """The probe's scores."""
    loss = -log_probabilities.gather(1, target[:, None]).clamp_min(LEAST_LOG_PROBABILITY).mean()
    confidence, predicted = log_probabilities.max(1)
    accuracy = (predicted == target).double().mean()
    return Score(float(loss), float(accuracy), float(confidence.exp().mean() - accuracy))


def measure(several: list[Encoded], blocks: int, width: int, shrinkage: float | str, tempered: bool = True) -> Score:
    """The mean scores over modalities and seeds."""
    scores = [score(cross_fit(pool(data, blocks, width), data, shrinkage, tempered), data.target) for data in several]
    return Score(*(sum(numbers) / len(scores) for numbers in zip(*scores, strict=True)))


def encode_all() -> dict[str, list[Encoded]]:
    """All data sets, with both modalities by models of each seed."""
    found = {name: list(encode_real(name)) for name in REAL}
    models = [simulated.train(seed) for seed in SEEDS]
    return found | {f"HMS {test}": list(encode_simulated(models, test)) for test in simulated.TESTS}


def print_choice(encoded: dict[str, list[Encoded]]) -> None:
    """A row for each setting."""
    print("cross-fitted log loss in nats (accuracy), the mean over two modalities and two seeds")
    print("| pooling | width | shrinkage | " + " | ".join(encoded) + " | mean |")
    print("| --- " * (4 + len(encoded)) + "|")
    for pooling, blocks in POOLINGS.items():
        for width in WIDTHS:
            for shrinkage in SHRINKAGES:
                scores = [measure(several, blocks, width, shrinkage) for several in encoded.values()]
                cells = [f"{score.loss:.3f} ({score.accuracy:.2f})" for score in scores]
                mean = math.fsum(score.loss for score in scores) / len(scores)
                print(f"| {pooling} | {width} | {shrinkage} | {' | '.join(cells)} | {mean:.3f} |", flush=True)


def print_temperature(encoded: dict[str, list[Encoded]]) -> None:
    """What the temperature brings at the product's own setting."""
    print(f"\nlog loss in nats (mean confidence minus accuracy) at shrinkage {SHRINKAGE}, all blocks")
    print("| temperature | " + " | ".join(encoded) + " |")
    print("| --- " * (1 + len(encoded)) + "|")
    for tempered in (True, False):
        scores = [measure(several, 3, token_pooling.POOLED_WIDTH, SHRINKAGE, tempered) for several in encoded.values()]
        cells = [f"{score.loss:.3f} ({score.overconfidence:+.2f})" for score in scores]
        print(f"| {'with' if tempered else 'without'} | {' | '.join(cells)} |", flush=True)


def print_cost(samples: int = 8192, width: int = 768, classes: int = 6) -> None:
    """The seconds of the probes of a full evaluation, with two threads."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(classes, (samples,), generator=generator)
    means = torch.randn(2, classes, width, generator=generator) / 10
    features = {
        name: torch.randn(samples, width, generator=generator) + mean[target]
        for name, mean in zip("ab", means, strict=True)
    }
    folds, before = functional.assign_folds(torch.arange(samples)), torch.get_num_threads()

    def fit_all() -> None:
        functional.cross_fitted_probes(features, target, folds, classes, [("a", "b")])

    torch.set_num_threads(2)
    single, joint = median_seconds(
        lambda: functional.cross_fitted_probes(features, target, folds, classes), fit_all, repeats=3
    )
    torch.set_num_threads(1)
    start = time.process_time()
    fit_all()
    alone = time.process_time() - start
    torch.set_num_threads(before)
    print(f"\n{samples} samples, two modalities of {width} features, {classes} classes, two threads, median of three")
    print(f"  both probes                       {single:.2f} s")
    print(f"  with the joint probe              {joint:.2f} s     (aim: 2.5 s)")
    print(f"  the same in one thread            {alone:.2f} s     of the processor")
    print(f"  busy processes meanwhile          {os.getloadavg()[0]:.1f}     on {os.cpu_count()} cores\n")


def main() -> None:
    """Print all of it."""
    # Of a dozen small models: advice on loaders, and alarms of heads. Only the tables are of interest here.
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning_xattn"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print_cost()
    encoded = encode_all()
    print_choice(encoded)
    print_temperature(encoded)


if __name__ == "__main__":
    main()
