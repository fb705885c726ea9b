"""What once gave a plausible wrong number, or could: each is right now, or refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DiscoveryError, ShapeError, XAttnWarning
from lightning_xattn.functional import prepare_rows
from tests.capture.models import BATCH, Fusing, Pair, Runs, heads, mha, record_fusion, recorded, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH, ToyModule, count_hooks, quiet_trainer, runs_compiled, toy_loader


@pytest.mark.filterwarnings("ignore:.*is compiled, and compiled code hides its attention")
def test_recorders_that_overlap_put_torchs_stance_back():
    assert runs_compiled()
    model = nn.ModuleDict({"fusion": torch.compile(Pair(), backend="aot_eager")})
    first, second = AttentionRecorder(model), AttentionRecorder(model)
    first.__enter__()
    second.__enter__()
    first.close()
    assert not runs_compiled()
    second.close()
    assert runs_compiled()

    callbacks = [AttentionExplainabilityCallback(), AttentionExplainabilityCallback(classes_by="prediction")]
    module = torch.compile(ToyModule(), backend="aot_eager")
    quiet_trainer(callbacks=callbacks).fit(module, toy_loader(), toy_loader(seed=1))
    assert runs_compiled()


def test_entering_twice_leaves_no_hook():
    model = Pair()
    recorder = AttentionRecorder(model)
    with recorder, recorder:
        model(*tokens())
    assert count_hooks(model) == 0


@pytest.mark.filterwarnings("ignore:'block' has no axis for heads")
@pytest.mark.parametrize("inner", ["self_attn", "encoder"])
def test_a_block_with_self_attention_is_not_taken_for_it(inner):
    child = mha() if inner == "self_attn" else nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)

    def block(module, audio, text):
        getattr(module, inner)(audio, *((audio, audio) if inner == "self_attn" else ()))
        return F.scaled_dot_product_attention(audio, text, text)

    model = nn.Module()
    model.block = Runs(block, **{inner: child})
    model.forward = lambda audio, text: model.block(audio, text)
    (pair,) = recorded(model, {"audio_to_text": "block"})
    audio, text = tokens()
    expected = (audio @ text.mT / WIDTH**0.5).softmax(-1)
    torch.testing.assert_close(pair.forward.weights[:, 0], expected, atol=2e-6, rtol=1e-5)


def test_self_attention_that_is_named_as_a_direction_is_refused():
    model = Runs(lambda m, audio, text: m.image_to_tokens(audio, audio, audio), image_to_tokens=mha())
    for attention in (None, {"a_to_b": "image_to_tokens"}):
        with pytest.raises(
            DiscoveryError,
            match=tells(
                "image_to_tokens", "within one sequence", "JointSequence('path', spans=", "attention={'<a>_to_<b>'"
            ),
        ):
            recorded(model, attention)


MASKS = {
    "filled with -10,000 and then scaled": (lambda s, m: s.masked_fill(m, -1e4) / math.sqrt(192), True),
    "added, lowest float": (lambda s, m: s + torch.zeros_like(s).masked_fill(m, torch.finfo(s.dtype).min), True),
    "added, lowest half": (lambda s, m: s + torch.zeros_like(s).masked_fill(m, -65504), True),
    "squared distances": (lambda s, m: -((torch.arange(TEXT) - 3.0) ** 2) * 20 - 1500 + 0 * s, False),
}


@pytest.mark.parametrize(("scores", "hides"), MASKS.values(), ids=MASKS)
def test_which_keys_a_softmax_hides_is_told_from_the_scores_whatever_hides_them(scores, hides):
    masked = torch.zeros(1, 1, AUDIO, TEXT, dtype=torch.bool)
    masked[..., 5:] = True

    def attend(module, audio, text):
        return scores(heads(audio) @ heads(text).transpose(-1, -2), masked).softmax(-1) @ heads(text)

    model = nn.Module()
    model.x = Runs(attend)
    model.forward = lambda audio, text: model.x(audio, text)
    (pair,) = recorded(model, {"audio_to_text": "x"})
    expected = torch.arange(TEXT) < (5 if hides else TEXT)
    assert torch.equal(pair.forward.key_mask, expected.expand(BATCH, TEXT))


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e4])
def test_a_row_of_which_all_keys_are_hidden_is_no_attention(lowest):
    def attend(module, audio, text):
        scores = heads(audio) @ heads(text).mT
        scores[1] = scores[1] + lowest  # uniform, or nearly so, after the softmax
        return scores.softmax(-1) @ heads(text)

    (pair,) = record_fusion(Runs(attend), {"a_to_b": "fusion"})
    rows = prepare_rows(pair.forward)
    assert rows.valid.flatten(1).all(1).tolist() == [True, False]
    assert not rows.valid[1].any()


def test_a_mapping_with_another_direction_is_not_taken():
    fusion = Runs(lambda m, audio, text: {"out": audio, "audio_to_text": (audio @ text.mT).softmax(-1)})
    with pytest.raises(DiscoveryError, match=tells("'fusion'", "fusion[audio_to_text]", (2, 5, 7))):
        record_fusion(fusion, {"text_to_audio": "fusion"})


def test_one_module_under_two_names_takes_turns_or_is_refused():
    shared = mha()
    model = Runs(lambda m, x, y: (m.p(x, y, y), m.q(y, x, x)), p=shared, q=shared)
    x, y = tokens()[0], tokens()[0].flip(1)
    (pair,) = recorded(model, {"a_to_b": "p", "b_to_a": "q"}, (x, y))
    with torch.no_grad():
        for attention, (query, key) in zip(pair.directions, ((x, y), (y, x)), strict=True):
            assert torch.equal(attention.weights, shared(query, key, key, average_attn_weights=False)[1])
    model = Runs(None, a_to_b=shared, b_to_a=shared)
    with pytest.raises(DiscoveryError, match=tells("a_to_b", "b_to_a", "one module", "attention=")):
        AttentionRecorder(model)


def test_heads_folded_into_the_samples_are_noticed_also_where_their_number_is_that_of_the_tokens():
    def folded(module, audio, text):
        q, k = (heads(x).flatten(0, 1) for x in (audio, text))
        return F.scaled_dot_product_attention(q, k, k)

    x = torch.randn(4, 12, WIDTH)  # 4 samples of 3 heads make 12, as many as there are tokens
    (pair,) = record_fusion(Runs(folded), {"a_to_b": "fusion"}, (x, x[:, :7] + 1))
    expected = (heads(x) @ heads(x[:, :7] + 1).mT / 2).softmax(-1)
    torch.testing.assert_close(pair.forward.weights, expected, atol=2e-6, rtol=1e-5)


def test_what_a_callable_gave_in_an_earlier_step_is_not_counted_again():
    model = nn.Module()
    model.last = None

    def run(keep):
        if keep:
            model.last = torch.rand(BATCH, HEADS, AUDIO, TEXT).softmax(-1)

    model.forward = run
    recorder = AttentionRecorder(model, {"a_to_b": lambda model: model.last})
    with recorder:
        model(True)
        assert len(recorder.attention) == 1
        assert len(recorder.attention) == 1  # in the same step it may be read again
        recorder.clear()
        model(False)
        with pytest.warns(XAttnWarning, match=tells("callable", "same tensor", "left out", "clone")):
            assert recorder.attention == ()
        recorder.clear()
        model(True)
        assert len(recorder.attention) == 1


def test_a_mask_that_is_changed_later_is_not_what_was_in_force():
    def attend(module, audio, text):
        mask = torch.ones(AUDIO, TEXT, dtype=torch.bool)
        mask[:, 5:] = False
        out = F.scaled_dot_product_attention(heads(audio), heads(text), heads(text), mask)
        mask.zero_()
        return out

    (pair,) = record_fusion(Runs(attend), {"a_to_b": "fusion"})
    assert torch.equal(pair.forward.key_mask, (torch.arange(TEXT) < 5).expand(BATCH, TEXT))


def test_small_half_precision_weights_are_not_padding():
    def fuse(module, audio, text):
        scores = torch.zeros(BATCH, HEADS, AUDIO, TEXT)
        scores[..., 0] = 30
        return audio, 1 * scores.softmax(-1).half()

    (pair,) = record_fusion(Runs(fuse), {"a_to_b": "fusion[1]"})
    assert pair.forward.key_mask.all()


@pytest.mark.filterwarnings("ignore:Found in the first pass")
def test_self_attention_with_queries_and_keys_of_its_own_making_is_asked_for():
    model = Runs(lambda m, x, y: m.sa(x + 1, x + 1, x), sa=mha())
    with pytest.raises(DiscoveryError, match=tells("'sa'", "ambiguous whether", "attention={'<a>_to_<b>'")):
        recorded(model)


@pytest.mark.filterwarnings("ignore:Found in the first pass")
def test_one_module_that_attends_within_and_across():
    shared = mha()

    def run(module, x, y):
        return module.p(x, x, x), module.p(y, y, y), module.p(x, y, y), module.p(y, x, x)

    (pair,) = recorded(Runs(run, p=shared))
    x, y = tokens()
    with torch.no_grad():
        assert torch.equal(pair.forward.weights, shared(x, y, y, average_attn_weights=False)[1])
        assert torch.equal(pair.backward.weights, shared(y, x, x, average_attn_weights=False)[1])


def test_unnamed_attention_beside_named_ones_is_said_to_be_left_out():
    def attend(module, queries, keys):
        return F.scaled_dot_product_attention(heads(queries), heads(keys), heads(keys))

    def run(module, x, y):
        return module.a_to_b(x, y), module.b_to_a(y, x), module.other(x, y)

    model = Runs(run, a_to_b=Runs(attend), b_to_a=Runs(attend), other=Runs(attend))
    with pytest.warns(
        XAttnWarning,
        match=tells("{'a_to_b': 'a_to_b', 'b_to_a': 'b_to_a'}", "'other' (2, 3, 5, 7)", "5 queries", "7 keys"),
    ):
        (pair,) = recorded(model)
    assert str(pair.forward.direction) == "a_to_b"


def test_a_shared_module_that_runs_once_in_a_later_step_is_left_out():
    model = Runs(lambda m, x, y: (m.p(x, y, y), m.p(y, x, x)), p=mha())
    x, y = tokens()
    recorder = AttentionRecorder(model, {"a_to_b": "p", "b_to_a": "p"})
    with recorder:
        model(x, y)
        assert len(recorder.attention) == 1
        recorder.clear()
        model.p(x, y, y)
        with pytest.warns(XAttnWarning, match=tells("'p'", "2 directions", "1 time(s)", "left out")):
            assert recorder.attention == ()


@pytest.mark.filterwarnings("ignore:Found in the first pass")
def test_checkpointing_in_a_first_pass():
    model = Runs(lambda m, x, y: checkpointed(m.p, x, y) + checkpointed(m.q, y, x).mean(), p=mha(), q=mha())
    x, y = (x.requires_grad_() for x in tokens())
    with AttentionRecorder(model) as recorder:
        model(x, y).sum().backward()
    (pair,) = recorder.attention
    with torch.no_grad():
        assert torch.equal(pair.forward.weights, model.p(x, y, y, average_attn_weights=False)[1])
        assert torch.equal(pair.backward.weights, model.q(y, x, x, average_attn_weights=False)[1])


def checkpointed(attention, queries, keys):
    return torch.utils.checkpoint.checkpoint(lambda q, k: attention(q, k, k)[0], queries, keys, use_reentrant=False)


@pytest.mark.filterwarnings("ignore:Found in the first pass")
def test_a_kernel_call_of_another_form_ends_nothing():
    def run(module, x, y):
        five = heads(x)[:, None]
        module.other(five, five)
        return module.p(x, y, y), module.q(y, x, x)

    other = Runs(lambda m, q, k: F.scaled_dot_product_attention(q, k, k))
    (pair,) = recorded(Runs(run, p=mha(), q=mha(), other=other))
    assert pair.forward.weights.shape == (BATCH, HEADS, AUDIO, TEXT)


def test_attention_inside_of_vmap_is_named_as_such():
    model = Fusing(Runs(lambda m, x, y: torch.vmap(lambda q, k: (heads(q) @ heads(k).mT).softmax(-1) @ heads(k))(x, y)))
    x, y = (t[None] for t in tokens())
    expected = model(x, y)
    with (
        pytest.raises(DiscoveryError, match=tells("'fusion'", "cannot be read", "inside of torch.vmap", "path[item]")),
        AttentionRecorder(model, {"a_to_b": "fusion"}),
    ):
        model(x, y)
    assert torch.equal(model(x, y), expected), "nothing stays behind"


def test_a_null_key_does_not_pair():
    def attend(module, queries, keys):
        keys = torch.cat([keys, torch.zeros_like(keys[:, :1])], dim=1)
        return F.scaled_dot_product_attention(heads(queries), heads(keys), heads(keys))

    model = Runs(lambda m, x, y: (m.a_to_b(x, y), m.b_to_a(y, x)), a_to_b=Runs(attend), b_to_a=Runs(attend))
    with pytest.raises(
        ShapeError,
        match=tells(
            "a_to_b", (2, 3, 5, 8), "b_to_a", "queries=8, keys=5", (2, 3, 7, 6), "null key", "one direction alone"
        ),
    ):
        recorded(model, {"a_to_b": "a_to_b", "b_to_a": "b_to_a"})


def test_two_things_under_a_directions_name():
    def fuse(module, audio, text):
        return {
            "features": {"a_to_b": audio},
            "attention": {"a_to_b": (heads(audio) @ heads(text).mT).softmax(-1)},
        }

    with pytest.raises(
        DiscoveryError, match=tells("fusion[features][a_to_b]", (2, 5, 12), "fusion[attention][a_to_b]", (2, 3, 5, 7))
    ):
        record_fusion(Runs(fuse), {"a_to_b": "fusion"})
    (pair,) = record_fusion(Runs(fuse), {"a_to_b": "fusion[attention][a_to_b]"})
    assert pair.forward.weights.shape == (BATCH, HEADS, AUDIO, TEXT)


def test_a_key_that_is_no_direction():
    fusion = Runs(lambda m, x, y: {"time_to_event": x[:, 0], "w": (heads(x) @ heads(y).mT).softmax(-1)})
    (pair,) = record_fusion(fusion, {"a_to_b": "fusion"})
    assert pair.forward.weights.shape == (BATCH, HEADS, AUDIO, TEXT)
