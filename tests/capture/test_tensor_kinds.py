"""Tensors that are not what their numbers say, and kernels whose masks are functions: asked, or refused by kind."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.capture.events import Edit
from lightning_xattn.capture.readers import find_reader
from lightning_xattn.capture.tensors import Address, are_same, has_address, is_plain, unreadable_kind
from lightning_xattn.core.errors import DiscoveryError, ShapeError
from lightning_xattn.functional import prepare_rows
from tests import reference
from tests.capture.models import BATCH, Fusing, Runs, assert_same, heads, mha, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT

bias = pytest.importorskip("torch.nn.attention.bias")
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")


@pytest.fixture(scope="module")
def flex():
    """Imported here, as it imports the compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torch.nn.attention.flex_attention")


class Own(Tensor):
    """Hides the last three keys wherever it is the mask or the query of the kernel, whatever its numbers are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return super().__torch_function__(function, types, args, kwargs)
        call = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        call["query"] = call["query"].as_subclass(Tensor)
        return function(
            **call | {"query": Tensor(call["query"]), "attn_mask": (torch.arange(TEXT) < 4).expand(AUDIO, TEXT)}
        )


class Tagged(Tensor):
    """Without functions of its own."""


def watched(attend, runs=1):
    """What is recorded of a kernel over the heads of audio and text; the model's output must stay as it is."""
    model = Fusing(Runs(lambda m, x, y: attend(heads(x), heads(y))))
    recorder = AttentionRecorder(model, {"a_to_b": "fusion"})
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(*tokens())
        for _ in range(runs):
            with recorder:
                assert_same(model(*tokens()), expected)
                pairs = recorder.attention
    return pairs[0].forward


def assert_is(attention, **computed):
    """Weights and keys in sight are those of the loops, and no row is broken."""
    query, key = (heads(x).numpy() for x in tokens())
    weights, visible = reference.attention(query, key, **computed)
    seen = torch.ones(attention.weights.shape, dtype=torch.bool)
    for mask in (attention.visible, None if attention.key_mask is None else attention.key_mask[:, None, None]):
        seen = seen if mask is None else seen & mask
    assert seen.tolist() == visible.tolist()
    some = torch.as_tensor(visible.any(-1))
    torch.testing.assert_close(
        attention.weights[some].double(), torch.as_tensor(weights)[some], atol=1e-6, rtol=1e-5, check_dtype=False
    )
    assert not prepare_rows(attention).broken.any()


def test_the_causal_bias_of_torch_is_what_the_kernel_makes_of_it():
    """Its numbers are whatever was in memory."""
    shift = TEXT - AUDIO
    for make, mask in (
        (bias.causal_upper_left, lambda b, h, m, n: n <= m),
        (bias.causal_lower_right, lambda b, h, m, n: n <= m + shift),
    ):
        found = watched(lambda q, k, make=make: F.scaled_dot_product_attention(q, k, k, make(AUDIO, TEXT)), runs=2)
        assert_is(found, mask=mask)


def test_the_functions_of_a_subclass_are_asked_whether_it_is_a_mask_or_tokens():
    noise = torch.randn(AUDIO, TEXT)
    for attend in (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, attn_mask=noise.as_subclass(Own), scale=0.7),
        lambda q, k: F.scaled_dot_product_attention(q.as_subclass(Own), k, k, scale=0.7),
    ):
        assert_is(watched(attend), scale=0.7, mask=lambda b, h, m, n: n < 4)


def test_dropout_is_off_when_a_subclass_is_asked_and_no_random_number_is_drawn():
    def attend(q, k):
        torch.manual_seed(1)
        F.scaled_dot_product_attention(q, k, k, bias.causal_upper_left(AUDIO, TEXT), 0.5)
        return torch.rand(3)

    assert_is(watched(attend), mask=lambda b, h, m, n: n <= m)


def test_a_subclass_without_functions_of_its_own_and_a_parameter_are_read_as_they_stand():
    added = nn.Parameter(torch.linspace(-2, 2, AUDIO * TEXT).view(AUDIO, TEXT))
    for cast in (lambda x: x, lambda x: x.as_subclass(Tagged)):
        found = watched(lambda q, k, cast=cast: F.scaled_dot_product_attention(cast(q), cast(k), k, cast(added)))
        assert_is(found, score=lambda s, b, h, m, n: s + added[m, n].item())
        found = watched(lambda q, k, cast=cast: cast(q @ k.mT * 0.5).softmax(-1) @ k)
        assert type(found.weights) is Tensor
        assert_is(found)


