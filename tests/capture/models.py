"""Models and tokens for the tests of capture, and the test that every kind of model must pass: nothing changes."""

from collections.abc import Mapping

import torch
from torch import nn

from lightning_xattn.capture import AttentionRecorder
from tests.toy import AUDIO, HEADS, TEXT, WIDTH, count_global_hooks, count_hooks

BATCH = 2


class Pair(nn.Module):
    """Two attention modules, called as the test says."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        settings = {"batch_first": True} | settings
        back = settings | {k: WIDTH for k in ("kdim", "vdim") if k in settings}
        self.audio_to_text_attn = nn.MultiheadAttention(WIDTH, HEADS, **settings)
        self.text_to_audio_attn = nn.MultiheadAttention(WIDTH, HEADS, **back)

    def forward(self, audio, text, audio_call=None, text_call=None):
        return (
            self.audio_to_text_attn(audio, text, text, **(audio_call or {})),
            self.text_to_audio_attn(text, audio, audio, **(text_call or {})),
        )


def tokens(batch_first=True, text_width=WIDTH):
    generator = torch.Generator().manual_seed(1)
    audio = torch.randn(BATCH, AUDIO, WIDTH, generator=generator)
    text = torch.randn(BATCH, TEXT, text_width, generator=generator)
    return (audio, text) if batch_first else (audio.transpose(0, 1), text.transpose(0, 1))


def mha():
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)


def per_head(module, query, key, **call):
    """The weights as the module itself returns them on request, per head and without dropout."""
    training = module.training
    module.eval()
    with torch.no_grad():
        weights = module(query, key, key, **(call | {"need_weights": True, "average_attn_weights": False}))[1]
    module.train(training)
    return weights


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def softmax(queries, keys):
    return (heads(queries) @ heads(keys).mT).softmax(-1)


def folded(queries, keys):
    """Queries and keys with their heads among the samples."""
    return (heads(x).flatten(0, 1) for x in (queries, keys))


class Runs(nn.Module):
    """A module that runs what the test says on its inputs."""

    def __init__(self, run, **children):
        super().__init__()
        self.run = run
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *inputs):
        return self.run(self, *inputs)


def recorded(model, attention=None, inputs=None):
    """What is recorded of a model that gets these inputs, else audio and text tokens."""
    with torch.no_grad(), AttentionRecorder(model, attention) as recorder:
        model(*(inputs or tokens()))
    return recorder.attention


class Fusing(nn.Module):
    """A model whose one child, ``fusion``, does everything."""

    def __init__(self, fusion):
        super().__init__()
        self.fusion = fusion

    def forward(self, *inputs):
        return self.fusion(*inputs)


def record_fusion(fusion, attention, inputs=None):
    """What is recorded of a module that stands in a model as ``fusion``."""
    return recorded(Fusing(fusion), attention, inputs)


def leaves(output):
    """The tensors of an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [leaf for item in output for leaf in leaves(item)] if isinstance(output, (tuple, list)) else []


def assert_same(got, expected):
    got, expected = leaves(got), leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def gradients(model, output):
    model.zero_grad()
    sum(leaf.float().nan_to_num().sum() for leaf in leaves(output) if leaf.requires_grad).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def record(model, run, attention=None, autocast=True):
    """Run a model in three ways, each with and without recording, and return what was recorded in eval mode.

    In eval mode, in training with a fixed seed (with gradients), and under autocast, the outputs must be the same bit
    for bit, what is recorded under autocast is the same but for rounding, it carries no graph, and no hook stays
    behind.
    """

    def outputs(training, half, recorder):
        model.train(training)
        torch.manual_seed(5)
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=half):
            if recorder is None:
                return run(model)
            with recorder:
                return run(model)

    kept = None
    for training, half in [(False, False), (True, False), *([(False, True)] if autocast else [])]:
        expected = outputs(training, half, None)
        expected_gradients = gradients(model, expected) if training else []
        hooks_of_its_own = count_hooks(model)
        recorder = AttentionRecorder(model, attention)
        got = outputs(training, half, recorder)
        assert_same(got, expected)
        pairs = recorder.attention
        assert pairs
        assert not any(direction.weights.requires_grad for pair in pairs for direction in pair.directions)
        if training:
            assert_same(gradients(model, got), expected_gradients)
        kept = pairs if kept is None else kept
        if half:  # of the first layer, as later ones get other tokens
            for rounded, exact in zip(pairs[0].directions, kept[0].directions, strict=True):
                torch.testing.assert_close(
                    rounded.weights.float(), exact.weights.float(), atol=0.02, rtol=0.1, equal_nan=True
                )
        assert count_hooks(model) == hooks_of_its_own
        assert count_global_hooks() == 0
        assert torch._C._len_torch_function_stack() == 0
    model.eval()
    return kept
