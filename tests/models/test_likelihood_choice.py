# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Likelihoods by name with their options, and functions of the outputs."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.bnn import BNN

N = 5
X = torch.zeros(N, 3)


@pytest.mark.parametrize(
    ("likelihood", "options", "match"),
    [
        ("gamma", {}, "likelihood='gamma' must be one of 'categorical'.*'negative_binomial', 'ordinal'"),
        (7, {}, "likelihood=7 must be one of"),
        ("poisson", {"noise_scale": 1.0}, "noise_scale=1.0 belongs to likelihood='gaussian' or 'student_t'.*'poisson'"),
        ("gaussian", {"noise_floor": 0.1}, "noise_floor=0.1 belongs to likelihood='gaussian_by_input'; .*'gaussian'"),
        ("gaussian", {"degrees_of_freedom": 3}, "degrees_of_freedom=3 belongs to likelihood='student_t'"),
        ("categorical", {"num_classes": 3}, "num_classes=3 belongs to likelihood='ordinal'"),
        (lambda f: f, {"noise_floor": 0.1}, "noise_floor=0.1 belongs to .*; this one is 'custom'"),
        ("ordinal", {}, "needs the number of classes: num_classes="),
        ("ordinal", {"num_classes": 1}, "num_classes=1 must be"),
        ("gaussian_by_input", {"noise_floor": 0.0}, "noise_floor=0.0 must be"),
        ("student_t", {"degrees_of_freedom": 0}, "degrees_of_freedom=0 must be"),
    ],
)
def test_bad_options(likelihood, options, match):
    with pytest.raises(ValueError, match=match):
        BNN(nn.Linear(3, 2), likelihood, **options)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda f: f, "likelihood must return a distribution of pyro.distributions; it returned Tensor"),
        (lambda f: torch.distributions.Normal(f[:, 0], 1.0), "it returned one of torch.distributions"),
        (lambda f: dist.Normal(f, 1.0), r"a Normal of batch shape \(5, 2\); it must be \(5,\).*Add .to_event\(1\)"),
        (lambda f: dist.Normal(f.mean(), 1.0), r"batch shape \(\); it must be \(5,\).*first dimension of the rows"),
    ],
)
def test_a_function_must_return_one_distribution_for_each_row(function, match):
    with pytest.raises(ModelError, match=match):
        BNN(nn.Linear(3, 2), function)(X)


def test_targets_of_a_function():
    model = BNN(nn.Linear(3, 2), lambda f: dist.Normal(f, 1.0).to_event(1))
    with pytest.raises(DataError, match=r"targets of shape \(5, 2\); got \(5,\)"):
        model(X, torch.zeros(N))
    assert model(X, torch.zeros(N, 2, dtype=torch.long)).shape == (N, 2)  # integers become reals
    assert "custom" in repr(model)
