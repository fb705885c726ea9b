"""``lightning-xattn explain`` for your own model: report, figures and table of its test data."""

from __future__ import annotations

import pkgutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_xattn.core.errors import SettingError
from lightning_xattn.core.names import clean, shown
from lightning_xattn.core.notices import first_line
from lightning_xattn.core.progress import timed
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.explainer import ExplainabilityCapture, load_checkpoint, training_data
from lightning_xattn.report import create_explainability_report, save_dataset_figures


def explain_model(
    model: str,
    checkpoint: str | Path,
    datamodule: str,
    out: str | Path,
    trust_checkpoint: bool = False,
    probes: str | Path | None = None,
) -> Path:
    """Explain every sample of a data module's test data; returns the folder with the report.

    Parameters
    ----------
    model
        ``package.module:Class`` of the LightningModule. The first of its own ``predict_step``, ``test_step`` and
        ``validation_step`` runs, else ``model(batch)``.
    checkpoint
        Of that class.
    datamodule
        ``package.module:Class`` of a LightningDataModule that takes no arguments, or ``package.module:name`` of an
        instance.
    out
        Gets ``report.html``, ``.md`` and ``.json``, ``figures/`` and ``table/``, and of labelled data ``probes.pt``.
    trust_checkpoint
        Whether code in the checkpoint may run, see ``load_checkpoint``.
    probes
        ``probes.pt`` of labelled data, for data without labels.

    Raises
    ------
    SettingError
        If an import path is wrong, or the data module has no test data, or several test loaders.
    DataError
        If the checkpoint is not one of the model, or needs ``trust_checkpoint``.
    """
    kind, data = _import(model), _import(datamodule)
    if not (isinstance(kind, type) and hasattr(kind, "load_from_checkpoint")):
        raise SettingError(f"Expected the import path of a LightningModule class; {model} is {shown(repr(kind))}.")
    module: LightningModule = load_checkpoint(kind, checkpoint, trust_checkpoint)
    loader, data = _test_loader(data, datamodule)
    out = Path(out)
    explainer = ExplainabilityCapture(module, predict=_run_step, axes=getattr(data, "attention_axes", None))
    explained = explainer.explain_loader(loader, table=out / "table", probes=probes)
    if probes is None:
        save_found_probes(explainer, explained, out)
    explained = replace(explained, trained_on=training_data(checkpoint))
    with timed("Drawing figures"):
        save_dataset_figures(explained, out / "figures")
    with timed("Writing the report"):
        for suffix in (".html", ".json"):
            create_explainability_report(explained, out / f"report{suffix}")
    print(f"\n{create_explainability_report(explained, out / 'report.md')}")
    print(clean(f"Report with figures and samples, for a browser: {out / 'report.html'}"))
    return out


def save_found_probes(explainer: ExplainabilityCapture, explained: DatasetResult, out: Path) -> None:
    """Write ``probes.pt``, if the data have labels and each modality has a probe."""
    if explained.fusion is not None and not explained.fusion.support_problem:
        explainer.save_probes(explained, out / "probes.pt")


def _test_loader(data: Any, name: str) -> tuple[Any, Any]:
    """The only test loader of a data module, and the data module."""
    try:
        data = data() if isinstance(data, type) else data
        data.prepare_data()
        data.setup("test")
        loader = data.test_dataloader()
    except (TypeError, AttributeError, MisconfigurationException) as error:
        raise SettingError(
            f"{name} gives no test data: {first_line(error)} Expected a LightningDataModule with test_dataloader(): a "
            "class that takes no arguments, or an instance."
        ) from error
    if isinstance(loader, (list, tuple, dict)):
        raise SettingError(
            f"{name} has {len(loader)} test dataloaders; expected one. Name a data module that has only that one."
        )
    return loader, data


def _run_step(module: Any, batch: Any) -> Any:
    for name in ("predict_step", "test_step", "validation_step"):
        if is_overridden(name, module, LightningModule):
            with warnings.catch_warnings():
                # The step logs without a Trainer.
                warnings.filterwarnings("ignore", message=".*trainer. reference is not registered")
                return getattr(module, name)(batch, 0)
    return module(batch)


def _import(path: str) -> Any:
    if str(Path.cwd()) not in sys.path:  # where users' own modules are
        sys.path.insert(0, str(Path.cwd()))
    try:
        if not path.partition(":")[2]:
            raise ValueError("there is no ':' with a name behind it")
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"Expected an import path such as 'package.module:Class'; got '{path}': {error}.") from error
