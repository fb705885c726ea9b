"""One batch: what the model does with it, recorded while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.ports import LeftOutError, ModalitiesSetting
from lightning_xattn.attribution.recorder import FusionRecord, ModalityRecorder
from lightning_xattn.capture import AttentionRecorder, AttentionSetting, Layer, is_set_aside
from lightning_xattn.capture.attention_mode import get_module
from lightning_xattn.capture.calls import StepTrace, find_tensors
from lightning_xattn.capture.labels import LabelFinder, Labels, Step
from lightning_xattn.capture.labels.finder import Scores
from lightning_xattn.capture.labels.places import module_named
from lightning_xattn.core.attention import AttentionPair, Direction, mask_absent, mask_queries
from lightning_xattn.core.distributed import SINGLE_PROCESS, Processes
from lightning_xattn.core.errors import DiscoveryError, ShapeError
from lightning_xattn.core.notices import warn
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT, UNKNOWN

Attentions = tuple[AttentionPair, ...]

_MULTILABEL_LOSSES = (nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss)


def find_multilabel_loss(model: nn.Module) -> str:
    """The path of a loss or metric in a model that is one for several labels at once; "" without."""
    losses = (
        path
        for path, module in model.named_modules()
        if isinstance(module, _MULTILABEL_LOSSES) or type(module).__name__.startswith(("Multilabel", "MultiLabel"))
    )
    return next(losses, "")


class StepRecorder:
    """Record a model's attention, modalities and predictions while it runs; its outputs stay what they are.

    Parameters
    ----------
    model
        Any module; nothing is wrapped yet.
    attention
        As ``AttentionRecorder`` takes it.
    fusion, modalities
        As ``ModalityRecorder`` takes them.
    labels
        Settings of labels, some of which may be paths of modules.
    processes
        Those that run the model.
    replays
        Whether the model may run again.

    Attributes
    ----------
    fusion : ModalityRecorder
        Of the modalities, for replays.
    renamed : dict of Direction to Direction
        Directions that this step's attention has by its names, with those that the modalities show.
    detected_no_attention : bool
        Whether a first step computed no attention, though the settings did not turn it off.

    Raises
    ------
    DiscoveryError, SettingError
        If a setting names what is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: AttentionSetting | None = None,
        fusion: str | None = None,
        modalities: ModalitiesSetting | None = None,
        labels: Sequence[Any] = (),
        processes: Processes = SINGLE_PROCESS,
        replays: bool = True,
    ) -> None:
        self._trace = StepTrace()
        self.fusion = ModalityRecorder(
            model, self._trace, fusion, modalities, processes, replays, names_attention=attention is not None
        )
        self._attention = AttentionRecorder(model, attention, self._trace)
        self._model = model
        self._multilabel_loss = find_multilabel_loss(model)
        # A model of which no attention is named may have no cross-attention at all.
        self._may_lack_attention = attention is None
        self._lacks_attention = is_set_aside(attention)
        self.detected_no_attention = False
        self._pairs: Attentions = ()
        # Why it is not clear in a first step which attention goes across.
        self._doubt: DiscoveryError | None = None
        self._outputs: Any = None
        self.renamed: dict[Direction, Direction] = {}
        named = [module_named(model, one) for one in labels if isinstance(one, str)]
        paths = ["", *(one[0] for one in named if one is not None)]
        self._trace.follow({get_module(model, path): path for path in paths}, False)

    def __enter__(self) -> StepRecorder:
        return self.begin()

    def begin(
        self, function: Callable[..., Any] | None = None, args: tuple[Any, ...] = (), finder: LabelFinder | None = None
    ) -> StepRecorder:
        """Record the step that begins now.

        Parameters
        ----------
        function, args
            The step and its arguments, so that it can run again; None: it cannot.
        finder
            Finds the labels of the step; until it knows where they are, the whole step is traced.
        """
        self.close()
        self.clear()
        is_known = finder is not None and finder.decided
        self._trace.is_complete = not (is_known and self.fusion.is_decided)
        self.fusion.begin(function, args)
        self._attention.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unwrap the model. What was recorded stays until ``clear``."""
        self._attention.close()

    def clear(self) -> None:
        """Forget what was recorded."""
        self._attention.clear()
        self._trace.clear()
        self.fusion.clear()
        self._pairs, self._outputs, self.renamed = (), None, {}

    def reset(self) -> None:
        """Forget the call that an evaluation's replays repeat."""
        self.fusion.reset()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that are recorded."""
        return self._attention.layers

    @property
    def pairs(self) -> Attentions:
        """The attention of the step, of each layer."""
        return self._pairs

    @property
    def is_waiting(self) -> bool:
        """See ``AttentionRecorder``."""
        return self._attention.is_waiting

    @property
    def left_out(self) -> dict[str, int]:
        """See ``AttentionRecorder``."""
        return self._attention.left_out

    def collect_step(self, outputs: Any, batch: Any, needs_attention: bool = False) -> tuple[Step, Attentions] | None:
        """What the step returned and its attention; None if it ran nothing, or left all its attention out.

        Parameters
        ----------
        outputs, batch
            What the step returned and got.
        needs_attention
            Whether attention that cannot be recorded is an error, also where none is named.

        Raises
        ------
        DiscoveryError, ShapeError
            As ``AttentionRecorder.attention``; a model of which no attention is named needs none.
        """
        self._outputs = outputs
        self._pairs = self._collect_attention(batch, needs_attention)
        if self._pairs:
            first = self._pairs[0].forward
            tokens = tuple(first.shape[2:])
            samples: int | None = len(first)
            device = first.device
        elif not self._lacks_attention or not self._trace.runs:
            return None
        else:
            samples, device, tokens = *self._count_samples(outputs, batch), ()
            if samples is None:
                return None
        forward = self._trace.find("")
        output = None if forward is None else forward.output
        assert samples is not None
        step = Step(outputs, batch, output, samples, device, tokens, self._multilabel_loss, self._trace, self._model)
        return step, self._pairs

    def _count_samples(self, outputs: Any, batch: Any) -> tuple[int | None, torch.device]:
        """How many samples a step without attention has: by what its loss reads, what it returns, or the batch."""
        tensors = [loss.input for loss in self._trace.losses] + [one for _, one in find_tensors(outputs)]
        tensors += [one for run in self._trace.outermost() for _, one in run.tensors.items()]
        in_batch = [one for _, one in find_tensors(batch)]
        for one in (*tensors, *in_batch):
            fits = any(len(one) == len(other) for other in in_batch if other.dim()) if one.dim() else False
            if one.dim() and (fits or not in_batch):
                return len(one), one.device
        return None, torch.device("cpu")

    @property
    def has_nothing(self) -> bool:
        """Whether a first step has shown neither attention nor modalities."""
        return self._lacks_attention and self.fusion.is_decided and not self.fusion.modalities

    def follow(self, finder: LabelFinder) -> None:
        """Trace in later steps what the finder reads."""
        paths, reads_losses = finder.reads()
        self._trace.follow({get_module(self._model, path): path for path in paths}, reads_losses)

    def collect_fusion(self, labels: Labels) -> FusionRecord | None:
        """The modalities of this step; of a first step the labels help to find them.

        Raises
        ------
        DiscoveryError
            If what is named is not there, or there is neither attention nor a modality.
        """
        was_decided, doubt = self.fusion.is_decided, self._doubt
        if doubt is not None:
            self._choose_by_flow(labels, doubt)
        inputs = self.fusion.collect(self._pairs, self.layers, labels, self._outputs)
        if not was_decided:
            self.renamed = dict(self.fusion.found.renamed)
            self._attention.rename(self.renamed)
            if self.fusion.found.mixing:
                names = " and ".join(f"'{path}'" for path in self.fusion.found.mixing)
                warn(
                    f"The attention is left out, and the rest is recorded. Attention from sample to sample: {names}. "
                    "An nn.MultiheadAttention does so if it gets (batch, tokens, width) without batch_first=True."
                )
                self._pairs, self._lacks_attention = (), True
                self._attention.set_aside()
        return inputs

    def _choose_by_flow(self, labels: Labels, doubt: DiscoveryError) -> None:
        """Let the flow of data show which attention goes across, where what ran in a first step does not."""
        self._doubt = None
        try:
            self.fusion.decide((), (), labels, self._outputs)
            self._attention.choose_by_flow(self.fusion.found.sides)
            self._pairs, self._lacks_attention = self._attention.attention, False
        except LeftOutError:  # another step may show it
            self._doubt = doubt
        except (DiscoveryError, ShapeError):
            warn([f"The attention is left out, and the rest is recorded. {doubt}"])
            self._attention.set_aside()

    def _collect_attention(self, batch: Any, needs_attention: bool) -> Attentions:
        if self._lacks_attention:
            self._attention.raise_errors()
            return ()
        self._attention.batch = batch
        try:
            return self._attention.attention
        except (DiscoveryError, ShapeError) as error:
            if self._attention.ran_nothing:
                return ()
            forward = self._trace.find("")
            has_forward = forward is not None and forward.has_ended
            is_whole_step = self._outputs is not None or has_forward or bool(self._trace.losses) or self.fusion.is_named
            is_named = not self._may_lack_attention or (bool(self._attention.layers) and not self.fusion.is_named)
            if needs_attention or is_named:
                raise
            if not (is_whole_step or self._attention.saw_attention):
                raise type(error)(
                    f"{error} Without attention there are probes and contributions if the step returns its predictions "
                    "as {'logits': ...}."
                ) from error
            self._lacks_attention = True
            if self._attention.saw_attention and isinstance(error, DiscoveryError):
                self._doubt = error
                return ()
            self.detected_no_attention = True
            self._attention.set_aside()
            return ()


@dataclass(frozen=True, eq=False)
class BatchResult:
    """What a model did with a batch.

    Parameters
    ----------
    attention
        Of each layer.
    labels
        Predictions, scores, targets, ids and groups.
    samples, device
        How many samples it has, and where its tensors are.
    inputs
        The modalities; None where they are not known.
    """

    attention: tuple[AttentionPair, ...]
    labels: Labels
    samples: int
    device: torch.device
    inputs: FusionRecord | None = None

    def __repr__(self) -> str:
        layers = ", ".join(pair.layer for pair in self.attention)
        return f"BatchResult({len(self)} samples; {f'layers {layers}' if layers else 'no cross-attention'})"

    def __len__(self) -> int:
        return self.samples

    @property
    def scores(self) -> Scores | None:
        """The class scores, if the predictions are theirs. Waits for a GPU."""
        scores, predicted = self.labels.scores, self.labels.predicted
        if scores is None or predicted is None or not scores.agree_with(predicted, self.labels.confidence):
            return None
        return scores

    def __getitem__(self, samples: slice) -> BatchResult:
        """Some of the samples."""
        inputs = None if self.inputs is None else self.inputs[samples]
        count = len(range(self.samples)[samples])
        attention = tuple(pair[samples] for pair in self.attention)
        return BatchResult(attention, self.labels[samples], count, self.device, inputs)

    def cpu(self) -> BatchResult:
        """Attention and labels on the CPU, without a graph."""
        attention = tuple(pair.cpu() for pair in self.attention)
        return BatchResult(attention, self.labels.cpu(), self.samples, torch.device("cpu"))


def read_batch(step: Step, attention: Attentions, finder: LabelFinder) -> BatchResult:
    """A batch with its labels, and without those of its queries that are padding.

    Raises
    ------
    DiscoveryError, ShapeError
        As ``LabelFinder.find``, or if a mask does not fit the attention.
    """
    labels = finder.find(step)
    attention = mask_absent(mask_queries(attention, labels.query_mask), labels.present)
    return BatchResult(attention, labels, step.samples, torch.device(step.device))


def with_fusion(batch: BatchResult, recorder: StepRecorder, step: Step, finder: LabelFinder) -> BatchResult:
    """A batch with what entered the fusion, and with confidences that a step of class ids alone lacks.

    Parameters
    ----------
    batch, step, finder
        As ``read_batch`` gives and takes them.
    recorder
        Has recorded the step.

    Raises
    ------
    DiscoveryError
        As ``StepRecorder.collect_fusion``, or if ``present`` names another modality.
    """
    labels, inputs = batch.labels, recorder.collect_fusion(batch.labels)
    if recorder.pairs and not batch.attention:  # the flow of data has just shown which attention goes across
        tokens = tuple(recorder.pairs[0].forward.shape[2:])
        labels = replace(labels, query_mask=finder.find_query_mask(replace(step, tokens=tokens)))
    attention = mask_queries(recorder.pairs, labels.query_mask)
    attention = tuple(pair.renamed(recorder.renamed) for pair in attention) if recorder.renamed else attention
    check_present(labels.present, attention, [one.name for one in recorder.fusion.modalities])
    batch = replace(batch, attention=mask_absent(attention, labels.present))
    output = None if inputs is None else inputs.model_output
    if output is not None and output.values.shape[1] > 1 and labels.confidence is None and labels.predicted is not None:
        confidence, predicted = output.values.max(1)
        labels = replace(labels, confidence=torch.where(predicted == labels.predicted, confidence, torch.nan))
    return replace(batch, labels=labels, inputs=inputs)


def check_present(present: Mapping[str, Tensor], attention: Attentions, modalities: Sequence[str] = ()) -> None:
    """Refuse a setting of what samples lack that names other modalities than these, or those of the attention.

    Raises
    ------
    DiscoveryError
        Saying which there are.
    """
    attending = dict.fromkeys(name for pair in attention for one in pair.directions for name in one.token_counts)
    known = modalities or list(attending)
    unknown = [name for name in present if known and name not in known]
    apart = [name for name in attending if modalities and name not in modalities]
    if unknown or (present and apart):
        called = f" The attention calls some of them {', '.join(map(repr, apart))}." if apart else ""
        raise DiscoveryError(
            f"present names {', '.join(map(repr, present))}, but the modalities are {', '.join(map(repr, known))}."
            f"{called} Give each one name in present, modalities={{'<a>': 'path.to.encoder', '<b>': "
            "'path.to.encoder'} and attention={'<a>_to_<b>': 'path.to.module'}."
        )


def classify(
    labels: Labels, classes_by: str, n_classes: int, samples: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's class id (-1: none), outcome, and whether its target is tied.

    A sample whose target or prediction is not one of the classes has no outcome.
    """
    classes = labels.target if classes_by == "target" else labels.predicted
    if classes is None:
        classes = torch.full((samples,), -1, device=device)
    outcomes = torch.full((samples,), UNKNOWN, device=device)
    if labels.predicted is not None and labels.target is not None:
        # Ids below 0 are no labels, or scores that were not finite.
        known = (labels.predicted >= 0) & (labels.target >= 0)
        if n_classes:
            known = known & (labels.predicted < n_classes) & (labels.target < n_classes)
        outcomes = torch.where(known, torch.where(labels.predicted == labels.target, CORRECT, INCORRECT), UNKNOWN)
    tied = torch.zeros(samples, dtype=torch.bool, device=device) if labels.tied is None else labels.tied
    return classes, outcomes, tied
