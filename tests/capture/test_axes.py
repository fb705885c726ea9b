"""What the axes of weights are, as far as the tokens show that a module got: else they are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DiscoveryError, ShapeError, XAttnWarning
from tests.capture.models import BATCH, Fusing, Runs, folded, heads, record_fusion, softmax, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH

ITEM, WHOLE = {"a_to_b": "fusion[1]"}, {"a_to_b": "fusion"}
AXES = "(batch, heads, queries, keys)"


def by_hand(module, x, y):
    q, k = folded(x, y)
    weights = torch.bmm(q, k.mT).softmax(-1)
    return weights @ k, weights


def fused(module, x, y):
    q, k = folded(x, y)
    return F.scaled_dot_product_attention(q, k, k)


def of_images(module, x, y):
    return fused(module, x.flatten(2).mT, y.flatten(2).mT)


IMAGES = torch.randn(BATCH, WIDTH, 3, 3), torch.randn(BATCH, WIDTH, 2, 2)


def expected(queries, keys, scaled):
    return (heads(queries) @ heads(keys).mT / ((WIDTH // HEADS) ** 0.5 if scaled else 1)).softmax(-1)


@pytest.mark.parametrize(
    ("run", "inputs", "attention"),
    [
        (by_hand, tokens(), WHOLE),
        (by_hand, tokens(), ITEM),
        (fused, tokens(), WHOLE),
        (fused, [x[:1] for x in tokens()], WHOLE),
        # 4 samples of 3 heads make 12, as many as there are tokens.
        (fused, [torch.randn(4, 12, WIDTH), torch.randn(4, TEXT, WIDTH)], WHOLE),
        (of_images, IMAGES, WHOLE),
        (lambda m, latents, y: fused(m, latents.expand(len(y), -1, -1), y), [tokens()[0][:1], tokens()[1]], WHOLE),
        (lambda m, pair: fused(m, *pair.values()), ({"x": tokens()[0], "y": tokens()[1]},), WHOLE),
    ],
)
@pytest.mark.filterwarnings("ignore:Found in the first pass")
def test_heads_among_the_samples(run, inputs, attention):
    """The folding itself shows how many heads there are, whatever the batch size, and that samples come first."""
    (pair,) = record_fusion(Runs(run), attention, inputs)
    if run in (fused, of_images):  # also where the module is not named
        (found,) = record_fusion(Runs(run), None, inputs)
        assert torch.equal(found.forward.weights, pair.forward.weights)
    x, y = (t.flatten(2).mT if t.dim() == 4 else t for t in (inputs[0].values() if len(inputs) == 1 else inputs))
    weights = expected(x.expand(len(y), -1, -1), y, scaled=run is not by_hand)
    torch.testing.assert_close(pair.forward.weights, weights, atol=2e-6, rtol=1e-5)


class Folding(nn.Module):
    """Heads folded into the samples as fairseq does it, without four axes, or heads first, as others do."""

    def __init__(self, fold, said=HEADS):
        super().__init__()
        self.fold, self.num_heads = fold, said

    def forward(self, x, y):
        q, k = self.fold(x), self.fold(y)
        return torch.bmm(torch.bmm(q, k.mT).softmax(-1), k)


FOLDS = {
    "as fairseq": lambda x: x.transpose(0, 1).contiguous().view(x.shape[1], -1, WIDTH // HEADS).transpose(0, 1),
    "batch first": lambda x: x.unflatten(-1, (HEADS, -1)).transpose(1, 2).contiguous().view(-1, x.shape[1], 4),
    "heads first": lambda x: x.unflatten(-1, (HEADS, -1)).permute(2, 0, 1, 3).contiguous().view(-1, x.shape[1], 4),
}


@pytest.mark.parametrize("batch", [2, HEADS], ids=["other", "as many samples as heads"])
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
def test_which_rows_are_of_one_sample(fold, batch):
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(batch, n, WIDTH, generator=generator) for n in (AUDIO, TEXT))
    model, recorder = Fusing(Folding(fold)), None
    recorder = AttentionRecorder(model, WHOLE)
    for samples in (batch, 1, batch):
        with recorder:
            model(x[:samples], y[:samples])
        weights = expected(x[:samples], y[:samples], scaled=False)
        torch.testing.assert_close(recorder.attention[0].forward.weights, weights, atol=2e-6, rtol=1e-5)


def test_a_mask_that_is_the_same_for_all_heads_does_not_tell_which_rows_are_of_one_sample():
    """Samples first, as the tokens show; the mask is spread over the heads and folded as they are."""
    x, y = tokens()
    seen = torch.ones(len(x), AUDIO, TEXT, dtype=torch.bool)
    seen[1, :, 5:] = False

    def attend(module, x, y):
        q, k = folded(x, y)
        return F.scaled_dot_product_attention(q, k, k, seen[:, None].expand(-1, HEADS, -1, -1).flatten(0, 1))

    (pair,) = record_fusion(Runs(attend), WHOLE, (x, y))
    scores = (heads(x) @ heads(y).mT / 2).masked_fill(~seen[:, None], -torch.inf)
    torch.testing.assert_close(pair.forward.weights, scores.softmax(-1), atol=2e-6, rtol=1e-5)


def test_rows_that_do_not_go_with_the_heads_that_a_module_says_it_has():
    with pytest.raises(ShapeError, match=tells("fusion", (6, 5, 7), "6 rows", "2 samples", "order in which they are")):
        record_fusion(Folding(FOLDS["as fairseq"], said=4), WHOLE)
    unseen = Folding(lambda x: torch.stack(x.chunk(HEADS, dim=-1)).flatten(0, 1))
    said = tells("fusion", (6, 5, 7), "6 rows", "2 samples", "3 heads", "folded is not known")
    with pytest.raises(ShapeError, match=said):
        record_fusion(unseen, WHOLE)
    (pair,) = record_fusion(Folding(FOLDS["as fairseq"], said=None), WHOLE)
    assert pair.forward.weights.shape == (BATCH, HEADS, AUDIO, TEXT)


@pytest.mark.parametrize("said", [4, None])
def test_what_is_folded_after_the_softmax_says_nothing_of_it(said):
    """As many queries as heads; the heads are put together again behind the attention."""
    x, y = torch.randn(2, 4, 16), torch.randn(2, TEXT, 16)

    def split(t):
        return t.unflatten(-1, (4, 4)).permute(2, 0, 1, 3).contiguous().view(-1, t.shape[1], 4)

    class Whole(Folding):
        def forward(self, x, y):
            out = super().forward(x, y)
            return out.view(4, 2, -1, 4).permute(1, 2, 0, 3).reshape(2, -1, 16)

    recorder = AttentionRecorder(Fusing(Whole(split, said)), WHOLE)
    for _ in range(2):
        with recorder:
            recorder._model(x, y)
            (pair,) = recorder.attention
        q, k = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (x, y))
        torch.testing.assert_close(pair.forward.weights, (q @ k.mT).softmax(-1), atol=2e-6, rtol=1e-5)


def test_one_head_of_as_many_samples_as_tokens_and_heads_make():
    class OneHead(nn.Module):
        num_heads = 4

        def forward(self, x, y):
            return (x @ y.mT).softmax(-1) @ y

    model = Fusing(OneHead())
    model.fusion.num_heads = 4
    with AttentionRecorder(model, WHOLE) as recorder:
        model(torch.randn(16, 4, WIDTH), torch.randn(16, 4, WIDTH))
        with pytest.warns(XAttnWarning, match=tells("fusion", "one head")):
            assert recorder.attention[0].forward.weights.shape == (16, 1, 4, 4)


@pytest.mark.filterwarnings("ignore:Found in the first pass")
def test_what_a_first_step_has_shown_of_the_axes_is_kept():
    """The head count is that of a module around the one that attends, which is not looked at later."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = HEADS
            self.a_to_b = Folding(FOLDS["as fairseq"])
            self.a_to_b.num_heads = None

        def forward(self, x, y):
            return self.a_to_b(x, y)

    recorder = AttentionRecorder(nn.ModuleDict({"outer": Outer()}))
    audio, text = tokens()
    for samples in (2, 2, 1):
        with recorder:
            recorder._model["outer"](audio[:samples], text[:samples])
            (pair,) = recorder.attention
        weights = expected(audio[:samples], text[:samples], scaled=False)
        torch.testing.assert_close(pair.forward.weights, weights, atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*has no axis for heads")
def test_one_head_of_tokens_whose_first_axis_is_not_that_of_the_samples():
    """Sequence first, and queries that are the same for every sample."""
    audio, text = tokens()

    def transposed(module, x, y):
        return F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (x, y, y)))

    for samples in (BATCH, 2 * AUDIO):
        inputs = [torch.randn(n, samples, WIDTH) for n in (AUDIO, TEXT)]
        (pair,) = record_fusion(Runs(transposed), WHOLE, inputs)
        assert pair.forward.weights.shape == (samples, 1, AUDIO, TEXT)

    def latent(module, x, y):
        return F.scaled_dot_product_attention(x.expand(len(y), -1, -1), y, y)

    (pair,) = record_fusion(Runs(latent), WHOLE, (audio[:1], text))
    assert pair.forward.weights.shape == (BATCH, 1, AUDIO, TEXT)


