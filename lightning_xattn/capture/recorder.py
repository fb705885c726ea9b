"""The context manager that owns every wrapper on a model and holds the current step's attention."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_xattn.capture.attention_mode import AttentionMode, get_module, run_uncompiled, walk_modules
from lightning_xattn.capture.calls import Run, StepTrace
from lightning_xattn.capture.discover import (
    NAME_THEM,
    Found,
    Survey,
    choose_layers,
    choose_layers_by_flow,
    find_padding_source,
    find_shown,
)
from lightning_xattn.capture.events import Event, RecordLevel
from lightning_xattn.capture.extractor import AttentionExtractor
from lightning_xattn.capture.layers import describe_attention, locate_attention
from lightning_xattn.capture.masks import RecordedWeights
from lightning_xattn.capture.sources import AttentionSetting, Layer, Source, is_set_aside
from lightning_xattn.capture.wrappers import compiled_modules, scripted_modules
from lightning_xattn.core.attention import Attention, AttentionPair, Direction, rename_layer
from lightning_xattn.core.errors import DiscoveryError, ShapeError
from lightning_xattn.core.notices import warn


class AttentionRecorder:
    """Record the cross-attention of a model while it runs; the model's outputs stay bit for bit the same.

    What is compiled by ``torch.compile`` runs as it is written while it is recorded, since code that has
    been compiled before calls no hooks: then the outputs are those of the model without compilation. A warning says so.

    In its first step the recorder looks at all that the model computes; from then on only at what it records.

    Parameters
    ----------
    model
        Any module; nothing is hooked yet.
    trace
        Notes the calls and losses of each step; None: they are not needed.
    attention
        Where the attention is: module paths by direction, seen from ``model``, a ``JointSequence``, or callables (see
        ``docs/own-model.md``). None: found by name (see ``locate_attention``) or, without such a name, in the first
        step. ``{}``: none is recorded.

    Attributes
    ----------
    layers
        The layers that are recorded; empty until a first step has shown them, if they are not found by name.
    is_waiting
        Whether the layers were found in this step, and its weights were too large to be kept until then.
    batch
        What callables of a ``JointSequence`` get. None: what the model's own ``forward`` got.

    Raises
    ------
    DiscoveryError, SettingError
        As ``locate_attention``.

    Examples
    --------
    >>> with AttentionRecorder(model) as recorder:  # a model of audio (5 tokens) and text (7) with 3 heads
    ...     scores = model(batch)  # of 5 samples
    >>> recorder.attention[0].forward
    Attention(audio_to_text: 5 samples, 3 heads, 5 queries, 7 keys)
    """

    def __init__(
        self, model: nn.Module, attention: AttentionSetting | None = None, trace: StepTrace | None = None
    ) -> None:
        self._model, self._trace = model, trace
        self.layers: tuple[Layer, ...] = locate_attention(model, attention)
        self.batch: Any = None
        self._inputs: Any = None
        self._hooks, self._is_hooked = ExitStack(), False
        self._is_set_aside = is_set_aside(attention)
        self._survey: Survey | None = None if self._is_set_aside else Survey(model)
        self._mode: AttentionMode | None = None
        self._extractors: dict[tuple[str, Direction], AttentionExtractor] = {}
        self._of_module: dict[nn.Module, list[AttentionExtractor]] = {}
        # Of self-attention whose masks show which queries are padding.
        self._suppliers: dict[nn.Module, list[AttentionExtractor]] = {}
        self.is_waiting = self._has_run = False
        self._warned: set[str] = set()
        # What went wrong while the model ran.
        self._errors: list[Exception] = []
        # Layers whose directions have fitted each other.
        self._paired: set[str] = set()

    def __repr__(self) -> str:
        names = ", ".join(layer.name for layer in self.layers)
        layers = f"layers {names}" if names else "layers to be found in a first pass"
        return f"AttentionRecorder({type(self._model).__name__}: {layers})"

    def __enter__(self) -> AttentionRecorder:
        self.close()
        self.clear()
        self._hook()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is None:
            self.raise_errors()

    def raise_errors(self) -> None:
        """Raise what went wrong while the model ran, which has not ended its run."""
        if self._errors:
            raise self._errors[0]

    def close(self) -> None:
        """Remove every hook. What was recorded stays until ``clear``; closing twice is harmless."""
        self._hooks.close()
        self._is_hooked = False

    def clear(self) -> None:
        """Forget what was recorded."""
        for extractor in [*self._extractors.values(), *chain.from_iterable(self._suppliers.values())]:
            extractor.clear()
        if self._survey is not None:
            self._survey = Survey(self._model)
        if self._mode is not None:
            self._mode.clear()
        self._errors.clear()
        self.is_waiting = self._has_run = False
        self.batch = self._inputs = None

    def _hook(self) -> None:
        if self._is_set_aside and self._trace is None:
            return
        if self._survey is not None and (compiled := compiled_modules(self._model)):
            self._warn_once(
                f"{', '.join(compiled)} is compiled, and compiled code hides its attention. While it is recorded it "
                "runs uncompiled, so its outputs may differ in the last bits and take longer. If that is too slow, "
                "record fewer epochs or batches (every_n_epochs, every_n_batches)."
            )
        # What was wrapped before a failure half way is unwrapped with this stack; only a complete set is kept.
        with ExitStack() as hooks:
            # Without it nothing is compiled. Whether functions are compiled is unknown, and the import is slow.
            if "torch._dynamo" in sys.modules and not self._is_set_aside:
                hooks.enter_context(run_uncompiled())
            self._of_module = self._make_extractors()
            extractors = [*self._suppliers.items(), *self._of_module.items()]
            attending = {module: of_module[0].source.path for module, of_module in extractors}
            if self._survey is not None or (self._trace is not None and self._trace.is_complete):
                walked = walk_modules(self._model, into_compiled=not self._is_set_aside)
                modules = attending | {module: path for path, module in walked}
            else:
                modules = attending | {self._model: ""} | (self._trace.chosen if self._trace is not None else {})
            if self._survey is not None:
                attending = modules
            self._mode = AttentionMode(
                modules,
                self._level,
                self._leave,
                follows=self._survey is not None,
                errors=self._errors,
                trace=self._trace,
                attending=attending,
            )
            self._mode.attach(hooks)
            self._hooks = hooks.pop_all()
            self._is_hooked = True

    def _make_extractors(self) -> dict[nn.Module, list[AttentionExtractor]]:
        """The extractors of each module, new ones where there are none yet."""
        of_module: dict[nn.Module, list[AttentionExtractor]] = defaultdict(list)
        for layer, direction, source in self._sources():
            key = layer.name, direction
            if key not in self._extractors:
                alone = len(layer.sources) == 1 and source.joint is None
                self._extractors[key] = AttentionExtractor(direction, source, alone)
            if source.read is None:
                of_module[self._module(source.path)].append(self._extractors[key])
        return of_module

    def _sources(self) -> Iterator[tuple[Layer, Direction, Source]]:
        for layer in self.layers:
            for direction, source in layer.sources:
                yield layer, direction, source

    def _module(self, path: str) -> nn.Module:
        try:
            return get_module(self._model, path)
        except AttributeError:
            raise DiscoveryError(
                f"Module '{path}' is no longer in the model. {describe_attention(self._model)} Make a new "
                "AttentionRecorder or callback after changing the model."
            ) from None

    def _level(self, run: Run, event: Event) -> RecordLevel:
        number = 1
        for outer in run.outwards():
            number += len(outer.events)
            if any(extractor.may_extract(number) for extractor in self._of_module.get(outer.module, ())):
                return RecordLevel.WEIGHTS
        if self._survey is None:
            return RecordLevel.MASKS
        level = self._survey.choose_level(run, event)
        return RecordLevel.MASKS if self.layers and level is RecordLevel.WEIGHTS else level

    def _leave(self, run: Run, output: Any) -> None:
        # A step that Lightning runs as the model's own forward, as under DDP, may return before it runs anything.
        self._has_run |= run.module is not self._model or output is not None
        if run.module is self._model and self._inputs is None:
            inputs = (*run.call.args, *run.call.kwargs.values())
            self._inputs = inputs[0] if len(inputs) == 1 else inputs
        for extractor in (*self._of_module.get(run.module, ()), *self._suppliers.get(run.module, ())):
            extractor.extract(run, output)
        if self._survey is not None:
            self._survey.note_run(run, output)
        elif not any(
            outer.module in of for outer in [*run.outwards()][1:] for of in (self._of_module, self._suppliers)
        ):
            for event in run.events:  # nobody else reads them
                event.recorded = None

    @property
    def saw_attention(self) -> bool:
        """Whether a first step had any attention, also such as cannot be used."""
        return self._survey is not None and bool(self._survey.found)

    @property
    def ran_nothing(self) -> bool:
        """Whether no module of the model ran in a first step, so that the next step is the first."""
        return not self._has_run and not any(scripted_modules(self._model))  # whose runs are hidden

    @property
    def attention(self) -> tuple[AttentionPair, ...]:
        """What was recorded since the last ``clear``, one pair a layer.

        A layer that did not run, or of which one direction did not, is left out, if it has run before. If a module
        ran more often than it should, as with test-time augmentation, its first run counts, and a warning says so.

        Raises
        ------
        DiscoveryError
            If nothing has run yet, or what ran does not show which attention is meant.
        ShapeError
            If the two directions of a layer do not fit each other, or what was read is no attention.
        Exception
            Whatever else went wrong while the model ran, which has not ended its run.
        """
        self.raise_errors()
        if self._is_set_aside:
            return ()
        if not self.layers and self._survey is not None and self._survey.found:
            self._take_layers(self._survey, *choose_layers(self._survey))
        batch = self._inputs if self.batch is None else self.batch
        collected: dict[tuple[str, Direction], RecordedWeights | None] = {}
        for key, extractor in self._extractors.items():
            extractor.call_reader(self._model)
            collected[key] = extractor.collect(batch)
        if self._survey is not None and (self.is_waiting or any(one is not None for one in collected.values())):
            self._end_survey(self._survey)
        pairs = []
        for layer in self.layers:
            of_layer = [collected.get((layer.name, direction)) for direction, _ in layer.sources]
            recorded = [one for one in of_layer if one is not None]
            if len(recorded) == len(of_layer):
                try:
                    pairs.append(self._make_pair(layer, recorded))
                    self._paired.add(layer.name)
                except ShapeError as error:
                    if layer.name not in self._paired:
                        raise
                    self._warn_once(f"In a later step: {error} Such steps are left out.")
            elif recorded:
                self._report_missing_direction(layer, *layer.sources[of_layer.index(None)])
        for extractor in self._extractors.values():
            while extractor.remarks:
                self._warn_once(extractor.remarks.pop(0))
        if not pairs and not self.is_waiting and not any(extractor.has_run for extractor in self._extractors.values()):
            raise DiscoveryError(self._describe_idle_layers())
        return tuple(pairs)

    @property
    def left_out(self) -> dict[str, int]:
        """By layer, how many samples were left out of this step, as their joint sequence does not fit its spans."""
        return {layer: one.left_out for (layer, _), one in self._extractors.items() if one.left_out}

    def rename(self, names: Mapping[Direction, Direction]) -> None:
        """Call directions otherwise in all later steps."""
        self.layers = tuple(
            replace(
                layer,
                name=rename_layer(layer.name, names),
                sources=tuple((names.get(direction, direction), source) for direction, source in layer.sources),
            )
            for layer in self.layers
        )
        for extractor in self._extractors.values():
            if extractor.direction is not None:
                extractor.direction = names.get(extractor.direction, extractor.direction)
        self._paired = {rename_layer(layer, names) for layer in self._paired}
        self._extractors = {
            (rename_layer(layer, names), names.get(direction, direction)): extractor
            for (layer, direction), extractor in self._extractors.items()
        }

    def set_aside(self) -> None:
        """Record no attention from now on."""
        self._is_set_aside, self._survey, self.layers = True, None, ()
        self._extractors, self._of_module, self._suppliers = {}, {}, {}

    def choose_by_flow(self, sides: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        """Take the layers of a first step that the flow of data shows, see ``choose_layers_by_flow``.

        Raises
        ------
        DiscoveryError
            If it shows none, or it is not clear what pairs up.
        """
        if self._survey is not None:
            self._take_layers(self._survey, choose_layers_by_flow(self._survey, sides), ())

    def _take_layers(self, survey: Survey, layers: tuple[Layer, ...], left_out: Sequence[Found]) -> None:
        """Record these layers, and take of what they computed in a first step what was kept."""
        self.layers = layers
        self._make_extractors()
        paths: dict[str, list[str]] = defaultdict(list)
        for _, direction, source in self._sources():
            paths[str(direction)].append(str(source))
        found = {direction: names if len(names) > 1 else names[0] for direction, names in paths.items()}
        others = survey.list(left_out)
        self._warn_once(
            f"Found in the first pass: {found}. The directions come from the modules' names, or from which tokens "
            "attend to which. If a module or the name of a modality is wrong, name them: attention={'<a>_to_<b>': "
            "'path.to.module', ...}." + (f" Left out, as no name holds their direction: {others}." if others else "")
        )
        shown = [find_shown(survey, source) for _, _, source in self._sources()]
        kept = [one.recorded for one in shown if one is not None and one.recorded is not None]
        if len(kept) == len(shown):
            for extractor, recorded in zip(self._extractors.values(), kept, strict=True):
                extractor.kept = recorded
        else:
            self.is_waiting = True
            self._warn_once(
                "The weights of the first step were too large to keep before it was known which of them are meant, so "
                "that step is left out. To include it, name the attention."
            )

    def _end_survey(self, survey: Survey) -> None:
        """Learn from a first step what else to record, and record nothing more from then on."""
        for layer, direction, source in self._sources():
            extractor, shown = self._extractors[layer.name, direction], find_shown(survey, source)
            if shown is not None and shown.path == source.path:
                extractor.axes |= shown.extractor.axes
            if len(layer.sources) == 1 and source.joint is None:
                extractor.supplier = find_padding_source(survey, source)
        for supplier in dict.fromkeys(one.supplier for one in self._extractors.values() if one.supplier is not None):
            self._suppliers.setdefault(self._module(supplier.source.path), []).append(supplier)
        self._survey = None
        if self._is_hooked:  # from now on only what is recorded
            self._hooks.close()
            self._hook()

    def _report_missing_direction(self, layer: Layer, missing: Direction, source: Source) -> None:
        message = f"'{source}' ({missing} of layer '{layer.name}') did not run, but its opposite direction did. "
        if not self._extractors[layer.name, missing].has_run:
            raise DiscoveryError(message + NAME_THEM)
        self._warn_once(message + "The layer is left out of such steps.")

    def _describe_idle_layers(self) -> str:
        if self._survey is not None and not self.layers:
            return self._survey.describe("No cross-attention ran")
        return (
            f"None of {', '.join(dict.fromkeys(str(source) for _, _, source in self._sources()))} ran, so there is no "
            f"attention to show. {describe_attention(self._model)} {NAME_THEM} If they run inside a function that "
            "torch.compile made, call that function uncompiled."
        )

    def _warn_once(self, message: str) -> None:
        """Warn once of the same thing, whatever the numbers in the message."""
        about = re.sub(r"\d+", "", message)
        if about not in self._warned:
            self._warned.add(about)
            warn(message)

    def _make_pair(self, layer: Layer, recorded: list[RecordedWeights]) -> AttentionPair:
        """A token that is padding as a key of one direction is padding as a query of the other."""
        masks = (
            [one.token_mask for one in reversed(recorded)]
            if len(layer.sources) > 1
            else [self._find_query_padding(layer, recorded[0])]
        )
        attentions = [
            Attention(
                direction,
                call.source,
                key_mask=call.key_mask,
                visible=call.visible,
                # Directions that do not fit each other at all are refused as a pair, with both shapes.
                query_mask=mask if mask is not None and mask.shape == call.shape[::2] else None,
                extra_keys=call.extra_keys,
                cross_modal_mass=call.cross_modal_mass,
                is_packed=call.is_packed,
            )
            for (direction, _), call, mask in zip(layer.sources, recorded, masks, strict=True)
        ]
        return AttentionPair(layer.name, *attentions)

    def _find_query_padding(self, layer: Layer, recorded: RecordedWeights) -> Tensor | None:
        """The real queries of a direction without an opposite; None where no mask shows them."""
        extractor = self._extractors[layer.name, layer.sources[0][0]]
        supplier = extractor.supplier
        within = None if supplier is None else supplier.first
        mask = None if within is None else within.padding_of_its_own
        if mask is None or within is None:
            return extractor.query_mask
        missing = recorded.shape[2] - mask.shape[1]
        # torch packs sequences, and cuts off what is padding in all of them.
        return F.pad(mask, (0, missing)) if missing > 0 and within.cropped else mask
