"""One self-attention over several modalities: its off-diagonal blocks are the directions."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_xattn import (
    AttentionExplainabilityCallback,
    ExplainabilityCapture,
    JointSequence,
    create_explainability_report,
)
from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.capture.joint import cut_direction
from lightning_xattn.capture.masks import RecordedWeights
from lightning_xattn.core.errors import DataError, DiscoveryError, SettingError, ShapeError, XAttnWarning
from lightning_xattn.evaluation.statistics import Column, sample_statistics
from lightning_xattn.functional import cross_modal_mass, prepare_layer, prepare_rows
from tests import reference
from tests.capture.models import BATCH, record, tokens
from tests.messages import tells
from tests.toy import AUDIO, HEADS, TEXT, WIDTH, ToyModule, quiet_trainer, validate

SPANS = {"audio": (0, AUDIO), "text": (AUDIO, None)}


class Joint(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.attend = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **settings)
        nn.init.normal_(self.attend.in_proj_weight, std=0.6)

    def forward(self, audio, text, **call):
        tokens = torch.cat([audio, text], dim=1)
        return self.attend(tokens, tokens, tokens, **call)


def padded():
    """The last two text tokens of the second sample, and the last audio token of the first one, are padding."""
    padding = torch.zeros(BATCH, AUDIO + TEXT, dtype=torch.bool)
    padding[1, -2:] = padding[0, AUDIO - 1] = True
    return padding


@pytest.mark.parametrize("padding", [None, padded()], ids=["whole", "padded"])
def test_blocks_are_renormalised_and_what_crosses_is_told(padding):
    model, (audio, text) = Joint(), tokens()
    (pair,) = record(model, lambda m: m(audio, text, key_padding_mask=padding), JointSequence("attend", SPANS))
    with torch.no_grad():
        _, whole = model(audio, text, key_padding_mask=padding, average_attn_weights=False)
    real = np.ones((BATCH, AUDIO + TEXT), bool) if padding is None else ~padding.numpy()
    for attention, queries, keys in (
        (pair.forward, range(AUDIO), range(AUDIO, AUDIO + TEXT)),
        (pair.backward, range(AUDIO, AUDIO + TEXT), range(AUDIO)),
    ):
        rows, found = prepare_rows(attention), sample_statistics(prepare_layer(attention))
        shares = cross_modal_mass(rows)
        for b in range(BATCH):
            block, share = reference.joint_block(whole[b].double().numpy(), queries, keys, real[b])
            assert shares[b].numpy() == pytest.approx(share, abs=1e-5)
            masks = real[b][list(queries)], real[b][list(keys)]
            entropy = reference.row_statistics(block, *masks)["entropy"]
            assert found[Column("entropy", rows.direction)][b].item() == pytest.approx(entropy.mean(), abs=1e-5)
            assert found[Column("cross_modal_mass", rows.direction)][b].item() == pytest.approx(share.mean(), abs=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["slow path", "fast path"])
def test_padding_is_told_from_an_attention_mask_that_it_was_merged_with(training):
    """torch's fast path gets both masks as one: a token that nobody sees, not even itself, is padding."""
    model, padding = Joint().train(training), padded()
    model.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True).train(training)  # 3 heads have no fast path
    causal = torch.ones(AUDIO + TEXT, AUDIO + TEXT, dtype=torch.bool).triu(1)
    with torch.no_grad(), AttentionRecorder(model, JointSequence("attend", SPANS)) as recorder:
        model(*tokens(), key_padding_mask=padding, attn_mask=causal, need_weights=False)
    (pair,) = recorder.attention
    real = dict(zip(SPANS, (~padding).split([AUDIO, TEXT], dim=1), strict=True))
    for attention in pair.directions:
        assert torch.equal(attention.query_mask, real[attention.direction.query])
        assert torch.equal(attention.key_mask, real[attention.direction.key])


