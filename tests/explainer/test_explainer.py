"""One batch and one sample explained: the callback's and the reference's numbers, and what bad input is told."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_xattn import ExplainabilityCapture, TokenAxis, XAttnWarning
from lightning_xattn.attention_analysis import AttentionAnalyzer
from lightning_xattn.core.errors import DataError, DiscoveryError, SettingError
from lightning_xattn.evaluation.statistics import ALIGNMENT
from tests import reference
from tests.messages import tells
from tests.toy import (
    AUDIO,
    CLASSES,
    HEADS,
    NAMES,
    TEXT,
    PaddedToyModule,
    ToyModule,
    count_hooks,
    padded_toy_data,
    run_toy,
    toy_data,
)

SAMPLES = 5
AXES = {
    "audio": TokenAxis("Audio (s)", spans=[(2 * i, 2 * i + 2.5) for i in range(AUDIO)]),
    "text": TokenAxis("Word", names=[f"word {i}" for i in range(TEXT)]),
}


def explainer(module=None, **settings):
    return ExplainabilityCapture(module or ToyModule(), **({"predict": run_toy} | settings))


def batch(data=None):
    return (data or toy_data(SAMPLES))[:SAMPLES]


def assert_same(left, right, **tolerance):
    """Explanations agree in every number."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_same(left[name], right[name], **tolerance)
    elif isinstance(left, (list, tuple)) and left and not isinstance(left[0], str):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other, **tolerance)
    elif hasattr(left, "entropy"):
        assert_same(vars(left), vars(right), **tolerance)
    elif isinstance(left, float):
        assert left == pytest.approx(right, nan_ok=True, **tolerance)
    elif isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, equal_nan=True, rtol=1e-5, atol=1e-6)
    elif not hasattr(left, "directions"):
        assert left == right


@pytest.mark.parametrize("padded", [False, True])
def test_numbers_are_the_references(padded):
    module = PaddedToyModule() if padded else ToyModule()
    data = batch(padded_toy_data() if padded else None)
    results = explainer(module, class_names=NAMES, top_k=3).explain_batch(data)
    audio, text = (data[i][..., 0].ne(0).numpy() for i in (0, 1)) if padded else ([None] * SAMPLES, [None] * SAMPLES)
    with torch.no_grad():
        logits = module.eval()(*data[:2])
    torch.testing.assert_close(results["logits"], logits)
    torch.testing.assert_close(results["probabilities"], logits.softmax(1))
    assert results["predictions"].tolist() == logits.argmax(1).tolist()
    assert results["targets"].tolist() == data[2].tolist()
    agreements = []
    for b, sample in enumerate(results["per_sample_explanations"]):
        there, back = (results["attention_dict"][d][b].double().numpy() for d in ("audio_to_text", "text_to_audio"))
        agreements.append(reference.alignment(there, back, audio[b], text[b], text[b], audio[b]))
        assert sample["modality_agreement"] == pytest.approx(agreements[b], abs=1e-5)
        for name, weights, queries, keys in (
            ("audio_to_text", there, audio[b], text[b]),
            ("text_to_audio", back, text[b], audio[b]),
        ):
            rows = reference.row_statistics(weights, queries, keys)
            for number in ("mean", "std", "max", "min", "entropy", "sparsity"):
                assert sample["attention_stats"][name][number] == pytest.approx(rows[number].mean(), rel=1e-4)
            for h in range(HEADS):
                assert sample["head_entropies"][f"{name}/head_{h}"] == pytest.approx(rows["entropy"][h], abs=1e-5)
            expected = reference.top_pairs([(weights, queries, keys)], 3)
            assert [pair[:2] for pair in sample["top_attention_pairs"][name]] == [pair[:2] for pair in expected]
            places = [(pair["weight"], pair["lift"]) for pair in sample["top_attention_places"][name]]
            np.testing.assert_allclose(places, [pair[2:] for pair in expected], rtol=1e-5)
        assert sample["sample_idx"] == b
        assert sample["predicted_name"] == NAMES[sample["predicted_class"]]
        assert sample["true_name"] == NAMES[data[2][b]]
        assert sample["correct"] is (sample["predicted_class"] == int(data[2][b]))
        assert sample["confidence"] == pytest.approx(float(logits.softmax(1)[b].max()), abs=1e-6)
        assert sample["probabilities"] == pytest.approx(logits.softmax(1)[b].tolist(), abs=1e-6)
    assert results["modality_alignment"] == pytest.approx(np.mean(agreements), abs=1e-5)
    # The analyser says the same of the attention with its masks.
    (pair,) = results["attention"]
    analyzer = AttentionAnalyzer()
    agreement = analyzer.compare_modality_agreement(*pair.directions)
    assert results["modality_alignment"] == pytest.approx(agreement, abs=1e-6)
    analysed = {str(one.direction): analyzer.analyze_attention_weights(one) for one in pair.directions}
    assert_same(results["attention_stats"], analysed, rel=1e-6)


