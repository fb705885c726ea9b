"""Support, what it adds to confidence, and modalities that are not used, where the truth is known."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback, create_explainability_report, explain_features
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.core.notices import begin_run
from lightning_xattn.evaluation.checks import check_unused
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.evaluation.support import name_cells, overrules, unused
from tests.attribution.models import (
    CLASSES,
    NAMED,
    WIDTH,
    Concatenation,
    Sum,
    TwoStreams,
    said_data,
    summary_of,
    trained,
)
from tests.toy import quiet_trainer

SAMPLES = 600


def planted(seed=0, disagreeing=0.3, noise=0.3, samples=SAMPLES):
    """Features of two modalities that show a class each; the second one's is another in some samples."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(CLASSES, (samples,), generator=generator)
    differs = torch.rand(samples, generator=generator) < disagreeing
    second = torch.where(differs, (first + 1 + torch.randint(CLASSES - 1, (samples,), generator=generator)) % 4, first)
    features = {
        name: one_hot(shown, CLASSES) + noise * torch.randn(samples, CLASSES, generator=generator)
        for name, shown in (("eeg", first), ("spec", second))
    }
    return features, first, second


def logits_of(class_ids, certain=3.0, noise=0.0):
    generator = torch.Generator().manual_seed(7)
    return certain * one_hot(class_ids, CLASSES) + noise * torch.randn(len(class_ids), CLASSES, generator=generator)


def test_cells_are_those_that_were_planted():
    features, first, second = planted(noise=0.15)
    third = (torch.maximum(first, second) + 1) % CLASSES  # what neither shows
    kind = torch.arange(SAMPLES) % 3
    predicted = torch.where(kind == 0, first, torch.where(kind == 1, second, third))
    confident = torch.tensor([1.0, 2.0, 5.0])[kind]
    fusion = explain_features(features, logits_of(predicted) * confident[:, None] / 3, first).fusion
    shown = [cell.key for cell in fusion.cells]
    assert shown == ["both", "only_eeg", "only_spec", "neither_agree", "neither_differ"]
    agree, by_first, by_second = first == second, predicted == first, predicted == second
    truth = [
        by_first & by_second,
        by_first & ~by_second,
        ~by_first & by_second,
        ~by_first & ~by_second & agree,
        ~by_first & ~by_second & ~agree,
    ]
    sure = (logits_of(predicted) * confident[:, None] / 3).double().softmax(1).amax(1)
    for cell, chosen in zip(fusion.cells, truth, strict=True):
        assert abs(cell.samples - int(chosen.sum())) <= 0.04 * SAMPLES
        assert cell.share.mean == pytest.approx(cell.samples / SAMPLES)
        right = float(by_first[chosen].double().mean())
        assert cell.accuracy.mean == pytest.approx(right, abs=0.1)
        assert cell.confidence.mean == pytest.approx(float(sure[chosen].mean()), abs=0.05)
        assert cell.calibration_gap.mean == pytest.approx(cell.accuracy.mean - cell.confidence.mean)
        assert cell.accuracy.low <= cell.accuracy.mean <= cell.accuracy.high
    assert [overrules(cell) for cell in fusion.cells] == [False, False, False, True, False]
    rights = {cell.key: cell for cell in fusion.right_cells}
    assert rights["both"].share.mean == pytest.approx(float(agree.double().mean()), abs=0.02)
    assert rights["only_eeg"].share.mean == pytest.approx(float((~agree).double().mean()), abs=0.02)
    assert sum(cell.samples for cell in fusion.right_cells) == SAMPLES


def test_two_bits_are_right_together_only():
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(2, (2, SAMPLES), generator=generator)
    features = {
        name: one_hot(bit, 2) + 0.2 * torch.randn(SAMPLES, 2, generator=generator)
        for name, bit in zip(("eeg", "spec"), bits, strict=True)
    }
    target = 2 * bits[0] + bits[1]
    fusion = explain_features(features, logits_of(target), target).fusion
    rights = {cell.key: cell.share.mean for cell in fusion.right_cells}
    assert fusion.estimate("right/joint").mean > 0.95 > 0.6 > fusion.estimate("right/eeg").mean
    assert 0.1 < rights["joint_only"] < 0.4
    assert rights["neither"] < 0.05
    for name in ("eeg", "spec"):
        assert fusion.estimate(f"joint_gain/{name}").low > 0.3
        assert fusion.auroc_gains[name].low > 0


