"""Random attention under random masks and settings, and an exception at a random point: weights, outputs, hooks."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_xattn.capture import AttentionRecorder
from tests.capture.models import Fusing, Runs, assert_same
from tests.toy import count_global_hooks, count_hooks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no axis for heads"),
    pytest.mark.filterwarnings("ignore:Found in the first pass"),
]


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def fold(x, heads):
    return split(x, heads).flatten(0, 1)


def chunk(x, heads):
    return torch.cat(x.chunk(heads, dim=-1), dim=0)


def rows_of(mask, heads, first):
    return mask.repeat(heads, 1, 1) if first else mask.repeat_interleave(heads, dim=0)


def kernel(m, x, y, seen):
    q, k = split(x, m.num_heads), split(y, m.num_heads)
    return F.scaled_dot_product_attention(q, k, k, seen[:, None])


def softmax(m, x, y, seen):
    q, k = split(x, m.num_heads), split(y, m.num_heads)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1) @ k


def queries_last(m, x, y, seen):
    q, k = split(x, m.num_heads), split(y, m.num_heads)
    scores = (k @ q.mT / math.sqrt(q.shape[-1])).masked_fill(~seen[:, None].mT, -torch.inf)
    return torch.softmax(scores, dim=-2).mT @ k


def folded(m, x, y, seen):
    q, k = fold(x, m.num_heads), fold(y, m.num_heads)
    scores = torch.bmm(q, k.mT) / math.sqrt(q.shape[-1])
    return F.softmax(scores.masked_fill(~rows_of(seen, m.num_heads, False), -torch.inf), dim=-1) @ k


def folded_kernel(m, x, y, seen):
    q, k = fold(x, m.num_heads), fold(y, m.num_heads)
    return F.scaled_dot_product_attention(q, k, k, rows_of(seen, m.num_heads, False))


def heads_first(m, x, y, seen):
    q, k = chunk(x, m.num_heads), chunk(y, m.num_heads)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores.masked_fill(~rows_of(seen, m.num_heads, True), -torch.inf).softmax(-1) @ k


def multihead(m, x, y, seen):
    mask = (~seen).repeat_interleave(m.num_heads, dim=0)
    return m.attention(x, y, y, attn_mask=mask, **m.call)[0]


WAYS = (kernel, softmax, queries_last, folded, folded_kernel, heads_first, multihead)


def reference(m, x, y, seen):
    """Weights in float64, row by row."""
    if hasattr(m, "attention"):
        width = x.shape[-1]
        weight, bias = m.attention.in_proj_weight.double(), m.attention.in_proj_bias.double()
        x = x.double() @ weight[:width].T + bias[:width]
        y = y.double() @ weight[width : 2 * width].T + bias[width : 2 * width]
    q, k = split(x, m.num_heads).double(), split(y, m.num_heads).double()
    weights = torch.zeros(len(x), m.num_heads, q.shape[2], k.shape[2], dtype=torch.float64)
    for b, h, i in ((b, h, i) for b in range(len(x)) for h in range(m.num_heads) for i in range(q.shape[2])):
        keys = seen[b, i].nonzero().flatten()
        scores = k[b, h, keys] @ q[b, h, i] / math.sqrt(q.shape[-1])
        weights[b, h, i, keys] = (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()
    return weights


@st.composite
def cases(draw):
    heads, queries, keys = draw(st.sampled_from([2, 3, 5])), draw(st.sampled_from([3, 5, 7])), draw(st.integers(2, 7))
    batch = draw(st.sampled_from([1, 2, 3, 5]))
    return {
        "way": draw(st.sampled_from(WAYS)),
        "sizes": (batch, heads, queries, keys),
        "mask": draw(st.sampled_from(["none", "padding", "random"])),
        "training": draw(st.booleans()),
        "grad": draw(st.booleans()),
        "call": draw(st.sampled_from([{}, {"need_weights": False}, {"average_attn_weights": False}])),
        "fails_at": draw(st.one_of(st.none(), st.integers(0, 3))),
        "named": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


def build(case):
    batch, heads, queries, keys = case["sizes"]
    generator = torch.Generator().manual_seed(case["seed"])
    width = 4 * heads
    x, y = (torch.randn(batch, n, width, generator=generator) for n in (queries, keys))
    seen = torch.ones(batch, queries, keys, dtype=torch.bool)
    if case["mask"] == "padding":
        seen &= torch.arange(keys) < torch.randint(1, keys + 1, (batch, 1, 1), generator=generator)
    elif case["mask"] == "random":
        seen = torch.rand(batch, queries, keys, generator=generator) > 0.4
        seen[..., 0] = True
    steps = iter(range(100))

    def check():
        if next(steps) == case["fails_at"]:
            raise ValueError("at a random point")

    def run(module, x, y):
        check()
        out = case["way"](module, x, y, seen)
        check()
        return module.inner(out)

    def inner(module, out):
        check()
        return out * 2

    module = Runs(run, inner=Runs(inner))
    module.num_heads, module.call = heads, case["call"]
    if case["way"] is multihead:
        torch.manual_seed(case["seed"])
        module.attention = nn.MultiheadAttention(width, heads, batch_first=True)
    return Fusing(module).train(case["training"]), (x, y), seen


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_attention(case):
    model, (x, y), seen = build(case)
    attention = {"a_to_b": "fusion"} if case["named"] or x.shape[1] == y.shape[1] else None
    recorder = AttentionRecorder(model, attention)
    with torch.set_grad_enabled(case["grad"]):
        if case["fails_at"] is not None and case["fails_at"] < 3:
            with pytest.raises(ValueError, match="at a random point"), recorder:
                model(x, y)
            recorder.clear()
        model, (x, y), seen = build(case | {"fails_at": None})
        expected = model(x, y)
        recorder, pairs = AttentionRecorder(model, attention), []
        for _ in range(2):  # the first step, and one in which only the layers are looked at
            with recorder:
                assert_same(model(x, y), expected)
                pairs += recorder.attention
    first, pair = pairs
    assert torch.equal(first.forward.weights, pair.forward.weights)
    weights = reference(model.fusion, x, y, seen)
    torch.testing.assert_close(pair.forward.weights.double(), weights, atol=1e-5, rtol=1e-4)
    visible = torch.ones(weights.shape, dtype=torch.bool)
    if pair.forward.visible is not None:
        visible &= pair.forward.visible
    if pair.forward.key_mask is not None:
        visible &= pair.forward.key_mask[:, None, None]
    assert torch.equal(visible, seen[:, None].expand(visible.shape))
    assert count_hooks(model) == count_global_hooks() == torch._C._len_torch_function_stack() == 0
