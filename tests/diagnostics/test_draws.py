# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0


import pytest
import torch

from pyro_apd.diagnostics.draws import draw_shapes, flat, kernel_settings, posterior_bytes
from pyro_apd.models.layout import Layout


def test_shapes_without_drawing(case):
    class Shipped:
        layout = Layout({"a": (2, 3)})

        def get_samples(self, num_samples=None):
            raise AssertionError("drew")

    assert draw_shapes(Shipped()) == {"a": (2, 3)}
    assert draw_shapes(case.posterior())["out.weight"] == (3, 4)
    assert draw_shapes({"a": torch.zeros(7, 2)}) == {"a": (2,)}
    assert draw_shapes(None) is None


def test_bytes(case):
    assert posterior_bytes(case.posterior(num_bytes=77)) == 77
    assert posterior_bytes({"a": torch.zeros(3, 2), "b": torch.zeros(3, dtype=torch.float64)}) == 48
    with pytest.raises(ValueError, match="num_bytes"):
        posterior_bytes(object())


def test_settings_are_what_the_constructor_took(case):
    mcmc = case.StubMCMC(case.chain(2, 5), case.model)
    assert kernel_settings(mcmc) == {
        **{"kernel": "SGLD", "step_size": 1e-3, "temperature": 1.0},
        **{"num_chains": 2, "num_samples": 5},
    }
    assert kernel_settings({}) == {}


def test_flat_puts_sites_side_by_side():
    theta = flat({"b": torch.zeros(3), "a": torch.ones(3, 2, 2)}, ["a", "b"])
    assert theta.tolist() == [[1, 1, 1, 1, 0]] * 3
