"""Divide recordings into folds so that no patient is in two of them and each has its share of every class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_xattn.core.errors import DataError
from lightning_xattn.hms.montage import CLASSES
from lightning_xattn.hms.table import Recording


def patient_folds(rows: Sequence[Recording], n_folds: int, seed: int) -> NDArray[np.int64]:
    r"""Assign each row to a fold: whole patients, stratified by consensus class.

    Patients are taken in turn, those with the most rows first (in a seeded random order among equals), and
    each goes to the fold whose classes it crowds least: the one with the smallest
    :math:`\sum_c f_c p_c / t_c^2`, where :math:`f`, :math:`p` and :math:`t` count the rows of each class in the
    fold so far, of the patient and in total. That is the greedy step towards equal shares of every class,
    measured by the sum of squared shares. A tie goes to the fold with fewer rows, so that no fold stays empty.

    Parameters
    ----------
    rows
        The rows.
    n_folds
        Number of folds.
    seed
        The same rows, folds and seed give the same assignment.

    Returns
    -------
    ``(rows,)`` fold of each row, 0 to ``n_folds - 1``.

    Raises
    ------
    DataError
        If there are fewer patients than folds.
    """
    patients, patient_of_row = np.unique([row.patient_id for row in rows], return_inverse=True)
    if len(patients) < n_folds:
        raise DataError(
            f"{n_folds} folds need at least {n_folds} patients, since a patient is never in two folds; "
            f"got {len(patients)} patient(s) in {len(rows)} rows. Take fewer folds or more data."
        )
    counts = np.zeros((len(patients), len(CLASSES)))
    for patient, row in zip(patient_of_row, rows, strict=True):
        counts[patient, row.consensus] += 1
    weights = 1 / np.maximum(counts.sum(axis=0), 1) ** 2

    shuffled = np.random.default_rng(seed).permutation(len(patients))
    order = shuffled[np.argsort(-counts[shuffled].sum(axis=1), kind="stable")]
    filled = np.zeros((n_folds, len(CLASSES)))
    fold_of_patient = np.zeros(len(patients), dtype=np.int64)
    for patient in order:
        crowding = filled @ (weights * counts[patient])
        fold = np.lexsort((filled.sum(axis=1), crowding))[0]
        fold_of_patient[patient] = fold
        filled[fold] += counts[patient]
    return fold_of_patient[patient_of_row]
