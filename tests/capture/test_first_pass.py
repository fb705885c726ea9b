"""Models whose names tell nothing: one pass shows what attends across, or everything is listed and asked."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DiscoveryError, XAttnWarning
from tests.capture.models import BATCH, Runs, heads, mha, record, recorded
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH, ToyModule, quiet_trainer, toy_loader

pytestmark = pytest.mark.filterwarnings("ignore:Found in the first pass")


def attention():
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)


def assert_weights(pair, there, back):
    """A pair has the weights of two ``nn.MultiheadAttention``, each with its queries and keys."""
    for got, (module, queries, keys) in zip(pair.directions, (there, back), strict=True):
        with torch.no_grad():
            assert torch.equal(got.weights, module(queries, keys, keys, average_attn_weights=False)[1])


class Sdpa(nn.Module):
    """Attention by hand, a module of its own."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        for projection in (self.q, self.k):  # attention as after some training
            nn.init.normal_(projection.weight, std=0.6)

    def forward(self, queries, keys, *_, **__):
        q, k = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (self.q(queries), self.k(keys)))
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2), None


class Fuse(nn.Module):
    """Self-attention of each side and cross-attention between the sides, layer after layer."""

    def __init__(self, make=attention, layers=1, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            block = nn.ModuleDict({name: make() for name in ("own", "look", "hear")})
            block["norm"] = nn.LayerNorm(WIDTH) if norm else nn.Identity()
            self.blocks.append(block)

    def forward(self, x, y):
        for block in self.blocks:
            x, y = block["norm"](x), block["norm"](y)
            x = x + block["own"](x, x, x)[0]
            x, y = x + block["look"](x, y, y)[0], y + block["hear"](y, x, x)[0]
        return x, y


def sides(x=AUDIO, y=TEXT):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, x, WIDTH, generator=generator), torch.randn(BATCH, y, WIDTH, generator=generator)


@pytest.mark.parametrize("make", [attention, Sdpa])
@pytest.mark.parametrize("layers", [1, 2])
def test_opposite_numbers_of_tokens_pair_up(make, layers):
    model, (x, y) = Fuse(make, layers), sides()
    pairs = record(model, lambda m: m(x, y))
    assert [pair.layer for pair in pairs] == [f"blocks.{i}" for i in range(layers)]
    for pair in pairs:
        assert [str(a.direction) for a in pair.directions] == ["a_to_b", "b_to_a"]
        assert pair.forward.weights.shape == (BATCH, HEADS, AUDIO, TEXT)
        assert pair.backward.weights.shape == (BATCH, HEADS, TEXT, AUDIO)
    named = {
        "a_to_b": [f"blocks.{i}.look" for i in range(layers)],
        "b_to_a": [f"blocks.{i}.hear" for i in range(layers)],
    }
    with torch.no_grad(), AttentionRecorder(model, named) as recorder:
        model(x, y)
    for found, told in zip(pairs, recorder.attention, strict=True):
        assert torch.equal(found.forward.weights, told.forward.weights)
        assert torch.equal(found.backward.weights, told.backward.weights)


def test_it_is_said_once_what_was_found_and_how_to_name_it():
    model, (x, y) = Fuse(), sides()
    with AttentionRecorder(model) as recorder:
        assert recorder.layers == ()
        model(x, y)
        with pytest.warns(XAttnWarning, match=tells("'a_to_b': 'blocks.0.look'", "'b_to_a': 'blocks.0.hear'")):
            (first,) = recorder.attention
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            recorder.clear()
            model(y, y)  # from now on only what goes across is watched, whatever it looks like
            (second,) = recorder.attention
    assert first.forward.weights.shape != second.forward.weights.shape


class Same(nn.Module):
    """Two sides of as many tokens."""

    def __init__(self, norm):
        super().__init__()
        self.look, self.hear = attention(), attention()
        self.norm = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(4)]) if norm else [nn.Identity()] * 4

    def forward(self, x, y):
        a, b, c, d = (norm(side) for norm, side in zip(self.norm, (x, y, y, x), strict=True))
        return self.look(a, b, b)[0], self.hear(c, d, d)[0]


