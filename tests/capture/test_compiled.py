"""Compiled modules run as they are written while they are recorded, and compiled before and after.

The backend is the eager one: what matters is when torch compiles, not what it makes of it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import XAttnWarning
from tests.capture.models import Fusing, Pair, Runs, assert_same, heads, recorded, tokens
from tests.messages import tells
from tests.toy import AUDIO, TEXT, ToyModule, count_hooks, quiet_trainer, runs_compiled, toy_loader

COMPILED = tells("compiled", "every_n_epochs", "every_n_batches")
PATHS = {"audio_to_text": "fusion.audio_to_text_attn", "text_to_audio": "fusion.text_to_audio_attn"}


def around():
    return Fusing(Pair()).eval()


def compile_part(model):
    model.fusion = torch.compile(model.fusion, backend="eager")
    return model


def compile_in_place(model):
    model.fusion.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("wrap", "attention"),
    [
        (lambda model: torch.compile(model, backend="eager"), None),
        (compile_part, PATHS),
        (compile_in_place, None),
        (lambda model: nn.DataParallel(compile_part(model)), None),
    ],
    ids=["whole", "part", "in place", "part, and data parallel"],
)
def test_what_is_recorded_is_that_of_the_plain_model(wrap, attention):
    audio, text = tokens()
    plain, model = around(), wrap(around()).eval()
    with torch.no_grad():
        expected = plain(audio, text)
        model(audio, text)  # hooks that come after a first compiled call are never called
        compiled = model(audio, text)
        recorder = AttentionRecorder(model, attention)
        with pytest.warns(XAttnWarning, match=COMPILED), recorder:
            got = model(audio, text)
        (pair,) = recorder.attention
        assert_same(got, expected)
        assert count_hooks(model) == 0
        assert_same(model(audio, text), compiled)
        with AttentionRecorder(plain) as of_plain:
            plain(audio, text)
    assert pair.layer == of_plain.attention[0].layer == "fusion"
    assert torch.equal(pair.forward.weights, of_plain.attention[0].forward.weights)


def test_recording_first_leaves_nothing_in_what_is_compiled_later():
    model, (audio, text) = compile_part(around()), tokens()
    calls = []
    with torch.no_grad():
        with pytest.warns(XAttnWarning, match=COMPILED), AttentionRecorder(model) as recorder:
            model(audio, text)
        recorder.clear()
        recorder._mode._leave = lambda *call: calls.append(call)
        model(audio, text)
        model(audio, text)
    assert calls == []


@pytest.mark.filterwarnings("ignore:.*is compiled, and compiled code hides its attention")
def test_recorders_that_overlap_put_torchs_stance_back():
    assert runs_compiled()
    model = compile_part(around())
    first, second = AttentionRecorder(model), AttentionRecorder(model)
    first.__enter__()
    second.__enter__()
    first.close()
    assert not runs_compiled()
    second.close()
    assert runs_compiled()


@pytest.mark.slow
def test_a_compiled_lightning_module_in_a_trainer():
    callbacks = [
        AttentionExplainabilityCallback(figures_every_n_epochs=0),
        AttentionExplainabilityCallback(classes_by="prediction", figures_every_n_epochs=0),
    ]
    module = torch.compile(ToyModule(), backend="eager")
    with pytest.warns(XAttnWarning, match=COMPILED):
        quiet_trainer(callbacks=callbacks, max_epochs=2).fit(module, toy_loader(), toy_loader(seed=1))
    assert [[entry["samples"] for entry in one.history] for one in callbacks] == [[23, 23]] * 2
    assert runs_compiled()


def test_a_compiled_function_runs_as_it_is_written_while_it_is_recorded():
    runs = []

    def attend(x, y):
        runs.append(torch.compiler.is_compiling())
        return F.scaled_dot_product_attention(heads(x), heads(y), heads(y))

    compiled = torch.compile(attend, backend="eager")
    model = Fusing(Runs(lambda m, x, y: compiled(x, y)))
    (pair,) = recorded(model, {"a_to_b": "fusion"})
    assert runs == [False]
    assert pair.forward.weights.shape[2:] == (AUDIO, TEXT)
    assert runs_compiled()
