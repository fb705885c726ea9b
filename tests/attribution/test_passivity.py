"""Training is bit for bit what it is without the callback, whatever a forward changes, and whether replays succeed.

Habits of a forward, several of a kind at once, run in a fit and in a validation, with replays that succeed and that
raise.
"""

import array
import random
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_xattn import AttentionExplainabilityCallback
from tests.attribution.models import LEFT, RIGHT
from tests.toy import quiet_trainer

SAMPLES, BATCH, WIDTH = 26, 13, 4


class Slots:
    __slots__ = ("__weakref__", "count", "seen")

    def __init__(self):
        self.count, self.seen = 0, []


class Whole:
    def __init__(self):
        self.count = 0

    def replace(self):
        self.__dict__ = {"count": self.count + 1}


WEAKLY = Slots()


class Running(pl.Callback):
    """Says whether the Trainer runs a step."""

    is_now = False

    def on_train_batch_start(self, *_):
        Running.is_now = True

    def on_train_batch_end(self, *_):
        Running.is_now = False

    on_validation_batch_start, on_validation_batch_end = on_train_batch_start, on_train_batch_end


class Model(pl.LightningModule):
    """``changes`` are what its forward does besides; ``fails``: a forward that the Trainer does not run raises."""

    calls = 0

    def __init__(self, setups, changes, fails):
        super().__init__()
        self.left, self.right = nn.Linear(3, WIDTH), nn.Linear(2, WIDTH)
        self.left_to_right = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.right_to_left = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(2 * WIDTH, 3)
        self.spare = nn.Linear(2, 2)
        self.orders, self.changes, self.fails = [], changes, fails
        for setup in setups:
            setup(self)

    def forward(self, left, right):
        if self.fails and not Running.is_now:
            raise ValueError("this forward runs in a step alone")
        for change in self.changes:
            change(self)
        left, right = self.left(left), self.right(right)
        there = self.left_to_right(left, right, right)[0]
        back = self.right_to_left(right, left, left)[0]
        return self.head(torch.cat([there.mean(1), back.mean(1)], 1))

    def _step(self, batch):
        self.batch_now = batch
        return self(batch["left"], batch["right"])

    def training_step(self, batch, batch_idx):
        self.orders += batch["number"].tolist()
        return nn.functional.cross_entropy(self._step(batch), batch["target"])

    def validation_step(self, batch, batch_idx):
        return {"logits": self._step(batch), "targets": batch["target"]}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _closure():
    count = 0

    def change(model):
        nonlocal count
        count += 1
        model.seen_by_closure = count

    return change


def _default(model, seen=[]):  # noqa: B006  # as users write by mistake
    seen.append(len(seen))
    model.seen_by_default = len(seen)


def _containers(model):
    model.queue.append(len(model.queue))
    model.queue.popleft()
    model.keys.add(len(model.keys))
    model.order.move_to_end(next(iter(model.order)))
    model.counts["a"] += 1
    model.lists[len(model.lists)].append(1)


def _in_place(model):
    with torch.no_grad():
        model.deep["list"][0].add_(1)
        model.pair[0].mul_(2)


def _of_class(model):
    Model.calls += 1


def _sets(**attributes):
    """Attributes, made anew for each model."""

    def setup(model):
        for name, make in attributes.items():
            setattr(model, name, make())

    return setup


def _weakly(model):
    WEAKLY.seen = []
    model.weakly, model.whole = weakref.ref(WEAKLY), Whole()


def _nothing(model):
    pass


def _change_parameter(model):
    with torch.no_grad():
        model.spare.weight.mul_(1.5)