def test_nan_in_a_mask_breaks_a_row_and_does_not_hide_it():
    mask = torch.zeros(AUDIO, TEXT)
    mask[2] = torch.nan
    by_kernel = watched(lambda q, k: F.scaled_dot_product_attention(q, k, k, mask))
    attend = mha()
    model = Fusing(Runs(lambda m, x, y: attend(x, y, y, attn_mask=mask)))
    with AttentionRecorder(model, {"a_to_b": "fusion"}) as recorder:
        model(*tokens())
    for found in (by_kernel, recorder.attention[0].forward):
        assert prepare_rows(found).broken.any((0, 1)).tolist() == [False, False, True, False, False]


SCORES = {
    "none": None,
    "soft cap": lambda s, b, h, m, n: 2 * torch.tanh(torch.as_tensor(s) / 2),
    "by distance": lambda s, b, h, m, n: s - 90 * abs(m - n),
    "hides": lambda s, b, h, m, n: torch.where(torch.as_tensor(n) < 4, torch.as_tensor(s), -math.inf),
}
MASKS = {
    "none": (None, None),
    "causal": (lambda b, h, m, n: m >= n, None),
    "by sample": (lambda b, h, m, n: n < 4 + 2 * b, BATCH),
    "by head": (lambda b, h, m, n: (n + h) % 3 > 0, None),
    "hides a row": (lambda b, h, m, n: (m != 2) & (n != 1), None),
}


@pytest.mark.parametrize(
    ("score", "mask"),
    [(score, "by sample") for score in SCORES] + [("none", mask) for mask in MASKS] + [("hides", "hides a row")],
)
def test_flex_attention_is_asked_for_its_weights(flex, score, mask):
    mask_mod, batch = MASKS[mask]
    of_heads = HEADS if mask == "by head" else None
    blocks = mask_mod and flex.create_block_mask(mask_mod, batch, of_heads, AUDIO, TEXT, device="cpu")
    found = watched(lambda q, k: flex.flex_attention(q, k, k, SCORES[score], blocks))
    hides = (lambda b, h, m, n: n < 4) if score == "hides" else None
    both = [one for one in (mask_mod, hides) if one is not None]
    seen = (lambda b, h, m, n: all(one(b, h, m, n) for one in both)) if both else None
    assert_is(found, score=None if score == "hides" else SCORES[score], mask=seen)


