import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule
from torch.utils.data import DataLoader
from torch_geometric.data import Batch

from lightning_xattn.core.errors import DataError, SettingError
from lightning_xattn.hms.datamodule import HMSDataModule
from lightning_xattn.hms.montage import ELECTRODES
from lightning_xattn.hms.recordings import COMPETITION, IIIC, EEGGeometry
from tests.hms.conftest import table_rows, write_folder, write_parquet
from tests.toy import quiet_trainer


def ids(loader: DataLoader) -> list[int]:
    return [label_id for batch in loader for label_id in batch["sample_ids"].tolist()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """17 recordings of 11 patients, which no test changes."""
    return write_folder(tmp_path_factory.mktemp("recordings") / "data", table_rows(17, patients=11))


@pytest.fixture(scope="module")
def make(folder, tmp_path_factory) -> Callable[..., HMSDataModule]:
    """A data module of these recordings, or of others; all of them share their features."""
    cache_dir = tmp_path_factory.mktemp("features")
    return lambda root=folder, **settings: HMSDataModule(root, cache_dir=cache_dir, **settings)


def test_a_batch_is_the_guides(make):
    data_module = make(batch_size=3)
    batch = next(iter(data_module.val_dataloader()))
    assert list(batch) == ["eeg_graphs", "spec_graphs", "targets", "sample_ids", "patient_ids"]
    assert (len(batch["eeg_graphs"]), len(batch["spec_graphs"])) == (9, 119)
    for graph in batch["eeg_graphs"]:
        assert isinstance(graph, Batch)
        assert graph.num_graphs == 3
        assert (graph.x.shape, graph.edge_attr.shape) == ((57, 5), (216, 1))
    for graph in batch["spec_graphs"]:
        assert graph.x.shape == (12, 4)
        assert graph.edge_index.shape == (2, 24)
        assert graph.edge_attr is None
    for graph in (*batch["eeg_graphs"], *batch["spec_graphs"]):
        assert graph.x.dtype == torch.float32
        assert torch.isfinite(graph.x).all()
    assert (batch["targets"].dtype, batch["sample_ids"].dtype) == (torch.float32, torch.int64)
    for target, label_id in zip(batch["targets"], batch["sample_ids"].tolist(), strict=True):
        row = data_module.recordings.by_label_id[label_id]
        assert target.argmax() == row.consensus
        assert target.sum() == 1
    patients = [data_module.recordings.by_label_id[label].patient_id for label in batch["sample_ids"].tolist()]
    assert batch["patient_ids"].tolist() == patients


def test_graphs_belong_to_their_sample(make):
    data_module = make(batch_size=5)
    whole = next(iter(data_module.train_dataloader()))
    dataset = data_module.train_dataloader().dataset
    alone = {int(dataset[i]["sample_ids"]): dataset[i] for i in range(len(dataset))}
    for position, label_id in enumerate(whole["sample_ids"].tolist()):
        for name in ("eeg_graphs", "spec_graphs"):
            for window, graph in enumerate(whole[name]):
                assert torch.equal(graph[position].x, alone[label_id][name][window].x)
        assert torch.equal(whole["targets"][position], alone[label_id]["targets"][0])


def test_folds_hold_patients_apart_and_cover_everything(make):
    seen_in_val: list[int] = []
    for fold in range(4):
        data_module = make(n_folds=4, fold=fold)
        parts = [ids(getattr(data_module, f"{name}_dataloader")()) for name in ("train", "val", "test", "source_test")]
        assert parts[2] == parts[3]
        assert sorted(parts[0] + parts[1] + parts[2]) == [300 + i for i in range(17)]
        patients = [{data_module.recordings.by_label_id[i].patient_id for i in part} for part in parts[:3]]
        assert sum(map(len, patients)) == 11
        seen_in_val += parts[1]
    assert sorted(seen_in_val) == [300 + i for i in range(17)]


def test_a_checkpoint_is_told_the_training_samples(make):
    data_module = make()
    state = data_module.state_dict()
    batches = list(data_module.train_dataloader())
    patients = [patient for batch in batches for patient in batch["patient_ids"].tolist()]
    assert sorted(state["training_ids"].tolist()) == sorted(ids(batches))
    assert sorted(state["training_groups"].tolist()) == sorted(patients)


def test_training_is_shuffled_anew_each_epoch_repeatable_and_whole(make):
    def epochs(seed: int) -> list[list[int]]:
        loader = pickle.loads(pickle.dumps(make(seed=seed, batch_size=4))).train_dataloader()
        return [ids(loader), ids(loader)]

    first, second = epochs(0)
    assert len(first) == len(make().train_dataloader().dataset)
    assert len(first) % 4, "or no batch is short"
    assert first != second
    assert sorted(first) == sorted(second)
    assert epochs(0) == [first, second]
    assert epochs(1) != [first, second]


def test_other_test_data(folder, make, make_folder):
    other = make_folder("other", rows=[row | {"label_id": row["label_id"] + 600} for row in table_rows(4)])
    with_other = make(test_data=other)
    alone = make()
    assert ids(with_other.val_dataloader()) == ids(with_other.test_dataloader()) == [900, 901, 902, 903]
    assert ids(with_other.train_dataloader()) == ids(alone.train_dataloader())
    assert ids(with_other.source_test_dataloader()) == ids(alone.test_dataloader())
    assert [row.label_id for row in with_other.test_recordings] == [900, 901, 902, 903]


def test_folders_of_different_geometry(folder, make, make_folder):
    long = make_folder("long", rows=table_rows(3), seconds=50)
    data_module = make(long, test_data=folder)
    with pytest.raises(DataError, match=r"different lengths.*EEGGeometry\(seconds=50.*Pass eeg_geometry"):
        data_module.setup()
    told = make(long, test_data=folder, n_folds=3, eeg_geometry=IIIC)
    assert next(iter(told.train_dataloader()))["eeg_graphs"][0].x.shape == (19, 5)
    assert len(ids(told.test_dataloader())) == 17


@pytest.mark.parametrize(("seconds", "geometry"), [(10, IIIC), (50, COMPETITION)])
def test_axes_are_in_seconds_from_the_labelled_moment(make_folder, seconds, geometry):
    data_module = HMSDataModule(make_folder(rows=table_rows(1), seconds=seconds))
    axes = data_module.attention_axes
    assert data_module.eeg_geometry == geometry
    assert (len(axes["eeg"]), len(axes["spec"])) == (9, 119)
    assert axes["eeg"].spans[0][0] == -seconds / 2
    assert axes["eeg"].spans[-1][1] == seconds / 2
    assert axes["spec"].spans[0] == (-300, -290)
    assert axes["spec"].spans[1] == (-295, -285)
    assert axes["spec"].spans[-1] == (290, 300)


def test_skipped_rows_are_told_once(make, make_folder):
    folder = make_folder(rows=table_rows(9))
    for name in ("train_eegs/103.parquet", "train_eegs/104.parquet", "train_spectrograms/207.parquet"):
        (folder / name).unlink()
    (folder / "train_eegs/105.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"103\.parquet: missing file.*label_id 303"):
        make(folder).setup()
    data_module = make(folder, on_bad_row="skip")
    with pytest.warns(UserWarning, match="Left out 4 of 9 rows of .*: 3 x missing file, 1 x unreadable file") as told:
        data_module.prepare_data()
    assert len(told) == 1
    data_module.setup("fit")
    data_module.setup("test")
    assert {bad.label_id for bad in data_module.recordings.skipped} == {"303", "304", "305", "307"}
    everything = [i for name in ("train", "val", "test") for i in ids(getattr(data_module, f"{name}_dataloader")())]
    assert sorted(everything) == [300, 301, 302, 306, 308]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"n_folds": 2}, "n_folds must be at least 3"),
        ({"fold": 5}, "fold must be 0 to 4 with n_folds=5; got 5"),
        ({"on_bad_row": "drop"}, "on_bad_row must be 'raise' or 'skip'; got 'drop'"),
    ],
)
def test_settings_are_checked_at_once(setting, message):
    with pytest.raises(SettingError, match=message):
        HMSDataModule("nowhere", **setting)


