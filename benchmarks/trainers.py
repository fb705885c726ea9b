"""A validation and a fit with the callback, one part of it after another, over the same without it."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from benchmarks import models, prepared
from benchmarks.alternatives import PARTNERS, HandWrittenHook, captum_contributions
from benchmarks.table import Benchmark, Measured, Row, plan
from benchmarks.timing import quartiles, quartiles_of_ratios, times_within
from examples import quick_start
from lightning_xattn import AttentionExplainabilityCallback

PARTS: dict[str, dict[str, Any]] = {
    "attention alone": {"figures_every_n_epochs": 0, "contribution_samples": 0},
    "and contributions": {"figures_every_n_epochs": 0, "faithfulness_every_n_epochs": 0},
    "and faithfulness": {"figures_every_n_epochs": 0},
    "defaults": {},
}
"""The callback's settings, from the least to all."""

PLAIN = "the same without the callback"


class EndTimed(AttentionExplainabilityCallback):
    """The callback, with the time that the end of a fit takes it.

    Attributes
    ----------
    end_seconds
        What it does after the last epoch.
    """

    end_seconds = 0.0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._time(super().on_train_end, trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._time(super().on_fit_end, trainer, pl_module)

    def _time(self, hook: Callable[..., object], *args: Any) -> None:
        start = time.perf_counter()
        hook(*args)
        self.end_seconds += time.perf_counter() - start


def validate(module: LightningModule, loader: Any, *callbacks: Callback) -> None:
    """A validation with a logger, to which figures go."""
    with models.quietly(), tempfile.TemporaryDirectory() as folder:
        models.make_trainer(*callbacks, logger=TensorBoardLogger(folder)).validate(module, loader, verbose=False)


def fit(callback: Callback | None = None) -> None:
    """The quick start's fit of eight epochs."""
    seed_everything(0, verbose=False)
    with models.quietly(), tempfile.TemporaryDirectory() as folder:
        callbacks = () if callback is None else (callback,)
        trainer = models.make_trainer(*callbacks, logger=TensorBoardLogger(folder), max_epochs=8)
        trainer.fit(quick_start.Matching(), *prepared.quick_start_loaders())


def _measure_validations(
    seconds: float, prepare: Callable[[], tuple[LightningModule, Any]], find_target: Callable[[Any], Tensor]
) -> list[Measured]:
    """Validations with parts of the callback, and with a hook that one would write, over one without."""
    module, loader = prepare()
    hook = HandWrittenHook(find_target)

    def watched(settings: dict[str, Any]) -> None:
        validate(module, loader, AttentionExplainabilityCallback(**settings))

    runs = [partial(watched, settings) for settings in PARTS.values()]
    plain, hooked, *parts = times_within(
        seconds, lambda: validate(module, loader), lambda: validate(module, loader, hook), *runs
    )
    turns = len(plain)
    ratios = [Measured(quartiles_of_ratios(one, plain), turns) for one in parts]
    count = sum(map(len, hook.found.values()))
    return [
        *ratios,
        Measured(quartiles_of_ratios(hooked, plain), turns, f"gives {count} numbers"),
        Measured(quartiles_of_ratios(parts[0], hooked), turns, f"gives {_count_numbers(module, loader):,} numbers"),
    ]


def _count_numbers(module: LightningModule, loader: Any) -> int:
    """How many numbers a validation's history has of attention and probes."""
    callback = AttentionExplainabilityCallback(**PARTS["attention alone"], curves="all")
    validate(module, loader, callback)
    return sum(isinstance(one, float) for record in callback.history for one in record.values())


def _plan_validations(model: str, samples: str) -> tuple[Row, ...]:
    return (
        *(plan(model, f"validate: {part}", PLAIN, samples) for part in PARTS),
        plan(model, "validate: entropy by class, a hand-written hook in numpy", PLAIN, samples),
        plan(model, "validate: attention alone", "the hand-written hook", samples),
    )


def _prepare_reference() -> tuple[LightningModule, Any]:
    return prepared.reference_model(), prepared.reference_loader()


def _prepare_quick_start() -> tuple[LightningModule, Any]:
    return prepared.quick_start_model(), prepared.quick_start_loaders()[1]


def _measure_fits(seconds: float) -> list[Measured]:
    """Fits with parts of the callback over one without it."""
    ends = []

    def watched(settings: dict[str, Any]) -> None:
        callback = EndTimed(**settings)
        fit(callback)
        if not settings:
            ends.append(callback.end_seconds)

    chosen = [PARTS[name] for name in ("attention alone", "and faithfulness", "defaults")]
    plain, *parts = times_within(seconds, fit, *(partial(watched, settings) for settings in chosen))
    turns = len(plain)
    ends = ends[1:]  # the first is that of the turn which warms up
    without_end = [a - b for a, b in zip(parts[-1], ends, strict=True)]
    ratios = [quartiles_of_ratios(one, plain) for one in (*parts, without_end)]
    return [*(Measured(one, turns) for one in ratios), Measured(quartiles(ends), turns)]


def _measure_captum(seconds: float) -> list[Measured] | str:
    """A validation, and then captum's Shapley values of the samples that the callback permutes, over a validation."""
    if importlib.util.find_spec("captum") is None:
        return 'captum is not installed: pip install -e ".[dev]"'
    module, loader = _prepare_quick_start()
    callback = AttentionExplainabilityCallback(**PARTS["and contributions"])
    validate(module, loader, callback)
    fusion = callback.fusion_summaries["val"]
    permuted = fusion.numbers["phi/image"].isfinite()
    places = fusion.sample_numbers[permuted]
    image, text, _ = (one[places] for one in loader.dataset.tensors)
    shares: dict[str, float] = {}

    def by_captum(method: str) -> None:
        validate(module, loader)
        with models.quietly():
            phi = captum_contributions(module.eval(), image, text, method).mean(0)
        shares[method] = float(phi[0] / phi.sum())

    def by_callback() -> None:
        validate(module, loader, AttentionExplainabilityCallback(**PARTS["and contributions"]))

    methods = ("ShapleyValueSampling", "ShapleyValues")
    plain, ours, *theirs = times_within(
        seconds, lambda: validate(module, loader), by_callback, *(partial(by_captum, one) for one in methods)
    )
    found = [(ours, fusion.share("image").mean)]
    found += [(one, shares[method]) for one, method in zip(theirs, methods, strict=True)]
    samples = f"{len(image)} samples x {PARTNERS} partners"
    return [
        Measured(quartiles_of_ratios(one, plain), len(plain), f"{samples}; share of the image {share:.3f}")
        for one, share in found
    ]


SMALL = "the quick start's 500 samples in batches of 64, 12 x 8 tokens, 1 head"
MIDDLE = (
    f"the reference model's {prepared.RECORDINGS} recordings in batches of {prepared.BATCH}, 9 x 119 windows, 8 heads"
)
FIT = "the quick start's 8 epochs of 2,000 and 500 samples in batches of 64"

BENCHMARKS = (
    Benchmark(
        _plan_validations("small", SMALL),
        partial(_measure_validations, prepare=_prepare_quick_start, find_target=lambda batch: batch[2]),
        seconds=30,
    ),
    Benchmark(
        (
            plan("small", "validate: contributions, the callback with attention", PLAIN, SMALL),
            plan("small", "validate: contributions, captum's ShapleyValueSampling", PLAIN, SMALL),
            plan("small", "validate: contributions, captum's ShapleyValues", PLAIN, SMALL),
        ),
        _measure_captum,
        seconds=20,
    ),
    Benchmark(
        (
            plan("small", "fit: attention alone", PLAIN, FIT),
            plan("small", "fit: without figures", PLAIN, FIT),
            plan("small", "fit: defaults", PLAIN, FIT),
            plan("small", "fit: defaults, less what its end draws", PLAIN, FIT),
            plan("small", "fit: what its end draws", "nothing", FIT, "s"),
        ),
        _measure_fits,
        seconds=60,
    ),
    Benchmark(
        _plan_validations("middle", MIDDLE),
        partial(
            _measure_validations,
            prepare=_prepare_reference,
            find_target=lambda batch: torch.as_tensor(batch["targets"]).argmax(1),
        ),
        seconds=90,
    ),
)
