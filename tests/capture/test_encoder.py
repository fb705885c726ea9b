"""Transformer layers of torch's own: their fast path stays on, and what is recorded is what they compute."""

import pytest
import torch
from torch import nn

from lightning_xattn.capture import AttentionRecorder, JointSequence
from lightning_xattn.core.errors import DiscoveryError
from lightning_xattn.functional import prepare_rows
from tests.capture.models import BATCH, assert_same, per_head, record, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH


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
@pytest.mark.parametrize(
    ("named", "norm_first", "call"),
    [("encoder", i % 2 == 0, call) for i, call in enumerate(ENCODER_CALLS)]
    + [(["encoder.layers.0", "encoder.layers.1.self_attn"], False, "padding")],
)
def test_the_encoders_fast_path_stays_on(named, norm_first, call):
    """Two heads, as the fast path wants an even number; the padding leaves the last two tokens out for all."""
    call = ENCODER_CALLS[call]
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
    torch.testing.assert_close(prepare_rows(got).cross_modal_mass, mass, atol=2e-6, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("named", ["encoder.layers.0", "encoder.layers.0.self_attn"])
def test_self_attention_of_an_encoder_is_no_direction(named):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)})
    with AttentionRecorder(model, {"a_to_b": named}) as recorder:
        model["encoder"](tokens()[0])
    with pytest.raises(DiscoveryError, match=tells("'encoder.layers.0'", "a_to_b", "JointSequence('path', spans=")):
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
    torch.testing.assert_close(prepare_rows(recorder.attention[0].forward).cross_modal_mass, block.sum(-1))


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


@pytest.mark.parametrize(("heads", "dtype"), [(2, torch.float32), (6, torch.bfloat16), (6, torch.float16)])
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
            prepare_rows(recorder.attention[0].forward).cross_modal_mass.float(), cross_modal_mass, atol=0.02, rtol=0.02
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
    torch.testing.assert_close(prepare_rows(recorder.attention[0].forward).cross_modal_mass, cross_modal_mass)


def test_the_fast_path_of_a_subclass_stays_on():
    """Of an nn.MultiheadAttention whose own forward calls torch's with one sequence for queries, keys and values."""

    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)

    torch.manual_seed(0)
    model = nn.ModuleDict({"joint": Own(24, 2, batch_first=True)}).eval()
    x = torch.randn(BATCH, 9, 24)
    with torch.no_grad():
        expected = model["joint"](x)
        fast = torch.overrides.has_torch_function
        with AttentionRecorder(model, {"a_to_b": "joint"}):
            assert_same(model["joint"](x), expected)
        assert torch.overrides.has_torch_function is fast


def test_other_modes_still_turn_the_fast_path_off():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    torch.manual_seed(0)
    model = nn.ModuleDict({"joint": nn.MultiheadAttention(24, 2, batch_first=True)}).eval()
    x = torch.randn(BATCH, 9, 24)
    with torch.no_grad(), Mode():
        expected = model["joint"](x, x, x)
        with AttentionRecorder(model, {"a_to_b": "joint"}):
            assert_same(model["joint"](x, x, x), expected)
        assert torch._C._len_torch_function_stack() == 1
