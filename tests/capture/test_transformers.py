"""Models of Hugging Face's, made from their configurations with random weights."""

import pytest
import torch

from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DiscoveryError
from tests.capture.models import Runs, record
from tests.messages import tells

LANGUAGE, VISION, BATCH, HEADS, LAYERS = 5, 7, 2, 3, 2


@pytest.fixture(scope="module")
def transformers():
    """Imported here, as it takes seconds."""
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def lxmert(transformers):
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 8, "num_attention_heads": HEADS, "vocab_size": 31}
    layers = {"l_layers": 1, "r_layers": 1, "x_layers": LAYERS}
    vision = {"visual_feat_dim": 6, "visual_pos_dim": 4}
    return transformers.LxmertModel(transformers.LxmertConfig(**sizes, **layers, **vision)).eval()


def lxmert_inputs():
    generator = torch.Generator().manual_seed(1)
    padding = torch.ones(BATCH, LANGUAGE, dtype=torch.long)
    padding[1, 3:] = 0
    return {
        "input_ids": torch.randint(31, (BATCH, LANGUAGE), generator=generator),
        "visual_feats": torch.randn(BATCH, VISION, 6, generator=generator),
        "visual_pos": torch.rand(BATCH, VISION, 4, generator=generator),
        "attention_mask": padding,
    }


@pytest.mark.filterwarnings("ignore:Found in the first pass")
@pytest.mark.parametrize("named", [True, False])
def test_lxmert_attends_in_both_directions_with_one_module(lxmert, named):
    """LXMERT runs one module first for language, then for vision, and returns the attention of the first alone."""
    inputs = lxmert_inputs()
    paths = [f"encoder.x_layers.{i}.visual_attention" for i in range(LAYERS)]
    pairs = record(
        lxmert,
        lambda m: m(**inputs, output_attentions=True),
        {"language_to_vision": paths, "vision_to_language": paths} if named else None,
    )
    assert len(pairs) == LAYERS
    with torch.no_grad():
        returned = lxmert(**inputs, output_attentions=True).cross_encoder_attentions
    for i, (pair, truth) in enumerate(zip(pairs, returned, strict=True)):
        assert pair.layer.startswith(f"encoder.x_layers.{i}.visual_attention")
        torch.testing.assert_close(pair.forward.weights, truth, atol=2e-6, rtol=1e-5)
        assert pair.backward.weights.shape == (BATCH, HEADS, VISION, LANGUAGE)
        real = inputs["attention_mask"].bool()
        assert torch.equal(pair.backward.key_mask, real)
        assert torch.equal(pair.forward.query_mask, real)
        assert (pair.backward.weights[1, :, :, 3:] == 0).all()


