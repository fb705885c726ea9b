"""Models of ``nn.MultiheadAttention`` with any settings, layers, masks and precision, also as one joint sequence.

Weights are computed once more from the module's own projections; outputs, gradients, buffers and random numbers are
those of the same model without a recorder; no hook stays, also after an exception at a random point.
"""

import copy
import math

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from lightning_xattn.capture import AttentionRecorder, JointSequence
from tests.capture.models import assert_same, gradients
from tests.fuzz.examples import fuzz
from tests.toy import count_global_hooks, count_hooks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found in the first pass"),
    pytest.mark.filterwarnings("ignore:Support for mismatched .* is deprecated"),
]

PRIMES = [2, 3, 5, 7]
OPTIONAL_MASK = st.sampled_from([None, bool, float])
CALLS = [{}, {"need_weights": False}, {"average_attn_weights": False}]


@st.composite
def cases(draw):
    audio, text = draw(st.permutations(PRIMES))[:2]
    heads = draw(st.sampled_from([1, 2, 3]))
    widths = [heads * draw(st.sampled_from([2, 3])) for _ in range(2)]
    settings = {
        "bias": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
    }
    return {
        "kind": draw(st.sampled_from(["cross", "cross", "joint", "encoder layer"])),
        "heads": heads,
        "tokens": {"audio": audio, "text": text},
        "widths": widths,
        "settings": settings,
        "batch_first": draw(st.booleans()),
        "layers": draw(st.integers(1, 2)),
        "call": draw(st.sampled_from(CALLS)),
        "padding": draw(OPTIONAL_MASK),
        "mask": draw(st.one_of(st.none(), st.tuples(st.sampled_from([bool, float]), st.booleans(), st.booleans()))),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        "autocast": draw(st.booleans()),
        "training": draw(st.booleans()),
        "grad": draw(st.booleans()),
        "fails_at": draw(st.one_of(st.none(), st.integers(0, 6))),
        "seed": draw(st.integers(0, 10**6)),
    }


class Layer(nn.Module):
    """Audio asks text and text asks audio, after audio has looked at itself, which is no cross-attention."""

    def __init__(self, case):
        super().__init__()
        audio, text = case["widths"]
        heads, order = case["heads"], {"batch_first": case["batch_first"]}
        self.self_attn = nn.MultiheadAttention(audio, heads, **order)
        settings = case["settings"] | order
        self.audio_to_text_attn = nn.MultiheadAttention(audio, heads, **settings, kdim=text, vdim=text)
        self.text_to_audio_attn = nn.MultiheadAttention(text, heads, **settings, kdim=audio, vdim=audio)


class Model(nn.Module):
    """Runs the attention of a case, and notes what each one gets."""

    def __init__(self, case):
        super().__init__()
        self.case, self.noted, self.fails_at = case, [], case["fails_at"]
        width, heads, order = case["widths"][0], case["heads"], {"batch_first": case["batch_first"]}
        self.norm = nn.BatchNorm1d(width)
        if case["kind"] == "cross":
            self.layers = nn.ModuleList(Layer(case) for _ in range(case["layers"]))
        elif case["kind"] == "joint":
            self.attend = nn.MultiheadAttention(width, heads, **case["settings"], **order)
        else:
            settings = {name: case["settings"][name] for name in ("dropout", "bias")} | order
            self.attend = nn.TransformerEncoderLayer(width, heads, 4, norm_first=case["layers"] == 2, **settings)

    def check(self):
        if self.fails_at is not None:
            self.fails_at -= 1
            if self.fails_at < 0:
                self.fails_at = None
                raise ValueError("at a random point")

    def forward(self, audio, text, masks):
        self.noted = []
        self.check()
        audio = self.norm(audio.flatten(0, 1)).view(audio.shape)
        return self.cross(audio, text, masks) if self.case["kind"] == "cross" else self.join(audio, text, masks)

    def cross(self, audio, text, masks):
        outputs, call = [], self.case["call"]
        for layer in self.layers:
            audio = audio + layer.self_attn(audio, audio, audio)[0]
            self.check()
            self.noted += [(layer.audio_to_text_attn, audio, text), (layer.text_to_audio_attn, text, audio)]
            there = layer.audio_to_text_attn(audio, text, text, **masks["audio", "text"], **call)
            self.check()
            back = layer.text_to_audio_attn(text, audio, audio, **masks["text", "audio"], **call)
            audio, text = audio + there[0], text + back[0]
            outputs += [there, back]
        return audio, outputs

    def join(self, audio, text, masks):
        tokens = torch.cat([audio, text], dim=1 if self.case["batch_first"] else 0)
        masks = masks["both", "both"]
        self.check()
        if self.case["kind"] == "joint":
            self.noted = [(self.attend, tokens, tokens)]
            return self.attend(tokens, tokens, tokens, **masks, **self.case["call"])
        seen = self.attend.norm1(tokens) if self.attend.norm_first else tokens
        self.noted = [(self.attend.self_attn, seen, seen)]
        return self.attend(tokens, masks.get("attn_mask"), masks.get("key_padding_mask"))


