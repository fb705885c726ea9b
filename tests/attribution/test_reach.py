"""Inputs that go other ways than by the modules that are named: permuted at the inputs, as by brute force."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback
from tests.attribution.test_modalities import SAMPLES, Base, Batches, brute_force, by_position, data_of, of_all_partners
from tests.toy import quiet_trainer

ENCODERS = {"left": "left_encoder", "right": "right_encoder"}
ARGUMENTS = {"left": "left", "right": "right"}


class Fusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(16, 8)

    def forward(self, left, right):
        return torch.tanh(2 * self.mix(torch.cat([left, right], 1)))


class Fused(Base):
    def __init__(self):
        super().__init__()
        self.fusion, self.more = Fusion(), nn.Linear(8, 8)

    def fuse(self, left, right):
        return 3 * self.out(self.fusion(left, right))


class Stacked(Fused):
    """The left features are mixed with the right ones before the fusion."""

    def fuse(self, left, right):
        return super().fuse(left + torch.tanh(self.more(right)), right)


class Residual(Fused):
    """All features reach the head past the fusion."""

    def fuse(self, left, right):
        return 3 * self.out(self.fusion(left, right) + left - right)


class Skip(Fused):
    """The left input reaches the scores past its encoder, by a small weight."""

    size = 1.0

    def forward(self, left, right, age):
        return super().forward(left, right, age) + self.size * left[:, :3]


class SmallSkip(Skip):
    size = 0.03


class FiLM(Fused):
    """The right input scales the left features."""

    def forward(self, left, right, age):
        return self.fuse(self.left_encoder(left) * (1 + right.mean(1, keepdim=True)), self.right_encoder(right))


class Conditioned(Fused):
    """The left encoder gets the right input, too."""

    def __init__(self):
        super().__init__()
        self.left_encoder = Condition()

    def forward(self, left, right, age):
        return self.fuse(self.left_encoder(left, right), self.right_encoder(right))


class Condition(nn.Linear):
    def __init__(self):
        super().__init__(4, 8)

    def forward(self, left, right):
        return super().forward(left) * (1 + right.sum(1, keepdim=True))


class Twice(Fused):
    """Two fusions in sequence."""

    def fuse(self, left, right):
        both = torch.tanh(self.more(self.fusion(left, right)))
        return 3 * self.out(self.mix(torch.cat([left + both, right * both], 1)))


class ByAttribute(Fused):
    """The left encoder leaves something for the head in an attribute."""

    def __init__(self):
        super().__init__()
        self.left_encoder = Leaving()

    def forward(self, left, right, age):
        return super().forward(left, right, age) + self.left_encoder.left_over


class Leaving(nn.Linear):
    def __init__(self):
        super().__init__(4, 8)

    def forward(self, left):
        self.left_over = 2 * left[:, :3]
        return super().forward(left)


def look(model, **settings):
    """The summary of a validation in which each sample had all partners."""
    callback = AttentionExplainabilityCallback(contribution_samples=SAMPLES, figures_every_n_epochs=0, **settings)
    loader = Batches(data_of(), by_position).loader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_xattn.evaluation.evaluation.compute_contributions", of_all_partners)
        quiet_trainer(callbacks=[callback]).validate(model, loader, verbose=False)
    summary = callback.fusion_summaries["val"]
    assert not summary.contribution_problem
    return summary


def held_against_brute_force(model, summary):
    tensors = data_of()
    expected = brute_force(model, tensors[:2], tensors[2:3])
    assert expected.abs().mean() > 0.02  # agreement is not between zeros
    found = torch.stack([summary.numbers[f"phi/{modality}"] for modality in ("left", "right")], 1)
    torch.testing.assert_close(found[summary.sample_numbers.argsort()], expected.double(), atol=1e-5, rtol=1e-4)


WAYS = [
    pytest.param(Fused, False, "", id="clean"),
    pytest.param(Fused, True, "", id="clean fusion"),
    pytest.param(Stacked, False, "", id="stacked"),
    pytest.param(Stacked, True, "right also reaches left", id="stacked fusion"),
    pytest.param(Residual, True, "left also reaches the prediction past left and right also", id="residual"),
    pytest.param(Skip, False, "left also reaches the prediction past left", id="skip"),
    pytest.param(SmallSkip, True, "left also reaches the prediction past left", id="small skip"),
    pytest.param(FiLM, True, "right also reaches left", id="film"),
    pytest.param(Conditioned, False, "right also reaches left", id="conditioned encoder"),
    pytest.param(Twice, True, "left also reaches the prediction past left and right also", id="two fusions"),
    pytest.param(ByAttribute, False, "left also reaches the prediction past left", id="by attribute"),
]


@pytest.mark.parametrize(("kind", "by_fusion", "said"), WAYS)
def test_named_modalities_are_permuted_where_all_of_them_is(kind, by_fusion, said, infos):
    torch.manual_seed(0)
    model = kind().eval()
    settings = {"fusion": "fusion", "modalities": ARGUMENTS} if by_fusion else {"modalities": ENCODERS}
    summary = look(model, **settings)
    held_against_brute_force(model, summary)
    permuted = "so modalities are permuted at the model's inputs: left = left, right = right."
    assert any(said in one and permuted in one for one in infos.messages) == bool(said)
    assert any("(permuted: left)" in one for one in infos.messages) == bool(said)


def test_probes_get_the_features_that_are_named_wherever_modalities_are_permuted():
    accuracies = []
    for kind in (Fused, Skip):
        torch.manual_seed(0)
        summary = look(kind().eval(), modalities=ENCODERS)
        accuracies.append([summary.estimate(f"right/{name}").mean for name in summary.modalities])
    assert accuracies[0] == accuracies[1]


class OneInput(Fused):
    """One tensor holds both modalities."""

    def forward(self, both):
        return self.fuse(self.left_encoder(both[:, :4]), self.right_encoder(both[:, 4:]))

    def validation_step(self, batch, batch_idx):
        left, right, _, y = batch
        self.log("val_loss", F.cross_entropy(self(torch.cat([left, right], 1)), y))


def test_one_input_that_holds_both_is_no_finding(infos):
    torch.manual_seed(0)
    model = OneInput().eval()
    summary = look(model, modalities=ENCODERS)
    left, right, _, _ = data_of()
    expected = brute_force(lambda *streams: model(torch.cat(streams, 1)), (left, right))
    found = torch.stack([summary.numbers[f"phi/{modality}"] for modality in ("left", "right")], 1)
    torch.testing.assert_close(found[summary.sample_numbers.argsort()], expected.double(), atol=1e-5, rtol=1e-4)
    assert not any("also reaches" in one for one in infos.messages)


class MixedFirst(Fused):
    """What enters the fusion holds both inputs, on either side."""

    def fuse(self, left, right):
        both = torch.tanh(self.more(left + right))
        return super().fuse(left + both, right + both)


def test_the_user_is_told_of_features_that_mix_all_inputs(infos):
    torch.manual_seed(0)
    summary = look(MixedFirst().eval(), fusion="fusion", modalities=ARGUMENTS)
    said = "left and right each reach left and right: these are contributions of the features that are named."
    assert said in infos.messages
    assert summary.modalities == ("left", "right")
