"""Contributions, against a slow reference, captum, and models whose truth is known."""

import math

import numpy as np
import pytest
import torch
from captum.attr import ShapleyValues

from lightning_xattn import functional
from lightning_xattn.attribution.outputs import RULED_OUT, centred
from lightning_xattn.core.errors import SettingError
from lightning_xattn.functional import Permutation
from tests import reference

SAMPLES, CLASSES = 11, 3


def table_of(model, modalities, samples=SAMPLES):
    """What a model of one number a modality says of every mixture of samples, and the mixtures by subset."""
    inputs = torch.randn(samples, modalities, generator=torch.Generator().manual_seed(1)).double()

    def says(sources):
        return model(torch.stack([inputs[i, m] for m, i in enumerate(sources)]))

    return inputs, says


def permutations_of(says, modalities, pairs, samples=SAMPLES):
    rows, columns = (torch.tensor(places) for places in zip(*pairs, strict=True))
    found = {}
    for subset in functional.permuted_subsets(modalities):
        values = [
            says([int(i) if m in subset else int(j) for m in range(modalities)])
            for i, j in zip(rows, columns, strict=True)
        ]
        found[subset] = Permutation(rows, columns, torch.stack(values))
    return found


def entangled(x):
    """Probabilities of three classes that no sum of functions of one modality each gives."""
    return torch.stack([x.prod(), x.sum().sin(), x[0] - x[-1] ** 2]).softmax(0)


def all_pairs(groups):
    return [(i, j) for i in range(len(groups)) for j in range(len(groups)) if groups[i] != groups[j]]


@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_all_partners_give_the_exact_game(modalities):
    groups = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 7])
    _, says = table_of(entangled, modalities)
    intact = torch.stack([says([i] * modalities) for i in range(SAMPLES)])
    chosen = intact.argmax(1)
    game = functional.play(intact, permutations_of(says, modalities, all_pairs(groups)), groups, chosen, modalities)
    partners = [[j for j in range(SAMPLES) if groups[j] != groups[i]] for i in range(SAMPLES)]
    values = reference.game_values(says, partners, chosen.tolist(), modalities)
    for i, of_sample in enumerate(values):
        np.testing.assert_allclose(game.phi[i], reference.shapley(of_sample, modalities), atol=1e-12)
        assert float(game.interaction()[i]) == pytest.approx(reference.shapley_interaction(of_sample, modalities))
    everything = game.values[frozenset(range(modalities))] - game.values[frozenset()]
    torch.testing.assert_close(game.phi.sum(1), everything)


