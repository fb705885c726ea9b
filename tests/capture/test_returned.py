"""Modules that return their attention: where it is found, what is said of it, and what is refused."""

import pytest
import torch
from torch import nn

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DiscoveryError, ShapeError, XAttnWarning
from tests.capture.models import BATCH, record, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH


def closed(scores):
    """Weights that no softmax of torch's computed, as from a kernel of one's own."""
    powers = 2.0**scores
    return powers / powers.sum(-1, keepdim=True)


class Fusion(nn.Module):
    """Computes both directions at once and returns what ``give`` makes of the fused tokens and the weights."""

    def __init__(self, give, normalise=closed):
        super().__init__()
        torch.manual_seed(0)
        self.give, self.normalise = give, normalise
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def weights(self, queries, keys):
        q, k = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (self.q(queries), self.k(keys)))
        return self.normalise(q @ k.transpose(-1, -2))

    def forward(self, audio, text, return_attention=True):
        there, back = self.weights(audio, text), self.weights(text, audio)
        fused = torch.cat([there.mean(1) @ text, back.mean(1) @ audio], dim=1)
        return self.give(fused, there, back) if return_attention else fused


class Model(nn.Module):
    def __init__(self, *args, **settings):
        super().__init__()
        self.fusion = Fusion(*args, **settings)

    def forward(self, audio, text):
        return self.fusion(audio, text)


BY_NAME = {"audio_to_text": "fusion", "text_to_audio": "fusion"}
GIVES = {
    "a dict, as in the guide": (lambda f, a, b: (f, {"audio_to_text": a, "text_to_audio": b}), BY_NAME),
    "a flat dict": (lambda f, a, b: {"tokens": f, "text_to_audio": b, "audio_to_text": a}, BY_NAME),
    "a tuple": (lambda f, a, b: (f, a, b), {"audio_to_text": "fusion[1]", "text_to_audio": "fusion[2]"}),
    "from the end": (lambda f, a, b: (f, a, b), {"audio_to_text": "fusion[-2]", "text_to_audio": "fusion[-1]"}),
    "nested": (
        lambda f, a, b: {"hidden": f, "attentions": (a, b)},
        {"audio_to_text": "fusion['attentions'][0]", "text_to_audio": "fusion[attentions][1]"},
    ),
}


@pytest.mark.parametrize("normalise", [closed, lambda scores: scores.softmax(-1)], ids=["closed", "softmax"])
@pytest.mark.parametrize(("give", "attention"), GIVES.values(), ids=GIVES)
def test_where_it_is_found(give, attention, normalise):
    model, (audio, text) = Model(give, normalise), tokens()
    (pair,) = record(model, lambda m: m(audio, text), attention)
    with torch.no_grad():
        assert torch.equal(pair.forward.weights, model.fusion.weights(audio, text))
        assert torch.equal(pair.backward.weights, model.fusion.weights(text, audio))


@pytest.mark.parametrize("give", [lambda f, a, b: a, lambda f, a, b: (f, a), lambda f, a, b: {"x": f, "y": a}])
def test_the_one_tensor_whose_rows_sum_to_one(give):
    model, (audio, text) = Model(give), tokens()
    (pair,) = record(model, lambda m: m(audio, text), {"audio_to_text": "fusion"})
    with torch.no_grad():
        assert torch.equal(pair.forward.weights, model.fusion.weights(audio, text))


def test_head_averages_are_one_head_and_said_to_be_so():
    model, (audio, text) = Model(lambda f, a, b: (f, a.mean(1))), tokens()
    with AttentionRecorder(model, {"audio_to_text": "fusion"}) as recorder:
        model(audio, text)
        with pytest.warns(XAttnWarning, match=tells("'fusion[1]'", "one head", "average", "larger entropy")):
            _ = recorder.attention
        recorder.clear()
        model(audio[:1], text[:1])
        assert len(recorder.attention[0].forward.weights) == 1  # said once
        recorder.clear()
        model(audio, text)
    weights = recorder.attention[0].forward.weights
    assert weights.shape == (BATCH, 1, AUDIO, TEXT)
    torch.testing.assert_close(weights[:, 0], model.fusion.weights(audio, text).mean(1).detach())


def test_keys_without_any_weight_are_padding():
    def give(fused, there, back):
        there = there.clone()
        there[1, :, :, 5:] = 0
        return {"audio_to_text": there / there.sum(-1, keepdim=True), "text_to_audio": back}

    model, (audio, text) = Model(give), tokens()
    (pair,) = record(model, lambda m: m(audio, text), BY_NAME)
    seen = torch.arange(TEXT) < torch.tensor([[TEXT], [5]])
    assert torch.equal(pair.forward.key_mask, seen)
    assert torch.equal(pair.backward.query_mask, seen)