def test_a_sample_is_what_the_batch_says_of_it():
    watch = explainer(axes=AXES)
    results = watch.explain_batch(batch())
    sample = watch.explain_single_sample(batch(), 3)
    for name, value in results["per_sample_explanations"][3].items():
        assert_same(sample[name], value, abs=1e-5)
    assert sample["attention_dict"]["audio_to_text"].shape == (1, HEADS, AUDIO, TEXT)
    torch.testing.assert_close(
        sample["attention_dict"]["text_to_audio"], results["attention_dict"]["text_to_audio"][3:4]
    )


def test_a_batch_runs_whole_for_one_sample():
    class Odd:
        """Nothing that anybody can take samples of."""

    watch = explainer(
        predict=lambda module, batch: module(*batch["parts"]), targets=lambda _, b: b["parts"][0][:, 0, 0].long()
    )
    odd = {"parts": batch()[:2], "about": Odd()}
    sample = watch.explain_single_sample(odd, 4)
    assert_same(sample["head_entropies"], watch.explain_batch(odd)["per_sample_explanations"][4]["head_entropies"])
    assert sample["sample_idx"] == 4
    for index in (5, -1, "first", 1.0):
        with pytest.raises(SettingError, match="sample_idx must be a whole number, 0 to 4 in this batch of 5"):
            watch.explain_single_sample(odd, index)


def test_places_in_the_tokens_own_units():
    (found, *_) = explainer(axes=AXES).explain_batch(batch())["per_sample_explanations"]
    for pair in found["top_attention_places"]["audio_to_text"]:
        assert pair["query_place"] == f"{2 * pair['query']} to {2 * pair['query'] + 2.5:g}"
        assert pair["key_place"] == f"word {pair['key']}"
    module = ToyModule()
    module.attention_axes = {"text": AXES["text"], "audio": TokenAxis("Too short", names=["one"])}
    (found, *_) = explainer(module).explain_batch(batch())["per_sample_explanations"]
    for pair in found["top_attention_places"]["text_to_audio"]:
        assert (pair["query_place"], pair["key_place"]) == (f"word {pair['query']}", None)


def test_the_model_is_left_as_it_was():
    module = ToyModule().train()
    module.text.eval()
    module.audio.frozen = nn.Dropout(0.5)
    before = {name: part.training for name, part in module.named_modules()}
    watch, data = explainer(module), batch()
    kept = [tensor.clone() for tensor in data]
    seen = []
    module.head.register_forward_hook(lambda head, *_: seen.append((head.training, torch.is_grad_enabled())))
    hooks = count_hooks(module)
    with torch.no_grad():  # as the guide has it; nor does it matter
        watch.explain_batch(data)
    watch.explain_single_sample(data, 0)
    watch.explain_loader([data])
    with pytest.raises(DataError):
        watch.explain_batch((data[0] * torch.nan, *data[1:]))
    assert set(seen) == {(False, False)}
    assert {name: part.training for name, part in module.named_modules()} == before
    assert count_hooks(module) == hooks
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(data, kept, strict=True))


def test_without_targets():
    results = explainer(targets=None).explain_batch(batch()[:2])
    assert results["targets"] is None
    assert results["class_names"] == tuple(f"class_{i}" for i in range(CLASSES))
    for sample in results["per_sample_explanations"]:
        assert (sample["true_class"], sample["true_name"], sample["correct"]) == (None, None, None)
        assert sample["predicted_name"] == f"class_{sample['predicted_class']}"
    json.dumps({**results["per_sample_explanations"][0], "attention_stats": None})  # plain types throughout


