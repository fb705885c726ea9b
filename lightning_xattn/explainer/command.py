"""``lightning-xattn explain`` of a model of your own: report, figures and table of its test data."""

from __future__ import annotations

import importlib
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
from lightning_xattn.core.progress import Stage
from lightning_xattn.explainer import ExplainabilityCapture, load_checkpoint, training_data
from lightning_xattn.report import create_explainability_report, print_report, save_dataset_figures


def explain_model(
    model: str, checkpoint: str | Path, datamodule: str, out: str | Path, trust_checkpoint: bool = False
) -> Path:
    """Explain every sample of a data module's test data.

    Parameters
    ----------
    model
        ``package.module:Class`` of the LightningModule. Its ``predict_step`` is run if it has one of its own, else its
        ``test_step``, its ``validation_step``, or ``model(batch)``.
    checkpoint
        Of that class.
    datamodule
        ``package.module:Class`` of a LightningDataModule that is made without arguments, or ``package.module:name`` of
        one that is made already.
    out
        Gets ``report.html``, ``.md`` and ``.json``, ``figures/`` and ``table/``.
    trust_checkpoint
        Whether code in the checkpoint may run, see ``load_checkpoint``.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    SettingError
        If one of the import paths leads nowhere, or the data module gives no test data, or several loaders.
    DataError
        If the checkpoint is none of the model, or needs ``trust_checkpoint``.
    """
    kind, data = _imported(model), _imported(datamodule)
    if not (isinstance(kind, type) and hasattr(kind, "load_from_checkpoint")):
        raise SettingError(f"Expected the import path of a LightningModule class; {model} is {shown(repr(kind))}.")
    module: LightningModule = load_checkpoint(kind, checkpoint, trust_checkpoint)
    loader, data = _test_loader(data, datamodule)
    out = Path(out)
    explainer = ExplainabilityCapture(module, predict=_run_step, axes=getattr(data, "attention_axes", None))
    explained = explainer.explain_loader(loader, table=out / "table")
    explained = replace(explained, trained_on=training_data(checkpoint))
    with Stage("Drawing figures"):
        save_dataset_figures(explained, out / "figures")
    with Stage("Writing the report"):
        for suffix in (".html", ".md", ".json"):
            create_explainability_report(explained, out / f"report{suffix}")
    print()
    print_report(explained)
    print()
    print(clean(f"All of it, to open in a browser: {out / 'report.html'}"))
    return out


def _test_loader(data: Any, name: str) -> tuple[Any, Any]:
    """The one loader of a data module's test data, and the data module."""
    try:
        data = data() if isinstance(data, type) else data
        data.prepare_data()
        data.setup("test")
        loader = data.test_dataloader()
    except (TypeError, AttributeError, MisconfigurationException) as error:
        raise SettingError(
            f"{name} gives no test data: {first_line(error)} Expected a LightningDataModule with test_dataloader(), "
            "made without arguments or already, as 'package.module:name'."
        ) from error
    if isinstance(loader, (list, tuple, dict)):
        raise SettingError(
            f"{name} has {len(loader)} test dataloaders, and one can be explained. Name a data module with that one."
        )
    return loader, data


def _run_step(module: Any, batch: Any) -> Any:
    for name in ("predict_step", "test_step", "validation_step"):
        if is_overridden(name, module, LightningModule):
            with warnings.catch_warnings():
                # What a step logs has no Trainer to go to.
                warnings.filterwarnings("ignore", message=".*trainer. reference is not registered")
                return getattr(module, name)(batch, 0)
    return module(batch)


def _imported(path: str) -> Any:
    place, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:  # where users' own modules are
        sys.path.insert(0, str(Path.cwd()))
    try:
        if not name:
            raise ValueError("there is no ':'")
        return getattr(importlib.import_module(place), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"Expected an import path such as 'package.module:Class'; got '{path}': {error}.") from error
