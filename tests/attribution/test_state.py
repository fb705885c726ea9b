"""What is kept of a model's state, and what is left alone."""

import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from lightning_xattn.attribution.root import restoring_state
from lightning_xattn.attribution.state import ModelState


class Endless(tuple):
    """A schedule that begins anew for ever."""

    def __iter__(self):
        while True:
            yield from tuple.__iter__(self)


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_no_method_of_a_users_container_is_called():
    model = nn.Linear(2, 2)
    model.schedule, model.helper = Endless([1, [2]]), Holder(schedule=Endless([3]), seen=[])
    state = ModelState(model)
    model.schedule[1].append(3)
    model.helper.seen.append(1)
    state.restore()
    assert tuple.__getitem__(model.schedule, 1) == [2]
    assert model.helper.seen == []


def test_what_other_threads_use_is_left_alone():
    """Also what holds it at some distance, as a logger's client does; beside it everything is kept."""
    model = nn.Linear(2, 2)
    model.client, model.seen = Holder(inner=Holder(queue=[], lock=threading.Lock())), []
    state = ModelState(model)
    model.client.inner.queue.append("sent by a thread")
    model.seen.append(1)
    state.restore()
    assert model.client.inner.queue == ["sent by a thread"]
    assert model.seen == []


def test_of_a_large_storage_only_what_is_looked_at_is_kept():
    """As of batches that are slices of a data set in memory."""
    data = torch.arange(103, dtype=torch.float32)
    batch, column = data[40:47], data[60:80:5]
    state = ModelState((batch, column))
    data.mul_(0)
    state.restore()
    assert torch.equal(data.nonzero()[:, 0], torch.arange(40, 76))
    assert batch.tolist() == [40, 41, 42, 43, 44, 45, 46]
    assert column.tolist() == [60, 65, 70, 75]


def test_gradients_are_not_computed_from_numbers_that_were_put_back():
    weight, values = torch.ones(3, requires_grad=True), torch.ones(3)
    state = ModelState(values)
    values.mul_(2)
    product = (weight * values).sum()
    state.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_an_interrupt_is_not_lost_behind_what_cannot_be_put_back():
    class Refuses(type):
        def __setattr__(cls, name, value):
            raise TypeError("no")

    class Odd(metaclass=Refuses):
        count = 0

    model = nn.Linear(2, 2)
    model.odd = Odd()

    def run(error):
        with restoring_state(ModelState(model), with_hooks=False, generators=(), model=model):
            type.__setattr__(Odd, "count", Odd.count + 1)
            if error is not None:
                raise error

    for error in (None, ValueError()):
        with pytest.raises(RuntimeError, match="could not be put back: TypeError"):
            run(error)
    with pytest.raises(KeyboardInterrupt):
        run(KeyboardInterrupt())


def test_a_proxy_whose_object_is_gone_and_arrays_that_cannot_be_written():
    model = nn.Linear(2, 2)
    model.held = Holder(gone=weakref.proxy(Holder()))
    model.fixed = np.zeros(3)
    model.fixed.flags.writeable = False
    ModelState(model).restore()