def test_soft_targets_ties_and_samples_without_a_label():
    audio, text, target = batch()
    soft = nn.functional.one_hot(target, CLASSES).float()
    soft[1] = torch.tensor([0, 0.5, 0.5, 0])
    ties = [s["tied"] for s in explainer().explain_batch((audio, text, soft))["per_sample_explanations"]]
    assert ties == [False, True, False, False, False]
    target[2] = -100
    results = explainer(targets=lambda outputs, batch: batch[2]).explain_batch((audio, text, target))
    assert results["targets"][2] == -1
    assert results["per_sample_explanations"][2]["correct"] is None
    labelled = results["per_sample_explanations"][3]
    assert labelled["correct"] == (labelled["predicted_class"] == int(target[3]))


class Answers(ToyModule):
    """``predict_step`` gives what ``answer`` makes of the logits; ``forward`` gives the logits."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def predict_step(self, batch, batch_idx):
        return self.answer(self(*batch[:2]))


@pytest.mark.parametrize(
    "answer",
    [lambda x: x, lambda x: x.softmax(1), lambda x: x.argmax(1), lambda x: {"preds": x.argmax(1), "more": x.sum()}],
    ids=["logits", "probabilities", "classes", "dict"],
)
def test_logits_and_probabilities_whatever_predict_step_returns(answer):
    module = Answers(answer)
    results = ExplainabilityCapture(module).explain_batch(batch())
    with torch.no_grad():
        logits = module(*batch()[:2])
    torch.testing.assert_close(results["logits"], logits)
    torch.testing.assert_close(results["probabilities"], logits.softmax(1))
    assert results["per_sample_explanations"][0]["confidence"] == pytest.approx(float(logits.softmax(1)[0].max()))
    assert results["class_names"] == tuple(f"class_{i}" for i in range(CLASSES))


def test_logits_that_give_other_probabilities_are_not_those_of_the_prediction():
    """As where a step scales the logits of ``forward`` by a temperature: the same classes, another confidence."""
    module = Answers(lambda x: (x / 1.05).softmax(1))
    results = ExplainabilityCapture(module).explain_batch(batch())
    with torch.no_grad():
        scaled = module(*batch()[:2]) / 1.05
    assert 0.001 < (results["probabilities"] - (1.05 * scaled).softmax(1)).abs().max() < 0.05
    torch.testing.assert_close(results["probabilities"], scaled.softmax(1))
    torch.testing.assert_close(results["logits"], scaled.log_softmax(1))


def test_a_model_that_gives_probabilities_only():
    class Soft(ToyModule):
        def forward(self, audio, text):
            return super().forward(audio, text).softmax(1)

    module = Soft()
    results = explainer(module).explain_batch(batch())
    with torch.no_grad():
        torch.testing.assert_close(results["probabilities"], module(*batch()[:2]))
    torch.testing.assert_close(results["logits"].softmax(1), results["probabilities"])


def test_what_forward_returns_is_no_logits_of_class_ids_that_it_does_not_predict():
    class Embedding(ToyModule):
        def forward(self, audio, text):
            return super().forward(audio, text).roll(1, dims=1)

        def predict_step(self, batch, batch_idx):
            return self(*batch[:2]).roll(-1, dims=1).argmax(1)

    results = ExplainabilityCapture(Embedding()).explain_batch(batch())
    assert results["predictions"].shape == (SAMPLES,)
    assert (results["logits"], results["probabilities"]) == (None, None)


def test_scores_have_as_many_columns_as_the_soft_targets():
    """Of a batch of one, an embedding may have its largest number in the place of the predicted class."""

    class Embedded(ToyModule):
        def forward(self, audio, text):
            logits = super().forward(audio, text)
            return {"embedding": torch.cat([5 * logits, logits], dim=1), "logits": logits}

        def predict_step(self, batch, batch_idx):
            return self(*batch[:2])["logits"].argmax(1)

    audio, text, _ = (values[:1] for values in batch())
    shares = torch.tensor([[0.25, 0.5, 0.25, 0.0]])
    results = ExplainabilityCapture(Embedded(), targets=lambda outputs, batch: batch[2]).explain_batch(
        (audio, text, shares)
    )
    assert results["logits"].shape == (1, CLASSES)


def test_a_warning_points_at_the_line_that_led_to_it():
    watch = ExplainabilityCapture(Answers(lambda x: {"preds": 0.5 + 0 * x}))
    with pytest.warns(XAttnWarning) as caught:
        watch.explain_batch(batch())
    assert {Path(one.filename) for one in caught} == {Path(__file__)}


def test_a_second_layer_and_a_lone_direction_have_names_of_their_own():
    class Two(ToyModule):
        def __init__(self):
            super().__init__()
            self.second = nn.Module()
            self.second.audio_to_text_attn = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, audio, text):
            self.second.audio_to_text_attn(self.audio(audio), self.text(text), self.text(text))
            return super().forward(audio, text)

    results = explainer(Two()).explain_batch(batch())
    assert list(results["attention_dict"]) == ["audio_to_text", "text_to_audio", "second/audio_to_text"]
    sample = results["per_sample_explanations"][0]
    assert list(sample["attention_stats"]) == list(sample["top_attention_pairs"]) == list(results["attention_dict"])
    assert {"audio_to_text/head_2", "second/audio_to_text/head_1"} <= set(sample["head_entropies"])


def test_single_keys_are_undefined_and_said_once():
    class Pooled(ToyModule):
        def forward(self, audio, text):
            return super().forward(audio.mean(1, keepdim=True), text.mean(1, keepdim=True))

    watch = explainer(Pooled())
    with pytest.warns(XAttnWarning, match=tells("audio_to_text and text_to_audio", "single key", "pool")) as caught:
        results, _ = watch.explain_batch(batch()), watch.explain_batch(batch())
    assert len(caught) == 1
    assert math.isnan(results["modality_alignment"])
    sample = results["per_sample_explanations"][0]
    assert math.isnan(sample["modality_agreement"])
    assert all(math.isnan(value) for value in sample["head_entropies"].values())
    assert sample["top_attention_pairs"]["audio_to_text"] == [(0, 0, 1.0)]


def test_samples_that_are_not_finite_are_named():
    audio, text, target = batch()
    audio[1, 2, 0], text[3] = torch.nan, torch.inf
    named = TensorDataset(audio, text, target)[:]
    with pytest.raises(DataError, match=r"class scores of sample 1, 3 \(2 of 5\) are not finite.*their input"):
        explainer().explain_batch(named)
    ids = [f"patient {i}" for i in range(SAMPLES)]
    with pytest.raises(DataError, match=r"sample 1 \(id patient 1\), 3 \(id patient 3\)"):
        explainer(sample_ids=lambda outputs, batch: ids).explain_batch(named)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"num_heads": 8},
            SettingError,
            "'audio_to_text': expected num_heads=8, but there are 3 heads",
        ),
        (
            {"predict": None},
            DiscoveryError,
            r"forward of ToyModule cannot be called with a batch alone.*predict=lambda model, batch",
        ),
        ({"predict": lambda module, batch: None}, DiscoveryError, "Nothing ran for this batch.*returned None"),
        ({"targets": "labels"}, DiscoveryError, "No targets: the key 'labels' is in neither"),
        ({"class_names": ["a", "b"]}, ValueError, "There are 2 class_names"),
    ],
)
def test_what_does_not_fit_the_model_is_said(settings, error, message):
    with pytest.raises(error, match=message):
        explainer(**settings).explain_batch(batch())


def test_models_without_attention_and_what_is_no_model():
    with pytest.raises(DiscoveryError, match="No cross-attention ran.*Linear has no nn.MultiheadAttention at all"):
        ExplainabilityCapture(nn.Linear(2, 2)).explain_batch(torch.zeros(3, 2))
    with pytest.raises(SettingError, match=tells("model", "torch module", "str")):
        ExplainabilityCapture("best.ckpt")
    with pytest.raises(SettingError, match=tells("predict", "(model, batch) -> outputs")):
        ExplainabilityCapture(ToyModule(), predict=lambda batch: batch)


def test_plain_weights_keep_the_masks_as_nan():
    """The guide hands ``attention_dict`` to analyser and figures: their numbers are those of the explainer."""
    padded = ExplainabilityCapture(PaddedToyModule(), predict=run_toy)
    results = padded.explain_batch(padded_toy_data(SAMPLES)[:])
    analyzer = AttentionAnalyzer()
    for direction, statistics in results["attention_stats"].items():
        found = analyzer.analyze_attention_weights(results["attention_dict"][direction])
        assert vars(found) == pytest.approx(vars(statistics), abs=1e-6)
    agreement = analyzer.compare_modality_agreement(*results["attention_dict"].values())
    assert agreement == pytest.approx(results["modality_alignment"], abs=1e-6)
    assert results["attention_dict"]["audio_to_text"].isnan().any()


class SequenceFirst(nn.Module):
    """Its batches have their samples on the second axis."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.audio_to_text_attn, self.text_to_audio_attn = (nn.MultiheadAttention(12, 3) for _ in range(2))
        self.head = nn.Linear(24, 3)

    def forward(self, batch):
        audio, text = batch["audio"], batch["text"]
        there, back = self.audio_to_text_attn(audio, text, text)[0], self.text_to_audio_attn(text, audio, audio)[0]
        return self.head(torch.cat([there.mean(0), back.mean(0)], dim=1))


