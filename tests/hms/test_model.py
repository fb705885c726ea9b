"""The reference model: what its tokens hold, that its attention is one, and that it learns, saves and complains."""

import math
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data
from torch_geometric.nn import global_mean_pool

from lightning_xattn.core.errors import DataError, SettingError, ShapeError
from lightning_xattn.hms.model import CrossModalFusion, HMSNetwork, JoinedWindows
from lightning_xattn.hms.module import HMSLightningModule, learning_rate_factor
from lightning_xattn.hms.montage import CLASSES, EEG_EDGES, SPEC_EDGES
from tests.messages import tells
from tests.toy import quiet_trainer

WINDOWS = {"eeg": 5, "spec": 7}


def graph(modality: str, generator: torch.Generator) -> Data:
    """One window of one sample, at the level of raw log powers."""
    nodes, features, pairs = (19, 5, EEG_EDGES) if modality == "eeg" else (4, 4, SPEC_EDGES)
    edge_index = torch.tensor(pairs).T
    data = Data(x=torch.randn(nodes, features, generator=generator) - 8, edge_index=edge_index)
    if modality == "eeg":
        data.edge_attr = torch.rand(edge_index.shape[1], 1, generator=generator)
    return data


def recordings(samples: int, seed: int = 0) -> dict[str, list[list[Data]]]:
    """For each modality, for each window, a graph per sample."""
    generator = torch.Generator().manual_seed(seed)
    return {
        modality: [[graph(modality, generator) for _ in range(samples)] for _ in range(windows)]
        for modality, windows in WINDOWS.items()
    }


def batched(windows: list[list[Data]]) -> list[Batch]:
    return [Batch.from_data_list(window) for window in windows]


def inputs(samples: int = 3, seed: int = 0) -> tuple[list[Batch], list[Batch]]:
    graphs = recordings(samples, seed)
    return batched(graphs["eeg"]), batched(graphs["spec"])


@pytest.fixture
def network() -> HMSNetwork:
    torch.manual_seed(0)
    return HMSNetwork().eval()


def test_attention_is_per_head_and_rows_sum_to_one(network: HMSNetwork) -> None:
    """Asking for it changes nothing."""
    network.train()
    eeg_graphs, spec_graphs = inputs()
    eeg, spec = network.eeg_encoder(eeg_graphs), network.spec_encoder(spec_graphs)
    queries, keys = 5, 7
    assert eeg.shape == (3, queries, 256)
    assert spec.shape == (3, keys, 256)
    torch.manual_seed(1)
    alone = network.fusion(eeg, spec)
    torch.manual_seed(1)
    fused, attention = network.fusion(eeg, spec, return_attention=True)
    assert torch.equal(alone, fused)
    assert fused.shape == (3, 512)
    assert network.fusion.eeg_to_spec_attn.num_heads == 8, "as published"
    assert attention["eeg_to_spec"].shape == (3, 8, queries, keys)
    assert attention["spec_to_eeg"].shape == (3, 8, keys, queries)
    for weights in attention.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.std() > 0


def test_directions_are_not_swapped() -> None:
    """A changed spectrogram token is one key of ``eeg_to_spec`` and one query of ``spec_to_eeg``."""
    torch.manual_seed(0)
    fusion = CrossModalFusion(32, heads=4, dropout=0.0).eval()
    eeg, spec = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    _, before = fusion(eeg, spec, return_attention=True)
    spec[:, 6] = torch.randn(2, 32)
    _, after = fusion(eeg, spec, return_attention=True)
    ratio = after["eeg_to_spec"] / before["eeg_to_spec"]
    torch.testing.assert_close(ratio[..., :6], ratio[..., :1].expand(2, 4, 5, 6))
    assert torch.equal(after["spec_to_eeg"][:, :, :6], before["spec_to_eeg"][:, :, :6])
    assert not torch.allclose(after["spec_to_eeg"][:, :, 6], before["spec_to_eeg"][:, :, 6])