def hidden(shape, generator):
    """Where a mask hides something; never the first key, nor of a square a token from itself."""
    mask = torch.rand(shape, generator=generator) > 0.6
    mask[..., 0] = False
    if len(shape) > 1 and shape[-2] == shape[-1]:
        mask.diagonal(dim1=-2, dim2=-1).fill_(False)
    return mask


def as_given(mask, kind, dtype):
    """What hides where True, as a caller gives it."""
    return mask if kind is bool else torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


def make_step(case, batch, generator):
    """Inputs of the model; by who asks whom what is hidden, ``(batch, heads, queries, keys)``; and the real tokens."""
    heads, dtype, counts = case["heads"], case["dtype"], case["tokens"]
    widths = case["widths"] if case["kind"] == "cross" else 2 * case["widths"][:1]
    tokens = [
        torch.randn(batch, n, width, generator=generator).to(dtype)
        for n, width in zip(counts.values(), widths, strict=True)
    ]
    padding = {name: hidden((batch, n), generator) for name, n in counts.items()}
    padding["both"] = torch.cat([*padding.values()], dim=1)
    masks, hides = {}, {}
    for asks, keys in (("audio", "text"), ("text", "audio"), ("both", "both")):
        sizes = padding[asks].shape[1], padding[keys].shape[1]
        given, hide = {}, torch.zeros(batch, heads, *sizes, dtype=torch.bool)
        if case["padding"] is not None:
            hide = hide | padding[keys][:, None, None]
            given["key_padding_mask"] = as_given(padding[keys], case["padding"], dtype)
        if case["mask"] is not None:
            kind, by_head, causal = case["mask"]
            shape = (batch * heads, *sizes) if by_head else sizes
            mask = torch.ones(shape, dtype=torch.bool).triu(1) if causal else hidden(shape, generator)
            if by_head and not causal:
                mask[0, 0] = True  # a row that sees nothing
            hide = hide | (mask.view(batch, heads, *sizes) if by_head else mask)
            given["attn_mask"] = as_given(mask, kind, dtype)
        masks[asks, keys], hides[asks, keys] = given, hide
    tokens = tokens if case["batch_first"] else [one.transpose(0, 1) for one in tokens]
    return (*tokens, masks), hides, {name: ~mask for name, mask in padding.items()}


def reference(module, query, key, hide):
    """The weights in float64 from a module's own parameters, extra keys last, and which keys are seen."""
    query, key = (one.double() if module.batch_first else one.double().transpose(0, 1) for one in (query, key))
    width, heads = module.embed_dim, module.num_heads
    separate = module.q_proj_weight, module.k_proj_weight
    of_queries, of_keys = separate if module.in_proj_weight is None else module.in_proj_weight.chunk(3)[:2]
    bias = torch.zeros(3 * width) if module.in_proj_bias is None else module.in_proj_bias
    q = query @ of_queries.double().T + bias.double()[:width]
    k = key @ of_keys.double().T + bias.double()[width : 2 * width]
    if module.bias_k is not None:
        k = torch.cat([k, module.bias_k.double().expand(len(k), 1, width)], dim=1)
    if module.add_zero_attn:
        k = torch.cat([k, torch.zeros_like(k[:, :1])], dim=1)
    seen = torch.ones(*hide.shape[:3], k.shape[1], dtype=torch.bool)
    seen[..., : hide.shape[3]] = ~hide
    q, k = (one.unflatten(-1, (heads, -1)) for one in (q, k))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width // heads)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1), seen


