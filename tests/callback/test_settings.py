"""Settings and inputs that do not fit, and the messages about them."""

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture, JointSequence
from lightning_xattn.core.errors import DiscoveryError, SettingError, ShapeError
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
        ({"classes_by": "patient"}, "classes_by must be one of target, prediction; got 'patient'"),
        ({"every_n_epochs": 0}, "every_n_epochs must be a whole number >= 1; got 0"),
        ({"figures_every_n_epochs": -1}, "figures_every_n_epochs must be a whole number >= 0; got -1"),
        ({"attention": {"eeg": "fusion"}}, "got 'eeg'"),
        ({"class_names": ["all", "b"]}, "none of them empty, all, correct"),
        ({"class_names": ["b", "b"]}, "must differ from each other"),
        ({"class_names": ["head_0", "b"]}, "like head_0"),
        ({"class_names": []}, "must be a sequence of strings"),
        ({"attention": {"a_to_b": 3}}, "must map directions to module paths"),
        ({"attention": {"left/eeg_to_spec": "fusion"}}, "'left/eeg_to_spec'"),
        ({"fusion": "fusion"}, r"positions or names of the arguments of a fusion.*modalities=\{'<a>': 0, '<b>': 1\}"),
        (
            {"modalities": {"a": 0, "b": 1}},
            "positions or names of the arguments of a fusion, each once, e.g. fusion='path.to.module'",
        ),
        ({"predictions": 3}, "predictions must be None, a key or a callable; got 3"),
        ({"targets": ""}, "targets must be None, a key or a callable; got ''"),
        ({"groups": True}, "groups must be None, a key or a callable; got True"),
        ({"predictions": "y", "targets": "y"}, "predictions and targets are both the key 'y'"),
        (
            {"targets": lambda batch: batch[2]},
            r"targets must take \(outputs, batch\) or .*; its callable takes \(batch\)",
        ),
        ({"sample_ids": lambda a, b, c, d: a}, r"sample_ids must take .* takes \(a, b, c, d\)"),
        ({"class_names": "ab"}, "must be a sequence of strings"),
        ({"table": True}, "table must be a folder's path, .* or None for no table; got True"),
        ({"contribution_samples": 1}, "contribution_samples must be 0 .* or at least 2, .*; got 1"),
        ({"contribution_samples": True}, "contribution_samples must be a whole number >= 0; got True"),
        ({"contribution_samples": float("nan")}, "whole number >= 0; got nan"),
        (
            {"max_samples": 101, "contribution_samples": 128},
            "at least contribution_samples, 128, .*; got 101. .* contribution_samples=101",
        ),
        ({"every_n_batches": 2.0}, "every_n_batches must be a whole number >= 1; got 2.0"),
        ({"faithfulness_every_n_epochs": False}, "faithfulness_every_n_epochs must be a whole number >= 0; got False"),
        ({"curves": True}, "curves must be one of main, all; got True"),
        ({"curves": ""}, "curves must be one of main, all; got ''"),
        ({"fusion": True}, "fusion='path.to.module'.*Got fusion=True"),
    ):
        with pytest.raises(SettingError, match=message):
            AttentionExplainabilityCallback(**settings)
    with pytest.raises(SettingError, match="'left/eeg_to_spec'"):
        JointSequence("fusion", {"left/eeg": (0, 3), "spec": (3, 7)})
    with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments"):
        AttentionExplainabilityCallback(None, ["a", "b"])
    with pytest.raises(TypeError, match="unknown"):
        AttentionExplainabilityCallback(unknown=1)
    for spans in ({"a": (True, 3), "b": (3, 7)}, {"a": (0, 3), "b": (3, True)}):
        with pytest.raises(SettingError, match=r"must be \(start, stop\).*True"):
            JointSequence("fusion", spans)
    for paths in (3, [], ["fusion", "fusion"], ["fusion", 3]):
        with pytest.raises(SettingError, match="a module path or a list of different ones; got"):
            JointSequence(paths, {"a": (0, 3), "b": (3, 7)})


def test_settings_of_the_explainer_are_checked_at_once():
    for settings, message in (
        ({"top_k": None}, "top_k must be a whole number >= 1; got None"),
        ({"top_k": True}, "top_k must be a whole number >= 1; got True"),
        ({"num_heads": 0}, "num_heads must be a whole number >= 1; got 0"),
        ({"predict": "forward"}, r"predict must be a callable \(model, batch\) -> outputs, or None; got 'forward'"),
        ({"contribution_samples": 1}, "contribution_samples must be 0"),
        ({"axes": {"audio": "s"}}, "axes must map modalities to TokenAxis"),
    ):
        with pytest.raises(SettingError, match=message):
            ExplainabilityCapture(ToyModule(), **settings)
    explainer = ExplainabilityCapture(ToyModule())
    for loader in (None, 3, "loader", {"audio": 3}, torch.zeros(5, 3)):
        with pytest.raises(SettingError, match=f"loader must yield batches, .*; got a {type(loader).__name__}"):
            explainer.explain_loader(loader)
    for table in (True, 3, ""):
        with pytest.raises(SettingError, match="table must be a folder's path"):
            explainer.explain_loader(toy_loader(), table=table)
    for partners in (True, 3, 5, "some", 4.0):
        with pytest.raises(SettingError, match="partners must be an even number from 4 on, or 'all'"):
            explainer.explain_loader(toy_loader(), partners=partners)


def test_a_wrong_path_fails_before_anything_runs():
    with pytest.raises(DiscoveryError, match=r"No module 'fusion'.*Found: audio_to_text_attn, text_to_audio_attn"):
        validate(ToyModule(), AttentionExplainabilityCallback(attention={"audio_to_text": "fusion"}))


class Idle(ToyModule):
    def forward(self, audio, text):
        return self.head(torch.cat([self.audio(audio).mean(1), self.text(text).mean(1)], dim=1))


def test_attention_that_never_runs_is_an_error():
    named = {"audio_to_text": "audio_to_text_attn", "text_to_audio": "text_to_audio_attn"}
    with pytest.raises(DiscoveryError, match="None of audio_to_text_attn, text_to_audio_attn ran, so .* Name them"):
        validate(Idle(), AttentionExplainabilityCallback(named))