def test_too_few_patients(make_folder, tmp_path):
    data_module = HMSDataModule(make_folder(rows=table_rows(6, patients=4)), cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"at least 5 patients.*got 4 patient\(s\) in 6 rows"):
        data_module.train_dataloader()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # fork, from Python 3.12 on
def test_workers_load_the_same(make):
    here = make(batch_size=4)
    there = make(batch_size=4, num_workers=1)
    for ours, theirs in zip(here.val_dataloader(), there.val_dataloader(), strict=True):
        assert ours["sample_ids"].tolist() == theirs["sample_ids"].tolist()
        for mine, other in zip(ours["spec_graphs"], theirs["spec_graphs"], strict=True):
            assert torch.equal(mine[0].x, other[0].x)
            assert torch.equal(mine.edge_index, other.edge_index)


class Counter(LightningModule):
    """Counts the samples of each stage, of batches of graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 6)
        self.seen: dict[str, list[int]] = {"train": [], "val": [], "test": []}

    def step(self, batch, stage):
        self.seen[stage] += batch["sample_ids"].tolist()
        spec = torch.stack([graph.x.view(-1, 4, 4).mean(1) for graph in batch["spec_graphs"]]).mean(0)
        return torch.nn.functional.cross_entropy(self.layer(spec), batch["targets"])

    def training_step(self, batch):
        return self.step(batch, "train")

    def validation_step(self, batch):
        self.step(batch, "val")

    def test_step(self, batch):
        self.step(batch, "test")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_trainer_takes_it_as_it_is(iiic_irr, make):
    data_module, model = make(iiic_irr, batch_size=8), Counter()
    trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(model, datamodule=data_module)
    trainer.test(model, datamodule=data_module, verbose=False)
    assert len(set(model.seen["train"])) == 12
    assert len(model.seen["val"]) == 2 * 4
    assert sorted({*model.seen["train"], *model.seen["val"], *model.seen["test"]}) == list(range(3001, 3021))


def test_missing_samples_are_told(make, make_folder, infos):
    folder = make_folder()
    broken = np.random.default_rng(0).normal(0, 20, (2000, 20)).astype(np.float32)
    broken[5:25, 2] = np.nan
    write_parquet(folder / "train_eegs/100.parquet", [*ELECTRODES, "EKG"], broken)
    make(folder, eeg_geometry=EEGGeometry(10, 2, 1)).setup()
    assert "data: filled 20 missing EEG values in 1 of 5 samples.\n" in infos.text
