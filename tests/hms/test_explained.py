"""The reference model under the callback and explained offline, as the guide does it."""

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger

from lightning_xattn import AttentionExplainabilityCallback, AttentionRecorder, ExplainabilityCapture
from lightning_xattn.attention_analysis import AttentionAnalyzer, head_wise_attention_analysis
from lightning_xattn.core.errors import DataError, SettingError
from lightning_xattn.hms import CLASSES, HMSLightningModule
from lightning_xattn.visualizations import epoch
from lightning_xattn.visualizations.drawing import place_tokens
from tests.explainer.test_explain_loader import assert_same_summary
from tests.explainer.test_explainer import assert_same
from tests.toy import quiet_trainer

# An untrained model has heads that are uniform, and is warned of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(uniform attention|attend alike):lightning_xattn.XAttnWarning")


@pytest.fixture
def batch(simulated):
    return next(iter(simulated.test_dataloader()))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    module = HMSLightningModule()
    # Attention as after some training.
    for attention in (module.model.fusion.eeg_to_spec_attn, module.model.fusion.spec_to_eeg_attn):
        torch.nn.init.normal_(attention.in_proj_weight, std=0.2)
    return module


def test_callback_and_explainer_agree(model, simulated):
    callback = AttentionExplainabilityCallback(curves="all")
    trainer = quiet_trainer(callbacks=[callback])
    trainer.validate(model, datamodule=simulated, verbose=False)
    assert {str(direction): tuple(maps.shape[1:]) for direction, maps in callback.summaries["val"].maps.items()} == {
        "eeg_to_spec": (9, 119),
        "spec_to_eeg": (119, 9),
    }
    logged = {f"xattn_alignment/val/{name}" for name in ("all", *CLASSES)}
    assert logged | {f"xattn_entropy/val/spec_to_eeg/head_{i}" for i in range(8)} <= set(trainer.callback_metrics)
    explained = ExplainabilityCapture(model, num_heads=8).explain_loader(simulated.val_dataloader())
    assert_same_summary(explained.headline, callback.summaries["val"])
    assert explained.headline.samples == 12
    assert explained.class_names == CLASSES
    assert list(explained.summaries) == ["model.fusion"]


def test_logits_are_bit_for_bit_those_without_recording(model, batch):
    with torch.no_grad():
        expected = model.eval()(batch["eeg_graphs"], batch["spec_graphs"])
        with AttentionRecorder(model) as recorder:
            assert torch.equal(model(batch["eeg_graphs"], batch["spec_graphs"]), expected)
    assert [layer.name for layer in recorder.layers] == ["model.fusion"]


