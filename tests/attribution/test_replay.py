"""What lies behind a fusion, run again with other tokens: nothing of the model or of the run changes."""

import copy
import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.attribution.contribution import _Job, _replay_jobs
from lightning_xattn.attribution.outputs import ModelOutput
from lightning_xattn.attribution.replay import ReplayError
from tests.attribution.models import WIDTH, Concatenation, TwoStreams, loader_of, said_data
from tests.toy import count_global_hooks, count_hooks, quiet_trainer

DATA, _ = said_data(40)


def look(module, data=DATA, batch_size=16, trainer=None, **settings):
    """The only summary of a validation."""
    callback = AttentionExplainabilityCallback(figures_every_n_epochs=0, **settings)
    quiet_trainer(callbacks=[callback], **(trainer or {})).validate(module, loader_of(data, batch_size), verbose=False)
    return callback.fusion_summaries["val"]


class Busy(TwoStreams):
    """Does all that a forward should not."""

    def __init__(self):
        super().__init__()
        self.register_buffer("counts", torch.zeros(2))
        self.norm = nn.BatchNorm1d(2 * WIDTH)
        self.runs, self.last = 0, None

    def forward(self, left, right):
        left, right = self.left(left), self.right(right)
        fused = self.norm(self.fusion(left, right))
        torch.rand(3)
        self.counts[0] += 1
        self.counts = self.counts + torch.tensor([0.0, 1.0])
        self.runs, self.last = self.runs + 1, fused
        self.log("noise", fused.mean())
        return self.head(fused)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(*batch[:2]), batch[2])


@pytest.mark.parametrize("trainer", [{}, {"precision": "bf16-mixed", "inference_mode": False}], ids=str)
def test_training_is_bit_for_bit_what_it_is_without(trainer):
    def run(callbacks):
        torch.manual_seed(0)
        module, noted = Busy(), []
        module.head.register_forward_hook(lambda _, args, output: noted.append(output.detach().clone()))
        runner = quiet_trainer(max_epochs=2, callbacks=callbacks, **trainer)
        runner.fit(module, loader_of(DATA), loader_of(said_data(130)[0]))
        logged = {name: value for name, value in runner.callback_metrics.items() if "xattn" not in name}
        return module, noted, logged, torch.get_rng_state()

    plain, notes, metrics, state = run([])
    callback = AttentionExplainabilityCallback(faithfulness_every_n_epochs=1)
    watched, others, logged, after = run([callback])
    summary = callback.fusion_summaries["val"]
    assert not summary.contribution_problem
    assert [(one.problem, one.without_reference) for one in summary.replaced.values()] == [("", "")] * 2
    assert len(notes) == len(others)
    assert all(map(torch.equal, notes, others))
    assert all(map(torch.equal, plain.state_dict().values(), watched.state_dict().values()))
    assert (plain.runs, metrics) == (watched.runs, logged)
    assert torch.equal(plain.last, watched.last)
    assert torch.equal(state, after)
    assert plain.__dict__.keys() == watched.__dict__.keys()
    assert count_hooks(watched) == 1
    assert count_global_hooks() == 0
    assert not any("forward" in vars(one) for one in watched.modules())


RUNS: list[int] = []
"""What a module-level variable counts is not put back after a replay."""


def test_only_what_lies_behind_the_fusion_runs_again():
    RUNS.clear()

    class Slow(nn.Linear):
        def forward(self, x):
            RUNS.append(len(x))
            return super().forward(x)

    class Counted(TwoStreams):
        def __init__(self):
            super().__init__()
            self.left = Slow(3, WIDTH)

    summary = look(Counted())
    assert not summary.contribution_problem
    assert summary.pairs == 4 * 40
    # Three steps, and at most 20 runs of 16 samples to find the modalities, which replays need not repeat.
    found = len(RUNS) - 3
    assert [16, *[16] * found, 16, 8] == RUNS
    assert found <= 20