def test_support_adds_where_errors_are_against_the_modalities_and_not_elsewhere():
    features, first, _ = planted(disagreeing=0.5, noise=0.5)
    generator = torch.Generator().manual_seed(11)
    wrong = torch.rand(SAMPLES, generator=generator) < 0.25
    predicted = torch.where(wrong, (first + 1) % CLASSES, first)
    scores = logits_of(predicted, noise=1.0)
    predicted = scores.argmax(1)
    adds = explain_features(features, scores, first).fusion.added_value
    assert adds.adds
    assert adds.delta_auroc.low > 0.1
    assert adds.delta_log_loss.high < 0
    assert adds.area < adds.baseline_area
    assert adds.risk < adds.baseline_risk
    # The label is random where the prediction is uncertain: no probe knows more than the confidence.
    target = torch.where(wrong, torch.randint(CLASSES, (SAMPLES,), generator=generator), first)
    null = explain_features(features, logits_of(first, noise=1.0), target).fusion.added_value
    assert not null.adds


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"samples": 100}, "needs 30 wrong and 30 correct predictions, this run had"),
        ({"groups": 9}, "it needs 10 groups, this run had 9"),
        ({"rare": 12}, "1 class that the model predicts has fewer than 20 labelled samples"),
        ({"noise": 50.0}, "it needs a linear probe of each modality"),
    ],
)
def test_added_value_is_not_computed_and_why(change, reason):
    features, first, _ = planted(noise=change.get("noise", 0.3), samples=change.get("samples", SAMPLES))
    predicted = torch.where(torch.arange(len(first)) % 4 == 0, (first + 1) % CLASSES, first)
    target, groups = first.clone(), None
    if "rare" in change:
        target[(target == 3).nonzero()[12:, 0]] = 0
    if "groups" in change:
        groups = torch.arange(len(first)) % change["groups"]
    result = explain_features(features, logits_of(predicted), target, groups)
    assert reason in result.fusion.added_value
    assert f"is not computed: {result.fusion.added_value}" in create_explainability_report(result)


def test_samples_without_a_label_have_support():
    features, first, _ = planted()
    target = torch.where(torch.arange(SAMPLES) < 100, -1, first)
    fusion = explain_features(features, logits_of(first), target).fusion
    assert fusion.numbers["support"].isfinite().all()
    assert fusion.cells[0].samples > fusion.cells[0].accuracy.count
    assert fusion.numbers["right/eeg"].isnan().sum() == 100


def test_cells_of_three_modalities_count_supporters():
    features, first, second = planted()
    features["audio"] = features["eeg"] + 0.01 * torch.randn(SAMPLES, CLASSES)
    fusion = explain_features(features, logits_of(first), first).fusion
    assert [cell.key for cell in fusion.cells] == ["all", "2_of_3", "1_of_3", "none_agree", "none_differ"]
    assert fusion.cells[1].share.mean == pytest.approx(float((first != second).double().mean()), abs=0.02)
    assert [name for _, name in name_cells(fusion.modalities)][:2] == ["all 3", "2 of 3"]


def test_rare_classes_are_readable_by_their_macro_auroc():
    generator = torch.Generator().manual_seed(5)
    target = (torch.rand(SAMPLES, generator=generator) < 0.1).long()
    features = {
        name: target[:, None] + scale * torch.randn(SAMPLES, 3, generator=generator)
        for name, scale in (("eeg", 1.5), ("spec", 1.5))
    }
    fusion = explain_features(features, torch.randn(SAMPLES, 2), target).fusion
    assert fusion.estimate("right/eeg").low < fusion.largest_class
    assert fusion.probe_aurocs["eeg"].low > 0.5
    assert not fusion.probe_problems


def test_an_encoder_that_is_dead_has_no_probe():
    features, first, _ = planted()
    result = explain_features(features | {"spec": torch.ones(SAMPLES, 4)}, logits_of(first), first)
    fusion = result.fusion
    assert list(fusion.probe_problems) == ["spec"]
    assert "does not vary within classes" in fusion.probe_problems["spec"]
    assert fusion.numbers["right/spec"].isnan().all()
    assert math.isnan(fusion.probe_aurocs["spec"].mean)
    assert math.isnan(fusion.auroc_gains["eeg"].mean)
    assert math.isnan(fusion.estimate("joint_gain/eeg").mean)
    assert "nan" not in create_explainability_report(result)


