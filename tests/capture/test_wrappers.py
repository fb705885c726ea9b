"""What stands around a user's modules: compilation, wrappers, checkpointing, TorchScript, steps of all kinds."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DiscoveryError, XAttnWarning
from tests.capture.models import Fusing, Pair, Runs, assert_same, heads, record, recorded, tokens
from tests.messages import tells
from tests.toy import (
    AUDIO,
    TEXT,
    ToyModule,
    count_hooks,
    quiet_trainer,
    runs_compiled,
    toy_data,
    toy_loader,
    validate,
)

COMPILED = tells("compiled", "every_n_epochs", "every_n_batches")


class Around(nn.Module):
    """Something to put into wrappers."""

    def __init__(self):
        super().__init__()
        self.fusion = Pair()

    def forward(self, audio, text):
        return self.fusion(audio, text)


def compile_part(model):
    model.fusion = torch.compile(model.fusion, backend="aot_eager")
    return model


def compile_in_place(model):
    model.fusion.compile(backend="aot_eager")
    return model


WRAPPERS = {
    "compiled whole": lambda model: torch.compile(model, backend="aot_eager"),
    "compiled part": compile_part,
    "compiled in place": compile_in_place,
    "data parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(compile_part(model)),
}
PATHS = {"audio_to_text": "fusion.audio_to_text_attn", "text_to_audio": "fusion.text_to_audio_attn"}


@pytest.mark.parametrize("attention", [None, PATHS], ids=["found", "named"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped(wrap, attention):
    audio, text = tokens()
    plain = Around().eval()
    model = wrap(Around()).eval()
    with torch.no_grad():
        expected = plain(audio, text)
        model(audio, text)  # hooks that come after a first compiled call are never called
        compiled = model(audio, text)
        recorder = AttentionRecorder(model, attention)
        if wrap is nn.DataParallel:
            with recorder:
                got = model(audio, text)
        else:
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
    model, (audio, text) = compile_part(Around().eval()), tokens()
    calls = []
    with torch.no_grad():
        with pytest.warns(XAttnWarning, match=COMPILED), AttentionRecorder(model) as recorder:
            model(audio, text)
        recorder.clear()
        recorder._mode._leave = lambda *call: calls.append(call)
        model(audio, text)
        model(audio, text)
    assert calls == []


def test_a_compiled_lightning_module_in_a_trainer():
    mode = AttentionExplainabilityCallback()
    module = torch.compile(ToyModule(), backend="aot_eager")
    with pytest.warns(XAttnWarning, match=COMPILED):
        quiet_trainer(callbacks=[mode], max_epochs=2).fit(module, toy_loader(), toy_loader(seed=1))
    assert [entry["samples"] for entry in mode.history] == [23, 23]


class Checkpointed(Around):
    """Saves memory: its fusion runs once more during the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, audio, text):
        audio = audio.clone().requires_grad_()
        return checkpoint(self._fused, audio, text, use_reentrant=self.reentrant)

    def _fused(self, audio, text):
        return tuple(fused for fused, _ in self.fusion(audio, text))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, recwarn):
    audio, text = tokens()
    (pair,) = record(Checkpointed(reentrant), lambda m: m(audio, text))
    model = Checkpointed(reentrant)
    with AttentionRecorder(model) as recorder:
        there, back = model(audio, text)
        (there.sum() + back.sum()).backward()  # runs the fusion again, while it is recorded
    (while_it_ran,) = recorder.attention
    torch.testing.assert_close(while_it_ran.forward.weights, pair.forward.weights)
    assert not [warning for warning in recwarn if warning.category is XAttnWarning]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_torchscript_is_refused():
    scripted = torch.jit.trace(nn.Linear(3, 3), torch.zeros(2, 3))
    model = nn.ModuleDict({"fusion": scripted, "inside": nn.ModuleDict({"linear": scripted})})
    for root, attention in ((scripted, None), (model, None), (model, {"a_to_b": "inside"})):
        with AttentionRecorder(root, attention) as recorder:
            scripted(torch.zeros(2, 3))
        with pytest.raises(DiscoveryError, match=tells("TorchScript", "before torch.jit", "attention={'<a>_to_<b>'")):
            _ = recorder.attention