HABITS = {
    "tensors": {
        "in place": (lambda m: m.register_buffer("runs", torch.zeros(3)), lambda m: m.runs.add_(1)),
        "replaced": (
            lambda m: m.register_buffer("steps", torch.zeros(3)),
            lambda m: setattr(m, "steps", m.steps + 1),
        ),
        "the size of a tensor": (
            _sets(grown=lambda: torch.ones(2)),
            lambda m: m.grown.resize_(m.grown.numel() + 1).fill_(1),
        ),
        "tensors in containers": (
            _sets(deep=lambda: {"list": [torch.ones(2)]}, pair=lambda: (torch.ones(2), 1)),
            _in_place,
        ),
        "whether a parameter takes gradients": (
            _sets(flips=int),
            lambda m: (setattr(m, "flips", m.flips + 1), m.spare.bias.requires_grad_(m.flips % 2 == 0)),
        ),
        "its batch": (_nothing, lambda m: m.batch_now["left"].add_(0.25)),
    },
    "a parameter": {
        "under no_grad": (_nothing, _change_parameter),
        "a gradient": (
            _nothing,
            lambda m: setattr(m.spare.weight, "grad", torch.full((2, 2), float(len(m.orders)))),
        ),
        "its data in place": (_nothing, lambda m: m.spare.weight.data.mul_(1.5)),
        "its data replaced": (_nothing, lambda m: setattr(m.spare.weight, "data", m.spare.weight.detach() * 1.5)),
    },
    "the module": {
        "a parameter that is replaced": (
            _nothing,
            lambda m: setattr(m.spare, "bias", nn.Parameter(m.spare.bias.detach() + 1)),
        ),
        "the mode, a submodule and a hook": (
            _nothing,
            lambda m: (
                m.spare.train(not m.spare.training),
                setattr(m, "extra", nn.Identity()),
                m.spare.register_forward_hook(lambda *_: None),
            ),
        ),
        "a metric": (
            lambda m: setattr(m, "mean", torchmetrics.MeanMetric()),
            lambda m: m.mean.update(torch.ones(2)),
        ),
        "a metric in a helper": (
            _sets(metrics=lambda: SimpleNamespace(inner=[torchmetrics.CatMetric()])),
            lambda m: m.metrics.inner[0].update(torch.ones(2)),
        ),
        "a number": (_sets(count=int), lambda m: setattr(m, "count", m.count + 1)),
        "an attribute that is new": (_nothing, lambda m: setattr(m, "newest", getattr(m, "newest", 0) + 1)),
    },
    "objects": {
        "a list": (_sets(seen=list), lambda m: m.seen.append(len(m.seen))),
        "a nested dict": (
            _sets(memory=lambda: {"deep": {"count": 0}}),
            lambda m: m.memory["deep"].update(count=m.memory["deep"]["count"] + 1),
        ),
        "a helper object": (
            _sets(helper=lambda: SimpleNamespace(count=0, inner=SimpleNamespace(seen=[]))),
            lambda m: (m.helper.inner.seen.append(m.helper.count), setattr(m.helper, "count", m.helper.count + 1)),
        ),
        "a helper with slots": (
            _sets(slots=Slots),
            lambda m: (m.slots.seen.append(1), setattr(m.slots, "count", m.slots.count + 1)),
        ),
        "an object that is held weakly, and the whole of another one's attributes": (
            _weakly,
            lambda m: (m.weakly().seen.append(1), m.whole.replace()),
        ),
        "a method that is kept, and a partial": (
            _sets(kept=lambda: partial([].append, 1), method=lambda: SimpleNamespace(seen=[])),
            lambda m: (m.kept(), m.kept.func.__self__.append(2), m.method.seen.append(1)),
        ),
    },
    "containers": {
        "of Python": (
            _sets(
                queue=lambda: deque([1, 2]),
                keys=set,
                order=lambda: OrderedDict(a=1, b=2, c=3),
                counts=Counter,
                lists=lambda: defaultdict(list),
            ),
            _containers,
        ),
        "bytes": (
            _sets(raw=lambda: bytearray(2), numbers=lambda: array.array("i", [0, 0])),
            lambda m: (m.raw.append(1), m.numbers.append(2)),
        ),
        "a numpy array": (_sets(array=lambda: np.zeros(3)), lambda m: m.array.__iadd__(1)),
        "a numpy array of objects": (
            _sets(objects=lambda: np.array([[1], None], dtype=object)),
            lambda m: (m.objects[0].append(2), m.objects.__setitem__(1, len(m.objects[0]))),
        ),
        "a masked array and an array's shape": (
            _sets(masked=lambda: np.ma.array(np.zeros(4), mask=[False] * 4), wide=lambda: np.zeros((2, 3))),
            lambda m: (m.masked.__setitem__(0, np.ma.masked), setattr(m.wide, "shape", m.wide.shape[::-1])),
        ),
    },
    "random numbers": {
        "of torch": (
            _sets(generator=lambda: torch.Generator().manual_seed(0)),
            lambda m: torch.rand(1, generator=m.generator),
        ),
        "of numpy": (
            _sets(of_numpy=lambda: np.random.default_rng(0), old=lambda: np.random.RandomState(0)),
            lambda m: (m.of_numpy.random(), m.old.rand()),
        ),
        "of Python": (_sets(dice=lambda: [random.Random(0)]), lambda m: m.dice[0].random()),
        "of the process": (_nothing, lambda m: (torch.rand(1), np.random.rand(), random.random())),
    },
    "outside of the model": {
        "an attribute of its class": (_nothing, _of_class),
        "what a function encloses": (_sets(closure=_closure), lambda m: m.closure(m)),
        "an argument's default": (_nothing, _default),
    },
}
"""By what they change and by name: what prepares a model, and what its forward changes."""


