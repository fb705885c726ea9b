"""Which tokens are padding: queries of a direction without an opposite, and zeros of weights that are returned."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture, create_explainability_report
from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DataError, DiscoveryError, ShapeError, XAttnWarning
from lightning_xattn.evaluation.statistics import Column, sample_statistics
from lightning_xattn.functional import prepare_rows
from tests.capture.models import BATCH, Fusing, Runs, heads, mha, record_fusion, softmax, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH, ToyModule, padded_toy_data, quiet_trainer, run_toy, validate

REAL = torch.arange(TEXT) < torch.tensor([[TEXT], [4]])
IMAGES = tokens()[0]
CAUSAL = torch.ones(TEXT, TEXT, dtype=torch.bool).tril()


def layer(attend, masks):
    """Text attends within itself under its mask, then asks an image."""

    def run(module, text, image):
        text = text + module.own(text)
        return module.cross(text, image)

    def cross(module, text, image):
        return F.scaled_dot_product_attention(heads(text), heads(image), heads(image))

    return Runs(run, own=Runs(lambda m, x: attend(x, masks)), cross=Runs(cross))


def by_kernel(x, mask):
    attended = F.scaled_dot_product_attention(heads(x), heads(x), heads(x), mask)
    return attended.transpose(1, 2).flatten(2)


def by_softmax(x, mask):
    scores = (heads(x) @ heads(x).mT).masked_fill(~mask, torch.finfo(x.dtype).min)
    return (scores.softmax(-1) @ heads(x)).transpose(1, 2).flatten(2)


MASKS = {
    "padding": REAL[:, None, None],
    "causal and padding": REAL[:, None, None] & CAUSAL,
    "causal": CAUSAL[None, None].expand(BATCH, -1, -1, -1),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("attend", [by_kernel, by_softmax])
@pytest.mark.filterwarnings("ignore:Found in the first pass")
def test_padded_queries_are_told_by_self_attention_of_the_same_tokens(attend, mask):
    text = tokens()[1]
    for attention in ({"text_to_image": "fusion.cross"}, None):
        recorder = AttentionRecorder(Fusing(layer(attend, mask)), attention)
        for _ in range(2):
            with recorder:
                recorder._model(text, IMAGES)
                (pair,) = recorder.attention
            real = REAL if mask is not MASKS["causal"] else torch.ones_like(REAL)
            assert torch.equal(pair.forward.query_mask, real)


def test_padded_queries_change_the_numbers():
    text = tokens()[1]
    with AttentionRecorder(Fusing(layer(by_kernel, MASKS["padding"])), {"text_to_image": "fusion.cross"}) as recorder:
        recorder._model(text, IMAGES)
        (pair,) = recorder.attention
    weights = pair.forward.weights.double()
    entropy = -(weights * weights.log()).sum(-1) / torch.tensor(float(AUDIO)).double().log()
    expected = entropy[1, :, :4].mean()
    found = sample_statistics(prepare_rows(pair.forward))[Column.parse("text_to_image/entropy")][1]
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_decoders_own_mask_of_its_queries():
    audio, text = tokens()
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 8, batch_first=True), 2).eval()
    model = nn.ModuleDict({"decoder": decoder})
    with torch.no_grad(), AttentionRecorder(model, {"text_to_audio": "decoder"}) as recorder:
        for _ in range(2):
            recorder.clear()
            decoder(text, audio, tgt_key_padding_mask=~REAL)
            assert [torch.equal(pair.forward.query_mask, REAL) for pair in recorder.attention] == [True, True]


@pytest.mark.parametrize("mask", [REAL.long(), ~REAL], ids=["attention_mask", "query_padding_mask"])
def test_an_argument_of_the_module_that_can_only_be_the_mask_of_the_queries(mask):
    class Cross(nn.Module):
        def forward(self, text, image, attention_mask=None, query_padding_mask=None):
            return F.scaled_dot_product_attention(heads(text), heads(image), heads(image))

    name = "attention_mask" if mask.dtype == torch.long else "query_padding_mask"
    model = nn.ModuleDict({"cross": Cross()})
    with AttentionRecorder(model, {"text_to_image": "cross"}) as recorder:
        model["cross"](tokens()[1], IMAGES, **{name: mask})
    assert torch.equal(recorder.attention[0].forward.query_mask, REAL)


class Captions(ToyModule):
    """Text asks audio; batches are padded to their longest text, which only the batch says."""

    def __init__(self):
        super().__init__()
        del self.audio_to_text_attn

    def forward(self, batch):
        audio, text = self.audio(batch["audio"]), self.text(batch["text"])
        fused, _ = self.text_to_audio_attn(text, audio, audio)
        return self.head(torch.cat([fused.mean(1), audio.mean(1)], dim=1))

    def validation_step(self, batch, batch_idx):
        return {"logits": self(batch), "targets": batch["y"]}


def caption_batches(lengths):
    generator = torch.Generator().manual_seed(7)
    for length in lengths:
        real = torch.arange(length) < torch.tensor([[length], [2], [1]])
        yield {
            "audio": torch.randn(3, AUDIO, 3, generator=generator),
            "text": torch.randn(3, length, 2, generator=generator),
            "y": torch.tensor([0, 1, 2]),
            "real": real.long(),
        }


def caption_entropy(**settings):
    torch.manual_seed(0)
    mode = AttentionExplainabilityCallback({"text_to_audio": "text_to_audio_attn"}, **settings)
    loader = torch.utils.data.DataLoader(list(caption_batches((TEXT, 4))), batch_size=None)
    quiet_trainer(callbacks=[mode]).validate(Captions(), loader, verbose=False)
    return mode.history[0]["entropy/text_to_audio/all"]


@pytest.mark.filterwarnings("ignore:Found 'text_to_audio_attn.*without", "ignore:.*number of tokens changes")
def test_a_setting_says_which_queries_are_padding():
    with pytest.warns(
        XAttnWarning,
        match=tells(
            "'text_to_audio_attn'", "Queries that are padding", "query_mask=<key or callable>", "(batch, queries)"
        ),
    ):
        counted = caption_entropy()
    real = caption_entropy(query_mask="real")
    assert real == caption_entropy(query_mask=lambda outputs, batch: batch["real"].bool())
    assert real != counted
    with pytest.raises(ShapeError, match=tells("query_mask", "(batch, queries)", (3, 7), "'audio'", (3, 5, 3))):
        caption_entropy(query_mask="audio")
    with pytest.raises(DiscoveryError, match=tells("query_mask", "'nothing'", "'audio'", "'text'", "'real'")):
        caption_entropy(query_mask="nothing")


def entropies(pair):
    return sample_statistics(prepare_rows(pair.forward))[Column.parse("a_to_b/entropy")]


def test_zeros_of_a_causal_mask_in_returned_weights_are_hidden():
    """A sequence asks another one as long as it is, and sees no later token; the softmax is seen."""
    x, y = tokens()[1], tokens()[1].flip(1)

    def attend(module, x, y):
        scores = (heads(x) @ heads(y).mT).masked_fill(~CAUSAL, -torch.inf)
        return x, scores.softmax(-1).mean(1)

    with AttentionRecorder(Fusing(Runs(attend)), {"a_to_b": "fusion[1]"}) as recorder:
        recorder._model(x, y)
        with pytest.warns(XAttnWarning) as told:
            (pair,) = recorder.attention
    assert not any("larger entropy" in str(warning.message) for warning in told)
    visible = pair.forward.visible.expand(pair.forward.weights.shape)
    assert torch.equal(visible, CAUSAL.expand(visible.shape))
    weights = pair.forward.weights[:, 0, 1:].double()
    keys = torch.arange(2, TEXT + 1).double()
    expected = -(weights * weights.clamp_min(1e-300).log()).sum(-1) / keys.log()
    torch.testing.assert_close(entropies(pair).double(), expected.mean(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*no axis for heads")
def test_zeros_that_may_be_weights_are_left_to_be_weights_and_said():
    def closed(module, x, y):
        powers = torch.relu(x @ y.mT) + 1e-30
        powers = torch.where(powers < 0.5, 0.0, powers) + torch.eye(TEXT)[:AUDIO]
        return x, powers / powers.sum(-1, keepdim=True)

    with AttentionRecorder(Fusing(Runs(closed)), {"a_to_b": "fusion[1]"}) as recorder:
        recorder._model(*tokens())
        with pytest.warns(
            XAttnWarning, match=tells("'fusion[1]'", "weights of exactly 0", "name the module", "softmax")
        ):
            (pair,) = recorder.attention
    assert (pair.forward.weights == 0).any()
    assert pair.forward.visible is None or pair.forward.visible.any(-2).all()


def test_rows_that_are_set_to_zero_after_the_softmax_are_left_out():
    """As in Flamingo: text before any image looks at none."""
    before = torch.zeros(BATCH, 1, AUDIO, 1, dtype=torch.bool)
    before[0, :, :2] = before[1, :, :3] = True

    def attend(module, x, y):
        scores = (heads(x) @ heads(y).mT).masked_fill(before, -torch.finfo(x.dtype).max)
        scores = scores - scores.amax(-1, keepdim=True)
        weights = scores.softmax(-1).masked_fill(before, 0.0)
        return torch.einsum("bhij,bhjd->bhid", weights, heads(y))

    with AttentionRecorder(Fusing(Runs(attend)).eval(), {"a_to_b": "fusion"}) as recorder:
        for _ in range(2):
            recorder._model(*tokens())
            if recorder._warned:
                (pair,) = recorder.attention
            else:
                with pytest.warns(XAttnWarning, match=tells("'fusion'", "whole rows", "after the softmax", "left out")):
                    (pair,) = recorder.attention
            recorder.clear()
            rows = prepare_rows(pair.forward)
            assert torch.equal(rows.valid, ~before[..., 0].expand(-1, HEADS, -1))
            assert not rows.broken.any()


def test_weights_that_are_changed_before_they_are_used_are_said():
    def attend(module, x, y):
        return (softmax(x, y) ** 2) @ heads(y)

    with AttentionRecorder(Fusing(Runs(attend)).eval(), {"a_to_b": "fusion"}) as recorder:
        recorder._model(*tokens())
        with pytest.warns(XAttnWarning, match=tells("'fusion'", "between the softmax and their use", "'path[item]'")):
            (pair,) = recorder.attention
    assert torch.equal(pair.forward.weights, softmax(*tokens()))


@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.Identity()])
def test_dropout_and_scaling_of_rows_change_no_attention(drop):
    def attend(module, x, y):
        return module.drop(0.5 * softmax(x, y)) @ heads(y)

    fusion = Runs(attend, drop=drop)
    for training in (True, False):
        (pair,) = record_fusion(fusion.train(training), {"a_to_b": "fusion"})
        assert torch.equal(pair.forward.weights, softmax(*tokens()))
        assert pair.forward.visible is None or pair.forward.visible.all()


def test_attention_that_goes_from_sample_to_sample_is_refused():
    """As of an nn.MultiheadAttention that was made without batch_first."""

    class TimeFirst(ToyModule):
        def __init__(self):
            super().__init__()
            self.text_to_audio_attn = self.audio_to_text_attn = None
            self.cross = mha()
            self.cross.batch_first = False

        def forward(self, audio, text):
            audio, text = self.audio(audio), self.text(text)[:, :AUDIO]
            return self.head(torch.cat([self.cross(audio, text, text)[0].mean(1), text.mean(1)], dim=1))

    batches = [(torch.randn(3, AUDIO, 3), torch.randn(3, TEXT, 2), torch.tensor([0, 1, 2]))]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    mode = AttentionExplainabilityCallback({"audio_to_text": "cross"})
    with pytest.warns(
        XAttnWarning,
        match=tells("Nothing is recorded", "5 samples", "3 and 3 tokens", "batch[2]", "3 targets", "batch_first=True"),
    ):
        quiet_trainer(callbacks=[mode]).validate(TimeFirst(), loader, verbose=False)


class Masked(nn.Module):
    """Cross-attention, or self-attention, under the masks that the test says."""

    def forward(self, x, y, query_padding_mask=None, mask=None):
        seen = None if mask is None else mask[:, None, None]
        attended = F.scaled_dot_product_attention(heads(x), heads(y), heads(y), seen)
        return x + attended.transpose(1, 2).flatten(2)


def padded(length, *lengths):
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def query_masks(model, attention, *batches):
    recorder, found = AttentionRecorder(model, attention), []
    for batch in batches:
        with torch.no_grad(), recorder:
            model(*batch)
            found.append([pair.forward.query_mask for pair in recorder.attention])
    return found


def test_the_mask_of_the_run_that_is_shown():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = Masked()

        def forward(self, text, image, audio, of_text, of_audio):
            return self.m(text, image, ~of_text), self.m(audio, image, ~of_audio)

    text, image, audio = (torch.randn(3, n, WIDTH) for n in (5, TEXT, 5))
    of_text, of_audio = padded(5, 5, 3, 2), padded(5, 1, 4, 5)
    batch = text, image, audio, of_text, of_audio
    for masks in query_masks(Two(), {"text_to_image": "m", "audio_to_image": "m"}, batch, batch):
        assert [torch.equal(*pair) for pair in zip(masks, (of_text, of_audio), strict=True)] == [True, True]


def test_self_attention_of_other_tokens_tells_nothing():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.cross = Masked(), Masked()

        def forward(self, text, eeg, image, mask):
            return self.enc(text, text, mask=mask), self.cross(eeg, image)

    batch = (*(torch.randn(3, n, WIDTH) for n in (5, 5, TEXT)), padded(5, 5, 3, 2))
    assert query_masks(Three(), {"eeg_to_image": "cross"}, batch, batch) == [[None], [None]]


def test_self_attention_that_runs_for_both_modalities():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.cross = Masked(), Masked()

        def forward(self, text, image, of_text, of_image):
            text, image = self.enc(text, text, mask=of_text), self.enc(image, image, mask=of_image)
            return self.cross(text, image, mask=of_image)

    of_image = padded(TEXT, 7, 6, 1)
    batches = [
        (torch.randn(3, n, WIDTH), torch.randn(3, TEXT, WIDTH), padded(n, n, 3, 2), of_image) for n in (5, 6, TEXT)
    ]
    for batch, (mask,) in zip(batches, query_masks(Shared(), {"t_to_i": "cross"}, *batches), strict=True):
        assert torch.equal(mask, batch[2])


def test_self_attention_over_frames_that_are_averaged_is_no_mask_of_samples():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc, self.cross = Masked(), Masked()

        def forward(self, frames, image):
            x = frames.flatten(0, 1)
            x = self.enc(x, x, mask=padded(5, *[5, 3] * 3)).unflatten(0, (3, 2)).mean(1)
            return self.cross(x, image)

    batch = torch.randn(3, 2, 5, WIDTH), torch.randn(3, TEXT, WIDTH)
    assert query_masks(Video(), {"v_to_i": "cross"}, batch, batch) == [[None], [None]]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_padding_that_torch_packs_away():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)
            self.enc, self.cross = nn.TransformerEncoder(layer, 1), Masked()

        def forward(self, text, image, real):
            text = self.enc(text, src_key_padding_mask=~real)
            return self.cross(F.pad(text, (0, 0, 0, real.shape[1] - text.shape[1])), image)

    image = torch.randn(3, TEXT, WIDTH)
    batches = [(torch.randn(3, 5, WIDTH), image, padded(5, *n)) for n in ((5, 4, 2), (4, 4, 2), (3, 1, 2))]
    for batch, (mask,) in zip(batches, query_masks(Packed().eval(), {"t_to_i": "cross"}, *batches), strict=True):
        assert torch.equal(mask, batch[2])


def test_an_argument_is_remembered_where_queries_are_as_many_as_keys():
    image = torch.randn(3, TEXT, WIDTH)
    batches = [(torch.randn(3, n, WIDTH), image, ~padded(n, n, 3, 2)) for n in (5, TEXT, 6)]

    model = nn.ModuleDict({"cross": Masked()})
    model.forward = lambda *batch: model["cross"](*batch)
    for batch, (mask,) in zip(batches, query_masks(model, {"t_to_i": "cross"}, *batches), strict=True):
        assert torch.equal(mask, ~batch[2])


BEFORE = torch.zeros(BATCH, 1, AUDIO, 1, dtype=torch.bool)
BEFORE[0, :, :2] = BEFORE[1, :, :3] = True


@pytest.mark.filterwarnings("ignore:.*sets whole rows of its weights to 0")
@pytest.mark.parametrize("name", ["fusion", "fusion[1]"])
def test_rows_that_are_set_to_zero_and_then_folded_or_returned(name):
    def attend(module, x, y):
        weights = softmax(x, y) * ~BEFORE
        out = torch.bmm(weights.flatten(0, 1), heads(y).flatten(0, 1))
        return (out, weights) if name == "fusion[1]" else out

    (pair,) = record_fusion(Runs(attend).eval(), {"a_to_b": name})
    rows = prepare_rows(pair.forward)
    assert torch.equal(rows.valid, ~BEFORE[..., 0].expand(-1, HEADS, -1))
    assert not rows.broken.any()


def test_weights_that_are_used_for_both_sides():
    def attend(module, x, y):
        scores = (heads(x) @ heads(y).mT).masked_fill(~REAL[:, None, None], -torch.inf)
        weights = scores.softmax(-1)
        return weights @ heads(y), weights.transpose(-1, -2) @ heads(x)

    x = torch.randn(BATCH, TEXT, WIDTH)
    (pair,) = record_fusion(Runs(attend).eval(), {"a_to_b": "fusion"}, (x, x + 1))
    assert prepare_rows(pair.forward).valid.all()


class Blank(ToyModule):
    """A token whose first feature is 0 is padding; what a softmax over no key gives is 0."""

    def forward(self, audio, text):
        silent, blank = audio[..., 0] == 0, text[..., 0] == 0
        audio, text = self.audio(audio), self.text(text)
        there, _ = self.audio_to_text_attn(audio, text, text, key_padding_mask=blank)
        back, _ = self.text_to_audio_attn(text, audio, audio, key_padding_mask=silent)
        return self.head(torch.cat([there.nan_to_num().mean(1), back.nan_to_num().mean(1)], dim=1))


class NotFinite(Blank):
    def forward(self, audio, text):
        return super().forward(audio, text) + torch.where((text[..., 0] == 0).all(1), torch.nan, 0.0)[:, None]


def half_blank(samples=23):
    """Of three samples the text is blank, of two others the audio, and of many a part of it."""
    audio, text, target = padded_toy_data(samples).tensors
    text[[1, 7, 20], :, 0] = 0
    audio[[2, 22], :, 0] = 0
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(audio, text, target), 5)


def test_samples_of_which_one_modality_is_wholly_masked_are_named_and_counted():
    mode = AttentionExplainabilityCallback(contribution_samples=0, figures_every_n_epochs=0)
    with pytest.warns(XAttnWarning, match="one modality is wholly masked in 5 of 23 samples") as said:
        validate(Blank(), mode, half_blank())
    assert not any("not finite" in str(one.message) for one in said)
    assert mode.history[0]["wholly_masked"] == 5
    assert mode.summaries["val"].wholly_masked == 5
    explainer = ExplainabilityCapture(Blank(), predict=run_toy, contribution_samples=0)
    with pytest.warns(XAttnWarning, match="one modality is wholly masked in 2 of 5 samples"):
        explainer.explain_batch(next(iter(half_blank(23))))
    explained = ExplainabilityCapture(Blank(), predict=run_toy, contribution_samples=0)
    with pytest.warns(XAttnWarning, match="one modality is wholly masked in 5 of 23 samples"):
        result = explained.explain_loader(half_blank(), progress=False)
    text = create_explainability_report(result, format="markdown")
    assert "Samples in which one modality is wholly masked" in text
    assert json.loads(create_explainability_report(result, format="json"))["layers"][0]["wholly_masked"] == 5


def test_scores_that_are_not_finite_as_one_modality_is_wholly_masked():
    explainer = ExplainabilityCapture(NotFinite(), predict=run_toy)
    with pytest.raises(DataError, match=tells("sample 1 ", "not finite", "In 1 of them one modality is wholly masked")):
        explainer.explain_batch(next(iter(half_blank())))
