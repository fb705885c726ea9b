"""Do the tests notice a planted fault? ``python -m benchmarks.mutants`` runs a seeded sample of mutants by mutmut.

What is mutated and which tests must notice is ``[tool.mutmut]`` of ``pyproject.toml``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Generator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

DURATIONS = Path("mutmut-stats.json")
"""Where mutmut writes how long each test takes, in the folder that the tests of a mutant run in."""

QUICK, SLOW = 0.5, 10.0
"""Seconds. Of tests that take longer than the first, only the fastest run, which together take no longer than the
second: with all of them a mutant that survives takes minutes. All run where no quick one reaches a mutant."""

MADE_BY: dict[tuple[str, str], set[str]] = {}
"""The functions that ran while a fixture was made, by where it is from and its name."""

NOTICED = ("killed", "timeout")


def pytest_configure() -> None:
    """Do not look for the smallest example that fails: one is enough, and it takes a minute."""
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutants")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    """Remember what runs while a fixture is made: mutmut counts it for the first test alone that asks for it."""
    from mutmut.state import state

    reached = state()._stats
    before = set(reached)
    reached.clear()
    try:
        return (yield)
    finally:
        MADE_BY[fixturedef.baseid, fixturedef.argname] = set(reached)
        reached.update(before)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Count for each test what ran while its fixtures were made, just before mutmut takes down what it has reached."""
    from mutmut.state import state

    for (place, name), functions in MADE_BY.items():
        if name in getattr(item, "fixturenames", ()) and item.nodeid.startswith(place):
            state()._stats.update(functions)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the `QUICK` tests, the fastest file first: most mutants are noticed within a second.

    mutmut gives tests in no order. Those of a file stay together, as what they share is made once.
    """
    if not DURATIONS.exists():
        return
    seconds = json.loads(DURATIONS.read_text())["duration_by_test"]
    of_file: Counter[str] = Counter()
    for item in items:
        of_file[item.nodeid.split("::")[0]] += seconds.get(item.nodeid, 0)

    def place(item: pytest.Item) -> tuple[float, str, float]:
        file = item.nodeid.split("::")[0]
        return of_file[file], file, seconds.get(item.nodeid, 0)

    items.sort(key=place)
    slow = sorted(
        (item for item in items if seconds.get(item.nodeid, 0) >= QUICK), key=lambda item: seconds[item.nodeid]
    )
    quick = [item for item in items if item not in slow]
    if quick:
        together = accumulate(seconds[item.nodeid] for item in slow)
        items[:] = quick + [item for item, until in zip(slow, together, strict=True) if until <= SLOW]


def sample(seed: int, of_each_file: int) -> list[str]:
    """A sample of mutants: ``of_each_file``, and twice as many of a file in ``functional/``."""
    from mutmut.configuration import config
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name

    drawn: list[str] = []
    for path in sorted(path for pattern in config().only_mutate for path in Path().glob(pattern)):
        names = mutate_file_contents(str(path), path.read_text()).mutant_names
        wanted = of_each_file * (2 if path.parent.name == "functional" else 1)
        chosen = random.Random(f"{seed} {path}").sample(list(names), min(wanted, len(names)))
        drawn += [get_mutant_name(path, name) for name in chosen]
    return drawn


def main() -> None:
    """Draw a sample, run it, and print how many of each file were noticed, and the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of-each-file", type=int, default=12)
    options = parser.parse_args()
    drawn = sample(options.seed, options.of_each_file)
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    subprocess.run(["mutmut", "run", *drawn], check=True, env=os.environ | one_thread)
    listed = subprocess.run(["mutmut", "results", "--all", "true"], check=True, capture_output=True, text=True).stdout
    outcomes = dict(line.strip().split(": ") for line in listed.splitlines())
    total = Counter(name.split(".x")[0] for name in drawn)
    noticed = Counter(name.split(".x")[0] for name in drawn if outcomes[name] in NOTICED)
    for module, count in total.items():
        print(f"{noticed[module]:4} of {count:4} {module}")
    print(f"{noticed.total():4} of {total.total():4} ({noticed.total() / total.total():.1%}); the others:")
    print(*(f"mutmut show {name}  # {outcomes[name]}" for name in drawn if outcomes[name] not in NOTICED), sep="\n")


if __name__ == "__main__":
    main()
