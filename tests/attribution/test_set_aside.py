"""Attention that is set aside: ``attention={}`` records none, and the modalities of a named fusion are told."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback, AttentionRecorder, ExplainabilityCapture
from lightning_xattn.core.errors import DiscoveryError, ShapeError, XAttnWarning
from tests.attribution.models import NAMED, Concatenation, TwoStreams, loader_of
from tests.attribution.test_inputs import DATA
from tests.messages import tells
from tests.toy import HEADS, WIDTH, count_hooks, quiet_trainer

ASIDE = {"attention": {}, **NAMED}
SAID = "Or record no attention, but the rest: attention={}."


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
        watch = AttentionExplainabilityCallback(figures_every_n_epochs=0, **settings)
        quiet_trainer(callbacks=[watch]).validate(model, loader_of(DATA), verbose=False)
        return watch

    def explain(**settings):
        return ExplainabilityCapture(model, predict=predict, **settings)

    right = model(*DATA.tensors[:2]).argmax(1) == DATA.tensors[2]
    with pytest.warns(XAttnWarning, match=f"The attention is left out, and the rest is recorded.*{fact}"):
        watched = callback()
    with pytest.warns(XAttnWarning, match=f"The attention is left out, and the rest is recorded.*{fact}"):
        explained = explain().explain_loader(loader_of(DATA), progress=False)
    assert (len(explained.summaries), explained.fusion.samples) == (0, len(DATA))
    for watch in (watched, callback(**ASIDE), callback(attention={})):
        (record,) = watch.history
        assert record["layer"] is None
        assert record["probed_samples"] == len(DATA)
        assert record["accuracy"] == pytest.approx(float(right.float().mean()))
        assert 0 <= record["contribution/share/left"] <= 1
    with pytest.raises((DiscoveryError, ShapeError), match=fact) as raised:
        explain().explain_batch(DATA[:5])
    assert SAID in str(raised.value)


def test_labels_are_in_what_forward_gives_in_every_step():
    """Also where the step returns nothing, and the model turns out to have no attention in the first one."""

    class Silent(TwoStreams):
        def validation_step(self, batch, batch_idx):
            found = super().validation_step(batch, batch_idx)
            self.log("loss", F.cross_entropy(found["logits"], found["targets"]))

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
