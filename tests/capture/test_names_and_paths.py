"""Which layers are found by name, which by path, and what a wrong name is told."""

import pytest
from torch import nn

from lightning_xattn.capture import locate_attention
from lightning_xattn.core.attention import Direction
from lightning_xattn.core.errors import DiscoveryError, SettingError
from tests.messages import tells


def attention():
    return nn.MultiheadAttention(4, 2)


def module(**children):
    root = nn.Module()
    for path, child in children.items():
        parent, parts = root, path.split("__")
        for part in parts[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(parts[-1], child)
    return root


def found(root, paths=None):
    return [
        (layer.name, *(f"{direction}: {path}" for direction, path in layer.sources))
        for layer in locate_attention(root, paths)
    ]


@pytest.mark.parametrize(
    ("there", "back", "direction"),
    [
        ("eeg_to_spec_attn", "spec_to_eeg_attn", "eeg_to_spec"),
        ("cross_attn_eeg_to_spec", "cross_attn_spec_to_eeg", "eeg_to_spec"),
        ("raw_eeg_to_spec", "spec_to_raw_eeg", "raw_eeg_to_spec"),
        ("eeg_to_spec_attn1", "spec_to_eeg_attn1", "eeg_to_spec"),
        ("fuse_eeg_to_spec_xattn", "fuse_spec_to_eeg_xattn", "eeg_to_spec"),
    ],
)
def test_names_that_say_the_direction(there, back, direction):
    root = module(
        **{f"model__fusion__{there}": attention(), f"model__fusion__{back}": attention(), "other": attention()}
    )
    opposite = Direction.parse(direction).opposite
    ((layer, *sites),) = found(root)
    assert layer.startswith("model.fusion")
    assert sites == [f"{direction}: model.fusion.{there}", f"{opposite}: model.fusion.{back}"]


def test_layers_in_lists_and_blocks():
    root = nn.Module()
    root.eeg_to_spec_attn = nn.ModuleList([attention(), attention()])
    root.spec_to_eeg_attn = nn.ModuleList([attention(), attention()])
    root.blocks = nn.ModuleList(
        [module(a_to_b__cross=attention(), a_to_b__self_attn=attention(), b_to_a__cross=attention())]
    )
    assert found(root) == [
        ("0", "eeg_to_spec: eeg_to_spec_attn.0", "spec_to_eeg: spec_to_eeg_attn.0"),
        ("1", "eeg_to_spec: eeg_to_spec_attn.1", "spec_to_eeg: spec_to_eeg_attn.1"),
        ("blocks.0.cross", "a_to_b: blocks.0.a_to_b.cross", "b_to_a: blocks.0.b_to_a.cross"),
    ]


def test_numbered_layers():
    names = ("eeg_to_spec_1", "spec_to_eeg_1", "eeg_to_spec_2", "spec_to_eeg_2")
    assert found(module(**{f"f__{name}": attention() for name in names})) == [
        ("f.1", "eeg_to_spec: f.eeg_to_spec_1", "spec_to_eeg: f.spec_to_eeg_1"),
        ("f.2", "eeg_to_spec: f.eeg_to_spec_2", "spec_to_eeg: f.spec_to_eeg_2"),
    ]


def test_one_direction_alone_and_three_modalities():
    assert found(module(text_to_image_attn=attention())) == [("text_to_image", "text_to_image: text_to_image_attn")]
    three = {f"{a}_to_{b}": attention() for a in "xyz" for b in "xyz" if a != b}
    assert found(module(**three)) == [
        ("x_to_y", "x_to_y: x_to_y", "y_to_x: y_to_x"),
        ("x_to_z", "x_to_z: x_to_z", "z_to_x: z_to_x"),
        ("y_to_z", "y_to_z: y_to_z", "z_to_y: z_to_y"),
    ]


def test_named_paths_and_several_layers():
    root = module(f__a=attention(), f__b=attention(), g__a=attention(), g__b=attention())
    paths = {"eeg_to_spec": ["f.a", "g.a"], "spec_to_eeg": ["f.b", "g.b"]}
    assert found(root, paths) == [
        ("f", "eeg_to_spec: f.a", "spec_to_eeg: f.b"),
        ("g", "eeg_to_spec: g.a", "spec_to_eeg: g.b"),
    ]


def test_containers_that_are_known_stand_for_what_they_hold():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2), 2)
    root = module(decoder=decoder, block__cross=attention(), block__mlp=nn.Linear(2, 2))
    layers = ["decoder.layers.0.multihead_attn", "decoder.layers.1.multihead_attn"]
    assert found(root, {"a_to_b": "decoder"}) == [(path, f"a_to_b: {path}") for path in layers]
    assert found(root, {"a_to_b": "decoder.layers"}) == found(root, {"a_to_b": "decoder"})
    assert found(root, {"a_to_b": "decoder.layers.1"}) == [(layers[1], f"a_to_b: {layers[1]}")]
    assert found(root, {"a_to_b": "block"}) == [("block", "a_to_b: block")]
    with pytest.raises(DiscoveryError, match=tells("a_to_b", *layers, "b_to_a", "block", "one by one")):
        locate_attention(root, {"a_to_b": "decoder", "b_to_a": "block"})


