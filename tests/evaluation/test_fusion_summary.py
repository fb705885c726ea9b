"""Probes, support and contributions of models whose truth is known, through a Trainer."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback, functional
from lightning_xattn.core.ids import UNKNOWN_GROUP, hashed
from lightning_xattn.evaluation.fusion_summary import PROPORTIONS
from lightning_xattn.functional import partner_shifts
from lightning_xattn.functional.outcomes import INCORRECT
from tests import reference
from tests.attribution.models import (
    CLASSES,
    NAMED,
    WIDTH,
    Concatenation,
    Sum,
    TwoStreams,
    said_data,
    sample_ids,
    summary_of,
    trained,
    watch_of,
)
from tests.toy import quiet_trainer


def test_every_number_is_the_references():
    """All that a validation says of a sample, from loops over samples, classes and pairs."""
    data, _ = said_data(61)
    module = trained(Concatenation(), data, epochs=8).eval()
    left, right, target, ids = data.tensors
    summary = summary_of(module, data, **NAMED)
    order = hashed(ids, 0).argsort()
    with torch.no_grad():
        features = [
            np.array([reference.pooled(one, [True] * len(one)) for one in encoder(tokens)[order].double().numpy()])
            for encoder, tokens in ((module.left, left), (module.right, right))
        ]
        tokens = module.left(left)[order], module.right(right)[order]
        table = [
            [module.head(module.fusion(tokens[0][[i]], tokens[1][[j]]))[0].double() for j in range(61)]
            for i in range(61)
        ]
    target, n = target[order].tolist(), 61
    folds = reference.round_robin(ids[order].tolist(), lambda key: int(hashed(torch.tensor([key]), 1)))
    probes = [reference.cross_fitted_probe(x, target, folds, CLASSES) for x in features]
    joint = reference.cross_fitted_probe(np.concatenate(features, 1), target, folds, CLASSES)
    probabilities = [[row.softmax(0) for row in rows] for rows in table]
    predicted = [int(table[i][i].argmax()) for i in range(n)]
    pairs = [(i, (i + s) % n) for i in range(n) for s in partner_shifts(n, 4)]

    def fitted(values):
        """(samples, samples, classes): the pairs that were run, fitted."""
        at = [[np.asarray(values[i][j]) for i, j in pairs]]
        return np.stack(
            [reference.additive_fit(*zip(*pairs, strict=True), [one[c] for one in at[0]], n) for c in range(CLASSES)],
            -1,
        )

    def game(values):
        fit = fitted(values)
        for i in range(n):
            others = [j for j in range(n) if j != i]
            c = predicted[i]
            yield {
                frozenset(): np.mean([float(values[j][j][c]) for j in others]),
                frozenset({0}): np.mean([fit[i, j, c] for j in others]),
                frozenset({1}): np.mean([fit[j, i, c] for j in others]),
                frozenset({0, 1}): float(values[i][i][c]),
            }

    of_pairs = [probabilities[i][j].tolist() for i, j in pairs]
    errors = reference.contribution_errors(pairs, of_pairs, predicted)
    centred = [[row - row.mean() for row in rows] for rows in table]
    interactions = [reference.shapley_interaction(one, 2) for one in game(centred)]
    for i, values in enumerate(game(probabilities)):
        phi = reference.shapley(values, 2)
        both = probes[0][i], probes[1][i]
        expected = {
            "confidence": float(probabilities[i][i].max()),
            "conflict": reference.conflict(both),
            "support": reference.support(both, predicted[i]),
            "supports/left": float(0 in reference.supporters(both, predicted[i])),
            "supports/right": float(1 in reference.supporters(both, predicted[i])),
            "correct": float(predicted[i] == target[i]),
            "calibration_gap": float(predicted[i] == target[i]) - float(probabilities[i][i].max()),
            "right/joint": float(joint[i].argmax() == target[i]),
            "joint_gain/left": float(joint[i].argmax() == target[i]) - float(both[1].argmax() == target[i]),
            "right/left": float(both[0].argmax() == target[i]),
            "right/right": float(both[1].argmax() == target[i]),
            "phi/left": phi[0],
            "phi/right": phi[1],
            "error/left": errors[i],
            "interaction": interactions[i],
        }
        for name, value in expected.items():
            assert float(summary.numbers[name][i]) == pytest.approx(value, abs=2e-5), (name, i)
        cells = [(0, 1), (0,), (1,), "agree", "differ"]
        assert cells[summary.support_cell[i]] == reference.support_cell(both, predicted[i])
        cells[3:] = ["joint only", "none"]
        assert cells[summary.right_cell[i]] == reference.right_cell(both, joint[i], target[i])


def test_disagreement_is_found_and_which_one_supports_the_prediction():
    data, agrees = said_data(240)
    module = trained(Concatenation(), data)
    summary = summary_of(module, data, **NAMED)
    conflict = summary.numbers["conflict"]
    place = {int(one): i for i, one in enumerate(hashed(data.tensors[3], 0))}
    agree = torch.tensor([bool(agrees[place[int(one)]]) for one in summary.rows["hash"]])
    assert reference.auroc(conflict[~agree].numpy(), conflict[agree].numpy()) > 0.95
    assert (
        summary.numbers["supports/left"][~agree].mean() > 0.9 > 0.1 > summary.numbers["supports/right"][~agree].mean()
    )
    difference = summary.numbers["phi/left"] - summary.numbers["phi/right"]
    assert (difference[~agree & difference.isfinite()] > 0).double().mean() > 0.9
    assert summary.share("left").mean > summary.share("right").mean


def test_a_modality_that_says_nothing_cannot_be_read_and_one_that_is_not_used_contributes_nothing(infos):
    data, _ = said_data(160, disagreeing=1.0, seed=3)
    left, right, target, ids = data.tensors
    noise = torch.randn(right.shape, generator=torch.Generator().manual_seed(9))
    data = TensorDataset(left, noise, target, ids)
    module = trained(Concatenation(), data)
    with torch.no_grad():
        module.fusion.hidden.weight[:, WIDTH:] = 0
    summary = summary_of(module, data, **NAMED)
    assert list(summary.probe_problems) == ["right"]
    assert "not clearly better than the largest class (25.0 %)" in summary.probe_problems["right"]
    for name in ("conflict", "support", "supports/right"):
        assert summary.numbers[name].isnan().all()
    assert summary.numbers["supports/left"].mean() > 0.5  # its own probe is one
    assert summary.cells == summary.right_cells == []
    assert summary.added_value == summary.support_problem
    assert (
        summary.numbers["phi/right"].abs().max() < 1e-6 or summary.numbers["phi/right"].nan_to_num().abs().max() < 1e-6
    )
    assert summary.share("left").mean == pytest.approx(1, abs=1e-5)
    assert any("Linear probe of 'right' not used" in said for said in infos.messages)


def test_an_additive_model_does_not_interact():
    data, _ = said_data(160)
    summary = summary_of(trained(Sum(), data), data, **NAMED)
    assert summary.numbers["interaction"].nan_to_num().abs().max() < 1e-4
    assert summary.estimate("additive_right").mean == summary.estimate("model_right").mean


def test_a_symmetric_model_shares_equally():
    class Twins(nn.Module):
        def forward(self, left, right):
            return torch.cat([left.mean(1) + right.mean(1)] * 2, dim=1).tanh()

    data, _ = said_data(64)
    module = trained(Twins(), data)
    tokens = data.tensors[0]
    same = TensorDataset(tokens[..., :2], tokens[..., :2], *data.tensors[2:])
    module.left = module.right
    summary = summary_of(module, same, **NAMED)
    assert summary.share("left").mean == pytest.approx(0.5, abs=1e-6)


def test_a_loader_that_is_sorted_by_class_says_what_a_shuffled_one_says():
    data, _ = said_data(200)
    module = trained(Concatenation(), data)
    orders = data.tensors[2].argsort(stable=True), torch.randperm(200, generator=torch.Generator().manual_seed(1))
    found = [summary_of(module, data, order=order, max_samples=150, **NAMED) for order in orders]
    for name, values in found[0].numbers.items():
        torch.testing.assert_close(found[1].numbers[name], values, equal_nan=True, atol=1e-5, rtol=1e-4)
    assert found[0].samples == 150


def test_groups_are_of_one_fold_and_no_partners_and_widen_intervals():
    data, _ = said_data(120)
    module = trained(Concatenation(), data)
    plain = summary_of(module, data, **NAMED)
    grouped = summary_of(module, data, groups=lambda outputs, batch: batch[3] // 6, **NAMED)
    assert (plain.estimate("confidence").groups, grouped.estimate("confidence").groups) == (None, 21)
    for group in grouped.groups.unique():
        assert len(functional.assign_folds(grouped.groups)[grouped.groups == group].unique()) == 1
    widths = [one.estimate("right/right").high - one.estimate("right/right").low for one in (plain, grouped)]
    assert widths[0] != widths[1]
    alone = summary_of(module, data, groups=lambda outputs, batch: batch[3] * 0, **NAMED)
    assert "all samples are of one group" in alone.contribution_problem
    assert set(alone.probe_problems) == {"left", "right"}


PATIENTS = [None, lambda outputs, batch: (batch[3] * 7) % 17]


@pytest.mark.parametrize("groups", PATIENTS, ids=["samples", "patients"])
def test_shares_of_samples_have_a_proportions_interval_and_other_means_stay_possible(groups):
    data, _ = said_data(120)
    summary = summary_of(trained(Concatenation(), data), data, groups=groups, **NAMED)
    assert set(PROPORTIONS) == {name.partition("/")[0] for name in summary.numbers} & set(PROPORTIONS)
    for name, values in summary.numbers.items():
        known = values.isfinite()
        found, theirs = summary.estimate(name), values[known].tolist()
        ids = None if groups is None else summary.groups[known].tolist()
        kind = name.partition("/")[0]
        if kind in PROPORTIONS:
            assert set(theirs) <= {0, 1}
            expected = reference.proportion_interval(theirs, ids)
        else:
            expected = reference.mean_interval(theirs) if ids is None else reference.grouped_mean_interval(theirs, ids)
            limits = {"confidence": (0, 1), "conflict": (0, 1), "phi": (-1, 1), "cost": (-1, 1)}
            expected = np.clip(expected, *limits.get(kind, (-np.inf, np.inf)))
        assert (found.low, found.high) == pytest.approx(expected, abs=1e-3, nan_ok=True), name
    right = summary.numbers["right/left"] = torch.ones(120, dtype=torch.float64)
    found = summary.estimate("right/left")
    assert (found.mean, found.high) == (1, 1)
    assert found.low == pytest.approx(reference.proportion_interval([1] * (120 if groups is None else 17))[0], abs=1e-3)
    summary.numbers["conflict"] = torch.where(torch.arange(120) == 7, 1.0, 0.001 * right)
    assert summary.estimate("conflict").low == 0


def test_nothing_is_compared_where_an_outcome_is_of_four_known_groups():
    """Samples of unknown groups are none that a claim may rest on."""
    data, _ = said_data(120, noise=1.5)
    summary = summary_of(
        trained(Concatenation(), data, epochs=15), data, groups=lambda outputs, batch: batch[3] % 11, **NAMED
    )
    summary.groups = summary.groups.clone()
    wrong = (summary.outcomes == INCORRECT).nonzero()[:, 0]
    assert math.isfinite(summary.compare("confidence").low)
    summary.groups[wrong] = torch.arange(len(wrong)) % 5
    assert math.isfinite(summary.compare("confidence").low)
    summary.groups[summary.groups == 4] = UNKNOWN_GROUP
    found = summary.compare("confidence")
    assert found.incorrect_groups == 4
    assert np.isnan([found.auroc, found.low, found.high]).all()
    assert math.isnan(summary.estimate("right/left", outcome=INCORRECT).low)
    assert math.isfinite(summary.estimate("right/left").low)


@pytest.mark.filterwarnings("ignore:No (predictions|targets) found")
def test_a_regression_contributes_to_its_value_and_reads_nothing():
    class Regression(TwoStreams):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            left, right, target, *_ = batch
            return {"loss": nn.functional.mse_loss(self(left, right)[:, 0], target + 0.5)}

    data, _ = said_data(40)
    torch.manual_seed(0)
    module = Regression(Sum(), outputs=1)
    regressed = TensorDataset(*data.tensors[:2], data.tensors[2] + 0.5, data.tensors[3])
    callback = watch_of(module, regressed, **NAMED)
    summary = callback.fusion_summaries["val"]
    assert not summary.contribution_problem
    assert set(summary.probe_problems.values()) == {"there are no targets that are single classes"}
    with torch.no_grad():
        values = module(*data.tensors[:2])[:, 0].double()
    whole = summary.numbers["phi/left"] + summary.numbers["phi/right"]
    others = (values.sum() - values) / (len(values) - 1)
    place = {int(one): i for i, one in enumerate(hashed(data.tensors[3], 0))}
    expected = torch.stack([(values - others)[place[int(one)]] for one in summary.rows["hash"]])
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_numbers_of_tokens_that_change_from_batch_to_batch(masked):
    """Each batch has a length of its own; tokens are permuted whole, with their mask where there is one."""
    data, _ = said_data(80)
    left, right, target, ids = data.tensors

    class Ragged(TwoStreams):
        def forward(self, left, right):
            left, mask = self.left(left), left[..., 2] > -50
            return self.head(self.fusion(left, self.right(right), left_mask=mask if masked else None))

    batches = []
    for number, start in enumerate(range(0, 80, 8)):
        some = slice(start, start + 8)
        length = 3 + number % 3
        tokens = left[some, :length].clone()
        if masked:
            tokens = torch.cat([tokens, torch.full((8, number % 2, 3), -100.0)], dim=1)
        batches.append((tokens, right[some], target[some], ids[some]))
    torch.manual_seed(0)
    module = Ragged()
    callback = AttentionExplainabilityCallback(sample_ids=sample_ids)
    loader = DataLoader(batches, batch_size=None)
    with pytest.warns(UserWarning, match="number of tokens changes"):
        quiet_trainer(callbacks=[callback]).validate(module, loader, verbose=False)
    summary = callback.fusion_summaries["val"]
    assert not summary.contribution_problem
    assert int(summary.numbers["phi/left"].isfinite().sum()) == 80
    assert summary.estimate("right/left").mean > 0.9


def test_three_modalities():
    class Three(TwoStreams):
        def __init__(self):
            super().__init__(Third())
            self.third = nn.Linear(3, WIDTH)

        def forward(self, left, right):
            return self.head(self.fusion(self.left(left), self.right(right), third=self.third(left.flip(1))))

    class Third(nn.Module):
        def forward(self, left, right, third):
            return torch.cat([(left.mean(1) * third.mean(1)), right.mean(1)], dim=1)

    data, _ = said_data(40)
    torch.manual_seed(0)
    names = {"left": 0, "right": 1, "third": "third"}
    summary = summary_of(Three(), data, fusion="fusion", modalities=names)
    assert not summary.contribution_problem
    assert summary.pairs == 3 * 4 * 40
    phi = torch.stack([summary.numbers[f"phi/{name}"] for name in names], dim=1)
    assert phi.isfinite().all()
    assert sum(summary.share(name).mean for name in names) == pytest.approx(1)
    assert summary.numbers["support"].isfinite().any()


def test_what_cannot_be_told_is_not_told():
    data, _ = said_data(40)
    left, right, target, ids = data.tensors
    torch.manual_seed(0)
    module = TwoStreams(Concatenation())
    one = summary_of(module, TensorDataset(left[:1], right[:1], target[:1], ids[:1]), **NAMED)
    assert one.contribution_problem == "fewer than two samples have finite predictions"
    with torch.no_grad():
        module.head.bias[0] = 100
    same = summary_of(module, data, **NAMED)
    assert same.contribution_problem.startswith("one class is predicted for all samples")
    off = summary_of(module, data, contribution_samples=0, **NAMED)
    assert off.contribution_problem == "contribution_samples is 0"
    few = TensorDataset(left, right, torch.where(target < 2, 0, target), ids)
    assert not summary_of(TwoStreams(Concatenation()), few, **NAMED).probe_problems.get("left")
    rare = TensorDataset(left, right, (torch.arange(40) < 9).long(), ids)
    assert "fewer than two classes have 10 samples" in summary_of(module, rare, **NAMED).probe_problems["left"]


def test_two_samples_are_enough_to_permute():
    """Of each, the contributions add up to its probability minus the other's."""
    data, _ = said_data(16)
    module = trained(Concatenation(), data, epochs=12).eval()
    with torch.no_grad():
        probabilities = module(*data.tensors[:2]).softmax(1)
    classes = probabilities.argmax(1)
    two = [0, int((classes != classes[0]).nonzero()[0])]
    summary = summary_of(module, TensorDataset(*(one[two] for one in data.tensors)), **NAMED)
    assert summary.contribution_problem == ""
    for own, number in zip(two, (0, 1), strict=True):
        other = two[1 - number]
        place = summary.sample_numbers.tolist().index(number)
        added = sum(float(summary.numbers[f"phi/{name}"][place]) for name in ("left", "right"))
        expected = probabilities[own, classes[own]] - probabilities[other, classes[own]]
        assert added == pytest.approx(float(expected), abs=1e-5)


