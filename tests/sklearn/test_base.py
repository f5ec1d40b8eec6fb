# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The estimators in scikit-learn's tools, and what of a fit is the library's own."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import sklearn
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.inspection import partial_dependence, permutation_importance
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

import pyro_apd as apd
from pyro_apd.sklearn import BNNClassifier, BNNRegressor, base
from tests.sklearn.conftest import SHORT, fitted

# As short as a run can be: what is looked at is the plumbing.
TINY = SHORT | {"num_samples": 3, "warmup_steps": 2, "thinning": 1, "step_size": 1e-8}


class Quick(BNNRegressor):
    """Predicts from the chain."""

    def fit(self, X, y, sample_weight=None, *, distil=False):
        return super().fit(X, y, sample_weight, distil=distil)


@pytest.mark.slow
def test_grid_search_and_cross_validation(table, target):
    search = GridSearchCV(Quick(**TINY), {"hidden_layer_sizes": [(), (4,)]}, cv=2)
    search.fit(table, target)
    assert len(search.cv_results_["mean_test_score"]) == 2
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert cross_val_predict(Quick(**TINY), table, target, cv=2).shape == (len(table),)


@pytest.mark.slow
def test_a_pipeline_with_words_and_a_frame_as_output(table, labels):
    words = table.assign(colour=np.where(table["a"] > 0, "red", "blue"))
    encoder = make_column_transformer((OneHotEncoder(sparse_output=False), ["colour"]), remainder="passthrough")
    pipeline = make_pipeline(encoder, StandardScaler(), BNNClassifier(**TINY)).set_output(transform="pandas")
    pipeline.fit(words, labels, bnnclassifier__distil=False)
    assert pipeline[-1].feature_names_in_[0] == "onehotencoder__colour_blue"
    assert pipeline.predict_proba(words).shape == (len(table), 3)
    assert set(pipeline.predict(words)) <= set(labels)


@pytest.mark.slow
def test_weights_are_routed(table, target):
    """``distil`` is no metadata of rows, and needs no request."""
    weights = np.arange(len(table)) % 2.0
    with sklearn.config_context(enable_metadata_routing=True):
        estimator = Quick(**TINY).set_fit_request(sample_weight=True).set_score_request(sample_weight=False)
        found = cross_validate(estimator, table, target, cv=2, params={"sample_weight": weights}, return_estimator=True)
    data = [part.mcmc_.kernel for part in found["estimator"]]
    assert len(data) == 2
    halves = [part._y_scaling.mean[0] for part in found["estimator"]]
    half = len(table) // 2
    expected = [np.average(target[part], weights=weights[part]) for part in (slice(half, None), slice(half))]
    assert_allclose(halves, expected)


@pytest.mark.slow
def test_inspection(regressor, table, target):
    importance = permutation_importance(regressor, table, target, n_repeats=2, random_state=0).importances_mean
    assert importance[0] > importance[2]
    along = partial_dependence(regressor, table, ["a"], grid_resolution=5)["average"]
    assert along.shape == (1, 5)
    assert along[0, -1] > along[0, 0]


@pytest.mark.slow
def test_pickles_have_no_data(regressor, classifier, table):
    for estimator in (regressor, classifier):
        copy = pickle.loads(pickle.dumps(estimator))
        assert not hasattr(copy, "mcmc_")
        assert hasattr(estimator, "mcmc_")
        assert_array_equal(copy.predict(table), estimator.predict(table))
        assert copy.distilled_ is copy.posterior_
        assert not hasattr(clone(estimator), "posterior_")


@pytest.mark.slow
def test_the_same_random_state_gives_the_same_fit(table, target):
    first, second, other = (Quick(**TINY | {"random_state": s}).fit(table, target) for s in (3, 3, 4))
    assert_array_equal(first.predict(table), second.predict(table))
    assert np.abs(first.predict(table) - other.predict(table)).max() > 0


@pytest.mark.slow
def test_a_second_fit_replaces_the_first(table, target):
    estimator = fitted(BNNRegressor(**SHORT), table, target)
    estimator.set_params(**TINY).fit(table, target, distil=False)
    assert not hasattr(estimator, "distilled_")
    assert isinstance(estimator.posterior_, dict)


@pytest.mark.slow
def test_the_rest_of_the_library_takes_it(regressor):
    assert isinstance(regressor.distilled_, apd.DistilledPosterior)
    assert regressor.mcmc_.get_samples()["net.0.weight"].shape == (100, 8, 3)
    network = regressor.distilled_.network()
    assert network(next(iter(network.parameters())).new_zeros(2, 3)).shape == (2, 1)


@pytest.mark.parametrize(
    ("num_rows", "hidden", "batch_size", "expected"),
    [(100, (32,), None, "MCLMC"), (100, (4,), None, "SGHMC"), (10**6, (32,), None, "PSGLD"), (100, (32,), 50, "PSGLD")],
)
def test_the_sampler_is_that_of_the_advice(num_rows, hidden, batch_size, expected):
    estimator = BNNRegressor(hidden_layer_sizes=hidden, batch_size=batch_size)
    estimator.n_features_in_ = 3
    estimator._y_scaling = base.Scaling(np.zeros(1), np.ones(1))
    estimator.model_ = estimator._make_model()
    kernel = estimator._make_kernel(num_rows, 0)
    assert type(kernel).__name__ == expected
    assert kernel.thinning == 10
    assert expected in kernel.reason


def test_bars_are_shown_where_a_person_looks(monkeypatch):
    monkeypatch.setattr(sys, "stderr", type("Terminal", (), {"isatty": lambda self: True})())
    assert base._is_watched()
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert not base._is_watched()


@pytest.mark.slow
def test_scikit_learn_is_imported_by_its_estimators_alone():
    code = "import sys, pyro_apd; assert 'sklearn' not in sys.modules; import pyro_apd.sklearn"
    subprocess.run([sys.executable, "-c", code], check=True)
    missing = "import sys; sys.modules['sklearn'] = None; import pyro_apd.sklearn"
    found = subprocess.run([sys.executable, "-c", missing], capture_output=True, text=True, check=False)
    assert "pip install 'pyro-apd[sklearn]'" in found.stderr
