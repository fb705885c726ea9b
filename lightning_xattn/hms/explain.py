"""Explain a trained checkpoint on a folder of recordings: report, figures and table, for all and for single ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from lightning_xattn.core.errors import DataError
from lightning_xattn.core.names import clean
from lightning_xattn.core.progress import timed, track
from lightning_xattn.evaluation.results import DatasetResult, ExplainedBatch
from lightning_xattn.explainer import ExplainabilityCapture, load_checkpoint, training_data
from lightning_xattn.explainer.command import save_found_probes
from lightning_xattn.hms.datamodule import HMSDataModule
from lightning_xattn.hms.dataset import HMSDataset
from lightning_xattn.hms.module import HMSLightningModule
from lightning_xattn.hms.montage import (
    EEG_RATE,
    ELECTRODES,
    REGION_NAMES,
    REGIONS,
    SPEC_FREQUENCIES,
    SPEC_ROW_SECONDS,
    SPEC_SECONDS,
    Montage,
    require_montage,
)
from lightning_xattn.hms.recording_plots import Spectrograms, Traces
from lightning_xattn.hms.signal_plots import plot_attention_over_signals
from lightning_xattn.report import create_explainability_report, print_report, save_dataset_figures
from lightning_xattn.visualizations import (
    plot_cross_modal_attention,
    plot_modality_alignment,
)

DRAWN = 12
"""How many recordings without labels are drawn."""


def run_explain(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    montage: Montage = "bipolar",
    trust_checkpoint: bool = False,
    probes: str | Path | None = None,
) -> Path:
    """Explain every recording of a folder, and draw one correct and one incorrect prediction of each class.

    Parameters
    ----------
    checkpoint
        Of ``HMSLightningModule``.
    data
        Folder in the layout of the HMS competition. Rows that cannot be used are left out, with a warning.
    out
        Gets ``report.html``, ``.md`` and ``.json``, ``figures/`` of all recordings, ``samples/<label_id>/``
        and ``samples.md`` of those that are drawn, ``table/`` with one row per recording, and ``features/``.
    montage
        How the EEG is drawn, see ``plot_attention_over_signals``. Bipolar by default, as the clinic reads EEG.
    trust_checkpoint
        Whether code in the checkpoint may run, see ``load_checkpoint``.
    probes
        ``probes.pt`` of an earlier run on labelled recordings, for recordings without labels: votes are not read.

    Returns ``out``. Raises ``DataError`` or ``SettingError`` if the checkpoint is none, of another architecture, or
    needs ``trust_checkpoint``, if ``data`` has no usable recording, or if there is no such montage.
    """
    require_montage(montage)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; expected a folder, or a name for a new one.")
    module = load_checkpoint(HMSLightningModule, checkpoint, trust_checkpoint)
    datamodule = HMSDataModule(
        data, test_data=data, cache_dir=out / "features", on_bad_row="skip", labelled=probes is None
    )
    explainer = ExplainabilityCapture(module, axes=datamodule.attention_axes)
    loader = datamodule.test_dataloader()
    explained = explainer.explain_loader(loader, table=out / "table", probes=probes)
    explained = replace(explained, trained_on=training_data(checkpoint))
    if probes is None:
        save_found_probes(explainer, explained, out)
    for suffix in (".md", ".json"):
        create_explainability_report(explained, out / f"report{suffix}")
    with timed("Drawing figures"):
        save_dataset_figures(explained, out / "figures")

    dataset = loader.dataset
    assert isinstance(dataset, HMSDataset)
    chosen = _choose_samples(explained, out / "table/attention")
    results = explainer.explain_batch(dataset.__getitems__(chosen), among=explained)
    for sample, place in zip(results["per_sample_explanations"], chosen, strict=True):
        sample["sample_idx"] = place  # in the data, as in the table
    create_explainability_report(results, out / "samples.md")
    pictures: dict[str, list[Path]] = {}
    for i, sample in enumerate(track(results["per_sample_explanations"], f"Drawing {len(chosen)} recordings")):
        _draw_sample(results, i, datamodule, out / "samples", montage)
        # Only the signals: the page has the maps already.
        signals = out / "samples" / str(sample["sample_id"]) / "signals.png"
        pictures[str(sample["sample_id"])] = [signals] if signals.exists() else []
    with timed("Writing the report"):
        create_explainability_report(explained, out / "report.html", pictures=pictures)
    print()
    print_report(explained)
    print()
    print(clean(f"{len(chosen)} recordings are drawn in {out / 'samples'} and described in {out / 'samples.md'}."))
    print(clean(f"All of it, to open in a browser: {out / 'report.html'}"))
    return out


def _choose_samples(explained: DatasetResult, table: Path) -> list[int]:
    """Positions of the first correct and the first incorrect prediction of each class, in the order of the data.

    Samples whose contributions are known come first. Without labels the first `DRAWN` recordings are chosen.
    """
    columns = pq.read_table(table, columns=["sample_idx", "target", "correct"]).to_pydict()
    known: set[int] = set()
    if explained.fusion is not None and not explained.fusion.contribution_problem:
        known = set(explained.fusion.sample_numbers[explained.fusion.numbers["phi/eeg"].isfinite()].tolist())
    if not any(one is not None for one in columns["correct"]):
        return sorted(columns["sample_idx"])[:DRAWN]
    first: dict[tuple[int | None, bool | None], int] = {}
    rows = sorted(zip(*columns.values(), strict=True), key=lambda row: (row[0] not in known, row[0]))
    for place, target, correct in rows:
        first.setdefault((target, correct), place)
    return sorted(first.values())


def _draw_sample(results: ExplainedBatch, i: int, datamodule: HMSDataModule, folder: Path, montage: Montage) -> None:
    sample, pair, axes = results["per_sample_explanations"][i], results["attention"][0], results["axes"]
    recordings, geometry = datamodule.test_recordings, datamodule.eeg_geometry
    assert sample["sample_id"] is not None
    row = recordings.by_label_id[int(sample["sample_id"])]
    folder = folder / str(row.label_id)
    context = (
        f"recording {row.label_id}, predicted {sample['predicted_name']} ({sample['confidence']:.2f}), "
        f"true {sample['true_name']}"
    )
    regions = [REGION_NAMES[region] for region in REGIONS]
    plot_attention_over_signals(
        Traces(recordings.eeg(row, geometry), EEG_RATE, ELECTRODES, -geometry.seconds / 2),
        Spectrograms(recordings.spectrogram(row), SPEC_ROW_SECONDS, regions, SPEC_FREQUENCIES, -SPEC_SECONDS / 2),
        pair,
        i,
        axes=axes,
        montage=montage,
        context=context,
        save_path=folder / "signals.png",
    )
    plot_cross_modal_attention(pair, i, axes=axes, context=context, save_path=folder / "attention.png")
    plot_modality_alignment(pair, i, axes=axes, context=context, save_path=folder / "alignment.png")
