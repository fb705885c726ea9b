"""What a result says of itself where a user looks at it: its repr, and its HTML in a notebook."""

import re
from html.parser import HTMLParser

import pytest
import torch

from lightning_xattn import AttentionExplainabilityCallback, AttentionRecorder, ExplainabilityCapture, TokenAxis
from lightning_xattn.attention_analysis import AttentionAnalyzer
from lightning_xattn.evaluation.statistics import ALIGNMENT
from lightning_xattn.functional import Permutation, prepare_rows
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from tests.explained import dataset, summary
from tests.toy import ToyModule, run_toy, toy_data, toy_loader, validate

HOSTILE = ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a & b")


class Reader(HTMLParser):
    """Tags and text of HTML."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def explained():
    torch.manual_seed(0)
    return ExplainabilityCapture(ToyModule(), predict=run_toy, class_names=[*HOSTILE, "d"]).explain_loader(toy_loader())


def test_a_notebook_shows_the_reports_tables_and_no_markup_of_a_name(explained):
    shown = Reader(explained._repr_html_())
    assert {"script", "img"}.isdisjoint(shown.tags)
    assert {*HOSTILE, "d", "all", "correct", "incorrect"} <= {*shown.texts}
    assert "Modalities" in shown.texts
    mean, (low, high) = explained.headline.mean(ALIGNMENT), explained.headline.interval(ALIGNMENT)
    assert f"{mean:.3f} ({low:.3f} to {high:.3f})" in shown.texts
    assert not any("How to read" in text for text in shown.texts)


def test_a_notebook_shows_the_callbacks_summaries():
    callback = AttentionExplainabilityCallback()
    validate(ToyModule(), callback)
    layer, fusion = callback.summaries["val"], callback.fusion_summaries["val"]
    of_layer, of_fusion = Reader(layer._repr_html_()), Reader(fusion._repr_html_())
    assert {"class", "accuracy", "class_0", "class_3", f"{layer.mean(ALIGNMENT, 0):.3f}"} <= {
        text.split(" (")[0] for text in of_layer.texts
    }
    assert {"class", "class_0", "Audio", f"{100 * fusion.estimate('opposed', 1).mean:.1f} %"} <= {
        text.split(" (")[0] for text in of_fusion.texts
    }


def test_the_reports_escape_what_the_notebook_escapes():
    shown = Reader(
        dataset(summary([0, 1, 2] * 5, [CORRECT, INCORRECT] * 7 + [CORRECT]), class_names=HOSTILE)._repr_html_()
    )
    assert {*HOSTILE} <= {*shown.texts}
    assert "script" not in shown.tags


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
