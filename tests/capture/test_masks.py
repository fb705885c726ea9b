"""Where a number is a mask and where it is a score: on either side of every boundary that the README states."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn import AttentionRecorder
from lightning_xattn.capture.masks import is_visible, seen_by_softmax

BATCH, HEADS, QUERIES, KEYS = 2, 3, 5, 7


@pytest.mark.parametrize(("value", "hides"), [(-100.0, False), (-999.0, False), (-1000.0, True), (-torch.inf, True)])
def test_a_float_mask_hides_from_a_thousand_on(value, hides):
    mask = torch.zeros(QUERIES, KEYS)
    mask[:, 4] = value
    assert is_visible(mask)[:, 4].tolist() == [not hides] * QUERIES
    assert is_visible(mask)[:, :4].all()


class Biased(nn.Module):
    """Attention with a float mask, by torch's own module or by its kernel."""

    def __init__(self, kernel, mask):
        super().__init__()
        self.kernel, self.mask = kernel, mask
        self.a_to_b = nn.MultiheadAttention(12, HEADS, batch_first=True)

    def forward(self, a, b):
        if self.kernel:
            return self._by_kernel(a, b)
        return self.a_to_b(a, b, b, attn_mask=self.mask, need_weights=False)[0]

    def _by_kernel(self, a, b):
        split = [x.unflatten(-1, (HEADS, 4)).transpose(1, 2) for x in (a, b)]
        return F.scaled_dot_product_attention(split[0], split[1], split[1], attn_mask=self.mask)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize(("value", "hides"), [(-100.0, False), (-999.0, False), (-1000.0, True)])
def test_a_key_with_a_bias_of_minus_a_hundred_is_still_seen(kernel, value, hides):
    """As of distances or of relative positions: its weight is small, and it counts as a key."""
    mask = torch.zeros(QUERIES, KEYS)
    mask[:, 4] = value
    model = nn.ModuleDict({"fusion": Biased(kernel, mask)}).eval()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(BATCH, QUERIES, 12, generator=generator), torch.randn(BATCH, KEYS, 12, generator=generator)
    attention = {"a_to_b": "fusion" if kernel else "fusion.a_to_b"}
    with torch.no_grad(), AttentionRecorder(model, attention) as recorder:
        model["fusion"](a, b)
    hidden = recorder.attention[0].forward.marked_weights.isnan()
    assert hidden[..., 4].unique().tolist() == [hides]
    assert not hidden[..., [0, 1, 2, 3, 5, 6]].any()


def of_scores(scores):
    scores = torch.tensor([[[scores]]])
    return seen_by_softmax(scores, scores.softmax(-1))[0, 0, 0].tolist()


@pytest.mark.parametrize(("below", "hidden"), [(90.0, False), (499.0, False), (500.0, True), (10_000.0, True)])
def test_a_key_without_weight_is_hidden_where_no_score_could_be_as_far_below(below, hidden):
    assert of_scores([3.0, 1.0, 3.0 - below]) == [True, True, not hidden]


# Within 500 of -10,000, and from -30,000 on.
SCORES, MASKS = (-499.0, -9499.0, -10_501.0, -29_999.0), (-9501.0, -10_499.0, -30_000.0, -65_504.0)


@pytest.mark.parametrize(("largest", "hidden"), [*((x, False) for x in SCORES), *((x, True) for x in MASKS)])
def test_a_row_is_hidden_where_its_largest_score_is_a_masks(largest, hidden):
    assert of_scores([largest, largest - 1.0, largest - 2.0]) == [not hidden] * 3
