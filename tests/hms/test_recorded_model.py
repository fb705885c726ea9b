"""The reference model under the callback: its attention is found, and its outputs stay the same."""

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_xattn import AttentionExplainabilityCallback, AttentionRecorder
from lightning_xattn.hms import CLASSES, HMSDataModule, HMSLightningModule, simulate
from tests.toy import quiet_trainer

# An untrained model has heads that are uniform, and is warned of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(uniform attention|attend alike):lightning_xattn.XAttnWarning")


@pytest.fixture(scope="module")
def datamodule(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "hms"
    simulate(folder, 12, eeg_seconds=10)
    return HMSDataModule(folder, test_data=folder, batch_size=5, cache_dir=folder.parent / "features")


def validate(datamodule, **settings):
    torch.manual_seed(0)
    callback = AttentionExplainabilityCallback(curves="all")
    trainer = quiet_trainer(callbacks=[callback], **settings)
    trainer.validate(HMSLightningModule(), datamodule=datamodule, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if not value.isnan()}, callback


def test_attention_is_found_and_logged(datamodule):
    logged, callback = validate(datamodule)
    summary = callback.summaries["val"]
    assert {str(d): tuple(m.shape[1:]) for d, m in summary.maps.items()} == {
        "eeg_to_spec": (9, 119),
        "spec_to_eeg": (119, 9),
    }
    assert summary.samples == 12
    assert {f"xattn_alignment/val/{name}" for name in ("all", *CLASSES)} <= set(logged)
    assert {f"xattn_entropy/val/spec_to_eeg/head_{i}" for i in range(8)} <= set(logged)


@pytest.mark.slow
def test_figures_have_time_axes_in_seconds(datamodule, tmp_path, monkeypatch):
    from lightning_xattn.visualizations import epoch

    drawn = []
    monkeypatch.setattr(epoch, "place_tokens", lambda *args: drawn.append(args) or place(*args))
    from lightning_xattn.visualizations.drawing import place_tokens as place

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    validate(datamodule, logger=logger)
    logger.finalize("success")
    assert EventAccumulator(str(tmp_path / "run")).Reload().Tags()["images"] == [
        "xattn_about/val/overview",
        "xattn_contribution/val/shares",
        "xattn_map/val/eeg_to_spec",
        "xattn_map/val/spec_to_eeg",
        "xattn_entropy/val/by_head",
        "xattn_outcome/val/class_comparison",
    ]
    axes = {axis.title: axis.spans for *_, axis in drawn}
    assert axes["EEG window (s from the labelled moment)"][0] == (-5, -3)
    assert axes["Spectrogram window (s from the labelled moment)"][-1] == (290, 300)


def test_logits_are_bit_for_bit_those_without_recording(datamodule):
    module = HMSLightningModule().eval()
    batch = next(iter(datamodule.val_dataloader()))
    with torch.no_grad():
        expected = module(batch["eeg_graphs"], batch["spec_graphs"])
        with AttentionRecorder(module) as recorder:
            assert torch.equal(module(batch["eeg_graphs"], batch["spec_graphs"]), expected)
    assert [layer.name for layer in recorder.layers] == ["model.fusion"]
