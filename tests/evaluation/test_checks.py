"""Each alarm rings for what it is for, once, with layer and head, and not for ordinary attention."""

import warnings

import pytest
import torch

from lightning_xattn import AttentionExplainabilityCallback, XAttnWarning
from lightning_xattn import functional as F
from lightning_xattn.core.attention import Attention, Direction
from lightning_xattn.core.notices import begin_run
from lightning_xattn.evaluation.accumulators import LayerAccumulator
from lightning_xattn.evaluation.checks import check_layer
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.statistics import sample_statistics
from lightning_xattn.functional import prepare_layer, prepare_rows
from lightning_xattn.functional.outcomes import UNKNOWN
from tests.toy import ToyModule, quiet_trainer, toy_loader

BATCH, HEADS, QUERIES, KEYS = 4, 3, 5, 7
DIRECTION = Direction("eeg", "spec")


def ordinary():
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(BATCH, HEADS, QUERIES, KEYS, generator=generator)).softmax(-1)


def ring(weights, is_new=True, **masks):
    """The messages of a new run, or of the one that goes on."""
    if is_new:
        begin_run()
    rows = prepare_layer(Attention(DIRECTION, weights, **masks))
    statistics = sample_statistics(rows)
    labels = torch.full((BATCH,), -1), torch.full((BATCH,), UNKNOWN), torch.zeros(BATCH)
    sums = LayerAccumulator.empty(rows, tuple(statistics), 0).add(rows, statistics, *labels)
    return list(check_layer("fusion.1", LayerSummary(sums)))


def test_ordinary_attention_rings_nothing():
    assert ring(ordinary()) == []


@pytest.mark.parametrize("head", [0, 2])
def test_one_head_of_its_kind(head):
    uniform, collapsed, sink = ordinary(), ordinary(), ordinary()
    uniform[:, head] = 1 / KEYS
    collapsed[:, head] = torch.eye(KEYS)[:QUERIES]
    sink[:, head] = 0.3 / (KEYS - 1)
    sink[:, head, :, 4] = 0.7
    for weights, words in ((uniform, "uniform attention"), (collapsed, "a single key"), (sink, "an attention sink")):
        (message,) = ring(weights)
        assert message.startswith(f"Layer 'fusion.1', eeg_to_spec, head {head}: ")
        assert words in message


def test_a_head_that_is_nearly_uniform_is_not_dead():
    """A mean entropy of 0.98, as of many an untrained model's heads, whose rows still differ."""
    nearly = ordinary()
    nearly[:, 1] = 0.25 * nearly[:, 1] + 0.75 / KEYS
    entropy = F.entropy(prepare_rows(Attention(DIRECTION, nearly)))[:, 1].mean()
    assert 0.97 < entropy < 0.99
    assert ring(nearly) == []


def test_heads_that_are_alike():
    (message,) = ring(ordinary()[:, :1].expand(-1, HEADS, -1, -1))
    assert message.startswith("Layer 'fusion.1', eeg_to_spec: all 3 heads attend alike")


def test_nan_rings_and_masked_rows_do_not():
    broken, masked = ordinary(), ordinary()
    broken[1, 1, 3] = torch.nan
    (message,) = ring(broken)
    assert message.startswith("Layer 'fusion.1', eeg_to_spec, head 1: 1 rows of attention are not finite")
    masked[1] = torch.nan
    padding = torch.ones(BATCH, KEYS, dtype=torch.bool)
    padding[1] = False
    (message,) = ring(masked, key_mask=padding)
    assert message.startswith("Layer 'fusion.1': one modality is wholly masked in 1 of 4 samples")


def test_a_sink_is_judged_by_the_number_of_keys():
    two = torch.tensor([0.6, 0.4]).expand(BATCH, HEADS, QUERIES, 2)
    assert not [message for message in ring(two) if "sink" in message]  # 0.6 of 2 keys is next to uniform


def test_each_rings_once():
    weights = ordinary()
    weights[:, 0] = 1 / KEYS
    assert len(ring(weights)) == 1
    assert ring(weights, is_new=False) == []
    weights[:, 1] = 1 / KEYS
    (message,) = ring(weights, is_new=False)
    assert "head 1:" in message  # and not head 0 again


def test_a_single_key():
    (message,) = ring(torch.ones(BATCH, HEADS, QUERIES, 1))
    assert message.startswith("Layer 'fusion.1': eeg_to_spec attend to a single key")
    assert ring(torch.ones(BATCH, HEADS, QUERIES, 1), is_new=False) == []
    only_first = torch.eye(KEYS)[:1].expand(BATCH, HEADS, QUERIES, KEYS)
    mask = (torch.arange(KEYS) == 0).expand(BATCH, KEYS)
    (message,) = ring(only_first, key_mask=mask)
    assert "a single key" in message


def test_one_query_that_looks_elsewhere_hides_no_sink():
    weights = torch.full((BATCH, HEADS, 100, KEYS), 0.1 / (KEYS - 1))
    weights[..., 0] = 0.9
    weights[:, 1, 7] = torch.eye(KEYS)[5]
    messages = [message for message in ring(weights) if "sink" in message]
    assert messages == [
        "Layer 'fusion.1', eeg_to_spec, head 0, 1, 2: most of the attention goes to one key: an attention sink."
    ]


def test_a_single_query_is_no_sink():
    sharp = torch.eye(KEYS)[:BATCH, None, None].expand(BATCH, HEADS, 1, KEYS) * 0.86 + 0.02
    assert not [message for message in ring(sharp) if "sink" in message]


def test_a_trainer_warns_once_a_run_and_goes_on():
    module = ToyModule()
    with torch.no_grad():
        module.audio_to_text_attn.in_proj_weight[:24] = 0  # queries and keys say nothing: uniform attention
    module.audio_to_text_attn.requires_grad_(False)
    trainer = quiet_trainer(max_epochs=3, callbacks=[AttentionExplainabilityCallback()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, toy_loader(), toy_loader())
    messages = [str(w.message) for w in caught if w.category is XAttnWarning]
    assert len(messages) == 2
    assert "Layer 'audio_to_text', head 0, 1, 2: uniform attention" in messages[1]
    assert "all 3 heads attend alike" in messages[0]


@pytest.mark.parametrize("directions", [1, 2])
def test_changing_token_counts_name_the_mask_of_padded_queries(directions):
    """Two directions mask each other's queries, so only one alone needs it."""
    begin_run()
    sums, labels = None, (torch.full((BATCH,), -1), torch.full((BATCH,), UNKNOWN), torch.zeros(BATCH))
    for queries in (QUERIES, QUERIES - 1):
        there = ordinary()[:, :, :queries]
        back = there.transpose(-1, -2).softmax(-1)
        pair = Attention(DIRECTION, there), Attention(DIRECTION.opposite, back)
        rows = prepare_layer(*pair[:directions])
        statistics = sample_statistics(rows)
        sums = sums or LayerAccumulator.empty(rows, tuple(statistics), 0)
        sums = sums.add(rows, statistics, *labels)
    (message,) = check_layer("fusion.1", LayerSummary(sums), lacks_query_mask=directions == 1)
    assert message.startswith("Layer 'fusion.1': the number of tokens changes from batch to batch")
    assert ("query_mask=<key or callable>" in message) == (directions == 1)