def split(x):
    return x.unflatten(-1, (HEADS, -1))


def by_softmax(q, k):
    return (q @ k.mT).softmax(-1) @ k


def windows(x):
    return heads(x[:, :4]).unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1)


TURNED = [x.transpose(0, 1) for x in tokens()]
FRAMES = [torch.randn(BATCH, 4, n, WIDTH) for n in (AUDIO, TEXT)]
REFUSED = {
    "heads first": (
        lambda m, x, y: by_softmax(heads(x).transpose(0, 1), heads(y).transpose(0, 1)),
        tokens(),
        ((3, 2, 5, 7), "(heads, batch, queries, keys)"),
    ),
    "heads first, by the kernel": (
        lambda m, x, y: F.scaled_dot_product_attention(*(heads(t).transpose(0, 1) for t in (x, y, y))),
        tokens(),
        ((3, 2, 5, 7), "(heads, batch, queries, keys)"),
    ),
    "heads behind the queries": (
        lambda m, x, y: torch.einsum("bqhd,bkhd->bqhk", split(x), split(y)).softmax(-1),
        tokens(),
        ((2, 5, 3, 7), "(batch, queries, heads, keys)"),
    ),
    "heads behind the queries, in a module": (
        lambda m, x, y: m.soft(torch.einsum("bqhd,bkhd->bqhk", split(x), split(y))),
        tokens(),
        ((2, 5, 3, 7), "(batch, queries, heads, keys)"),
    ),
    "sequences first, heads before them": (
        lambda m, x, y: by_softmax(*(split(t).permute(2, 1, 0, 3) for t in (x, y))),
        TURNED,
        ("(heads, batch, queries, keys)",),
    ),
    "sequences first, heads behind them": (
        lambda m, x, y: torch.einsum("qbhd,kbhd->bqhk", split(x), split(y)).softmax(-1),
        TURNED,
        ("(batch, queries, heads, keys)",),
    ),
    "features": (
        lambda m, x, y: heads(x).softmax(-1) @ (heads(y).softmax(-2).mT @ heads(y)),
        tokens(),
        ((2, 3, 5, 4), "last axis", "width of a head"),
    ),
    "windows": (
        lambda m, x, y: by_softmax(windows(x), windows(y)),
        tokens(),
        ((4, 3, 2, 2), "first axis", "2 samples", "heads, windows or frames"),
    ),
    "frames": (
        lambda m, x, y: by_softmax(heads(x.flatten(0, 1)), heads(y.flatten(0, 1))),
        FRAMES,
        ((8, 3, 5, 7), "first axis", "2 samples", "heads, windows or frames"),
    ),
}


