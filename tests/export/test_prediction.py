# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What programs cannot compute yet is refused by name, before anything is exported."""

import pytest
import torch
from torch import nn

import pyro_apd as apd
from pyro_apd.export.example import network_inputs
from tests.support.exported import low_rank_posterior, mlp


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x, z):
        return self.out(torch.cat([x, z], -1))


def test_adapters_are_refused():
    posterior, bnn = low_rank_posterior(mlp(), bayesian="lora:1")
    with pytest.raises(apd.ExportError, match=r"Adapters, bayesian='lora:...', cannot be exported yet.*'0'"):
        posterior.prediction(bnn)


@pytest.mark.parametrize("likelihood", ["poisson", "gaussian_by_input", "student_t", "ordinal"])
def test_likelihoods_without_scores_are_refused(likelihood):
    outputs, settings = {"gaussian_by_input": (2, {}), "ordinal": (1, {"num_classes": 3})}.get(likelihood, (1, {}))
    posterior, bnn = low_rank_posterior(mlp(outputs), likelihood=likelihood, **settings)
    with pytest.raises(apd.ExportError, match=f"this network has '{likelihood}'"):
        posterior.prediction(bnn, link="identity")
    with pytest.raises(apd.ExportError, match=f"this network has '{likelihood}'"):
        posterior.ensemble(2, net=bnn, link="identity", outputs=["mean"])


def test_links_without_scores_are_refused():
    posterior, _ = low_rank_posterior(mlp())
    with pytest.raises(apd.ExportError, match="got link='softplus'"):
        posterior.prediction(mlp(), link="softplus")


def test_inputs_by_name_are_not_exchanged():
    x, z = torch.zeros(1, 4), torch.zeros(1, 2)
    assert list(network_inputs(TwoInputs(), {"x": x, "z": z})) == ["x", "z"]
    for example in ({"z": z, "x": x}, {"x": x, "more": z}):
        with pytest.raises(apd.ExportError, match=r"are not the first arguments of TwoInputs.forward.*\['x', 'z'\]"):
            network_inputs(TwoInputs(), example)
