"""The command ``lightning-xattn``."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from lightning_xattn import XAttnError, __version__
from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.progress import printed_times


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of the command; 1 after bad input or a full disk, which one line reports."""
    about = "Report what each modality predicts, contributes and attends to."
    parser = argparse.ArgumentParser(prog="lightning-xattn", description=about)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train the reference EEG and spectrogram model with the callback attached",
        description="Simulate EEG recordings, train the reference model with AttentionExplainabilityCallback attached, "
        "test it on recordings whose truth is known, and write TensorBoard logs and a report.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--data", metavar="DIR", help="recordings in the layout of the HMS competition")
    demo.add_argument(
        "--train-on",
        choices=("simulated", "data"),
        default="simulated",
        help="with --data: train on simulated recordings and test on DIR, or train and test on DIR",
    )
    demo.add_argument("--out", metavar="DIR", default="xattn-demo", help="folder for all results")
    demo.add_argument("--samples", type=int, default=160, help="number of recordings to simulate for training")
    demo.add_argument("--epochs", type=int, default=12, help="number of epochs")
    demo.add_argument("--seed", type=int, default=0, help="seed of the simulation, the folds and the weights")
    explain = commands.add_parser(
        "explain",
        help="explain a trained model on its test data, or the reference model on recordings",
        description="Write a report for a browser, figures and a table about a trained checkpoint. With --model and "
        "--datamodule: your own model, on its test data. With --data: the reference model, on every recording of a "
        "folder, with attention over the signals for one correct and one incorrect prediction of each class. Results "
        "of an earlier run in the same folder are replaced.",
    )
    explain.add_argument("--checkpoint", metavar="FILE", required=True, help="checkpoint of the model")
    explain.add_argument("--model", metavar="PATH", help="import path of your LightningModule: package.module:Class")
    explain.add_argument("--datamodule", metavar="PATH", help="import path of its LightningDataModule, for test data")
    explain.add_argument("--data", metavar="DIR", help="recordings in the layout of the HMS competition")
    explain.add_argument("--out", metavar="DIR", required=True, help="folder for all results")
    explain.add_argument(
        "--probes",
        metavar="FILE",
        help="probes.pt of an earlier run on labelled data: says who supports each prediction of data without labels",
    )
    explain.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load a checkpoint that holds objects, which runs code that the file's maker chose: only for files of "
        "people whose programs you would run",
    )
    explain.add_argument(
        "--montage",
        choices=("bipolar", "referential"),
        default="bipolar",
        help="with --data: draw the EEG in the longitudinal bipolar montage (default), or as recorded",
    )
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        with printed_times(), _quiet():
            if command == "demo":
                from lightning_xattn.hms.demo import run_demo

                run_demo(**options)
            else:
                _explain(**options)
    except (XAttnError, ModuleNotFoundError, OSError) as error:
        print(f"lightning-xattn {command}: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages of Lightning and torch that are for programmers."""
    import pytorch_lightning  # noqa: F401  # imported first, as it sets the level of its logger

    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # By module, so that our own warnings are shown.
            warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning[._](?!xattn)|lightning_fabric|torch")
            yield
    finally:
        logger.setLevel(level)


def _explain(
    checkpoint: str,
    out: str,
    data: str | None,
    model: str | None,
    datamodule: str | None,
    montage: Literal["bipolar", "referential"],
    trust_checkpoint: bool,
    probes: str | None,
) -> None:
    if data is not None and model is None and datamodule is None:
        from lightning_xattn.hms.explain import run_explain

        run_explain(checkpoint, data, out, montage, trust_checkpoint, probes)
    elif data is None and model is not None and datamodule is not None:
        from lightning_xattn.explainer.command import explain_model

        explain_model(model, checkpoint, datamodule, out, trust_checkpoint, probes)
    else:
        raise SettingError(
            "explain takes --model and --datamodule of your own model, or --data for the reference model."
        )


if __name__ == "__main__":
    sys.exit(main())
