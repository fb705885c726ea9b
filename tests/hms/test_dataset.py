import pickle

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data

from lightning_xattn.hms.dataset import EEG_EDGE_INDEX, SPEC_EDGE_INDEX, graph_batches

SAMPLES, WINDOWS, FEATURES = 3, 7, 5
WITH_EDGES = pytest.mark.parametrize("with_edge_attr", [True, False], ids=["edge_attr", "no_edge_attr"])


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def both_ways(with_edge_attr: bool) -> tuple[list[Batch], list[Batch]]:
    """Our batches, and what PyG makes of the same graphs one by one."""
    edge_index = EEG_EDGE_INDEX if with_edge_attr else SPEC_EDGE_INDEX
    nodes, edges = int(edge_index.max()) + 1, edge_index.shape[1]
    x = random(SAMPLES, WINDOWS, nodes, FEATURES)
    edge_attr = random(SAMPLES, WINDOWS, edges, 1) if with_edge_attr else None

    def graph(sample: int, window: int) -> Data:
        data = Data(x=torch.tensor(x[sample, window]), edge_index=edge_index.clone())
        if edge_attr is not None:
            data.edge_attr = torch.tensor(edge_attr[sample, window])
        return data

    slow = [Batch.from_data_list([graph(s, w) for s in range(SAMPLES)]) for w in range(WINDOWS)]
    return graph_batches(x, edge_index, edge_attr), slow


def assert_same(ours, theirs) -> None:
    assert type(ours) is type(theirs)
    assert ours.keys() == theirs.keys()
    for key in theirs.keys():  # noqa: SIM118 - iterating over Data gives pairs
        assert ours[key].dtype == theirs[key].dtype, key
        assert torch.equal(ours[key], theirs[key]), key
    if isinstance(theirs, Batch):
        assert ours.num_graphs == theirs.num_graphs
        for name in ("_slice_dict", "_inc_dict"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert list(mine) == list(other)
            assert all(torch.equal(mine[key], other[key]) for key in other)


@WITH_EDGES
def test_they_are_what_pyg_makes_of_the_same_graphs(with_edge_attr):
    """As a whole, by index, as lists, and after what a loader does with them."""
    ours, theirs = both_ways(with_edge_attr)
    assert len(ours) == WINDOWS
    for our, their in zip(ours, theirs, strict=True):
        assert_same(our, their)
        assert ("edge_attr" in our) == with_edge_attr
        for name in ("num_nodes", "num_edges", "num_features"):
            assert getattr(our, name) == getattr(their, name)
        our.validate()
        for i in range(SAMPLES):
            assert_same(our[i], their[i])
        for chosen in ([0], [2, 0], slice(1, 3), torch.tensor([True, False, True])):
            for one, other in zip(our[chosen], their[chosen], strict=True):
                assert_same(one, other)
            assert_same(Batch.from_data_list(our[chosen]), Batch.from_data_list(their[chosen]))
        assert_same(Batch.from_data_list(our.to_data_list()), their)
        for moved in (our.to("cpu"), our.clone(), our.contiguous(), pickle.loads(pickle.dumps(our))):
            assert_same(moved, their)
            assert_same(moved[1], their[1])


def test_moving_to_another_device_leaves_the_other_windows_where_they_are():
    ours, _ = both_ways(True)
    moved = ours[0].to("meta")
    assert {moved[key].device.type for key in moved.keys()} == {"meta"}  # noqa: SIM118
    assert ours[1].edge_index.device.type == "cpu"


def test_one_window_changed_leaves_the_others_and_the_next_batch_alone():
    ours, theirs = both_ways(True)
    ours[0].x = ours[0].x * 2
    ours[0].extra = torch.ones(1)
    ours[2].x.zero_()
    for our, their in list(zip(ours, theirs, strict=True))[3:]:
        assert_same(our, their)
    ours[1].edge_index.zero_()  # shared by this call's windows, as the docstring says, but by no other call's
    assert_same(both_ways(True)[0][1], theirs[1])
