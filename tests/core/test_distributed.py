"""Several real processes log what one process logs over the same samples, and none of them hangs."""

import json
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.core.distributed import SINGLE_PROCESS, unique_sample_indices
from lightning_xattn.core.errors import XAttnWarning
from lightning_xattn.evaluation.evaluation import Evaluation
from lightning_xattn.evaluation.settings import Settings
from tests import ddp_run
from tests.processes import run_processes
from tests.toy import ToyModule, quiet_trainer, toy_data, toy_loader


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_process_finds_what_one_process_finds(ranks, tmp_path):
    """All of it after one start of the processes, which takes longer than what they do."""
    run_processes("tests.ddp_run", ranks, tmp_path)
    found = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
    for scenario in ddp_run.SCENARIOS[ranks]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one scenario has NaN in its attention, and is warned of it
            alone = ddp_run.validate(scenario, ranks, {}, tmp_path / "alone")
        for one in found:
            assert_same_evaluation(one[scenario], alone, ranks, is_tested=scenario == "many")
        assert_table(tmp_path / "table" / scenario / "attention", ranks, len(ddp_run.make_data(scenario, ranks)))
    assert all(one["fit"] == found[0]["fit"] for one in found)
    assert found[0]["fit"]["epochs"] == [0, 1]


def assert_same_evaluation(found, alone, ranks, is_tested):
    """Curves and intervals by group of one process, by few collectives; no sample is counted twice."""
    assert list(found["logged"]) == list(alone["logged"])
    for name, value in alone["logged"].items():
        # Faithfulness is a ratio to a small cost, whose rounding depends on how many samples run at once.
        tolerance = 1e-5 if name.startswith("xattn_faithfulness") else 1e-6
        assert found["logged"][name] == pytest.approx(value, abs=tolerance, nan_ok=True), name
    assert alone["by_group"][0] == (47 if is_tested else 8)
    assert np.isfinite(alone["by_group"]).all()
    assert found["by_group"] == pytest.approx(alone["by_group"], abs=1e-6)
    (record,), (merged,) = alone["history"], found["history"]
    assert any(name.startswith("faithfulness/") for name in record) == is_tested
    # The sums and who can replay; what they have replayed for contributions, and to test the attention.
    assert found["collectives"] == ["all_gather_object"] * (3 if is_tested else 2)
    assert merged["samples"] == record["samples"]
    assert merged["repeats"] == -record["samples"] % ranks


def assert_table(folder, ranks, samples):
    """Each sample stands in it once, in a shard of each process."""
    assert sorted(int(path.name.split("rank=")[1][0]) for path in folder.iterdir()) == list(range(ranks))
    assert sorted(map(int, pq.read_table(folder)["sample_id"].to_pylist())) == [100 + i for i in range(samples)]


def test_repeats_are_counted_as_the_sampler_deals():
    dataset = TensorDataset(torch.arange(22))
    seen = []
    for rank in range(3):
        for shuffle in (False, True):
            sampler = DistributedSampler(dataset, num_replicas=3, rank=rank, shuffle=shuffle)
            loader = DataLoader(dataset, batch_size=3, sampler=sampler)
            kept = []
            for batch_idx, (batch,) in enumerate(loader):
                places = unique_sample_indices(loader, 0, batch_idx, len(batch))
                kept += batch[: len(places)].tolist()
                assert shuffle or kept[-len(places) :] == list(places)
            seen += [] if shuffle else kept
            assert len(kept) == 8 - (rank > 0)  # 24 places for 22 samples: ranks 1 and 2 have a repeat each
    assert sorted(seen) == list(range(22))
    sampler = DistributedSampler(dataset, num_replicas=3, rank=2, shuffle=False)
    by_batch = DataLoader(dataset, batch_sampler=BatchSampler(sampler, 4, drop_last=False))
    assert [list(unique_sample_indices(by_batch, 0, batch_idx, 4)) for batch_idx in (0, 1)] == [
        [2, 5, 8, 11],
        [14, 17, 20],
    ]
    assert unique_sample_indices(DataLoader(dataset), 0, 100, 5) is None
    for several in ([DataLoader(dataset), by_batch], {"plain": DataLoader(dataset), "dealt": by_batch}):
        assert [unique_sample_indices(several, which, 1, 4) for which in (0, 1)] == [None, range(14, 23, 3)]
    assert SINGLE_PROCESS.gather("mine") == ["mine"]


def test_repeats_are_those_of_their_own_dataloader():
    callback = AttentionExplainabilityCallback()
    data = toy_data(22)
    dealt = DataLoader(data, batch_size=3, sampler=DistributedSampler(data, num_replicas=3, rank=2, shuffle=False))
    trainer = quiet_trainer(callbacks=[callback], use_distributed_sampler=False)
    trainer.validate(ToyModule(), [toy_loader(5), dealt], verbose=False)
    found = [(record["dataloader"], record["samples"], record["repeats"]) for record in callback.history]
    assert found == [(0, 5, 0), (1, 7, 1)]


def _evaluated(batch):
    """One process's evaluation of a batch, and what recorded it."""
    module, settings = ToyModule().eval(), Settings(contribution_samples=0)
    recorder, evaluation = settings.recorder(module), Evaluation(settings, module, expects_targets=False)
    with recorder:
        outputs = module(*batch[:2])
    evaluation.add(evaluation.read(*recorder.collect_step(outputs, batch), recorder))
    return evaluation, recorder


def test_processes_that_do_not_agree_on_the_classes_have_none():
    """The first batch of one had no targets; this must not end the run of all."""
    audio, text, target = toy_data(5)[:]
    evaluation, recorder = _evaluated((audio, text, target))
    other, _ = _evaluated((audio, text))
    parts = [evaluation.own_totals(), other.own_totals()]
    assert [bool(part.classes) for part in parts] == [True, False]
    with pytest.warns(XAttnWarning, match="Processes found different numbers of classes"):
        result = evaluation.summarise(recorder, tests_attention=False, parts=parts)
    (layer,) = result.summaries.values()
    assert (layer.samples, layer.n_classes, evaluation.classes) == (10, 0, ())


def test_a_warning_names_a_process_that_records_nothing():
    evaluation, recorder = _evaluated(toy_data(5)[:])
    other, _ = _evaluated(toy_data(5)[:])
    other.totals.recording_problem, other.totals.left_out_batches = "No cross-attention ran.", 3
    parts = [evaluation.own_totals(), other.own_totals()]
    with pytest.warns(XAttnWarning, match="One of several processes records nothing.*No cross-attention ran"):
        evaluation.summarise(recorder, tests_attention=False, parts=parts)
    assert evaluation.totals.left_out_batches == 3