REFUSED = {
    "scores": (
        lambda f, a, b: (f, a.log()),
        ["'fusion'", "'fusion[1]' (2, 3, 5, 7)", "none of these", "sum to 1"],
    ),
    "ambiguous": (
        lambda f, a, b: (f, a, b),
        ["'fusion[0]' (2, 12, 12)", "'fusion[1]' (2, 3, 5, 7)", "'fusion[2]' (2, 3, 7, 5)", "'path[item]'"],
    ),
    "nothing": (
        lambda f, a, b: f,
        ["computes none", "one tensor (2, 12, 12)", "attention={'<a>_to_<b>': lambda model: weights}"],
    ),
}


@pytest.mark.parametrize(("give", "facts"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_clear_is_refused(give, facts):
    model, (audio, text) = Model(give), tokens()
    with pytest.raises(DiscoveryError, match=tells(*facts)), AttentionRecorder(model, {"audio_to_text": "fusion"}):
        model(audio, text)


@pytest.mark.parametrize(
    ("spoil", "training", "facts"),
    [
        (
            lambda w: w.log(),
            False,
            ["'fusion[1]'", (2, 3, 5, 7), "values from -", "before the softmax", "sum to 1"],
        ),
        (lambda w: 2 * w, False, ["'fusion[1]'", (2, 3, 5, 7), "2 ... 2", "sum to 1"]),
        (
            lambda w: nn.functional.dropout(w, 0.5),
            True,
            ["'fusion[1]'", (2, 3, 5, 7), "rows that sum to", "dropout", "eval mode"],
        ),
        (
            lambda w: w[0, 0],
            False,
            ["'fusion[1]'", "torch.float32", (5, 7), "(batch, heads, queries, keys)", "(batch, queries, keys)"],
        ),
        (lambda w: w > 0, False, ["'fusion[1]'", "torch.bool", (2, 3, 5, 7), "(batch, heads, queries, keys)"]),
    ],
)
def test_what_is_named_and_is_no_attention_is_refused(spoil, training, facts):
    model, (audio, text) = Model(lambda f, a, b: (f, spoil(a))), tokens()
    model.train(training)
    with pytest.raises(ShapeError, match=tells(*facts)), AttentionRecorder(model, {"audio_to_text": "fusion[1]"}):
        model(audio, text)


def test_an_item_that_is_not_there_and_a_module_that_should_have_run_twice():
    model, (audio, text) = Model(lambda f, a, b: (f, a)), tokens()
    with (
        pytest.raises(
            DiscoveryError,
            match=tells("'fusion[2]'", "'fusion[0]' (2, 12, 12)", "'fusion[1]' (2, 3, 5, 7)"),
        ),
        AttentionRecorder(model, {"audio_to_text": "fusion[2]"}),
    ):
        model(audio, text)
    with AttentionRecorder(model, BY_NAME) as recorder:
        model(audio, text)
        with pytest.raises(DiscoveryError, match=tells("'fusion'", "2 directions", "1 time(s)", "'fusion[1]'")):
            _ = recorder.attention


class Rotated(nn.MultiheadAttention):
    """A subclass with a forward of its own."""

    def forward(self, query, *args, **kwargs):
        return super().forward(query.flip(1), *args, **kwargs)


def test_a_subclass_with_a_forward_of_its_own():
    audio, text = tokens()
    model = nn.Module()
    model.audio_to_text_attn = Rotated(WIDTH, HEADS, batch_first=True)
    (pair,) = record(model, lambda m: m.audio_to_text_attn(audio, text, text, average_attn_weights=False))
    with torch.no_grad():
        _, expected = model.audio_to_text_attn(audio, text, text, average_attn_weights=False)
    assert torch.equal(pair.forward.weights, expected)
    (pair,) = record(model, lambda m: m.audio_to_text_attn(audio, text, text, need_weights=False))
    torch.testing.assert_close(pair.forward.weights, expected)


class Stores(nn.Module):
    """Keeps its attention instead of returning it."""

    def __init__(self):
        super().__init__()
        self.fusion = Fusion(lambda fused, there, back: fused)
        self.last = None

    def forward(self, audio, text):
        self.last = self.fusion.weights(audio, text)
        return self.fusion(audio, text)


def test_a_callable_for_everything_else():
    model, (audio, text) = Stores(), tokens()
    attention = {"audio_to_text": lambda model: model.last}
    (pair,) = record(model, lambda m: m(audio, text), attention)
    assert torch.equal(pair.forward.weights, model.fusion.weights(audio, text).detach())

    recorder = AttentionRecorder(model, {"audio_to_text": lambda model: 2 * model.last})
    with recorder:
        model(audio, text)
    with pytest.raises(ShapeError, match=tells("callable", "<lambda>", (2, 3, 5, 7), "2 ... 2", "sum to 1")):
        _ = recorder.attention
