"""The one mode: an attention can be changed before it is computed, and what it cannot read it says."""

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn.capture.attention_mode import AttentionMode
from lightning_xattn.capture.events import Edit, RecordLevel
from tests.capture.models import BATCH, Runs, assert_same, heads, mha, tokens
from tests.toy import AUDIO, HEADS, TEXT, WIDTH, count_hooks

PLACES = (torch.arange(TEXT) >= 4)[:, None]
"""Which keys get the tokens of another sample."""
WEIGHED = torch.rand(BATCH, TEXT, generator=torch.Generator().manual_seed(0)) * 2


def kernel(**call):
    def run(module, x, y, weighed=None):
        if weighed is None:
            return F.scaled_dot_product_attention(heads(x), heads(y), heads(y), **call)
        return F.scaled_dot_product_attention(heads(x), heads(y), weighed[:, None, :, None] * heads(y), **call)

    return run


def by_softmax(axis):
    def run(module, x, y, weighed=None):
        scores = heads(x) @ heads(y).mT
        weights = scores.softmax(-1) if axis == -1 else scores.mT.softmax(-2).mT
        return (weights if weighed is None else weights * weighed[:, None, None]) @ heads(y)

    return run


def multi_head(name, **call):
    def run(module, x, y, weighed=None):
        attention = module[name] if isinstance(module, nn.ModuleDict) else getattr(module, name)
        if weighed is None:
            return attention(x, y, y, **call)[0]
        _, weights = attention(x, y, y, **call | {"need_weights": True, "average_attn_weights": False})
        projected = F.linear(y, *(one.chunk(3)[2] for one in (attention.in_proj_weight, attention.in_proj_bias)))
        values = projected.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return attention.out_proj(((weights * weighed[:, None, None]) @ values).transpose(1, 2).flatten(2))

    return run


bools, floats = torch.rand(AUDIO, TEXT) > 0.2, torch.randn(AUDIO, TEXT)
bools[:, 0] = True
WAYS = {
    "kernel": kernel(),
    "kernel with a bool mask": kernel(attn_mask=bools),
    "kernel with a float mask": kernel(attn_mask=floats),
    "causal kernel": kernel(is_causal=True),
    "softmax": by_softmax(-1),
    "softmax over another axis": by_softmax(-2),
}
for need_weights in (True, False):
    for name, mask in (("", None), (" with a mask", ~bools), (" with a float mask", floats)):
        WAYS[f"multi-head attention{name}, weights: {need_weights}"] = multi_head(
            "p", need_weights=need_weights, attn_mask=mask
        )


def edited(model, edit, *call):
    mode = AttentionMode(
        {model: ""}, lambda run, event: RecordLevel.NOTHING, lambda run, output: None, lambda event: edit
    )
    with ExitStack() as hooks:
        mode.attach(hooks)
        output = model(*call)
    assert count_hooks(model) == 0
    assert torch._C._len_torch_function_stack() == 0
    return output


def swapped(tokens):
    """Some keys ``(samples, ..., keys, width)`` of the sample before."""
    return torch.where(PLACES, tokens.roll(1, 0), tokens)


@pytest.mark.parametrize("name", [name for name in WAYS if not name.startswith("softmax")])
def test_keys_and_values_are_replaced_before_an_attention_is_computed(name):
    (audio, text), run = tokens(), WAYS[name]
    model = Runs(run, p=with_biases(mha()))
    got = edited(model, Edit(tokens=lambda *both: tuple(map(swapped, both))), audio, text)
    torch.testing.assert_close(got, run(model, audio, swapped(text)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("run", WAYS.values(), ids=WAYS)
def test_the_weights_that_go_to_a_key_are_multiplied(run):
    audio, text = tokens()
    model = Runs(run, p=with_biases(mha()))
    got = edited(model, Edit(weights=WEIGHED), audio, text)
    torch.testing.assert_close(got, run(model, audio, text, WEIGHED), atol=1e-6, rtol=1e-5)


def with_biases(attention):
    """Else all of them are 0."""
    nn.init.normal_(attention.in_proj_bias)
    return attention


def test_a_softmax_has_no_keys_to_replace():
    audio, text = tokens()
    model = Runs(by_softmax(-1), p=mha())
    assert_same(edited(model, Edit(tokens=pytest.fail), audio, text), model(audio, text))


def test_an_encoder_layer_that_would_take_a_fast_path_is_changed_too():
    layer, x = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True).eval(), tokens()[1]
    with torch.no_grad():
        got = edited(layer, Edit(tokens=lambda *both: tuple(map(swapped, both))), x)
        attended = layer.norm1(x + layer.self_attn(x, swapped(x), swapped(x))[0])
        expected = layer.norm2(attended + layer.linear2(layer.linear1(attended).relu()))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
