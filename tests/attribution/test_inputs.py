"""Modalities in a fusion whatever its arguments are, named ones, and masks that go with their tokens."""

import pytest
import torch
from pytorch_lightning.strategies.strategy import _ForwardRedirection
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.core.errors import DiscoveryError, SettingError, XAttnWarning
from tests.attribution.models import Concatenation, Fusion, TwoStreams, loader_of, said_data
from tests.capture.models import Fusing
from tests.messages import tells
from tests.toy import ToyModule, quiet_trainer, toy_loader

DATA, _ = said_data(40)


def look(module, **settings):
    """The callback after a validation."""
    watch = AttentionExplainabilityCallback(figures_every_n_epochs=0, **settings)
    quiet_trainer(callbacks=[watch]).validate(module, loader_of(DATA), verbose=False)
    return watch


def said_of(infos):
    return next(said for said in infos.messages if said.startswith("AttentionExplainabilityCallback: recording"))


class Renamed(TwoStreams):
    """A fusion whose arguments are called and passed otherwise."""

    def __init__(self, fusion, call):
        super().__init__(fusion)
        self.call = call

    def forward(self, left, right):
        return self.head(self.call(self.fusion, self.left(left), self.right(right)))


class ByNumbers(Fusion):
    def forward(self, first, second):
        return super().forward(first, second)


class OfDict(Fusion):
    def forward(self, tokens):
        return super().forward(tokens["left"], tokens["right"])


class OfPair(Fusion):
    def forward(self, pair, *, scale):
        return super().forward(*pair) * scale


class TokensFirst(Fusion):
    def forward(self, left, right):
        return super().forward(left.transpose(0, 1), right.transpose(0, 1))


class Nested(nn.Module):
    """The fusion inside of one that gets the same tokens: the nearest is taken."""

    def __init__(self):
        super().__init__()
        self.inner = Fusion()

    def forward(self, left, right):
        return self.inner(left, right)


@pytest.mark.parametrize(
    ("fusion", "call"),
    [
        (Fusion, lambda fusion, left, right: fusion(left, right)),
        (Fusion, lambda fusion, left, right: fusion(right=right, left=left)),
        (ByNumbers, lambda fusion, left, right: fusion(left, right)),
        (OfDict, lambda fusion, left, right: fusion({"left": left, "right": right})),
        (OfPair, lambda fusion, left, right: fusion((left, right), scale=2.0)),
        (TokensFirst, lambda fusion, left, right: fusion(left.transpose(0, 1), right.transpose(0, 1))),
        (Nested, lambda fusion, left, right: fusion(left, right)),
    ],
    ids=["position", "keyword", "numbers", "dict", "tuple", "tokens first", "nested"],
)
def test_encoders_are_found_whatever_the_fusion_gets(fusion, call, infos):
    torch.manual_seed(0)
    watch = look(Renamed(fusion(), call))
    assert "modalities: left = left, right = right; predictions: outputs['logits'] (4 classes)" in said_of(infos)
    summary = watch.fusion_summaries["val"]
    assert summary.modalities == ("left", "right")
    assert not summary.contribution_problem
    # The left tokens say the target; the features that are read are those of the left encoder.
    assert summary.estimate("right/left").mean > 0.9


class Alike(TwoStreams):
    """Both modalities have as many tokens."""

    def forward(self, one, other):
        return self.head(self.fusion(self.left(one), self.right(other)[:, :5]))


def test_modalities_of_equal_length_are_told_apart(infos):
    for fusion in (Fusion(), ByNumbers()):
        infos.clear()
        watch = look(Alike(fusion))
        assert "modalities: left = left, right = right" in said_of(infos)
        assert watch.fusion_summaries["val"].estimate("right/left").mean > 0.9


def test_modalities_get_the_names_that_the_settings_give(infos):
    watch = look(Alike(ByNumbers()), fusion="fusion", modalities={"sound": "first", "sight": 1})
    assert watch.fusion_summaries["val"].modalities == ("sound", "sight")
    assert "modalities: sound = first of fusion, sight = second of fusion" in said_of(infos)
    # One name a modality, also in the attention.
    assert "entropy/sound_to_sight/all" in watch.history[0]
    watch = look(Alike(), modalities={"sound": "left", "sight": "right"})
    assert watch.fusion_summaries["val"].modalities == ("sound", "sight")
    named = {"sound_to_sight": "fusion.left_to_right", "sight_to_sound": "fusion.right_to_left"}
    watch = look(Alike(), attention=named)
    assert watch.fusion_summaries["val"].modalities == ("sound", "sight")