def compare(case, attention, weights, seen, real):
    half = case["autocast"] or case["dtype"] == torch.bfloat16
    rounding = {"atol": 0.06, "rtol": 0.1} if half else {"atol": 2e-5, "rtol": 1e-3}
    ours, some = torch.ones_like(seen), seen.any(-1)
    for mask in (attention.visible, None if attention.key_mask is None else attention.key_mask[:, None, None]):
        ours = ours if mask is None else ours & mask
    assert torch.equal(ours, seen)
    # A query that sees nothing gets NaN, which a next layer spreads.
    torch.testing.assert_close(attention.weights.double()[some], weights[some], **rounding, equal_nan=True)
    if case["padding"] is not None:
        assert torch.equal(attention.query_mask, real)


def check_cross(case, pairs, noted, hides, real):
    assert len(pairs) == case["layers"]
    found = [attention for pair in pairs for attention in pair.directions]
    for attention, called in zip(found, noted, strict=True):
        asks, keys = str(attention.direction).split("_to_")
        compare(case, attention, *reference(*called, hides[asks, keys]), real[asks])
        assert attention.extra_keys == case["settings"]["add_bias_kv"] + case["settings"]["add_zero_attn"]


def check_joint(case, pairs, noted, hides, real):
    """Each direction is a block of the whole, scaled to sum to 1."""
    (pair,), (called,) = pairs, noted
    weights, seen = reference(*called, hides["both", "both"])
    audio, text = case["tokens"].values()
    spans = {"audio": slice(0, audio), "text": slice(audio, audio + text)}
    for attention in pair.directions:
        asks, keys = str(attention.direction).split("_to_")
        block = weights[:, :, spans[asks], spans[keys]]
        shares = block.sum(-1, keepdim=True)
        compare(case, attention, block / shares, seen[:, :, spans[asks], spans[keys]], real[asks])


def run(model, step, case):
    """What a step gives, None if it fails, and the state of the random numbers after it."""
    torch.manual_seed(case["seed"])
    with torch.set_grad_enabled(case["grad"]), torch.autocast("cpu", torch.bfloat16, enabled=case["autocast"]):
        try:
            return model(*step), torch.get_rng_state()
        except ValueError:
            return None, torch.get_rng_state()


@fuzz(cases(), some=30, many=300)
def test_any_multihead_attention(case):
    generator = torch.Generator().manual_seed(case["seed"])
    torch.manual_seed(case["seed"])
    model = Model(case).to(case["dtype"]).train(case["training"])
    plain = copy.deepcopy(model)
    joint = JointSequence("attend", {"audio": (0, case["tokens"]["audio"]), "text": (case["tokens"]["audio"], None)})
    recorder = AttentionRecorder(model, None if case["kind"] == "cross" else joint)
    for batch in (2, 1, 3):  # in the first one all that is computed is looked at
        step, hides, real = make_step(case, batch, generator)
        expected, random_numbers = run(plain, step, case)
        with recorder:
            got, ours = run(model, step, case)
        assert count_hooks(model) == count_global_hooks() == torch._C._len_torch_function_stack() == 0
        assert torch.equal(ours, random_numbers)
        assert_same(model.state_dict(), plain.state_dict())
        if expected is None:
            assert got is None
            continue
        assert_same(got, expected)
        if case["grad"]:
            assert_same(gradients(model, got), gradients(plain, expected))
        check = check_cross if case["kind"] == "cross" else check_joint
        with torch.no_grad():
            check(case, recorder.attention, plain.noted, hides, real)
