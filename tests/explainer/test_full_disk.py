"""A disk that is full while figures, tables and reports are written: training goes on, and no file is half there."""

import subprocess
import sys
import textwrap

import pandas as pd
import pytest
from PIL import Image

# No file may grow beyond a limit. The system then refuses to write on, as on a full disk, and it needs no rights.
RUN = textwrap.dedent("""
    import resource, signal, sys, warnings
    from pathlib import Path
    import torch
    from pytorch_lightning.loggers import CSVLogger
    from lightning_xattn import AttentionExplainabilityCallback
    from lightning_xattn.core.errors import XAttnWarning
    from tests.toy import ToyModule, quiet_trainer, toy_loader

    folder, limit = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    callback = AttentionExplainabilityCallback(table=folder / "table", contribution_samples=0)
    logger = CSVLogger(folder, name="", version="csv")
    trainer = quiet_trainer(logger=logger, callbacks=[callback], num_sanity_val_steps=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(ToyModule(), toy_loader(), toy_loader(seed=1))
        trainer.test(trainer.model, toy_loader(seed=2), verbose=False)
    assert [record["stage"] for record in callback.history] == ["val", "test"]
    for one in caught:
        if issubclass(one.category, XAttnWarning):
            print(one.message)
""")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "expected", "suffixes"),
    [
        (
            5_000,
            2 * ["The sample table in", "CSVLogger failed with pictures, and gets nothing more of this evaluation"],
            [".csv"],
        ),
        (
            300_000,
            ["CSVLogger failed with pages, and gets nothing more of this evaluation"],
            [".csv", ".md", ".parquet", ".png"],
        ),
    ],
    ids=["everything", "the page"],
)
def test_training_goes_on_and_files_are_complete_or_absent(limit, expected, suffixes, tmp_path):
    command = [sys.executable, "-c", RUN, str(tmp_path), str(limit)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stdout.splitlines() if "too large" in line]
    assert len(said) == len(expected)
    for line, beginning in zip(said, expected, strict=True):
        assert line.startswith(beginning)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted({path.suffix for path in files}) == suffixes
    assert not [path for path in files if path.name.startswith(".")], "nothing is half there"
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".parquet":
            assert len(pd.read_parquet(path)) == 23