@pytest.mark.filterwarnings("ignore:.*with weights of exactly 0")
@pytest.mark.filterwarnings("ignore:.*weights of exactly 0")
def test_a_row_of_which_nothing_crosses_is_left_out_and_is_not_broken():
    weights = torch.full((1, 1, 4, 4), 0.25)
    weights[0, 0, 0] = torch.tensor([0.5, 0.5, 0, 0])
    weights[0, 0, 1] = torch.tensor([1.0, 0, 1e-40, 0])  # too little to say how it is spread
    attention = cut_direction(RecordedWeights(weights), slice(0, 2), slice(2, 4), "x")
    joint = nn.Module()
    joint.x = nn.Identity()
    with AttentionRecorder(joint, JointSequence("x", {"a": (0, 2), "b": (2, 4)})) as recorder:
        joint.x(weights)
    rows = prepare_rows(recorder.attention[0].forward)
    assert (attention.cross_modal_mass < 1e-30).all()
    assert not rows.valid.any()
    assert not rows.broken.any()
    assert cross_modal_mass(rows).item() == pytest.approx(0, abs=1e-30)
    assert sample_statistics(prepare_layer(rows))[Column.parse("a_to_b/entropy")].isnan().all()


def test_what_crosses_in_a_row_that_is_no_attention_is_not_told():
    """A row sums to 1.5, another one is of padding, and two sum to 1 within bfloat16's rounding, 1 / 32, and not."""
    weights = torch.full((1, 1, 5, 5), 0.2)
    weights[0, 0, 0] *= 1.5
    real = torch.tensor([[True, False, True, True, True]])
    found = cut_direction(RecordedWeights(weights, key_mask=real), slice(0, 3), slice(3, 5), "x").cross_modal_mass
    torch.testing.assert_close(found, torch.tensor([[[torch.nan, torch.nan, 0.4]]]), equal_nan=True)
    weights = torch.tensor([[0.5, 0.53125, 0], [0.5, 0.546875, 0], [0, 0, 1]]).bfloat16()[None, None]
    found = cut_direction(RecordedWeights(weights), slice(0, 2), slice(2, 3), "x").cross_modal_mass
    torch.testing.assert_close(found, torch.tensor([[[0, torch.nan]]]), equal_nan=True)


def test_three_modalities_and_a_class_token_of_none():
    """The first and the last of 12 tokens are in no span: behind the spans that takes a word."""
    spans = {"a": (1, 3), "b": (3, 6), "c": (6, 11)}
    model = Joint(add_zero_attn=True)
    with AttentionRecorder(model, JointSequence("attend", spans)) as recorder:
        model(*tokens())
    with pytest.raises(ShapeError, match=tells("'attend'", "12 tokens", "for 11", "JointSequence(..., length=12)")):
        _ = recorder.attention
    with AttentionRecorder(model, JointSequence("attend", spans, length=12)) as recorder:
        model(*tokens())
    shapes = {
        str(attention.direction): tuple(attention.weights.shape[2:])
        for pair in recorder.attention
        for attention in pair.directions
    }
    sizes = {"a": 2, "b": 3, "c": 5}
    assert shapes == {f"{x}_to_{y}": (sizes[x], sizes[y]) for x in "abc" for y in "abc" if x != y}
    assert [pair.layer for pair in recorder.attention] == ["attend.a_to_b", "attend.a_to_c", "attend.b_to_c"]


def test_spans_and_attention_that_do_not_fit():
    model, (audio, text) = Joint(), tokens()
    for spans, facts in (
        ({"a": (0, 5), "b": (5, 13)}, ("12 tokens", "are for 13")),
        ({"a": (0, 5), "b": (12, None)}, ("13 tokens", "12 queries", "12 keys")),
    ):
        with AttentionRecorder(model, JointSequence("attend", spans)) as recorder:
            model(audio, text)
        with pytest.raises(ShapeError, match=tells("'attend'", *facts)):
            _ = recorder.attention
    with AttentionRecorder(model, JointSequence("attend", SPANS)) as recorder:
        model.attend(audio, text, text)
    with pytest.raises(ShapeError, match=tells("'attend'", "6 tokens", "5 queries", "7 keys")):
        _ = recorder.attention


class JointModule(ToyModule):
    def __init__(self):
        super().__init__()
        self.joint = Joint()

    def forward(self, audio, text):
        fused, _ = self.joint(self.audio(audio), self.text(text))
        return self.head(torch.cat([fused[:, :AUDIO].mean(1), fused[:, AUDIO:].mean(1)], dim=1))


