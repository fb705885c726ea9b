"""What stands around a user's modules: DataParallel, checkpointing, TorchScript, steps that call them or do not."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DiscoveryError, XAttnWarning
from tests.capture.models import Fusing, Pair, Runs, assert_same, mha, per_head, tokens
from tests.messages import tells
from tests.toy import (
    ToyModule,
    count_hooks,
    quiet_trainer,
    toy_data,
    toy_loader,
    validate,
)

PATHS = {"audio_to_text": "fusion.audio_to_text_attn", "text_to_audio": "fusion.text_to_audio_attn"}


def checkpointed(attention, queries, keys, **how):
    return checkpoint(lambda q, k: attention(q, k, k)[0], queries, keys, **how)


@pytest.mark.filterwarnings("ignore:Found in the first pass")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """The attention runs again during the backward pass, while it is recorded; found, and then known."""

    def run(module, x, y):
        how = {"use_reentrant": reentrant}
        return checkpointed(module.p, x, y, **how) + checkpointed(module.q, y, x, **how).mean()

    model = Runs(run, p=mha(), q=mha())
    x, y = (x.requires_grad_() for x in tokens())
    recorder = AttentionRecorder(model)
    for _ in range(2):
        with recorder, warnings.catch_warnings():
            warnings.simplefilter("error", XAttnWarning)
            warnings.filterwarnings("ignore", "Found in the first pass")
            model(x, y).sum().backward()
            (pair,) = recorder.attention
        assert torch.equal(pair.forward.weights, per_head(model.p, x, y))
        assert torch.equal(pair.backward.weights, per_head(model.q, y, x))


@pytest.mark.parametrize("attention", [None, PATHS])
def test_data_parallel(attention):
    plain, (audio, text) = Fusing(Pair()).eval(), tokens()
    with torch.no_grad():
        expected = plain(audio, text)
        with AttentionRecorder(nn.DataParallel(plain), attention) as recorder:
            assert_same(nn.DataParallel(plain)(audio, text), expected)
    (pair,) = recorder.attention
    assert pair.layer == "fusion"
    assert torch.equal(pair.forward.weights, per_head(plain.fusion.audio_to_text_attn, audio, text))


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
    mode = AttentionExplainabilityCallback(figures_every_n_epochs=0)
    validate(Sometimes(skipped=2), mode)
    assert mode.summaries["val"].samples == 23 - 5

    mode = AttentionExplainabilityCallback(figures_every_n_epochs=0)
    with pytest.warns(XAttnWarning, match=tells("text_to_audio_attn", "text_to_audio", "did not run", "left out")):
        validate(Sometimes(skipped=2, half=True), mode)
    assert mode.summaries["val"].samples == 23 - 5

    said = tells("text_to_audio_attn", "text_to_audio", "did not run", "attention={'<a>_to_<b>'")
    with pytest.warns(XAttnWarning, match=said):
        validate(Sometimes(skipped=0, half=True), AttentionExplainabilityCallback(figures_every_n_epochs=0))
    named = {"audio_to_text": "audio_to_text_attn", "text_to_audio": "text_to_audio_attn"}
    with pytest.raises(DiscoveryError, match=said):
        validate(Sometimes(skipped=0, half=True), AttentionExplainabilityCallback(named, figures_every_n_epochs=0))


class Twice(ToyModule):
    """Test-time augmentation: the prediction of the flipped sample is added."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        audio, text, targets = batch
        return {"logits": self(audio, text) + self(audio.flip(1), text), "targets": targets}


def test_a_module_called_twice_in_a_step_shows_its_first_run():
    module, once, twice = (
        ToyModule(),
        AttentionExplainabilityCallback(figures_every_n_epochs=0),
        AttentionExplainabilityCallback(figures_every_n_epochs=0),
    )
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

    mode = AttentionExplainabilityCallback(every_n_batches=2, figures_every_n_epochs=0)
    trainer = quiet_trainer(callbacks=[mode], num_sanity_val_steps=0)
    trainer.fit(Count(), toy_loader(), toy_loader(seed=1))
    assert hooks == [True, False, True, False, True]
    assert mode.history[0]["samples"] == 5 + 5 + 3
    sampled = [toy_data(seed=1)[start : start + 5] for start in (0, 10, 20)]
    alone = AttentionExplainabilityCallback(figures_every_n_epochs=0)
    validate(trainer.model, alone, DataLoader(sampled, batch_size=None))
    for name in ("alignment/all", "alignment/correct", "alignment/null", "entropy/text_to_audio/head_1"):
        assert mode.history[0][name] == pytest.approx(alone.history[0][name], abs=1e-7)
