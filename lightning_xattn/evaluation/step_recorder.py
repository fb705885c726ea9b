"""What a model does in a step: its attention, what enters its fusion, and what it returns."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from lightning_xattn.attribution.inputs import ModalitiesSetting
from lightning_xattn.attribution.recorder import FusionRecord, FusionRecorder
from lightning_xattn.capture import AttentionRecorder, AttentionSetting, Layer, is_set_aside
from lightning_xattn.capture.labels import Labels, Step
from lightning_xattn.capture.wrappers import Hook
from lightning_xattn.core.attention import AttentionPair
from lightning_xattn.core.distributed import SINGLE_PROCESS, Processes
from lightning_xattn.core.errors import DiscoveryError, ShapeError
from lightning_xattn.core.notices import info, warn

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
    """Record a model's attention and what enters its fusion while it runs; its outputs stay what they are.

    Parameters
    ----------
    model
        Any module; nothing is hooked yet.
    attention
        As ``AttentionRecorder`` takes it.
    fusion, modalities
        As ``FusionRecorder`` takes them.
    processes
        Those that run the model.
    replays
        Whether the model may run again.

    Attributes
    ----------
    fusion : FusionRecorder
        Of what enters the fusion, for replays.

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
        processes: Processes = SINGLE_PROCESS,
        replays: bool = True,
    ) -> None:
        self.fusion = FusionRecorder(model, fusion, modalities, processes, replays)
        self._attention = AttentionRecorder(model, attention)
        self._model = model
        self._multilabel_loss = find_multilabel_loss(model)
        # A model whose fusion is named may have no cross-attention at all.
        self._may_lack_attention = attention is None and not self.fusion.needs_attention
        self._lacks_attention = is_set_aside(attention)
        self._pairs: Attentions = ()
        # What the model's own forward returned first in this step.
        self._output: Any = None
        self._hooks = ExitStack()

    def __enter__(self) -> StepRecorder:
        self.close()
        self.clear()
        with ExitStack() as hooks:  # which leave again if one cannot be set
            hooks.callback(self._model.register_forward_hook(Hook(self._keep_output, [])).remove)
            if not self._lacks_attention:
                hooks.callback(self._attention.close)
                self._attention.__enter__()
            hooks.callback(self.fusion.close)
            self.fusion.__enter__()
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook. What was recorded stays until ``clear``."""
        self._hooks.close()

    def clear(self) -> None:
        """Forget what was recorded."""
        self._attention.clear()
        self.fusion.clear()
        self._pairs, self._output = (), None

    def reset(self) -> None:
        """Forget the call that an evaluation's replays repeat."""
        self.fusion.reset()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that are recorded."""
        return self._attention.layers

    @property
    def is_waiting(self) -> bool:
        """See ``AttentionRecorder``."""
        return self._attention.is_waiting

    @property
    def left_out(self) -> dict[str, int]:
        """See ``AttentionRecorder``."""
        return self._attention.left_out

    def collect_step(self, outputs: Any, batch: Any) -> tuple[Step, Attentions] | None:
        """What the step returned and its attention; None if it has neither attention nor a fusion, or ran nothing.

        Raises
        ------
        DiscoveryError, ShapeError
            As ``AttentionRecorder.attention``; a model whose fusion is named needs no attention.
        """
        self._pairs = self._collect_attention(batch)
        if self._pairs:
            first, tokens = self._pairs[0].forward.weights, tuple(self._pairs[0].forward.weights.shape[2:])
        elif not self._lacks_attention:
            return None
        else:
            found, messages = self.fusion.find_first_tokens()
            warn(messages)
            if found is None:
                return None
            first, tokens = found, ()
        step = Step(outputs, batch, self._output, len(first), first.device, tokens, self._multilabel_loss)
        return step, self._pairs

    def collect_fusion(self, labels: Labels) -> FusionRecord | None:
        """What entered the fusion in this step; of a first step the labels help to find it.

        Raises
        ------
        DiscoveryError
            If a named argument is not there, or there is neither attention nor a fusion that is clear.
        """
        inputs, messages = self.fusion.collect_inputs(self._pairs, self.layers, labels)
        if inputs is None and not self._pairs:
            raise DiscoveryError(" ".join(messages))
        notify = warn if self.fusion.is_named else info
        notify(messages)
        return inputs

    def _keep_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._output is None:
            self._output = output

    def _collect_attention(self, batch: Any) -> Attentions:
        if self._lacks_attention:
            return ()
        self._attention.batch = batch
        try:
            return self._attention.attention
        except (DiscoveryError, ShapeError) as error:
            if self._attention.ran_nothing:
                return ()
            if not self._may_lack_attention:
                raise
            if self._attention.saw_attention:
                warn([f"The attention is left out, and the rest is recorded. {error}"])
            self._lacks_attention = True
            return ()