def test_a_model_without_attention_needs_no_name(infos):
    for settings in ({}, {"fusion": "fusion", "modalities": {"left": 0, "right": 1}}):
        watch = look(TwoStreams(Concatenation()), **settings)
        summary = watch.fusion_summaries["val"]
        assert summary.estimate("right/left").mean > 0.9
        assert not summary.contribution_problem
        assert watch.summaries == {}
        assert watch.history[0]["probe/left"] == pytest.approx(summary.estimate("right/left").mean)


def test_a_named_fusion_that_does_not_run_gives_a_message():
    class Beside(TwoStreams):
        def __init__(self):
            super().__init__()
            self.idle = Concatenation()

    with pytest.warns(XAttnWarning, match="the fusion 'idle' was not seen in what gives the predictions") as warned:
        watch = look(Beside(), fusion="idle", modalities={"left": 0, "right": 1})
    assert sum("'idle'" in str(one.message) for one in warned) == 1
    assert not watch.fusion_summaries
    assert watch.summaries["val"].samples == 40


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"fusion": "fusion.none", "modalities": {"left": 0, "right": 1}}, ["fusion.none", "'fusion'"]),
        ({"modalities": {"left": "left", "right": "rigth"}}, ["'rigth'", "'left' (16, 5, 12)", "'right'"]),
        ({"fusion": "fusion", "modalities": {"left": 0, "right": "rigth"}}, ["'rigth'", "left", "(16, 7, 12)"]),
        ({"fusion": "fusion", "modalities": {"left": 0, "right": 5}}, ["5", "(16, 7, 12)"]),
    ],
)
def test_names_of_what_is_not_there(settings, facts):
    with pytest.raises(DiscoveryError, match=tells(*facts)):
        look(TwoStreams(Concatenation()), **settings)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"modalities": {"left": 0, "right": 1}}, ["fusion="]),
        ({"fusion": "f"}, ["modalities={'<a>': 0, '<b>': 1}"]),
        ({"fusion": "f", "modalities": {"left": 0}}, ["2 to 4"]),
        ({"fusion": "f", "modalities": {"left": 0, "right": 0}}, ["each once"]),
        ({"fusion": "f", "modalities": {"left/x": 0, "right": 1}}, ["no '/'"]),
        ({"fusion": "f", "modalities": {"left": 0.5, "right": 1}}, ["0.5"]),
        ({"fusion": "f", "modalities": {"interaction": 0, "right": 1}}, ["interaction", "emap_accuracy"]),
        ({"fusion": 3}, ["3"]),
        ({"contribution_samples": -1}, ["contribution_samples", "-1"]),
        ({"max_samples": 0}, ["max_samples", "0"]),
    ],
)
def test_settings_that_say_nothing(settings, facts):
    with pytest.raises(SettingError, match=tells(*facts)):
        AttentionExplainabilityCallback(**settings)


def test_a_named_fusion_that_runs_twice_in_a_step_is_refused():
    class Twice(TwoStreams):
        def forward(self, left, right):
            left, right = self.left(left), self.right(right)
            return self.head(self.fusion(left, right) + self.fusion(left.flip(1), right))

    settings = {"fusion": "fusion", "modalities": {"left": 0, "right": 1}}
    with pytest.raises(DiscoveryError, match="The fusion 'fusion' runs 2 times in a step"):
        look(Twice(Concatenation()), **settings)


class Twice(ToyModule):
    """Runs a second time in every other step."""

    def validation_step(self, batch, batch_idx):
        if batch_idx % 2:
            self(-3 * batch[0], batch[1])
        return super().validation_step(batch, batch_idx)


class Wrapped(Twice):
    """Its steps are run as Lightning runs those of a model that it has wrapped: in the place of its ``forward``."""

    def validation_step(self, batch, batch_idx):
        if self.is_wrapped:
            return super().validation_step(batch, batch_idx)
        self.is_wrapped = True
        try:
            return _ForwardRedirection()(Fusing(self), self, "validation_step", batch, batch_idx)
        finally:
            self.is_wrapped = False

    is_wrapped = False


@pytest.mark.filterwarnings("ignore:Module 'audio_to_text_attn' ran more often")
@pytest.mark.filterwarnings("ignore:Module 'text_to_audio_attn' ran more often")
def test_steps_that_run_as_the_models_forward():
    found = []
    for kind in (Twice, Wrapped):
        torch.manual_seed(0)
        watch = AttentionExplainabilityCallback(figures_every_n_epochs=0)
        quiet_trainer(callbacks=[watch]).validate(kind(), toy_loader(), verbose=False)
        found.append(watch.history[0])
    plain, wrapped = found
    assert wrapped["probed_samples"] == 23
    assert wrapped["contribution/audio"] == plain["contribution/audio"] != 0
    assert repr(wrapped) == repr(plain)
