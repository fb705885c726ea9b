"""Several attentions in one module: each has a number, and what a refusal lists can be named as it stands."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.capture import AttentionRecorder, discover
from lightning_xattn.core.errors import DiscoveryError, XAttnWarning
from tests.capture.models import BATCH, Fusing, Runs, heads, mha, record, record_fusion, softmax, tokens
from tests.messages import tells
from tests.toy import AUDIO, TEXT, WIDTH, ToyModule, quiet_trainer, toy_loader

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


def test_a_number_that_does_not_exist():
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


@pytest.mark.parametrize("names", [("cross_attn_1", "cross_attn_2"), ("layers.0", "layers.1")])
@pytest.mark.parametrize("lengths", [(AUDIO, TEXT), (AUDIO, AUDIO)])
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


def test_layers_of_two_modules_whose_names_differ_in_a_digit():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn1, self.attn2 = mha(), mha()

        def forward(self, x, y):
            return x + self.attn1(x, y, y)[0], y + self.attn2(y, x, x)[0]

    model = nn.Sequential(*[Block() for _ in range(2)])
    model.forward = lambda x, y: model[1](*model[0](x, y))
    with AttentionRecorder(model) as recorder:
        model(*tokens())
    assert [pair.layer for pair in recorder.attention] == ["0", "1"]


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
        with pytest.warns(
            XAttnWarning, match=tells("{'a_to_b': 'p', 'b_to_a': 'q'}", "Left out", "'pool'", "1 queries")
        ):
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


def test_keys_as_many_as_a_token_is_wide():
    audio, text = tokens()[0], torch.randn(BATCH, WIDTH, WIDTH)
    for run in (lambda m, x, y: softmax(x, y) @ heads(y), lambda m, x, y: F.scaled_dot_product_attention(x, y, y)):
        with AttentionRecorder(Fusing(Runs(run)), {"a_to_b": "fusion"}) as recorder:
            recorder._model(audio, text)
        if run.__code__.co_names[0] == "softmax":
            (pair,) = recorder.attention
        else:
            with pytest.warns(XAttnWarning, match=tells("'fusion'", "one head")):
                (pair,) = recorder.attention
        assert pair.forward.weights.shape[2:] == (AUDIO, WIDTH)


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


class OneDirection(ToyModule):
    """The toy with one function that attends in both directions."""

    def __init__(self):
        super().__init__()
        del self.audio_to_text_attn, self.text_to_audio_attn
        self.fusion = Runs(two_streams)

    def forward(self, audio, text):
        fused = self.fusion(self.audio(audio), self.text(text))
        return self.head(torch.cat([x.transpose(1, 2).flatten(2).mean(1) for x in fused], dim=1))


@pytest.mark.parametrize("budget", [64 * 2**20, 1000])
def test_a_trainer_with_a_large_model(budget, monkeypatch):
    monkeypatch.setattr(discover, "BUDGET", budget)
    mode = AttentionExplainabilityCallback()
    trainer = quiet_trainer(callbacks=[mode], num_sanity_val_steps=0)
    if budget == 1000:
        with pytest.warns(XAttnWarning, match=tells("too large", "left out")):
            trainer.validate(OneDirection(), toy_loader(), verbose=False)
    else:
        trainer.validate(OneDirection(), toy_loader(), verbose=False)
    assert mode.history[0]["samples"] == (23 if budget > 1000 else 18)
