"""Does attention rank what the model uses? Models of which it is known that it does, does not, or that nothing is."""

import functools
import math
import re

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture, create_explainability_report
from lightning_xattn.core.attention import Direction
from lightning_xattn.core.errors import XAttnWarning
from lightning_xattn.core.ids import hashed
from lightning_xattn.evaluation.results import DatasetResult
from tests import reference
from tests.attribution.models import HEADS, LEFT, WIDTH, TwoStreams, loader_of, said_data, sample_ids, trained
from tests.toy import quiet_trainer

CLASSES, KEYS, QUERIES, MARKED = 3, 8, 5, 2
THERE, BACK = Direction("left", "right"), Direction("right", "left")


class Gaze(nn.Module):
    """Looks at the tokens that have a mark, and says what they say; or reports other weights than it used."""

    def __init__(self, reports="own", sharpness=4.0, way="kernel"):
        super().__init__()
        self.reports, self.sharpness, self.way = reports, sharpness, way

    def forward(self, asking, tokens):
        marks = self.sharpness * tokens[..., :1]
        query = torch.ones_like(asking[..., :1])
        if self.way == "kernel":
            said = F.scaled_dot_product_attention(query, marks, tokens[..., 1:], scale=1.0)
            weights = (query @ marks.mT).exp()
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            weights = (query @ marks.mT).softmax(-1)
            said = weights @ tokens[..., 1:]
        if self.reports == "shuffled":
            order = torch.rand(weights.shape, generator=torch.Generator().manual_seed(len(tokens))).argsort(-1)
            weights = weights.gather(-1, order[:, :1].expand_as(weights))
        return said, weights[:, None]


class Gazing(nn.Module):
    """Both directions; the prediction is what the right tokens say."""

    def __init__(self, used=1.0, **gaze):
        super().__init__()
        self.left_to_right, self.right_to_left, self.used = Gaze(**gaze), Gaze(**gaze), used

    def forward(self, left, right):
        there, _ = self.left_to_right(left, right)
        back, _ = self.right_to_left(right, left)
        return self.used * there.mean(1) + 0.3 * back.mean(1) + (1 - self.used) * right[:, 0, 1:]


class Gazer(pl.LightningModule):
    def __init__(self, **fusion):
        super().__init__()
        self.fusion = Gazing(**fusion)

    def forward(self, left, right):
        return 3 * self.fusion(left, right)

    def validation_step(self, batch, batch_idx):
        return {"logits": self(batch[0], batch[1]), "targets": batch[2]}

    test_step = validation_step


