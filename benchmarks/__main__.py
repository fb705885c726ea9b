"""What watching costs, in one table of ratios that are measured side by side: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks import batch_statistics, explain, gpu, memory, trainers
from benchmarks.table import COSTS, Benchmark, Row, describe_machine, format_row, make_table, write_table

BENCHMARKS: tuple[Benchmark, ...] = (
    *batch_statistics.BENCHMARKS,
    *trainers.BENCHMARKS,
    *explain.BENCHMARKS,
    *memory.BENCHMARKS,
    *gpu.BENCHMARKS,
)
"""All rows of the table, in its order."""


def main() -> None:
    """Measure, print the table, and put it into the documentation where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the table into {COSTS.name}")
    parser.add_argument("--only", default="", help="measure the benchmarks of which a row has this in its name")
    parser.add_argument("--seconds", type=float, help="how long each benchmark measures; none: as long as it needs")
    chosen = parser.parse_args()
    if chosen.write and chosen.only:
        parser.error("--write takes the whole table")
    rows: list[Row] = []
    print(f"{describe_machine()}\n\n{make_table([])}", flush=True)
    for one in BENCHMARKS:
        if any(chosen.only in " ".join(row.cells) for row in one.rows):
            start = time.perf_counter()
            measured = one.run(chosen.seconds)
            took = time.perf_counter() - start
            print(f"{took:5.0f} s  {one.rows[0].model}: {one.rows[0].what}", file=sys.stderr, flush=True)
            for row in measured:
                print(format_row(row.cells), flush=True)
            rows += measured
    if chosen.write:
        write_table(rows)


if __name__ == "__main__":
    main()