def test_captum_with_grouped_features_agrees():
    """Its exact Shapley values, averaged over the same baselines: the partners."""
    inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    layer = torch.nn.Sequential(
        torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, CLASSES), torch.nn.Softmax(1)
    )
    with torch.no_grad():
        intact = layer(inputs)
        chosen = intact.argmax(1)
        pairs = all_pairs(range(7))
        rows, columns = (torch.tensor(places) for places in zip(*pairs, strict=True))
        mixed = torch.where(mask == 0, inputs[rows], inputs[columns])
        game = functional.play(
            intact, {frozenset({0}): Permutation(rows, columns, layer(mixed))}, torch.arange(7), chosen, 2
        )
        theirs = torch.zeros(7, 2)
        for i, j in pairs:
            attributed = ShapleyValues(layer).attribute(
                inputs[i : i + 1], baselines=inputs[j : j + 1], target=int(chosen[i]), feature_mask=mask
            )
            theirs[i] += attributed[0, [0, 2]] / 6
    torch.testing.assert_close(game.phi.float(), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("partners", [4, SAMPLES])
@pytest.mark.parametrize("modalities", [2, 3])
def test_an_additive_model_has_no_interaction_whatever_the_partners(partners, modalities):
    def additive(x):
        return torch.stack([x.sum(), (2 * x).cos().sum(), x.pow(3).sum()])

    _, says = table_of(additive, modalities)
    groups = torch.arange(SAMPLES) // 2
    shifts = functional.partner_shifts(SAMPLES, partners)
    pairs = [(i, (i + s) % SAMPLES) for i in range(SAMPLES) for s in shifts]
    pairs = [(i, j) for i, j in pairs if groups[i] != groups[j]]
    intact = torch.stack([says([i] * modalities) for i in range(SAMPLES)])
    permutes = permutations_of(says, modalities, pairs)
    game = functional.play(intact, permutes, groups, intact.argmax(1), modalities)
    assert game.interaction().abs().max() < 1e-12
    if modalities == 2:
        torch.testing.assert_close(functional.additive_projection(len(intact), permutes), intact)


def test_xor_of_two_bits():
    """Neither bit says anything alone: v(a) = v(b) = v(none), and each contributes half of the interaction."""
    bits = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])

    def says(sources):
        return torch.eye(2).double()[bits[sources[0], 0] ^ bits[sources[1], 1]]

    rows, columns = (torch.tensor(places) for places in zip(*[(i, j) for i in range(4) for j in range(4)], strict=True))
    values = torch.stack([says([int(i), int(j)]) for i, j in zip(rows, columns, strict=True)])
    intact = torch.stack([says([i, i]) for i in range(4)])
    # Partners with all bits alike, so every sample is a partner of all, itself too.
    whole = {frozenset({0}): Permutation(rows, columns, values)}
    game = functional.play(intact.repeat(2, 1), _doubled(whole), torch.arange(8) // 4, intact.argmax(1).repeat(2), 2)
    nothing, first, second = (game.values[frozenset(of)] for of in ((), {0}, {1}))
    assert nothing.tolist() == first.tolist() == second.tolist() == [0.5] * 8
    torch.testing.assert_close(game.phi, game.interaction()[:, None].expand(8, 2) / 2)
    assert game.interaction().tolist() == [0.5] * 8


def _doubled(permutes):
    """Two copies of all samples, each the partners of the other copy's."""
    (permute,) = permutes.values()
    rows = torch.cat([permute.rows, permute.rows + 4])
    columns = torch.cat([permute.columns + 4, permute.columns])
    return {frozenset({0}): Permutation(rows, columns, permute.values.repeat(2, 1))}


def test_a_modality_that_is_ignored_contributes_nothing_and_a_symmetric_model_shares_equally():
    inputs, says = table_of(lambda x: torch.stack([x[0].exp(), -x[0]]).softmax(0), 2)
    intact = torch.stack([says([i, i]) for i in range(SAMPLES)])
    game = functional.play(
        intact, permutations_of(says, 2, all_pairs(range(SAMPLES))), torch.arange(SAMPLES), intact.argmax(1), 2
    )
    assert game.phi[:, 1].abs().max() < 1e-12
    np.testing.assert_allclose(functional.contribution_shares(game.phi), [1, 0], atol=1e-12)
    twins = inputs[:, 0]
    table = torch.stack([torch.stack([twins[i] * twins[j], twins[i] + twins[j]]) for i, j in all_pairs(range(SAMPLES))])
    rows, columns = (torch.tensor(places) for places in zip(*all_pairs(range(SAMPLES)), strict=True))
    intact = torch.stack([twins * twins, 2 * twins], dim=1)
    game = functional.play(
        intact, {frozenset({0}): Permutation(rows, columns, table)}, torch.arange(SAMPLES), intact.argmax(1), 2
    )
    torch.testing.assert_close(game.phi[:, 0], game.phi[:, 1])


@pytest.mark.parametrize("partners", [4, 6])
def test_the_fit_is_least_squares(partners):
    rng = np.random.default_rng(0)
    rows, columns = zip(
        *[(i, (i + s) % SAMPLES) for i in range(SAMPLES) for s in functional.partner_shifts(SAMPLES, partners)],
        strict=True,
    )
    values = rng.normal(size=len(rows))
    found = functional.additive_fit(
        Permutation(torch.tensor(rows), torch.tensor(columns), torch.tensor(values)[:, None]), SAMPLES
    )
    ours = found[0] + found[1].T
    np.testing.assert_allclose(ours, reference.additive_fit(rows, columns, values, SAMPLES), atol=1e-10)


def test_a_fit_to_pairs_of_which_rows_and_columns_have_different_numbers():
    pairs = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (2, 1), (3, 3)]
    rows, columns = zip(*pairs, strict=True)
    values = np.random.default_rng(1).normal(size=len(pairs))
    permute = Permutation(torch.tensor(rows), torch.tensor(columns), torch.tensor(values)[:, None])
    a, b = functional.additive_fit(permute, 4)
    np.testing.assert_allclose(a + b.T, reference.additive_fit(rows, columns, values, 4), atol=1e-10)


def test_pairs_that_do_not_connect_determine_no_fit_and_all_sides_have_the_partners_that_were_run():
    pairs = [(0, 1), (1, 0), (2, 3), (3, 2)]
    f, g = torch.randn(2, 4, 2).double()
    rows, columns = (torch.tensor(places) for places in zip(*pairs, strict=True))
    permute = Permutation(rows, columns, f[rows] + g[columns])
    assert functional.additive_fit(permute, 4) is None
    game = functional.play(f + g, {frozenset({0}): permute}, torch.arange(4), torch.zeros(4).long(), 2)
    assert game.interaction().abs().max() < 1e-12
    assert game.values[frozenset()].tolist() == (f + g)[[1, 0, 3, 2], 0].tolist()