def marked_data(samples=160, seed=0):
    """Tokens of which two have a mark, and say the class; the others say any."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(CLASSES, (samples,), generator=generator)
    streams = []
    for tokens in (QUERIES, KEYS):
        said = torch.randint(CLASSES, (samples, tokens), generator=generator)
        marked = torch.rand(samples, tokens, generator=generator).argsort(1) < MARKED
        said = torch.where(marked, target[:, None], said)
        marks = marked + 0.1 * torch.rand(samples, tokens, generator=generator)
        streams.append(torch.cat([marks[..., None], F.one_hot(said, CLASSES)], -1).float())
    return TensorDataset(*streams, target, torch.arange(samples) + 1000)


NAMED = {"left_to_right": "fusion.left_to_right[1]", "right_to_left": "fusion.right_to_left[1]"}


def summary_of(module, data=None, **settings):
    settings = {"attention": NAMED, "sample_ids": sample_ids, "figures_every_n_epochs": 0} | settings
    watch = AttentionExplainabilityCallback(**settings)
    loader = loader_of(marked_data() if data is None else data)
    quiet_trainer(callbacks=[watch]).validate(module, loader, verbose=False)
    return watch.fusion_summaries["val"]


@functools.cache
def known(**fusion):
    """The summary of a model on the marked data, which tests only read."""
    return summary_of(Gazer(**fusion))


@pytest.mark.parametrize("way", ["kernel", "softmax"])
def test_a_model_that_uses_what_it_attends_to(way):
    summary = known(way=way)
    found = summary.faithfulness(THERE)
    assert found.mean > 0.45
    assert found.low > 0.35
    assert found.count == 128
    # Where no keys are seen, as of a softmax by hand, they are replaced where they enter the fusion.
    assert summary.replaced[THERE].at_attention == (way == "kernel")
    assert summary.faithfulness(THERE, "reference").mean > 0.45


def heads_of(tokens):
    return tokens.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(attention, query, keys, scales=None):
    """``nn.MultiheadAttention`` by hand, whose weights that go to a key are multiplied by ``scales`` ``(keys,)``."""
    projections = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    q, k, v = (heads_of(F.linear(x, *one)) for x, one in zip((query, keys, keys), projections, strict=True))
    weights = (q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1)
    weights = weights if scales is None else weights * scales
    return attention.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights


def test_every_number_is_the_references():
    """Of a model with multi-head attention, whose keys are replaced where it gets them, sample by sample."""
    data, _ = said_data(130)
    module = trained(None, data, epochs=15).eval()
    summary = summary_of(module, data, attention=None, groups=lambda outputs, batch: batch[3] // 20)
    left, right, _, ids = data.tensors
    order = hashed(ids, 0).argsort()[:128]
    groups = (ids[order] // 20).tolist()
    tokens = [encoder(x[order]).detach() for encoder, x in ((module.left, left), (module.right, right))]

    def says(i, keys, scales=None):
        """Probabilities of sample i with these left tokens as the keys of the right ones."""
        a, b = (x[[i]] for x in tokens)
        there, _ = attend(module.fusion.left_to_right, a, b)
        back, weights = attend(module.fusion.right_to_left, b, keys, scales)
        fused = torch.cat([(a + there).mean(1), (b + back).mean(1)], dim=1)
        return module.head(fused)[0].softmax(0), weights

    intact, by_attention, by_slope = [], [], []
    for i in range(128):
        j = next(other for shift in range(1, 128) if groups[other := (i + shift) % 128] != groups[i])
        own, theirs = tokens[0][[i]], tokens[0][[j]]
        scales = torch.ones(LEFT, requires_grad=True)
        p, weights = says(i, own, scales)
        chosen = int(p.argmax())
        (slopes,) = torch.autograd.grad(p[chosen], scales)
        intact.append(float(p[chosen].detach()))
        for found, scores in ((by_attention, weights[0].mean((0, 1))), (by_slope, slopes)):
            after = []
            for places in reference.keys_to_replace(scores.tolist()):
                mixed = own.clone()
                mixed[:, places] = theirs[:, places]
                after.append(float(says(i, mixed)[0][chosen].detach()))
            found.append(after)
    assert summary.replaced[BACK].at_attention
    for i in range(128):
        number = {name: float(summary.numbers[f"{name}/{BACK}"][i]) for name in ("gain", "reference", "cost")}
        assert number["gain"] == pytest.approx(reference.ranking_gain(by_attention[i]), abs=2e-6)
        assert number["reference"] == pytest.approx(reference.ranking_gain(by_slope[i]), abs=2e-6)
        assert number["cost"] == pytest.approx(intact[i] - by_attention[i][6], abs=2e-6)
    for name, replaced in (("gain", by_attention), ("reference", by_slope)):
        expected = reference.faithfulness(intact, replaced)
        assert summary.faithfulness(BACK, name).mean == pytest.approx(expected, abs=1e-4)


def test_unseen_keys_are_replaced_where_they_enter_the_fusion():
    """Of a softmax by hand; the other direction asks with these tokens, too."""
    module, data = Gazer(way="softmax"), marked_data(130)
    summary = summary_of(module, data)
    left, right, _, ids = data.tensors
    order = hashed(ids, 0).argsort()[:128]
    left, right = left[order], right[order]
    for i in range(128):
        own, theirs = right[[i]], right[[(i + 1) % 128]]
        intact = module(left[[i]], own)[0].softmax(0)
        chosen, after = int(intact.argmax()), []
        for places in reference.keys_to_replace(own[0, :, 0].tolist()):  # all queries alike look at the marks
            mixed = own.clone()
            mixed[:, places] = theirs[:, places]
            after.append(float(module(left[[i]], mixed)[0].softmax(0)[chosen]))
        assert float(summary.numbers[f"gain/{THERE}"][i]) == pytest.approx(reference.ranking_gain(after), abs=1e-6)
        cost = float(intact[chosen]) - after[6]
        assert float(summary.numbers[f"cost/{THERE}"][i]) == pytest.approx(cost, abs=1e-6)


def test_tokens_with_samples_on_the_second_axis_are_replaced_too():
    class SequenceFirst(Gazing):
        def forward(self, left, right):
            return super().forward(left.transpose(0, 1), right.transpose(0, 1))

    class Turned(Gazer):
        def forward(self, left, right):
            return 3 * self.fusion(left.transpose(0, 1), right.transpose(0, 1))

    module = Turned(way="softmax")
    module.fusion = SequenceFirst(way="softmax")
    found, expected = summary_of(module).numbers, known(way="softmax").numbers
    assert expected[f"gain/{THERE}"].isfinite().sum() == 128
    for direction in (THERE, BACK):
        for name in ("gain", "cost"):
            torch.testing.assert_close(found[f"{name}/{direction}"], expected[f"{name}/{direction}"], equal_nan=True)


@pytest.mark.parametrize("way", ["kernel", "softmax"])
def test_reported_weights_that_are_not_those_that_were_used_rank_nothing(way):
    summary = summary_of(Gazer(reports="shuffled", way=way), marked_data(1000), contribution_samples=1000)
    assert abs(summary.faithfulness(THERE).mean) <= 0.07
    assert summary.faithfulness(THERE, "reference").mean > 0.45


def test_a_bypassed_attention_has_no_faithfulness():
    summary = known(used=0.0)
    assert math.isnan(summary.faithfulness(THERE).mean)
    assert math.isnan(summary.faithfulness(THERE, "reference").mean)
    assert summary.faithfulness_problem(THERE).startswith(
        "bypassed: it costs 0.000 (95 % CI ± less than 0.001) to replace"
    )
    assert not summary.faithfulness_problem(BACK)


@pytest.mark.filterwarnings("ignore:.*did not run")
def test_samples_without_the_first_layer_are_left_out(infos):
    class Either(Gazing):
        """In one batch a second layer attends, and not the first."""

        def __init__(self):
            super().__init__()
            self.second_left_to_right, self.second_right_to_left = Gaze(), Gaze()

        def forward(self, left, right):
            second = bool(left[0, 0, 0] < -5)
            there, _ = (self.second_left_to_right if second else self.left_to_right)(left, right)
            back, _ = (self.second_right_to_left if second else self.right_to_left)(right, left)
            return there.mean(1) + 0.3 * back.mean(1)

    module, data = Gazer(), marked_data(192)
    module.fusion = Either()
    left = data.tensors[0].clone()
    left[32, 0, 0] = -9
    layers = {name: [path, path.replace(".", ".second_")] for name, path in NAMED.items()}
    data = TensorDataset(left, *data.tensors[1:])
    summary = summary_of(module, data, attention=layers, contribution_samples=192)
    known = torch.isfinite(summary.numbers[f"gain/{THERE}"])
    assert sorted(summary.sample_numbers[~known].tolist()) == list(range(32, 48))
    assert torch.isfinite(summary.numbers["phi/left"]).all()
    assert summary.faithfulness(THERE).mean > 0.45


def test_zero_is_never(infos):
    assert summary_of(Gazer(), faithfulness_every_n_epochs=0).replaced == {}


def test_it_takes_128_samples(infos):
    summary = summary_of(Gazer(), marked_data(127))
    assert math.isnan(summary.faithfulness(THERE).mean)
    assert summary.faithfulness_problem(THERE) == "it needs 128 samples, and 127 were permuted"
    told = f"Faithfulness of the attention {THERE} and {BACK} not computed: it needs 128 samples"
    assert infos.text.count(told) == 1


@pytest.mark.filterwarnings("ignore:.*dead head")
@pytest.mark.parametrize(
    ("fusion", "said", "cell"),
    [
        ({}, "attention ranks the Right tokens by how much predictions depend on them (0.", "+0."),
        (
            {"used": 0.0},
            "not computed for Right (bypassed: it costs 0.000 (95 % CI ± less than 0.001) to replace",
            "bypassed",
        ),
        (
            {"sharpness": 0.0},
            "attention is not shown to rank the Right tokens by how much predictions depend on them "
            "(0.00, 95 % CI ± less than 0.01)",
            "+0.000",
        ),
    ],
    ids=["used", "bypassed", "uniform"],
)
def test_a_report_has_the_faithfulness_with_its_number(fusion, said, cell):
    summary = known(**fusion)
    if "sharpness" in fusion:  # uniform attention ranks nothing
        assert abs(summary.faithfulness(THERE).mean) <= 0.05
    result = DatasetResult({}, summary, ("a", "b", "c"), "target", {}, None)
    text = create_explainability_report(result)
    assert f"- **Faithfulness:** {said}" in text
    assert re.search(rf"\| Left → Right +\| +{re.escape(cell)}", text)


class Fitted(Gazer):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(CLASSES))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(*batch[:2]) + self.bias, batch[2])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopAfter(pl.Callback):
    """Ends a fit at its first epoch, after the callback has seen its validation, as early stopping does."""

    def on_validation_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 1


@pytest.mark.slow
def test_a_report_names_the_epoch_of_its_faithfulness(tmp_path, infos):
    """Where the fit ends before the last epoch that was planned, it is that of the last test."""
    watch = AttentionExplainabilityCallback(NAMED, sample_ids=sample_ids, figures="all")
    loader = loader_of(marked_data(130))
    trainer = quiet_trainer(
        callbacks=[watch, StopAfter()], max_epochs=4, logger=False, default_root_dir=tmp_path, num_sanity_val_steps=0
    )
    trainer.fit(Fitted(), loader, loader)
    tested, last = watch.history
    assert (tested["epoch"], last["epoch"]) == (0, 1)
    assert tested["faithfulness_problems"] == {str(THERE): "", str(BACK): ""}
    assert "faithfulness_problems" not in last
    name = f"faithfulness/{THERE}"
    low, value, high = (tested[f"{name}{end}"] for end in ("_low", "", "_high"))
    assert low < value < high
    first, second = (
        " ".join(re.sub("<[^>]*>", " ", path.read_text()).split())
        for path in sorted(tmp_path.rglob("*.html"), key=lambda path: path.stat().st_mtime_ns)
    )
    ranks = "attention ranks the Right tokens by how much predictions depend on them"
    said = f"{ranks} ({value:.2f}, 95 % CI {low:.2f} to {high:.2f})"
    assert f"Faithfulness {said}" in first
    assert "not tested" not in first
    assert "Faithfulness not tested in this epoch." in second


def test_curves_and_how_often(infos):
    settings = {"faithfulness_every_n_epochs": 2, "figures_every_n_epochs": 0, "curves": "all"}
    watch = AttentionExplainabilityCallback(NAMED, sample_ids=sample_ids, **settings)
    trainer, loader = quiet_trainer(callbacks=[watch], max_epochs=4), loader_of(marked_data(130))
    trainer.fit(Fitted(), loader, loader)
    curve = f"faithfulness/{THERE}"
    assert [curve in record for record in watch.history] == [True, False, True, True]
    trainer.test(Fitted(), loader, verbose=False)
    summary, logged = watch.fusion_summaries["test"], trainer.callback_metrics
    assert float(logged[f"xattn_faithfulness/test/{THERE}"]) == pytest.approx(summary.faithfulness(THERE).mean)
    assert float(logged[f"xattn_faithfulness/test/reference/{THERE}"]) == pytest.approx(
        summary.faithfulness(THERE, "reference").mean
    )
    assert float(logged[f"xattn_faithfulness/test/cost/{THERE}"]) == pytest.approx(
        summary.estimate(f"cost/{THERE}").mean
    )


class CountsPermuted(pl.Callback):
    def __init__(self, watch):
        self.watch, self.counts = watch, []

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.counts.append(self.watch.fusion_summaries["val"].estimate("phi/left").count)


@pytest.mark.parametrize(("chosen", "counts"), [(None, [128, 64, 128, 128]), (100, [100] * 4)])
def test_an_epoch_of_a_fit_that_tests_no_attention_permutes_fewer_samples(chosen, counts):
    """A number that is given holds everywhere."""
    settings = {"faithfulness_every_n_epochs": 2, "figures_every_n_epochs": 0, "contribution_samples": chosen}
    watch = AttentionExplainabilityCallback(NAMED, sample_ids=sample_ids, **settings)
    permuted, loader = CountsPermuted(watch), loader_of(marked_data(130))
    quiet_trainer(callbacks=[watch, permuted], max_epochs=3).fit(Fitted(), loader, loader)
    quiet_trainer(callbacks=[watch, permuted]).validate(Fitted(), loader, verbose=False)
    assert permuted.counts == counts


def test_the_explainer_always_tests_the_attention():
    explainer = ExplainabilityCapture(
        Gazer(), attention=NAMED, predict=lambda model, batch: model.validation_step(batch, 0), sample_ids=sample_ids
    )
    found = explainer.explain_loader(loader_of(marked_data()), progress=False).fusion
    expected = known()
    for direction in (THERE, BACK):
        assert found.faithfulness(direction) == expected.faithfulness(direction)


@pytest.fixture
def of_few_samples(monkeypatch):
    monkeypatch.setattr("lightning_xattn.attribution.faithfulness.LEAST_SAMPLES", 20)


@pytest.mark.filterwarnings("ignore:.*dead head")
def test_faithfulness_is_the_same_in_every_run(of_few_samples):
    """Keys with the same attention are replaced in a random order, which does not depend on what else was drawn."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(summary_of(Gazer(sharpness=0.0), marked_data(24)).replaced[THERE])
    for name in ("gain", "reference", "cost"):
        first, second = (getattr(one, name) for one in found)
        assert first.isfinite().all()
        assert torch.equal(first, second)