class Sometimes(ToyModule):
    """Leaves its fusion out of the step with this number, whole or in part."""

    def __init__(self, skipped, half=False):
        super().__init__()
        self.skipped, self.half, self.step = skipped, half, -1

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.step = batch_idx
        return super().validation_step(batch, batch_idx)

    def forward(self, audio, text):
        if self.step != self.skipped:
            return super().forward(audio, text)
        audio, text = self.audio(audio), self.text(text)
        if self.half:
            self.audio_to_text_attn(audio, text, text)
        return self.head(torch.cat([audio.mean(1), text.mean(1)], dim=1))


def test_a_module_that_is_not_called_in_some_steps():
    mode = AttentionExplainabilityCallback()
    validate(Sometimes(skipped=2), mode)
    assert mode.summaries["val"].samples == 23 - 5

    mode = AttentionExplainabilityCallback()
    with pytest.warns(XAttnWarning, match=tells("text_to_audio_attn", "text_to_audio", "did not run", "left out")):
        validate(Sometimes(skipped=2, half=True), mode)
    assert mode.summaries["val"].samples == 23 - 5

    said = tells("text_to_audio_attn", "text_to_audio", "did not run", "attention={'<a>_to_<b>'")
    with pytest.warns(XAttnWarning, match=said):
        validate(Sometimes(skipped=0, half=True), AttentionExplainabilityCallback())
    named = {"audio_to_text": "audio_to_text_attn", "text_to_audio": "text_to_audio_attn"}
    with pytest.raises(DiscoveryError, match=said):
        validate(Sometimes(skipped=0, half=True), AttentionExplainabilityCallback(named))


class Twice(ToyModule):
    """Test-time augmentation: the prediction of the flipped sample is added."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        audio, text, targets = batch
        return {"logits": self(audio, text) + self(audio.flip(1), text), "targets": targets}


def test_a_module_called_twice_in_a_step_shows_its_first_run():
    module, once, twice = ToyModule(), AttentionExplainabilityCallback(), AttentionExplainabilityCallback()
    validate(module, once)
    augmented = Twice()
    augmented.load_state_dict(module.state_dict())
    with pytest.warns(XAttnWarning) as caught:
        validate(augmented, twice)
    told = [str(warning.message) for warning in caught if "first run" in str(warning.message)]
    assert len(told) == 2
    for message, name in zip(told, ("audio_to_text_attn", "text_to_audio_attn"), strict=True):
        assert re.search(tells(name), message)
    for name in ("alignment/all", "entropy/audio_to_text/all", "alignment/null"):
        assert twice.history[0][name] == once.history[0][name]


def test_batches_that_are_not_sampled_have_no_hooks():
    hooks = []

    class Count(ToyModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            hooks.append(count_hooks(self) > 0)
            return super().validation_step(batch, batch_idx)

    mode = AttentionExplainabilityCallback(every_n_batches=2)
    trainer = quiet_trainer(callbacks=[mode], num_sanity_val_steps=0)
    trainer.fit(Count(), toy_loader(), toy_loader(seed=1))
    assert hooks == [True, False, True, False, True]
    assert mode.history[0]["samples"] == 5 + 5 + 3
    sampled = [toy_data(seed=1)[start : start + 5] for start in (0, 10, 20)]
    alone = AttentionExplainabilityCallback()
    validate(trainer.model, alone, DataLoader(sampled, batch_size=None))
    for name in ("alignment/all", "alignment/correct", "alignment/null", "entropy/text_to_audio/head_1"):
        assert mode.history[0][name] == pytest.approx(alone.history[0][name], abs=1e-7)


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