def test_one_module_for_two_directions_takes_turns():
    root = module(x__cross=attention())
    (layer,) = locate_attention(root, {"a_to_b": "x.cross", "b_to_a": "x.cross"})
    assert [(source.turn, source.turns) for _, source in layer.sources] == [(0, 2), (1, 2)]
    assert layer.name == "x.cross"
    (layer,) = locate_attention(root, {"a_to_b": "x[1]", "b_to_a": "x['back'][0]"})
    assert [source.item for _, source in layer.sources] == [(1,), ("back", 0)]


def test_layers_that_share_a_module_are_refused():
    shared = attention()
    root = module(one__cross=shared, two__cross=shared)
    with pytest.raises(DiscoveryError, match=tells("one.cross", "two.cross", "one module", "once")):
        locate_attention(root, {"a_to_b": ["one.cross", "two.cross"]})
    (layer,) = locate_attention(root, {"a_to_b": "one.cross", "b_to_a": "two.cross"})
    assert [(source.path, source.turn) for _, source in layer.sources] == [("one.cross", 0), ("one.cross", 1)]


def test_nothing_that_a_name_tells_is_left_to_a_first_pass():
    assert locate_attention(module(model__fuse=attention(), model__linear=nn.Linear(2, 2))) == ()


def test_errors_say_what_there_is():
    root = module(model__fuse=attention(), model__linear=nn.Linear(2, 2))
    with pytest.raises(DiscoveryError, match=tells("'model.fusion'", "Did you mean 'model.fuse'", "Found: model.fuse")):
        locate_attention(root, {"eeg_to_spec": "model.fusion"})
    with pytest.raises(DiscoveryError, match=tells("'x'", "a_to_b", "Linear has no nn.MultiheadAttention")):
        locate_attention(nn.Linear(2, 2), {"a_to_b": "x"})
    with pytest.raises(SettingError, match=tells("1 layer(s) for eeg_to_spec", "2 for spec_to_eeg", "one by one")):
        locate_attention(root, {"eeg_to_spec": "a", "spec_to_eeg": ["b", "c"]})
    assert locate_attention(root, {}) == (), "none is recorded"
    for paths in ({"a_to_b": 3}, {"a_to_b": []}, ["a_to_b"], "a_to_b", {"a_to_b": ["x", None]}):
        with pytest.raises(SettingError, match=tells("'eeg_to_spec': 'model.fusion.a'", f"got {paths!r}")):
            locate_attention(root, paths)
    with pytest.raises(SettingError, match=tells("twice", "a_to_b", ["model.fuse", "model.fuse"])):
        locate_attention(root, {"a_to_b": ["model.fuse", "model.fuse"]})
    with pytest.raises(SettingError, match=tells("'model.fusion#2'", "'model.fusion[1]'", "got 'model[0'")):
        locate_attention(root, {"a_to_b": "model[0"})


@pytest.mark.parametrize("name", ["eeg", "eeg_to_", "_to_spec", "eeg_to_eeg", "a_to_b_to_c"])
def test_direction_names(name):
    with pytest.raises(SettingError, match=tells("'<query>_to_<key>'", "'eeg_to_spec'", f"got '{name}'")):
        Direction.parse(name)
