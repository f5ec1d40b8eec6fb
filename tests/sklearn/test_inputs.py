# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Tables as arrays: scaling, and refusals that name columns."""

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from sklearn.base import BaseEstimator

from pyro_apd.sklearn.inputs import Scaling, checked_inputs, checked_weights


class Estimator(BaseEstimator):
    pass


def frame():
    return pd.DataFrame({"age": [1.0, 2.0, 4.0], "height": [3, 4, 5]})


def frames():
    polars = pytest.importorskip("polars")
    return [frame(), polars.DataFrame({"age": [1.0, 2.0, 4.0], "height": [3, 4, 5]})]


def test_frames():
    for table in frames():
        estimator = Estimator()
        assert_allclose(checked_inputs(estimator, table, reset=True), [[1, 3], [2, 4], [4, 5]])
        assert list(estimator.feature_names_in_) == ["age", "height"]
        with pytest.raises(ValueError, match="feature names should match"):
            checked_inputs(estimator, table[["height", "age"]], reset=False)


def test_missing_values_are_refused_by_name():
    table = frame()
    table.loc[1, "age"] = np.nan
    with pytest.raises(ValueError, match=r"contains NaN: 1 values in columns \['age'\], the first in row 1.*'age'"):
        checked_inputs(Estimator(), table, reset=True)
    with pytest.raises(ValueError, match=r"contains NaN.*columns \['number 0'\].*does not accept missing"):
        checked_inputs(Estimator(), table.to_numpy(), reset=True)
    with pytest.raises(ValueError, match="contains infinity"):
        checked_inputs(Estimator(), np.array([[1.0, np.inf]]), reset=True)


def test_missing_values_of_polars():
    polars = pytest.importorskip("polars")
    table = polars.DataFrame({"age": [1.0, None, 4.0], "height": [3, 4, 5]})
    with pytest.raises(ValueError, match=r"contains NaN: 1 values in columns \['age'\], the first in row 1"):
        checked_inputs(Estimator(), table, reset=True)


def test_text_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Columns \['colour'\] of X are not numbers.*OneHotEncoder"):
        checked_inputs(Estimator(), frame().assign(colour=["red", "green", "red"]), reset=True)


def test_scaling():
    values = np.array([[1.0, 7.0, 0.1], [3.0, 7.0, 0.1], [3.0, 7.0, 0.1]])
    scaling = Scaling.of(values, None)
    scaled = scaling.apply(values)
    assert_allclose(scaled.mean(0), 0, atol=1e-12)
    assert_allclose(scaled.std(0), [1, 0, 0], atol=1e-12)  # constant columns stay
    weighted = Scaling.of(values[:2], np.array([1.0, 2.0]))
    assert_allclose(weighted.mean, scaling.mean)
    assert_allclose(weighted.scale, scaling.scale)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (np.ones((3, 1)), r"shape \(3, 1\); it must be \(3,\)"),
        ([1.0, -1.0, 1.0], "not negative"),
        ([0.0, 0.0, 0.0], "not all zero"),
        ([1.0, np.nan, 1.0], "finite"),
    ],
)
def test_bad_weights(weights, match):
    with pytest.raises(ValueError, match=match):
        checked_weights(weights, 3)


def test_weights():
    assert checked_weights(None, 3) is None
    assert checked_weights([1, 0, 2], 3).dtype == np.float64