def test_one_sample_of_a_batch_whose_samples_are_on_another_axis():
    data = {"audio": torch.randn(16, 4, 12), "text": torch.randn(16, 4, 12)}
    watch = ExplainabilityCapture(SequenceFirst())
    whole = watch.explain_batch(data)
    for i in range(4):
        one = watch.explain_single_sample(data, i)
        assert_same(one["modality_agreement"], whole["per_sample_explanations"][i]["modality_agreement"])
        assert one["predicted_class"] == whole["per_sample_explanations"][i]["predicted_class"]
        assert torch.equal(one["attention_dict"]["audio_to_text"], whole["attention_dict"]["audio_to_text"][i : i + 1])
    with pytest.raises(SettingError, match="sample_idx"):
        watch.explain_single_sample(data, 9)


class Binary(ToyModule):
    def forward(self, audio, text):
        return super().forward(audio, text)[:, 0] * 5


class Small(ToyModule):
    """Some of its logits look like probabilities."""

    def forward(self, audio, text):
        return super().forward(audio, text) * 3 + 0.3


@pytest.mark.parametrize("kind", [Binary, Small])
def test_labels_of_one_sample_are_those_of_the_whole_batch(kind):
    torch.manual_seed(0)
    module = kind()
    audio, text, target = batch()
    data = audio, text, (target % 2).float() if isinstance(module, Binary) else target
    whole = explainer(module).explain_batch(data)["per_sample_explanations"]
    assert {one["true_class"] for one in whole} > {0}
    assert all(one["confidence"] is not None for one in whole)
    for i, one in enumerate(whole):
        assert_same(explainer(module).explain_single_sample(data, i)["confidence"], one["confidence"], abs=1e-6)
    table = explainer(module).explain_loader([data])
    assert table.headline.count(ALIGNMENT, None, 1) + table.headline.count(ALIGNMENT, None, 0) == SAMPLES