def test_only_the_keys_of_a_modality_are_replaced(of_few_samples, infos):
    modalities = {"left": "batch.0", "other": "batch.1"}
    summary = summary_of(Gazer(), marked_data(24), modalities=modalities)
    assert {direction: one.problem for direction, one in summary.replaced.items()} == {
        THERE: "no modality is called right",
        BACK: "",
    }
    assert summary.replaced[THERE].gain.isnan().all()
    assert summary.replaced[BACK].gain.isfinite().all()


def test_what_has_no_gradient_has_no_reference(infos):
    class Cut(Gazing):
        def forward(self, left, right):
            return super().forward(left, right).detach()

    module = Gazer()
    module.fusion = Cut()
    summary = summary_of(module)
    assert summary.faithfulness(THERE).mean > 0.45
    assert math.isnan(summary.faithfulness(THERE, "reference").mean)
    assert summary.replaced[THERE].without_reference == "no gradient reaches its weights"


@pytest.mark.filterwarnings("ignore:No (predictions|targets) found")
def test_a_regression_has_no_class_to_lose(infos):
    data, _ = said_data(130)
    left, right, target, ids = data.tensors
    summary = summary_of(TwoStreams(outputs=1), TensorDataset(left, right, target.float(), ids), attention=None)
    assert summary.faithfulness_problem(THERE) == "the model predicts no classes"


def test_faithfulness_takes_as_many_samples_as_have_a_partner():
    class Shortened(TwoStreams):
        """Most samples have numbers of tokens of their own group alone."""

        def validation_step(self, batch, batch_idx):
            left, right, target, *_ = batch
            return {"logits": self(left[:, : 2 + batch_idx % 4], right), "targets": target}

    def groups(outputs, batch):
        return (batch[3] - 1000) // 16 % 4

    torch.manual_seed(0)
    with pytest.warns(XAttnWarning, match="the number of tokens changes from batch to batch"):
        summary = summary_of(Shortened(), said_data(160)[0], groups=groups, attention=None)
    reasons = [summary.faithfulness_problem(direction) for direction in summary.replaced]
    assert reasons
    assert all("it needs 128 samples, and 0 have several keys and a partner" in reason for reason in reasons)
