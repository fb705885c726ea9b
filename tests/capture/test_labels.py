"""Where predictions and targets are found, what is left alone, and what is said when they do not fit."""

import math
import re

import pandas as pd
import pytest
import torch

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture
from lightning_xattn.capture.labels.finder import LabelFinder, are_probabilities, confidence_of
from lightning_xattn.capture.labels.places import Step, are_binary_labels
from lightning_xattn.core.errors import DiscoveryError, ShapeError, XAttnWarning
from lightning_xattn.core.notices import begin_run
from lightning_xattn.evaluation.statistics import ALIGNMENT, CONFIDENCE
from tests.messages import tells
from tests.toy import AUDIO, TEXT, ToyModule, quiet_trainer
from tests.toy import CLASSES as CLASSES_OF_TOY

BATCH, CLASSES = 5, 3
SCORES = torch.tensor([[0.1, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 5.0, 1.0], [1.0, 0.0, 0.0]])
PREDICTED = [1, 0, 2, 1, 0]
IDS = torch.tensor([1, 2, 2, 0, 0])
VOTES = torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.6, 0.4, 0.0]])
LOSS, IMAGE = torch.tensor(0.3), torch.zeros(BATCH, 2, 4)


def step(outputs=None, batch=None, forward=None):
    return Step(outputs, batch, forward, BATCH)


def find(outputs=None, batch=None, forward=None, **settings):
    return LabelFinder(**settings).find(step(outputs, batch, forward))


@pytest.mark.parametrize(
    ("outputs", "batch", "forward"),
    [
        (LOSS, (IMAGE, IDS), SCORES),
        (None, {"image": IMAGE, "labels": IDS}, (SCORES, {"attention": None})),
        ({"loss": LOSS, "logits": SCORES, "targets": IDS}, IMAGE, None),
        (SCORES, {"y": IDS}, None),
        ({"loss": LOSS, "preds": torch.tensor(PREDICTED)}, [IMAGE, IDS], torch.zeros(BATCH, 7)),
        (None, {"target": IDS}, {"logits": SCORES}),
        (None, (IDS, IMAGE), SCORES),
        (None, (IMAGE, torch.nn.functional.one_hot(IDS)), SCORES),
    ],
)
def test_found_in_the_usual_places(outputs, batch, forward):
    labels = find(outputs, batch, forward)
    assert labels.predicted.tolist() == PREDICTED
    assert labels.target.tolist() == IDS.tolist()


@pytest.mark.parametrize(
    ("outputs", "forward"),
    [
        (LOSS, (torch.zeros(BATCH, 64), SCORES)),  # features or scores?
        ({"loss": LOSS, "y_hat": torch.zeros(BATCH)}, torch.zeros(BATCH, 64)),  # the named ones do not fit
        (None, torch.zeros(BATCH)),
        (None, torch.zeros(BATCH, 1)),
        (None, None),
    ],
)
def test_predictions_that_are_not_clear_are_not_taken(outputs, forward):
    assert find(outputs, (IMAGE, IDS), forward).predicted is None


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGE, IDS, IDS % 2),  # which of the two?
        (IMAGE, torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(0))),  # regression
        (IMAGE, torch.tensor([[1, 1, 0]] * BATCH)),  # several labels at once
        (IMAGE, torch.ones(BATCH, CLASSES, dtype=torch.bool)),  # a mask
        (IMAGE, torch.eye(7)[:BATCH]),  # shares of other classes than the scores have
        {"target": torch.zeros(BATCH)},
        {"label": IDS[:4]},
        IMAGE,
    ],
)
def test_targets_that_are_not_clear_are_not_taken(batch):
    assert find(None, batch, SCORES).target is None


SINGLE = torch.tensor([-1.2, 0.7, 0.2, -0.1, 3.0])
BITS = torch.tensor([0, 1, 1, 0, 1])


