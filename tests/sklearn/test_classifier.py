# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Predictions of the classifier against the same from its posterior by hand; labels of all kinds; refusals."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import pyro_apd as apd
from pyro_apd.sklearn import BNNClassifier
from tests.sklearn.conftest import SHORT, fitted


@pytest.mark.slow
def test_predictions_are_those_of_the_posterior(classifier, table, labels):
    x = torch.as_tensor(classifier._x_scaling.apply(table.to_numpy()))
    draws = classifier.distilled_.get_samples(classifier.num_networks, seed=classifier._draws_seed)
    probs_SNK = apd.outputs(classifier.model_, draws, x).probs_SNK
    probs = classifier.predict_proba(table)
    assert_allclose(probs, probs_SNK.mean(0))
    assert list(classifier.classes_) == ["high", "low", "middle"]
    assert (classifier.predict(table) == classifier.classes_[probs.argmax(1)]).all()
    assert classifier.score(table, labels) > 0.85
    uncertainty = classifier.predict_uncertainty(table)
    assert_allclose(uncertainty["entropy"], -(probs * np.log(probs)).sum(1))
    assert_allclose(uncertainty["mutual_information"], apd.uncertainty.mutual_information(probs_SNK))


@pytest.mark.slow
def test_balanced_classes(classifier, labels):
    counts = np.array([(labels == label).sum() for label in classifier.classes_])
    assert_allclose(classifier.model_._class_weight, len(labels) / (3 * counts))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [bool, int, float, str, object])
def test_labels(kind, table):
    y = (table["a"] > 0).to_numpy().astype(str if kind is object else kind).astype(kind)
    found = fitted(BNNClassifier(**SHORT), table, y, distil=False)
    predicted = found.predict(table)
    assert predicted.dtype == y.dtype
    assert (predicted == y).mean() > 0.85


@pytest.mark.slow
def test_far_from_the_data_the_networks_disagree(classifier, table):
    far = table.copy()
    far["a"] = 0.5
    far["b"] += 1000
    near = classifier.predict_uncertainty(table)["mutual_information"].mean()
    assert classifier.predict_uncertainty(far)["mutual_information"].mean() > 1.5 * near


def test_one_class(table):
    with pytest.raises(ValueError, match="at least two classes; the data have one class, 'a'"):
        BNNClassifier().fit(table, np.full(len(table), "a"))
    y = np.where(np.arange(len(table)) == 0, "b", "a")
    with pytest.raises(ValueError, match="have one class, 'a', without rows of weight 0"):
        BNNClassifier().fit(table, y, sample_weight=(y == "a") * 1.0)