def test_flex_attention_in_its_other_forms(flex):
    """Groups of heads, a scale, more outputs, other precisions, one sample of keys for all."""
    attend = flex.flex_attention
    found = watched(
        lambda q, k: attend(q, k[:, :1], k[:, :1], scale=0.9, enable_gqa=True, kernel_options={"BLOCK_M": 16})
    )
    assert_is(found, scale=0.9, group=HEADS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert_is(watched(lambda q, k: attend(q, k, k, return_lse=True)))
    assert_is(watched(lambda q, k: attend(q.double(), k.double(), k.double())))
    rounded = watched(lambda q, k: attend(q.bfloat16(), k.bfloat16(), k.bfloat16()))
    assert rounded.weights.dtype == torch.float32, "weights are not rounded as the tokens are"
    torch.testing.assert_close(rounded.weights, watched(lambda q, k: attend(q, k, k)).weights, atol=2e-2, rtol=0)
    assert_is(watched(torch.compile(lambda q, k: attend(q, k, k), backend="eager")))
    of_one = watched(lambda q, k: F.scaled_dot_product_attention(q, k[:1], k[:1]))
    blocks = flex.create_block_mask(lambda b, h, m, n: m >= 0, BATCH, None, AUDIO, TEXT, device="cpu")
    torch.testing.assert_close(
        watched(lambda q, k: attend(q, k[:1], k[:1], block_mask=blocks)).weights, of_one.weights, atol=1e-6, rtol=1e-5
    )


def test_few_queries_of_many_keys_are_asked_for_in_parts(flex):
    wide = torch.randn(BATCH, HEADS, 23, 4)
    found = watched(lambda q, k: flex.flex_attention(q[:, :, :2], wide, wide))
    torch.testing.assert_close(found.weights, (heads(tokens()[0])[:, :, :2] @ wide.mT / 2).softmax(-1))


def test_queries_or_keys_that_are_the_same_for_all_samples_have_the_shape_of_the_others():
    for attend in (
        lambda q, k: F.scaled_dot_product_attention(q[:1], k, k, (torch.arange(TEXT) < 4).expand(BATCH, 1, 1, -1)),
        lambda q, k: F.scaled_dot_product_attention(q, k[:1], k[:1], (torch.arange(TEXT) < 4).expand(AUDIO, -1)),
    ):
        found = watched(attend, runs=2)
        assert found.weights.shape == (BATCH, HEADS, AUDIO, TEXT)
        assert found.key_mask.tolist() == [[True] * 4 + [False] * 3] * BATCH


class Edits(torch.overrides.TorchFunctionMode):
    """Other keys and values, and weights that are multiplied after the softmax."""

    scales = torch.rand(BATCH, TEXT)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        reader = find_reader(function)
        return function(*args, **kwargs or {}) if reader is None else reader(function, args, kwargs or {}, self)

    def begin(self, event, asks):
        return Edit(lambda keys, values: (keys.flip(0), values.flip(0, -1)), self.scales)

    def record(self, event, read=None, given=None):
        pass


@pytest.mark.parametrize("samples", [BATCH, 1])
def test_keys_and_weights_of_flex_attention_are_edited_as_those_of_the_kernel(flex, samples):
    """Also where all samples share their keys: each has its own then."""
    query, key = (heads(x) for x in tokens())
    shared, spread = key[:samples], key[:samples].expand(BATCH, -1, -1, -1)
    weights = (query @ spread.flip(0).mT / 2).softmax(-1) * Edits.scales[:, None, None]
    blocks = flex.create_block_mask(lambda b, h, m, n: m >= 0, BATCH, None, AUDIO, TEXT, device="cpu")
    with torch.compiler.set_stance("force_eager"), Edits():
        by_kernel = F.scaled_dot_product_attention(query, shared, shared)
        by_flex = flex.flex_attention(query, shared, shared, block_mask=blocks)
    expected = weights @ spread.flip(0, -1)
    torch.testing.assert_close(by_kernel, expected)
    torch.testing.assert_close(by_flex, expected)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_kinds_that_hold_no_numbers_of_their_own():
    whole = torch.rand(2, 3)
    for tensor in (whole, whole.as_subclass(Tagged), whole.as_subclass(Own), nn.Parameter(whole)):
        assert unreadable_kind(tensor) is None
        assert is_plain(tensor) == (type(tensor) is not Own)
    for tensor, kind in (
        (torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8), "a tensor of torch.qint8 on device cpu"),
        (whole.to_sparse(), "a tensor of layout torch.sparse_coo"),
        (whole.to("meta"), "a tensor of torch.float32 on device meta"),
    ):
        assert unreadable_kind(tensor) == kind
        assert not is_plain(tensor)
        assert not has_address(tensor)


def jagged(q, k):
    q, k = (
        torch.nested.nested_tensor(
            [one[:, :n].transpose(0, 1) for one, n in zip(x, (3, 4), strict=True)], layout=torch.jagged
        )
        for x in (q, k)
    )
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, k)))


def masked(q, k):
    from torch.masked import masked_tensor

    scores = q @ k.mT
    return torch.softmax(masked_tensor(scores, torch.ones_like(scores, dtype=torch.bool)), -1).to_tensor(0.0)


def fake(q, k):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        return F.scaled_dot_product_attention(*map(mode.from_tensor, (q, k, k)))


def by_class(q, k):
    class Refuses(Own):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention and (kwargs or {}).get("dropout_p") == 0.0:
                raise ValueError("not like this")
            return super().__torch_function__(function, types, args, kwargs)

    return F.scaled_dot_product_attention(q, k, k, torch.zeros(AUDIO, TEXT).as_subclass(Refuses))


