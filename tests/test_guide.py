"""Every Python block of the guide runs on this package, after two replacements, in order and in one session."""

import re
import shutil

import pytest
import torch

from lightning_xattn import ExplainabilityCapture
from lightning_xattn.attention_analysis import AttentionStatistics
from lightning_xattn.hms import HMSDataModule, HMSLightningModule
from tests.conftest import IIIC_IRR
from tests.pictures import pixels_of, read_picture, shades_of

GUIDE = IIIC_IRR.parents[1] / "guide/cross_modal_attention_guide.md"
REPLACEMENTS = {"src.explainability": "lightning_xattn", "src.lightning_trainer": "lightning_xattn.hms"}


@pytest.fixture
def blocks(iiic_irr):
    text = GUIDE.read_text()
    for old, new in REPLACEMENTS.items():
        text = text.replace(old, new)
    # Those in the section on troubleshooting are indented by nothing, the last one by three spaces.
    found = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


# In the quick round tests/hms/test_explained.py computes what the guide computes.
@pytest.mark.slow
# The guide averages over the samples that are predicted as seizures, and there may be none.
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_the_guide_runs(blocks, hms_checkpoint, iiic_irr, tmp_path, monkeypatch, capsys):
    assert len(blocks) == GUIDE.read_text().count("```python") == 21
    monkeypatch.chdir(tmp_path)
    for name in ("hms-best.ckpt", "best.ckpt"):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        shutil.copy(hms_checkpoint, tmp_path / "checkpoints" / name)
    datamodule = HMSDataModule(iiic_irr, test_data=iiic_irr, batch_size=7, cache_dir=tmp_path / "cache")
    loader = datamodule.test_dataloader()
    model = HMSLightningModule.load_from_checkpoint(hms_checkpoint)
    explained = [ExplainabilityCapture(model).explain_batch(batch) for batch in loader]
    # What the guide takes for granted and defines nowhere.
    names = {
        "test_loader": loader,
        "all_explanations": [one for results in explained for one in results["per_sample_explanations"]],
        "attention_weights": explained[0]["attention_dict"]["eeg_to_spec"],
        "fusion": model.model.fusion,
        "eeg_features": torch.randn(2, 9, 256),
        "spec_features": torch.randn(2, 119, 256),
    }
    for i, code in enumerate(blocks):
        exec(compile(code, f"block {i} of the guide", "exec"), names)

    results, printed = names["results"], capsys.readouterr().out
    assert set(results) >= {
        *("logits", "predictions", "targets", "attention_dict", "attention_stats", "modality_alignment"),
        "per_sample_explanations",
    }
    assert results["attention_dict"]["eeg_to_spec"].shape[1:] == (8, 9, 119)
    assert isinstance(results["attention_stats"]["eeg_to_spec"], AttentionStatistics)
    assert len(names["test_explanations"]) == 20
    assert {len(sample["head_entropies"]) for sample in names["test_explanations"]} == {16}
    assert -1 <= results["modality_alignment"] <= 1
    for file in ("attention_sample_0.png", "modality_alignment.png"):
        assert shades_of(read_picture(tmp_path / file)) > 50
    heads = read_picture(tmp_path / "head_contributions.png")
    assert min(pixels_of(heads, colour) for colour in ("#00614A", "#E7B6D1")) > 1000  # the bars of both directions
    for words in ("BATCH-LEVEL STATISTICS", "PER-SAMPLE ANALYSIS", "Correct samples: avg modality agreement"):
        assert words in printed
    assert "Seizure class (n=" in printed
