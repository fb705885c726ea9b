"""What loggers have of a fit, as their files say: two figures of each drawn epoch, and everything once, at its end."""

import io
import signal

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.callbacks import Callback, EarlyStopping
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.callback import pictures as pictures_module
from lightning_xattn.callback.pictures import Drawn
from lightning_xattn.core.errors import SettingError, XAttnWarning
from lightning_xattn.evaluation.results import DatasetResult
from lightning_xattn.report.figures import attention_figure, card_figure, epoch_figures, fusion_figures
from lightning_xattn.visualizations import render
from tests.callback.test_epoch_log import ManyLayers
from tests.messages import tells
from tests.toy import NAMES, ToyModule, labelled_loader, quiet_trainer, toy_loader

CARD, ATTENTION, SUMMARY = "xattn_card/val/1_modalities", "xattn_card/val/2_attention", "xattn_about/val/summary"
MAIN = {CARD, ATTENTION}
OTHER = {
    *("xattn_contribution/val/shares", "xattn_entropy/val/by_head"),
    *("xattn_map/val/audio_to_text", "xattn_map/val/text_to_audio", "xattn_outcome/val/class_comparison"),
}
STEPS = 5
"""Of an epoch."""


def fit(folder, watch, module=None, others=(), loggers=(), loaders=None, **settings):
    """A fit of the callback, and the events that its first logger has."""
    torch.manual_seed(0)
    logger = TensorBoardLogger(folder, name="", version="run")
    trainer = quiet_trainer(logger=[logger, *loggers], callbacks=[watch, *others], **settings)
    try:
        trainer.fit(module or ToyModule(), toy_loader(), loaders or toy_loader(seed=1))
    finally:
        logger.finalize("success")
    return trainer, events_of(folder)


def events_of(folder):
    events = EventAccumulator(str(folder / "run"), size_guidance={"images": 0, "tensors": 0})
    return events.Reload()


def epoch_of(event):
    """Its scalars' step is that of the epoch's last batch."""
    return (event.step + 1) // STEPS - 1


def images_of(events):
    """The tags of each step, in the order of the steps; each tag once."""
    found = {}
    for tag in events.Tags()["images"]:
        for event in events.Images(tag):
            tags = found.setdefault(epoch_of(event), [])
            assert tag not in tags, f"{tag} is logged twice"
            tags.append(tag)
    return {epoch: set(found[epoch]) for epoch in sorted(found)}


def texts_of(events):
    """The steps of the summaries."""
    tags = [tag for tag in events.Tags()["tensors"] if "summary" in tag.removesuffix("/text_summary")]
    return {tag.removesuffix("/text_summary"): [*map(epoch_of, events.Tensors(tag))] for tag in tags}


def pixels_of(events, tag, epoch):
    (image,) = [one for one in events.Images(tag) if epoch_of(one) == epoch]
    return np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))


@pytest.fixture
def quick(monkeypatch):
    """What is in the pictures does not matter here, and they take long to draw."""

    def main(self):
        names = "xattn_card/{}/1_modalities", "xattn_card/{}/2_attention"
        return [[(name.format(self.scope), Figure((0.1, 0.1)))] for name in names]

    def others(self):
        return [[(f"xattn_entropy/{scope}/by_head", Figure((0.1, 0.1)))] for scope in self.layers.values()]

    monkeypatch.setattr(Drawn, "main_figures", main)
    monkeypatch.setattr(Drawn, "other_figures", others)
    monkeypatch.setattr(pictures_module, "create_explainability_report", lambda whole, **form: "# A report")


REST = {"xattn_entropy/val/by_head"}
"""With these."""