@pytest.mark.parametrize(
    ("where", "kind", "column"),
    [("forward", torch.long, False), ("logits", torch.bool, True), ("probabilities", torch.float32, True)],
)
def test_a_binary_head_gives_one_score_a_sample(where, kind, column):
    scores, bits = (SINGLE[:, None], BITS[:, None].to(kind)) if column else (SINGLE, BITS.to(kind))
    scores = scores.sigmoid() if where == "probabilities" else scores
    outputs, forward = ({where: scores, "loss": LOSS}, None) if where != "forward" else (LOSS, scores)
    labels = find(outputs, (IMAGE, bits), forward)
    assert labels.predicted.tolist() == [0, 1, 1, 0, 1]
    assert labels.target.tolist() == BITS.tolist()
    assert labels.n_classes == 2
    positive = SINGLE.sigmoid()
    torch.testing.assert_close(labels.confidence, torch.maximum(positive, 1 - positive))


def test_classes_that_the_model_rules_out_and_scores_that_are_not_finite():
    scores = SCORES.clone()
    scores[:, 2] = -torch.inf
    labels = find({"logits": scores}, (IMAGE, IDS))
    assert labels.predicted.tolist() == [1, 0, 0, 1, 0]
    torch.testing.assert_close(labels.confidence, scores.softmax(1).amax(1))
    assert find({"logits": torch.full((BATCH, 2), -torch.inf)}).predicted.tolist() == [-1] * BATCH
    scores[1, 2], scores[3] = torch.inf, torch.nan
    assert find({"logits": scores}, (IMAGE, IDS)).predicted.tolist() == [1, -1, 0, -1, 0]


def test_scores_of_each_class_by_itself_tell_the_class_but_no_confidence():
    scores = SCORES.sigmoid()
    labels = find(LOSS, (IMAGE, IDS), scores)
    assert labels.predicted.tolist() == PREDICTED
    assert labels.confidence is None
    assert "rows do not sum to 1" in labels.doubts["confidence"]
    named = find({"logits": scores})
    torch.testing.assert_close(named.confidence, scores.softmax(1).amax(1))
    assert not named.doubts
    assert find({"preds": torch.tensor(PREDICTED)}).confidence is None


@pytest.mark.parametrize("batch", [{"targets": VOTES[:4]}, {"label": IDS[:4]}, (IMAGE, IDS[:4])])
def test_targets_of_another_length_are_not_taken_and_said(batch):
    labels = find({"logits": SCORES}, batch)
    assert labels.target is None
    assert "(4" in labels.doubts["targets"]
    assert "no targets for 5 samples" in labels.doubts["targets"]


def test_logits_that_happen_to_look_like_probabilities_under_their_name():
    labels = find({"logits": torch.full((BATCH,), 0.3)}, (IMAGE, BITS))
    assert labels.predicted.tolist() == [1] * BATCH  # above 0, though not above 0.5
    scores = SINGLE.clone()
    scores[2] = torch.nan
    bits = torch.tensor([0, -1, 1, 0, 1])
    labels = find(LOSS, (IMAGE, bits), scores)
    assert labels.predicted.tolist() == [0, 1, -1, 0, 1]
    assert labels.target.tolist() == [0, -1, 1, 0, 1]


def test_a_single_score_at_the_threshold_is_class_0():
    """As of ``round``: 0.5 is no evidence for class 1, and neither is a logit of 0."""
    probabilities = torch.tensor([0.5, 0.25, 0.75, 0.0, 1.0])
    for scores, name in ((probabilities, "probabilities"), (probabilities - 0.5, "logits")):
        assert find({name: scores}, (IMAGE, BITS)).predicted.tolist() == [0, 0, 1, 0, 1], name