def test_what_crosses_is_a_curve():
    joint = JointSequence("joint.attend", SPANS)
    module = JointModule()
    logged = validate(module, AttentionExplainabilityCallback(joint, curves="all", figures_every_n_epochs=0))
    for name in ("audio_to_text", "text_to_audio"):
        assert 0 < logged[f"xattn_focus/val/{name}/cross_modal_mass"] < 1
    assert -1 <= logged["xattn_alignment/val/all"] <= 1
    spans = {"audio": lambda batch: (0, batch[0].shape[1]), "text": lambda batch: (AUDIO, None)}
    of_the_batch = AttentionExplainabilityCallback(
        JointSequence("joint.attend", spans), curves="all", figures_every_n_epochs=0
    )
    assert validate(module, of_the_batch) == logged
    logged = validate(ToyModule(), AttentionExplainabilityCallback(curves="all", figures_every_n_epochs=0))
    assert "xattn_focus/val/audio_to_text/cross_modal_mass" not in logged


IMAGE = 4
FROM_THE_END = {"text": (0, -IMAGE), "image": (-IMAGE, None)}
OF_THE_BATCH = {"text": lambda batch: (0, len(batch[0]) - IMAGE), "image": (-IMAGE, None)}


@pytest.mark.parametrize("spans", [FROM_THE_END, OF_THE_BATCH], ids=["from the end", "of the batch"])
def test_a_text_as_long_as_the_longest_of_each_batch(spans):
    model = nn.ModuleDict({"attend": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)})
    model.forward = lambda x: model["attend"](x, x, x)
    recorder = AttentionRecorder(model, JointSequence("attend", spans))
    for length in (9, 7, 9):
        x = torch.randn(BATCH, length, WIDTH, generator=torch.Generator().manual_seed(length))
        with torch.no_grad(), recorder:
            model(x)
            (pair,) = recorder.attention
            whole = model["attend"](x, x, x, average_attn_weights=False)[1]
        block = whole[:, :, : length - IMAGE, length - IMAGE :]
        torch.testing.assert_close(prepare_rows(pair.forward).cross_modal_mass, block.sum(-1))
        torch.testing.assert_close(pair.forward.weights, block / block.sum(-1, keepdim=True))


def attending(spans, length=None):
    """A recorder of a joint sequence, and what it takes of sequences of these lengths, one after the other."""
    model = nn.ModuleDict({"attend": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)})
    recorder = AttentionRecorder(model, JointSequence("attend", spans, length))

    def take(tokens):
        with recorder:
            x = torch.randn(BATCH, tokens, WIDTH)
            model["attend"](x, x, x)
            return recorder.attention

    return recorder, take


FIXED = [
    {"text": (0, 5), "image": (5, 9)},
    {"text": (-9, -4), "image": (-4, None)},
    {"text": (0, 5), "image": (-4, None)},  # tokens between the two belong to nobody
]


@pytest.mark.parametrize("spans", FIXED)
def test_the_first_sequence_has_the_length_that_fixed_spans_are_for_and_later_ones_are_left_out(spans):
    """Whatever was recorded before, as with each recorder that a Trainer's callback makes."""
    facts = "'attend'", "for 9", spans, "(-144, None)", "callable"
    for length, hint in ((12, ("JointSequence(..., length=12)",)), (8, ())):
        _, take = attending(spans)
        with pytest.raises(ShapeError, match=tells(*facts, f"has {length} tokens", *hint)) as raised:
            take(length)
        assert ("length=" in str(raised.value)) == bool(hint), "nothing is in no span"
    recorder, take = attending(spans)
    assert take(9)[0].forward.weights.shape[2:] == (5, 4)
    assert recorder.left_out == {}
    with pytest.warns(XAttnWarning, match=tells(*facts, "has 12 tokens", "left out and counted")):
        assert take(12) == ()
    for length in (8, 12, 11):  # it is said once
        assert take(length) == ()
        assert recorder.left_out == {"attend": BATCH}
    assert len(take(9)) == 1
    assert recorder.left_out == {}