def plain(value):
    """Values that can be compared, whatever object holds them."""
    if isinstance(value, Tensor):
        return ["tensor", value.dtype, value.requires_grad, value.detach().clone().tolist()]
    if isinstance(value, np.ndarray):
        return ["array", value.shape, str(value)]
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return str(value.get_state())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, weakref.ref):
        return plain(value())
    if isinstance(value, Whole):
        return vars(value)
    if isinstance(value, Slots):
        return [value.count, value.seen]
    if isinstance(value, OrderedDict) and value and isinstance(next(iter(value)), int):
        return len(value)  # hooks, by numbers that go on over the whole process
    if isinstance(value, (dict, SimpleNamespace)):
        items = value if isinstance(value, dict) else vars(value)
        return [(key, plain(one)) for key, one in items.items()]
    if isinstance(value, (list, tuple, deque, array.array, bytearray)):
        return [plain(one) for one in value]
    if isinstance(value, nn.Module):
        others = "_trainer", "_fabric", "changes", "method"
        own = {name: one for name, one in vars(value).items() if name not in others}
        return [type(value).__name__, plain(own)]
    if isinstance(value, partial):
        return plain(value.func.__self__)
    return value if isinstance(value, (int, float, str, set, type(None))) else type(value).__name__


def batches():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(SAMPLES)
    whole = {
        "left": torch.randn(SAMPLES, LEFT, 3, generator=generator),
        "right": torch.randn(SAMPLES, RIGHT, 2, generator=generator),
        "target": numbers % 3,
        "number": numbers,
    }
    return [{name: one[start : start + BATCH] for name, one in whole.items()} for start in range(0, SAMPLES, BATCH)]


def run(habits, stage, fails, callbacks):
    """All that is left after a run: the model, the random numbers, the data."""
    setups, changes = zip(*HABITS[habits].values(), strict=True)
    Model.calls = 0
    _default.__defaults__[0].clear()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    model = Model(setups, changes, fails)
    data = batches()
    trainer = quiet_trainer(callbacks=[Running(), *callbacks], max_epochs=2, num_sanity_val_steps=1)
    loader = DataLoader(data, batch_size=None)
    if stage == "fit":
        samples = [{name: one[i] for name, one in batch.items()} for batch in batches() for i in range(BATCH)]
        trainer.fit(model, DataLoader(samples, batch_size=BATCH, shuffle=True), loader)
    else:
        trainer.validate(model, loader, verbose=False)
    of_process = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()
    gradients = [plain(one.grad) for one in model.parameters()]
    return plain(model), gradients, model.orders, plain(data), of_process, Model.calls, _default.__defaults__


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("habits", HABITS)
def test_nothing_changes_whatever_a_forward_changes_and_whether_replays_succeed(habits, stage):
    plain_run = run(habits, stage, fails=False, callbacks=[])
    for fails in (False, True):
        watch = AttentionExplainabilityCallback(
            figures_every_n_epochs=0, contribution_samples=20, faithfulness_every_n_epochs=0
        )
        watched = run(habits, stage, fails, [watch])
        assert watched[1:] == plain_run[1:]
        assert str(watched[0]).replace("('fails', True)", "('fails', False)") == str(plain_run[0])
        found = "val" in watch.fusion_summaries and not watch.fusion_summaries["val"].contribution_problem
        assert found != fails