@pytest.mark.slow
def test_figures_have_time_axes_in_seconds(model, simulated, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(epoch, "place_tokens", lambda *args: drawn.append(args) or place_tokens(*args))
    trainer = quiet_trainer(callbacks=[AttentionExplainabilityCallback()], logger=CSVLogger(tmp_path))
    trainer.validate(model, datamodule=simulated, verbose=False)
    axes = {args[3].title: args[3].spans for args in drawn}
    assert axes["EEG window (s from the labelled moment)"][0] == (-5, -3)
    assert axes["Spectrogram window (s from the labelled moment)"][-1] == (290, 300)


def test_a_batch_with_ids_probabilities_and_places_in_seconds(model, simulated, batch):
    results = ExplainabilityCapture(model, axes=simulated.attention_axes).explain_batch(batch)
    with torch.no_grad():
        logits = model.eval()(batch["eeg_graphs"], batch["spec_graphs"])
    assert torch.equal(results["logits"], logits)
    assert results["targets"].tolist() == batch["targets"].argmax(1).tolist()
    axes = simulated.attention_axes
    for i, sample in enumerate(results["per_sample_explanations"]):
        assert sample["sample_id"] == str(int(batch["sample_ids"][i]))
        assert sample["confidence"] == pytest.approx(float(logits[i].softmax(0).max()), abs=1e-6)
        assert (sample["true_name"], sample["predicted_name"]) == (
            CLASSES[batch["targets"][i].argmax()],
            CLASSES[logits[i].argmax()],
        )
        for pair in sample["top_attention_places"]["eeg_to_spec"]:
            assert pair["query_place"] == "{:g} to {:g}".format(*axes["eeg"].spans[pair["query"]])
            assert pair["key_place"] == "{:g} to {:g}".format(*axes["spec"].spans[pair["key"]])


def test_one_sample_however_it_is_cut_out(model, batch):
    callback = ExplainabilityCapture(model)
    whole = callback.explain_batch(batch)["per_sample_explanations"][3]
    sample = callback.explain_single_sample(batch, 3)
    guide = {
        "eeg_graphs": [g[[3]] for g in batch["eeg_graphs"]],
        "spec_graphs": [g[[3]] for g in batch["spec_graphs"]],
        "targets": batch["targets"][[3]],
    }
    (alone,) = callback.explain_batch(guide)["per_sample_explanations"]
    for name, value in whole.items():
        if name not in ("top_attention_pairs", "top_attention_places"):  # nearly equal weights may change places
            assert_same(value, sample[name], abs=1e-4)
            if name not in ("sample_idx", "sample_id"):
                assert_same(value, alone[name], abs=1e-4)
    assert ExplainabilityCapture(model).explain_single_sample(guide, 0)["sample_id"] is None


def test_the_guides_examples(model, batch):
    """What the guide computes of an explained batch with the analyser; test_guide.py runs all of it."""
    results = ExplainabilityCapture(model, num_heads=8).explain_batch(batch)
    weights = results["attention_dict"]
    assert weights["eeg_to_spec"].cpu().numpy()[:, 0].shape == (5, 9, 119)
    samples = results["per_sample_explanations"]
    assert np.isfinite([sample["modality_agreement"] for sample in samples]).all()
    assert all(0 <= np.mean(list(sample["head_entropies"].values())) <= 1 for sample in samples)
    heads = head_wise_attention_analysis(weights, num_heads=8)["eeg_to_spec"]
    assert all(f"{head['specialization_score']:.4f}" and len(head["top_pairs"]) == 5 for head in heads.values())
    analyzer = AttentionAnalyzer(num_heads=8)
    assert len(analyzer.get_top_attention_pairs(weights["eeg_to_spec"], top_k=10)) == 10
    assert list(analyzer.compute_attention_entropy(weights["eeg_to_spec"], per_head=True)) == list(range(8))
    stats = analyzer.analyze_attention_weights(weights["eeg_to_spec"])
    assert stats["mean"] == stats.mean
    assert results["attention_stats"]["eeg_to_spec"] == stats
    agreement = analyzer.compare_modality_agreement(weights["eeg_to_spec"], weights["spec_to_eeg"])
    assert agreement == pytest.approx(results["modality_alignment"], abs=1e-6)


def test_bad_input_is_named(model, batch, tmp_path):
    callback = ExplainabilityCapture(model)
    with pytest.raises(
        DataError, match=r"lacks \['eeg_graphs'\]; it holds \['patient_ids', 'sample_ids', 'spec_graphs', 'targets'\]"
    ):
        callback.explain_batch({name: value for name, value in batch.items() if name != "eeg_graphs"})
    with pytest.raises(SettingError, match="layer 'model.fusion': expected num_heads=4, but there are 8 heads"):
        ExplainabilityCapture(model, num_heads=4).explain_batch(batch)
    batch["eeg_graphs"][2].x[20] = torch.nan  # a node of the second graph
    with pytest.raises(DataError, match=rf"sample 1 \(id {int(batch['sample_ids'][1])}\) \(1 of 5\) are not finite"):
        callback.explain_batch(batch)
    with pytest.raises(DataError, match=r"Batch 1: .*lacks \['eeg_graphs', 'spec_graphs'\]"):
        callback.explain_loader([{**batch, "eeg_graphs": batch["eeg_graphs"][:2]}, {}], tmp_path)
