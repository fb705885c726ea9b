"""Settings and inputs that do not fit, and what their users are told."""

import sys
from types import ModuleType

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from lightning_xattn import AttentionExplainabilityCallback, JointSequence
from lightning_xattn.errors import DiscoveryError, SettingError, ShapeError, XAttnError
from tests.toy import NAMES, ToyModule, quiet_trainer, toy_loader, validate


def test_targets_and_names_that_do_not_fit_fail_in_the_sanity_check():
    class Steps(Callback):
        def on_train_batch_start(self, *args):
            raise AssertionError("training has begun")

    for settings, message in (
        ({"class_names": NAMES[:3]}, r"3 class_names \(a, b, c\) but 4 columns"),
        ({"targets": lambda outputs, batch: batch[2] + 2}, r"targets in 0 ... 3 for 4 classes .*; got \[4, 5\] too"),
        ({"targets": lambda outputs, batch: batch[2][:2]}, r"Expected targets as class ids \(5,\)"),
    ):
        trainer = quiet_trainer(callbacks=[AttentionExplainabilityCallback(**settings), Steps()])
        with pytest.raises(ShapeError, match=message):
            trainer.fit(ToyModule(), toy_loader(), toy_loader())


def test_settings_are_checked_at_once():
    for settings, message in (
        ({"group_by": "patient"}, "group_by must be one of target, prediction; got 'patient'"),
        ({"every_n_epochs": 0}, "every_n_epochs must be a whole number >= 1; got 0"),
        ({"figures_every_n_epochs": -1}, "figures_every_n_epochs must be a whole number >= 0; got -1"),
        ({"attention": {"eeg": "fusion"}}, "got 'eeg'"),
        ({"class_names": ["all", "b"]}, "none of them all, correct"),
        ({"class_names": ["b", "b"]}, "must differ from each other"),
        ({"class_names": ["head_0", "b"]}, "like head_0"),
        ({"class_names": []}, "must be a sequence of strings"),
        ({"class_names": 3}, "must be a sequence of strings"),
        ({"attention": {"a_to_b": 3}}, "must map directions to module paths"),
        ({"attention": {"left/eeg_to_spec": "fusion"}}, "'left/eeg_to_spec'"),
        ({"every_n_epochs": True}, "whole number"),
        ({"attention": {}}, r"attention=\{\}, fusion='path.to.module', modalities=\{'<a>': 0, '<b>': 1\}"),
        ({"attention": {}, "fusion": "fusion"}, "Got fusion='fusion', modalities=None"),
        ({"predictions": 3}, "predictions must be None, a key or a callable; got 3"),
    ):
        with pytest.raises(SettingError, match=message):
            AttentionExplainabilityCallback(**settings)
    with pytest.raises(SettingError, match="'left/eeg_to_spec'"):
        JointSequence("fusion", {"left/eeg": (0, 3), "spec": (3, 7)})
    with pytest.raises(TypeError, match="unknown"):
        AttentionExplainabilityCallback(unknown=1)


def test_a_wrong_path_fails_before_anything_runs():
    with pytest.raises(DiscoveryError, match=r"No module 'fusion'.*Found: audio_to_text_attn, text_to_audio_attn"):
        validate(ToyModule(), AttentionExplainabilityCallback(attention={"audio_to_text": "fusion"}))


class Idle(ToyModule):
    def forward(self, audio, text):
        return self.head(torch.cat([self.audio(audio).mean(1), self.text(text).mean(1)], dim=1))


def test_attention_that_never_runs_is_an_error():
    with pytest.raises(
        DiscoveryError, match="None of audio_to_text_attn, text_to_audio_attn ran, so .* name that module"
    ):
        validate(Idle(), AttentionExplainabilityCallback())


def test_a_lightning_whose_trainer_would_not_take_it_is_told_which_does(monkeypatch):
    older = ModuleType("lightning")
    older.__version__ = "2.5.6"
    monkeypatch.setitem(sys.modules, "lightning", older)
    monkeypatch.delitem(sys.modules, "lightning.pytorch", raising=False)
    AttentionExplainabilityCallback()  # what is not imported does not matter
    monkeypatch.setitem(sys.modules, "lightning.pytorch", ModuleType("lightning.pytorch"))
    with pytest.raises(XAttnError, match=r"2\.5\.6 takes no callback.*expected lightning 2\.6 or later.*pip install"):
        AttentionExplainabilityCallback()
    older.__version__ = "2.6.0"
    AttentionExplainabilityCallback()
