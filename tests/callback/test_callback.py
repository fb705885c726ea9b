"""Real Trainers: what is logged, what stays untouched, and how wrong settings are reported."""

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.callback.epoch_log import EpochLog
from lightning_xattn.capture import AttentionRecorder
from lightning_xattn.core.errors import DataError, DiscoveryError, XAttnError, XAttnWarning
from lightning_xattn.evaluation.evaluation import Evaluation
from lightning_xattn.evaluation.statistics import ALIGNMENT
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT
from tests import reference
from tests.messages import tells
from tests.toy import CLASSES, HEADS, NAMES, ToyModule, count_hooks, quiet_trainer, toy_data, toy_loader, validate


def record_all(module, dataset):
    """Attention of the whole data set in one pass, and the predicted classes."""
    audio, text, target = dataset[:]
    with torch.no_grad(), AttentionRecorder(module.eval()) as recorder:
        predicted = module(audio, text).argmax(1)
    (pair,) = recorder.attention
    return pair.forward.weights.double().numpy(), pair.backward.weights.double().numpy(), predicted, target


@pytest.mark.parametrize("need_weights", [True, False])
def test_curves_are_the_references_numbers(need_weights):
    torch.manual_seed(0)
    module = ToyModule(need_weights)
    logged = validate(module, AttentionExplainabilityCallback(class_names=NAMES, curves="all"))
    there, back, predicted, target = record_all(module, toy_data())
    samples = range(len(there))
    alignment = np.array([reference.alignment(there[b], back[b]) for b in samples])
    correct = (predicted == target).numpy()
    expected = {
        "xattn_alignment/val/all": alignment.mean(),
        "xattn_alignment/val/null": reference.alignment_null(list(zip(there, back, strict=True))),
        "xattn_health/val/undefined_share": 0.0,
        "xattn_health/val/invalid_rows": 0.0,
    }
    for c, name in enumerate(NAMES):
        expected[f"xattn_alignment/val/{name}"] = alignment[(target == c).numpy()].mean()
    entropies = []
    for direction, maps in (("audio_to_text", there), ("text_to_audio", back)):
        rows = [reference.row_statistics(maps[b]) for b in samples]
        entropy = np.array([r["entropy"] for r in rows])
        entropies.append(entropy.mean(1))
        expected[f"xattn_entropy/val/{direction}/all"] = entropy.mean()
        for h in range(HEADS):
            expected[f"xattn_entropy/val/{direction}/head_{h}"] = entropy[:, h].mean()
        for c, name in enumerate(NAMES):
            expected[f"xattn_entropy/val/{direction}/{name}"] = entropy[(target == c).numpy()].mean()
        for name in ("max", "sparsity", "effective_keys"):
            expected[f"xattn_focus/val/{direction}/{name}"] = np.mean([r[name].mean() for r in rows])
        for name in ("head_diversity", "query_selectivity"):
            values = [np.mean(getattr(reference, name)(maps[b])) for b in samples]
            expected[f"xattn_health/val/{name}/{direction}"] = np.mean(values)
    assert min(correct.sum(), (~correct).sum()) >= 5
    for name, low, score in (("alignment", -1, alignment), ("entropy", 0, np.mean(entropies, axis=0))):
        means = {"correct": score[correct].mean(), "incorrect": score[~correct].mean()}
        expected |= {f"xattn_{name}/val/{outcome}": mean for outcome, mean in means.items()}
        expected[f"xattn_{name}/val/gap"] = means["correct"] - means["incorrect"]
        bins = reference.binned(score, low, 1)
        expected[f"xattn_outcome/val/{name}_auroc"] = reference.error_auroc(name, bins[correct], bins[~correct])
    # What the modalities say and contribute is compared in tests/evaluation.
    of_fusion = "xattn_contribution/", "xattn_outcome/val/confidence_auroc"
    assert {name for name in logged if not name.startswith(of_fusion)} == set(expected)
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, abs=1e-4, rel=1e-4), name


def test_grouping_by_prediction():
    torch.manual_seed(0)
    module = ToyModule()
    logged = validate(module, AttentionExplainabilityCallback(classes_by="prediction", curves="all"))
    there, back, predicted, _ = record_all(module, toy_data())
    alignment = np.array([reference.alignment(there[b], back[b]) for b in range(len(there))])
    for c in range(CLASSES):
        chosen = (predicted == c).numpy()
        if chosen.any():
            assert logged[f"xattn_alignment/val/predicted_class_{c}"] == pytest.approx(
                alignment[chosen].mean(), abs=1e-5
            )
        else:
            assert f"xattn_alignment/val/predicted_class_{c}" not in logged


