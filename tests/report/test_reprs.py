"""Reprs are one line each."""

import re

import pytest
import torch

from lightning_xattn import AttentionExplainabilityCallback, AttentionRecorder, ExplainabilityCapture, TokenAxis
from lightning_xattn.attention_analysis import AttentionAnalyzer
from lightning_xattn.functional import Permutation, prepare_rows
from tests.toy import ToyModule, run_toy, toy_data, toy_loader, validate


@pytest.fixture(scope="module")
def explained():
    torch.manual_seed(0)
    return ExplainabilityCapture(ToyModule(), predict=run_toy, class_names=list("abcd")).explain_loader(toy_loader())


def test_reprs_are_one_line_each(explained, tmp_path):
    module, callback = ToyModule(), AttentionExplainabilityCallback()
    recorder = AttentionRecorder(module)
    with recorder:
        module(*toy_data(3)[:][:2])
    (pair,) = recorder.attention
    validate(module, callback)
    permute = Permutation(torch.arange(5), torch.arange(5), torch.rand(5, 2))
    expected = {
        pair.forward: "Attention(audio_to_text: 3 samples, 3 heads, 5 queries, 7 keys)",
        pair: f"AttentionPair('audio_to_text', {pair.forward!r}, {pair.backward!r})",
        prepare_rows(pair.forward): "Rows(audio_to_text: 3 samples, 3 heads, 5 queries, 7 keys)",
        permute: "Permutation(5 pairs, 2 classes)",
        recorder: "AttentionRecorder(ToyModule: layers audio_to_text)",
        callback: "AttentionExplainabilityCallback(classes_by='target'; recorded so far: val)",
        callback.summaries[
            "val"
        ]: "LayerSummary(23 samples, 4 classes; audio_to_text of 3 heads, text_to_audio of 3 heads)",
        callback.fusion_summaries["val"]: "FusionSummary(audio and text: 23 samples, 4 classes)",
        explained: "DatasetResult(23 samples, 4 classes; layers audio_to_text; modalities audio, text)",
        ExplainabilityCapture(module): "ExplainabilityCapture(ToyModule, classes_by='target')",
        AttentionAnalyzer(3): "AttentionAnalyzer(num_heads=3)",
    }
    assert {repr(one): said for one, said in expected.items()} == {said: said for said in expected.values()}
    axis = TokenAxis("time (s)", spans=[(i, i + 2) for i in range(300)])
    assert repr(axis) == "TokenAxis('time (s)', 300 tokens: 0 to 2, ..., 299 to 301)"
    assert not re.search("tensor|0x", "".join(map(repr, expected)))


def test_sizes_are_told_with_the_groups(result):
    assert repr(result.fusion) == "FusionSummary(left and right: 130 samples of 23 groups, 4 classes)"
    heads = "left_to_right of 3 heads, right_to_left of 3 heads"
    assert repr(result.headline) == f"LayerSummary(130 samples of 23 groups, 4 classes; {heads})"
