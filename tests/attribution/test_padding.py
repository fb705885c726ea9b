"""Padding of modalities: masks go with their tokens, whatever their form and name, and what they hide is not read."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from tests.attribution.models import Concatenation, Fusion, TwoStreams, said_data, summary_of
from tests.toy import quiet_trainer

DATA, _ = said_data(80)


def padded_data():
    """Left tokens of which the hidden ones hold numbers that would drown the others."""
    left, *others = (one.clone() for one in DATA.tensors)
    for i in range(len(left)):
        left[i, 5 - i % 4 :] = torch.tensor([37.0 * (i % 7), -20.0 * (i % 3), -100.0])
    return TensorDataset(left, *others)


class Padded(TwoStreams):
    """Gives the mask of its left tokens to its fusion in a form and under a name."""

    def __init__(self, fusion, form, name):
        super().__init__(fusion)
        self.form, self.name = form, name

    def forward(self, left, right):
        mask = FORMS[self.form][0](left[..., 2] > -50)
        return self.head(self.fusion(self.left(left), self.right(right), **{self.name: mask}))


def added(real):
    return torch.where(real, 0.0, -1e4)


# What a mask of real tokens becomes, and how to read it.
FORMS = {
    "real": (lambda real: real, lambda given: given),
    "hidden": (lambda real: ~real, lambda given: ~given),
    "added": (added, lambda given: given >= 0),
    "shares": (lambda real: real.float(), lambda given: given > 0),
    "four axes": (lambda real: added(real)[:, None, None], lambda given: given[:, 0, 0] >= 0),
}
CASES = [
    *[(True, form, "left_padding_mask" if form == "hidden" else "left_mask") for form in FORMS],
    # With attention its key mask marks the padding, whatever the name says; without, the name is believed.
    (True, "hidden", "left_mask"),
    (True, "real", "left_padding_mask"),
    (False, "real", "left_mask"),
    (False, "hidden", "left_padding_mask"),
]


@pytest.mark.parametrize(("has_attention", "form", "name"), CASES)
def test_padding_is_not_read_and_masks_go_with_their_tokens(has_attention, form, name):
    """A mask of another sample would change the outputs."""

    class Masked(Fusion if has_attention else Concatenation):
        def forward(self, left, right, left_mask=None, left_padding_mask=None):
            real = FORMS[form][1](left_mask if left_padding_mask is None else left_padding_mask)
            if has_attention:
                return super().forward(left, right, left_mask=real)
            return super().forward(left * real[..., None], right)

    named = {} if has_attention else {"fusion": "fusion", "modalities": {"left": ("left", name), "right": 1}}
    torch.manual_seed(0)
    module = Padded(Masked(), form, name)
    for data in (padded_data(), DATA) if form in ("added", "four axes") else (padded_data(),):
        summary = summary_of(module, data, **named)
        assert summary.estimate("right/left").mean > 0.85
        assert summary.nonfinite == 0
        assert not summary.contribution_problem


class Also(Fusion):
    """Gets things beside the tokens that have a mask's shape."""

    def forward(self, left, right, left_positions=None, left_types=None, left_times=None):
        return super().forward(left, right)


def test_positions_types_and_times_are_no_mask():
    class Given(TwoStreams):
        def forward(self, left, right):
            values = {
                "left_positions": torch.arange(5).expand(len(left), 5),
                "left_types": torch.zeros(len(left), 5, dtype=torch.int64),
                "left_times": torch.linspace(-2.5, 2.5, 5).expand(len(left), 5),
            }
            return self.head(self.fusion(self.left(left), self.right(right), **values))

    torch.manual_seed(0)
    plain, given = TwoStreams(), Given(Also())
    given.load_state_dict(plain.state_dict())
    assert torch.equal(*(summary_of(one, DATA).numbers["conflict"] for one in (plain, given)))


def batches(masks):
    """Batches of ten samples, each with a mask for the left tokens or None."""
    left, right, target, _ = DATA.tensors
    cut = [slice(10 * i, 10 * i + 10) for i in range(len(masks))]
    made = [
        {"x": (left[one], right[one]), "y": target[one], "mask": mask} for one, mask in zip(cut, masks, strict=True)
    ]
    return DataLoader(made, batch_size=None)


class MaskedStreams(TwoStreams):
    """Gets the left mask as the batch has it, True for padding, also one for each head."""

    def __init__(self):
        super().__init__(EachMask())

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        left, right = batch["x"]
        scores = self.head(self.fusion(self.left(left), self.right(right), left_padding_mask=batch["mask"]))
        return {"logits": scores, "targets": batch["y"]}


class EachMask(Fusion):
    def forward(self, left, right, left_padding_mask=None):
        mask = left_padding_mask
        if mask is not None:
            mask = mask < 0 if mask.is_floating_point() else mask.bool()
            mask = ~mask.reshape(len(left), -1, left.shape[1]).all(1)
        return super().forward(left, right, left_mask=mask)


PADDING = torch.zeros(10, 5, dtype=torch.bool).index_fill_(1, torch.tensor([3, 4]), True)


@pytest.mark.parametrize(
    ("masks", "read", "facts"),
    [
        # One for each head from the second batch on.
        (
            [PADDING, PADDING[:, None].repeat(1, 3, 1), PADDING],
            20,
            ("a tensor of left is (10, 3, 5)", "another number of axes"),
        ),
        ([PADDING, None, PADDING], 20, ("no tensor in 'batch.mask'",)),
        # Given only where there is padding.
        ([None, PADDING, None], 20, ("'batch.mask'", "which the first step had not")),
        ([PADDING, torch.where(PADDING, -1e9, 0.0), PADDING.int()], 30, ()),
    ],
    ids=["of each head", "absent later", "absent first", "other types"],
)
def test_a_mask_that_changes_between_batches_ends_no_run_and_nothing_is_read_without_it(masks, read, facts, infos):
    model, watch = MaskedStreams(), AttentionExplainabilityCallback(figures_every_n_epochs=0)
    quiet_trainer(callbacks=[watch]).validate(model, batches(masks), verbose=False)
    assert watch.history[0]["samples"] == 10 * len(masks)
    assert watch.history[0]["probed_samples"] == read
    said = [one for one in infos.messages if "left out of a step" in one]
    assert len(said) == bool(facts)
    for fact in facts:
        assert fact in said[0]
