"""The analyser's numbers are the reference's, of plain tensors and of attention with masks."""

import math
import warnings

import numpy as np
import pytest
import torch

from lightning_xattn.attention_analysis import (
    AttentionAnalyzer,
    AttentionStatistics,
    head_wise_attention_analysis,
)
from lightning_xattn.core.errors import SettingError, ShapeError, XAttnWarning
from tests import reference
from tests.functional.test_against_reference import BATCH, CASES, HEADS, KEYS, QUERIES, make_case, sample
from tests.messages import tells

NAMES = ("mean", "std", "max", "min", "entropy", "sparsity")

# Some of the cases attend to a single key or have broken rows, and are warned of.
quiet = pytest.mark.filterwarnings("ignore:.*(attend to a single key|have rows):lightning_xattn.XAttnWarning")


@quiet
@pytest.mark.parametrize("name", CASES)
def test_statistics_are_means_over_rows_then_heads_then_samples(name):
    for attention in make_case(name):
        rows = [reference.row_statistics(*sample(attention, b)) for b in range(BATCH)]
        stats = AttentionAnalyzer(attention.weights.shape[1]).analyze_attention_weights(attention)
        for number in NAMES:
            expected = reference.mean_defined([reference.mean_defined(r[number]) for r in rows])
            assert stats[number] == pytest.approx(expected, rel=2e-5, abs=2e-6, nan_ok=True)


@quiet
@pytest.mark.parametrize("name", CASES)
def test_heads_are_means_over_rows_then_samples(name):
    attention, _ = make_case(name)
    rows = [reference.row_statistics(*sample(attention, b)) for b in range(BATCH)]
    analysis = head_wise_attention_analysis({"eeg_to_spec": attention}, top_k=4)["eeg_to_spec"]
    by_head = AttentionAnalyzer().compute_attention_entropy(attention, per_head=True)
    assert list(analysis) == list(by_head) == list(range(attention.weights.shape[1]))
    for h, head in analysis.items():
        expected = {number: reference.mean_defined([r[number][h] for r in rows]) for number in rows[0]}
        for number in NAMES:
            assert head["attention_stats"][number] == pytest.approx(expected[number], rel=2e-5, abs=2e-6, nan_ok=True)
        assert head["specialization_score"] == pytest.approx(by_head[h], nan_ok=True)
        assert by_head[h] == pytest.approx(expected["entropy"], rel=2e-5, abs=2e-6, nan_ok=True)
        assert head["effective_keys"] == pytest.approx(expected["effective_keys"], rel=2e-5, nan_ok=True)
        selectivity = [reference.query_selectivity(*sample(attention, b))[h] for b in range(BATCH)]
        assert head["query_selectivity"] == pytest.approx(
            reference.mean_defined(selectivity), rel=2e-5, abs=2e-6, nan_ok=True
        )


@quiet
@pytest.mark.parametrize("name", CASES)
def test_agreement_is_the_mean_over_samples_of_their_alignments(name):
    forward, backward = make_case(name)
    values = []
    for b in range(BATCH):
        there, eeg, there_sees = sample(forward, b)
        back, spec, back_sees = sample(backward, b)
        values.append(reference.alignment(there, back, eeg, spec, there_sees, back_sees))
    ours = AttentionAnalyzer().compare_modality_agreement(forward, backward)
    assert ours == pytest.approx(reference.mean_defined(values), rel=1e-4, abs=1e-5, nan_ok=True)


def test_plain_tensors_by_direction():
    forward, backward = make_case("plain")
    weights = {"eeg_to_spec": forward.weights, "second/spec_to_eeg": backward.weights}
    analyzer = AttentionAnalyzer(num_heads=HEADS)
    stats = {name: analyzer.analyze_attention_weights(tensor) for name, tensor in weights.items()}
    assert stats["eeg_to_spec"] == analyzer.analyze_attention_weights(forward)
    assert analyzer.compute_attention_entropy(forward.weights) == pytest.approx(stats["eeg_to_spec"].entropy)
    agreement = analyzer.compare_modality_agreement(forward, backward)
    assert analyzer.compare_modality_agreement(forward.weights, backward.weights) == agreement
    heads = head_wise_attention_analysis(weights, num_heads=HEADS)
    assert np.mean([h["specialization_score"] for h in heads["second/spec_to_eeg"].values()]) == pytest.approx(
        stats["second/spec_to_eeg"].entropy
    )


