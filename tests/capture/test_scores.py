"""Attention that is kept as queries and keys gives the numbers of its weights, also in a joint sequence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_xattn.capture import AttentionRecorder, JointSequence
from lightning_xattn.capture.joint import cut_direction
from lightning_xattn.capture.masks import RecordedWeights
from lightning_xattn.core.attention import Attention, Direction
from lightning_xattn.core.scores import Scores
from lightning_xattn.evaluation.statistics import sample_statistics
from lightning_xattn.functional import prepare_layer, prepare_rows

BATCH, HEADS, WIDTH, AUDIO, TEXT = 3, 2, 4, 5, 7
TOKENS = AUDIO + TEXT + 1
"""With a class token at the end, which belongs to no modality."""

DIRECTION = Direction("audio", "text")


def make_scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(BATCH, HEADS, TOKENS, WIDTH, generator=generator) for _ in range(2))
    return Scores(query, key)


def recorded(case):
    """A self-attention over all tokens, as scores and as weights."""
    scores, key_mask, visible = make_scores(), None, None
    if case == "padding":
        key_mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
        key_mask[1, 3:5] = key_mask[2, AUDIO:] = False
    elif case == "mask":
        visible = torch.rand(1, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3)) > 0.4
        visible[..., 1, :] = False  # a query that sees no key, though other tokens see it
    elif case == "causal":
        places = torch.arange(TOKENS)[None]
        scores = Scores(scores.query, scores.key, query_places=places, key_places=places)
    elif case == "bias":
        scores = Scores(scores.query, scores.key, (torch.randn(1, HEADS, TOKENS, TOKENS),))
    one = RecordedWeights(scores, key_mask, visible)
    shown = scores.visible(slice(None)) if case == "causal" else visible
    return one, RecordedWeights(one.weights, key_mask, shown)


def as_masks(places):
    """The same places as a mask of each sample."""
    mask = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    mask[:, places] = True
    return mask


@pytest.mark.parametrize("chunk", [2**20, BATCH * HEADS * TOKENS * 2], ids=["at once", "in chunks"])
@pytest.mark.parametrize("kind", ["spans", "masks", "other places"])
@pytest.mark.parametrize("case", ["plain", "padding", "mask", "causal", "bias"])
def test_a_block_of_scores_is_that_of_the_weights(case, kind, chunk, monkeypatch):
    monkeypatch.setattr("lightning_xattn.functional.row_chunks.CHUNK", chunk)
    audio, text = slice(0, AUDIO), slice(AUDIO, AUDIO + TEXT)
    if kind != "spans":
        audio, text = map(as_masks, (audio, text))
    if kind == "other places":
        text[0, AUDIO : AUDIO + 2] = False
        audio[1] = audio[1].roll(AUDIO)
        text[1] = text[1].roll(-AUDIO)
        text[1, :AUDIO], audio[1, :] = True, False
        audio[1, AUDIO + 1 : AUDIO + 4] = True
        text[1, AUDIO:] = False
    numbers = []
    for whole in recorded(case):
        sides = []
        for direction, places in ((DIRECTION, (audio, text)), (DIRECTION.opposite, (text, audio))):
            cut = cut_direction(whole, *places, "x")
            sides.append((direction, cut))
        attention = [
            Attention(
                direction,
                cut.source,
                cut.key_mask,
                cut.visible,
                query_mask=other.key_mask,
                cross_modal_mass=cut.cross_modal_mass,
            )
            for (direction, cut), (_, other) in zip(sides, sides[::-1], strict=True)
        ]
        numbers.append(sample_statistics(prepare_layer(*attention)))
        assert all(one.is_block for one in attention)
    assert numbers[0].columns == numbers[1].columns
    for column, values in numbers[1].items():
        torch.testing.assert_close(
            numbers[0][column], values, rtol=2e-5, atol=2e-6, equal_nan=True, msg=lambda text, c=column: f"{c}: {text}"
        )


class Changing(nn.Module):
    """Changes in place what it gave the kernel, as a cache may."""

    def forward(self, audio, text):
        query, key = (one.clone().unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in (audio, text))
        mask = torch.zeros(audio.shape[1], text.shape[1])
        mask[:, 0] = -1.0
        attended = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
        for one in (query, key, mask):
            one.zero_()
        return attended.transpose(1, 2).flatten(2)


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.audio_to_text_attn, self.text_to_audio_attn = Changing(), Changing()

    def forward(self, audio, text):
        return self.audio_to_text_attn(audio, text).mean(1) + self.text_to_audio_attn(text, audio).mean(1)


def test_what_a_model_changes_afterwards_is_not_what_was_in_force():
    generator = torch.Generator().manual_seed(0)
    audio, text = (torch.randn(BATCH, n, HEADS * WIDTH, generator=generator) for n in (AUDIO, TEXT))
    paths = {"audio_to_text": "audio_to_text_attn", "text_to_audio": "text_to_audio_attn"}
    with AttentionRecorder(Both().eval(), paths) as recorder:
        recorder._model(audio, text)
        (pair,) = recorder.attention
    query, key = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in (audio, text))
    bias = torch.zeros(TEXT).index_fill(0, torch.tensor([0]), -1.0)
    expected = (query @ key.mT * WIDTH**-0.5 + bias).softmax(-1)
    torch.testing.assert_close(prepare_rows(pair.forward).weights, expected)


@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_of_several_layers_is_copied_once(changes, inference):
    class Kernel(nn.Module):
        def forward(self, asks, asked, mask):
            return F.scaled_dot_product_attention(asks, asked, asked, attn_mask=mask)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.audio_to_text_attn, self.text_to_audio_attn = Kernel(), Kernel()

        def forward(self, audio, text):
            mask = torch.zeros(1, 1, TEXT, TEXT)
            mask[..., 0] = -5.0
            one = self.audio_to_text_attn(audio, text, mask)
            if changes:
                mask.zero_()
            return one + self.text_to_audio_attn(text, audio, mask)

    audio, text = (torch.randn(BATCH, HEADS, TEXT, WIDTH) for _ in range(2))
    paths = {"audio_to_text": "audio_to_text_attn", "text_to_audio": "text_to_audio_attn"}
    with torch.inference_mode(inference), AttentionRecorder(model := Model(), paths) as recorder:
        model(audio, text)
        (pair,) = recorder.attention
        (there,), (back,) = (one.source.biases for one in pair.directions)
        assert (there.data_ptr() == back.data_ptr()) is not changes
        assert there[..., 0].eq(-5).all()
        assert back[..., 0].eq(0 if changes else -5).all()


def test_an_unmasked_joint_sequence_of_kernels_keeps_scores():
    """So that nothing of all its weights waits for the end of the batch."""
    layer = nn.TransformerEncoderLayer(HEADS * WIDTH, HEADS, 8, batch_first=True).eval()
    tokens = torch.randn(BATCH, AUDIO + TEXT, HEADS * WIDTH)
    joint = JointSequence("", spans={"audio": (0, AUDIO), "text": (AUDIO, None)})
    model = nn.Module()
    model.layer, model.forward = layer, lambda one: model.layer(one)
    with AttentionRecorder(model, JointSequence("layer", joint.spans)) as recorder, torch.no_grad():
        model(tokens)
        (pair,) = recorder.attention
    assert all(isinstance(one.source, Scores) for one in pair.directions)