@pytest.mark.parametrize("modality", ["eeg", "spec"])
def test_one_big_graph_equals_window_by_window(network: HMSNetwork, modality: str) -> None:
    encoder = network.eeg_encoder if modality == "eeg" else network.spec_encoder
    windows = batched(recordings(samples=3)[modality])
    slow = []
    for window in windows:
        nodes = encoder.graphs(window.x, window.edge_index, window.edge_attr if modality == "eeg" else None)
        slow.append(global_mean_pool(nodes, window.batch))
    expected = encoder.time(torch.stack(slow, dim=1))[0]
    torch.testing.assert_close(encoder(windows), expected)


def test_joined_windows_keep_each_edge_in_its_own_graph() -> None:
    windows = batched(recordings(samples=2)["spec"])
    joined = JoinedWindows.from_windows(windows, "spectrogram", edge_attr=False)
    assert (joined.windows, joined.samples, joined.edge_attr) == (7, 2, None)
    source, target = joined.graph[joined.edge_index]
    assert torch.equal(source, target)
    assert torch.equal(torch.bincount(source), torch.full((14,), len(SPEC_EDGES)))
    assert torch.equal(joined.x[joined.graph == 6 * 2 + 1], windows[6][1].x)


def test_edges_and_their_weights_matter(network: HMSNetwork) -> None:
    encoder = network.eeg_encoder
    windows = batched(recordings(samples=2)["eeg"])
    before = encoder(windows)
    windows[4].edge_attr = windows[4].edge_attr + 1
    assert not torch.allclose(encoder(windows), before)


def test_eval_is_reproducible_and_samples_do_not_mix(network: HMSNetwork) -> None:
    graphs = recordings(samples=4)
    order = [2, 0, 3, 1]
    shuffled = {name: [[w[i] for i in order] for w in windows] for name, windows in graphs.items()}
    logits = network(batched(graphs["eeg"]), batched(graphs["spec"]))
    assert logits.shape == (4, len(CLASSES))
    assert torch.equal(logits, network(batched(graphs["eeg"]), batched(graphs["spec"])))
    torch.testing.assert_close(network(batched(shuffled["eeg"]), batched(shuffled["spec"])), logits[order])
    assert not torch.allclose(logits[order], logits)


def test_graphs_of_unequal_size(network: HMSNetwork) -> None:
    graphs = recordings(samples=3)
    for windows in graphs.values():
        windows[1][2] = windows[1][2].subgraph(torch.arange(3))
    logits = network(batched(graphs["eeg"]), batched(graphs["spec"]))
    for i in range(3):
        alone = network([[w[i]] for w in graphs["eeg"]], [[w[i]] for w in graphs["spec"]])
        torch.testing.assert_close(logits[[i]], alone)


def planted(samples: int) -> dict[str, object]:
    """Class c raises feature c of every EEG node, and the last class the spectrogram's first one."""
    graphs = recordings(samples, seed=1)
    classes = torch.arange(samples) % len(CLASSES)
    for window in graphs["eeg"]:
        for data, label in zip(window, classes.tolist(), strict=True):
            if label < 5:
                data.x[:, label] += 2
    for window in graphs["spec"]:
        for data, label in zip(window, classes.tolist(), strict=True):
            if label == 5:
                data.x[:, 0] += 2
    targets = 0.9 * torch.nn.functional.one_hot(classes, len(CLASSES)) + 0.1 / len(CLASSES)
    return {"eeg_graphs": batched(graphs["eeg"]), "spec_graphs": batched(graphs["spec"]), "targets": targets}


def loader(batches: list[dict[str, object]]) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def fit(module: HMSLightningModule, batches: list[dict[str, object]], epochs: int) -> pl.Trainer:
    running = quiet_trainer(max_epochs=epochs)
    running.fit(module, loader(batches), loader(batches))
    running.test(module, loader(batches), verbose=False)
    return running


