"""Attention written by hand in every way, under every mask: weights, masks, outputs and hooks."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from lightning_xattn.capture import AttentionRecorder
from tests.capture.models import Fusing, Runs, assert_same, gradients
from tests.fuzz.examples import fuzz
from tests.toy import count_global_hooks, count_hooks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no axis for heads"),
    pytest.mark.filterwarnings("ignore:Found in the first pass"),
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile"),
]


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def fold(x, heads):
    return split(x, heads).flatten(0, 1)


def chunk(x, heads):
    return torch.cat(x.chunk(heads, dim=-1), dim=0)


def hide(scores, seen, how):
    """A mask as people write it: filled in, or added."""
    low = torch.finfo(scores.dtype).min if how == "lowest" else float(how)
    return scores + torch.where(seen, 0.0, low).to(scores.dtype) if how == "-1e9" else scores.masked_fill(~seen, low)


def kernel(m, x, y, seen, how):
    q, k = split(x, m.num_heads), split(y, m.num_heads)
    if how == "-1e9":
        seen = torch.where(seen, 0.0, -1e9).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, k, seen)


def flex(m, x, y, seen, how):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k = split(x, m.num_heads), split(y, m.num_heads)
    q, k = (one.detach().to(torch.promote_types(q.dtype, k.dtype)) for one in (q, k))  # the CPU has no gradients of it
    blocks = create_block_mask(lambda b, h, m, n: seen[b, h, m, n], *seen.shape, device="cpu")
    with torch.compiler.set_stance("force_eager"):
        return flex_attention(q, k, k, block_mask=blocks) + 0 * split(x, m.num_heads)


def softmax(m, x, y, seen, how):
    q, k = split(x, m.num_heads), split(y, m.num_heads)
    return hide(q @ k.mT / math.sqrt(q.shape[-1]), seen, how).softmax(-1).to(k.dtype) @ k


def queries_last(m, x, y, seen, how):
    q, k = split(x, m.num_heads), split(y, m.num_heads)
    scores = hide(k @ q.mT / math.sqrt(q.shape[-1]), seen.mT, how)
    return torch.softmax(scores, dim=-2).mT.to(k.dtype) @ k


def folded(m, x, y, seen, how):
    q, k = fold(x, m.num_heads), fold(y, m.num_heads)
    scores = torch.bmm(q, k.mT) / math.sqrt(q.shape[-1])
    return F.softmax(hide(scores, seen.flatten(0, 1), how), dim=-1).to(k.dtype) @ k


def folded_kernel(m, x, y, seen, how):
    q, k = fold(x, m.num_heads), fold(y, m.num_heads)
    return F.scaled_dot_product_attention(q, k, k, seen.flatten(0, 1))


def heads_first(m, x, y, seen, how):
    q, k = chunk(x, m.num_heads), chunk(y, m.num_heads)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return hide(scores, seen.transpose(0, 1).flatten(0, 1), how).softmax(-1).to(k.dtype) @ k


WAYS = (kernel, flex, softmax, queries_last, folded, folded_kernel, heads_first)


def reference(heads, x, y, seen):
    """Weights in float64; NaN where a query sees nothing."""
    q, k = (one.double().unflatten(-1, (heads, -1)) for one in (x, y))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


@st.composite
def cases(draw):
    heads, queries, keys = draw(st.sampled_from([2, 3, 5])), draw(st.sampled_from([3, 5, 7])), draw(st.integers(2, 7))
    batch = draw(st.sampled_from([1, 2, 3, 5]))
    return {
        "way": draw(st.sampled_from(WAYS)),
        "sizes": (batch, heads, queries, keys),
        "mask": draw(st.sampled_from(["none", "padding", "causal", "random", "by head", "rows hidden"])),
        "how": draw(st.sampled_from(["-inf", "lowest", "-1e9"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        "autocast": draw(st.booleans()),
        "training": draw(st.booleans()),
        "grad": draw(st.booleans()),
        "fails_at": draw(st.one_of(st.none(), st.integers(0, 2))),
        "named": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


def make_mask(kind, sizes, generator):
    batch, heads, queries, keys = sizes
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if kind == "padding":
        seen &= torch.arange(keys) < torch.randint(1, keys + 1, (batch, 1, 1, 1), generator=generator)
    elif kind == "causal":
        seen &= torch.ones(queries, keys, dtype=torch.bool).tril()
    elif kind != "none":
        of_heads = heads if kind == "by head" else 1
        seen = torch.rand(batch, of_heads, queries, keys, generator=generator) > 0.4
        seen[..., 0] = True
        if kind == "rows hidden":
            seen[:, :, torch.randint(queries, (), generator=generator)] = False
    return seen.expand(sizes)


def build(case):
    batch, heads, queries, keys = case["sizes"]
    generator = torch.Generator().manual_seed(case["seed"])
    x, y = (torch.randn(batch, n, 4 * heads, generator=generator).to(case["dtype"]) for n in (queries, keys))
    seen = make_mask(case["mask"], case["sizes"], generator)
    steps = iter(range(100))

    def check():
        if next(steps) == case["fails_at"]:
            raise ValueError("at a random point")

    def run(module, x, y):
        check()
        out = case["way"](module, module.scale * x, y, seen, case["how"])
        check()
        return module.inner(out)

    def inner(module, out):
        check()
        return out * 2

    module = Runs(run, inner=Runs(inner))
    module.num_heads, module.scale = heads, torch.nn.Parameter(torch.ones((), dtype=case["dtype"]))
    return Fusing(module).train(case["training"]), (x, y), seen


@fuzz(cases(), some=30, many=300)
def test_any_attention(case):
    model, (x, y), seen = build(case)
    attention = {"a_to_b": "fusion"} if case["named"] or x.shape[1] == y.shape[1] else None
    recorder = AttentionRecorder(model, attention)
    with torch.set_grad_enabled(case["grad"]), torch.autocast("cpu", torch.bfloat16, enabled=case["autocast"]):
        if case["fails_at"] is not None:
            with pytest.raises(ValueError, match="at a random point"), recorder:
                model(x, y)
            assert count_hooks(model) == count_global_hooks() == torch._C._len_torch_function_stack() == 0
        model, (x, y), seen = build(case | {"fails_at": None})
        expected = model(x, y)
        recorder, pairs = AttentionRecorder(model, attention), []
        for _ in range(2):  # the first step, and one in which only the layers are looked at
            with recorder:
                got = model(x, y)
                pairs += recorder.attention
            assert_same(got, expected)
    if case["grad"]:
        assert_same(gradients(model, got), gradients(model, expected))
    first, pair = pairs
    torch.testing.assert_close(first.forward.weights, pair.forward.weights, rtol=0, atol=0, equal_nan=True)
    visible = torch.ones(seen.shape, dtype=torch.bool)
    if pair.forward.visible is not None:
        visible &= pair.forward.visible
    if pair.forward.key_mask is not None:
        visible &= pair.forward.key_mask[:, None, None]
    assert torch.equal(visible, seen)
    half = case["autocast"] or case["dtype"] == torch.bfloat16
    rounding = {"atol": 0.05, "rtol": 0.1} if half else {"atol": 1e-5, "rtol": 1e-4}
    weights, some = reference(case["sizes"][1], x, y, seen), seen.any(-1)
    torch.testing.assert_close(pair.forward.weights.double()[some], weights[some], **rounding)
    assert count_hooks(model) == count_global_hooks() == torch._C._len_torch_function_stack() == 0
