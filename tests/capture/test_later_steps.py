"""Steps that are other than the first one: what is not there is left out and said, what is new is looked at."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.capture import AttentionRecorder, JointSequence
from lightning_xattn.core.errors import DiscoveryError, XAttnWarning
from tests.capture.models import Fusing, Runs, heads, mha, tokens
from tests.messages import tells
from tests.toy import AUDIO, TEXT, WIDTH, ToyModule, quiet_trainer, toy_loader


def steps(model, recorder, *changes):
    """How many layers are recorded in a first step, and after each change."""
    counts = []
    for change in (lambda: None, *changes):
        change()
        with torch.no_grad(), recorder:
            model(*tokens())
        counts.append(len(recorder.attention))
        recorder.clear()
    return counts


def attend(module, x, y):
    return F.scaled_dot_product_attention(heads(x), heads(y), heads(y))


def test_a_module_that_is_replaced():
    model = Fusing(Runs(attend))
    recorder = AttentionRecorder(model, {"a_to_b": "fusion"})
    assert steps(model, recorder, lambda: setattr(model, "fusion", Runs(attend))) == [1, 1]


class Flag:
    on = True


FLAGGED = {
    "an item": (lambda m, x, w: (x, w if Flag.on else None), {"a_to_b": "fusion[1]"}),
    "an item that is gone": (lambda m, x, w: (x, w) if Flag.on else x, {"a_to_b": "fusion[1]"}),
    "a name": (lambda m, x, w: (x, {"a_to_b": w}) if Flag.on else x, {"a_to_b": "fusion"}),
    "the one that looks like it": (lambda m, x, w: (x, w) if Flag.on else x, {"a_to_b": "fusion"}),
}


@pytest.mark.parametrize("in_the_open", [False, True])
@pytest.mark.parametrize(("give", "attention"), FLAGGED.values(), ids=FLAGGED)
def test_a_module_that_returns_attention_in_some_steps(give, attention, in_the_open, monkeypatch):
    def run(module, x, y):
        scores = heads(x) @ heads(y).mT
        weights = scores.softmax(-1) if in_the_open else scores.exp() / scores.exp().sum(-1, keepdim=True)
        return give(module, x, weights)

    model = Fusing(Runs(run))
    recorder = AttentionRecorder(model, attention)
    off, on = (lambda value=value: monkeypatch.setattr(Flag, "on", value) for value in (False, True))
    # What is computed in the open is seen whether it is returned or not.
    seen = in_the_open and give is FLAGGED["the one that looks like it"][0]
    assert steps(model, recorder, off, on) == [1, int(seen), 1]


@pytest.mark.parametrize("read", [lambda m: m.last, lambda m: m.last.detach(), lambda m: m.last[:, :, :3]])
def test_another_object_of_the_same_stale_numbers(read):
    def give(module, x, y):
        model.last = torch.rand(2, 3, AUDIO, TEXT).softmax(-1)

    model = Fusing(Runs(give))
    recorder = AttentionRecorder(model, {"a_to_b": read})
    assert steps(model, recorder, lambda: None) == [1, 1]
    with pytest.warns(XAttnWarning, match=tells("callable", "same tensor", "left out", "clone")):
        assert steps(model, recorder, lambda: setattr(model.fusion, "run", lambda m, x, y: None)) == [1, 0]
    assert steps(model, recorder, lambda: setattr(model.fusion, "run", give)) == [0, 1]


class Fickle(ToyModule):
    """The toy with attention by hand, which it returns in its first epoch only."""

    def __init__(self):
        super().__init__()
        del self.audio_to_text_attn, self.text_to_audio_attn
        self.fusion = Runs(self.fuse)

    def fuse(self, _, audio, text):
        weights = (heads(audio) @ heads(text).mT).softmax(-1)
        fused = torch.cat([(weights @ heads(text)).transpose(1, 2).flatten(2).mean(1), text.mean(1)], dim=1)
        return fused, weights if self.current_epoch == 0 else None

    def forward(self, audio, text):
        return self.head(self.fusion(self.audio(audio), self.text(text))[0])


@pytest.mark.filterwarnings("ignore:Found 'fusion.*without")
def test_an_epoch_without_attention_is_said_and_ends_nothing():
    mode = AttentionExplainabilityCallback({"audio_to_text": "fusion[1]"}, figures_every_n_epochs=0)
    with pytest.warns(XAttnWarning, match=tells("had no attention", "'val'", "no curves")) as told:
        quiet_trainer(callbacks=[mode], max_epochs=3).fit(Fickle(), toy_loader(), toy_loader(seed=1))
    assert [record["epoch"] for record in mode.history] == [0]
    assert len([one for one in told if "had no attention" in str(one.message)]) == 1


@pytest.mark.filterwarnings("ignore:Found in the first pass")
def test_two_callbacks_on_attention_by_hand():
    class Hand(Fickle):
        def __init__(self):
            super().__init__()
            del self.fusion
            self.look, self.hear = Runs(attend), Runs(attend)

        def forward(self, audio, text):
            audio, text = self.audio(audio), self.text(text)
            fused = [x.transpose(1, 2).flatten(2).mean(1) for x in (self.look(audio, text), self.hear(text, audio))]
            return self.head(torch.cat(fused, dim=1))

    torch.manual_seed(0)
    module = Hand()
    alone = AttentionExplainabilityCallback(figures_every_n_epochs=0)
    watches = [
        AttentionExplainabilityCallback(figures_every_n_epochs=0),
        AttentionExplainabilityCallback(classes_by="prediction", figures_every_n_epochs=0),
    ]
    for callbacks in ([alone], watches):
        quiet_trainer(callbacks=callbacks).validate(module, toy_loader(), verbose=False)
    assert len(alone.history) == 1
    assert watches[0].history == alone.history
    assert watches[1].history[0]["samples"] == alone.history[0]["samples"]


@pytest.mark.parametrize("in_the_open", [False, True])
def test_what_the_caller_does_to_weights_that_were_returned(in_the_open):
    def run(module, x, y):
        weights = (heads(x) @ heads(y).mT).softmax(-1)
        return x, weights if in_the_open else 1 * weights

    fusion = Runs(run)
    model = Runs(lambda m, x, y: m.fusion(x, y)[1].mul_(0), fusion=fusion)
    expected = fusion(*tokens())[1]
    with AttentionRecorder(model, {"a_to_b": "fusion[1]"}) as recorder:
        model(*tokens())
    assert torch.equal(recorder.attention[0].forward.weights, expected)


def test_a_call_that_broke_off_leaves_nothing_to_the_next():
    def run(module, x, y):
        attended = attend(module, x, y)
        if len(y) == 1:
            raise ValueError("broken")
        return attended

    model, (audio, text) = Fusing(Runs(run)), tokens()
    with AttentionRecorder(model, {"a_to_b": "fusion"}) as recorder:
        with pytest.raises(ValueError, match="broken"):
            model(audio[:1], text[:1])
        model(audio, text)
    assert len(recorder.attention[0].forward.weights) == len(audio)


def test_a_kernel_in_the_first_step_and_a_softmax_that_is_changed_in_the_next():
    def run(module, x, y):
        if module.fused:
            return attend(module, x, y), None
        weights = (heads(x) @ heads(y).mT).softmax(-1) ** 2
        return x, weights / weights.sum(-1, keepdim=True)

    model = Fusing(Runs(run))
    model.fusion.fused = True
    with AttentionRecorder(model, {"a_to_b": "fusion"}) as recorder:
        model(*tokens())
        assert recorder.attention
        model.fusion.fused = False
        recorder.clear()
        model(*tokens())
        with pytest.warns(XAttnWarning, match=tells("later step", "'fusion'", "which attention", "left out")):
            assert recorder.attention == ()
        model(*tokens())  # said once
    for _ in range(2):  # also when the first error is caught
        with (
            pytest.raises(DiscoveryError, match=tells("'fusion'", "which attention", "'path[item]'")),
            AttentionRecorder(model, {"a_to_b": "fusion"}),
        ):
            model(*tokens())


def test_a_later_batch_with_as_many_tokens_as_heads_ends_nothing():
    latents = torch.randn(1, 4, 12)
    model = Fusing(Runs(lambda m, y, z: (heads(latents) @ heads(y).mT).softmax(-1) @ heads(y)))
    with AttentionRecorder(model, {"a_to_b": "fusion"}) as recorder:
        for keys in (TEXT, 3):
            model(torch.randn(2, keys, 12), torch.randn(2, keys, 12))
            assert recorder.attention[0].forward.weights.shape == (2, 3, 4, keys)
            recorder.clear()


def test_one_of_two_softmaxes_is_returned_in_some_steps(monkeypatch):
    def run(module, x, y):
        scores = heads(x) @ heads(y).mT
        scores.mT.softmax(-1)
        weights = scores.softmax(-1)
        return x, weights if Flag.on else None

    model = Fusing(Runs(run))
    recorder = AttentionRecorder(model, {"a_to_b": "fusion"})
    off, on = (lambda value=value: monkeypatch.setattr(Flag, "on", value) for value in (False, True))
    assert steps(model, recorder, off, on) == [1, 0, 1]


def test_a_later_step_that_is_not_clear_is_left_out():
    def run(module, x, y):
        attended = attend(module, x, y)
        return attended if y.shape[1] == TEXT else attended + attend(module, x, y)

    model, (audio, text) = Fusing(Runs(run)), tokens()
    with AttentionRecorder(model, {"a_to_b": "fusion"}) as recorder:
        model(audio, text)
        assert len(recorder.attention) == 1
        recorder.clear()
        model(audio, text[:, :4])
        with pytest.warns(XAttnWarning, match=tells("later step", "#1' (2, 3, 5, 4)", "#2' (2, 3, 5, 4)", "left out")):
            assert recorder.attention == ()
        model(audio, text)
        assert len(recorder.attention) == 1


def test_later_steps_that_attend_within_or_whose_directions_do_not_fit_are_left_out():
    model, (audio, text) = Runs(lambda m, x, y, z: (m.p(x, y, y), m.q(y, z, z)), p=mha(), q=mha()), tokens()
    recorder = AttentionRecorder(model, {"a_to_b": "p", "b_to_a": "q"})
    calls = [(audio, text, audio), (audio, text, audio[:, :3]), (audio, audio, text), (audio, text, audio)]
    found = []
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for call in calls:
            with recorder:
                model(*call)
                found.append(len(recorder.attention))
    assert found == [1, 0, 0, 1]
    messages = [str(one.message) for one in said]
    assert sum("(2, 3, 7, 3)" in one and "left out" in one for one in messages) == 1
    assert sum("attends within one sequence" in one and "left out" in one for one in messages) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_spans_of_a_later_sequence_that_cannot_be_told_are_left_out_and_counted():
    """torch packs a sequence only where there is padding, and a callable may give no span of a strange batch."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 1)}).eval()
    x, hidden = torch.cat(tokens(), dim=1), torch.arange(12) >= torch.tensor([[10], [9]])
    for spans, padding in (
        ({"a": (0, -4), "b": (-4, None)}, [None, hidden, None]),
        ({"a": (0, 5), "b": lambda batch: (5, 12) if batch != 1 else None}, [None, None, None]),
    ):
        recorder = AttentionRecorder(model, JointSequence("encoder", spans))
        found = []
        with torch.no_grad(), pytest.warns(XAttnWarning, match="left out and counted"):  # noqa: PT031
            for i, mask in enumerate(padding):
                with recorder:
                    recorder.batch = i
                    model["encoder"](x, src_key_padding_mask=mask)
                    found.append((len(recorder.attention), recorder.left_out))
        assert found == [(1, {}), (0, {"encoder.layers.0": 2}), (1, {})]


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