def test_confidence_is_the_probability_of_the_predicted_class():
    """Of each form of scores, NaN where they are said to be probabilities and are none."""
    logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, -1.0, 0.0]])
    odds = [[math.exp(one) for one in row] for row in logits.tolist()]
    expected = [max(row) / sum(row) for row in odds]
    assert confidence_of(logits, probabilities=False).tolist() == pytest.approx(expected)
    assert confidence_of(logits.softmax(1), probabilities=True).tolist() == pytest.approx(expected)
    assert confidence_of(logits, probabilities=True).isnan().all()
    for single in (torch.tensor([0.9, 0.2, 0.5]), torch.tensor([[0.9], [0.2], [0.5]])):
        assert confidence_of(single, probabilities=True).tolist() == pytest.approx([0.9, 0.8, 0.5])
        logit = (single / (1 - single)).log()
        assert confidence_of(logit, probabilities=False).tolist() == pytest.approx([0.9, 0.8, 0.5])
    assert confidence_of(torch.tensor([1.25, -0.25, math.nan, 0.0]), probabilities=True).tolist() == pytest.approx(
        [math.nan, math.nan, math.nan, 1], nan_ok=True
    )
    # bfloat16 keeps a sum up to its rounding: to 4 eps, 1 / 32.
    half = torch.tensor([[0.5, 0.53125], [0.5, 0.546875]]).bfloat16()
    assert confidence_of(half, probabilities=True).tolist() == pytest.approx([0.53125, math.nan], nan_ok=True)


