"""Batches are counted, cut and moved in the form that they have."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data

from lightning_xattn.core.errors import DataError
from lightning_xattn.explainer.batches import count_samples, join_samples, take_samples, to_device
from tests.toy import ToyModule

SAMPLES = 5
Pair = namedtuple("Pair", ["left", "right"])


def graphs(samples=SAMPLES):
    """Graphs of different sizes; node features tell which is which."""
    return [Data(x=torch.full((3 + i, 2), float(i)), edge_index=torch.tensor([[0, 1], [1, 2]])) for i in range(samples)]


def mixed():
    return OrderedDict(
        windows=[Batch.from_data_list(graphs()), graphs()],
        pair=Pair(torch.arange(SAMPLES), np.arange(SAMPLES) * 2),
        names=tuple("abcde"),
        length=torch.tensor(7),
        about={"what": "text", "nothing": None, "number": 3},
    )


def test_some_samples_in_the_form_of_the_batch():
    assert count_samples(mixed()) == SAMPLES
    taken = take_samples(mixed(), [1, 3])
    assert type(taken) is OrderedDict
    whole, listed = taken["windows"]
    assert (whole.num_graphs, whole.x[:, 0].tolist()) == (2, [1.0] * 4 + [3.0] * 6)
    assert whole.batch.tolist() == [0] * 4 + [1] * 6
    assert [int(graph.x[0, 0]) for graph in listed] == [1, 3]
    assert type(taken["pair"]) is Pair
    assert (taken["pair"].left.tolist(), taken["pair"].right.tolist()) == ([1, 3], [2, 6])
    assert taken["names"] == ["b", "d"]
    assert (taken["length"], taken["about"]) == (torch.tensor(7), {"what": "text", "nothing": None, "number": 3})
    assert count_samples(taken) == 2


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"x": torch.zeros(5, 2), "y": torch.zeros(7)}, r"batch\['x'\]: 5, batch\['y'\]: 7"),
        ([torch.zeros(5), {1, 2}], r"batch\[0\]: 5, batch\[1\] \(a set\): \?"),
        ({"windows": [graphs(5), graphs(3)]}, r"batch\['windows'\]\[0\]: 5, batch\['windows'\]\[1\]: 3"),
        ({"a": 1}, "found none"),
    ],
)
def test_what_cannot_be_cut_is_said(batch, found):
    with pytest.raises(DataError, match=f"cannot be split.*{found}"):
        count_samples(batch)


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


def test_what_a_model_gave_for_parts_is_joined_as_far_as_it_is_by_sample():
    logits, attention = torch.randn(5, 3), torch.randn(5, 2, 4)
    parts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    counts = [2, 2, 1]

    def joined(of_part):
        return join_samples([of_part(part) for part in parts], counts)

    assert torch.equal(joined(lambda part: logits[part]), logits)
    assert torch.equal(joined(lambda part: logits[part].squeeze()), logits)
    assert torch.equal(joined(lambda part: logits[part, 0].squeeze()), logits[:, 0])
    found = joined(
        lambda part: {"logits": logits[part], "first": attention[part].transpose(0, 1), "loss": logits.mean()}
    )
    assert torch.equal(found["logits"], logits)
    assert found["first"].shape == (2, 2, 4)  # of the first part: its samples are on another axis
    assert found["loss"].dim() == 0
    assert torch.equal(joined(lambda part: (logits[part], [None] * len(logits[part])))[0], logits)
    odd = joined(lambda part: {"logits": logits[part]} | ({"extra": logits[part]} if part.start else {}))
    assert list(odd) == ["logits"]
    odd = joined(lambda part: {"logits": logits[part]} | ({} if part.start else {"extra": logits[part]}))
    assert (len(odd["logits"]), len(odd["extra"])) == (5, 2)
    assert joined(lambda part: attention[part][:, :, : part.start + 1]).shape == (2, 2, 1)  # trimmed by each part


@pytest.mark.parametrize("kind", [lambda **parts: defaultdict(list, parts), UserDict], ids=["defaultdict", "UserDict"])
def test_mappings_of_other_kinds_are_split(kind):
    """A tokenizer of transformers gives a ``UserDict``."""
    batch = kind(x=torch.arange(5), y=[torch.arange(5)])
    assert count_samples(batch) == 5
    taken = take_samples(batch, [1, 3])
    assert type(taken) is type(batch)
    assert (taken["x"].tolist(), taken["y"][0].tolist()) == ([1, 3], [1, 3])
    assert (batch["x"].tolist(), len(batch["y"][0])) == ([0, 1, 2, 3, 4], 5)
    with pytest.raises(DataError, match=r"batch\['x'\]: 5, batch\['y'\]: 7"):
        count_samples(kind(x=torch.zeros(5), y=torch.zeros(7)))