def test_top_pairs_of_planted_attention():
    weights = torch.full((BATCH, HEADS, QUERIES, KEYS), 0.02)
    weights[..., 0] = 0.88
    weights[1, 2, 3] = torch.eye(KEYS)[5]  # in one sample and one head only: a sixth of the mean
    pairs = AttentionAnalyzer().get_top_attention_pairs(weights, top_k=6)
    expected = [(q, 0, 0.88) for q in (0, 1, 2, 4)] + [(3, 0, 0.88 * 5 / 6), (3, 5, (5 * 0.02 + 1) / 6)]
    assert [pair[:2] for pair in pairs] == [pair[:2] for pair in expected]
    np.testing.assert_allclose([pair[2] for pair in pairs], [pair[2] for pair in expected], rtol=1e-6)
    (found,) = head_wise_attention_analysis({"eeg_to_spec": weights}, top_k=1)["eeg_to_spec"][2]["top_pairs"]
    assert found[:2] == (0, 0)
    assert len(AttentionAnalyzer().get_top_attention_pairs(weights, top_k=99)) == QUERIES * KEYS


def test_a_single_key_is_undefined_and_said_to_be():
    weights = {"eeg_to_spec": torch.ones(BATCH, HEADS, 1, 1), "spec_to_eeg": torch.ones(BATCH, HEADS, 1, 1)}
    with pytest.warns(XAttnWarning, match=tells("eeg_to_spec and spec_to_eeg", "single key", "pool after")) as caught:
        heads = head_wise_attention_analysis(weights)
    assert len(caught) == 1
    assert math.isnan(heads["eeg_to_spec"][0]["attention_stats"].entropy)
    assert heads["eeg_to_spec"][0]["attention_stats"].max == 1
    analyzer = AttentionAnalyzer()
    with pytest.warns(XAttnWarning, match=tells("These weights", "single key")):
        assert math.isnan(analyzer.compute_attention_entropy(weights["eeg_to_spec"]))
    with pytest.warns(XAttnWarning, match=tells("single key")) as caught:
        assert math.isnan(analyzer.compare_modality_agreement(*weights.values()))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert analyzer.get_top_attention_pairs(weights["eeg_to_spec"], top_k=3) == [(0, 0, 1.0)]


@pytest.mark.parametrize("spoil", [lambda w: 0.9 * w, lambda w: w.log()], ids=["dropout", "logits"])
def test_weights_that_are_not_attention_are_said_to_be_once_a_call(spoil):
    forward, backward = (spoil(attention.weights) for attention in make_case("plain"))
    analyzer, pair = AttentionAnalyzer(), {"eeg_to_spec": forward, "spec_to_eeg": backward}
    undefined = {
        lambda: analyzer.analyze_attention_weights(forward).max: "These weights",
        lambda: analyzer.compute_attention_entropy(forward): "These weights",
        lambda: analyzer.compare_modality_agreement(forward, backward): "query_to_key and key_to_query",
        lambda: head_wise_attention_analysis(pair)["eeg_to_spec"][0]["effective_keys"]: "eeg_to_spec and spec_to_eeg",
        lambda: len(analyzer.get_top_attention_pairs(forward)) or math.nan: "These weights",
    }
    for call, names in undefined.items():
        with pytest.warns(XAttnWarning, match=f"^{names} have rows .* do not sum to 1") as caught:
            assert math.isnan(call())
        assert len(caught) == 1


def test_statistics_are_read_as_attributes_and_by_name():
    stats = AttentionStatistics(0.2, 0.1, 0.5, 0.01, 0.7, 30.0)
    assert (stats.mean, stats["mean"], stats["sparsity"]) == (0.2, 0.2, 30.0)
    with pytest.raises(KeyError, match="No statistic 'median'; there are mean, std, max, min, entropy, sparsity"):
        stats["median"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: AttentionAnalyzer(0), SettingError, "num_heads must be a whole number >= 1; got 0"),
        (
            lambda w: AttentionAnalyzer(8).analyze_attention_weights(w),
            SettingError,
            "expected num_heads=8, but.* num_heads=3",
        ),
        (lambda w: AttentionAnalyzer(8).compare_modality_agreement(w, w.mT), SettingError, "expected num_heads=8"),
        (
            lambda w: head_wise_attention_analysis({"eeg_to_spec": w}, 8),
            SettingError,
            "eeg_to_spec: expected num_heads",
        ),
        (
            lambda w: AttentionAnalyzer().analyze_attention_weights(w.numpy()),
            SettingError,
            "must be a tensor .* or an Attention; got a ndarray",
        ),
        (lambda w: head_wise_attention_analysis({"eeg": w}), SettingError, "named '<query>_to_<key>'.*got 'eeg'"),
        (lambda w: AttentionAnalyzer().get_top_attention_pairs(w, True), SettingError, "top_k must be a whole number"),
        (lambda w: AttentionAnalyzer().analyze_attention_weights(w.mean(1)), ShapeError, "batch, heads, queries, keys"),
        (lambda w: AttentionAnalyzer().compare_modality_agreement(w, w), ShapeError, "queries=7, keys=5"),
    ],
)
def test_what_does_not_fit_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call(make_case("plain")[0].weights)
