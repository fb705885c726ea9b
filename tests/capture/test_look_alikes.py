"""What looks like a module's attention and is none, or is it in another form: read as it is, or refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DiscoveryError, ShapeError, XAttnWarning
from tests.capture.models import BATCH, Fusing, Runs, folded, heads, record, record_fusion, softmax, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH

MASK = (torch.arange(TEXT) < 4).float()


ITEM, WHOLE = {"a_to_b": "fusion[1]"}, {"a_to_b": "fusion"}


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


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("run", [masked, masked_in_place, sharpened])
def test_what_is_done_after_a_softmax_is_in_what_is_returned(run, inference):
    audio, text = tokens()
    model = Fusing(Runs(run))
    recorder = AttentionRecorder(model, ITEM)
    with torch.inference_mode(inference), recorder:
        _, returned = model(audio, text)
    (pair,) = recorder.attention
    assert torch.equal(pair.forward.weights, returned)
    hides = run is not sharpened
    assert torch.equal(pair.forward.key_mask, (MASK.bool() | (not hides)).expand(BATCH, TEXT))


@pytest.mark.parametrize("run", [masked, sharpened])
def test_attention_that_is_returned_beside_another_softmax_is_asked_for(run):
    with pytest.raises(DiscoveryError, match=tells("'fusion#1' (2, 3, 5, 7)", "'fusion[1]'")):
        record_fusion(Runs(run), WHOLE)


def gated(module, x, y):
    gate = torch.stack([heads(x), heads(x).flip(-1)], dim=-1).mean(-2).softmax(-1)  # (batch, heads, queries, 2)
    return gate.mean() * x, (x @ y.mT).softmax(-1)


@pytest.mark.filterwarnings("ignore:.*has no axis for heads")
def test_a_gate_with_four_axes_is_not_taken_for_the_attention_that_is_returned():
    audio, text = tokens()
    (pair,) = record_fusion(Runs(gated), WHOLE)
    assert torch.equal(pair.forward.weights[:, 0], (audio @ text.mT).softmax(-1))


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
    (pair,) = record(model, lambda m: m(audio, text), WHOLE)
    assert torch.equal(pair.forward.weights, softmax(fusion.q(audio), text))


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
    return sharpened(module, x, y)


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


@pytest.mark.filterwarnings("ignore:.*has no axis for heads")
def test_a_kernel_beside_attention_that_is_returned():
    audio, text = tokens()
    (pair,) = record_fusion(Runs(attends_within_and_unseen), WHOLE)
    assert torch.equal(pair.forward.weights[:, 0], (audio @ text.mT).softmax(-1))


def test_attention_within_beside_attention_to_the_pixels_of_an_image():
    run = Runs(lambda m, x, image: attends_within_and_folded(m, x, image.flatten(2).mT))
    with pytest.raises(DiscoveryError, match=tells("'fusion#1' (2, 3, 5, 5)", "'fusion#2' (6, 5, 6)")):
        record_fusion(run, WHOLE, [tokens()[0], torch.randn(BATCH, WIDTH, 2, 3)])


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
            with pytest.raises(
                DiscoveryError,
                match=tells(
                    "'a_to_b'",
                    "which attention",
                    "'a_to_b#1' (2, 3, 5, 7)",
                    "5 queries",
                    "7 keys",
                    "attention={'<a>_to_<b>'",
                ),
            ):
                _ = recorder.attention


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


def test_keys_without_weight_of_a_softmax_are_seen_beside_a_sample_that_is_all_hidden():
    def run(module, x, y):
        scores = heads(x) @ heads(y).mT
        scores[0, ..., 6] = -200.0  # so low that the weight is 0, and no mask
        scores[1] = -torch.inf
        return x, scores.softmax(-1)

    (pair,) = record_fusion(Runs(run), ITEM)
    assert (pair.forward.weights[0, ..., 6] == 0).all()
    assert pair.forward.key_mask[0].all()


def test_an_item_of_a_tensor_would_be_a_sample():
    with pytest.raises(DiscoveryError, match=tells("'fusion[0]'", "one tensor (2, 3, 5, 7)")):
        record_fusion(Runs(lambda m, x, y: 1 * softmax(x, y)), {"a_to_b": "fusion[0]"})


def test_dropout_in_what_is_returned_is_noticed_also_after_eval_mode():
    dropout = nn.Dropout(0.5)
    model = Fusing(Runs(lambda m, x, y: (x, m.dropout(1 * softmax(x, y))), dropout=dropout)).eval()
    with AttentionRecorder(model, ITEM) as recorder:
        model(*tokens())
        assert torch.equal(recorder.attention[0].forward.weights, softmax(*tokens()))
        recorder.clear()
        model.train()
        model(*tokens())
        with pytest.warns(XAttnWarning, match=tells((2, 3, 5, 7), "dropout", "eval mode", "left out")):
            assert recorder.attention == ()


def test_dropout_in_what_a_callable_gives_is_noticed_also_after_eval_mode():
    model = Fusing(Runs(lambda m, x, y: setattr(m, "last", m.dropout(1 * softmax(x, y))), dropout=nn.Dropout(0.5)))
    with AttentionRecorder(model.eval(), {"a_to_b": lambda model: model.fusion.last}) as recorder:
        model(*tokens())
        assert torch.equal(recorder.attention[0].forward.weights, softmax(*tokens()))
        recorder.clear()
        model.train()
        model(*tokens())
        with pytest.warns(XAttnWarning, match=tells((2, 3, 5, 7), "dropout", "eval mode", "left out")):
            assert recorder.attention == ()


def test_a_callable_must_give_a_tensor():
    model = Fusing(Runs(lambda m, x, y: x))
    for given, found in (([1.0], "a list"), (torch.ones(2, 3), "torch.float32 of shape (2, 3)")):
        with pytest.raises(
            ShapeError,
            match=tells("callable", "<lambda>", found, "(batch, heads, queries, keys)", "(batch, queries, keys)"),
        ):
            recorded_by(model, lambda model, given=given: given)


def recorded_by(model, read):
    with AttentionRecorder(model, {"a_to_b": read}) as recorder:
        model(*tokens())
    return recorder.attention
