"""One name a modality: names of attention modules count only where nothing contradicts them."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.core.errors import XAttnWarning
from tests.toy import AUDIO, HEADS, TEXT, ToyModule, quiet_trainer, toy_data, toy_loader


class Flow(ToyModule):
    """``audio_to_text`` means here that information flows from audio: text asks."""

    def __init__(self):
        super().__init__()
        self.audio_proj, self.text_proj = self.audio, self.text
        del self.audio, self.text

    def forward(self, one, other):
        one, other = self.audio_proj(one), self.text_proj(other)
        there, _ = self.audio_to_text_attn(other, one, one)
        back, _ = self.text_to_audio_attn(one, other, other)
        return self.head(torch.cat([there.mean(1), back.mean(1)], dim=1))


def look(module, loader=None, **settings):
    watch = AttentionExplainabilityCallback(figures_every_n_epochs=0, **settings)
    quiet_trainer(callbacks=[watch]).validate(module, loader or toy_loader(), verbose=False)
    return watch


def test_a_name_that_says_where_information_flows_is_turned_round(infos):
    torch.manual_seed(0)
    module = Flow()
    with pytest.warns(XAttnWarning, match="the names of the attention modules contradict where queries come from"):
        watch = look(module)
    first = next(said for said in infos.messages if "recording" in said)
    assert "text_to_audio (7 text queries → 5 audio keys), audio_to_text (5 audio queries → 7 text keys)" in first
    assert "modalities: audio = audio_proj, text = text_proj" in first
    # By hand: the rows of 7 queries over 5 keys.
    audio, text, _ = toy_data().tensors
    with torch.no_grad():
        a, t = module.audio_proj(audio), module.text_proj(text)
        _, weights = module.audio_to_text_attn(t, a, a, average_attn_weights=False)
    assert weights.shape[1:] == (HEADS, TEXT, AUDIO)
    entropy = -(weights * weights.log()).sum(-1) / torch.tensor(float(AUDIO)).log()
    assert watch.history[0]["entropy/text_to_audio/all"] == pytest.approx(float(entropy.mean()), abs=1e-5)


def test_a_setting_is_right_whatever_the_modules_are_called(recwarn):
    named = {"audio_to_text": "audio_to_text_attn", "text_to_audio": "text_to_audio_attn"}
    watch = look(Flow(), attention=named)
    assert watch.fusion_summaries["val"].modalities == ("text", "audio")  # the first asks in "audio_to_text"
    assert not [one for one in recwarn if one.category is XAttnWarning]


def test_features_are_those_of_the_modality_that_has_the_name():
    """Audio alone tells the class."""
    audio, text, _ = toy_data(120).tensors
    target = torch.arange(120) % 3
    audio = audio + 4 * nn.functional.one_hot(target, 3)[:, None]
    loader = torch.utils.data.DataLoader(TensorDataset(audio, text, target), batch_size=20)
    with pytest.warns(XAttnWarning, match="contradict"):
        watch = look(Flow(), loader)
    assert watch.history[0]["probe/audio"] > 0.9
    assert watch.history[0]["probe/text"] < 0.6