def test_a_length_that_is_told_goes_before_the_spans():
    """Behind the spans, and where the last one reaches to the end."""
    for spans, of_image in (({"text": (0, 5), "image": (5, 9)}, 4), ({"text": (0, 5), "image": (5, None)}, 7)):
        recorder, take = attending(spans, length=12)
        assert take(12)[0].forward.weights.shape[2:] == (5, of_image)
        with pytest.warns(XAttnWarning, match=tells("'attend'", "has 9 tokens", "for 12")):
            assert take(9) == ()
        assert recorder.left_out == {"attend": BATCH}


@pytest.mark.parametrize(
    ("spans", "length", "expected"),
    [
        ({"a": (0, 9), "b": (9, 128)}, None, 128),
        ({"a": (9, 128), "b": (1, 9)}, None, 128),
        ({"a": (-9, -4), "b": (-4, -1)}, None, 9),
        ({"a": (0, 5), "b": (7, 9), "c": (-4, -2)}, None, 13),
        ({"a": (0, 9), "b": (9, None)}, None, None),
        ({"a": (0, -9), "b": (-9, None)}, None, None),
        ({"a": (0, 5), "b": (6, -7), "c": (-6, None)}, None, None),
        ({"a": (0, 5), "b": lambda batch: (5, 9)}, None, None),
        ({"a": (0, 5), "b": lambda batch: (5, 9)}, 10, 10),
        ({"a": (0, -8), "b": (5, None)}, 13, 13),
    ],
)
def test_how_long_the_sequence_must_be(spans, length, expected):
    assert JointSequence("x", spans, length).expected_length == expected


REFUSED = [
    ({"a": (0, 5)}, {}, ("two modalities", {"a": (0, 5)})),
    ({"a": (0, 5), "b": (4, 9)}, {}, ("overlap", "that of 'b'")),
    ({"a": (0, None), "b": (4, 9)}, {}, ("overlap", "that of 'b'")),
    ({"a": (-4, -2), "b": (-3, None)}, {}, ("overlap", "that of 'b'")),
    ({"a": (0, 5), "b": (5, 5)}, {}, ("hold tokens", "that of 'b'")),
    ({"a": (0, 5), "b": 5}, {}, ("span of 'b'", "(start, stop)", "callable", "got 5")),
    ({"a": (-2, 5), "b": (5, 7)}, {}, ("span of 'a'", "(start, stop)", "got (-2, 5)")),
    ({"a": (0, 5), "b": (5, 7)}, {"path": []}, ("module path", "got []")),
    ({"a_to_c": (0, 5), "b": (5, 7)}, {}, ("'<query>_to_<key>'", "got 'a_to_c_to_b'")),
    ({"a": (0, -8), "b": (5, None)}, {}, ("overlap", "whatever its length", "length=128")),
    ({"a": (9, 20), "b": (0, -144)}, {}, ("overlap", "whatever its length", "length=128")),
    ({"a": (9, None), "b": (-4, None)}, {}, ("overlap", "whatever its length", "length=128")),
    ({"a": (0, -8), "b": (5, None)}, {"length": 14}, ("overlap", "that of 'b'")),
    ({"a": (0, 5), "b": (5, 9)}, {"length": 8}, ("'b'", (5, 9), "length=8")),
    ({"a": (0, 5), "b": (-4, None)}, {"length": 3}, ("'a'", (0, 5), "length=3")),
    ({"a": (0, 5), "b": (5, 9)}, {"length": 0}, ("length", "whole number >= 1", "got 0")),
    ({"a": (0, 5), "b": (5, 9)}, {"length": 9.0}, ("length", "whole number", "got 9.0")),
]


@pytest.mark.parametrize(("spans", "settings", "facts"), REFUSED)
def test_spans_that_do_not_go_with_each_other_or_a_length(spans, settings, facts):
    with pytest.raises(SettingError, match=tells(*facts)):
        JointSequence(settings.get("path", "x"), spans, settings.get("length"))


class Lengths(JointModule):
    """A batch's first item is a list of sequences of one length, of which the last four tokens are the image."""

    def forward(self, x):
        fused, _ = self.joint.attend(x, x, x)
        return self.head(torch.cat([fused[:, :1].mean(1), fused[:, -4:].mean(1)], dim=1))

    def validation_step(self, batch, batch_idx):
        return {"logits": self(batch[0]), "targets": batch[1]}

    test_step = validation_step