@pytest.mark.slow
def test_learns_logs_and_comes_back_from_a_checkpoint(tmp_path) -> None:
    torch.manual_seed(0)
    module = HMSLightningModule(num_heads=4, lr=3e-3)
    assert module.class_names == CLASSES
    batch = planted(samples=12)
    running = fit(module, [batch] * 4, epochs=8)
    assert set(running.callback_metrics) == {"test_loss", "test_acc", "test_f1"}
    floor = -(0.9 + 0.1 / 6) * math.log(0.9 + 0.1 / 6) - 5 * (0.1 / 6) * math.log(0.1 / 6)
    assert running.callback_metrics["test_loss"] < floor + 0.3 < math.log(6)
    assert running.callback_metrics["test_acc"] == 1
    assert running.callback_metrics["test_f1"] == 1

    running.save_checkpoint(tmp_path / "model.ckpt")
    loaded = HMSLightningModule.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    assert loaded.hparams == module.hparams
    assert loaded.hparams["num_heads"] == 4
    module.eval()
    with torch.no_grad():
        logits = module(batch["eeg_graphs"], batch["spec_graphs"])
        assert torch.equal(loaded(batch["eeg_graphs"], batch["spec_graphs"]), logits)
        assert torch.equal(loaded.predict_step(batch, 0), logits.softmax(-1))


def test_scores_are_those_of_the_soft_labels_arg_max() -> None:
    torch.manual_seed(0)
    module = HMSLightningModule()
    batches = [planted(5), planted(7)]
    running = quiet_trainer()
    running.validate(module, loader(batches), verbose=False)
    module.eval()
    with torch.no_grad():
        logits = torch.cat([module(b["eeg_graphs"], b["spec_graphs"]) for b in batches])
    targets = torch.cat([b["targets"] for b in batches])
    loss = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    accuracy = (logits.argmax(-1) == targets.argmax(-1)).float().mean()
    assert set(running.callback_metrics) == {"val_loss", "val_acc", "val_f1"}
    torch.testing.assert_close(running.callback_metrics["val_loss"], loss)
    torch.testing.assert_close(running.callback_metrics["val_acc"], accuracy)


def test_learning_rate_rises_then_falls_and_outlasts_its_end() -> None:
    factors = [learning_rate_factor(step, 40) for step in range(60)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a >= b for a, b in pairwise(factors[4:]))
    assert factors[39:] == pytest.approx([factors[39]] + [0.01] * 20)
    assert 0 < learning_rate_factor(0, 1) <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 7}, r"\[1, 2, 4, 8, .*; got 7"),
        ({"num_heads": 0}, "got 0"),
        ({"dropout": 1.0}, r"\[0, 1\); got 1.0"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        HMSLightningModule(**settings)


def test_bad_batches() -> None:
    module = HMSLightningModule()
    batch = planted(2)
    with pytest.raises(DataError, match=r"lacks \['eeg_graphs'\]; it holds \['spec_graphs', 'targets'\]"):
        module.validation_step({k: v for k, v in batch.items() if k != "eeg_graphs"}, 0)
    with pytest.raises(ShapeError, match=r"shape \(2, 6\).*got shape \(2,\)"):
        module.test_step({**batch, "targets": torch.tensor([0, 1])}, 0)


def test_bad_graphs(network: HMSNetwork) -> None:
    eeg, spec = inputs(samples=3)
    with pytest.raises(DataError, match=r"EEG graphs must be a list.*an empty list"):
        network([], spec)
    with pytest.raises(DataError, match=r"spectrogram graphs must be a list.*DataBatch"):
        network(eeg, spec[0])
    with pytest.raises(DataError, match=r"EEG window 0 must be a PyG Batch.*got Tensor"):
        network([torch.zeros(3)], spec)
    with pytest.raises(ShapeError, match="window 0 holds 3 graphs, window 4 holds 2"):
        network([*eeg[:4], eeg[4][[0, 1]]], spec)
    with pytest.raises(ShapeError, match=tells("EEG", "2 graphs", "spectrogram", " 3")):
        network([g[[0, 1]] for g in eeg], spec)
    with pytest.raises(ShapeError, match="spectrogram nodes must have 4 features"):
        network(eeg, eeg)
    with pytest.raises(DataError, match=r"EEG graphs need 'edge_attr', which window\(s\) \[0, 1, 2"):
        network(spec, spec)