@pytest.mark.parametrize(("run", "inputs", "facts"), REFUSED.values(), ids=REFUSED)
def test_other_axes_are_refused_and_named(run, inputs, facts):
    name = "fusion.soft" if run is REFUSED["heads behind the queries, in a module"][0] else "fusion"
    with pytest.raises(ShapeError, match=tells(name, *facts, AXES)):
        record_fusion(Runs(run, soft=nn.Softmax(dim=-1)), {"a_to_b": name}, inputs)
    if facts[-1] == "(batch, queries, heads, keys)" and name == "fusion":
        with pytest.raises((DiscoveryError, ShapeError), match=tells(name, facts[-1], AXES)):
            record_fusion(Runs(run), None, inputs)


def test_tokens_that_do_not_show_the_axes():
    """Sequences first, of as many samples as heads or a multiple of the tokens; and queries of the module's own."""

    def sequence_first(module, x, y):
        q, k = (t.unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3) for t in (x, y))
        return (q @ k.mT).softmax(-1) @ k

    for samples, lengths in ((HEADS, (AUDIO, TEXT)), (2 * AUDIO, (AUDIO, AUDIO)), (BATCH, (HEADS, HEADS))):
        inputs = [torch.randn(length, samples, WIDTH) for length in lengths]
        (pair,) = record_fusion(Runs(sequence_first), WHOLE, inputs)
        assert pair.forward.weights.shape == (samples, HEADS, *lengths)

    audio, text = tokens()
    (pair,) = record_fusion(Runs(lambda m, x, y: softmax(x, y).mean()), WHOLE, (audio, text[:, :HEADS]))
    assert pair.forward.weights.shape == (BATCH, HEADS, AUDIO, HEADS)

    latents = torch.randn(1, 4, WIDTH)
    (pair,) = record_fusion(Runs(lambda m, y: softmax(latents, y) @ heads(y)), WHOLE, [torch.randn(2, HEADS, WIDTH)])
    assert pair.forward.weights.shape == (2, HEADS, 4, HEADS)


