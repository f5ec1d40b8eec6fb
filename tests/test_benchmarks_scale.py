# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The arithmetic of ``benchmarks.scale``, and the networks of ``benchmarks.large``."""

import math

import pytest
import torch

from benchmarks.large_networks import CASES, QUICK, mlp, paper_conv_net, resnet
from benchmarks.scale import WEIGHTS, draw, exponent, network, summed_up
from pyro_apd import SGLD
from pyro_apd.bnn import BNN

pytestmark = pytest.mark.thorough


def size(net):
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("num_weights", WEIGHTS)
def test_widths_give_the_weights_asked_for(num_weights):
    with torch.device("meta"):
        assert size(network(num_weights)) == pytest.approx(num_weights, rel=0.05)


def test_exponents():
    points = [{"weights": n, "seconds": 3 * n**0.5, "bytes": 1e8 + 2.0 * n} for n in (10**3, 10**6, 10**7, 10**8)]
    chains = [{"chains": n, "seconds": 1.0 * n, "bytes": 1e8 + 1e7 * n} for n in (1, 2, 8, 16)]
    found = summed_up(points, chains)
    assert exponent(points, "weights", "seconds") == pytest.approx(0.5)
    assert math.isnan(found["weights"][0]["bytes"])
    assert math.isnan(found["weights"][1]["bytes"]), "two megabytes are not resolved"
    assert found["chains"][2]["bytes"] == 6e7
    assert found["exponents"]["weights"]["memory, all"] == pytest.approx(1.0, abs=1e-3)
    assert found["exponents"]["chains"]["time, from 8"] == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_the_figure_is_drawn(tmp_path):
    points = [{"weights": n, "seconds": 1e-3 * n, "bytes": 1e8 + 100.0 * n} for n in (10**3, 10**5, 10**6)]
    chains = [{"chains": n, "seconds": 1.0 * n, "bytes": 1e8 + 1e7 * n} for n in (1, 2, 8, 16)]
    draw(summed_up(points, chains), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_networks_have_the_sizes_that_their_names_say():
    with torch.device("meta"):
        assert size(resnet()) == pytest.approx(0.27e6, rel=0.02)
        assert size(mlp(2790)) == pytest.approx(1e7, rel=0.01)
        assert size(paper_conv_net()) == pytest.approx(346_130, rel=0.02)
    assert {"conv", "resnet20", "mlp-10M"} <= set(CASES)
    assert all(case.num_steps == 1 for case in QUICK.values())


def test_a_residual_network_is_sampled_with_group_norm():
    x, y = torch.randn(12, 1, 32, 32), torch.arange(12) % 10
    model = BNN(resnet(1, 4), prior_scale="fan_in", batch_norm="group")
    chain = SGLD(model, 1e-6, batch_size=4, seed=0, compile=False).begin((x, y), {}, warmup_steps=1)
    chain.advance(2)
    assert chain.path == "captured"
    assert bool(chain.theta.isfinite().all())