def of_lengths(*lengths, samples=3):
    """A batch of each length; those after the third have five samples."""
    generator = torch.Generator().manual_seed(0)
    sizes = [samples if i < 3 else 5 for i in range(len(lengths))]
    return torch.utils.data.DataLoader(
        [
            (torch.randn(n, tokens, WIDTH, generator=generator), torch.arange(n) % 4)
            for n, tokens in zip(sizes, lengths, strict=True)
        ],
        batch_size=None,
    )


@pytest.mark.filterwarnings("ignore:.*Such steps are left out and counted", "ignore:.*changes its length")
def test_samples_of_another_length_are_counted_and_in_no_number():
    module, spans = Lengths(), {"text": (0, 5), "image": (5, 9)}
    settings = {"contribution_samples": 0, "figures_every_n_epochs": 0}
    mode = AttentionExplainabilityCallback(JointSequence("joint.attend", spans), **settings)
    found = validate(module, mode, of_lengths(9, 12, 9, 11, 9))
    same = AttentionExplainabilityCallback(JointSequence("joint.attend", spans), **settings)
    kept = [batch for batch in of_lengths(9, 12, 9, 11, 9) if batch[0].shape[1] == 9]
    assert found == validate(module, same, torch.utils.data.DataLoader(kept, batch_size=None))
    (record,), (without,) = mode.history, same.history
    assert (record["samples"], record["other_lengths"]) == (11, 8)
    assert (without["samples"], without["other_lengths"]) == (11, 0)
    # Whatever was fitted before, another recorder takes no other length.
    trainer = quiet_trainer(callbacks=[mode])
    with pytest.raises(ShapeError, match=tells("'joint.attend'", "12 tokens", "for 9")):
        trainer.test(module, of_lengths(12, 9), verbose=False)


@pytest.mark.filterwarnings("ignore:.*Such steps are left out and counted")
def test_the_explainer_leaves_out_samples_of_another_length_and_goes_on(tmp_path):
    pytest.importorskip("pyarrow")
    from lightning_xattn.evaluation.table import read_rows

    class Only(Lengths):
        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    model = Only()
    joint = JointSequence("joint.attend", {"text": (0, 5), "image": (5, 9)})
    explainer = ExplainabilityCapture(model, attention=joint, contribution_samples=0)
    whole = explainer.explain_loader(of_lengths(9, 12, 9, 11, 9), table=tmp_path, progress=False)
    assert whole.headline.samples == 11
    assert whole.other_lengths == {"joint.attend": 8}
    places = [row["sample_idx"] for row in read_rows(tmp_path, "joint.attend", ("sample_idx",))]
    assert places == [0, 1, 2, 6, 7, 8, *range(14, 19)]
    assert "8: their joint sequence has another length" in create_explainability_report(whole, format="markdown")
    again = explainer.explain_loader(of_lengths(9, 12, 9, 11, 9), table=tmp_path, progress=False)
    assert again.other_lengths == whole.other_lengths
    with pytest.raises(DataError, match=tells("3 samples", "do not have the length")):
        explainer.explain_batch(next(iter(of_lengths(12))))
    with pytest.raises(DataError, match=tells("first batch", "another length")):
        explainer.explain_loader(of_lengths(12, 9), progress=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_spans_from_the_end_of_a_sequence_that_torch_has_packed_are_refused():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 1)}).eval()
    hidden = torch.arange(9) >= torch.tensor([[8], [6]])
    with torch.no_grad(), AttentionRecorder(model, JointSequence("encoder", FROM_THE_END)) as recorder:
        model["encoder"](torch.randn(BATCH, 9, WIDTH), src_key_padding_mask=hidden)
        with pytest.raises(DiscoveryError, match=tells("'encoder.layers.0'", "enable_nested_tensor=False")):
            _ = recorder.attention


