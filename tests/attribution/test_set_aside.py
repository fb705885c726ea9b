"""Attention that is set aside: ``attention={}`` records none, and the modalities of a named fusion are told."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback, AttentionRecorder, ExplainabilityCapture
from lightning_xattn.core.errors import DiscoveryError, SettingError, ShapeError, XAttnWarning
from tests.attribution.models import NAMED, Concatenation, TwoStreams, loader_of
from tests.attribution.test_inputs import DATA
from tests.messages import tells
from tests.toy import HEADS, WIDTH, count_hooks, quiet_trainer

ASIDE = {"attention": {}, **NAMED}
SAID = "attention={}, fusion='path.to.module', modalities={'<a>': 0, '<b>': 1}"


def predict(model, batch):
    return model(*batch[:2])


class Jagged(nn.Module):
    """Attention in both directions that cannot be read."""

    def forward(self, left, right):
        there, back = self.attend(left, right), self.attend(right, left)
        return torch.cat([left.mean(1) + there, right.mean(1) + back], dim=1)

    def attend(self, queries, keys):
        """Mean over the queries, ``(batch, width)``."""
        offsets = [torch.arange(len(x) + 1) * x.shape[1] for x in (queries, keys)]
        q, k = (
            torch.nested.nested_tensor_from_jagged(x.reshape(-1, HEADS, WIDTH // HEADS), starts).transpose(1, 2)
            for x, starts in zip((queries, keys), offsets, strict=True)
        )
        attended = F.scaled_dot_product_attention(q, k, k).transpose(1, 2).values()
        return attended.reshape(*queries.shape).mean(1)


class Folded(Jagged):
    """Attention whose axes are in doubt."""

    def attend(self, queries, keys):
        weights = (queries.repeat(2, 1, 1) @ keys.repeat(2, 1, 1).mT).softmax(-1)
        return (weights @ keys.repeat(2, 1, 1)).mean(1)[: len(queries)]


class Ambiguous(Jagged):
    """Two sequences of as many tokens attend in one direction."""

    def forward(self, left, right):
        there = F.scaled_dot_product_attention(left[:, None], left.flip(-1)[:, None], left[:, None])
        return torch.cat([left.mean(1) + there[:, 0].mean(1), right.mean(1)], dim=1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize(
    ("fusion", "fact"), [(Jagged, "nested tensor"), (Folded, "in doubt"), (Ambiguous, "It is ambiguous")]
)
def test_what_cannot_be_used_names_the_way_out_and_is_set_aside(fusion, fact):
    torch.manual_seed(0)
    model = TwoStreams(fusion()).eval()

    def callback(**settings):
        watch = AttentionExplainabilityCallback(**settings)
        quiet_trainer(callbacks=[watch]).validate(model, loader_of(DATA), verbose=False)
        return watch

    def explain(**settings):
        explainer = ExplainabilityCapture(model, predict=predict, **settings)
        return explainer.explain_loader(loader_of(DATA), progress=False)

    with pytest.raises((DiscoveryError, ShapeError), match=fact) as raised:
        explain()
    assert SAID in str(raised.value)
    with pytest.warns(XAttnWarning, match=f"Nothing is recorded in this run.*{fact}") as warned:
        assert callback().history == []
    assert any(SAID in str(one.message) for one in warned)
    with pytest.warns(XAttnWarning, match=f"The attention is left out, and the rest is recorded.*{fact}"):
        assert "accuracy" in callback(**(ASIDE | {"attention": None})).history[0]
    (record,) = callback(**ASIDE).history
    assert record["layer"] is None
    assert record["probed_samples"] == len(DATA)
    right = model(*DATA.tensors[:2]).argmax(1) == DATA.tensors[2]
    assert record["accuracy"] == pytest.approx(float(right.float().mean()))
    assert 0 <= record["contribution/share/left"] <= 1
    explained = explain(**ASIDE)
    assert explained.summaries == {}
    assert explained.fusion.samples == len(DATA)


def test_labels_are_in_what_forward_gives_in_every_step():
    """Also where the step returns nothing, and the model turns out to have no attention in the first one."""

    class Silent(TwoStreams):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    torch.manual_seed(0)
    model = Silent(Concatenation())
    right = model(*DATA.tensors[:2]).argmax(1) == DATA.tensors[2]
    for settings in (ASIDE, NAMED):
        watch = AttentionExplainabilityCallback(contribution_samples=0, **settings)
        quiet_trainer(callbacks=[watch]).validate(model, loader_of(DATA), verbose=False)
        assert watch.history[0]["accuracy"] == pytest.approx(float(right.float().mean()))
        assert count_hooks(model) == 0


def test_nothing_is_recorded_and_a_batch_has_nothing_to_explain():
    model = TwoStreams()
    with AttentionRecorder(model, {}) as recorder:
        model(*DATA.tensors[:2])
    assert recorder.attention == ()
    with pytest.raises(DiscoveryError, match=tells("none is recorded", "attention={}", "explain_loader")):
        ExplainabilityCapture(model, predict=predict, **ASIDE).explain_batch(DATA[:5])
    for face in (AttentionExplainabilityCallback, lambda **settings: ExplainabilityCapture(model, **settings)):
        with pytest.raises(SettingError, match=tells("nothing would be", SAID, "fusion=None")):
            face(attention={})
