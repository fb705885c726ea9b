"""How often the 95 % CI of a proportion holds the truth, samples of one group being alike.

``python -m benchmarks.coverage``: a table, each row of 2,000 simulated evaluations (two minutes). A group's own
proportion is drawn from a beta distribution, so that samples of one group correlate by ``intraclass``.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import t

from lightning_xattn.functional import grouped_mean_interval, grouped_proportion_interval

RUNS = 2_000
SIZES = ((5, 10), (10, 10), (20, 20))
SHARES = (0.5, 0.8, 0.9, 0.95, 0.98)
CORRELATIONS = (0.0, 0.1, 0.3, 0.5)


def always_with_design_effect(counts: torch.Tensor, successes: torch.Tensor) -> tuple[float, float]:
    """The same interval, but with a design effect wherever there is one, also of errors in a single group."""
    groups, n = len(counts), float(counts.sum())
    share = float(successes.sum()) / n
    effective = float(groups)
    if 0 < share < 1:
        variance = groups / (groups - 1) * float((successes - counts * share).square().sum()) / n**2
        effective = n / max(1.0, variance * (n - 1) / (share * (1 - share)))
    q = float(t.ppf(0.975, groups - 1))
    centre, half = (
        share + q**2 / (2 * effective),
        q * (share * (1 - share) / effective + (q / 2 / effective) ** 2) ** 0.5,
    )
    return (centre - half) / (1 + q**2 / effective), (centre + half) / (1 + q**2 / effective)


WAYS = (grouped_proportion_interval, always_with_design_effect, grouped_mean_interval)


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    print("groups x samples | share | intraclass | " + " | ".join(f"{way.__name__} % (median width)" for way in WAYS))
    for groups, size in SIZES:
        counts = torch.full((groups,), float(size), dtype=torch.float64)
        for share in SHARES:
            for intraclass in CORRELATIONS:
                held, widths = np.zeros(len(WAYS)), np.zeros((RUNS, len(WAYS)))
                for run in range(RUNS):
                    own = np.full(groups, share)
                    if intraclass:
                        strength = 1 / intraclass - 1
                        own = rng.beta(share * strength, (1 - share) * strength, groups)
                    successes = torch.as_tensor(rng.binomial(size, own), dtype=torch.float64)
                    for i, way in enumerate(WAYS):
                        low, high = way(counts, successes)
                        held[i] += low <= share <= high
                        widths[run, i] = high - low
                cells = [
                    f"{100 * of / RUNS:.1f} ({width:.2f})" for of, width in zip(held, np.median(widths, 0), strict=True)
                ]
                print(f"{groups} x {size} | {share} | {intraclass} | {' | '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