def test_probabilities_sum_to_1_within_their_precision():
    assert are_probabilities(torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    assert not are_probabilities(torch.tensor([[0.5, 0.5], [0.25, 0.5]]))
    assert not are_probabilities(torch.tensor([[1.5, -0.5]]))
    half = torch.tensor([[0.5, 0.53125]]).bfloat16()  # 1 / 32 more than 1
    assert are_probabilities(half)
    assert not are_probabilities(half.float())
    broken = torch.tensor([[math.nan, 0.5], [0.5, 0.5]])
    assert are_probabilities(broken), "what is not finite says nothing"
    assert not are_probabilities(broken[:1])


@pytest.mark.parametrize(
    ("labels", "taken"),
    [
        ([0, 1, 1, 0, 1], True),
        ([1, 1, 1, 1, 1], True),
        ([0, 1, -1, 0, 1], True),
        ([1, 1, -100, 1, 1], True),
        ([1, 1, -1, 1, 1], False),  # -1 may be the other class
        ([-1, -1, -1, -1, -1], False),
        ([0, 1, 2, 0, 1], False),
        ([0, 1, -2, 0, 1], False),
    ],
)
def test_what_labels_of_two_classes_may_be(labels, taken):
    assert are_binary_labels(torch.tensor(labels), BATCH, guessed=False) == taken
    assert are_binary_labels(torch.tensor(labels)[:, None], BATCH, guessed=True) == taken
    of_floats = torch.tensor(labels).float()
    assert are_binary_labels(of_floats, BATCH, guessed=False) == taken
    shown = taken and {0, 1} <= set(labels)
    assert are_binary_labels(of_floats, BATCH, guessed=True) == shown, "numbers to regress may all be 0"
    assert not are_binary_labels(torch.tensor(labels), BATCH - 1, guessed=False)


@pytest.mark.parametrize(
    ("targets", "scores", "reason"),
    [
        (BITS, SINGLE.sigmoid(), "all between 0 and 1: they may be logits or probabilities.*'logits'"),
        (SINGLE, SINGLE, "one number for each sample.*no targets of 0 and 1.*regression, which has no classes"),
        (IDS, SINGLE, "no targets of 0 and 1"),
        (None, SINGLE, "no targets of 0 and 1"),
    ],
)
def test_a_single_score_that_is_not_clear_is_not_taken_and_said_why(targets, scores, reason):
    labels = find(LOSS, (IMAGE, targets), scores)
    assert labels.predicted is None
    assert re.search(reason, labels.doubts["predictions"])
    named = {"predictions": lambda o, b: scores, "targets": lambda o, b: b[1]}
    if targets is BITS:
        with pytest.raises(ShapeError, match=reason):
            find(LOSS, (IMAGE, targets), **named)
    elif targets is not None:  # a regression, also where it is named
        labels = find(LOSS, (IMAGE, targets), **named)
        assert labels.predicted is labels.target is None
        assert re.search(reason, labels.doubts["predictions"])


def test_floating_targets_of_which_a_first_batch_shows_one_class_may_be_numbers_to_regress():
    ones, zeros = torch.ones(BATCH), torch.zeros(BATCH)
    for only in (ones, zeros):
        labels = find(LOSS, (IMAGE, only), SINGLE)
        assert labels.predicted is None
        assert labels.target is None
        assert "So it is a regression" in labels.doubts["predictions"]
        assert find(LOSS, (IMAGE, only.long()), SINGLE).target.tolist() == only.tolist()
        assert find(LOSS, {"mine": only}, SINGLE, targets="mine").target.tolist() == only.tolist()


def test_what_is_neither_0_nor_1_in_a_later_batch_has_no_class():
    finder = LabelFinder()
    assert finder.find(step(LOSS, (IMAGE, BITS), SINGLE)).target.tolist() == BITS.tolist()
    assert finder.find(step(LOSS, (IMAGE, BITS * 7), SINGLE)).target.tolist() == [0, -1, -1, 0, -1]


def test_whole_numbers_beyond_the_classes_are_no_class_ids():
    lengths = torch.tensor([40, 12, 33, 8, 21])
    assert find(LOSS, (IMAGE, lengths), SCORES).target is None
    assert find(LOSS, (IMAGE, lengths, IDS), SCORES).target.tolist() == IDS.tolist()


@pytest.mark.filterwarnings("ignore:A step has no (predictions|targets)")
def test_a_later_step_without_labels():
    for batch, later in (((IMAGE, IDS), IMAGE), ({"x": IMAGE, "label": IDS, "sample_id": IDS}, {"x": IMAGE})):
        finder = LabelFinder()
        assert finder.find(step({"logits": SCORES}, batch)).target.tolist() == IDS.tolist()
        for outputs in (None, LOSS, {"loss": LOSS}, {"logits": SCORES[:3]}, {"logits": [None] * 5}):
            labels = finder.find(step(outputs, later))
            assert (labels.predicted, labels.confidence, labels.target) == (None, None, None)
            assert finder.find(step(outputs, later)).sample_ids is None
    finder = LabelFinder()
    finder.find(step({"logits": SCORES}, (IMAGE, IDS)))
    begin_run()
    with pytest.warns(XAttnWarning, match=tells("no predictions", "outputs['logits']")):
        finder.find(step(None, (IMAGE, IDS)))
    named = LabelFinder("mine", lambda outputs, batch: batch["t"])
    with pytest.raises(DiscoveryError, match="the key 'mine' is in neither what the step returned"):
        named.find(step({}, {"t": IDS}))
    named = LabelFinder("mine", lambda outputs, batch: batch["t"])
    assert named.find(step({"mine": SCORES}, {"t": IDS})).predicted.tolist() == PREDICTED
    assert named.find(step({}, {"t": IDS})).predicted is None
    with pytest.raises(KeyError):  # in the user's own function
        named.find(step({}, {}))
    with pytest.raises(ShapeError, match="Expected predictions"):  # named, and something else
        named.find(step({"mine": SCORES[:2]}, {"t": IDS}))


@pytest.mark.parametrize(("scores", "ids"), [(SCORES, IDS), (SINGLE, BITS)])
def test_a_last_batch_of_one_sample_that_was_squeezed(scores, ids):
    finder = LabelFinder()
    expected = finder.find(step({"logits": scores}, (IMAGE, ids)))
    for target in (ids[:1], ids[0]):
        labels = finder.find(Step({"logits": scores[:1].squeeze()}, (IMAGE[:1], target), None, samples=1))
        assert labels.predicted.tolist() == expected.predicted[:1].tolist()
        assert labels.target.tolist() == ids[:1].tolist()
        torch.testing.assert_close(labels.confidence, expected.confidence[:1])


def test_the_place_is_kept_from_the_first_batch_on():
    finder = LabelFinder()
    assert finder.find(step(LOSS, (IMAGE, IDS), SCORES)).target.tolist() == IDS.tolist()
    assert finder.places == {"predictions": "forward", "targets": "batch[1]"}
    ambiguous = finder.find(step(LOSS, (IDS * 0, IDS), SCORES))
    assert ambiguous.target.tolist() == IDS.tolist()
    assert LabelFinder().find(step(LOSS, (IDS * 0, IDS), SCORES)).target is None


def test_nothing_found_is_nothing():
    labels = find(LOSS, IMAGE, torch.zeros(BATCH))
    assert (labels.predicted, labels.confidence, labels.target, labels.tied, labels.n_classes) == (None,) * 5


def test_sample_ids():
    finder = LabelFinder()
    assert finder.find(step(batch={"sample_ids": IDS})).sample_ids is IDS
    assert finder.find(step(batch=(IDS,))).sample_ids is None
    for no_ids in ("run-17", "abcde", torch.tensor(3), 5, {"a": 1}):  # what is guessed and does not fit is none
        assert LabelFinder().find(step(batch={"sample_id": no_ids})).sample_ids is None
    named = LabelFinder(sample_ids="file")
    with pytest.raises(DiscoveryError, match="the key 'file' gave nothing.*batch is {'x': a int}"):
        named.find(step(batch={"x": 1}))
    assert named.find(step(batch={"file": ("a", "b", "c", "d", "e")})).sample_ids == ["a", "b", "c", "d", "e"]
    assert named.find(step(batch={"x": 1})).sample_ids is None  # in a later step
    for wrong, got in ((IDS[:4], "int64"), ("abcde", "a str")):
        with pytest.raises(ShapeError, match=f"each of 5 samples; the callable gave {got}"):
            LabelFinder(sample_ids=lambda outputs, batch, wrong=wrong: wrong).find(step(batch=IDS))


def test_errors():
    with pytest.raises(
        DiscoveryError,
        match=r"the key 'mine' is in neither what the step returned.*returned float32 \(\).*{'a': a int}",
    ):
        find(LOSS, {"a": 1}, predictions="mine")
    with pytest.raises(DiscoveryError, match="the callable gave float"):
        find(targets=lambda o, b: 1.0)
    with pytest.raises(ShapeError, match=r"Expected targets.*\(5,\) or.*\(5, classes\).*gave torch.int64 .* \(4,\)"):
        find(batch={"t": IDS[:4]}, targets="t")
    with pytest.raises(ShapeError, match="Predictions have 3 classes and targets 2"):
        find({"logits": SCORES}, {"t": VOTES[:, :2]}, targets="t")


@pytest.mark.parametrize(
    ("outputs", "forward", "logits"),
    [
        ({"preds": torch.tensor(PREDICTED)}, SCORES, SCORES),
        ({"preds": torch.tensor(PREDICTED)}, {"features": SCORES.flip(1), "head": SCORES}, SCORES),
        ({"preds": torch.tensor(PREDICTED), "raw": SCORES}, None, SCORES),
        ({"probs": SCORES.softmax(1)}, {"head": SCORES}, SCORES),
        ({"probs": SCORES.softmax(1)}, {"head": 2 * SCORES}, SCORES.log_softmax(1)),  # says another confidence
        ({"preds": torch.tensor(PREDICTED)}, SCORES.flip(1), None),  # says other classes
        ({"preds": torch.tensor(PREDICTED)}, torch.cat([SCORES[:4], SCORES[:1]]), None),  # says 1 where 0 is predicted
        ({"preds": torch.tensor(PREDICTED)}, SCORES.sigmoid(), None),  # logits, or of a sigmoid for each class?
    ],
)
def test_the_scores_behind_the_predictions_are_those_that_agree_with_them(outputs, forward, logits):
    finder = LabelFinder()
    first = finder.find(step(outputs, {"y": IDS}, forward))
    assert first.predicted.tolist() == PREDICTED
    if logits is None:
        assert first.scores is None
        return
    torch.testing.assert_close(first.scores.logits, logits)
    torch.testing.assert_close(first.scores.probabilities, logits.softmax(1))

    # Where they were found they are read again, of other samples.
    def turned(value):
        if isinstance(value, dict):
            return {name: turned(one) for name, one in value.items()}
        return value.flip(0) if isinstance(value, torch.Tensor) else value

    again = finder.find(step(turned(outputs), {"y": IDS}, turned(forward)))
    torch.testing.assert_close(again.scores.logits, logits.flip(0))


def test_what_is_named():
    named = {"predictions": "mine", "targets": "strange"}
    labels = find({"mine": SCORES}, {"strange": VOTES}, torch.zeros(BATCH, 9), **named)
    assert labels.predicted.tolist() == PREDICTED
    assert labels.target.tolist() == [1, 2, 2, 0, 0]
    assert labels.tied.tolist() == [True, False, False, False, False]
    assert labels.n_classes == CLASSES
    labels = find(LOSS, {"y": IDS}, {"snli_logits": SCORES, "features": IMAGE}, predictions="snli_logits")
    assert torch.equal(labels.scores.logits, SCORES)

    def third(outputs, batch, forward):
        return forward["x"]

    for read in (third, lambda o, b, f: f["x"], lambda *args: args[2]["x"]):
        assert find(LOSS, {"y": IDS}, {"x": SCORES}, predictions=read).predicted.tolist() == PREDICTED


def test_one_positive_a_row_in_the_first_batch_is_no_proof_of_classes():
    several = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]])
    for kind in (torch.long, torch.float32):
        finder = LabelFinder()
        one_hot = torch.nn.functional.one_hot(IDS).to(kind)
        assert finder.find(step({"logits": SCORES}, {"labels": one_hot})).target.tolist() == IDS.tolist()
        assert not finder.has_several
        labels = finder.find(step({"logits": SCORES}, {"labels": several.to(kind)}))
        assert labels.target.tolist() == [0, -1, -1, 1, 2]
        assert not labels.tied.any()
        assert finder.has_several
        assert "none or several. So they are several labels" in finder.drop_targets()
        assert finder.find(step({"logits": SCORES}, {"labels": one_hot})).target is None
    for labels in (IDS, torch.nn.functional.one_hot(IDS), VOTES):  # beside which a loss of several is no evidence
        found = LabelFinder().find(Step({"logits": SCORES}, {"y": labels}, None, BATCH, loss_of_several="aux"))
        assert found.predicted.tolist() == PREDICTED
        assert found.target.tolist() == (labels if labels.dim() == 1 else labels.argmax(1)).tolist()
    soft = LabelFinder()
    soft.find(step({"logits": SCORES}, {"labels": VOTES}))
    assert not soft.has_several


