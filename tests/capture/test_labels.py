"""Where predictions and targets are found, and what is said when they do not fit."""

import pytest
import torch

from lightning_xattn.capture import LabelFinder
from lightning_xattn.errors import DiscoveryError, ShapeError

BATCH, CLASSES = 5, 3
SCORES = torch.tensor([[0.1, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 5.0, 1.0], [1.0, 0.0, 0.0]])
PREDICTED = [1, 0, 2, 1, 0]
IDS = torch.tensor([1, 2, 2, 0, 0])
VOTES = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.6, 0.4, 0.0]])


def find(outputs=None, batch=None, forward=None, **settings):
    return LabelFinder(**settings).find(outputs, batch, forward, BATCH)


LOSS = torch.tensor(0.3)


@pytest.mark.parametrize(
    ("outputs", "batch", "forward"),
    [
        (LOSS, (torch.zeros(BATCH, 4), IDS), SCORES),
        (None, {"image": torch.zeros(BATCH, 4), "labels": IDS}, (SCORES, {"attention": None})),
        ({"loss": LOSS, "logits": SCORES, "targets": IDS}, torch.zeros(BATCH, 4), None),
        (SCORES, {"y": IDS}, None),
        ({"loss": LOSS, "preds": torch.tensor(PREDICTED)}, [torch.zeros(BATCH), IDS], torch.zeros(BATCH, 7)),
        (None, {"target": IDS}, {"logits": SCORES}),
    ],
)
def test_found_in_the_usual_places(outputs, batch, forward):
    labels = find(outputs, batch, forward)
    assert labels.predicted.tolist() == PREDICTED
    assert labels.target.tolist() == IDS.tolist()


def test_named():
    batch = {"strange": VOTES}
    labels = find({"mine": SCORES}, batch, torch.zeros(BATCH, 9), predictions="mine", targets="strange")
    assert labels.predicted.tolist() == PREDICTED
    assert labels.target.tolist() == [1, 2, 2, 0, 0]
    assert labels.tied.tolist() == [True, False, False, False, False]
    assert labels.n_classes == CLASSES
    called = find("out", "batch", predictions=lambda o, b: SCORES, targets=lambda o, b: {"out": IDS}[o])
    assert called.target.tolist() == IDS.tolist()


def test_nothing_found_is_nothing():
    labels = find(LOSS, torch.zeros(BATCH, 4), torch.zeros(BATCH))
    assert (labels.predicted, labels.target, labels.tied, labels.n_classes) == (None, None, None, None)


def test_errors():
    with pytest.raises(DiscoveryError, match="key 'mine' gave NoneType.*returned a tensor of shape.*dict of 'a'"):
        find(LOSS, {"a": 1}, predictions="mine")
    with pytest.raises(DiscoveryError, match="the callable gave float"):
        find(targets=lambda o, b: 1.0)
    with pytest.raises(
        ShapeError, match=r"Expected targets.*\(5,\) or.*\(5, classes\); got torch.int64 of shape \(4,\)"
    ):
        find(batch={"t": IDS[:4]}, targets="t")
    with pytest.raises(ShapeError, match="Predictions have 3 classes and targets 2"):
        find({"logits": SCORES, "targets": VOTES[:, :2]})
