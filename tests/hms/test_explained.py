"""The reference model explained offline, as the guide does it."""

import numpy as np
import pytest
import torch

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture
from lightning_xattn.attention_analysis import AttentionAnalyzer, head_wise_attention_analysis
from lightning_xattn.core.errors import DataError, SettingError
from lightning_xattn.hms import CLASSES, HMSDataModule, HMSLightningModule, simulate
from tests.explainer.test_explain_loader import assert_same_summary
from tests.explainer.test_explainer import assert_same
from tests.toy import quiet_trainer

# An untrained model has heads that are uniform, and is warned of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(uniform attention|attend alike):lightning_xattn.XAttnWarning")


@pytest.fixture(scope="module")
def datamodule(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "hms"
    simulate(folder, 12, eeg_seconds=10)
    return HMSDataModule(folder, test_data=folder, batch_size=5, cache_dir=folder.parent / "features")


@pytest.fixture
def batch(datamodule):
    return next(iter(datamodule.test_dataloader()))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    module = HMSLightningModule()
    # Attention as after some training.
    for attention in (module.model.fusion.eeg_to_spec_attn, module.model.fusion.spec_to_eeg_attn):
        torch.nn.init.normal_(attention.in_proj_weight, std=0.2)
    return module


def test_callback_and_explainer_agree(model, datamodule):
    callback = AttentionExplainabilityCallback()
    quiet_trainer(callbacks=[callback]).validate(model, datamodule=datamodule, verbose=False)
    explained = ExplainabilityCapture(model, num_heads=8).explain_loader(datamodule.val_dataloader())
    assert_same_summary(explained.headline, callback.summaries["val"])
    assert explained.class_names == CLASSES
    assert list(explained.summaries) == ["model.fusion"]


def test_a_batch_with_ids_probabilities_and_places_in_seconds(model, datamodule, batch):
    results = ExplainabilityCapture(model, axes=datamodule.attention_axes).explain_batch(batch)
    with torch.no_grad():
        logits = model.eval()(batch["eeg_graphs"], batch["spec_graphs"])
    assert torch.equal(results["logits"], logits)
    assert results["targets"].tolist() == batch["targets"].argmax(1).tolist()
    axes = datamodule.attention_axes
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
    """Example 3, 4, 5 and the advanced usage of the guide, word by word where they compute something."""
    explainer = ExplainabilityCapture(model, num_heads=8)
    all_results = []
    for _ in range(2):
        with torch.no_grad():
            results = explainer.explain_batch(batch)
        all_results.append(results)
    correct_samples, all_explanations = [], []
    for results in all_results:
        for expl in results["per_sample_explanations"]:
            all_explanations.append(expl)
            if expl["correct"]:
                correct_samples.append(expl)
    assert len(all_explanations) == 10
    assert np.isfinite(np.mean([s["modality_agreement"] for s in all_explanations]))
    entropy = [np.mean(list(s["head_entropies"].values())) for s in all_explanations]
    assert all(0 <= value <= 1 for value in entropy)

    attention_dict = results["attention_dict"]
    head_analysis = head_wise_attention_analysis(results["attention_dict"], num_heads=8)
    for stats in head_analysis["eeg_to_spec"].values():
        assert f"{stats['specialization_score']:.4f}"
        assert len(stats["top_pairs"]) == 5
    analyzer = AttentionAnalyzer(num_heads=8)
    eeg_to_spec_weights = attention_dict["eeg_to_spec"]
    assert len(analyzer.get_top_attention_pairs(eeg_to_spec_weights, top_k=10)) == 10
    assert list(analyzer.compute_attention_entropy(eeg_to_spec_weights, per_head=True)) == list(range(8))
    stats = analyzer.analyze_attention_weights(eeg_to_spec_weights)
    assert f"{stats.mean:.4f} {stats.entropy:.4f} {stats.sparsity:.2f}%"
    assert stats["mean"] == stats.mean
    assert results["attention_stats"]["eeg_to_spec"] == stats
    agreement = analyzer.compare_modality_agreement(attention_dict["eeg_to_spec"], attention_dict["spec_to_eeg"])
    assert agreement == pytest.approx(results["modality_alignment"], abs=1e-6)
    assert attention_dict["eeg_to_spec"].cpu().numpy()[:, 0].shape == (5, 9, 119)


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