def several_labels(grouped):
    generator = torch.Generator().manual_seed(0)
    for start in (0, 5, 10):
        labels = torch.nn.functional.one_hot(torch.arange(5) % CLASSES_OF_TOY, CLASSES_OF_TOY)
        if start:
            labels[1] = 1
        batch = {"audio": torch.randn(5, AUDIO, 3, generator=generator), "labels": labels}
        batch |= {"text": torch.randn(5, TEXT, 2, generator=generator)}
        yield batch | ({"patient_ids": torch.arange(start, start + 5) % 7} if grouped else {})


class Several(ToyModule):
    def forward(self, batch):
        return super().forward(batch["audio"], batch["text"])

    def validation_step(self, batch, batch_idx):
        return {"logits": self(batch)}


def assert_no_classes(mode):
    """Nothing of a softmax: no prediction, confidence, accuracy, probe of classes or contribution."""
    (record,), summary, fusion = mode.history, mode.summaries["val"], mode.fusion_summaries["val"]
    assert not {"accuracy", "probe/audio", "contribution/share/audio", "outcome/confidence_auroc"} & set(record)
    assert record["contribution_problem"] == "the targets are several labels at once, so no one class is predicted"
    assert summary.count(CONFIDENCE) == 0
    assert summary.count(ALIGNMENT) == summary.samples
    assert summary.interval(CONFIDENCE) == pytest.approx((math.nan, math.nan), nan_ok=True)
    assert fusion.numbers["confidence"].isnan().all()
    assert set(fusion.predicted.tolist()) == set(fusion.target.tolist()) == {-1}


