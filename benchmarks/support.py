"""Who supports a prediction, and what that adds to confidence, against earlier measurements.

``python -m benchmarks.support``: models of three seeds on real data (``benchmarks.real_data``) and on simulated
recordings (``benchmarks.simulated``), evaluated by ``explain_loader``. The first run takes about eight minutes on two
cores, later ones five.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import real_data, simulated
from benchmarks.real_data import RealData
from lightning_xattn import ExplainabilityCapture, functional
from lightning_xattn.evaluation.fusion_summary import FusionSummary
from lightning_xattn.evaluation.support import Cell
from lightning_xattn.functional.error_detection import AddedValue
from lightning_xattn.functional.intervals import Estimate
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from lightning_xattn.functional.probe import FOLDS
from lightning_xattn.hms import HMSLightningModule
from lightning_xattn.hms.montage import CLASSES

SEEDS = (0, 1, 2)

Runs = dict[str, list[FusionSummary]]
"""By data set, an evaluation for each seed."""

NATURAL, SHIFT = (f"HMS {test}" for test in simulated.TESTS)

PROBES = (
    ("digits", "upper", 0.89),
    ("digits", "lower", 0.90),
    ("watch by set", "acceleration", 0.77),
    ("watch by set", "rotation", 0.69),
)
"""Data, modality and the accuracy of its probe, as measured before."""

DELTAS = ((SHIFT, 0.205), ("watch by set", 0.036), ("digits", 0.022), (NATURAL, 0.0))
"""Data and what support added to the AUROC of errors."""

CELLS = {"both": (0.88, 1.0), "neither_agree": (0.13, 0.42), "neither_differ": (0.50, 0.68)}
"""The ranges of accuracies over all data sets."""

FITTED = (("confidence", "support"), ("confidence", "support", "conflict"))
"""The scores of error models that are fitted on natural recordings and applied under shift."""

GAP = (-0.6, -0.4)
"""The range of accuracy minus confidence where both probes agree with each other, and not with the model."""


def swap(data: RealData) -> RealData:
    """The same with the smaller part to train on, so that the test has more groups."""
    return RealData(data.names, data.classes, data.test, data.train)


REAL: dict[str, Callable[[], RealData]] = {
    "digits": real_data.load_digits,
    "watch by subject": lambda: swap(real_data.load_watch()),
    "watch by set": lambda: swap(real_data.load_watch(by_set=True)),
    "vowels": real_data.load_vowels,
}


def evaluate_real(data: RealData, seed: int) -> FusionSummary:
    """What the product finds in the test data, by a model of this seed."""
    first, second = data.names
    explainer = ExplainabilityCapture(
        real_data.train(data, seed),
        {f"{first}_to_{second}": "first_to_second", f"{second}_to_{first}": "second_to_first"},
        modalities={first: "first_encoder", second: "second_encoder"},
        contribution_samples=0,
        predict=lambda model, batch: model.test_step(batch, 0),
    )
    return _find_fusion(explainer, DataLoader(data.test, batch_size=64))


def evaluate_simulated(model: HMSLightningModule) -> list[FusionSummary]:
    """The same in both tests of recordings."""
    explainer = ExplainabilityCapture(model, contribution_samples=0)
    return [_find_fusion(explainer, simulated.load(test).test_dataloader()) for test in simulated.TESTS]


def _find_fusion(explainer: ExplainabilityCapture, loader: Iterable[object]) -> FusionSummary:
    fusion = explainer.explain_loader(loader, progress=False).fusion
    assert fusion is not None
    return fusion


def say(one: Estimate, sign: str = "") -> str:
    """An estimate and its 95 % CI."""
    return f"{one.mean:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"


def print_table(title: str, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A table in Markdown."""
    header = list(header)
    print(f"\n{title}\n| {' | '.join(header)} |\n{'| --- ' * len(header)}|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def print_accuracies(runs: Runs) -> None:
    """Of the probes, of the joint one and of the model."""
    rows = []
    for name, several in runs.items():
        for fusion in several:
            numbers = [f"right/{probe}" for probe in (*fusion.modalities, "joint")]
            rows.append((name, *(say(fusion.estimate(number)) for number in (*numbers, "correct"))))
    print_table("Accuracy", ("data", "first probe", "second probe", "joint probe", "model"), rows)


def print_cells(runs: Runs) -> None:
    """Share, accuracy, confidence and gap of each cell."""
    rows = []
    for name, several in runs.items():
        for cells in zip(*(fusion.cells for fusion in several), strict=True):
            samples = " + ".join(str(cell.samples) for cell in cells)
            rows.append((name, cells[0].key, samples, *map(_say_cell, cells)))
    header = ("data", "cell", "samples", *(f"seed {seed}" for seed in SEEDS))
    print_table("Share: accuracy at confidence, calibration gap with 95 % CI", header, rows)


def _say_cell(cell: Cell) -> str:
    gap = cell.calibration_gap
    means = f"{cell.share.mean:.2f}: {cell.accuracy.mean:.2f} at {cell.confidence.mean:.2f}"
    return f"{means}, {gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"


def print_added_value(runs: Runs) -> None:
    """What support adds to confidence."""
    rows = [(name, *_say_added_value(fusion.added_value)) for name, several in runs.items() for fusion in several]
    header = ("data", "wrong", "AUROC", "its difference", "difference in log loss", "support")
    print_table("Error detection by confidence → with support", header, rows)


def _say_added_value(one: AddedValue | str) -> tuple[str, ...]:
    if isinstance(one, str):
        return "", "", "", "", f"not computed: {one}"
    aurocs = f"{one.baseline_auroc:.3f} → {one.auroc:.3f}"
    differences = say(one.delta_auroc, "+"), say(one.delta_log_loss, "+")
    return str(one.wrong), aurocs, *differences, "adds" if one.adds else "not clear"


def print_transfer(models: list[HMSLightningModule], runs: Runs) -> None:
    """AUROC of errors under shift of scores, of error models fitted on natural recordings, and of their probes."""
    rows = []
    for model, natural, shift in zip(models, runs[NATURAL], runs[SHIFT], strict=True):
        scores, wrong, groups = _find_scores(shift)
        found = [-scores["confidence"], -scores["support"]]
        found += [_transfer_errors(natural, shift, names) for names in FITTED]
        rows.append([_say_auroc(score, wrong, groups) for score in found] + [_transfer_probes(model)])
    header = ("confidence", "support", *(f"fitted: {', '.join(names)}" for names in FITTED), "support by other probes")
    print_table("AUROC of errors under shift", header, rows)


def _say_auroc(score: Tensor, wrong: Tensor, groups: Tensor) -> str:
    auroc = functional.auroc_influence(score, wrong)
    return say(functional.estimate_by_influence(*auroc, groups, (0.0, 1.0)))


def _transfer_probes(model: HMSLightningModule) -> str:
    """AUROC of the support under shift by probes that have seen natural recordings alone."""
    shift, natural = (simulated.encode(model, test) for test in reversed(simulated.TESTS))
    target = torch.cat([shift.target, natural.target])
    # Shift is fold 0, so that natural recordings, the others, predict it.
    of_natural = 1 + functional.assign_folds(natural.group) % (FOLDS - 1)
    folds = torch.cat([torch.zeros_like(shift.target), of_natural])
    features = {
        name: torch.cat([functional.pooled_tokens(test.tokens[name]).flatten(1) for test in (shift, natural)])
        for name in shift.tokens
    }
    probes = functional.cross_fitted_probes(features, target, folds, len(CLASSES))
    logs = torch.stack([probes[name,].log_probabilities()[folds == 0] for name in features])
    support = functional.support(logs, shift.predicted)
    return _say_auroc(-support, shift.predicted != shift.target, shift.group)


def _find_scores(one: FusionSummary) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    known = ((one.outcomes == CORRECT) | (one.outcomes == INCORRECT)) & one.numbers["support"].isfinite()
    scores = {name: one.numbers[name][known] for name in ("confidence", "support", "conflict")}
    return scores, one.outcomes[known] == INCORRECT, one.groups[known]


def _transfer_errors(natural: FusionSummary, shift: FusionSummary, names: Sequence[str]) -> Tensor:
    """The probability of an error under shift, by an error model of natural recordings alone."""
    inputs, outcomes = [], []
    for one in (shift, natural):
        scores, wrong, _ = _find_scores(one)
        scores["confidence"] = scores["confidence"].clamp(1e-6, 1 - 1e-6).logit()
        inputs.append(torch.stack([scores[name] for name in names], dim=1))
        outcomes.append(wrong)
    # Two folds, each predicted by a fit of the other.
    folds = torch.arange(2).repeat_interleave(torch.tensor([len(wrong) for wrong in outcomes]))
    return functional.error_probabilities(torch.cat(inputs), torch.cat(outcomes), folds)[folds == 0]


def compare(runs: Runs) -> None:
    """Each earlier number beside those of now: in how many runs does the 95 % CI hold it?"""
    rows = []

    def add(data: str, what: str, low: float, high: float, estimates: list[Estimate]) -> None:
        known = [one for one in estimates if not math.isnan(one.low)]
        held = sum(one.low <= high and low <= one.high for one in known)
        before = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        now = ", ".join(f"{one.mean:.3f}" for one in estimates)
        rows.append((data, what, before, now, f"{held} of {len(known)}" if known else "no interval"))

    for data, modality, before in PROBES:
        add(data, f"probe/{modality}", before, before, [one.estimate(f"right/{modality}") for one in runs[data]])
    for data, before in DELTAS:
        values = [one.added_value for one in runs[data]]
        add(data, "delta AUROC", before, before, [one.delta_auroc for one in values if isinstance(one, AddedValue)])
    cells = {name: [{cell.key: cell for cell in one.cells} for one in several] for name, several in runs.items()}
    for key, before in (("only_eeg", 0.72), ("only_spec", 0.13)):
        add(SHIFT, f"accuracy, {key}", before, before, [one[key].accuracy for one in cells[SHIFT]])
    for data, several in cells.items():
        several = [one for one in several if one]
        for key, (low, high) in CELLS.items():
            add(data, f"accuracy, {key}", low, high, [one[key].accuracy for one in several])
        add(data, "gap, neither_agree", *GAP, [one["neither_agree"].calibration_gap for one in several])
    header = ("data", "number", "before", "now, each seed", "within the 95 % CI")
    print_table("Measured before, and now", header, rows)


def main() -> None:
    """Print all of it."""
    # Of a dozen small models: advice on loaders, and alarms of heads. Only the tables are of interest here.
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning_xattn"):
        logging.getLogger(name).setLevel(logging.ERROR)
    runs: Runs = {name: [evaluate_real(load(), seed) for seed in SEEDS] for name, load in REAL.items()}
    models = [simulated.train(seed) for seed in SEEDS]
    runs[NATURAL], runs[SHIFT] = map(list, zip(*map(evaluate_simulated, models), strict=True))
    for name, (one, *_) in runs.items():
        print(f"{name}: {one.samples} samples of {one.known_groups} groups, {one.n_classes} classes")
    print_accuracies(runs)
    print_cells(runs)
    print_added_value(runs)
    print_transfer(models, runs)
    compare(runs)


if __name__ == "__main__":
    main()
