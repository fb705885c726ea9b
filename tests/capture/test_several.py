"""Several attentions in one module, or runs of it: each has a number, and what a refusal lists can be named."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn.capture import AttentionRecorder, discover
from lightning_xattn.core.errors import DiscoveryError, XAttnWarning
from tests.capture.models import (
    BATCH,
    Fusing,
    Runs,
    heads,
    mha,
    per_head,
    record,
    record_fusion,
    recorded,
    softmax,
    tokens,
)
from tests.messages import tells
from tests.toy import AUDIO, TEXT, WIDTH

pytestmark = pytest.mark.filterwarnings("ignore:Found in the first pass")


def identity():
    """A projection that leaves tokens as they are, for models that must have gradients."""
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.eye_(linear.weight)
    return linear


def two_streams(module, audio, text):
    audio = getattr(module, "project", nn.Identity())(audio)
    there = F.scaled_dot_product_attention(heads(audio), heads(text), heads(text))
    return there, softmax(text, audio) @ heads(audio)


BOTH = {"audio_to_text": "fusion#1", "text_to_audio": "fusion#2"}


def assert_two_streams(pair):
    audio, text = tokens()
    torch.testing.assert_close(pair.forward.weights, softmax(audio / (WIDTH // 3) ** 0.5, text), atol=2e-6, rtol=1e-5)
    assert torch.equal(pair.backward.weights, softmax(text, audio))


def test_two_streams_in_one_function():
    (pair,) = record(Fusing(Runs(two_streams, project=identity())), lambda m: m(*tokens()), BOTH)
    assert pair.layer == "fusion"
    assert_two_streams(pair)


def test_two_streams_in_one_function_are_found():
    model = Fusing(Runs(two_streams))
    recorder = AttentionRecorder(model)
    for _ in range(2):  # the first step, and one of those in which only the layers are looked at
        with recorder:
            model(*tokens())
            (pair,) = recorder.attention
        assert_two_streams(pair)
    assert [str(source) for layer in recorder.layers for _, source in layer.sources] == ["fusion#1", "fusion#2"]


class Named(nn.Module):
    """The tokens are called as the arguments are."""

    def forward(self, audio, text):
        return two_streams(self, audio, text)


def test_several_are_not_guessed_and_a_number_must_exist():
    facts = "'fusion#1' (2, 3, 5, 7)", "5 queries (audio)", "7 keys (text)", "'fusion#2' (2, 3, 7, 5)", "'path[item]'"
    with pytest.raises(DiscoveryError, match=tells(*facts)):
        record_fusion(Named(), {"a_to_b": "fusion"})
    with pytest.raises(DiscoveryError, match=tells("'fusion#3'", "'fusion'", "2 attention(s)", "'path#2'")):
        record_fusion(Runs(two_streams), {"a_to_b": "fusion#3"})


def test_numbers_go_through_the_runs_of_a_step():
    audio, text = tokens()
    one = Runs(lambda m, q, k: softmax(m.project(q), k) @ heads(k), project=identity())
    model = Runs(lambda m, x, y: (m.one(x, y), m.one(y, x)), one=one)
    (pair,) = record(model, lambda m: m(audio, text), {"a_to_b": "one#1", "b_to_a": "one#2"})
    assert torch.equal(pair.forward.weights, softmax(audio, text))
    assert torch.equal(pair.backward.weights, softmax(text, audio))


def candidates(message):
    """What a message lists, as it is written there."""
    return re.findall(r"'([^']*)' \(\d", message)


def ambiguous(module, x, y):
    softmax(x, x + 1)
    return softmax(x, y) @ heads(y)


REFUSED = {
    "a module that computes several": (Runs(ambiguous), {"a_to_b": "fusion"}, (AUDIO, AUDIO)),
    "a first step": (Runs(ambiguous), None, (AUDIO, AUDIO)),
    "self-attention in a first step": (Runs(lambda m, x, y: m.p(x + 1, x + 1, x), p=mha()), None, (AUDIO, TEXT)),
    "a softmax over the queries": (
        Runs(lambda m, x, y: [(heads(x) @ heads(y).mT).softmax(axis) for axis in (-1, -2)]),
        {"a_to_b": "fusion"},
        (AUDIO, TEXT),
    ),
    "what is returned": (
        Runs(lambda m, x, y: (softmax(x, y).exp2() / softmax(x, y).exp2().sum(-1, keepdim=True), x)),
        {"a_to_b": "fusion"},
        (AUDIO, TEXT),
    ),
}


@pytest.mark.parametrize(("fusion", "attention", "lengths"), REFUSED.values(), ids=REFUSED)
def test_the_candidates_of_a_refusal_can_be_pasted(fusion, attention, lengths):
    generator = torch.Generator().manual_seed(4)
    inputs = [torch.randn(BATCH, n, WIDTH, generator=generator) for n in lengths]
    with pytest.raises(DiscoveryError) as refused:
        record_fusion(fusion, attention, inputs)
    assert re.search(r"\d+ queries.*\d+ keys", str(refused.value))
    found = candidates(str(refused.value))
    assert found
    shapes = set()
    for name in found:
        if "[" in name and not name.endswith("[0]"):
            continue  # tokens, returned beside
        (pair,) = record_fusion(fusion, {"a_to_b": name}, inputs)
        shapes.add((name, *pair.forward.weights.shape))
    assert len(shapes) == len([name for name in found if "[" not in name or name.endswith("[0]")])


@pytest.mark.parametrize("lengths", [(AUDIO, TEXT), (AUDIO, AUDIO)])
def test_a_block_that_attends_across_and_holds_self_attention(lengths):
    """What it computes itself is the second that is computed while it runs."""
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(BATCH, n, WIDTH, generator=generator) for n in lengths)
    inner = Runs(lambda m, x: softmax(x, x) @ heads(x))
    model = Runs(lambda m, x, y: m.block(x, y), block=Runs(lambda m, x, y: (m.sa(x), softmax(x, y)), sa=inner))
    with AttentionRecorder(model) as recorder:
        model(x, y)
        if lengths[0] == lengths[1]:
            with pytest.raises(DiscoveryError) as refused:
                _ = recorder.attention
            assert candidates(str(refused.value)) == ["block.sa", "block#2"]
        else:
            assert len(recorder.attention) == 1
    with AttentionRecorder(model, {"a_to_b": "block#2"}) as recorder:
        model(x, y)
    assert torch.equal(recorder.attention[0].forward.weights, softmax(x, y))


def test_attention_of_the_model_itself_can_be_named():
    audio, text = tokens()
    model = Runs(ambiguous)
    with AttentionRecorder(model) as recorder:
        model(audio, text[:, :AUDIO])
    with pytest.raises(DiscoveryError) as refused:
        _ = recorder.attention
    assert candidates(str(refused.value)) == ["#1", "#2"]
    with AttentionRecorder(model, {"a_to_b": "#2"}) as recorder:
        model(audio, text)
    assert torch.equal(recorder.attention[0].forward.weights, softmax(audio, text))


@pytest.mark.parametrize(
    ("names", "lengths"),
    [(("cross_attn_1", "cross_attn_2"), (AUDIO, TEXT)), (("layers.0", "layers.1"), (AUDIO, AUDIO))],
)
def test_two_modules_whose_names_differ_in_a_digit_are_a_pair(names, lengths):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([mha(), mha()])
            self.cross_attn_1, self.cross_attn_2 = mha(), mha()

        def forward(self, x, y):
            return [self.get_submodule(name)(*of)[0] for name, of in zip(names, ((x, y, y), (y, x, x)), strict=True)]

    x, y = (torch.randn(BATCH, n, WIDTH) for n in lengths)
    model = Cross()
    with AttentionRecorder(model) as recorder:
        model(x, y)
    (pair,) = recorder.attention
    for got, name, (queries, keys) in zip(pair.directions, names, ((x, y), (y, x)), strict=True):
        weights = model.get_submodule(name)(queries, keys, keys, average_attn_weights=False)[1]
        assert torch.equal(got.weights, weights)


def test_no_message_contradicts_itself():
    model = nn.ModuleDict({"fuse": mha(), "other": nn.Linear(WIDTH, WIDTH)})
    with AttentionRecorder(model) as recorder:
        model["other"](tokens()[0])
    with pytest.raises(DiscoveryError, match=tells("fuse", "No attention ran")):
        _ = recorder.attention


def test_doubtful_bystanders_are_listed_and_left_out():
    """A head that pools with one learned query, and attention to sampled points, as deformable attention has it."""
    query = torch.randn(1, 1, WIDTH)

    def deformable(module, x):
        points = x.unflatten(-1, (3, 4)).softmax(-1)  # (batch, queries, heads, points)
        return points.flatten(2)

    def run(module, x, y):
        x = x + module.points(x)
        there, back = module.p(x, y, y)[0], module.q(y, x, x)[0]
        return module.pool(query.expand(len(x), -1, -1), there, there), back

    model = Runs(run, points=Runs(deformable), p=mha(), q=mha(), pool=mha())
    with AttentionRecorder(model) as recorder:
        model(*tokens())
        with pytest.warns(XAttnWarning, match=tells("{'a_to_b': 'p', 'b_to_a': 'q'}", "Left out", "1 queries")):
            (pair,) = recorder.attention
    assert pair.forward.weights.shape[2:] == (AUDIO, TEXT)


def test_a_list_of_modules_with_none_in_it():
    model = nn.Module()
    model.layers = nn.ModuleList([None, mha()])
    model.forward = lambda x, y: model.layers[1](x, y, y)
    for attention in (None, {"a_to_b": "layers"}):
        with AttentionRecorder(model, attention) as recorder:
            model(*tokens())
        assert recorder.attention[0].forward.weights.shape[2:] == (AUDIO, TEXT)


def test_a_first_step_of_a_large_model_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(discover, "BUDGET", 1000)
    model = Fusing(Runs(two_streams))
    recorder = AttentionRecorder(model)
    with recorder:
        model(*tokens())
        with pytest.warns(XAttnWarning, match=tells("too large", "left out")):
            assert recorder.attention == ()
        recorder.clear()
        model(*tokens())
        assert_two_streams(recorder.attention[0])


@pytest.mark.filterwarnings("ignore:'block' has no axis for heads")
@pytest.mark.parametrize("inner", ["self_attn", "encoder"])
def test_a_block_with_self_attention_is_not_taken_for_it(inner):
    child = mha() if inner == "self_attn" else nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)

    def block(module, audio, text):
        getattr(module, inner)(audio, *((audio, audio) if inner == "self_attn" else ()))
        return F.scaled_dot_product_attention(audio, text, text)

    model = nn.Module()
    model.block = Runs(block, **{inner: child})
    model.forward = lambda audio, text: model.block(audio, text)
    (pair,) = recorded(model, {"audio_to_text": "block"})
    audio, text = tokens()
    expected = (audio @ text.mT / WIDTH**0.5).softmax(-1)
    torch.testing.assert_close(pair.forward.weights[:, 0], expected, atol=2e-6, rtol=1e-5)


def test_one_module_under_two_names_takes_turns_or_is_refused():
    shared = mha()
    model = Runs(lambda m, x, y: (m.p(x, y, y), m.q(y, x, x)), p=shared, q=shared)
    x, y = tokens()[0], tokens()[0].flip(1)
    (pair,) = recorded(model, {"a_to_b": "p", "b_to_a": "q"}, (x, y))
    for attention, (query, key) in zip(pair.directions, ((x, y), (y, x)), strict=True):
        assert torch.equal(attention.weights, per_head(shared, query, key))
    model = Runs(None, a_to_b=shared, b_to_a=shared)
    with pytest.raises(DiscoveryError, match=tells("a_to_b", "b_to_a", "one module", "attention=")):
        AttentionRecorder(model)


@pytest.mark.filterwarnings("ignore:Found in the first pass")
def test_one_module_that_attends_within_and_across():
    shared = mha()

    def run(module, x, y):
        return module.p(x, x, x), module.p(y, y, y), module.p(x, y, y), module.p(y, x, x)

    model, (x, y) = Runs(run, p=shared), tokens()
    recorder = AttentionRecorder(model)
    for _ in range(3):
        with torch.no_grad(), recorder:
            model(x, y)
            (pair,) = recorder.attention
        assert torch.equal(pair.forward.weights, per_head(shared, x, y))
        assert torch.equal(pair.backward.weights, per_head(shared, y, x))
