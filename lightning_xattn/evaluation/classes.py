"""What the classes of an evaluation are called, and messages about labels that are missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lightning_xattn.capture.labels import SO_A_REGRESSION, Labels, Step
from lightning_xattn.capture.labels.places import UNLABELLED
from lightning_xattn.core.errors import SettingError, ShapeError
from lightning_xattn.core.names import shown
from lightning_xattn.core.notices import warn

GROUPINGS = ("target", "prediction")

RESERVED = ("all", "correct", "incorrect", "gap", "null", "rest")
"""Curve names that a class may not have."""


def check_class_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """The names as they are shown everywhere, see ``shown``.

    Raises
    ------
    SettingError
        If there is no name, or one is empty, repeated, not a string, in ``RESERVED``, or like a head's: curves would
        share a name.
    """
    usable = isinstance(class_names, Sequence) and not isinstance(class_names, str) and len(class_names) > 0
    usable = usable and all(isinstance(name, str) for name in class_names)
    names = tuple(map(shown, class_names)) if usable else ()
    if not names or any(not name.strip() or name in RESERVED or re.fullmatch(r"head_\d+", name) for name in names):
        raise SettingError(
            f"class_names must be a sequence of strings, none of them empty, {', '.join(RESERVED)} or like head_0, "
            f"since each names a curve; got {class_names!r}."
        )
    if len(set(names)) < len(names):
        raise SettingError(f"class_names must differ from each other; got {class_names!r}.")
    return names


def own_class_names(module: object) -> tuple[str, ...] | None:
    """The ``class_names`` of a module; None, with a warning, where they cannot be used, as they are no setting."""
    names = getattr(module, "class_names", None)
    try:
        return None if names is None else check_class_names(names)
    except SettingError as error:
        warn([f"The class_names of {type(module).__name__} are not used: {error}"])
        return None


def name_in_curves(class_names: Sequence[str], classes_by: str, plain: bool = False) -> tuple[str, ...]:
    """The names of classes in curves: their own, or ``predicted_<name>`` where classes are those of the predictions.

    Parameters
    ----------
    class_names
        The classes.
    classes_by
        One of ``GROUPINGS``.
    plain
        Whether the logger allows only ASCII letters, digits and a few signs, as MLflow does. A class whose name has
        none of these, or no others than another class, is then called ``class_<i>``.
    """
    kept = [re.sub(r"[^A-Za-z0-9_/. -]", "", name) for name in class_names]
    is_path = [all(part.strip(" .") for part in name.split("/")) and kept.count(name) == 1 for name in kept]
    names = [f"class_{i}" if plain and not is_path[i] else name for i, name in enumerate(class_names)]
    return tuple(name if classes_by == "target" else f"predicted_{name}" for name in names)


def name_classes(labels: Labels, class_names: Sequence[str] | None, classes_by: str, step: Step) -> tuple[str, ...]:
    """The names of the classes of a first batch; none where its targets (or predictions) are not known.

    Parameters
    ----------
    labels
        Of the batch.
    class_names
        As given by the user or the module; None: ``class_0``, ``class_1`` and so on.
    classes_by
        One of ``GROUPINGS``.
    step
        The step whose labels these are, for error messages.

    Raises
    ------
    ShapeError
        If names and labels do not fit each other.
    """
    if (labels.target if classes_by == "target" else labels.predicted) is None:
        return ()
    if class_names is None:
        class_names = [f"class_{i}" for i in range(labels.n_classes or 0)]
    elif labels.n_classes not in (None, len(class_names)):
        raise ShapeError(
            f"There are {len(class_names)} class_names ({', '.join(class_names)}) but {labels.n_classes} columns of "
            f"class scores. Give a name for each: class_names=[...]. {step}"
        )
    for what, ids in (("targets", labels.target), ("predictions", labels.predicted)):
        if ids is None or not class_names:
            continue
        outside = set(ids.tolist()) - set(range(len(class_names))) - set(UNLABELLED)
        if outside:
            raise ShapeError(
                f"Expected {what} in 0 ... {len(class_names) - 1} for {len(class_names)} classes "
                f"({', '.join(map(str, UNLABELLED))}: no label); got {sorted(outside)} too. {step} Name the right "
                f"ones: {what}=<key or callable>."
            )
    return check_class_names(class_names) if class_names else ()


def is_regression(labels: Labels) -> bool:
    """Whether the predictions of a first batch were taken for those of a regression."""
    return SO_A_REGRESSION in labels.doubts.get("predictions", "")


def missing_labels(labels: Labels, names: Sequence[str], classes_by: str, step: Step) -> Iterator[str]:
    """Messages about labels that were not found or not used, each with the setting that names them."""
    if is_regression(labels):
        return  # which has neither, as the line about what was detected says
    if "confidence" in labels.doubts:
        yield labels.doubts["confidence"]
    for what, ids in (("predictions", labels.predicted), ("targets", labels.target)):
        if ids is None:
            parts = "correct and incorrect predictions" + (" and classes" if what.startswith(classes_by) else "")
            reason = f" {labels.doubts[what]}" if what in labels.doubts else ""
            yield f"No {what} found, so {parts} are not compared.{reason} {step} Name them: {what}=<key or callable>."
        elif not names and what.startswith(classes_by):
            yield (
                f"The {what} are class ids alone, so the number of classes is not known and classes are not compared. "
                "Name them: class_names=[...]."
            )