def test_equal_numbers_of_tokens_pair_up_by_the_tensors_themselves_or_not_at_all():
    x, y = sides(AUDIO, AUDIO)
    model = Same(norm=False)
    (pair,) = record(model, lambda m: m(x, y))
    assert_weights(pair, (model.look, x, y), (model.hear, y, x))
    model = Same(norm=True)  # queries and keys stand nowhere else again
    with AttentionRecorder(model) as recorder:
        model(x, y)
    with pytest.raises(DiscoveryError, match=tells("'look' (2, 3, 5, 5)", "'hear' (2, 3, 5, 5)")):
        _ = recorder.attention


class Three(nn.Module):
    """Three sides, two of which have as many tokens, so that lengths alone do not tell."""

    def __init__(self):
        super().__init__()
        self.p, self.q, self.r, self.s = (attention() for _ in range(4))

    def forward(self, x, y):
        z = y[:, :AUDIO] + 1
        return self.p(x, y, y), self.q(z, y, y), self.r(y, z, z), self.s(y, x, x)


def test_what_is_not_clear_is_listed_and_asked():
    (x, y), fuse = sides(), Fuse()
    for model, run, facts in (
        (
            Three(),
            lambda m: m(x, y),
            ["'p' (2, 3, 5, 7)", "5 queries (query)", "7 keys (key)", "'q'", "'r'", "'s'", "attention={'<a>_to_<b>'"],
        ),
        (
            fuse,
            lambda m: m.blocks[0]["own"](x, x, x),
            ["cross-attention", "'blocks.0.own'", "JointSequence('path.to.module', spans="],
        ),
        (nn.Linear(2, 2), lambda m: m, ["No attention", "Linear has no nn.MultiheadAttention"]),
    ):
        with AttentionRecorder(model) as recorder:
            run(model)
        with pytest.raises(DiscoveryError, match=tells(*facts)):
            _ = recorder.attention


class Steps(ToyModule):
    """Calls parts of what it holds, and never the forward of the whole."""

    def __init__(self):
        super().__init__()
        del self.audio_to_text_attn, self.text_to_audio_attn
        self.net = nn.ModuleDict({"one": Sdpa(), "two": Sdpa()})

    def validation_step(self, batch, batch_idx):
        audio, text = self.audio(batch[0]), self.text(batch[1])
        there, back = self.net["one"](audio, text)[0], self.net["two"](text, audio)[0]
        return {"logits": self.head(torch.cat([there.mean(1), back.mean(1)], dim=1)), "targets": batch[2]}


def test_a_step_that_calls_parts_of_the_model():
    mode = AttentionExplainabilityCallback(figures_every_n_epochs=0)
    quiet_trainer(callbacks=[mode]).validate(Steps(), toy_loader(), verbose=False)
    assert mode.history[0]["samples"] == 23
    assert "alignment/correct" in mode.history[0]


def test_names_of_modules_that_are_no_multihead_attention_tell_the_direction():
    model, (x, y) = nn.Module(), sides()
    model.video_to_text, model.text_to_video, model.own = Sdpa(), Sdpa(), Sdpa()
    model.forward = lambda x, y: (model.own(x, x), model.video_to_text(x, y), model.text_to_video(y, x))
    (pair,) = record(model, lambda m: m(x, y))
    assert [str(a.direction) for a in pair.directions] == ["video_to_text", "text_to_video"]


class Nameless(ToyModule):
    """The toy with names that tell nothing."""

    def __init__(self):
        super().__init__()
        self.one, self.two = self.audio_to_text_attn, self.text_to_audio_attn
        del self.audio_to_text_attn, self.text_to_audio_attn

    def forward(self, audio, text):
        audio, text = self.audio(audio), self.text(text)
        there, back = self.one(audio, text, text)[0], self.two(text, audio, audio)[0]
        return self.head(torch.cat([there.mean(1), back.mean(1)], dim=1))