def test_without_contributions_nothing_runs_again():
    """Not even to find the modalities, which then have the attention's names."""

    class Counted(TwoStreams):
        def forward(self, left, right):
            RUNS.append(len(left))
            return super().forward(left, right)

    RUNS.clear()
    callback = AttentionExplainabilityCallback(contribution_samples=0, figures_every_n_epochs=0)
    quiet_trainer(callbacks=[callback]).validate(Counted(), loader_of(DATA), verbose=False)
    assert RUNS == [16, 16, 8]
    assert callback.fusion_summaries["val"].modalities == ("left", "right")
    assert callback.fusion_summaries["val"].contribution_problem == "contribution_samples is 0"


class Bypassed(TwoStreams):
    """The left tokens reach the head past the fusion, too."""

    def forward(self, left, right):
        return super().forward(left, right) + 3 * left.mean(1)[:, :1] * torch.arange(4)


def test_an_encoder_that_is_bypassed_is_exchanged_with_its_input(infos):
    summary = look(Bypassed())
    assert any("modalities: left = left and left, right = right;" in said for said in infos.messages)
    assert not summary.contribution_problem


class Dropping(Concatenation):
    """Dropout that stays on."""

    def forward(self, left, right):
        return nn.functional.dropout(super().forward(left, right), 0.5, training=True)


class OfBatch(Concatenation):
    """Statistics of the batch."""

    def forward(self, left, right):
        fused = super().forward(left, right)
        return (fused - fused.mean(0)) / fused.std(0)


@pytest.mark.parametrize("fusion", [Dropping, OfBatch], ids=["dropout", "batch statistics"])
def test_a_model_that_differs_from_run_to_run_has_no_contributions(fusion):
    torch.manual_seed(0)
    summary = look(TwoStreams(fusion()), fusion="fusion", modalities={"left": 0, "right": 1})
    assert summary.contribution_problem
    assert not [name for name in summary.numbers if name.startswith("phi")]


def test_a_model_that_wants_its_number_of_samples_is_run_with_as_many():
    class Fixed(TwoStreams):
        def forward(self, left, right):
            fused = self.fusion(self.left(left), self.right(right))
            return self.head(fused.view(len(left), 2 * WIDTH))

    torch.manual_seed(0)
    expected = look(TwoStreams())
    torch.manual_seed(0)
    ours = look(Fixed())
    assert not ours.contribution_problem
    torch.testing.assert_close(ours.numbers["phi/left"], expected.numbers["phi/left"])


def test_a_model_whose_encoders_cannot_be_skipped_is_run_as_a_whole(infos):
    class Tied(TwoStreams):
        """Takes a number from its encoder that it leaves there."""

        def forward(self, left, right):
            self.left.seen = None
            left = self.left(left)
            self.left.seen + 1
            return self.head(self.fusion(left, self.right(right)))

    class Leaving(nn.Linear):
        def forward(self, x):
            self.seen = 1
            return super().forward(x)

    def made(kind):
        torch.manual_seed(0)
        module = kind()
        encoder = Leaving(3, WIDTH)
        encoder.load_state_dict(module.left.state_dict())
        module.left = encoder
        return module

    ours, expected = look(made(Tied)), look(made(TwoStreams))
    assert not ours.contribution_problem
    assert (ours.whole_runs, expected.whole_runs) == (True, False)
    assert sum("it costs as much as 160 samples" in said for said in infos.messages) == 1
    torch.testing.assert_close(ours.numbers["phi/left"], expected.numbers["phi/left"])


def test_half_precision_is_entered_again():
    torch.manual_seed(0)
    module = TwoStreams()
    exact = look(copy.deepcopy(module))
    half = look(copy.deepcopy(module), trainer={"precision": "bf16-mixed"})
    assert not half.contribution_problem
    assert (half.numbers["phi/left"] - exact.numbers["phi/left"]).abs().max() < 0.02
    assert not torch.equal(half.numbers["phi/left"], exact.numbers["phi/left"])


