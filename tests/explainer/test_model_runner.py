"""A batch reaches the model's device by the hooks that a Trainer would call."""

import torch
from torch import nn
from torch_geometric.data import Batch, Data

from lightning_xattn.explainer.model_runner import to_device
from tests.toy import ToyModule

SAMPLES = 5


def graphs(samples=SAMPLES):
    """Graphs of different sizes; node features tell which is which."""
    return [Data(x=torch.full((3 + i, 2), float(i)), edge_index=torch.tensor([[0, 1], [1, 2]])) for i in range(samples)]


def test_the_batch_itself_is_not_moved():
    batch = {"graphs": [Batch.from_data_list(graphs()), graphs()], "x": torch.zeros(SAMPLES)}
    moved = to_device(batch, nn.Linear(2, 2, device="meta"))
    assert {moved["graphs"][0].x.device.type, moved["graphs"][1][2].x.device.type, moved["x"].device.type} == {"meta"}
    assert {batch["graphs"][0].x.device.type, batch["graphs"][1][2].x.device.type, batch["x"].device.type} == {"cpu"}


def test_the_hooks_of_a_lightning_module_are_called_in_their_order():
    called = []

    class Hooked(ToyModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            called.append("before")
            return batch + 1

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            called.append(str(device))
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            called.append("after")
            return batch * 2

    assert to_device(torch.ones(1), Hooked()).item() == 4
    assert called == ["before", "cpu", "after"]