def bart(transformers, implementation):
    torch.manual_seed(0)
    sizes = {"d_model": 12, "vocab_size": 31, "max_position_embeddings": 16, "pad_token_id": 1}
    sizes |= {f"{part}_{what}": 8 for part in ("encoder", "decoder") for what in ("ffn_dim",)}
    layers = {f"{part}_layers": LAYERS for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": HEADS for part in ("encoder", "decoder")}
    config = transformers.BartConfig(**sizes, **layers, **heads, attn_implementation=implementation)
    return transformers.BartModel(config).eval()


def bart_inputs():
    generator = torch.Generator().manual_seed(1)
    padding = torch.ones(BATCH, VISION, dtype=torch.long)
    padding[1, 4:] = 0
    return {
        "input_ids": torch.randint(2, 31, (BATCH, VISION), generator=generator),
        "attention_mask": padding,
        "decoder_input_ids": torch.randint(2, 31, (BATCH, LANGUAGE), generator=generator),
        "use_cache": False,
    }


@pytest.mark.filterwarnings("ignore:Found in the first pass")
@pytest.mark.parametrize("named", [True, False])
def test_an_encoder_decoder_shows_the_same_with_sdpa_and_eager(transformers, named):
    inputs = bart_inputs()
    paths = [f"decoder.layers.{i}.encoder_attn" for i in range(LAYERS)]
    attention = {"target_to_source": paths} if named else None
    recorded = {kind: record(bart(transformers, kind), lambda m: m(**inputs), attention) for kind in ("sdpa", "eager")}
    with torch.no_grad():
        returned = bart(transformers, "eager")(**inputs, output_attentions=True).cross_attentions
    assert [pair.layer for pair in recorded["sdpa"]] == paths
    for fused, eager, truth in zip(recorded["sdpa"], recorded["eager"], returned, strict=True):
        torch.testing.assert_close(eager.forward.weights, truth)
        torch.testing.assert_close(fused.forward.weights, eager.forward.weights, atol=2e-6, rtol=1e-5)
        for pair in (fused, eager):
            assert torch.equal(pair.forward.key_mask, inputs["attention_mask"].bool())


def test_one_item_of_what_the_whole_model_returns(transformers):
    model, inputs = Runs(None, bart=bart(transformers, "eager")), bart_inputs()
    model.run = lambda m: m.bart(**inputs, output_attentions=True)
    (pair,) = record(model, lambda m: m(), {"target_to_source": "bart[cross_attentions][1]"})
    with torch.no_grad():
        assert torch.equal(pair.forward.weights, model().cross_attentions[1])


def test_equal_lengths_do_not_tell_a_direction(lxmert):
    inputs = lxmert_inputs()
    inputs |= {name: inputs[name][:, :LANGUAGE] for name in ("visual_feats", "visual_pos")}
    with AttentionRecorder(lxmert) as recorder, torch.no_grad():
        lxmert(**inputs)
        with pytest.raises(
            DiscoveryError,
            match=tells("ambiguous whether", "encoder.x_layers.0.visual_attention.att#1", "attention={'<a>_to_<b>'"),
        ):
            _ = recorder.attention


def trocr(transformers):
    from transformers.models.trocr.modeling_trocr import TrOCRForCausalLM

    sizes = {"d_model": 12, "decoder_ffn_dim": 8, "cross_attention_hidden_size": 12, "max_position_embeddings": 16}
    layers = {"decoder_layers": LAYERS, "decoder_attention_heads": HEADS}
    return TrOCRForCausalLM(transformers.TrOCRConfig(**sizes, **layers, vocab_size=31, pad_token_id=1))


def speecht5(transformers):
    from transformers.models.speecht5 import modeling_speecht5

    sizes = {"hidden_size": 12, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 31}
    layers = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("layerdrop", 0))}
    heads = {f"{part}_attention_heads": HEADS for part in ("encoder", "decoder")}
    config = transformers.SpeechT5Config(**sizes, **layers, **heads)
    parts = (getattr(modeling_speecht5, f"SpeechT5{part}WithTextPrenet")(config) for part in ("Encoder", "Decoder"))
    return transformers.SpeechT5Model(config, *parts)


def call(model, **inputs):
    """The model's outputs, of inputs that go with the names of its arguments."""
    shared = {"use_cache": False, "output_attentions": True}
    if "encoder_hidden_states" in inputs:
        return model(**inputs, **shared)
    names = {"input_ids": "decoder_input_values", "attention_mask": "decoder_attention_mask"}
    return model(**{names.get(name, name): value for name, value in inputs.items()}, **shared)


@pytest.mark.filterwarnings("ignore:Found in the first pass")
@pytest.mark.parametrize("make", [trocr, speecht5])
def test_heads_among_the_samples_and_padded_queries_as_in_fairseq(transformers, make):
    torch.manual_seed(0)
    model, generator = make(transformers).eval(), torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(2, 31, (BATCH, LANGUAGE), generator=generator)}
    inputs["attention_mask"] = torch.arange(LANGUAGE) < torch.tensor([[LANGUAGE], [3]])
    inputs["attention_mask"] = inputs["attention_mask"].long()
    if make is trocr:
        inputs["encoder_hidden_states"] = torch.randn(BATCH, VISION, 12, generator=generator)
    else:
        inputs["input_values"] = torch.randint(2, 31, (BATCH, VISION), generator=generator)
    recorder = AttentionRecorder(model)
    for _ in range(2):
        with torch.no_grad():
            expected = call(model, **inputs)
            with recorder:
                outputs = call(model, **inputs)
                pairs = recorder.attention
        assert torch.equal(outputs[0], expected[0])
        assert len(pairs) == LAYERS
        for pair, truth in zip(pairs, expected.cross_attentions, strict=True):
            assert torch.equal(pair.forward.weights, truth)
            assert torch.equal(pair.forward.query_mask, inputs["attention_mask"].bool())
