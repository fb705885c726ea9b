"""Which tensors are the same numbers: views are, and what stands later at the same address is not."""

import numpy as np
import torch

from lightning_xattn.capture.tensors import Address, are_same


def test_views_of_all_of_a_tensor_are_the_same():
    tensor = torch.rand(5, 7)
    place = Address.of(tensor)
    for same in (tensor, tensor.detach(), tensor[:], tensor.view(5, 7)):
        assert place.holds(same)
        assert are_same(tensor, same)
    for other in (tensor.clone(), tensor[:3], tensor.mT, tensor.view(torch.int32), tensor.view(7, 5)):
        assert not place.holds(other)
        assert not are_same(tensor, other)


def test_what_stands_later_at_the_same_address_is_another_tensor():
    memory = np.zeros((5, 7), dtype=np.float32)
    first = torch.from_numpy(memory)
    place, address = Address.of(first), first.data_ptr()
    view = first.detach()
    del first
    assert place.holds(view)  # as long as any tensor has these numbers
    del view
    second = torch.from_numpy(memory)
    assert second.data_ptr() == address
    assert not place.holds(second)


def test_nested_tensors_are_the_same_as_themselves_only():
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    assert are_same(nested, nested)
    assert not are_same(nested, nested.detach())
