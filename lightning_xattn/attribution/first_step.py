"""What a first step shows: the modalities, what reaches the predictions besides, and what can run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_xattn.attribution.discovery import describe_candidates, find_modalities
from lightning_xattn.attribution.evidence import Evidence
from lightning_xattn.attribution.named import find_named_modalities, name_arguments
from lightning_xattn.attribution.names import plain_name, reconcile_names
from lightning_xattn.attribution.outputs import ModelOutput, ReadOutput, find_model_output
from lightning_xattn.attribution.ports import Column, ModalitiesSetting, Modality, Place, as_tuple
from lightning_xattn.attribution.reach import find_reach, find_sides
from lightning_xattn.attribution.root import Intact, PredictionPlace, ReplayError, Root
from lightning_xattn.capture import Layer
from lightning_xattn.capture.attention_mode import get_module
from lightning_xattn.capture.calls import Call, Path, Precision, Run, StepTrace, find_tensors, same_numbers
from lightning_xattn.capture.labels import Labels
from lightning_xattn.capture.tensors import are_same
from lightning_xattn.capture.wrappers import find_module, plain_path
from lightning_xattn.core.attention import Direction
from lightning_xattn.core.errors import DiscoveryError
from lightning_xattn.core.notices import info, warn

NAME_THEM = (
    "Name what holds each: modalities={'<a>': 'path.to.encoder', '<b>': 'path.to.encoder'} (paths of modules, items of "
    "what they return such as 'encoder[0]', keys of the batch), or the arguments of a fusion: "
    "fusion='path.to.module', modalities={'<a>': 0, '<b>': 1}."
)
"""The remedy where modalities are not clear."""

NAME_PREDICTIONS = (
    "Return the predictions from the step as {'logits': ...}, or name them: predictions='path.to.module' (what it "
    "returns), predictions='key' or predictions=lambda outputs, batch, forward: forward.mean(-1)."
)
"""The remedy where predictions are not clear."""

LOOKS_ACROSS = (
    "the model looks across samples: with other samples in the second half of a batch, the predictions of the first "
    "half change (contrastive logits, BatchNorm in train mode, attention over the batch). Contributions of such a "
    "model are not those of its samples"
)
"""Why nothing is replayed, as the end of a sentence."""


@dataclass(frozen=True, eq=False)
class StepCall:
    """How the step was called, so that it can run again.

    Attributes
    ----------
    function, args
        The step, None where it cannot run again, and its arguments, the batch first.
    outputs
        What it returned.
    generators
        The states of torch's random generators when it began.
    """

    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    outputs: Any = None
    generators: Sequence[Tensor] = ()


@dataclass(frozen=True, eq=False)
class Found:
    """What a first step shows.

    Attributes
    ----------
    modalities
        Empty where fewer than two were found.
    problem
        Why nothing can be replayed, as the end of a sentence; "" where it can.
    refusal
        Where there are no modalities, why, and what the user can do.
    root
        What runs again; None: nothing does.
    further
        The inputs that reach the predictions besides, which each sample keeps.
    copies_batch
        Whether the step may change the batch from which modalities are read.
    renamed
        Directions whose names contradict where their queries come from, with those that fit.
    prediction_name
        What gave the predictions.
    sides
        By a module's path, the modalities that the queries and the keys of each attention in it come from, or "".
    mixing
        The recorded modules that attend from sample to sample.
    intact
        What the root gave at the places of ``columns`` and ``features``; None where it did not run with all samples.
    """

    modalities: tuple[Modality, ...] = ()
    problem: str = ""
    refusal: str = ""
    root: Root | None = None
    further: tuple[Place, ...] = ()
    copies_batch: bool = False
    renamed: Mapping[Direction, Direction] = field(default_factory=dict)
    prediction_name: str = ""
    sides: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    mixing: Sequence[str] = ()
    intact: Intact | None = None

    @property
    def columns(self) -> dict[Column, Place]:
        """Every tensor that is kept of each sample to be permuted, and where it is."""
        several = [*((one.name, one.places) for one in self.modalities), ("", self.further)]
        return {(name, number): place for name, places in several for number, place in enumerate(places)}

    @property
    def features(self) -> dict[Column, Place]:
        """What linear probes get, where that is not permuted itself."""
        return {(one.name, -1 - number): place for one in self.modalities for number, place in enumerate(one.features)}


@dataclass(frozen=True, eq=False)
class FirstStep:
    """A first step, and the settings that name what is looked for in it.

    Attributes
    ----------
    model, trace, step, labels, layers
        The model, the calls of the step, how it was called, and what was found in it.
    samples
        How many samples it has; None: as many as predictions.
    real
        Of some modalities the tokens that the attention takes as real, ``(batch, tokens)``.
    fusion, modalities, names_attention
        As ``ModalityRecorder`` takes them.
    """

    model: nn.Module
    trace: StepTrace
    step: StepCall | None
    labels: Labels
    layers: Sequence[Layer]
    samples: int | None
    real: Mapping[str, Tensor]
    fusion: str | None
    modalities: ModalitiesSetting | None
    names_attention: bool

    def find(self) -> Found:
        """What is found by runs of what gives the predictions.

        Raises
        ------
        DiscoveryError
            If a name in the settings is not there.
        LeftOutError
            If another step may show it.
        """
        try:
            roots, live, name = self._find_roots()
        except ReplayError as error:
            return Found((), str(error), f"{error}. {NAME_PREDICTIONS}")
        attending = {source.path for layer in self.layers for _, source in layer.sources if source.joint is None}
        failure, described = "", "none"
        for root in roots:
            try:
                with root.keeping_state():
                    evidence = Evidence(root, live)
                    described = describe_candidates(evidence)
                    if self.modalities is None:
                        modalities = find_modalities(evidence, attending)
                    else:
                        modalities = find_named_modalities(evidence, self.fusion, self.modalities, self.real)
                    if modalities:
                        return self._settle(evidence, modalities, live.values.shape[1], name)
            except DiscoveryError:
                if root is roots[-1]:
                    raise
            except ReplayError as error:
                failure = failure or str(error)
        none = f"fewer than two inputs reach the predictions by modules of their own. There are {described}"
        return Found((), failure or none, f"{failure or none}. {NAME_THEM}", prediction_name=name)

    def _find_roots(self) -> tuple[list[Root], ModelOutput, str]:
        """What gives the predictions, the outermost call first, then the step; what they are, and what gave them.

        Raises
        ------
        ReplayError
            If there is none.
        """
        wanted, step, trace = self.labels.raw, self.step, self.trace
        if wanted is None:
            unclear = "the predictions are not clear"
            none = "the step has no tensor with one prediction, or one score a class, for each sample"
            raise ReplayError(unclear if self.labels.doubts else none)
        samples = self.samples or (len(wanted) if wanted.dim() else 1)
        found = self._find_predictions(wanted, samples)
        if found is None or step is None:
            if self.labels.select is not None and self.labels.are_ids:
                raise ReplayError("the callable gives class ids, and contributions need scores of all classes")
            raise ReplayError("no call gives the predictions, and the step does not return them")
        live, read, run, leaf = found
        roots, outermost = [], None if run is None else list(run.outwards())[-1]
        name = self.labels.prediction_name if run is None else plain_path(self.model, run.path) or "forward"
        precision = next((one.precision for one in trace.runs if one.precision), None) or Precision("cpu", None)
        if run is not None and outermost is not None and outermost.entered is not None:
            inside = [one for one in trace.inside(outermost) if one.path == run.path]
            place = PredictionPlace("call", run.path, inside.index(run), leaf)
            call, own = outermost.entered, outermost.precision or precision
            where = outermost.path, outermost.turn
            roots.append(Root(self.model, outermost.module, call, samples, own, step.generators, place, read, *where))
        in_step = None if step.function is None else self._find_in_step(step, run, leaf, wanted)
        if in_step is not None and step.function is not None:
            call = Call(step.args, {})
            roots.append(
                Root(self.model, step.function, call, samples, precision, step.generators, in_step, read, None)
            )
        if not roots:
            raise ReplayError("no call gives the predictions, and the step is not known")
        return roots, live, name

    def _find_predictions(
        self, wanted: Tensor, samples: int
    ) -> tuple[ModelOutput, ReadOutput, Run | None, Path] | None:
        """The outermost call whose output has the very tensor, or the same numbers, or their scores; else the step."""
        outermost_first = sorted(self.trace.runs, key=lambda run: sum(1 for _ in run.outwards()))
        given = [(run, leaf, one.detach()) for run in outermost_first for leaf, one in run.tensors.items()]
        ways: list[Callable[[Tensor], bool]] = [
            lambda one: are_same(one, wanted),
            lambda one: same_numbers(one, wanted),
        ]
        if self.labels.are_ids or self.labels.scores is not None:
            ways.append(lambda one: True)
        candidates = (one for fits in ways for one in given if fits(one[2]))
        for run, leaf, tensor in chain(candidates, [(None, (), wanted)]):
            read = find_model_output(tensor, samples, self.labels)
            with torch.no_grad():
                live = None if read is None else read(tensor)
            if read is not None and live is not None:
                return live, read, run, leaf
        return None

    def _find_in_step(self, step: StepCall, run: Run | None, leaf: Path, wanted: Tensor) -> PredictionPlace | None:
        """Where the predictions are when the whole step runs."""
        if run is not None:
            return PredictionPlace("call", run.path, run.turn, leaf)
        for where, one in find_tensors(step.outputs):
            if same_numbers(one.detach(), wanted):
                return PredictionPlace("output", leaf=where)
        losses = [number for number, loss in enumerate(self.trace.losses) if same_numbers(loss.input, wanted)]
        if losses:
            return PredictionPlace("loss", turn=losses[0])
        return PredictionPlace("callable", select=self.labels.select) if self.labels.select and step.args else None

    def _settle(self, evidence: Evidence, modalities: Sequence[Modality], width: int, name: str) -> Found:
        are_named = self.modalities is not None
        sides = find_sides(evidence, modalities)
        modalities, renamed = reconcile_names(tuple(modalities), self.layers, sides, are_named, self.names_attention)
        if are_named:
            modalities = self._permute_at_inputs(evidence, modalities)
        places = [place for one in modalities for place in one.places]
        paths = evidence.reached_around(places, evidence.inputs)
        further = evidence.input_places(paths)
        unkept = set(paths) - {place.where for place in further}
        problem = ""
        mixing: Sequence[str] = ()
        if evidence.looks_across():
            problem = LOOKS_ACROSS
            mixing = evidence.find_mixing({source.path for layer in self.layers for _, source in layer.sources})
        elif unkept:
            problem = (
                f"{', '.join(map(evidence.name_input, unkept))} also reaches the prediction and has no samples that "
                "could be kept, as of a graph"
            )
        elif self.labels.predicted is None and width > 1:
            problem = "the predictions are neither classes nor a single value"
        features = [place for one in modalities for place in one.features]
        copies_batch = self._follow(evidence, [*places, *features, *further])
        found = Found(modalities, problem, "", evidence.root, further, copies_batch, renamed, name, sides, mixing)
        self._describe(evidence, found)
        return replace(found, intact=evidence.read_intact(found.columns | found.features))

    def _permute_at_inputs(self, evidence: Evidence, modalities: tuple[Modality, ...]) -> tuple[Modality, ...]:
        """Permute the inputs of modalities that are named, where these also go other ways, if they are separate."""
        reach = find_reach(evidence, modalities)
        if not reach.ways:
            return modalities
        ways = " and ".join(reach.ways)
        places = {name: evidence.input_places(paths) for name, paths in reach.owned.items()}
        if not all(paths and len(places[name]) == len(paths) for name, paths in reach.owned.items()):
            info(f"{ways}: these are contributions of the features that are named.")
            return modalities
        inputs = {name: ", ".join(map(evidence.name_input, paths)) for name, paths in reach.owned.items()}
        described = ", ".join(f"{name} = {several}" for name, several in inputs.items())
        info(f"{ways}, so modalities are permuted at the model's inputs: {described}.")
        return tuple(
            one
            if set(places[one.name]) == set(one.places)
            else replace(one, places=places[one.name], features=one.places, permuted=inputs[one.name])
            for one in modalities
        )

    def _follow(self, evidence: Evidence, places: Sequence[Place]) -> bool:
        """Trace from now on what is needed of each step; gives whether it may change the batch that is read."""
        root, paths, copied = evidence.root, set[str](), set[str]()
        for place in places:
            if place.kind != "input":
                paths.add(place.path)
                if evidence.changed_in_place(place):
                    copied.add(place.path)
        # A step may also change its batch after the call.
        takes_inputs = evidence.changes_inputs or any(place.kind == "input" for place in places)
        if root.path is not None:
            paths.add(root.path)
            if takes_inputs:
                copied.add(root.path)
        if root.place.kind == "call":
            paths.add(root.place.path)
        self.trace.copied |= {get_module(self.model, path) for path in copied}
        self.trace.follow({get_module(self.model, path): path for path in paths}, root.place.kind == "loss")
        return root.path is None and takes_inputs

    def _describe(self, evidence: Evidence, found: Found) -> None:
        """Say what a user may not expect."""
        old_names = {str(old): str(new) for old, new in found.renamed.items()}
        if any(new in old_names for new in old_names.values()):
            turned = " and ".join(f"{old} as {new}" for old, new in old_names.items())
            sources, verb = ", ".join(map(str, found.modalities)), "are" if len(old_names) > 1 else "is"
            warn(
                f"{turned} {verb} recorded: the names of the attention modules contradict where queries come from "
                f"({sources}). If that is wrong, name the attention: attention={{'<a>_to_<b>': 'path', ...}}."
            )
        elif old_names:
            info(", ".join(f"{old} is recorded as {new}" for old, new in old_names.items()) + ".")
        if found.further:
            names = ", ".join(evidence.name_input(place.where) for place in found.further)
            info(f"Further inputs reach the prediction, and stay each sample's own: {names}.")

    def find_without_runs(self, problem: str) -> Found:
        """What is named, where the model cannot run again: a fusion's arguments, or modules of these names.

        Parameters
        ----------
        problem
            Why it cannot; "" where only settings keep it from that.

        Raises
        ------
        DiscoveryError, LeftOutError
            As ``find``.
        """
        modalities = self._find_modules() if self.fusion is None else self._find_arguments(self.fusion)
        if len(modalities) < 2:
            why = problem or "with contribution_samples=0 the model does not run again to find the modalities"
            return Found((), problem, f"{why}, and what holds them is not named. {NAME_THEM}")
        paths = {place.path for modality in modalities for place in modality.places}
        self.trace.follow({get_module(self.model, path): path for path in paths}, False)
        return Found(tuple(modalities), problem)

    def _find_arguments(self, fusion: str) -> list[Modality]:
        run = self.trace.find(find_module(self.model, fusion) or "")
        if run is None or run.entered is None or self.modalities is None:
            return []
        samples = next(len(one) for one in run.given.values())
        return name_arguments(run.module, fusion, (run.path, 0), self.modalities, run.entered, samples, self.real)

    def _find_modules(self) -> list[Modality]:
        """The outermost modules that are named, or called as the modalities of the first layer."""
        found = []
        directions = [direction for layer in self.layers[:1] for direction, _ in layer.sources]
        names = dict.fromkeys(str(name) for one in directions for name in (one.query, one.key))
        for name, several in (self.modalities or dict(zip(names, names, strict=True))).items():
            first = str(as_tuple(several)[0])
            path = find_module(self.model, first)
            for run in self.trace.runs:
                where = next((one for one, tensor in run.tensors.items() if tensor.dim()), None)
                if where is not None and (run.path == path if path is not None else plain_name(run.path) == first):
                    found.append(Modality(name, (Place("output", run.path, 0, where, 0),), run.path))
                    break
        return found
