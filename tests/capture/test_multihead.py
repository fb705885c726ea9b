"""nn.MultiheadAttention and what torch builds of it: the true weights, and outputs that stay bit for bit the same."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_xattn.capture import AttentionRecorder, JointSequence
from lightning_xattn.core.errors import DiscoveryError
from tests.capture.models import BATCH, Pair, Runs, assert_same, mha, record, recorded, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH, count_hooks


def per_head(module, query, key, **call):
    """The weights as the module itself returns them on request, per head and without dropout."""
    training = module.training
    module.eval()
    with torch.no_grad():
        weights = module(query, key, key, **(call | {"need_weights": True, "average_attn_weights": False}))[1]
    module.train(training)
    return weights


padding = torch.zeros(BATCH, TEXT, dtype=torch.bool)
padding[1, 5:] = True
float_mask = torch.randn(AUDIO, TEXT, generator=torch.Generator().manual_seed(2))
hidden = torch.rand(BATCH * HEADS, AUDIO, TEXT, generator=torch.Generator().manual_seed(3)) > 0.6
hidden[0, 1] = True  # a fully masked row

float_padding = torch.zeros(BATCH, TEXT).masked_fill(padding, -torch.inf)
float_by_head = torch.randn(BATCH * HEADS, AUDIO, TEXT, generator=torch.Generator().manual_seed(4))
hidden_for_all = torch.rand(AUDIO, TEXT, generator=torch.Generator().manual_seed(6)) > 0.6

CALLS = {
    "averaged": {},
    "per head": {"average_attn_weights": False},
    "without weights": {"need_weights": False},
    "padding": {"key_padding_mask": padding},
    "padding, without weights": {"key_padding_mask": padding, "need_weights": False},
    "float mask": {"attn_mask": float_mask},
    "float mask, without weights": {"attn_mask": float_mask, "need_weights": False},
    "mask": {"attn_mask": hidden_for_all},
    "mask by head": {"attn_mask": hidden},
    "float mask by head": {"attn_mask": float_by_head},
    "float padding and mask": {"key_padding_mask": float_padding, "attn_mask": float_mask, "need_weights": False},
    "mask by head, without weights": {"attn_mask": hidden, "need_weights": False},
}
MODULES = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 4, "vdim": 4},
    "dropout": {"dropout": 0.4},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("settings", MODULES.values(), ids=MODULES)
def test_multihead_attention(settings, call, training):
    model = Pair(**settings).train(training)
    audio, text = tokens(settings.get("batch_first", True), settings.get("kdim", WIDTH))
    text_back = torch.nn.functional.pad(text, (0, WIDTH - text.shape[-1]))

    def run():
        torch.manual_seed(5)  # dropout draws the same
        there = model.audio_to_text_attn(audio, text, text, **call)
        return there, model.text_to_audio_attn(text_back, audio, audio)

    expected = run()
    with AttentionRecorder(model) as recorder:
        got = run()
    assert count_hooks(model) == 0
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)

    (pair,) = recorder.attention
    weights = pair.forward.weights
    assert not weights.requires_grad
    truth = per_head(model.audio_to_text_attn, audio, text, **call)
    torch.testing.assert_close(weights, truth, atol=2e-6, rtol=1e-5, equal_nan=True)
    assert pair.forward.extra_keys == weights.shape[-1] - TEXT
    if "key_padding_mask" in call:
        torch.testing.assert_close(pair.forward.key_mask[:, :TEXT], ~padding)
        torch.testing.assert_close(pair.backward.query_mask, ~padding)
    else:
        assert pair.forward.key_mask is None
        assert pair.backward.query_mask is None
    if "attn_mask" in call:
        sees = pair.forward.visible.expand(weights.shape)
        assert ((weights > 0) <= sees).all()


def test_positional_arguments_and_unbatched_tokens():
    model = Pair()
    audio, text = (x[0] for x in tokens())
    with AttentionRecorder(model) as recorder:
        got = model.audio_to_text_attn(audio, text, text, None, True)
        model.text_to_audio_attn(text, audio, audio, None, False)
    assert_same(got, model.audio_to_text_attn(audio, text, text, None, True))
    assert recorder.attention[0].forward.weights.shape == (1, HEADS, AUDIO, TEXT)
    assert recorder.attention[0].backward.weights.shape == (1, HEADS, TEXT, AUDIO)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("settings", MODULES.values(), ids=MODULES)
def test_gradients_and_autocast(settings, need_weights):
    model = Pair(**settings)
    audio, text = tokens(settings.get("batch_first", True), settings.get("kdim", WIDTH))
    text_back = torch.nn.functional.pad(text, (0, WIDTH - text.shape[-1]))

    def run(model):
        there = model.audio_to_text_attn(audio, text, text, need_weights=need_weights)
        return there, model.text_to_audio_attn(text_back, audio, audio, need_weights=need_weights)

    (pair,) = record(model, run)
    assert pair.forward.weights.shape[:3] == (BATCH, HEADS, AUDIO)


def test_what_the_caller_changes_in_place_is_not_what_was_recorded():
    model, (audio, text) = Pair(), tokens()
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        _, weights = model.audio_to_text_attn(audio, text, text, average_attn_weights=False)
        weights.zero_()
        model.text_to_audio_attn(text, audio, audio)
    torch.testing.assert_close(recorder.attention[0].forward.weights.sum(-1), torch.ones(BATCH, HEADS, AUDIO))


class Decoder(nn.Module):
    """Text tokens that look at audio tokens, layer after layer."""

    def __init__(self, norm_first):
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 8, dropout=0.3, batch_first=True, norm_first=norm_first)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, text, audio, **masks):
        return self.decoder(text, audio, **masks)


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_layers_have_names_of_their_own(norm_first):
    audio, text = tokens()
    padding = torch.zeros(BATCH, AUDIO, dtype=torch.bool)
    padding[0, 4:] = True
    model, inputs = Decoder(norm_first), []
    pairs = record(model, lambda m: m(text, audio, memory_key_padding_mask=padding), {"text_to_audio": "decoder"})
    assert [pair.layer for pair in pairs] == [f"decoder.layers.{i}.multihead_attn" for i in range(2)]
    hooks = [
        layer.multihead_attn.register_forward_pre_hook(lambda m, args, kwargs: inputs.append(args), with_kwargs=True)
        for layer in model.decoder.layers
    ]
    with torch.no_grad():
        model(text, audio, memory_key_padding_mask=padding)
    for hook, layer, pair, (query, key, _) in zip(hooks, model.decoder.layers, pairs, inputs, strict=True):
        hook.remove()
        truth = per_head(layer.multihead_attn, query, key, key_padding_mask=padding)
        torch.testing.assert_close(pair.forward.weights, truth, atol=2e-6, rtol=1e-5)
        assert torch.equal(pair.forward.key_mask, ~padding)


ENCODER_CALLS = {
    "plain": {},
    "padding": {"src_key_padding_mask": torch.arange(AUDIO + TEXT) >= torch.tensor([[10], [9]])},
    "mask": {"mask": torch.rand(AUDIO + TEXT, AUDIO + TEXT, generator=torch.Generator().manual_seed(3)) > 0.7},
    "float mask": {"mask": torch.randn(AUDIO + TEXT, AUDIO + TEXT, generator=torch.Generator().manual_seed(3))},
}


# torch says so of the nested tensors that its own encoder makes
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("call", ENCODER_CALLS.values(), ids=ENCODER_CALLS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("named", ["encoder", ["encoder.layers.0", "encoder.layers.1.self_attn"]])
def test_the_encoders_fast_path_stays_on(named, norm_first, call):
    """Two heads, as the fast path wants an even number; the padding leaves the last two tokens out for all."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.3, batch_first=True, norm_first=norm_first)
    model = nn.Module()
    model.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    model.forward = lambda tokens: model.encoder(tokens, **call)
    sequence = torch.cat(tokens(), dim=1)
    joint = JointSequence(named, spans={"audio": (0, AUDIO), "text": (AUDIO, AUDIO + TEXT)})
    # Under autocast torch itself fails on the nested tensors that it makes of a padded sequence.
    pairs = record(model, lambda m: m(sequence), joint, autocast="src_key_padding_mask" not in call)
    assert [pair.layer for pair in pairs] == ["encoder.layers.0", "encoder.layers.1"]

    first = model.encoder.layers[0]
    asked = first.norm1(sequence) if norm_first else sequence
    masks = {"attn_mask": call.get("mask"), "key_padding_mask": call.get("src_key_padding_mask")}
    whole = per_head(first.self_attn, asked, asked, **masks)
    block = whole[:, :, :AUDIO, AUDIO:]
    mass = block.sum(-1)
    crosses = (mass > 0)[..., None]
    expected = torch.where(crosses, block / mass[..., None], 0)
    got = pairs[0].forward
    torch.testing.assert_close(torch.where(crosses, got.weights, 0), expected, atol=2e-6, rtol=1e-5)
    if "src_key_padding_mask" in call:
        assert torch.equal(got.key_mask, ~call["src_key_padding_mask"][:, AUDIO:])
    torch.testing.assert_close(got.cross_modal_mass, mass, atol=2e-6, rtol=1e-5, equal_nan=True)


