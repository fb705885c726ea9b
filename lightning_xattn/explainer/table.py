"""The table of an explained data set: complete or absent, in the place of the one before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_xattn.core.errors import SettingError
from lightning_xattn.evaluation.fusion_samples import sample_columns
from lightning_xattn.evaluation.fusion_summary import FusionSummary

if TYPE_CHECKING:
    from lightning_xattn.evaluation.table import SampleTable

_NAME = "explained"
"""The names of the table's files begin with it."""


@contextmanager
def open_table(folder: Path) -> Iterator[SampleTable]:
    """Yield a table that nothing remains of if the run fails; the one that the folder has stays until ``close_table``.

    Raises
    ------
    SettingError
        If the folder holds Parquet files that are not from an explained data set.
    """
    # Imported here as it takes pyarrow.
    from lightning_xattn.evaluation.table import SampleTable

    others = sorted(path.name for path in folder.glob("**/*.parquet") if not path.name.startswith(_NAME))
    if others:
        raise SettingError(
            f"{folder} holds {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}, and not from explain_loader: "
            "a reader of the folder would mix two tables. Name another folder, or empty this one."
        )
    folder.mkdir(parents=True, exist_ok=True)  # fails here rather than when all is explained
    table = SampleTable(folder, _NAME, {})
    try:
        yield table
    except BaseException:
        table.discard()
        raise


def close_table(table: SampleTable, folder: Path, fusion: FusionSummary | None) -> None:
    """Let the table's files appear in the folder, with what is known of the samples now, and remove earlier ones."""
    earlier = list(folder.glob(f"*/{_NAME}*.parquet"))
    table.close([] if fusion is None else [sample_columns(fusion)])
    for path in earlier:
        path.unlink()