def test_an_epoch_of_a_fit_has_two_figures_and_the_end_has_all_others(tmp_path):
    cards = []

    class Keeps(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                result = DatasetResult({}, watch.fusion_summaries["val"], NAMES, "target")
                context = f"val, epoch {trainer.current_epoch}"
                cards.append(render(card_figure(result, watch.history, context)))

    watch = AttentionExplainabilityCallback(class_names=NAMES)
    _, events = fit(tmp_path, watch, others=[Keeps()], loaders=labelled_loader(), max_epochs=4)
    assert images_of(events) == {0: MAIN, 1: MAIN, 2: MAIN, 3: MAIN | OTHER}
    assert texts_of(events) == {SUMMARY: [3]}
    # Every pixel is what the summaries and the history say.
    summary, said = watch.summaries["val"], {"classes_by": "target", "context": "val, epoch 3"}
    expected = {
        ATTENTION: attention_figure(summary, NAMES, axes={}, **said),
        **dict(fusion_figures(watch.fusion_summaries["val"], "val", NAMES, **said)),
        **dict(epoch_figures(summary, "val", NAMES, axes={}, **said)),
    }
    for tag in OTHER | {ATTENTION}:
        np.testing.assert_array_equal(pixels_of(events, tag, 3), render(expected[tag]), err_msg=tag)
    for epoch, card in enumerate(cards):
        np.testing.assert_array_equal(pixels_of(events, CARD, epoch), card)
    assert cards[1].shape != cards[2].shape, "from three validations on it is drawn over the epochs"


@pytest.mark.parametrize("method", ["validate", "test"])
def test_an_evaluation_by_itself_has_everything_at_once(method, tmp_path):
    stage = {"validate": "val"}.get(method, method)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = quiet_trainer(logger=logger, callbacks=[AttentionExplainabilityCallback()])
    getattr(trainer, method)(ToyModule(), labelled_loader(), verbose=False)
    events = events_of(tmp_path)
    assert set(events.Tags()["images"]) == {
        tag.replace("/val/", f"/{stage}/").replace("card/test", "cards_of_test/test") for tag in MAIN | OTHER
    }
    assert f"xattn_about/{stage}/summary/text_summary" in events.Tags()["tensors"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("settings", "main", "rest"),
    [
        ({}, [0, 1, 2, 3], [3]),
        ({"figures_every_n_epochs": 2}, [0, 2, 3], [3]),
        ({"figures_every_n_epochs": 9}, [0, 3], [3]),
        ({"figures_every_n_epochs": 0}, [], []),
        ({"figures": "all"}, [0, 1, 2, 3], [0, 1, 2, 3]),
        ({"figures": "all", "figures_every_n_epochs": 2}, [0, 2, 3], [0, 2, 3]),
        ({"figures": "all", "figures_every_n_epochs": 3}, [0, 3], [0, 3]),
        ({"figures": "all", "figures_every_n_epochs": 0}, [], []),
        ({"every_n_epochs": 3, "figures_every_n_epochs": 2}, [0, 3], [3]),
        ({"every_n_epochs": 2}, [0, 2], [2]),
    ],
)
def test_which_epochs_have_figures_and_reports(settings, main, rest, tmp_path):
    """The end has all of the last recorded epoch, each once."""
    _, events = fit(tmp_path, AttentionExplainabilityCallback(**settings), max_epochs=4)
    expected = {epoch: MAIN | (REST if epoch in rest else set()) for epoch in main}
    assert images_of(events) == expected
    assert texts_of(events) == ({SUMMARY: rest} if rest else {})


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("validated", "every", "figures", "main"), [(2, 1, 2, [1, 3]), (2, 2, 1, [1]), (1, 3, 2, [0, 3])]
)
def test_every_n_is_counted_among_the_epochs_that_are_validated(validated, every, figures, main, tmp_path):
    watch = AttentionExplainabilityCallback(every_n_epochs=every, figures_every_n_epochs=figures)
    _, events = fit(tmp_path, watch, max_epochs=4, check_val_every_n_epoch=validated)
    assert list(images_of(events)) == main


class StopsIn(Callback):
    """Raises in a training batch of an epoch."""

    def __init__(self, error, epoch=1):
        self.error, self.epoch = error, epoch

    def on_train_batch_start(self, trainer, *args):
        if trainer.current_epoch == self.epoch:
            raise self.error


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("end", ["early stopping", "max_steps", "a stop that was asked for"])
def test_a_fit_that_ends_early_has_everything_of_its_last_epoch(end, tmp_path):
    class Asks(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    stopper = EarlyStopping("xattn_alignment/val/all", min_delta=9.0, patience=1, check_finite=False)
    others = {"early stopping": [stopper], "a stop that was asked for": [Asks()]}.get(end, [])
    settings = {"max_steps": 2 * STEPS + 2, "max_epochs": -1} if end == "max_steps" else {"max_epochs": 9}
    _, events = fit(tmp_path, AttentionExplainabilityCallback(), others=others, **settings)
    assert images_of(events) == {0: MAIN, 1: MAIN | REST}
    assert texts_of(events) == {SUMMARY: [1]}


@pytest.mark.usefixtures("quick")
def test_ctrl_c_ends_a_fit_as_usual(tmp_path):
    watch, handler = AttentionExplainabilityCallback(), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            fit(tmp_path, watch, others=[StopsIn(KeyboardInterrupt())], max_epochs=9)
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning ignores from then on
    assert images_of(events_of(tmp_path)) == {0: MAIN | REST}
    assert watch._run.undrawn is None


@pytest.mark.usefixtures("quick")
def test_after_an_error_nothing_more_is_drawn(tmp_path):
    watch = AttentionExplainabilityCallback()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, watch, others=[StopsIn(ZeroDivisionError())], max_epochs=9)
    assert images_of(events_of(tmp_path)) == {0: MAIN}
    assert watch._run.undrawn is None


