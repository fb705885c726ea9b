"""What recording adds to one forward pass of a fusion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import quartiles_of_ratios, times_in_turns
from lightning_xattn import AttentionRecorder
from lightning_xattn.capture.labels import LabelFinder
from lightning_xattn.evaluation.batch import StepRecorder, read_batch

BATCH, EEG, SPEC, WIDTH, HEADS = 32, 9, 119, 256, 8


class Fusion(nn.Module):
    """Cross-attention in both directions, with weights or without."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.eeg_to_spec_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.spec_to_eeg_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, eeg: Tensor, spec: Tensor) -> tuple[Tensor, Tensor]:
        there, _ = self.eeg_to_spec_attn(eeg, spec, spec, need_weights=self.need_weights)
        back, _ = self.spec_to_eeg_attn(spec, eeg, eeg, need_weights=self.need_weights)
        return there, back


class Sdpa(nn.Module):
    """The same two attentions on heads that are projected already, by the fused kernel or step by step."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(queries, keys, keys)
        return (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(-1) @ keys


class Decoder(nn.Module):
    """Four layers in which EEG asks the spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 4)

    def forward(self, eeg: Tensor, spec: Tensor) -> Tensor:
        out: Tensor = self.decoder(eeg, spec)
        return out


class Around(nn.Module):
    """A fusion behind an encoder of many small operations, each a module of its own."""

    def __init__(self, operations: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*[nn.Identity() if i % 2 else nn.ReLU() for i in range(operations)])
        self.fusion = Fusion(need_weights=True)

    def forward(self, eeg: Tensor, spec: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = self.fusion(self.encoder(eeg), spec)
        return out


class Classifier(nn.Module):
    """Two encoders, one of many small operations, a fusion, and a step that computes a loss."""

    def __init__(self, operations: int) -> None:
        super().__init__()
        small = [nn.Identity() if i % 2 else nn.ReLU() for i in range(operations)]
        self.eeg_encoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), *small)
        self.spec_encoder = nn.Linear(WIDTH, WIDTH)
        self.fusion, self.head = Fusion(need_weights=True), nn.Linear(2 * WIDTH, 6)

    def forward(self, eeg: Tensor, spec: Tensor) -> Tensor:
        there, back = self.fusion(self.eeg_encoder(eeg), self.spec_encoder(spec))
        scores: Tensor = self.head(torch.cat([there.mean(1), back.mean(1)], 1))
        return scores

    def step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0], batch[1]), batch[2])


@torch.no_grad()
def tracing() -> None:
    """What a first step's trace costs, and what later steps cost, from a step's begin to its end."""
    torch.manual_seed(0)
    batch = torch.randn(BATCH, EEG, WIDTH), torch.randn(BATCH, SPEC, WIDTH), torch.arange(BATCH) % 6
    print("a whole step, from its begin to its end; without recording = 1")
    for operations, repeats in ((20, 100), (5000, 30)):
        model = Classifier(operations).eval()
        later, finder = StepRecorder(model), LabelFinder()
        run(later, model, batch, finder)
        found = later.collect_step(None, batch)
        assert found is not None
        read_batch(*found, finder)
        later.follow(finder)
        labels = finder.find(found[0])
        later.collect_fusion(labels)
        first = StepRecorder(model)

        def first_step(model: Classifier = model, first: StepRecorder = first) -> None:
            run(first, model, batch, LabelFinder())
            first.clear()

        def later_step(model: Classifier = model, later: StepRecorder = later, known: LabelFinder = finder) -> None:
            run(later, model, batch, known)
            later.clear()

        plain, one, other = times_in_turns(
            lambda model=model: model.step(batch), first_step, later_step, repeats=repeats
        )
        _print(f"{operations} small operations: first step", quartiles_of_ratios(one, plain), "aim: at most 1.5")
        _print(f"{operations} small operations: later step", quartiles_of_ratios(other, plain), "aim: at most 1.02")


def run(recorder: StepRecorder, model: Classifier, batch: tuple[Tensor, Tensor, Tensor], finder: LabelFinder) -> None:
    """A recorded step."""
    recorder.begin(model.step, (batch,), finder)
    model.step(batch)
    recorder.close()


@torch.no_grad()
def recording() -> None:
    """What recording adds to models that attend in several ways, and to one that mostly does something else."""
    torch.manual_seed(0)
    eeg, spec = torch.randn(BATCH, EEG, WIDTH), torch.randn(BATCH, SPEC, WIDTH)
    print(f"recording a fusion ({BATCH} x {HEADS} x {EEG} x {SPEC}, both directions); without recording = 1")
    asked = Fusion(need_weights=True).eval()
    _compare("weights that are asked for", asked, (eeg, spec), None, "aim: at most 1.03")
    _compare("the same, without weights", Fusion(need_weights=False).eval(), (eeg, spec), None, "")
    _compare("a decoder of 4 layers", Decoder().eval(), (eeg, spec), {"eeg_to_spec": "decoder"}, "")
    _compare("behind 5,000 small operations", Around(5000).eval(), (eeg, spec), None, "aim: at most 1.02", repeats=60)

    plain, again = times_in_turns(lambda: asked(eeg, spec), lambda: asked(eeg, spec), repeats=200)
    _print("nothing recorded, twice", quartiles_of_ratios(again, plain), "how noisy the machine is")

    queries, keys = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2).contiguous() for x in (eeg, spec))
    model, unfused = nn.ModuleDict({"x": Sdpa(fused=True)}), Sdpa(fused=False)
    beside = AttentionRecorder(model, {"eeg_to_spec": "x"})

    def recorded_beside() -> None:
        with beside:
            model["x"](queries, keys)
        _ = beside.attention
        beside.clear()

    fused, both, alone = times_in_turns(
        lambda: model["x"](queries, keys), recorded_beside, lambda: unfused(queries, keys), repeats=400
    )
    extra = [b - f for f, b in zip(fused, both, strict=True)]
    _print("beside a fused kernel: added time over an unfused one", quartiles_of_ratios(extra, alone), "aim: at most 1")


def _compare(
    what: str,
    model: nn.Module,
    inputs: tuple[Tensor, Tensor],
    attention: dict[str, str] | None,
    aim: str,
    repeats: int = 200,
) -> None:
    recorder = AttentionRecorder(model, attention)

    def recorded() -> None:
        with recorder:
            model(*inputs)
        _ = recorder.attention
        recorder.clear()

    plain, watched = times_in_turns(lambda: model(*inputs), recorded, repeats=repeats)
    _print(what, quartiles_of_ratios(watched, plain), aim)


def _print(what: str, quartiles: tuple[float, float, float], aim: str) -> None:
    low, middle, high = quartiles
    print(f"  {what:54} {middle:6.3f}     {f'({aim}), ' if aim else ''}quartiles {low:.3f} and {high:.3f}")


if __name__ == "__main__":
    recording()
    tracing()