SEVERAL_OF_TOY = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]])


class OfSeveral(ToyModule):
    """Trained on several labels at once; ``how`` says what shows it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        if how == "loss":
            self.criterion = torch.nn.BCEWithLogitsLoss()

    def validation_step(self, batch, batch_idx):
        scores = self(*batch[:2])
        if self.how in ("outputs", "probabilities"):
            scores = scores.sigmoid() if self.how == "probabilities" else scores
            return {"logits" if self.how == "outputs" else "probabilities": scores, "targets": batch[2].float()}
        return torch.nn.functional.binary_cross_entropy_with_logits(scores, SEVERAL_OF_TOY.float())


@pytest.mark.parametrize("how", ["batch", "outputs", "probabilities", "loss", "named"])
def test_a_head_of_several_labels_is_not_taken_for_one_of_classes(how, tmp_path):
    data = [torch.randn(5, AUDIO, 3), torch.randn(5, TEXT, 2), SEVERAL_OF_TOY]
    loader = torch.utils.data.DataLoader([data[: 2 if how == "loss" else 3]] * 3, batch_size=None)
    targets = {"targets": lambda outputs, batch: batch[2]} if how == "named" else {}
    mode = AttentionExplainabilityCallback(**targets, table=tmp_path, figures_every_n_epochs=0)
    why = "'criterion'" if how == "loss" else "do not sum to 1"
    with pytest.warns(XAttnWarning, match=tells("several labels", why)):
        quiet_trainer(callbacks=[mode]).validate(OfSeveral(how), loader, verbose=False)
    assert_no_classes(mode)
    rows = pd.read_parquet(tmp_path / "attention")
    assert rows[["target", "prediction", "confidence", "correct"]].isna().all(axis=None)
    assert rows["alignment"].notna().all()


@pytest.mark.parametrize("grouped", [False, True])
def test_an_evaluation_whose_labels_turn_out_to_be_several_has_no_classes(grouped, tmp_path):
    mode = AttentionExplainabilityCallback(table=tmp_path, figures_every_n_epochs=0)
    loader = torch.utils.data.DataLoader(list(several_labels(grouped)), batch_size=None)
    module, trainer = Several(), quiet_trainer(callbacks=[mode])
    with pytest.warns(XAttnWarning) as caught:
        trainer.validate(module, loader, verbose=False)
    told = "\n".join(str(one.message) for one in caught)
    assert re.search(tells("batch['labels']", "several labels at once", "targets=<key or callable>"), told)
    assert "The sample table lacks this evaluation" in told
    assert list(tmp_path.iterdir()) == []
    record = mode.history[0]
    assert (record["samples"], record["ties"]) == (15, 0)
    assert not [name for name in record if name.endswith(("class_0", "/correct", "/incorrect"))]
    assert_no_classes(mode)
    if grouped:
        return
    with pytest.warns(XAttnWarning, match=tells("several labels at once")):
        summary = ExplainabilityCapture(module).explain_loader(loader, progress=False).headline
    assert (summary.samples, summary.n_classes) == (15, 0)
    assert summary.mean(ALIGNMENT) == pytest.approx(record["alignment/all"], abs=1e-6)
