# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Metrics that prefer the right spread."""

import math

import pytest
import torch

from pyro_apd.distillation.evaluators import FunctionEvaluator, WeightEvaluator
from pyro_apd.distillation.probes import Probes
from tests.support.function_spaces import space


def test_function_evaluator_prefers_the_right_spread():
    real, probes = torch.randn(100, 3), Probes([torch.linspace(-2, 2, 50)])
    evaluator = FunctionEvaluator(space(), probes, real)
    narrow, right, wide = (evaluator.metrics(scale * torch.randn(100, 3)) for scale in (0.2, 1.0, 4.0))
    assert right["distance"] < min(narrow["distance"], wide["distance"])
    assert narrow["mi_ratio"] < 0.2 < 0.8 < right["mi_ratio"] < 1.25 < 1.5 < wide["mi_ratio"]
    assert narrow["spread_ratio"] < 0.5 < right["spread_ratio"]


def test_evaluator_reports_numbers_that_are_not_finite():
    evaluator = FunctionEvaluator(space(), Probes([torch.linspace(-2, 2, 50)]), torch.randn(50, 3))
    assert math.isnan(evaluator.metrics(torch.full((20, 3), torch.nan))["distance"])


def test_weight_evaluator_prefers_the_right_spread():
    evaluator = WeightEvaluator(lambda theta: theta, torch.randn(200, 3))
    narrow, right = (evaluator.metrics(scale * torch.randn(200, 3)) for scale in (0.1, 1.0))
    assert right["distance"] < narrow["distance"]
    assert narrow["spread_ratio"] == pytest.approx(0.1, rel=0.2)
