"""Groups of samples in the callback and the explainer: where they are found, what they are called, what they change."""

import json
import math
import operator
import re
from functools import reduce

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture, create_explainability_report
from lightning_xattn.core.errors import DiscoveryError, SettingError, ShapeError, XAttnWarning
from lightning_xattn.core.ids import UNKNOWN_GROUP, group_keys
from lightning_xattn.evaluation.accumulators import LayerAccumulator
from lightning_xattn.evaluation.layer_summary import LayerSummary
from lightning_xattn.evaluation.statistics import ALIGNMENT, INVALID_ROWS, Column, SampleNumbers
from lightning_xattn.functional import prepare_layer
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from tests import reference
from tests.messages import tells
from tests.toy import ToyModule, quiet_trainer, run_toy, toy_data

SAMPLES = 40
PATIENTS = [i // 4 % 7 for i in range(SAMPLES)]  # 7 patients, each in batches that are not next to each other


class Named(Dataset):
    """Batches as dicts, with groups under a name."""

    def __init__(self, **columns):
        self.columns = columns
        self.tensors = toy_data(SAMPLES).tensors

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        audio, text, target = (tensor[i] for tensor in self.tensors)
        return {"audio": audio, "text": text, "target": target} | {name: of[i] for name, of in self.columns.items()}


class NamedToy(ToyModule):
    def _loss(self, batch):
        return super()._loss((batch["audio"], batch["text"], batch["target"]))


def make_toy():
    torch.manual_seed(2)
    return NamedToy()


def watched(columns, collate_fn=None, **settings):
    """The summary and the callback of a validation."""
    callback = AttentionExplainabilityCallback(class_names=list("abcd"), figures_every_n_epochs=0, **settings)
    loader = DataLoader(Named(**columns), batch_size=6, collate_fn=collate_fn)
    quiet_trainer(callbacks=[callback]).validate(make_toy(), loader, verbose=False)
    return callback.summaries["val"], callback


def explain(loader, **settings):
    def predict(model, batch):
        return run_toy(model, list(batch.values()))

    return ExplainabilityCapture(make_toy(), class_names=list("abcd"), predict=predict).explain_loader(
        loader, **settings
    )


@pytest.fixture(scope="module")
def by_patient():
    return watched({"patient_ids": PATIENTS})


NAMES = [f"patient {i}" for i in PATIENTS]


@pytest.mark.parametrize(
    ("columns", "settings", "noun"),
    [
        ({"groups": PATIENTS}, {}, "groups"),
        ({"groups": NAMES}, {}, "groups"),
        ({"groups": [i + 0.5 for i in PATIENTS]}, {}, "groups"),
        ({"groups": NAMES, "patient_ids": list(range(SAMPLES))}, {}, "groups"),
        ({"site": NAMES}, {"groups": "site"}, "groups"),
        ({"patient": NAMES}, {"groups": "patient"}, "patients"),
        ({"site": PATIENTS}, {"groups": lambda outputs, batch: batch["site"] * 2 + 1}, "groups"),
    ],
    ids=["groups", "strings", "floats", "both", "key", "patient key", "callable"],
)
def test_where_groups_are_found_and_what_they_are_called(by_patient, columns, settings, noun):
    summary, _ = watched(columns, **settings)
    assert (summary.group_noun, summary.groups()) == (noun, 7)
    expected, _ = by_patient
    assert summary.interval(ALIGNMENT) == pytest.approx(expected.interval(ALIGNMENT), abs=1e-9)


def test_intervals_are_by_group(by_patient, tmp_path):
    summary, _ = watched({"patient_ids": PATIENTS}, table=tmp_path)
    assert summary.group_noun == "patients"
    rows = pq.read_table(tmp_path / "attention").to_pylist()
    assert sorted(int(row["group"]) for row in rows) == sorted(PATIENTS)
    values = [row["alignment"] for row in rows]
    groups = [row["group"] for row in rows]
    assert summary.interval(ALIGNMENT) == pytest.approx(reference.grouped_mean_interval(values, groups), abs=1e-4)
    of_class = [i for i, row in enumerate(rows) if row["target"] == 1]
    expected = reference.grouped_mean_interval([values[i] for i in of_class], [groups[i] for i in of_class])
    assert summary.interval(ALIGNMENT, 1) == pytest.approx(expected, abs=1e-4, nan_ok=True)
    parts = [[i for i, row in enumerate(rows) if row["correct"] is outcome] for outcome in (True, False)]
    for outcome, part in zip((CORRECT, INCORRECT), parts, strict=True):
        assert summary.groups(ALIGNMENT, outcome=outcome) == len({groups[i] for i in part})
    found = summary.compare(ALIGNMENT)
    binned = [reference.binned([values[i] for i in part], -1, 1) for part in parts]
    interval = reference.grouped_auroc_interval(*binned, *([groups[i] for i in part] for part in parts))
    assert (found.low, found.high) == pytest.approx(interval, abs=1e-3)
    assert found.auroc == pytest.approx(reference.auroc(*binned), abs=1e-3)
    assert math.isnan(summary.interval(Column.parse("audio_to_text/entropy/head_0"))[0])


def test_the_accuracy_by_patients_holds_what_is_possible(by_patient):
    """Its interval is that of a proportion, of all samples and of each class, and the report has it."""
    summary, _ = by_patient
    results = explain(DataLoader(Named(patient_ids=PATIENTS), batch_size=6))
    facts = json.loads(create_explainability_report(results, format="json"))["layers"][0]["groups"]
    audio, text, target = toy_data(SAMPLES).tensors
    with torch.no_grad():
        right = (make_toy()(audio, text).argmax(1) == target).int().tolist()
    for class_id in (None, 0, 1, 2, 3):
        chosen = [i for i in range(SAMPLES) if class_id in (None, int(target[i]))]
        expected = reference.proportion_interval([right[i] for i in chosen], [PATIENTS[i] for i in chosen])
        assert summary.accuracy_interval(class_id) == pytest.approx(expected, abs=1e-3, nan_ok=True)
        told = facts[0 if class_id is None else 1 + class_id]
        ends = [math.nan if told["accuracy"][end] is None else told["accuracy"][end] for end in ("low", "high")]
        assert ends == pytest.approx(expected, abs=1e-3, nan_ok=True)


def test_without_groups_samples_are_independent():
    summary, callback = watched({})
    assert (summary.group_noun, summary.groups()) == (None, 0)
    assert callback.history[0]["groups"] is None
    interval = summary.interval(ALIGNMENT)
    expected = reference.t_quantile(SAMPLES - 1) * summary.std(ALIGNMENT) / SAMPLES**0.5
    assert interval[1] - interval[0] == pytest.approx(2 * expected, rel=1e-3)


def test_nothing_is_claimed_of_few_patients():
    """Many rows of one person's seizure are one observation."""
    patients = [0 if i < 34 else i for i in range(SAMPLES)]
    few, _ = watched({"patient_ids": patients})
    assert few.groups() == 7
    found = few.compare(ALIGNMENT)
    assert min(found.correct, found.incorrect) >= 5 > min(found.correct_groups, found.incorrect_groups)
    assert math.isnan(found.auroc)
    independent, _ = watched({})
    assert math.isfinite(independent.compare(ALIGNMENT).auroc)


def test_groups_that_are_missing_count_as_one(by_patient):
    some = [None if i % 4 == 0 else patient for i, patient in enumerate(PATIENTS)]

    def collate(samples):
        batch = torch.utils.data.default_collate([{k: v for k, v in s.items() if k != "groups"} for s in samples])
        return batch | {"groups": [sample["groups"] for sample in samples]}

    with pytest.warns(XAttnWarning, match="10 of 40 samples have no group.*taken as one group"):
        summary, _ = watched({"groups": some}, collate)
    assert summary.groups() == 7  # of those that are known
    assert summary.ungrouped == 10
    known, _ = by_patient
    low, high = known.interval(ALIGNMENT)
    assert summary.interval(ALIGNMENT)[1] - summary.interval(ALIGNMENT)[0] > 0.5 * (high - low)

    def lose(samples):
        batch = torch.utils.data.default_collate(samples)
        return batch if 0 in batch["place"] else {k: v for k, v in batch.items() if k != "groups"}

    with pytest.warns(XAttnWarning, match="34 of 40 samples have no group"):
        summary, _ = watched({"groups": PATIENTS, "place": list(range(SAMPLES))}, lose)
    assert summary.ungrouped == SAMPLES - 6


def test_what_is_named_and_wrong_is_an_error():
    with pytest.raises(SettingError, match=tells("groups", "None, a key or a callable", "got 3")):
        AttentionExplainabilityCallback(groups=3)
    with pytest.raises(DiscoveryError, match="Expected groups.*the key 'site' gave nothing"):
        watched({}, groups="site")
    with pytest.raises(ShapeError, match=tells("groups", "6 samples", "int64 (2,)")):
        watched({}, groups=lambda outputs, batch: [1, 2])
    with pytest.raises(ShapeError, match=tells("groups", "6 samples", "float32 (6, 7, 2)")):
        watched({}, groups=lambda outputs, batch: batch["text"])
    for value in ("x", [1, 2], torch.zeros(6, 3), {"a": 1}):  # nothing that can be meant
        guessed = {"groups": value}
        summary, _ = watched({}, lambda samples, guessed=guessed: torch.utils.data.default_collate(samples) | guessed)
        assert summary.group_noun is None
    with pytest.raises(ShapeError, match="Expected one group a sample"):
        group_keys([torch.zeros(2)], "cpu")


def test_few_known_patients_and_some_without_claim_nothing():
    patients = [i % 4 if i < 30 else None for i in range(SAMPLES)]

    def collate(samples):
        batch = torch.utils.data.default_collate([{k: v for k, v in s.items() if k != "groups"} for s in samples])
        return batch | {"groups": [sample["groups"] for sample in samples]}

    with pytest.warns(XAttnWarning, match="10 of 40 samples have no group"):
        summary, _ = watched({"groups": patients}, collate)
    assert summary.groups() == 4
    assert np.isnan([*summary.interval(ALIGNMENT), summary.compare(ALIGNMENT).auroc]).all()


def test_keys_tell_ids_apart_and_stay():
    assert group_keys([4, "4", 4.5, None, math.nan], "cpu").unique().numel() == 4
    assert group_keys([None, math.nan], "cpu").tolist() == [UNKNOWN_GROUP] * 2
    assert group_keys(["patient 7"], "cpu").tolist() == [-8945976229267054775]  # in every process and run
    assert group_keys(torch.tensor([[3], [9]]), "cpu").tolist() == [3, 9]
    floats = torch.tensor([0.0, -0.0, 1.25, math.nan])
    keys = group_keys(floats, "cpu")
    assert keys[0] == keys[1] != keys[2]
    assert keys[3] == UNKNOWN_GROUP
    assert keys[2] == group_keys([1.25], "cpu")[0]
    assert group_keys(list(np.array([3, 9])), "cpu").tolist() == [3, 9]


def add(sums, groups, classes, outcomes, alignments):
    """The sums with those of samples of these alignments; None: of no samples yet."""
    numbers = SampleNumbers((ALIGNMENT, INVALID_ROWS), torch.stack([alignments, torch.zeros_like(alignments)], 1))
    rows = prepare_layer(torch.full((len(alignments), 1, 2, 2), 0.5))
    sums = sums or LayerAccumulator.empty(rows, numbers.columns, 3, "patients")
    return sums.add(rows, numbers, classes, outcomes, torch.zeros(len(alignments)), groups)


def batches_of(rng, samples):
    groups, classes, outcomes = (torch.as_tensor(rng.integers(high, size=samples)) for high in (5, 3, 3))
    values = torch.as_tensor(rng.normal(scale=0.25, size=samples)).clamp(-1, 1)
    return groups, classes, outcomes, values.masked_fill(torch.as_tensor(rng.random(samples) > 0.9), torch.nan)


@pytest.mark.parametrize(("correct", "incorrect"), [(5, 5), (4, 5), (5, 4)])
def test_no_claim_rests_on_the_unknown_group(correct, incorrect):
    """Of each outcome this many known groups of one sample, and two samples whose groups are not known."""
    groups = torch.tensor([*range(correct), *range(10, 10 + incorrect), *[UNKNOWN_GROUP] * 4])
    outcomes = torch.tensor([CORRECT] * correct + [INCORRECT] * incorrect + [CORRECT] * 2 + [INCORRECT] * 2)
    values = torch.linspace(-0.2, 0.2, len(groups), dtype=torch.float64)
    summary = LayerSummary(add(None, groups, torch.zeros_like(groups), outcomes, values))
    found = summary.compare(ALIGNMENT)
    assert (found.correct, found.incorrect) == (correct + 2, incorrect + 2)
    assert (found.correct_groups, found.incorrect_groups) == (correct, incorrect)
    assert summary.groups(ALIGNMENT, 0, CORRECT) == correct
    assert summary.groups(ALIGNMENT, outcome=INCORRECT) == incorrect
    assert summary.ungrouped == 4
    share = reference.proportion_interval((outcomes == CORRECT).int().tolist(), groups.tolist())
    assert summary.accuracy_interval() == pytest.approx(share, abs=1e-3)
    is_claimed = min(correct, incorrect) >= 5
    assert [math.isnan(one) for one in (found.auroc, found.low, found.high)] == [not is_claimed] * 3
    for outcome, known in ((CORRECT, correct), (INCORRECT, incorrect)):
        of_outcome = outcomes == outcome
        expected = reference.grouped_mean_interval(values[of_outcome].tolist(), groups[of_outcome].tolist())
        expected = expected if known >= 5 else (math.nan, math.nan)
        assert summary.interval(ALIGNMENT, 0, outcome) == pytest.approx(expected, nan_ok=True, abs=1e-3)
    if is_claimed:
        parts = [(reference.binned(values[outcomes == one], -1, 1), groups[outcomes == one].tolist()) for one in (1, 0)]
        (right, of_right), (wrong, of_wrong) = parts
        assert found.auroc == pytest.approx(reference.auroc(right, wrong))
        interval = reference.grouped_auroc_interval(right, wrong, of_right, of_wrong)
        assert (found.low, found.high) == pytest.approx(interval, abs=1e-4)


def test_groups_are_counted_within_a_class_and_an_outcome():
    """Class 0 has four known groups and one that is not known, class 1 has six; two of its samples are wrong."""
    groups = torch.tensor([0, 1, 2, 3, UNKNOWN_GROUP, 10, 11, 12, 13, 14, 15])
    classes, outcomes = torch.tensor([0] * 5 + [1] * 6), torch.tensor([CORRECT] * 9 + [INCORRECT] * 2)
    values = torch.linspace(-0.2, 0.2, len(groups), dtype=torch.float64)
    summary = LayerSummary(add(None, groups, classes, outcomes, values))
    counts = {(None, None): 10, (0, None): 4, (1, None): 6, (None, CORRECT): 8, (1, CORRECT): 4, (1, INCORRECT): 2}
    for (class_id, outcome), count in counts.items():
        assert summary.groups(ALIGNMENT, class_id, outcome) == count
        chosen = torch.ones(11, dtype=torch.bool) if class_id is None else classes == class_id
        chosen = chosen if outcome is None else chosen & (outcomes == outcome)
        expected = reference.grouped_mean_interval(values[chosen].tolist(), groups[chosen].tolist())
        expected = expected if count >= 5 else (math.nan, math.nan)
        assert summary.interval(ALIGNMENT, class_id, outcome) == pytest.approx(expected, abs=1e-3, nan_ok=True)
    assert np.isnan(summary.accuracy_interval(0)).all(), "of four known groups"
    right = (outcomes[classes == 1] == CORRECT).int().tolist()
    expected = reference.proportion_interval(right, groups[classes == 1].tolist())
    assert summary.accuracy_interval(1) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("limit", [1, 7, 4096])
def test_sums_do_not_depend_on_batches_or_processes(monkeypatch, limit):
    monkeypatch.setattr("lightning_xattn.evaluation.accumulators.ROWS_IN_MEMORY", limit)
    whole = batches_of(np.random.default_rng(0), 60)
    at_once = add(None, *whole).settled()
    processes = []
    for part in torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(23):
        sums = None
        for batch in part.split(4):
            sums = add(sums, *(column[batch] for column in whole))
        processes.append(sums)
    merged = reduce(operator.add, processes)
    for name in ("by_group", "scores_by_group"):
        ours, expected = getattr(merged, name), getattr(at_once, name)
        torch.testing.assert_close(ours.keys, expected.keys, msg=name)
        torch.testing.assert_close(ours.sums, expected.sums, msg=name)
    assert len(at_once.by_group.keys) == len(torch.stack(whole[:3], dim=1).unique(dim=0))


def test_samples_wait_up_to_a_limit(monkeypatch):
    whole = batches_of(np.random.default_rng(0), 60)
    for limit, waiting in ((60, 0), (61, 1)):
        monkeypatch.setattr("lightning_xattn.evaluation.accumulators.ROWS_IN_MEMORY", limit)
        assert len(add(None, *whole).waiting) == waiting


def test_memory_is_of_groups_not_of_samples():
    """20,000 samples of 45 groups, classes and outcomes; then of 101 different scores."""
    rng, sums, sizes, coarse = np.random.default_rng(0), None, [], None
    for _ in range(40):
        sums = add(sums, *batches_of(rng, 500))
        sizes.append((len(sums.by_group.keys), sum(len(keys) for keys, _ in sums.waiting)))
    assert max(cells for cells, _ in sizes) == 5 * 3 * 3
    assert max(waiting for _, waiting in sizes) < 4096
    for _ in range(40):
        groups, classes, outcomes, values = batches_of(rng, 500)
        coarse = add(coarse, groups, classes, outcomes, (values * 50).round() / 50)
    assert len(coarse.settled().scores_by_group.keys) <= 5 * 3 * 101


def test_reports_call_groups_by_their_name():
    """Of the numbers see tests/report/test_tables.py."""
    report = create_explainability_report(explain(DataLoader(Named(patient_ids=PATIENTS), batch_size=6)))
    words = " ".join(report.split())
    assert "**Samples:** 40 samples of 7 patients" in report
    assert re.search(r"^\| true class +\| n \(patients\) +\| +accuracy \(recall\)", report, re.MULTILINE)
    assert "In brackets: 95 % CI, by patients; none with fewer than 5 patients." in words
    assert "Intervals are by patients" in words
    assert "independent" not in words
    alone = create_explainability_report(explain(DataLoader(Named(), batch_size=6)))
    assert "Samples are taken as independent of each other, since no groups are known." in " ".join(alone.split())
    assert "patients" not in alone