def test_a_trainer_with_a_model_whose_names_tell_nothing():
    mode, module = AttentionExplainabilityCallback(figures_every_n_epochs=0), Nameless()
    trainer = quiet_trainer(callbacks=[mode], num_sanity_val_steps=2, max_epochs=2)
    trainer.fit(module, toy_loader(), toy_loader(seed=1))
    assert [record["samples"] for record in mode.history] == [23, 23]
    # The modules that give the tokens are called after the modalities.
    assert {"entropy/audio_to_text/all", "entropy/text_to_audio/head_2"} <= set(mode.history[0])

    named = AttentionExplainabilityCallback({"audio_to_text": "one", "text_to_audio": "two"}, figures_every_n_epochs=0)
    for callback in (mode, named):
        quiet_trainer(callbacks=[callback]).validate(module, toy_loader(), verbose=False)
    assert named.history[-1] == mode.history[-1]


@pytest.mark.parametrize(
    ("reduce", "keys"),
    [(lambda x: x[:, ::2], 3), (lambda x: torch.cat([x.flip(1), x], dim=1), 10)],
    ids=["keys are pooled", "keys are kept from before"],
)
def test_other_numbers_of_queries_and_keys_are_not_yet_two_modalities(reduce, keys):
    model = Runs(lambda m, x: F.scaled_dot_product_attention(heads(x), heads(reduce(x)), heads(reduce(x))))
    with AttentionRecorder(model) as recorder:
        model(sides()[0])
    with pytest.raises(DiscoveryError, match=tells("cross-attention", f"'#1' (2, 3, 5, {keys})", f"{keys} keys")):
        _ = recorder.attention


def test_split_heads_of_two_numbers_of_tokens_are_two_kinds():
    attend = Runs(lambda m, q, k: F.scaled_dot_product_attention(q, k, k))
    model = Runs(lambda m, x, y: (m.p(heads(x), heads(y)), m.q(heads(y), heads(x))), p=attend, q=Runs(attend.run))
    x, y = sides()
    with AttentionRecorder(model) as recorder:
        model(x, y)
    (pair,) = recorder.attention
    assert pair.forward.weights.shape == (BATCH, HEADS, AUDIO, TEXT)
    assert pair.backward.weights.shape == (BATCH, HEADS, TEXT, AUDIO)


def test_self_attention_of_split_or_folded_heads_beside_what_goes_across():
    split = Runs(lambda m, q, k: F.scaled_dot_product_attention(q, k, k))
    folded = Runs(lambda m, x: F.scaled_dot_product_attention(*[heads(x).flatten(0, 1)] * 3))

    def run(module, x, y):
        module.split(heads(x), heads(x) + 1)
        module.folded(x)
        return module.p(x, y, y), module.q(y, x, x)

    model = Runs(run, split=split, folded=folded, p=attention(), q=attention())
    x, y = sides()
    with AttentionRecorder(model) as recorder:
        model(x, y)
    (pair,) = recorder.attention
    assert_weights(pair, (model.p, x, y), (model.q, y, x))


def test_a_name_tells_the_direction_of_a_module_that_got_the_keys_before():
    def attend(module, x):
        return F.scaled_dot_product_attention(heads(x), heads(module.context), heads(module.context))

    model = nn.ModuleDict({"audio_to_text": Runs(attend)})
    x, model["audio_to_text"].context = sides()
    with AttentionRecorder(model) as recorder:
        model["audio_to_text"](x)
    assert str(recorder.attention[0].forward.direction) == "audio_to_text"


@pytest.mark.parametrize("lengths", [(AUDIO, TEXT), (AUDIO, AUDIO)])
def test_a_softmax_that_is_a_module(lengths):
    def attend(module, x, y):
        return module.drop(module.soft(heads(x) @ heads(y).mT)) @ heads(y)

    def hand():
        return Runs(attend, soft=nn.Softmax(dim=-1), drop=nn.Dropout(0.1))

    model, (x, y) = Runs(lambda m, x, y: (m.f(x, y), m.g(y, x)), f=hand(), g=hand()).eval(), sides(*lengths)
    with AttentionRecorder(model) as recorder:
        model(x, y)
    if lengths[0] == lengths[1]:
        with pytest.raises(DiscoveryError, match=tells("ambiguous whether", "'f' (2, 3, 5, 5)", "'g' (2, 3, 5, 5)")):
            _ = recorder.attention
        return
    (pair,) = recorder.attention
    assert torch.equal(pair.forward.weights, (heads(x) @ heads(y).mT).softmax(-1))
    assert torch.equal(pair.backward.weights, (heads(y) @ heads(x).mT).softmax(-1))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_bystanders_that_are_not_clear_hide_nothing():
    """Self-attention with positions, a module with two attentions, and one that hooks cannot see into."""

    def positions(module, x, position):
        return F.scaled_dot_product_attention(heads(x + position), heads(x + position), heads(x))

    def twice(module, x):
        return [F.scaled_dot_product_attention(*[heads(t)] * 3) for t in (x, x + 1)]

    def run(module, x, y):
        module.own(x, torch.ones_like(x))
        module.twice(x)
        return module.look(module.scripted(x), y)

    scripted = torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.zeros(BATCH, AUDIO, WIDTH))
    for look in (Sdpa(), CrossOnly()):
        model = Runs(run, own=Runs(positions), twice=Runs(twice), look=look, scripted=scripted)
        with AttentionRecorder(model) as recorder:
            model(*sides())
            with pytest.warns(XAttnWarning, match=tells("Left out", "'own' (")):
                (pair,) = recorder.attention
        assert pair.forward.weights.shape == (BATCH, HEADS, AUDIO, TEXT)


class CrossOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = attention()

    def forward(self, x, y):
        return self.inner(x, y, y)


def test_layers_that_pair_up_otherwise_than_in_their_order():
    """x and z ask y; y asks z first, and then x."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.there, self.back = (nn.ModuleList([attention(), attention()]) for _ in range(2))

        def forward(self, x, y, z):
            for module, queries in zip(self.there, (x, z), strict=True):
                module(queries, y, y)
            for module, keys in zip(self.back, (z, x), strict=True):
                module(y, keys, keys)

    x, y = sides()
    model = Three()
    with AttentionRecorder(model) as recorder:
        model(x, y, x + 1)
    with pytest.raises(DiscoveryError, match=tells("belong together", "'there.0'", "'there.1'", "'back.1'")):
        _ = recorder.attention


@pytest.mark.parametrize(
    ("lengths", "packed"), [((WIDTH, TEXT), False), ((AUDIO, WIDTH), True), ((WIDTH, WIDTH), True)]
)
def test_sequences_as_long_as_wide_and_inputs_in_a_dict(lengths, packed):
    def attend(module, *inputs):
        x, y = inputs[0].values() if packed else inputs
        return F.scaled_dot_product_attention(heads(x), heads(y), heads(y))

    def give(x, y):
        return ({"x": x, "y": y},) if packed else (x, y)

    model = nn.ModuleDict({"a_to_b": Runs(attend), "b_to_a": Runs(attend)})
    x, y = sides(*lengths)
    with AttentionRecorder(model) as recorder:
        model["a_to_b"](*give(x, y))
        model["b_to_a"](*give(y, x))
    (pair,) = recorder.attention
    for got, (queries, keys) in zip(pair.directions, ((x, y), (y, x)), strict=True):
        expected = (heads(queries) @ heads(keys).mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        torch.testing.assert_close(got.weights, expected)


def test_unnamed_attention_beside_named_ones_is_said_to_be_left_out():
    def attend(module, queries, keys):
        return F.scaled_dot_product_attention(heads(queries), heads(keys), heads(keys))

    def run(module, x, y):
        return module.a_to_b(x, y), module.b_to_a(y, x), module.other(x, y)

    model = Runs(run, a_to_b=Runs(attend), b_to_a=Runs(attend), other=Runs(attend))
    with pytest.warns(XAttnWarning, match=tells("{'a_to_b': 'a_to_b', 'b_to_a': 'b_to_a'}", "'other' (2, 3, 5, 7)")):
        (pair,) = recorded(model)
    assert str(pair.forward.direction) == "a_to_b"


@pytest.mark.filterwarnings("ignore:Found in the first pass")
def test_a_kernel_call_of_another_form_ends_nothing():
    def run(module, x, y):
        five = heads(x)[:, None]
        module.other(five, five)
        return module.p(x, y, y), module.q(y, x, x)

    other = Runs(lambda m, q, k: F.scaled_dot_product_attention(q, k, k))
    (pair,) = recorded(Runs(run, p=mha(), q=mha(), other=other))
    assert pair.forward.weights.shape == (BATCH, HEADS, AUDIO, TEXT)
