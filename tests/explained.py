"""Explained samples, batches and data sets made by hand, with known numbers."""

import torch

from lightning_xattn.core.attention import Attention, Direction, TokenAxis
from lightning_xattn.evaluation.accumulators import LayerAccumulator
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.results import AttentionStatistics, DatasetResult
from lightning_xattn.evaluation.statistics import sample_statistics
from lightning_xattn.functional import prepare_layer

NAN = float("nan")
NAMES = ("Seizure", "LPD", "GPD")
SINGLE_KEY = AttentionStatistics(mean=1.0, std=0.0, max=1.0, min=1.0, entropy=NAN, sparsity=0.0)
NO_ROW = AttentionStatistics(mean=NAN, std=NAN, max=NAN, min=NAN, entropy=NAN, sparsity=NAN)
PLACES = {"eeg": TokenAxis("EEG region", names=["LL", "RL", "LP", "RP", "Z"])}


def statistics(**values):
    """Neither focused nor diffuse attention over 7 keys."""
    return AttentionStatistics(
        **{"mean": 1 / 7, "std": 0.15, "max": 0.6, "min": 0.01, "entropy": 0.6, "sparsity": 40.0} | values
    )


def placed(query, key, weight, query_place=None, key_place=None):
    return {
        "query": query,
        "key": key,
        "weight": weight,
        "lift": 7 * weight,
        "query_place": query_place,
        "key_place": key_place,
    }


def sample(**values):
    """A sample of class 2 that is predicted correctly."""
    values = {
        "sample_idx": 0,
        "sample_id": None,
        "predicted_class": 2,
        "predicted_name": "GPD",
        "confidence": 0.8234,
        "probabilities": [0.1, 0.0766, 0.8234],
        "true_class": 2,
        "true_name": "GPD",
        "correct": True,
        "tied": False,
        "modality_agreement": 0.7234,
        "head_entropies": {"eeg_to_spec/head_0": 0.6},
        "attention_stats": {"eeg_to_spec": statistics(), "spec_to_eeg": statistics(mean=1 / 5)},
        "top_attention_places": {
            "eeg_to_spec": [placed(1, 4, 0.9123, "RL"), placed(0, 6, 0.5, "LL")],
            "spec_to_eeg": [placed(4, 1, 0.8756, None, "RL")],
        },
    } | values
    pairs = {
        name: [(pair["query"], pair["key"], pair["weight"]) for pair in places]
        for name, places in values["top_attention_places"].items()
    }
    return values | {"top_attention_pairs": pairs}


def batch(*samples, **values):
    """Results for these samples; those of the first stand for the whole batch."""
    return {
        "attention_dict": {"eeg_to_spec": torch.full((len(samples), 3, 5, 7), 1 / 7)},
        "attention_stats": samples[0]["attention_stats"],
        "modality_alignment": samples[0]["modality_agreement"],
        "per_sample_explanations": list(samples),
        "class_names": NAMES,
        "axes": PLACES,
    } | values


def summary(classes, outcomes, n_classes=3, keys=7, both=True, tied=(), broken=()):
    """A layer's summary of random attention, as many samples as classes; alignment rises with the class id."""
    classes, outcomes = torch.tensor(classes), torch.tensor(outcomes)
    generator = torch.Generator().manual_seed(0)
    there = torch.randn(len(classes), 3, 5, keys, generator=generator)
    noise = torch.randn(len(classes), 3, keys, 5, generator=generator)
    back = there.transpose(-1, -2) * classes[:, None, None, None] + noise
    there, back = there.softmax(-1), back.softmax(-1)
    there[list(broken)] = torch.nan
    forward = Direction("eeg", "spec")
    pair = [Attention(forward, there), Attention(forward.opposite, back)][: 1 + both]
    rows = prepare_layer(*pair)
    numbers = sample_statistics(rows)
    ties = torch.tensor([i in tied for i in range(len(classes))])
    accumulator = LayerAccumulator.empty(rows, tuple(numbers), n_classes)
    return LayerSummary(accumulator.add(rows, numbers, classes, outcomes, ties))


def dataset(*summaries, **values):
    settings = {"fusion": None, "class_names": NAMES, "classes_by": "target", "axes": PLACES, "table": None} | values
    layers = {f"fusion.{i}": one for i, one in enumerate(summaries)}
    return DatasetResult(summaries=layers, **settings)