@pytest.mark.slow
def test_fit_leaves_curves_and_images_in_tensorboard_at_every_epoch(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    watch = AttentionExplainabilityCallback(class_names=NAMES, curves="all")
    trainer = quiet_trainer(logger=logger, max_epochs=2, callbacks=[watch], default_root_dir=tmp_path)
    trainer.fit(ToyModule(), toy_loader(), toy_loader(seed=1))
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0, "scalars": 0}).Reload()
    curves = [events.Scalars(f"xattn_alignment/val/{name}") for name in ("all", "correct", "incorrect", *NAMES)]
    assert {len(points) for points in curves} == {2}  # the sanity check leaves nothing
    assert all(-1 <= point.value <= 1 for points in curves for point in points)
    steps = [point.step for point in curves[0]]
    for figure in ("card/val/1_modalities", "card/val/2_attention"):
        images = events.Images(f"xattn_{figure}")
        assert [image.step for image in images] == steps
        assert images[0].width == 2 * 324  # twice as wide as TensorBoard shows it


class Collect(Callback):
    """Keeps what every validation step computed."""

    def __init__(self):
        self.logits = []

    def setup(self, trainer, pl_module, stage):
        self.handle = pl_module.register_forward_hook(lambda m, a, out: self.logits.append(out.detach().clone()))

    def teardown(self, trainer, pl_module, stage):
        self.handle.remove()


@pytest.mark.parametrize("need_weights", [True, False])
def test_training_with_the_callback_is_bit_for_bit_training_without(need_weights):
    def run(callbacks):
        torch.manual_seed(0)
        module, collect = ToyModule(need_weights), Collect()
        trainer = quiet_trainer(max_epochs=2, callbacks=[collect, *callbacks])
        trainer.fit(module, toy_loader(), toy_loader(seed=1))
        return collect.logits, module

    plain, _ = run([])
    watched, module = run([AttentionExplainabilityCallback()])
    assert len(plain) == len(watched)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert count_hooks(module) == 0


@pytest.mark.parametrize(
    ("fault", "first"),
    [(ArithmeticError("a fault"), True), (DataError("an odd batch"), True), (DataError("odd"), False)],
)
def test_what_goes_wrong_in_a_batch_ends_no_run(fault, first, monkeypatch):
    """In the first batch nothing is recorded from then on; a later one is left out."""
    read, runs = Evaluation.read, []

    def fail(evaluation, *args):
        runs.append(len(runs))
        if len(runs) == (1 if first else 3):
            raise fault
        return read(evaluation, *args)

    monkeypatch.setattr(Evaluation, "read", fail)
    watch, module = AttentionExplainabilityCallback(contribution_samples=0), ToyModule()
    message = "Nothing is recorded in this run" if first else "A batch is left out"
    with pytest.warns(XAttnWarning, match=f"{message}.* {fault}") as warned:
        logged = validate(module, watch)
    (warning,) = [str(one.message) for one in warned if one.category is XAttnWarning]
    assert ("your run goes on as without it" in warning) == isinstance(fault, ArithmeticError)
    found = [(record["samples"], record["left_out_batches"]) for record in watch.history]
    assert found == ([] if first else [(18, 1)])
    assert ("xattn_alignment/val/all" in logged) != first
    assert count_hooks(module) == 0


@pytest.mark.parametrize("what", ["summary", "curves"])
def test_what_goes_wrong_at_an_evaluations_end_ends_no_run(what, monkeypatch):
    def fail(*args, **kwargs):
        raise ArithmeticError("a fault")

    owner, name = {"summary": (Evaluation, "summarise"), "curves": (EpochLog, "log")}[what]
    monkeypatch.setattr(owner, name, fail)
    watch, module = AttentionExplainabilityCallback(contribution_samples=0), ToyModule()
    trainer = quiet_trainer(callbacks=[watch], max_epochs=2)
    with pytest.warns(XAttnWarning, match=r"could not be (summed up|logged).*ArithmeticError: a fault"):
        trainer.fit(module, toy_loader(), toy_loader())
    assert trainer.current_epoch == 2
    assert count_hooks(module) == 0


