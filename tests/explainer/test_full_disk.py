"""A disk that is full while figures, tables and reports are written: training goes on, and no file is half there."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

# No file may grow beyond a limit. The system then refuses to write on, as on a full disk, and it needs no rights.
RUN = """
import contextlib, resource, signal, sys, warnings
from pathlib import Path
from pytorch_lightning.loggers import CSVLogger
from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture
from lightning_xattn.core.errors import XAttnWarning
from tests.toy import ToyModule, quiet_trainer, run_toy, toy_loader

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

@contextlib.contextmanager
def no_file_beyond(limit):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

def run(folder, limit):
    callback = AttentionExplainabilityCallback(table=folder / "table", contribution_samples=0)
    logger = CSVLogger(folder, name="", version="csv")
    trainer = quiet_trainer(logger=logger, callbacks=[callback], num_sanity_val_steps=0)
    with no_file_beyond(limit), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(ToyModule(), toy_loader(), toy_loader(seed=1))
        trainer.test(trainer.model, toy_loader(seed=2), verbose=False)
    assert [record["stage"] for record in callback.history] == ["val", "test"]
    (folder / "said").write_text("\\n".join(str(w.message) for w in caught if issubclass(w.category, XAttnWarning)))

folder = Path(sys.argv[1])
run(folder / "everything", 5_000)
run(folder / "page", 300_000)
with no_file_beyond(5_000):
    try:
        ExplainabilityCapture(ToyModule(), predict=run_toy).explain_loader(toy_loader(), folder / "explained")
    except OSError as error:
        print(error.errno)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The folder in which three runs wrote, and what the last of them printed."""
    folder = tmp_path_factory.mktemp("full")
    command = [sys.executable, "-c", RUN, str(folder)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout


NOTHING_MORE = "and gets nothing more of this evaluation"
TABLE, PICTURES = "The sample table in", f"CSVLogger failed with pictures, {NOTHING_MORE}"


@pytest.mark.parametrize(
    ("full", "expected", "suffixes"),
    [
        # The fit has pictures in its epoch and at its end.
        ("everything", [TABLE, PICTURES, PICTURES, TABLE, PICTURES], [".csv"]),
        ("page", [f"CSVLogger failed with reports, {NOTHING_MORE}"] * 2, [".csv", ".md", ".parquet", ".png"]),
    ],
)
def test_training_goes_on_and_files_are_complete_or_absent(full, expected, suffixes, ended):
    folder = ended[0] / full
    said = [line for line in (folder / "said").read_text().splitlines() if "too large" in line]
    assert len(said) == len(expected)
    for line, beginning in zip(said, expected, strict=True):
        assert line.startswith(beginning)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "said"]
    assert sorted({path.suffix for path in files}) == suffixes
    assert not [path for path in files if path.name.startswith(".")], "nothing is half there"
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".parquet":
            assert len(pd.read_parquet(path)) == 23


def test_a_table_of_the_explainer_is_reported_and_leaves_nothing(ended):
    folder, printed = ended
    assert printed.splitlines()[-1] == "27", "OSError: [Errno 27] File too large"
    assert not [path for path in (folder / "explained").rglob("*") if path.is_file()]
