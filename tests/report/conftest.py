"""A data set whose numbers all differ: between classes, outcomes, ends of intervals, and samples and groups."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_xattn import ExplainabilityCapture
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from tests.attribution.models import loader_of, said_data, sample_ids, trained

CLASSES = ("apnoea", "bruxism", "cough", "dream")

SUBSETS = {
    **{name: (class_id, None) for class_id, name in enumerate(CLASSES)},
    **{"correct": (None, CORRECT), "incorrect": (None, INCORRECT)},
}
"""Class and outcome of what figures, reports and curves tell apart, in their order."""


def make_samples():
    """A model, and 130 samples of 23 groups (see `group_of`), of which 7 have no class."""
    data, _ = said_data(130, noise=1.5, disagreeing=0.4)
    left, right, target, ids = data.tensors
    model = trained(None, data, epochs=12)
    of_last = (target == 3).nonzero()[:, 0]
    target = target.index_fill(0, of_last[::2], 2)
    target[::19] = -1
    return model, TensorDataset(left, right, target, ids)


def group_of(outputs, batch):
    """A sample's group: the classes have unequally many."""
    return (batch[3] * 7) % 23 // (1 + batch[3] % 2)


@pytest.fixture(scope="session")
def result(tmp_path_factory):
    """An explained loader, with its table."""
    model, data = make_samples()
    explainer = ExplainabilityCapture(
        model,
        class_names=CLASSES,
        predict=lambda model, batch: model.validation_step(batch, 0),
        sample_ids=sample_ids,
        groups=group_of,
        fusion="fusion",
        modalities={"left": 0, "right": 1},
    )
    loader = loader_of(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads that little training has left dead
        return explainer.explain_loader(loader, tmp_path_factory.mktemp("explained"), progress=False)


@pytest.fixture(scope="session")
def members(result):
    """By name of a subset, and of "all" and "no class": which samples of the fusion's rows are in it."""
    fusion = result.fusion
    found = {name: fusion.classes == class_id for class_id, name in enumerate(CLASSES)}
    found |= {"correct": fusion.outcomes == CORRECT, "incorrect": fusion.outcomes == INCORRECT}
    found |= {"all": torch.ones(fusion.samples, dtype=torch.bool), "no class": fusion.classes < 0}
    sizes = [int(of_one.sum()) for of_one in found.values()]
    groups = [len(fusion.groups[of_one].unique()) for of_one in found.values()]
    assert len({*sizes, *groups}) >= 10, "what is swapped must show"
    return found