def test_large_half_precision_tokens_do_not_overflow():
    model = Pair().half()
    audio, text = (300 * x.half() for x in tokens())
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(audio, text, {"need_weights": False}, {"need_weights": False})
    exact = per_head(model.audio_to_text_attn.float(), audio.float(), text.float())
    torch.testing.assert_close(recorder.attention[0].forward.weights, exact, atol=1e-4, rtol=0)


def test_a_masked_key_beside_a_bias_is_masked():
    model, (audio, text) = Pair(), tokens()
    mask = torch.where(torch.arange(TEXT) < 3, 0.0, -1e4).expand(AUDIO, TEXT) + 0.5
    with AttentionRecorder(model) as recorder:
        model(audio, text, {"attn_mask": mask})
    visible = recorder.attention[0].forward.visible.expand(BATCH, HEADS, AUDIO, TEXT)
    assert (visible == (torch.arange(TEXT) < 3)).all()


def test_other_hooks_see_the_call_as_it_was_made():
    model, (audio, text), seen = Pair(), tokens(), []
    attention = model.audio_to_text_attn
    attention.register_forward_hook(lambda module, args, kwargs, _: seen.append((len(args), kwargs)), with_kwargs=True)
    with AttentionRecorder(model):
        attention(audio, text, value=text, key_padding_mask=None)
        attention(audio, text, text, None, True, None, True, False)
    assert seen == [
        (2, {"value": text, "key_padding_mask": None}),
        (8, {}),
    ]