def test_a_class_of_one_large_group_is_refused():
    """Without that group's fold there is one class alone, and the others' accuracy would be that of its share."""
    target = (torch.arange(SAMPLES) < 180).long()
    groups = torch.where(target == 1, 0, 1 + torch.arange(SAMPLES) % 30)
    features = {name: torch.randn(SAMPLES, 5) for name in ("eeg", "spec")}
    fusion = explain_features(features, torch.randn(SAMPLES, 2), target, groups).fusion
    assert set(fusion.probe_problems) == {"eeg", "spec"}
    assert "samples cannot be read" in fusion.probe_problems["eeg"]


def test_a_probability_that_is_too_small_for_a_number_is_no_class_that_a_fit_has_not_seen():
    """Twenty samples of one group have another label than both modalities show, and are far from its class."""
    features, first, _ = planted(disagreeing=0.0, noise=0.005)
    groups = torch.arange(SAMPLES) // 20
    target = torch.where(groups == 0, (first + 1) % CLASSES, first)
    fusion = explain_features(features, logits_of(first), target, groups).fusion
    assert fusion.samples == SAMPLES
    cells = {int(n): int(cell) for n, cell in zip(fusion.sample_numbers, fusion.right_cell, strict=True)}
    assert [cells[i] for i in range(SAMPLES)] == [4] * 20 + [0] * (SAMPLES - 20)


def test_samples_that_are_not_finite_are_left_out_and_counted():
    features, first, _ = planted()
    features["eeg"][:7] = math.nan
    result = explain_features(features, logits_of(first), first)
    assert (result.fusion.nonfinite, result.fusion.samples) == (7, SAMPLES - 7)
    assert "Samples left out, as their fusion inputs are not finite:** 7" in create_explainability_report(result)


def test_no_name_of_a_modality_makes_a_model_overrule():
    features, first, second = planted(noise=0.15)
    features = {"agree": features["eeg"], "spec": features["spec"]}
    predicted = torch.where(torch.arange(SAMPLES) % 2 == 0, first, second)
    fusion = explain_features(features, logits_of(predicted), second).fusion
    cells = {cell.key: cell for cell in fusion.cells}
    assert cells["only_agree"].calibration_gap.high < 0
    assert not any(map(overrules, fusion.cells))


def test_errors_of_few_groups_show_nothing_of_support():
    features, first, _ = planted()
    groups = torch.arange(SAMPLES) % 20
    predicted = torch.where(groups < 4, (first + 1) % CLASSES, first)
    fusion = explain_features(features, logits_of(predicted), first, groups).fusion
    assert "of 5 groups each, this run had wrong ones of 4 and correct ones of 16" in fusion.added_value


def test_noise_has_no_support():
    features = {"eeg": torch.randn(SAMPLES, 5), "spec": torch.randn(SAMPLES, 5)}
    target = torch.arange(SAMPLES) % CLASSES
    result = explain_features(features, torch.randn(SAMPLES, CLASSES), target)
    assert set(result.fusion.probe_problems) == {"eeg", "spec"}
    assert result.fusion.cells == []
    assert "Support not computed: it needs a linear probe of each modality" in create_explainability_report(result)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"logits": torch.zeros(SAMPLES)}, ShapeError, r"logits must be \(samples, classes\), floats.*got \(600,\)"),
        ({"targets": torch.zeros(3).long()}, ShapeError, r"targets must be \(600,\) whole numbers"),
        ({"targets": torch.full((SAMPLES,), 4)}, SettingError, "targets must be below 4"),
        ({"features": {"eeg": torch.zeros(SAMPLES, 2)}}, SettingError, "at least two modalities"),
        ({"features": [torch.zeros(SAMPLES, 2)] * 2}, SettingError, "must map at least two modalities to arrays"),
        ({"features": dict.fromkeys(("joint", "spec"), torch.zeros(SAMPLES, 2))}, SettingError, "is none of .*joint"),
        ({"logits": torch.zeros(SAMPLES, 1)}, ShapeError, "of two classes or more.*Of a single logit make two"),
        ({"logits": torch.full((SAMPLES, 4), 0.25)}, SettingError, "logits are probabilities.*np.log"),
        ({"targets": ["cat"] * SAMPLES}, ShapeError, "Expected an array of numbers; got .*cat"),
        ({"groups": 5}, ShapeError, "groups must have 600 ids, one for each sample; got 5"),
        ({"features": {"eeg": torch.zeros(5, 2), "spec": torch.zeros(SAMPLES, 2)}}, ShapeError, r"features\['eeg'\]"),
        ({"class_names": ["a"]}, SettingError, "class_names must have 4 names"),
        ({"groups": ["p1"]}, ShapeError, "groups must have 600 ids"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, error, said):
    features, first, _ = planted()
    given = {"features": features, "logits": logits_of(first), "targets": first}
    with pytest.raises(error, match=said):
        explain_features(**given | change)


