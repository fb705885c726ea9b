"""What looks like a module's attention and is none, or is it in another form: read as it is, or refused."""

import pytest
import torch
import torch.nn.functional as F

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DiscoveryError
from tests.capture.models import BATCH, Runs, folded, heads, record_fusion, softmax, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, WIDTH

WHOLE = {"a_to_b": "fusion"}


def gated(module, x, y):
    gate = torch.stack([heads(x), heads(x).flip(-1)], dim=-1).mean(-2).softmax(-1)  # (batch, heads, queries, 2)
    return gate.mean() * x, (x @ y.mT).softmax(-1)


@pytest.mark.filterwarnings("ignore:.*has no axis for heads")
def test_a_gate_with_four_axes_is_not_taken_for_the_attention_that_is_returned():
    audio, text = tokens()
    (pair,) = record_fusion(Runs(gated), WHOLE)
    assert torch.equal(pair.forward.weights[:, 0], (audio @ text.mT).softmax(-1))


def attends_within_and_unseen(module, x, y):
    F.scaled_dot_product_attention(*[heads(x)] * 3)
    weights = (x @ y.mT).softmax(-1)
    return weights @ y, weights


def attends_within_and_folded(module, x, y):
    F.scaled_dot_product_attention(*[heads(x)] * 3)
    q, k = folded(x, y)
    return torch.bmm(q, k.mT).softmax(-1) @ k


def attends_within_and_to_a_class_token(module, x, y):
    F.scaled_dot_product_attention(*[heads(x)] * 3)
    keys = torch.cat([y[:, :1], y], dim=1)
    return (x @ keys.mT).softmax(-1) @ keys


def returns_another(module, x, y):
    F.scaled_dot_product_attention(heads(x), heads(y), heads(y))
    weights = softmax(x, y) ** 2
    return x, weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (attends_within_and_folded, ["'fusion#1' (2, 3, 5, 5)", "'fusion#2' (6, 5, 7)"]),
        (attends_within_and_to_a_class_token, ["'fusion#1' (2, 3, 5, 5)", "'fusion#2' (2, 5, 8)"]),
        (
            returns_another,
            ["'fusion#1' (2, 3, 5, 7)", "'fusion#2' (2, 3, 5, 7)", "'fusion[1]' (2, 3, 5, 7)"],
        ),
    ],
)
def test_a_kernel_beside_which_other_attention_is_computed(run, found):
    with pytest.raises(DiscoveryError, match=tells(*found)):
        record_fusion(Runs(run), WHOLE)


def co_attention(module, x, y):
    scores = heads(x) @ heads(y).mT
    return scores.softmax(-1) @ heads(y), scores.softmax(-2).mT @ heads(x)


def test_both_directions_of_one_matrix_of_scores():
    for attention in (WHOLE, {"b_to_a": "fusion"}, {"a_to_b": "fusion", "b_to_a": "fusion"}):
        with pytest.raises(DiscoveryError, match=tells("'fusion#1' (2, 3, 5, 7)", "'fusion#2' (2, 3, 7, 5)")):
            record_fusion(Runs(co_attention), attention)
    audio, text = tokens()
    (pair,) = record_fusion(Runs(co_attention), {"a_to_b": "fusion#1", "b_to_a": "fusion#2"})
    scores = heads(audio) @ heads(text).mT
    assert torch.equal(pair.forward.weights, scores.softmax(-1))
    assert torch.equal(pair.backward.weights, scores.softmax(-2).mT)


@pytest.mark.filterwarnings("ignore:Found in the first pass")
@pytest.mark.parametrize("run", [attends_within_and_unseen, attends_within_and_folded])
def test_a_first_pass_of_modules_that_compute_several(run):
    model = Runs(lambda m, x, y: (m.a_to_b(x, y), m.b_to_a(y, x)), a_to_b=Runs(run), b_to_a=Runs(run))
    audio, text = tokens()
    with AttentionRecorder(model) as recorder:
        model(audio, text)
        (pair,) = recorder.attention
    fold = (lambda x: x[:, None]) if run is attends_within_and_unseen else heads
    assert torch.equal(pair.forward.weights, (fold(audio) @ fold(text).mT).softmax(-1))
    with AttentionRecorder(model) as recorder:
        model(audio, text[:, :AUDIO])
    with pytest.raises(DiscoveryError, match=tells("'a_to_b'", "which attention", "'a_to_b#1'", "'a_to_b#2'")):
        _ = recorder.attention


@pytest.mark.filterwarnings("ignore:.*has no axis for heads")
def test_attention_beside_class_probabilities_that_look_like_it():
    def run(module, x, y):
        weights = (x @ y.mT).softmax(-1)
        return (weights @ y)[..., :4].softmax(-1)

    audio, text = tokens()
    with pytest.raises(DiscoveryError, match=tells("'fusion#1' (2, 5, 7)", "one tensor (2, 5, 4)")):
        record_fusion(Runs(run), WHOLE)
    (pair,) = record_fusion(Runs(run), {"a_to_b": "fusion#1"})
    assert torch.equal(pair.forward.weights[:, 0], (audio @ text.mT).softmax(-1))


def test_a_fused_kernel_is_surely_attention_whatever_stands_beside():
    """Queries of the module's own, as many heads as keys, and class probabilities for each token."""
    audio, text = tokens()

    def run(module, x, y):
        latents = heads(torch.ones(len(y), 4, WIDTH))
        return F.scaled_dot_product_attention(latents, heads(y), heads(y)), x.softmax(-1)

    (pair,) = record_fusion(Runs(run), WHOLE, (audio, text[:, :HEADS]))
    assert pair.forward.weights.shape == (BATCH, HEADS, 4, HEADS)