@pytest.mark.parametrize(
    "patch",
    [
        lambda forward: lambda q, k, v, **_: forward(q, k, v),
        lambda forward: lambda *args, **call: forward(*args, **call | {"average_attn_weights": True}),
    ],
    ids=["drops what it is asked", "averages"],
)
def test_a_forward_that_was_patched_is_seen_through(patch):
    model, (audio, text) = Pair(), tokens()
    attention = model.audio_to_text_attn
    weights = per_head(attention, audio, text)
    attention.forward = patch(attention.forward)
    (pair,) = record(model, lambda m: m.audio_to_text_attn(audio, text, text), {"audio_to_text": "audio_to_text_attn"})
    assert torch.equal(pair.forward.weights, weights)


@pytest.mark.parametrize("key", [lambda x: x, lambda x: x[:], lambda x: x.detach()])
def test_a_view_of_the_query_is_the_query(key):
    audio, _ = tokens()
    model = Runs(lambda m, x: m.audio_to_text(x, key(x), x), audio_to_text=mha())
    with pytest.raises(
        DiscoveryError,
        match=tells("audio_to_text", "within one sequence", "JointSequence('path', spans=", "attention={'<a>_to_<b>'"),
    ):
        recorded(model, inputs=[audio])
    other = Runs(lambda m, x: m.audio_to_text(x, x.flip(1), x), audio_to_text=mha())
    (pair,) = recorded(other, inputs=[audio])
    assert torch.equal(pair.forward.weights, per_head(other.audio_to_text, audio, audio.flip(1)))