def test_arguments_that_are_changed_in_place_are_kept_as_they_came():
    class InPlace(Concatenation):
        def forward(self, left, right):
            left += 0.5
            return super().forward(left, right)

    class Copy(Concatenation):
        def forward(self, left, right):
            return super().forward(left + 0.5, right)

    found = []
    for kind in (InPlace, Copy):
        torch.manual_seed(0)
        found.append(look(TwoStreams(kind()), fusion="fusion", modalities={"left": 0, "right": 1}))
    assert not found[0].contribution_problem
    for name in ("phi/left", "right/left", "conflict"):
        assert found[0].numbers[name].equal(found[1].numbers[name]) or torch.equal(
            found[0].numbers[name].nan_to_num(), found[1].numbers[name].nan_to_num()
        )


def test_any_batches_give_the_same():
    found = []
    for size in (16, 3, 40):
        torch.manual_seed(0)
        found.append(look(TwoStreams(), batch_size=size, sample_ids=lambda outputs, batch: batch[3]))
    for name, values in found[0].numbers.items():
        for other in found[1:]:
            torch.testing.assert_close(other.numbers[name], values, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_two_callbacks_do_not_see_each_others_replays():
    torch.manual_seed(0)
    module = TwoStreams()
    alone = AttentionExplainabilityCallback(figures_every_n_epochs=0)
    quiet_trainer(callbacks=[alone]).validate(module, loader_of(DATA), verbose=False)
    both = [
        AttentionExplainabilityCallback(figures_every_n_epochs=0),
        AttentionExplainabilityCallback(classes_by="prediction", figures_every_n_epochs=0),
    ]
    quiet_trainer(callbacks=both).validate(module, loader_of(DATA), verbose=False)
    expected = alone.fusion_summaries["val"]
    for callback in both:
        (summary,) = callback.fusion_summaries.values()
        assert torch.equal(summary.numbers["phi/left"], expected.numbers["phi/left"])


@pytest.mark.parametrize(
    ("precision", "off", "kept"),
    [
        # Of a standard deviation between samples of 8.
        (torch.float32, 0.004, True),
        (torch.float32, 0.02, False),
        (torch.bfloat16, 0.2, True),
        (torch.float16, 0.4, False),
    ],
)
def test_intact_pairs_must_give_their_logits_back_within_rounding(precision, off, kept):
    """The probabilities are the same to 1e-6 in all of these, as the model is sure of itself."""
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    logits = torch.stack([signs, -signs], dim=1) * 8 * (7 / 8) ** 0.5
    again = logits + off * torch.tensor([1.0, -1.0])
    assert float((again.softmax(1) - logits.softmax(1)).abs().max()) < 1e-6
    source = SimpleNamespace(
        model_output=ModelOutput(logits.softmax(1), logits),
        batches=lambda sources, own: [(sources["left"], sources)],
    )

    class Replays:
        skips, restoring_once = True, nullcontext

        def __call__(self, sources):
            return ModelOutput(again[sources["left"]].softmax(1), again[sources["left"]])

    replay = Replays()
    replay.precision = precision
    every = torch.arange(8)
    jobs = [_Job(every, every, frozenset()), _Job(every, every.roll(1), frozenset({0}))]
    places = {"left": None, "right": None}
    if kept:
        found, whole = _replay_jobs(source, places, jobs, replay, torch.arange)
        assert sorted(found) == [0, 1]
        assert not whole
        torch.testing.assert_close(found[1].logits, again)
    else:
        with pytest.raises(ReplayError, match="other outputs"):
            _replay_jobs(source, places, jobs, replay, torch.arange)


def test_no_batch_is_kept_after_a_run():
    """Neither by the trace of a first step nor for replays: as many tensors of its shape are alive as without."""

    def alive(callbacks):
        module = TwoStreams()
        quiet_trainer(callbacks=callbacks).validate(module, loader_of(DATA), verbose=False)
        gc.collect()
        return sum(type(one) is torch.Tensor and one.shape == (16, 5, 3) for one in gc.get_objects())

    callback = AttentionExplainabilityCallback(figures_every_n_epochs=0)
    plain = alive([])
    assert alive([callback]) == plain
    assert not callback.fusion_summaries["val"].contribution_problem
