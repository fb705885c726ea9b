"""The reference application: EEG and spectrogram of the Kaggle HMS task, from recordings to a trained model.

Needs the extra ``hms``: ``pip install "lightning-xattn[hms]"``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    import pyarrow as _pyarrow  # noqa: F401 - asked for here so that its absence is explained
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'lightning_xattn.hms reads recordings with pyarrow: pip install "lightning-xattn[hms]".', name="pyarrow"
    ) from error

from lightning_xattn.hms.datamodule import HMSDataModule
from lightning_xattn.hms.module import HMSLightningModule
from lightning_xattn.hms.montage import CLASSES
from lightning_xattn.hms.recordings import EEGGeometry, Recordings
from lightning_xattn.hms.simulator import simulate

if TYPE_CHECKING:
    from lightning_xattn.hms.recording_plots import Spectrograms, Traces
    from lightning_xattn.hms.signal_plots import plot_attention_over_signals
else:

    def __getattr__(name: str) -> Any:
        # matplotlib is imported only for figures.
        homes = {"Spectrograms": "recording_plots", "Traces": "recording_plots"}
        homes["plot_attention_over_signals"] = "signal_plots"
        if name in homes:
            return getattr(import_module(f"{__name__}.{homes[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CLASSES",
    "EEGGeometry",
    "HMSDataModule",
    "HMSLightningModule",
    "Recordings",
    "Spectrograms",
    "Traces",
    "plot_attention_over_signals",
    "simulate",
]