def test_a_sample_without_partners_has_no_contribution():
    groups = torch.tensor([0, 0, 0, 0, 0, 0])
    _, says = table_of(entangled, 2, 6)
    intact = torch.stack([says([i, i]) for i in range(6)])
    permute = Permutation(torch.tensor([0]), torch.tensor([1]), intact[:1])
    assert functional.play(intact, {frozenset({0}): permute}, groups, intact.argmax(1), 2).phi.isnan().all()


def test_with_all_pairs_the_additive_projection_is_the_published_one():
    values = torch.randn(SAMPLES, SAMPLES, CLASSES).double()
    # Those of a sample with itself too, as in a table of all.
    rows, columns = torch.cartesian_prod(torch.arange(SAMPLES), torch.arange(SAMPLES)).unbind(1)
    ours = functional.additive_projection(SAMPLES, {frozenset({0}): Permutation(rows, columns, values[rows, columns])})
    for c in range(CLASSES):
        np.testing.assert_allclose(ours[:, c], reference.emap(values[..., c].numpy()), atol=1e-12)


def test_shares_are_of_the_means_and_samples_that_are_undefined_are_left_out():
    phi = torch.tensor([[0.5, -0.1], [0.3, 0.1], [torch.nan, 1.0]])
    torch.testing.assert_close(functional.contribution_shares(phi), torch.tensor([1.0, 0.0]))
    assert functional.contribution_shares(-phi).isnan().all()


@pytest.mark.parametrize("partners", [4, 6, 60])
def test_an_xor_does_not_seem_to_add_up_whatever_the_partners(partners):
    samples = 480
    first, second = torch.randn(2, samples, generator=torch.Generator().manual_seed(1)).double()

    def says(rows, columns):
        return (4 * first[rows] * second[columns])[:, None] * torch.tensor([0.5, -0.5]).double()

    shifts = torch.tensor(list(functional.partner_shifts(samples, partners)))
    rows = torch.arange(samples).repeat_interleave(len(shifts))
    columns = (rows + shifts.repeat(samples)) % samples
    every = torch.arange(samples)
    intact, permuted = says(every, every), says(rows, columns)
    target = intact.argmax(1)
    projected = functional.additive_projection(samples, {frozenset({0}): Permutation(rows, columns, permuted)})
    assert (projected.argmax(1) == target).double().mean() == pytest.approx(0.5, abs=0.08)


def test_how_far_contributions_are_from_those_with_all_partners():
    _, says = table_of(entangled, 2)
    groups = torch.arange(SAMPLES)
    intact = torch.stack([says([i, i]) for i in range(SAMPLES)])
    chosen = intact.argmax(1)
    pairs = [(i, (i + s) % SAMPLES) for i in range(SAMPLES) for s in functional.partner_shifts(SAMPLES, 4)]
    few = functional.play(intact, permutations_of(says, 2, pairs), groups, chosen, 2)
    expected = reference.contribution_errors(pairs, [[float(x) for x in says(list(p))] for p in pairs], chosen.tolist())
    np.testing.assert_allclose(few.phi_error, np.stack([expected, expected], 1), rtol=1e-9)
    others = [(i, j) for i, j in all_pairs(range(SAMPLES)) if i != j]
    assert (functional.play(intact, permutations_of(says, 2, others), groups, chosen, 2).phi_error == 0).all()


def test_a_class_that_is_ruled_out_has_no_part_in_the_mean():
    logits = torch.tensor([[1.0, 3.0, -math.inf], [2.0, 2.0, -math.inf]])
    assert centred(logits).tolist() == [[-1, 1, RULED_OUT], [0, 0, RULED_OUT]]


def test_centred_logits_say_the_same_and_a_value_stays():
    logits = torch.randn(5, CLASSES)
    torch.testing.assert_close(centred(logits).softmax(1), logits.softmax(1))
    torch.testing.assert_close(centred(logits).sum(1), torch.zeros(5))
    assert centred(logits[:, :1]).equal(logits[:, :1])


@pytest.mark.parametrize("partners", [2, 3, 5, 0])
def test_numbers_of_partners_that_no_fit_is_determined_by_are_refused(partners):
    with pytest.raises(SettingError, match=f"partners must be an even number from 4 on; got {partners}"):
        functional.partner_shifts(30, partners)


@pytest.mark.parametrize("samples", [2, 3, 5, 6, 7, 12, 128, 129])
def test_partners_are_symmetric_and_connect_everybody(samples):
    shifts = functional.partner_shifts(samples, 4)
    assert len(set(shifts)) == len(shifts) == min(4, samples - 1)
    assert {(samples - shift) % samples for shift in shifts} == set(shifts)
    assert list(functional.partner_shifts(samples, 4)) == list(shifts)
    rows = torch.arange(samples).repeat_interleave(len(shifts))
    columns = (rows + torch.tensor(list(shifts)).repeat(samples)) % samples
    fit = functional.additive_fit(Permutation(rows, columns, torch.randn(len(rows), 1)), samples)
    assert (fit is not None) == (samples > 2)
