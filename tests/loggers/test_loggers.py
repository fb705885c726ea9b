"""What each logger has of an evaluation, read back with its own client."""

import importlib
import io
import json
import os
import re
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.core.errors import XAttnWarning
from lightning_xattn.core.files import path_of
from lightning_xattn.loggers import WRITERS, LoggerWriters, Picture
from lightning_xattn.loggers.writers import FolderWriter, MLFlowWriter
from tests.messages import tells
from tests.toy import ToyModule, quiet_trainer, toy_loader, validate

CARD, MAP, SUMMARY = "xattn_card/val/1_modalities", "xattn_map/val/audio_to_text", "xattn_about/val/summary"
ATTENTION = "xattn_card/val/2_attention"


def client(name):
    """A logger's client, which only ``pip install -e ".[clients]"`` brings; `.ci/run` has to have it."""
    return importlib.import_module(name) if "XATTN_CI" in os.environ else pytest.importorskip(name)


def run(logger, tests=True, **settings):
    """A validation that is logged at the step of a fit, and a test."""
    torch.manual_seed(0)
    callback = AttentionExplainabilityCallback(class_names=["a", "b/c", "d e", "🧠"], **settings)
    trainer = quiet_trainer(logger=logger, callbacks=[callback])
    trainer.fit(ToyModule(), toy_loader(), toy_loader(seed=1))
    if tests:
        trainer.test(trainer.model, toy_loader(seed=2), verbose=False)
    return trainer


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The folder and the logger's events of a run with two loggers."""
    folder = tmp_path_factory.mktemp("logged")
    loggers = [TensorBoardLogger(folder, name="", version="run"), CSVLogger(folder, name="", version="csv")]
    run(loggers, tests=False)
    loggers[0].finalize("success")
    events = EventAccumulator(str(folder / "run"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return folder, events


def test_tensorboard(logged):
    _, events = logged
    assert [point.step for point in events.Scalars("xattn_alignment/val/all")] == [4]
    for tag in (CARD, ATTENTION, MAP):
        assert [image.step for image in events.Images(tag)] == [4]
    # The cards are the first things in the images tab, those of validations before those of tests.
    assert sorted(events.Tags()["images"])[:2] == [CARD, ATTENTION]
    assert ATTENTION < "xattn_cards_of_test/test/1_modalities"
    (text,) = events.Tensors(f"{SUMMARY}/text_summary")
    assert text.step == 4
    assert text.tensor_proto.string_val[0].decode().startswith("**The model is right for 39 %")


def test_several_loggers_have_the_same_and_others_get_files(logged):
    folder, events = logged
    files = {str(path.parent.relative_to(folder / "csv")) for path in (folder / "csv").rglob("step_*.png")}
    assert files == set(events.Tags()["images"])
    event = events.Images(CARD)[0].encoded_image_string
    assert event == (folder / "csv" / CARD / "step_000004.png").read_bytes(), "encoded once"
    image = events.Images(CARD)[0]
    assert Image.open(io.BytesIO(event)).size == (image.width, image.height)
    assert (folder / "csv" / SUMMARY / "step_000004.md").read_text().startswith("**The model is right for 39 %")
    (page,) = (folder / "csv").rglob("*.html")
    assert page.read_text() == (folder / "run/xattn_about/val/report.html").read_text()


def test_tensorboardx_gets_its_own_messages(tmp_path):
    """Its writer's class is not torch's."""

    class Writer:
        def __init__(self):
            self.images = []

        def add_image(self, name, pixels, global_step, dataformats):
            self.images.append((name, pixels.tolist(), global_step, dataformats))

    class Board(TensorBoardLogger):
        experiment = Writer()

    LoggerWriters([Board(tmp_path)], tmp_path).log_figures([small_figures()], 3)
    ((name, pixels, step, form),) = Board.experiment.images
    assert (name, np.shape(pixels), step, form) == (CARD, (100, 100, 3), 3, "HWC")


@pytest.mark.slow
def test_after_a_test_there_is_a_page(tmp_path):
    run(TensorBoardLogger(tmp_path, name="", version="run"))
    page = (tmp_path / "run/xattn_about/test/report.html").read_text()
    assert page.startswith("<!doctype html>")


@pytest.mark.slow
def test_weights_and_biases(tmp_path, monkeypatch):
    wandb = client("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(WandbLogger(save_dir=tmp_path, offline=True, project="p"), table=tmp_path / "table")
    wandb.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    # The client's process may still write when finish returns.
    for _ in range(100):
        records = list(_wandb_history(next(folder.glob("*.wandb"))))
        if [one for one in records if "xattn_alignment/test/all" in one]:
            break
        time.sleep(0.1)
    pictures = [record for record in records if f"{CARD}/path" in record]
    assert [record["trainer/global_step"] for record in pictures] == [4]
    assert f"{ATTENTION}/path" in pictures[0], "the pictures of an epoch are one step of theirs"
    others = [record for record in records if f"{MAP}/path" in record]
    assert [record["trainer/global_step"] for record in others] == [4]
    assert "xattn_map/val/text_to_audio/path" in others[0], "and so are those of the end of the fit"
    with Image.open(folder / "files" / pictures[0][f"{CARD}/path"]) as picture:
        assert picture.width > 400
    assert [one["trainer/global_step"] for one in records if f"{SUMMARY}/path" in one] == [4]
    tables = [record for record in records if "xattn_about/val/samples/nrows" in record]
    assert [record["xattn_about/val/samples/nrows"] for record in tables] == [23]
    assert [one["trainer/global_step"] for one in records if "xattn_alignment/val/all" in one] == [4]


def _wandb_history(path):
    """What was logged, out of the file that ``wandb sync`` sends: LevelDB's log format, after 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # no header fits into the rest of a block
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {"/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in items}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*loader strategy is deprecated")  # MLflow's use of SQLAlchemy
def test_mlflow(tmp_path):
    mlflow = client("mlflow")
    uri, artifacts = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "artifacts"
    logger = MLFlowLogger("e", tracking_uri=uri, artifact_location=artifacts.as_uri())
    run(logger, table=tmp_path / "table")
    store = mlflow.MlflowClient(uri)
    steps = [metric.step for metric in store.get_metric_history(logger.run_id, "xattn_alignment/val/all")]
    # MLflow takes no name like 🧠, the fourth class, and ends a run that logs one.
    assert {"xattn_alignment/val/d e", "xattn_alignment/val/class_3"} <= set(store.get_run(logger.run_id).data.metrics)

    def below(path):
        for one in store.list_artifacts(logger.run_id, path):
            yield from below(one.path) if one.is_dir else [one.path]

    found = list(below(None))
    pictures = [path for path in found if path.startswith("images/") and path.endswith(".png")]
    overviews = [path for path in pictures if "modalities" in path and "val" in path]
    assert any("2_attention" in path for path in pictures)
    assert sorted(int(re.search(r"step\W(\d+)", path)[1]) for path in overviews) == steps == [4]
    assert f"{SUMMARY}/step_000004.md" in found
    assert "xattn_about/test/report/step_000005.html" in found
    assert len([path for path in found if path.endswith(".parquet")]) == 4
    local = mlflow.artifacts.download_artifacts(run_id=logger.run_id, artifact_path=overviews[0], tracking_uri=uri)
    with Image.open(local) as picture:
        assert picture.width > 400


@pytest.mark.slow
def test_comet(tmp_path):
    comet_ml = client("comet_ml")
    logger = CometLogger(online=False, project="p")
    # Lightning's own offline experiment is disabled: it writes nothing.
    logger._experiment = comet_ml.OfflineExperiment(
        offline_directory=str(tmp_path), log_env_details=False, log_code=False, auto_output_logging=False
    )
    run(logger, table=tmp_path / "table")
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as whole:
        messages = [json.loads(line) for line in whole.read("messages.json").decode().splitlines()]
        files = [one["payload"] for one in messages if one["type"] == "file_upload"]
        about = [one["additional_params"] for one in files]
        names = {(one.get("fileName") or one.get("figName"), one.get("step")) for one in about}
        assert {(CARD, 4), (ATTENTION, 4), (MAP, 4), (f"{SUMMARY}.md", 4)} <= names
        assert any(name == "xattn_about/test/report.html" for name, _ in names)
        assert len([name for name, _ in names if name.endswith(".parquet")]) == 4
        picture = next(one for one in files if one["additional_params"].get("figName") == CARD)
        assert Image.open(io.BytesIO(whole.read(Path(picture["file_path"]).name))).width > 400


def test_without_a_logger_files_are_under_the_trainers_root_folder(tmp_path, infos, monkeypatch):
    # What is in the pictures does not matter here, and they take long to draw.
    monkeypatch.setattr("lightning_xattn.visualizations.render", lambda figure: np.zeros((2, 3, 3), np.uint8))
    validate(ToyModule(), AttentionExplainabilityCallback(), logger=False, default_root_dir=tmp_path)
    assert (tmp_path / "xattn_output" / CARD / "step_000000.png").exists()
    assert not list(tmp_path.rglob(".*"))
    (said,) = [said for said in infos.messages if said.startswith("val: ")]
    report = tmp_path / "xattn_output/xattn_about/val/report/step_000000.html"
    assert said.splitlines()[-2:] == [f"  Figures: {tmp_path / 'xattn_output'}", f"  Report: {report}"]
    assert report.exists()


def test_a_trial_run_leaves_nothing(tmp_path):
    trainer = quiet_trainer(fast_dev_run=True, callbacks=[AttentionExplainabilityCallback()], default_root_dir=tmp_path)
    trainer.fit(ToyModule(), toy_loader(), toy_loader())
    assert list(tmp_path.iterdir()) == []


BLACK = Picture(np.zeros((2, 3, 3), np.uint8))


def small_figures():
    yield CARD, Figure(figsize=(1, 1))


def log_twice(writers):
    """Figures, and then again, as a report comes after them."""
    for step in (0, 1):
        writers.log_figures([small_figures()], step)


def test_a_logger_that_fails_is_reported_once_and_ends_nothing(tmp_path, monkeypatch):
    class Broken(CSVLogger):
        pass

    class BrokenWriter(FolderWriter):
        def log_images(self, images, step):
            raise OSError("disk on fire")

    monkeypatch.setitem(WRITERS, "Broken", lambda logger: BrokenWriter(logger, tmp_path))
    loggers = [Broken(tmp_path), CSVLogger(tmp_path, name="", version="csv")]
    with pytest.warns(XAttnWarning, match=tells("Broken", "disk on fire")) as warned:
        log_twice(LoggerWriters(loggers, tmp_path))
    assert len(warned) == 1
    assert (tmp_path / "csv" / CARD / "step_000001.png").exists()


@pytest.mark.parametrize("what", ["a file in the way", "no permission"])
def test_what_cannot_be_written_is_absent_and_said_once(what, tmp_path, monkeypatch):
    root = tmp_path / "xattn_output"
    if what == "a file in the way":
        root.write_text("not a folder")
    else:  # root may write everywhere
        monkeypatch.setattr(Path, "mkdir", lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.warns(XAttnWarning, match=tells("Writing files", "gets nothing more of this evaluation")) as warned:
        log_twice(LoggerWriters([], root))
    assert len(warned) == 1
    assert not list(tmp_path.rglob("*.part"))


def test_figures_that_cannot_be_drawn_are_reported(tmp_path):
    def figures():
        raise ValueError("no ink")
        yield

    with pytest.warns(XAttnWarning, match=tells("pictures of this evaluation are missing", "no ink")):
        LoggerWriters([], tmp_path).log_figures([figures()], 0)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("xattn_map/val/a_to_b", "xattn_map/val/a_to_b"),
        ("xattn_map/val/../../evil", "xattn_map/val/_/_/evil"),
        ("/etc/passwd", "_/etc/passwd"),
        ("a/b c/🧠:d", "a/b c/__d-91b40f9f"),
        ("a/" + "x" * 300, "a/" + "x" * 100 + "-1b432d13"),
        ("a/con", "a/_con-fdbf975c"),
    ],
)
def test_names_are_paths_that_stay_in_their_folder(name, path):
    assert path_of(name).as_posix() == path


def test_any_names_are_two_files_that_can_be_written(tmp_path):
    names = [
        "?",
        "*",
        "\ud800",
        "\udfff",
        "\0",
        "a\n",
        "a\t",
        "\u202ea",
        "\x1b[31m",
        "NUL",
        "com1.png",
        "漢" * 200,
        "漢" * 201,
    ]
    FolderWriter(None, tmp_path).log_images({f"map/{name}": BLACK for name in names}, 0)
    written = list((tmp_path / "map").glob("*/step_000000.png"))
    assert len(written) == len(names)
    assert all(path.parent.name.isprintable() and len(path.parent.name.encode()) < 120 for path in written)
    assert not any(path.parent.name.lower().startswith(("nul", "com1")) for path in written)


def test_about_twenty_curves_and_three_of_each_class_are_logged_by_default():
    trainer = quiet_trainer(callbacks=[AttentionExplainabilityCallback(class_names=list("abcd"))])
    trainer.validate(ToyModule(), toy_loader(), verbose=False)
    names = [name for name in trainer.callback_metrics if name.startswith("xattn_")]
    of_classes = {f"xattn_alignment/val/{name}" for name in "abcd"}
    of_classes |= {f"xattn_entropy/val/{one}/{name}" for one in ("audio_to_text", "text_to_audio") for name in "abcd"}
    assert of_classes <= set(names)
    assert 12 <= len(set(names) - of_classes) <= 30


def test_the_place_of_mlflow_has_no_password():
    logger = SimpleNamespace(run_id="7", _tracking_uri="https://me:secret@host:5000/path")
    assert MLFlowWriter(logger).describe_place() == "MLflow run 7 at https://host:5000/path"