@pytest.mark.usefixtures("quick")
def test_a_second_fit_begins_anew(tmp_path):
    watch = AttentionExplainabilityCallback()
    fit(tmp_path / "first", watch)
    _, events = fit(tmp_path / "second", watch, max_epochs=2)
    assert images_of(events) == {0: MAIN, 1: MAIN | REST}
    _, events = fit(tmp_path / "third", watch, limit_val_batches=0)
    assert images_of(events) == {}, "without a validation there is nothing to draw"


@pytest.mark.usefixtures("quick")
def test_each_dataloader_has_two_figures_and_each_layer_is_drawn_at_the_end(tmp_path):
    scopes = ("val", "val/dataloader_1")
    loaders = [toy_loader(seed=1), toy_loader(seed=2)]
    _, events = fit(tmp_path, AttentionExplainabilityCallback(), ManyLayers(), loaders=loaders, max_epochs=2)
    main = {f"xattn_card/{scope}/{which}" for scope in scopes for which in ("1_modalities", "2_attention")}
    rest = {f"xattn_entropy/{scope}/layers.{i}/by_head" for scope in scopes for i in (0, 2, 3, 5)}
    assert images_of(events) == {0: main, 1: main | rest}
    assert texts_of(events) == {f"xattn_about/{scope}/summary": [1] for scope in scopes}


def test_of_several_layers_the_first_is_drawn_in_each_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(Drawn, "other_figures", lambda self: ())
    watch = AttentionExplainabilityCallback()
    _, events = fit(tmp_path, watch, ManyLayers())
    context = "val, epoch 0, layer layers.0"
    summary, names = watch.summaries["val/layers.0"], [f"class_{i}" for i in range(4)]
    expected = attention_figure(summary, names, classes_by="target", axes={}, context=context)
    np.testing.assert_array_equal(pixels_of(events, ATTENTION, 0), render(expected))


@pytest.mark.usefixtures("quick")
def test_files_of_the_table_come_with_the_report(tmp_path, monkeypatch):
    logged = []
    kind = pictures_module.LoggerWriters
    monkeypatch.setattr(kind, "log", lambda self, what, make, log: logged.append((what, make())) or [])
    fit(tmp_path, AttentionExplainabilityCallback(table=tmp_path / "table"), max_epochs=2)
    tables = [path for what, path in logged if what == "tables"]
    assert [what for what, _ in logged] == [*["pictures"] * 3, "summaries", "reports", *["tables"] * len(tables)]
    assert {"attention", "samples"} == {path.parent.name for path in tables}
    assert all("epoch=1" in path.name for path in tables)


@pytest.mark.usefixtures("quick")
def test_a_logger_that_fails_at_the_end_ends_nothing(tmp_path):
    class Full(CSVLogger):
        @property
        def log_dir(self):
            if watch.history and len(watch.history) == 2:
                raise OSError("disk on fire")
            return super().log_dir

    watch = AttentionExplainabilityCallback()
    full = Full(tmp_path, name="", version="csv")
    full.save = lambda: None
    with pytest.warns(XAttnWarning, match=tells("Full", "disk on fire")):
        trainer, events = fit(tmp_path, watch, loggers=[full], max_epochs=2)
    assert trainer.state.finished
    assert images_of(events) == {0: MAIN, 1: MAIN | REST}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("when", ["setup", "on_train_end"])
def test_our_own_failure_ends_nothing_and_loses_no_record(when, tmp_path, monkeypatch):
    def breaks(self, *args, **kwargs):
        monkeypatch.setattr(pictures_module, "LoggerWriters", None)

    watch = AttentionExplainabilityCallback()
    with pytest.warns(XAttnWarning, match=tells("val, epoch 0", "could not be drawn", "NoneType")):
        trainer, events = fit(tmp_path, watch, others=[type("Breaks", (Callback,), {when: breaks})()])
    assert trainer.state.finished
    assert len(watch.history) == 1
    assert images_of(events) == ({} if when == "setup" else {0: MAIN})


@pytest.mark.usefixtures("quick")
def test_drawing_takes_no_random_numbers(tmp_path):
    states = []

    class Looks(Callback):
        def on_train_end(self, trainer, pl_module):
            states.append((torch.get_rng_state(), np.random.get_state()[1].copy()))

        def teardown(self, trainer, pl_module, stage):
            states.append((torch.get_rng_state(), np.random.get_state()[1].copy()))

    fit(tmp_path, AttentionExplainabilityCallback(), others=[Looks()])
    (before, numpy_before), (after, numpy_after) = states
    assert before.equal(after)
    np.testing.assert_array_equal(numpy_before, numpy_after)


@pytest.mark.parametrize("value", ["some", True, None, ""])
def test_which_figures_is_checked_at_once(value):
    with pytest.raises(SettingError, match=tells("figures", "main, all", repr(value), "figures_every_n_epochs=0")):
        AttentionExplainabilityCallback(figures=value)