def test_a_trainer_inside_of_a_fit():
    """The inner Trainer has a callback of its own, or says that it needs one."""

    class Validate(Callback):
        def __init__(self, watch):
            self.watch = watch

        def on_train_epoch_end(self, trainer, pl_module):
            quiet_trainer(callbacks=[self.watch]).validate(ToyModule(), toy_loader(), verbose=False)

    def fit(outer, inner):
        quiet_trainer(callbacks=[outer, Validate(inner)]).fit(ToyModule(), toy_loader(), toy_loader())

    outer, inner = (AttentionExplainabilityCallback(contribution_samples=0) for _ in range(2))
    fit(outer, inner)
    assert [record["samples"] for record in outer.history + inner.history] == [23, 23]
    with pytest.raises(XAttnError, match=r"still records another Trainer.*callback of its own: Trainer\(callbacks="):
        fit(outer, outer)
    fit(outer, inner)  # a run that has failed is over
    assert [record["stage"] for record in outer.history] == ["val"] * 3


def test_no_hook_stays_when_a_step_crashes():
    class Crash(ToyModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 2:
                raise RuntimeError("the step crashed")
            return super().validation_step(batch, batch_idx)

    module = Crash()
    with pytest.raises(RuntimeError, match="the step crashed"):
        validate(module, AttentionExplainabilityCallback())
    assert count_hooks(module) == 0


def test_hooks_are_on_the_model_only_while_it_is_recorded():
    class Count(Callback):
        def __init__(self):
            self.training, self.validation = [], []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.training.append(count_hooks(pl_module))

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if not trainer.sanity_checking:
                self.validation.append((trainer.current_epoch, count_hooks(pl_module) > 0))

    count = Count()
    callback = AttentionExplainabilityCallback(every_n_epochs=2)
    quiet_trainer(max_epochs=3, callbacks=[callback, count]).fit(ToyModule(), toy_loader(), toy_loader())
    assert set(count.training) == {0}
    assert set(count.validation) == {(0, True), (1, False), (2, True)}


def test_a_second_dataloader_and_a_second_layer_add_their_names():
    logged = validate(ToyModule(), AttentionExplainabilityCallback(), [toy_loader(), toy_loader(seed=1)])
    assert {"xattn_alignment/val/all", "xattn_alignment/val/dataloader_1/all"} <= set(logged)
    assert logged["xattn_alignment/val/all"] != logged["xattn_alignment/val/dataloader_1/all"]

    class TwoLayers(ToyModule):
        def __init__(self):
            super().__init__()
            self.second = nn.Module()
            self.second.audio_to_text_attn = nn.MultiheadAttention(12, 2, batch_first=True)
            self.second.text_to_audio_attn = nn.MultiheadAttention(12, 2, batch_first=True)
            for attention in self.second.children():
                nn.init.normal_(attention.in_proj_weight, std=0.6)

        def forward(self, audio, text):
            a, t = self.audio(audio), self.text(text)
            self.second.audio_to_text_attn(a, t, t)
            self.second.text_to_audio_attn(t, a, a)
            return super().forward(audio, text)

    watch = AttentionExplainabilityCallback(curves="all")
    logged = validate(TwoLayers(), watch)
    heads = {"xattn_entropy/val/second/audio_to_text/head_1", "xattn_entropy/val/audio_to_text/audio_to_text/head_2"}
    assert heads <= set(logged)
    # Under the plain name, the mean of both.
    layers = [logged[f"xattn_alignment/val/{layer}/all"] for layer in ("audio_to_text", "second")]
    assert logged["xattn_alignment/val/all"] == pytest.approx(sum(layers) / 2, abs=1e-6)
    assert set(watch.summaries) == {"val/audio_to_text", "val/second"}
    assert [record["layer"] for record in watch.history] == ["audio_to_text", "second"]


class Pooled(ToyModule):
    """Pools each modality to one vector before the fusion."""

    def forward(self, audio, text):
        return super().forward(audio.mean(1, keepdim=True), text.mean(1, keepdim=True))


def test_attention_of_a_single_key_warns_and_has_no_curves():
    with pytest.warns(XAttnWarning, match="single key.*pool after the fusion") as caught:
        logged = validate(Pooled(), AttentionExplainabilityCallback())
    assert len([w for w in caught if w.category is XAttnWarning]) == 1
    assert logged["xattn_health/val/undefined_share"] == 1
    assert not any(name.startswith(("xattn_alignment", "xattn_entropy", "xattn_outcome")) for name in logged)


class Unlabelled(ToyModule):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("confidence", self(*batch[:2]).softmax(1).amax())


def test_without_labels_the_class_and_outcome_parts_switch_off_and_say_so():
    dataset = torch.utils.data.TensorDataset(*toy_data().tensors[:2])
    loader = torch.utils.data.DataLoader(dataset, batch_size=5)
    with pytest.warns(XAttnWarning, match=r"No targets found.*the batch is \[float32.*targets=<key or callable>"):
        logged = validate(Unlabelled(), AttentionExplainabilityCallback(), loader)
    names = {name for name in logged if "alignment" in name}
    assert names == {"xattn_alignment/val/all", "xattn_alignment/val/null"}


class OneScore(ToyModule):
    """A binary head, or a regression: one number a sample."""

    def forward(self, audio, text):
        return super().forward(audio, text)[:, :1] * 20


@pytest.mark.parametrize("kind", [torch.long, torch.float32])
def test_a_binary_head(kind):
    audio, text, target = toy_data().tensors
    target = (target % 2).to(kind)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(audio, text, target[:, None]), batch_size=5)
    module, watch = OneScore(), AttentionExplainabilityCallback(class_names=["no", "yes"], curves="all")
    module._loss = lambda batch: nn.functional.binary_cross_entropy_with_logits(module(*batch[:2]), batch[2].float())
    logged = validate(module, watch, loader)
    there, back, _, _ = record_all(module, toy_data())
    alignment = np.array([reference.alignment(there[b], back[b]) for b in range(len(there))])
    with torch.no_grad():
        predicted = module(audio, text)[:, 0] > 0
    correct = (predicted == target.bool()).numpy()
    assert 0 < correct.sum() < len(correct)
    for name, chosen in (("correct", correct), ("incorrect", ~correct), ("yes", target.bool().numpy())):
        assert logged[f"xattn_alignment/val/{name}"] == pytest.approx(alignment[chosen].mean(), abs=1e-5)


