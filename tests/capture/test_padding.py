"""Which tokens are padding: queries of a direction without an opposite, and samples that lack a modality."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture, create_explainability_report
from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DataError, DiscoveryError, ShapeError, XAttnWarning
from tests.capture.models import BATCH, Fusing, Runs, heads, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH, ToyModule, padded_toy_data, quiet_trainer, run_toy, validate

REAL = torch.arange(TEXT) < torch.tensor([[TEXT], [4]])
IMAGES = tokens()[0]


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


CAUSAL = torch.ones(TEXT, TEXT, dtype=torch.bool).tril()
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
    with pytest.warns(XAttnWarning, match=tells("'text_to_audio_attn'", "query_mask=<key or callable>")):
        counted = caption_entropy()
    real = caption_entropy(query_mask="real")
    assert real == caption_entropy(query_mask=lambda outputs, batch: batch["real"].bool())
    assert real != counted
    with pytest.raises(ShapeError, match=tells("query_mask", "(batch, queries)", (3, 7), "'audio'", (3, 5, 3))):
        caption_entropy(query_mask="audio")
    with pytest.raises(DiscoveryError, match=tells("query_mask", "'nothing'", "'audio'", "'text'", "'real'")):
        caption_entropy(query_mask="nothing")


class Masked(nn.Module):
    """Cross-attention, or self-attention, under the masks that the test says."""

    def forward(self, x, y, query_padding_mask=None, mask=None):
        seen = None if mask is None else mask[:, None, None]
        attended = F.scaled_dot_product_attention(heads(x), heads(y), heads(y), seen)
        return x + attended.transpose(1, 2).flatten(2)


def padded(length, *lengths):
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def query_masks(run, attention, batches, **children):
    """The masks that are found, in the first step and in later ones."""
    model = Runs(run, **children).eval()
    recorder, found = AttentionRecorder(model, attention), []
    for batch in batches:
        with torch.no_grad(), recorder:
            model(*batch)
            found.append([pair.forward.query_mask for pair in recorder.attention])
    return found


def random(*lengths):
    return [torch.randn(3, n, WIDTH) for n in lengths]


def test_the_mask_of_the_run_that_is_shown():
    def run(module, text, image, audio, of_text, of_audio):
        return module.m(text, image, ~of_text), module.m(audio, image, ~of_audio)

    masks = padded(5, 5, 3, 2), padded(5, 1, 4, 5)
    batch = *random(5, TEXT, 5), *masks
    for found in query_masks(run, {"text_to_image": "m", "audio_to_image": "m"}, [batch, batch], m=Masked()):
        assert all(map(torch.equal, found, masks))


def of_other_tokens(module, text, eeg, image, mask):
    return module.own(text, text, mask=mask), module.cross(eeg, image)


def over_frames(module, frames, _, image, mask):
    """Self-attention over frames that are averaged is no mask of samples."""
    x = torch.stack([frames, frames], 1).flatten(0, 1)
    x = module.own(x, x, mask=mask.repeat(2, 1)).unflatten(0, (3, 2)).mean(1)
    return module.cross(x, image)


@pytest.mark.parametrize("run", [of_other_tokens, over_frames])
def test_other_self_attention_tells_nothing(run):
    batch = *random(5, 5, TEXT), padded(5, 5, 3, 2)
    found = query_masks(run, {"a_to_b": "cross"}, [batch, batch], own=Masked(), cross=Masked())
    assert found == [[None], [None]]


def of_both_modalities(module, text, image, real):
    image, of_image = image[:, :TEXT], padded(TEXT, 7, 6, 1)
    text, image = module.own(text, text, mask=real), module.own(image, image, mask=of_image)
    return module.cross(text, image, mask=of_image)


def packed_by_torch(module, text, image, real):
    text = module.packs(text, src_key_padding_mask=~real)
    return module.cross(F.pad(text, (0, 0, 0, real.shape[1] - text.shape[1])), image)


def as_an_argument(module, text, image, real):
    """Remembered where queries are as many as keys."""
    return module.cross(text, image, ~real)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("run", [of_both_modalities, packed_by_torch, as_an_argument])
def test_the_mask_is_found_in_batches_of_any_length(run):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)
    children = {"own": Masked(), "cross": Masked(), "packs": nn.TransformerEncoder(layer, 1)}
    batches = [(*random(n, TEXT), padded(n, n - 1, 3, 2)) for n in (5, TEXT, 6)]
    batches[0][2][0] = True  # of which torch packs nothing away
    for batch, (mask,) in zip(batches, query_masks(run, {"t_to_i": "cross"}, batches, **children), strict=True):
        assert torch.equal(mask, batch[2])


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
    assert mode.history[0]["wholly_masked"] == mode.summaries["val"].wholly_masked == 5
    explainer = ExplainabilityCapture(Blank(), predict=run_toy, contribution_samples=0)
    with pytest.warns(XAttnWarning, match="one modality is wholly masked in 2 of 5 samples"):
        explainer.explain_batch(next(iter(half_blank())))
    explainer = ExplainabilityCapture(Blank(), predict=run_toy, contribution_samples=0)
    with pytest.warns(XAttnWarning, match="one modality is wholly masked in 5 of 23 samples"):
        result = explainer.explain_loader(half_blank(), progress=False)
    assert "Samples in which one modality is wholly masked" in create_explainability_report(result, format="markdown")
    assert json.loads(create_explainability_report(result, format="json"))["layers"][0]["wholly_masked"] == 5
    explainer = ExplainabilityCapture(NotFinite(), predict=run_toy)
    with pytest.raises(DataError, match=tells("sample 1 ", "not finite", "In 1 of them one modality is wholly masked")):
        explainer.explain_batch(next(iter(half_blank())))
