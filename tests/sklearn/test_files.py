# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Files of estimators: the same predictions after loading, nothing pickled, and refusals."""

import json

import numpy as np
import pyro.distributions as dist
import pytest
from numpy.testing import assert_array_equal
from safetensors import safe_open
from sklearn.exceptions import NotFittedError

from pyro_apd.errors import ArtifactError
from pyro_apd.sklearn import BNNClassifier, BNNRegressor
from tests.sklearn.conftest import SHORT, fitted

pytestmark = pytest.mark.slow


def test_a_regressor(regressor, table, tmp_path):
    regressor.save(tmp_path / "file")
    loaded = BNNRegressor.load(tmp_path / "file")
    for name in ("return_std", "return_interval"):
        one, other = (found.predict(table, **{name: 0.9})[1] for found in (loaded, regressor))
        assert_array_equal(one, other)
    assert loaded.get_params() == regressor.get_params()
    assert list(loaded.feature_names_in_) == ["a", "b", "c"]
    assert loaded.distilled_ is loaded.posterior_
    assert loaded.distilled_.network() is not None  # bound to its network
    assert not hasattr(loaded, "mcmc_")
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_a_classifier(classifier, table, tmp_path):
    classifier.save(tmp_path / "file")
    loaded = BNNClassifier.load(tmp_path / "file")
    assert_array_equal(loaded.predict(table), classifier.predict(table))
    assert_array_equal(loaded.predict_proba(table), classifier.predict_proba(table))
    with pytest.raises(ValueError, match="feature names should match"):
        loaded.predict(table[["c", "b", "a"]])


def test_draws_of_a_chain_and_several_targets(by_input, table, tmp_path):
    by_input.save(tmp_path / "file")
    loaded = BNNRegressor.load(tmp_path / "file")
    assert_array_equal(loaded.predict(table), by_input.predict(table))


@pytest.mark.parametrize("labels", [np.array([True, False]), np.array([3, 7]), np.array(["x", 'y"'], dtype=object)])
def test_labels_and_weights_of_classes(labels, table, tmp_path):
    y = labels[(table["a"] > 0).astype(int)]
    weight = {label: 1.0 + i for i, label in enumerate(labels.tolist())}
    found = fitted(BNNClassifier(class_weight=weight, **SHORT | {"num_samples": 3}), table, y, distil=False)
    found.save(tmp_path / "file")
    loaded = BNNClassifier.load(tmp_path / "file")
    assert loaded.class_weight == weight
    assert loaded.classes_.dtype == labels.dtype
    assert_array_equal(loaded.predict(table), found.predict(table))


def test_what_is_refused(regressor, classifier, tmp_path):
    with pytest.raises(NotFittedError):
        BNNRegressor().save(tmp_path / "file")
    path = tmp_path / "file"
    regressor.save(path)
    with pytest.raises(ArtifactError, match="holds a BNNRegressor; load it with that class"):
        BNNClassifier.load(path)
    regressor.distilled_.save(tmp_path / "posterior")
    with pytest.raises(ArtifactError, match=r"no estimator\. Accepted is what save"):
        BNNRegressor.load(tmp_path / "posterior")
    contents = bytearray(path.read_bytes())
    contents[-5] ^= 1
    path.write_bytes(contents)
    with pytest.raises(ArtifactError, match="damaged"):
        BNNRegressor.load(path)
    with pytest.raises(FileNotFoundError):
        BNNRegressor.load(tmp_path / "none")


def test_a_parameter_that_json_does_not_hold_is_named(regressor, tmp_path):
    regressor.set_params(prior_scale=dist.Normal(0.0, 1.0))
    try:
        with pytest.raises(ValueError, match=r"prior_scale=.* cannot be saved.*posterior_\.save"):
            regressor.save(tmp_path / "file")
    finally:
        regressor.set_params(prior_scale="fan_in")


def test_the_description_is_json(regressor, tmp_path):
    regressor.save(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        description = json.loads(file.metadata()["pyro_apd_estimator"])
    assert description["estimator"] == "BNNRegressor"
    assert description["params"]["hidden_layer_sizes"] == {"tuple": [8]}