def test_samples_that_are_not_finite_are_left_out(infos):
    data, _ = said_data(60)
    left, right, target, ids = (one.clone() for one in data.tensors)
    left[7] = math.nan
    torch.manual_seed(0)
    summary = summary_of(TwoStreams(Concatenation()), TensorDataset(left, right, target, ids), **NAMED)
    assert (summary.samples, summary.nonfinite) == (59, 1)
    assert any("1 samples are left out" in said for said in infos.messages)
    assert not summary.contribution_problem
    assert summary.numbers["phi/left"].isfinite().all()


def test_ids_that_occur_twice_are_still_different_samples():
    """As windows of one recording under its id: each has its own contribution, and is no partner of the others."""
    data, _ = said_data(40)
    left, right, target, ids = data.tensors
    module = trained(Sum(), data, epochs=5)
    summary = summary_of(module, TensorDataset(left, right, target, ids // 2), **NAMED)
    with torch.no_grad():
        logits = module(left, right).double()
    probabilities = logits.softmax(1)
    assert sorted(summary.sample_numbers.tolist()) == list(range(40))
    for i, number in enumerate(summary.sample_numbers.tolist()):
        others = [j for j in range(40) if int(ids[j]) // 2 != int(ids[number]) // 2]
        c = int(logits[number].argmax())
        whole = float(probabilities[number, c] - probabilities[others, c].mean())
        assert float(summary.numbers["phi/left"][i] + summary.numbers["phi/right"][i]) == pytest.approx(whole, abs=1e-5)


def test_the_historys_confidence_is_of_all_samples_and_so_is_its_interval():
    data, _ = said_data(160, noise=1.5)
    module = trained(None, data, epochs=15)
    few, whole = (watch_of(module, data, max_samples=size).history[0] for size in (140, 8192))
    assert few["probed_samples"] == 140
    for name in ("outcome/confidence_auroc", "outcome/confidence_auroc_low", "outcome/confidence_auroc_high"):
        assert few[name] == whole[name]
    assert few["outcome/support_auroc"] != whole["outcome/support_auroc"]


def test_a_few_samples_at_a_time_give_the_same_numbers(monkeypatch):
    """What keeps the memory of many classes small: nothing of samples x classes is kept."""
    data, _ = said_data(150)
    module = trained(Concatenation(), data, epochs=4).eval()
    whole = summary_of(module, data, **NAMED)
    monkeypatch.setattr("lightning_xattn.core.chunks.CELLS", 60)
    monkeypatch.setattr("lightning_xattn.core.chunks.KEPT_CELLS", 100)
    ours = summary_of(module, data, **NAMED)
    assert ours.numbers.keys() == whole.numbers.keys()
    for name, values in whole.numbers.items():
        torch.testing.assert_close(ours.numbers[name], values, atol=1e-6, rtol=1e-6, equal_nan=True, msg=name)
    for name in ("support_cell", "right_cell", "predicted"):
        assert torch.equal(getattr(ours, name), getattr(whole, name))
    for name, classes in whole.probe_classes.items():
        assert torch.equal(ours.probe_classes[name], classes)
        torch.testing.assert_close(ours.probe_probabilities[name], whole.probe_probabilities[name])
    for name, auroc in whole.probe_aurocs.items():
        assert tuple(vars(ours.probe_aurocs[name]).values()) == pytest.approx(tuple(vars(auroc).values()), nan_ok=True)
    for name, error in whole.calibration_errors.items():
        assert ours.calibration_errors[name] == pytest.approx(error, abs=1e-9)