def test_arrays_give_the_callbacks_numbers():
    data, _ = said_data(160)
    module = trained(Concatenation(), data).eval()
    ours = summary_of(module, data, **NAMED)
    left, right, target, ids = data.tensors
    with torch.no_grad():
        features = {"left": module.left(left).numpy(), "right": module.right(right).numpy()}
        logits = module(left, right).numpy()
    order = ours.rows["sample_idx"].argsort()
    fusion = explain_features(features, logits, target.tolist(), ids.tolist()).fusion
    place = fusion.rows["sample_idx"].argsort()
    for name in ("right/left", "right/right", "right/joint", "supports/left", "support", "conflict", "confidence"):
        torch.testing.assert_close(fusion.numbers[name][place], ours.numbers[name][order], atol=1e-4, rtol=1e-4)


# The alarm: a modality that adds to the others, and that the model does not use.


def two_bits(samples=240, seed=0):
    """The class is two bits, of which the left tokens show one and the right tokens the other."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (2, samples), generator=generator)
    left = (2.0 * bits[0] - 1)[:, None, None] + 0.5 * torch.randn(samples, 5, 3, generator=generator)
    right = (2.0 * bits[1] - 1)[:, None, None] + 0.5 * torch.randn(samples, 7, 2, generator=generator)
    return TensorDataset(left, right, 2 * bits[0] + bits[1], torch.arange(samples) + 1000)


def ignoring_the_right(data):
    module = trained(Sum(), data)
    with torch.no_grad():
        module.head.weight[:, WIDTH:] = 0
    return module


def test_a_modality_that_adds_and_is_not_used_is_found():
    summary = summary_of(ignoring_the_right(two_bits()), two_bits(), **NAMED)
    assert [unused(summary, name) for name in ("left", "right")] == [0, 1]


def test_a_redundant_modality_is_no_alarm():
    data, _ = said_data(240, disagreeing=0.0, noise=0.3)
    summary = summary_of(ignoring_the_right(data), data, **NAMED)
    assert summary.share("right").high < 0.05
    assert [unused(summary, name) for name in ("left", "right")] == [0, 0]


def test_an_unused_modality_is_found_though_nine_of_ten_are_of_one_class():
    generator = torch.Generator().manual_seed(2)
    samples = 600
    rare = torch.rand(samples, generator=generator) < 0.1
    shown = torch.where(rare, torch.randint(2, (samples,), generator=generator), -1)  # which modality shows it
    signs = [torch.where(shown == side, 2.0, 0.0) for side in (0, 1)]
    left, right = (
        sign[:, None, None] + 0.6 * torch.randn(samples, *shape, generator=generator)
        for sign, shape in zip(signs, ((5, 3), (7, 2)), strict=True)
    )
    data = TensorDataset(left, right, rare.long(), torch.arange(samples))
    summary = summary_of(ignoring_the_right(data), data, **NAMED)
    assert [unused(summary, name) for name in ("left", "right")] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "copy"])
def test_a_modality_that_adds_nothing_rarely_seems_to_add(kind):
    alarms, runs = 0, 100
    for seed in range(runs):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(CLASSES, (200,), generator=generator)
        first = one_hot(target, CLASSES) + torch.randn(200, CLASSES, generator=generator)
        other = torch.randn(200, 8, generator=generator)
        second = other if kind == "noise" else first @ other[:CLASSES]
        fusion = explain_features({"eeg": first, "spec": second}, logits_of(target), target).fusion
        alarms += fusion.estimate("joint_gain/spec").low > 0 or fusion.auroc_gains["spec"].low > 0
    assert alarms <= 0.05 * runs


def test_xor_is_beyond_the_probes_and_the_report_says_so():
    generator = torch.Generator().manual_seed(4)
    samples = 400
    bits = torch.randint(2, (2, samples), generator=generator)

    class Xor(nn.Module):
        def forward(self, left, right):
            product = left.mean((1, 2)) * right.mean((1, 2))
            return torch.cat([product[:, None]] * 2 * WIDTH, dim=1)

    left, right = (
        (2.0 * bit - 1)[:, None, None] + 0.1 * torch.randn(samples, *shape, generator=generator)
        for bit, shape in zip(bits, ((5, 3), (7, 2)), strict=True)
    )
    module = TwoStreams(Xor(), outputs=2)
    with torch.no_grad():
        for encoder in (module.left, module.right):
            encoder.weight.fill_(0.3)
            encoder.bias.zero_()
        module.head.weight[0], module.head.weight[1], module.head.bias[:] = 1.0, -1.0, 0.0
    data = TensorDataset(left, right, bits[0] ^ bits[1], torch.arange(samples))
    callback = AttentionExplainabilityCallback(figures_every_n_epochs=0, **NAMED)
    quiet_trainer(callbacks=[callback]).validate(module, DataLoader(data, batch_size=50), verbose=False)
    summary = callback.fusion_summaries["val"]
    assert summary.estimate("correct").mean > 0.99
    assert set(summary.probe_problems) == {"left", "right"}
    assert summary.estimate("right/joint").high < 0.7
    assert abs(summary.estimate("interaction").mean) > 0.1
    assert summary.estimate("additive_right").mean < 0.7
    text = create_explainability_report(DatasetResult({}, summary, ("0", "1"), "target"))
    assert (
        "it uses what a linear probe of pooled features does not see, part of it in how the modalities combine" in text
    )


def test_the_alarm_is_raised_after_three_validations_in_a_row():
    def records(*values):
        return [
            {"stage": "val", "epoch": epoch, "step": 9 * epoch, "probed_samples": 9, "health/unused/spec": one}
            for epoch, one in enumerate(values)
        ]

    begin_run()
    assert not [*check_unused(records(1.0, 1.0), ["eeg", "spec"])]
    assert not [*check_unused(records(1.0, 1.0, 0.0, 1.0), ["spec"])]
    tested = [one | {"stage": "test"} for one in records(1.0)]
    assert not [*check_unused([*records(1.0, 1.0), *tested], ["spec"])]
    same = [*records(0.0, 1.0), *records(0.0, 1.0)[1:] * 3]  # validated again and again
    assert not [*check_unused(same, ["spec"])]
    (said,) = check_unused(records(0.0, 1.0, 1.0, 1.0), ["eeg", "spec"])
    assert "does not use 'spec'" in said
    assert not [*check_unused(records(1.0, 1.0, 1.0, 1.0), ["spec"])]  # once


class Collapsing(TwoStreams):
    """Learns from the left tokens alone for many epochs, as the right ones begin near a saddle point."""

    def __init__(self):
        super().__init__(Sum())
        with torch.no_grad():
            for one in (self.right.weight, self.right.bias, self.head.weight[:, WIDTH:]):
                one *= 1e-3

    def training_step(self, batch, batch_idx):
        left, right, target, _ = batch
        return nn.functional.cross_entropy(self(left, right), target)


def test_a_fit_that_collapses_to_one_modality_is_warned_of():
    torch.manual_seed(0)
    data = two_bits(320)
    callback = AttentionExplainabilityCallback(figures_every_n_epochs=0, **NAMED)
    loader = DataLoader(data, batch_size=40)
    trainer = quiet_trainer(max_epochs=4, callbacks=[callback], limit_val_batches=None)
    with pytest.warns(UserWarning, match="does not use 'right': in the last 3 recorded validations"):
        trainer.fit(Collapsing(), loader, loader)
    assert trainer.callback_metrics["xattn_health/val/unused/right"] == 1
    assert trainer.callback_metrics["xattn_health/val/unused/left"] == 0
    assert not any(math.isnan(float(one["probe/joint"])) for one in callback.history)
