"""Joint sequences with a mask for each sample: samples without an image, cropped sequences, and probes of the text."""

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_xattn import AttentionExplainabilityCallback, JointSequence
from lightning_xattn.attribution.kept_samples import KeptSamples
from lightning_xattn.capture import AttentionRecorder
from tests.toy import quiet_trainer

IMAGE_TOKEN, PAD, SAMPLES, LENGTH, WIDTH = 7, 0, 30, 9, 8
MASKS = {
    "image": lambda batch: batch["ids"] == IMAGE_TOKEN,
    "text": lambda batch: (batch["ids"] != IMAGE_TOKEN) & (batch["ids"] != PAD),
}


class Decoder(LightningModule):
    """Self-attention over words and image tokens, padded on the right."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attn = nn.Embedding(20, WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        nn.init.normal_(self.attn.in_proj_weight)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.attn(x, x, x, key_padding_mask=ids == PAD)[0].mean(1))

    def validation_step(self, batch, batch_idx):
        logits = self(batch["ids"])
        return {"loss": F.cross_entropy(logits, batch["label"]), "logits": logits, "targets": batch["label"]}


def make_samples(first_has_image=True):
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(SAMPLES):
        ids = torch.randint(1, 7, (LENGTH,), generator=generator)
        if i % 5 >= 2 or (i == 0 and first_has_image):
            places = torch.randperm(LENGTH - 3, generator=generator)[:3]
            ids[places] = IMAGE_TOKEN
        ids[LENGTH - i % 3 :] = PAD
        samples.append({"ids": ids, "label": torch.tensor(i % 3)})
    return samples


def observe(samples, batch_size, **settings):
    callback = AttentionExplainabilityCallback(attention=JointSequence("attn", MASKS), **settings)
    quiet_trainer(callbacks=[callback]).validate(Decoder(), DataLoader(samples, batch_size), verbose=False)
    return callback


def share_on_images(samples):
    """Mean share of a word's attention on image tokens, over the samples that have some."""
    module, shares = Decoder().eval(), []
    for one in samples:
        ids = one["ids"][None]
        image = ids[0] == IMAGE_TOKEN
        if image.any():
            x = module.embed(ids)
            with torch.no_grad():
                _, weights = module.attn(x, x, x, key_padding_mask=ids == PAD, average_attn_weights=False)
            words = ~image & (ids[0] != PAD)
            shares.append(weights[0][:, words][:, :, image].sum(-1).mean())
    return float(torch.stack(shares).mean())


@pytest.mark.filterwarnings("ignore::lightning_xattn.core.errors.XAttnWarning")
@pytest.mark.parametrize("batch_size", [1, 5, 30])
def test_the_share_of_attention_on_images_is_that_of_samples_with_an_image(batch_size):
    samples = make_samples(first_has_image=False)
    callback = observe(samples, batch_size)
    record = callback.history[0]
    assert record["focus/text_to_image/cross_modal_mass"] == pytest.approx(share_on_images(samples), abs=1e-5)
    assert record["samples"] == SAMPLES
    assert record["wholly_masked"] == sum(not bool((one["ids"] == IMAGE_TOKEN).any()) for one in samples)


class Pictures(Decoder):
    """Image tokens come from pixels."""

    def __init__(self):
        super().__init__()
        self.picture = nn.Linear(4, WIDTH)

    def validation_step(self, batch, batch_idx):
        ids, x = batch["ids"], self.embed(batch["ids"])
        pictures = self.picture(batch["pixels"])
        x = torch.where((ids == IMAGE_TOKEN)[..., None], pictures[:, None], x)
        logits = self.head(self.attn(x, x, x, key_padding_mask=ids == PAD)[0].mean(1))
        return {"loss": F.cross_entropy(logits, batch["label"]), "logits": logits, "targets": batch["label"]}


def record_inputs(callback, samples):
    """What an evaluation keeps of each step's modalities."""
    kept, add = [], KeptSamples.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptSamples, "add", lambda self, inputs, *rest: kept.append(inputs) or add(self, inputs, *rest))
        quiet_trainer(callbacks=[callback]).validate(Pictures(), DataLoader(samples, 5), verbose=False)
    return kept


@pytest.mark.filterwarnings("ignore::lightning_xattn.core.errors.XAttnWarning")
def test_the_order_of_the_keys_in_the_attention_is_none_of_the_text_that_a_probe_gets():
    """A batch with a sample of text alone has as many places for text as tokens, but in another order."""
    samples = [one | {"pixels": torch.randn(4)} for one in make_samples()]
    found = []
    for attention in (JointSequence("attn", MASKS), {}):
        callback = AttentionExplainabilityCallback(
            attention=attention, modalities={"image": "picture", "text": "embed"}, contribution_samples=0
        )
        found.append(record_inputs(callback, samples))
    for one, other in zip(*found, strict=True):
        tokens, mask = one.tokens["text"]
        assert torch.equal(tokens, other.tokens["text"][0])
        assert mask is None or bool(mask.all())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_sequence_that_torch_crops_goes_with_a_mask_of_its_whole_length():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, dim_feedforward=8, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    ids = F.pad(torch.stack([one["ids"] for one in make_samples()[2:5]]), (0, 6))
    module = nn.ModuleDict({"embed": nn.Embedding(20, WIDTH), "encoder": encoder}).eval()
    joint = JointSequence("encoder.layers.0.self_attn", MASKS)
    with torch.no_grad(), AttentionRecorder(module, joint) as recorder:
        recorder.batch = {"ids": ids}
        encoder(module["embed"](ids), src_key_padding_mask=ids == PAD)
        (pair,) = recorder.attention
    assert pair.forward.key_mask.sum(1).tolist() == MASKS["text"]({"ids": ids}).sum(1).tolist()
    assert pair.forward.query_mask.sum(1).tolist() == [3, 3, 3]
