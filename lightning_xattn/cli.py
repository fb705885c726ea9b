"""The command ``lightning-xattn``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_xattn import XAttnError, __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status (1: bad input or a full disk, said in one line)."""
    parser = argparse.ArgumentParser(prog="lightning-xattn", description="See how modalities attend to each other.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train the reference EEG and spectrogram model with the callback attached",
        description="Simulate recordings, train the reference model with AttentionExplainabilityCallback attached, "
        "test it, and leave TensorBoard logs, PNG figures and a summary.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--data", metavar="DIR", help="recordings in the layout of the HMS competition")
    demo.add_argument(
        "--train-on",
        choices=("simulated", "data"),
        default="simulated",
        help="with --data: train on simulated recordings and validate and test on DIR, or do all three on DIR",
    )
    demo.add_argument("--out", metavar="DIR", default="xattn-demo", help="where everything is written")
    demo.add_argument("--samples", type=int, default=240, help="how many recordings to simulate")
    demo.add_argument("--epochs", type=int, default=10, help="how long to train")
    demo.add_argument("--seed", type=int, default=0, help="of the simulation, the folds and the weights")
    options = vars(parser.parse_args(arguments))
    options.pop("command")
    try:
        from lightning_xattn.hms.demo import run_demo

        run_demo(**options)
    except (XAttnError, ModuleNotFoundError, OSError) as error:
        print(f"lightning-xattn demo: {error}", file=sys.stderr)
        return 1
    return 0