class Sigmoids(ToyModule):
    def forward(self, audio, text):
        return super().forward(audio, text).sigmoid()


def test_scores_that_may_be_either_give_no_probability():
    module = Sigmoids()
    watch = explainer(module, predict=lambda model, data: {"preds": model(*data[:2]).argmax(1)})
    results = watch.explain_batch(batch())
    assert results["logits"] is None
    assert results["probabilities"] is None
    assert [one["confidence"] for one in results["per_sample_explanations"]] == [None] * SAMPLES


def test_what_is_no_probability_in_a_later_batch_is_no_confidence(tmp_path):
    """The first batch's logits look like probabilities, those of the second do not."""
    scores = torch.tensor([[0.2, 0.3, 0.4, 0.1], [2.0, 5.0, 0.0, 0.0], [1.0, 1.0, 9.0, 0.0]])
    audio, text, target = (values[:3] for values in batch())
    loader = [[t[i : i + 1] for t in (audio, text, target, scores)] for i in range(3)]
    watch = explainer(
        predict=lambda model, data: (model(*data[:2]), {"preds": data[3]})[1], targets=lambda outputs, data: data[2]
    )
    watch.explain_loader(loader, table=tmp_path)
    confidence = pd.read_parquet(tmp_path / "attention").sort_values("sample_idx")["confidence"]
    assert confidence[0] == pytest.approx(0.4)
    assert confidence[1:].isna().all()