@pytest.mark.filterwarnings("ignore:The PyTorch API of (nested|MaskedTensors)")
@pytest.mark.parametrize(
    ("attend", "facts"),
    [
        (jagged, ((2, 3, 4, 4), "scaled_dot_product_attention", "its query is a nested tensor (torch.jagged)")),
        (masked, ("softmax", "its scores are a MaskedTensor")),
        (fake, ("its query is a FakeTensor",)),
        (lambda q, k: (q @ k.mT).to("meta").softmax(-1), ("device meta",)),
        (lambda q, k: torch.vmap(F.scaled_dot_product_attention)(q, k, k), ("inside of torch.vmap",)),
        (lambda q, k: torch.vmap(lambda one, other: (one @ other.mT).softmax(-1))(q, k), ("inside of torch.vmap",)),
        (
            lambda q, k: F.scaled_dot_product_attention(*(x[:, None] for x in (q, k, k))),
            ("has other axes than (batch,",),
        ),
        (by_class, ("asked for its weights, it fails (not like this)",)),
        (lambda q, k: (q @ k.mT).as_subclass(Own).softmax(-1), ("its scores are a Own",)),
    ],
    ids=["jagged", "masked", "fake", "meta", "vmap", "vmap of a softmax", "five axes", "a class", "scores"],
)
# torch 2.14 warns of kernels inside of vmap.
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_what_cannot_be_read_is_refused_by_its_kind(attend, facts):
    model = Fusing(Runs(lambda m, x, y: (attend(heads(x), heads(y)), None)[1]))
    with torch.no_grad(), pytest.raises(DiscoveryError, match=tells("'fusion'", "cannot be read", *facts)):  # noqa: PT012
        with AttentionRecorder(model, {"a_to_b": "fusion"}) as recorder:
            model(*tokens())
        _ = recorder.attention


def test_returned_weights_and_masks_that_are_not_what_their_numbers_say_are_not_taken():
    weights = torch.full((BATCH, HEADS, AUDIO, TEXT), 1 / TEXT)
    for attention, facts in (
        ({"a_to_b": "fusion[1]"}, ("'fusion[1]'", "a Own", "weights.as_subclass(torch.Tensor)")),
        ({"a_to_b": "fusion"}, ("'fusion'", "none of these is weights")),
        (
            {"a_to_b": lambda model: weights.as_subclass(Own)},
            ("callable", "a Own", "weights.as_subclass(torch.Tensor)"),
        ),
    ):
        model = Fusing(Runs(lambda m, x, y: (x, weights.as_subclass(Own))))
        with pytest.raises((DiscoveryError, ShapeError), match=tells(*facts)):  # noqa: PT012
            with AttentionRecorder(model, attention) as recorder:
                model(*tokens())
            _ = recorder.attention


def test_a_mask_of_an_unknown_class_for_multihead_attention_is_refused_and_its_tokens_are_asked():
    attend, mask = mha(), torch.zeros(AUDIO, TEXT).as_subclass(Own)
    model = Fusing(Runs(lambda m, x, y: attend(x, y, y, attn_mask=mask)[0]))
    with pytest.raises(DiscoveryError, match=tells("'fusion'", "its attn_mask is a Own")):  # noqa: PT012
        with AttentionRecorder(model, {"a_to_b": "fusion"}) as recorder:
            model(*tokens())
        _ = recorder.attention
    truth = attend(*tokens(), tokens()[1], average_attn_weights=False)[1]
    for need in (True, False):
        model.fusion.run = lambda m, x, y, need=need: attend(x.as_subclass(Own), y, y, need_weights=need)[0]
        with AttentionRecorder(model, {"a_to_b": "fusion"}) as recorder:
            model(*tokens())
        torch.testing.assert_close(recorder.attention[0].forward.weights, truth)


def test_views_of_all_of_a_tensor_are_the_same():
    tensor = torch.rand(5, 7)
    place = Address.of(tensor)
    for same in (tensor, tensor.detach(), tensor[:], tensor.view(5, 7)):
        assert place.holds(same)
        assert are_same(tensor, same)
    for other in (tensor.clone(), tensor[:3], tensor.mT, tensor.view(torch.int32), tensor.view(7, 5)):
        assert not place.holds(other)
        assert not are_same(tensor, other)


def test_what_stands_later_at_the_same_address_is_another_tensor():
    memory = np.zeros((5, 7), dtype=np.float32)
    first = torch.from_numpy(memory)
    place, address = Address.of(first), first.data_ptr()
    view = first.detach()
    del first
    assert place.holds(view)  # as long as any tensor has these numbers
    del view
    second = torch.from_numpy(memory)
    assert second.data_ptr() == address
    assert not place.holds(second)


def test_nested_tensors_are_the_same_as_themselves_only():
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    assert are_same(nested, nested)
    assert not are_same(nested, nested.detach())