def test_a_regression_has_no_classes_and_no_outcomes(infos, recwarn):
    audio, text, target = toy_data().tensors
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(audio, text, target / 3 + 0.1), batch_size=5)
    module = OneScore()
    module._loss = lambda batch: nn.functional.mse_loss(module(*batch[:2])[:, 0], batch[2])
    logged = validate(module, AttentionExplainabilityCallback(), loader)
    assert [one for one in recwarn if one.category is XAttnWarning] == []
    (said,) = [one for one in infos.messages if "recording" in one]
    assert "predictions: forward (regression; if it is a binary head, set targets=<key or callable>)" in said
    assert {name for name in logged if "alignment" in name} == {"xattn_alignment/val/all", "xattn_alignment/val/null"}


def test_samples_without_a_label_have_no_class_and_no_outcome():
    audio, text, target = toy_data().tensors
    target[12:] = -1
    module, callback = ToyModule(), AttentionExplainabilityCallback(targets=lambda outputs, batch: batch[2])
    module._loss = lambda batch: module(*batch[:2]).softmax(1).sum()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(audio, text, target), batch_size=5)
    with pytest.warns(XAttnWarning, match="11 of 23 samples have no class"):
        validate(module, callback, loader)
    summary = callback.summaries["val"]
    assert summary.samples == 23
    assert sum(summary.count(ALIGNMENT, outcome=outcome) for outcome in (CORRECT, INCORRECT)) == 12
    assert sum(summary.count(ALIGNMENT, class_id=c) for c in range(CLASSES)) == 12


@pytest.mark.parametrize("names", [["incorrect", "correct", "c", "d"], {0: "a"}])
def test_names_of_the_module_that_cannot_be_used_do_not_end_the_run(names):
    module = ToyModule()
    module.class_names = names
    with pytest.warns(XAttnWarning, match="class_names of ToyModule are not used"):
        logged = validate(module, AttentionExplainabilityCallback(curves="all"))
    assert "xattn_alignment/val/class_0" in logged


