# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Tables and targets as arrays; missing values and text are refused by the names of their columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.utils.validation import validate_data

# Names of columns that a message lists.
_MAX_NAMED = 5


def checked_inputs(estimator: Any, X: Any, y: Any = "no_validation", *, reset: bool, **checks: Any) -> Any:
    """``X`` as ``float64`` ``(N, D)``, and ``y`` where it is given, by scikit-learn's own checks.

    :param estimator: gets, or is compared by, ``n_features_in_`` and ``feature_names_in_``.
    :param bool reset: whether this is a fit.
    :param checks: of :func:`sklearn.utils.validation.validate_data`.
    :raises ValueError: as there; about missing values and text with the names of their columns.
    """
    try:
        found = validate_data(
            estimator, X, y, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan", order="C", **checks
        )
    except ValueError as error:
        text = [name for name, column in _columns(X).items() if not _is_numeric(column)]
        if not text:
            raise
        raise ValueError(
            f"Columns {_named(text)} of X are not numbers. Encode categories first, for example by make_pipeline("
            f"make_column_transformer((OneHotEncoder(), {_named(text)}), remainder='passthrough'), estimator)."
        ) from error
    _refuse_missing(estimator, X, found if isinstance(y, str) else found[0])
    return found


def checked_weights(sample_weight: Any, num_rows: int) -> np.ndarray | None:
    """Weights of rows ``(N,)`` as ``float64``.

    :raises ValueError: if they have another shape, are negative, missing, infinite or all 0.
    """
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.shape != (num_rows,):
        raise ValueError(
            f"sample_weight has shape {weights.shape}; it must be ({num_rows},), one weight for each row of X."
        )
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError("sample_weight must be finite, not negative and not all zero; a weight of 0 leaves a row out.")
    return weights


@dataclass(frozen=True)
class Scaling:
    """To mean 0 and standard deviation 1 by column, and back.

    :ivar mean: ``(D,)``.
    :ivar scale: ``(D,)``; 1 where a column is constant.
    """

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray | None) -> Scaling:
        """Of the columns of ``values`` ``(N, D)``, rows weighted by ``weights``."""
        mean = np.average(values, axis=0, weights=weights)
        scale = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weights))
        # A column that is constant up to rounding tells nothing: it would be divided by rounding errors.
        is_constant = scale <= 10 * np.finfo(np.float64).eps * np.maximum(np.abs(mean), np.finfo(np.float64).tiny)
        return cls(mean, np.where(is_constant, 1.0, scale))

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Standardised."""
        standardised: np.ndarray = (values - self.mean) / self.scale
        return standardised


def _refuse_missing(estimator: Any, X: Any, values: np.ndarray) -> None:
    is_bad = ~np.isfinite(values)
    if not is_bad.any():
        return
    row, column = (int(i) for i in np.argwhere(is_bad)[0])
    names = list(_columns(X)) or [f"number {i}" for i in range(values.shape[1])]
    bad = [names[i] for i in np.flatnonzero(is_bad.any(axis=0))]
    what = "NaN" if np.isnan(values).any() else "infinity"
    raise ValueError(
        f"Input X contains {what}: {int(is_bad.sum())} values in columns {_named(bad)}, the first in row {row}, column "
        f"{names[column]!r}. {type(estimator).__name__} does not accept missing values encoded as NaN, or infinity; "
        "fill them in first, for example by make_pipeline(SimpleImputer(add_indicator=True), estimator)."
    )


def _columns(X: Any) -> dict[Any, Any]:
    """Columns of a frame by name; none for anything else."""
    names = getattr(X, "columns", None)
    return {} if names is None or callable(names) else {name: X[name] for name in names}


def _is_numeric(column: Any) -> bool:
    try:
        np.asarray(column).astype(np.float64)
    except (TypeError, ValueError):
        return False
    return True


def _named(names: list[Any]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MAX_NAMED])
    return f"[{shown}{', ...' if len(names) > _MAX_NAMED else ''}]"