@pytest.mark.parametrize("named", ["encoder.layers.0", "encoder.layers.0.self_attn"])
def test_self_attention_of_an_encoder_is_no_direction(named):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)})
    with AttentionRecorder(model, {"a_to_b": named}) as recorder:
        model["encoder"](tokens()[0])
    with pytest.raises(
        DiscoveryError,
        match=tells(
            "'encoder.layers.0'",
            "a_to_b",
            "within one sequence",
            "JointSequence('path', spans=",
            "attention={'<a>_to_<b>'",
        ),
    ):
        _ = recorder.attention


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.batch = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return self.batch(x.transpose(1, 2)).transpose(1, 2)


def test_a_norm_that_counts_what_it_sees_counts_it_once():
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.0, batch_first=True, norm_first=True)
        layer.norm1 = Norm()
        layers.append(layer)
    joint = torch.cat(tokens(), dim=1)
    layers[0](joint)
    with AttentionRecorder(
        nn.ModuleDict({"encoder": layers[1]}), JointSequence("encoder", {"audio": (0, AUDIO), "text": (AUDIO, None)})
    ) as recorder:
        layers[1](joint)
    for a, b in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        assert torch.equal(a, b)
    normed = Norm()(joint)
    _, expected = layers[1].self_attn(normed, normed, normed, average_attn_weights=False)
    block = expected[:, :, :AUDIO, AUDIO:]
    torch.testing.assert_close(recorder.attention[0].forward.cross_modal_mass, block.sum(-1))


@pytest.mark.parametrize("need_weights", [True, False])
def test_extra_keys_are_no_padding(need_weights):
    model, (audio, text) = Pair(add_bias_kv=True, add_zero_attn=True), tokens()
    padding = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])
    call = {"key_padding_mask": padding, "need_weights": need_weights}
    with AttentionRecorder(model) as recorder:
        model(audio, text, call)
    (pair,) = recorder.attention
    assert pair.forward.extra_keys == 2
    assert torch.equal(pair.forward.key_mask, torch.cat([~padding, torch.ones(2, 2, dtype=torch.bool)], dim=1))
    assert torch.equal(pair.backward.query_mask, ~padding)


@pytest.mark.parametrize("training", [False, True])
def test_what_is_computed_beside_is_computed_in_full_precision(training):
    model, (audio, text) = Pair(dropout=0.3 * training).train(training), tokens()
    call = {"need_weights": False}
    with torch.autocast("cpu", torch.bfloat16), AttentionRecorder(model) as recorder:
        model(audio, text, call, call)
    rounded = recorder.attention[0].forward.weights
    model.eval()
    exact = model(audio, text, {"average_attn_weights": False})[0][1]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact)