class BuiltLater(ToyModule):
    """Makes its modules where large models do."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        super(ToyModule, self).__init__()

    def configure_model(self):
        if not hasattr(self, "head"):
            for name, child in ToyModule().named_children():
                self.add_module(name, child)
            self.need_weights = True


def test_a_model_that_is_built_in_configure_model():
    callback = AttentionExplainabilityCallback()
    quiet_trainer(callbacks=[callback]).fit(BuiltLater(), toy_loader(), toy_loader())
    assert len(callback.history) == 1


def test_what_runs_outside_of_the_steps_is_not_recorded():
    class Curious(Callback):
        def run(self, trainer, pl_module, *args):
            pl_module(*toy_data(3)[:][:2])

        on_validation_epoch_start = on_validation_batch_end = run

    callback = AttentionExplainabilityCallback()
    trainer = quiet_trainer(callbacks=[callback, Curious()])
    trainer.validate(ToyModule(), toy_loader(), verbose=False)
    assert callback.summaries["val"].samples == 23


@pytest.mark.slow
def test_the_other_namespace_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    class Other(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.toy = ToyModule()

        def forward(self, audio, text):
            return self.toy(audio, text)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(*batch[:2]), batch[2])

        def validation_step(self, batch, batch_idx):
            return {"logits": self(*batch[:2])}

        test_step = validation_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    watch = AttentionExplainabilityCallback()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(tmp_path, name="", version="run"),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        callbacks=[watch],
    )
    module = Other()
    trainer.fit(module, toy_loader(), toy_loader(seed=1))
    assert "xattn_alignment/val/correct" in trainer.callback_metrics
    trainer.test(module, toy_loader(seed=2), verbose=False)
    assert "xattn_alignment/test/all" in trainer.callback_metrics
    assert [(entry["stage"], entry["samples"]) for entry in watch.history] == [("val", 23), ("test", 23)]
    # Of both directions of the fit's last epoch and of the test.
    assert len(list((tmp_path / "run").rglob("xattn_map/**/*.png"))) == 4
    assert count_hooks(module) == 0


def test_the_first_message_names_what_was_detected_once(infos):
    trainer = quiet_trainer(callbacks=[AttentionExplainabilityCallback()], max_epochs=2)
    trainer.fit(ToyModule(), toy_loader(), toy_loader())
    assert [message for message in infos.messages if message.startswith("AttentionExplainabilityCallback")] == [
        "AttentionExplainabilityCallback: recording audio_to_text (5 audio queries → 7 text keys), text_to_audio (7 "
        "text queries → 5 audio keys); modalities: audio = audio, text = text; predictions: forward (4 classes); "
        "targets: batch[2]."
    ]


def test_a_second_dataloader_has_the_classes_of_the_first(infos):
    """Samples of other classes count as without one; what was detected is reported once."""

    def targets(outputs, batch):
        return batch[2] + (CLASSES if len(batch[2]) == 4 else 0)

    watch = AttentionExplainabilityCallback(targets=targets)
    loaders = [toy_loader(15), toy_loader(12, batch_size=4)]
    with pytest.warns(XAttnWarning, match=tells("12 of 12 samples", "no class")):
        quiet_trainer(callbacks=[watch]).validate(ToyModule(), loaders, verbose=False)
    assert [record["unclassified"] for record in watch.history] == [0, 12]
    assert [summary.n_classes for summary in watch.summaries.values()] == [CLASSES, CLASSES]
    assert infos.text.count("AttentionExplainabilityCallback: recording") == 1


def test_sample_ids_that_are_named_must_be_there():
    with pytest.raises(DiscoveryError, match=tells("nowhere", "sample ids")):
        validate(ToyModule(), AttentionExplainabilityCallback(sample_ids="nowhere"))


def test_a_checkpoint_knows_the_callback_however_its_folder_is_given(tmp_path):
    keys = {AttentionExplainabilityCallback(table=one).state_key for one in (tmp_path, str(tmp_path))}
    assert len(keys) == 1
    assert len({AttentionExplainabilityCallback(classes_by=one).state_key for one in ("target", "prediction")}) == 2


def test_after_a_run_the_module_is_released():
    watch, module = AttentionExplainabilityCallback(), ToyModule()
    validate(module, watch)
    assert (watch._run.recorder, watch._run.evaluations) == (None, {})
    assert watch.summaries["val"].samples == 23
