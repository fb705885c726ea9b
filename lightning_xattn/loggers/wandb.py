"""Weights & Biases."""

from __future__ import annotations

import html as escaping
from collections.abc import Mapping
from pathlib import Path

from lightning_xattn.loggers.writer import LoggerWriter, Picture


class WandbWriter(LoggerWriter):
    """Lightning's ``WandbLogger``, which sends each call as a step of its own: all pictures go in one."""

    def log_images(self, images: Mapping[str, Picture], step: int) -> None:
        """As media, in one call."""
        import wandb  # only where there is its logger

        self.logger.log_metrics({name: wandb.Image(picture) for name, picture in images.items()}, step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """As a panel that keeps its lines."""
        self.log_page(name, f"<pre>{escaping.escape(text)}</pre>", step)

    def log_page(self, name: str, html: str, step: int) -> None:
        """As a panel."""
        import wandb

        self.logger.log_metrics({name: wandb.Html(html)}, step)

    def log_table(self, name: str, path: Path, step: int) -> None:
        """As a table to filter and to sort."""
        import pyarrow.parquet as pq
        import wandb

        columns = pq.read_table(path).to_pydict()
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.logger.log_metrics({name: wandb.Table(columns=list(columns), data=rows)}, step)