class Wrapped(nn.TransformerEncoderLayer):
    """An encoder layer with a forward of its own, which torch may still give packed sequences."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_packed_sequences_in_an_encoder_layer_of_ones_own():
    torch.manual_seed(0)
    layer = Wrapped(WIDTH, 2, 8, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 1)}).eval()
    joint = torch.cat(tokens(), dim=1)
    hidden = torch.zeros(BATCH, AUDIO + TEXT, dtype=torch.bool)
    hidden[0, 9:] = hidden[:, 11:] = True
    spans = JointSequence("encoder", {"audio": (0, AUDIO), "text": (AUDIO, None)})
    with torch.no_grad():
        expected = model["encoder"](joint, src_key_padding_mask=hidden)
        with AttentionRecorder(model, spans) as recorder:
            got = model["encoder"](joint, src_key_padding_mask=hidden)
        weights = (
            model["encoder"]
            .layers[0]
            .self_attn(joint, joint, joint, key_padding_mask=hidden, average_attn_weights=False)[1]
        )
    torch.testing.assert_close(got, expected)
    (pair,) = recorder.attention
    real = ~hidden[:, None, :AUDIO, None] & ~hidden[:, None, None, AUDIO:]
    block = weights[:, :, :AUDIO, AUDIO:]
    block = block / block.sum(-1, keepdim=True)
    width = pair.forward.weights.shape[-1]
    torch.testing.assert_close((pair.forward.weights * real[..., :width]), (block * real)[..., :width])


@pytest.mark.parametrize("need_weights", [False, True])
def test_reading_a_parametrized_weight_changes_nothing(need_weights):
    outputs = []
    for recorded_too in (False, True):
        torch.manual_seed(0)
        model, (audio, text) = Pair(dropout=0.1), tokens()
        nn.utils.parametrizations.spectral_norm(model.audio_to_text_attn, "in_proj_weight")
        call = {"need_weights": need_weights}
        with AttentionRecorder(model) if recorded_too else nullcontext():
            outputs.append([model(audio, text, call)[0][0] for _ in range(3)])
        assert all(module.training for module in model.modules())
    assert_same(outputs[1], outputs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [2, 6])
def test_self_attention_whose_fast_path_averages_by_itself(heads, dtype):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(24, heads, batch_first=True).eval().to(dtype)
    model = nn.ModuleDict({"joint": attention})
    joint = torch.randn(BATCH, AUDIO + TEXT, 24, dtype=dtype)
    spans = JointSequence("joint", {"audio": (0, AUDIO), "text": (AUDIO, None)})
    for call in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        with torch.no_grad():
            expected = attention(joint, joint, joint, **call)
            with AttentionRecorder(model, spans) as recorder:
                got = attention(joint, joint, joint, **call)
        assert_same([x for x in got if x is not None], [x for x in expected if x is not None])
        with torch.no_grad():
            weights = attention.float()(*[joint.float()] * 3, average_attn_weights=False)[1]
            attention.to(dtype)
        cross_modal_mass = weights[:, :, :AUDIO, AUDIO:].sum(-1)
        torch.testing.assert_close(
            recorder.attention[0].forward.cross_modal_mass.float(), cross_modal_mass, atol=0.02, rtol=0.02
        )


class Block(nn.TransformerEncoderLayer):
    """Attends in a way of its own, but in the fast path of torch."""

    def _sa_block(self, x, *args, **kwargs):
        return super()._sa_block(x.flip(1), *args, **kwargs)


class Inner(nn.MultiheadAttention):
    def forward(self, query, *args, **kwargs):
        return super().forward(query.flip(1), *args, **kwargs)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("own", ["block", "attention"])
def test_an_encoder_layer_that_attends_in_a_way_of_its_own(own, fast):
    """Torch's fast path passes its way by; what is recorded is what is computed."""
    torch.manual_seed(0)
    layer = (Block if own == "block" else nn.TransformerEncoderLayer)(WIDTH, 2, 8, dropout=0.0, batch_first=True)
    attention = layer.self_attn
    if own == "attention":
        layer.self_attn = Inner(WIDTH, 2, batch_first=True)
        layer.self_attn.load_state_dict(attention.state_dict())
    model, joint = nn.ModuleDict({"encoder": layer}).eval(), torch.cat(tokens(), dim=1)
    with torch.set_grad_enabled(not fast):
        expected = layer(joint)
        with AttentionRecorder(model, JointSequence("encoder", {"a": (0, AUDIO), "b": (AUDIO, None)})) as recorder:
            assert torch.equal(layer(joint), expected)
    query = joint if fast else joint.flip(1)
    weights = per_head(attention, query, joint if fast or own == "attention" else query)
    cross_modal_mass = weights[:, :, :AUDIO, AUDIO:].sum(-1)
    torch.testing.assert_close(recorder.attention[0].forward.cross_modal_mass, cross_modal_mass)
