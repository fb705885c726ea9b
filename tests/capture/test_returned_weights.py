"""Modules that return their attention: where it is found, what is said of it, and what is refused."""

import pytest
import torch
from torch import nn

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DiscoveryError, ShapeError, XAttnWarning
from tests.capture.models import BATCH, Fusing, Runs, heads, record, record_fusion, recorded, softmax, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH


def closed(scores, dim=-1):
    """Weights that no softmax of torch's computed, as from a kernel of one's own."""
    powers = 2.0**scores
    return powers / powers.sum(dim, keepdim=True)


class Fusion(nn.Module):
    """Computes both directions at once and returns what ``give`` makes of the fused tokens and the weights."""

    def __init__(self, give, normalise=closed):
        super().__init__()
        torch.manual_seed(0)
        self.give, self.normalise = give, normalise
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def weights(self, queries, keys):
        q, k = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (self.q(queries), self.k(keys)))
        return self.normalise(q @ k.mT, dim=-1)

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


@pytest.mark.parametrize(("give", "attention"), GIVES.values(), ids=GIVES)
def test_where_it_is_found(give, attention):
    # Of every other one a softmax is seen, too.
    normalise = torch.nn.functional.softmax if list(GIVES.values()).index((give, attention)) % 2 else closed
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
        pytest.raises(DiscoveryError, match=tells("'fusion[2]'", "'fusion[1]' (2, 3, 5, 7)")),
        AttentionRecorder(model, {"audio_to_text": "fusion[2]"}),
    ):
        model(audio, text)
    with AttentionRecorder(model, BY_NAME) as recorder:
        model(audio, text)
        with pytest.raises(DiscoveryError, match=tells("'fusion'", "2 directions", "1 time(s)", "'fusion[1]'")):
            _ = recorder.attention


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

    for given, found in (([1.0], "a list"), (torch.ones(2, 3), "torch.float32 of shape (2, 3)")):
        with pytest.raises(ShapeError, match=tells("callable", found, "(batch, heads, queries, keys)")):
            recorded(model, {"a_to_b": lambda model, given=given: given})


@pytest.mark.parametrize("attention", ["fusion[1]", lambda model: model.last])
def test_dropout_in_what_is_given_is_noticed_also_after_eval_mode(attention):
    def run(module, x, y):
        model.last = module.dropout(1 * softmax(x, y))
        return x, model.last

    model = Fusing(Runs(run, dropout=nn.Dropout(0.5))).eval()
    with AttentionRecorder(model, {"a_to_b": attention}) as recorder:
        model(*tokens())
        assert torch.equal(recorder.attention[0].forward.weights, softmax(*tokens()))
        recorder.clear()
        model.train()
        model(*tokens())
        with pytest.warns(XAttnWarning, match=tells((2, 3, 5, 7), "dropout", "eval mode", "left out")):
            assert recorder.attention == ()


def test_a_mapping_with_another_direction_is_not_taken():
    fusion = Runs(lambda m, audio, text: {"out": audio, "audio_to_text": (audio @ text.mT).softmax(-1)})
    with pytest.raises(DiscoveryError, match=tells("'fusion'", "fusion[audio_to_text]", (2, 5, 7))):
        record_fusion(fusion, {"text_to_audio": "fusion"})


def test_two_things_under_a_directions_name():
    def fuse(module, audio, text):
        return {
            "features": {"a_to_b": audio},
            "attention": {"a_to_b": (heads(audio) @ heads(text).mT).softmax(-1)},
        }

    with pytest.raises(DiscoveryError, match=tells("fusion[features][a_to_b]", (2, 5, 12), (2, 3, 5, 7))):
        record_fusion(Runs(fuse), {"a_to_b": "fusion"})
    (pair,) = record_fusion(Runs(fuse), {"a_to_b": "fusion[attention][a_to_b]"})
    assert pair.forward.weights.shape == (BATCH, HEADS, AUDIO, TEXT)


def test_a_key_that_is_no_direction():
    fusion = Runs(lambda m, x, y: {"time_to_event": x[:, 0], "w": (heads(x) @ heads(y).mT).softmax(-1)})
    (pair,) = record_fusion(fusion, {"a_to_b": "fusion"})
    assert pair.forward.weights.shape == (BATCH, HEADS, AUDIO, TEXT)


def test_an_item_of_a_tensor_would_be_a_sample():
    with pytest.raises(DiscoveryError, match=tells("'fusion[0]'", "one tensor (2, 3, 5, 7)")):
        record_fusion(Runs(lambda m, x, y: 1 * softmax(x, y)), {"a_to_b": "fusion[0]"})


def masked(module, x, y):
    weights = softmax(x, y)
    weights = weights * MASK
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ heads(y), weights


def masked_in_place(module, x, y):
    weights = softmax(x, y)
    weights.mul_(MASK).div_(weights.sum(-1, keepdim=True))
    return weights @ heads(y), weights


def sharpened(module, x, y):
    weights = softmax(x, y) ** 2
    return x, weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(("run", "inference"), [(masked, False), (masked_in_place, True), (sharpened, False)])
def test_what_is_done_after_a_softmax_is_in_what_is_returned(run, inference):
    audio, text = tokens()
    model = Fusing(Runs(run))
    recorder = AttentionRecorder(model, {"a_to_b": "fusion[1]"})
    with torch.inference_mode(inference), recorder:
        _, returned = model(audio, text)
    (pair,) = recorder.attention
    assert torch.equal(pair.forward.weights, returned)
    hides = run is not sharpened
    assert torch.equal(pair.forward.key_mask, (MASK.bool() | (not hides)).expand(BATCH, TEXT))


FORMS = {
    "averaged over the heads": lambda w: w.mean(1),
    "in half precision": lambda w: w.bfloat16(),
    "heads folded": lambda w: w.flatten(0, 1),
    "the very tensor": lambda w: w,
    "dropped out": nn.Dropout(0.5),
}


class Form(nn.Module):
    """A function, or a module in the mode of what holds it."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, weights):
        return self.form(weights)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_softmax_that_is_returned_in_another_form_is_the_attention(form):
    audio, text = tokens()
    fusion = Runs(lambda m, x, y: (x, m.form(softmax(m.q(x), y))), q=nn.Linear(WIDTH, WIDTH), form=Form(form))
    model = Fusing(fusion)
    (pair,) = record(model, lambda m: m(audio, text), {"a_to_b": "fusion"})
    assert torch.equal(pair.forward.weights, softmax(fusion.q(audio), text))


@pytest.mark.filterwarnings("ignore:Found in the first pass")
@pytest.mark.parametrize("run", [masked, masked_in_place, sharpened])
def test_what_is_returned_in_a_first_pass(run):
    model = Runs(lambda m, x, y: m.a_to_b(x, y), a_to_b=Runs(run))
    recorder = AttentionRecorder(model)
    for _ in range(2):
        with recorder:
            _, returned = model(*tokens())
        if run is masked_in_place:
            assert torch.equal(recorder.attention[0].forward.weights, returned)
        else:
            with pytest.raises(DiscoveryError, match=tells("'a_to_b'", "which attention", "'a_to_b#1' (2, 3, 5, 7)")):
                _ = recorder.attention


MASK = (torch.arange(TEXT) < 4).float()


@pytest.mark.parametrize("run", [masked, sharpened])
def test_attention_that_is_returned_beside_another_softmax_is_asked_for(run):
    with pytest.raises(DiscoveryError, match=tells("'fusion#1' (2, 3, 5, 7)", "'fusion[1]'")):
        record_fusion(Runs(run), {"a_to_b": "fusion"})