def test_a_span_of_a_callable_is_checked():
    model = nn.ModuleDict({"attend": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)})
    x = torch.randn(BATCH, 9, WIDTH)
    for span, facts in (
        (lambda batch: 5, ("'text'", "(start, stop)", "(-144, None)", "callable", "got 5")),
        (lambda batch: (0, 7), ("'attend'", "9 tokens", "overlap", (0, 7), (-4, None))),
    ):
        with AttentionRecorder(model, JointSequence("attend", {"text": span, "image": (-4, None)})) as recorder:
            model["attend"](x, x, x)
            with pytest.raises((SettingError, ShapeError), match=tells(*facts)):
                _ = recorder.attention


def test_a_sequence_that_changes_its_length_under_a_span_that_takes_up_the_rest():
    spans = {"text": (0, 5), "image": (5, None)}
    recorder, take = attending(spans)
    take(9)
    with pytest.warns(XAttnWarning, match=tells("'attend'", 9, 12, "last modality", spans, "(-144, None)", "callable")):
        assert take(12)[0].forward.weights.shape[2:] == (5, 7)
    assert recorder.left_out == {}
    with pytest.warns(XAttnWarning, match=tells("'attend'", "6 tokens", "5 queries", "5 keys", "left out")):
        assert take(5) == ()


IMAGE_TOKEN, PAD = 7, 0
IDS = torch.tensor([[0, 0, 3, 7, 7, 7, 4, 5], [1, 7, 7, 2, 3, 7, 4, 9], [0, 0, 0, 0, 7, 7, 1, 2]])


class Decoder(nn.Module):
    """Causal self-attention over words and image tokens, padded on the left."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attn = nn.Embedding(20, 12), nn.MultiheadAttention(12, 3, batch_first=True)
        nn.init.normal_(self.attn.in_proj_weight)

    def forward(self, batch):
        ids = batch["input_ids"]
        x, causal = self.embed(ids), torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        return self.attn(x, x, x, attn_mask=causal, key_padding_mask=ids == PAD, average_attn_weights=False)


def test_masks_of_tokens_that_stand_elsewhere_in_each_sample():
    masks = {
        "image": lambda batch: batch["input_ids"] == IMAGE_TOKEN,
        "text": lambda batch: (batch["input_ids"] != IMAGE_TOKEN) & (batch["input_ids"] != PAD),
    }
    model = Decoder().eval()
    with torch.no_grad(), AttentionRecorder(model, JointSequence("attn", masks)) as recorder:
        _, weights = model({"input_ids": IDS})
    (pair,) = recorder.attention
    for direction in pair.directions:
        for b, ids in enumerate(IDS):
            places = {
                "image": (ids == IMAGE_TOKEN).nonzero()[:, 0],
                "text": ((ids != IMAGE_TOKEN) & (ids != PAD)).nonzero()[:, 0],
            }
            queries, keys = places[str(direction.direction.query)], places[str(direction.direction.key)]
            block = weights[b][:, queries][:, :, keys]
            mass = block.sum(-1)
            seen = mass > 0
            shape = slice(None), slice(len(queries))
            torch.testing.assert_close(prepare_rows(direction).cross_modal_mass[b][shape], mass)
            found = direction.weights[b][(*shape, slice(len(keys)))]
            torch.testing.assert_close(found[seen], (block / mass[..., None])[seen])
            assert direction.key_mask[b].tolist() == [k < len(keys) for k in range(direction.weights.shape[-1])]
            assert direction.query_mask[b].tolist() == [q < len(queries) for q in range(direction.weights.shape[-2])]
            assert not direction.visible[b][shape][~seen].any()


def test_masks_that_do_not_fit():
    model = Decoder().eval()
    for masks, facts in (
        ({"a": lambda batch: IDS == IMAGE_TOKEN, "b": lambda batch: IDS > 3}, ("must not share tokens", "'attn'")),
        ({"a": lambda batch: IDS[:, 1:] == IMAGE_TOKEN, "b": (0, 1)}, ("(3, 8)", "(3, 7)", "'attn'")),
    ):
        with torch.no_grad(), AttentionRecorder(model, JointSequence("attn", masks)) as recorder:
            model({"input_ids": IDS})
        with pytest.raises(ShapeError, match=tells(*facts)):
            _ = recorder.attention