def test_one_head_is_said_once_for_each_module():
    model = Fusing(Runs(lambda m, x, y: F.scaled_dot_product_attention(x, y, y)))
    with AttentionRecorder(model, WHOLE) as recorder:
        model(*tokens())
        with pytest.warns(XAttnWarning, match=tells("fusion", "one head")):
            (all_of_them,) = recorder.attention
        recorder.clear()
        model(*(t[:1] for t in tokens()))
        (first,) = recorder.attention
    audio, text = tokens()
    weights = (audio @ text.mT / WIDTH**0.5).softmax(-1)[:, None]
    torch.testing.assert_close(all_of_them.forward.weights, weights)
    torch.testing.assert_close(first.forward.weights, weights[:1])


@pytest.mark.filterwarnings("ignore:.*has no axis for heads")
def test_one_head_whose_softmax_is_a_module_can_be_named():
    def run(module, x, y):
        return module.drop(module.soft(x @ y.mT)) @ y

    audio, text = tokens()
    fusion = Runs(run, soft=nn.Softmax(dim=-1), drop=nn.Dropout(0.1)).eval()
    for name in ("soft", "drop"):
        (pair,) = record_fusion(fusion, {"a_to_b": f"fusion.{name}"})
        assert torch.equal(pair.forward.weights[:, 0], (audio @ text.mT).softmax(-1))
    (pair,) = record_fusion(fusion, WHOLE)
    assert torch.equal(pair.forward.weights[:, 0], (audio @ text.mT).softmax(-1))
    with AttentionRecorder(Fusing(fusion)) as recorder:
        recorder._model(audio, text)
    with pytest.warns(XAttnWarning, match=tells("{'a_to_b': 'fusion'}", "attention={'<a>_to_<b>'")):
        (found,) = recorder.attention
    assert torch.equal(found.forward.weights, pair.forward.weights)
