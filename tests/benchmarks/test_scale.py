# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The arithmetic of ``benchmarks.scale``, and the networks of ``benchmarks.large``."""

import math

import pytest
import torch

from benchmarks.large_networks import CASES, framed_handwriting, handwriting, mlp, paper_conv_net, resnet
from benchmarks.scale import WEIGHTS, draw, growth, network, summed_up
from pyro_apd import SGLD
from pyro_apd.models.bnn import BNN

pytestmark = pytest.mark.slow


def size(net):
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("num_weights", WEIGHTS)
def test_widths_give_the_weights_asked_for(num_weights):
    with torch.device("meta"):
        assert size(network(num_weights)) == pytest.approx(num_weights, rel=0.05)


def series(by, counts, seconds, num_bytes):
    return [{by: n, "seconds": seconds(n), "bytes": num_bytes(n)} for n in counts]


def test_exponents():
    points = series("weights", (10**3, 10**5, 10**6, 10**7, 10**8), lambda n: 3 * n**0.5, lambda n: 1e8 + 20.0 * n)
    chains = series("chains", (1, 2, 4, 8, 16, 32), float, lambda n: 9e7 if n == 1 else 1e8 + 2e7 * n**0.8)
    found = summed_up(points, chains)
    assert math.isnan(found["weights"][0]["bytes"])
    assert math.isnan(found["weights"][1]["bytes"]), "two megabytes are not resolved"
    assert found["weights"][-1]["bytes"] == pytest.approx(2e9, rel=1e-3)
    assert found["weights"][-1]["peak_bytes"] == pytest.approx(2.1e9)
    assert found["chains"][3]["bytes"] == pytest.approx(2e7 * 8**0.8, rel=1e-3)
    slopes = found["exponents"]
    assert slopes["weights"] == pytest.approx({"time, all": 0.5, "time, from 100,000": 0.5, "memory": 1.0}, abs=1e-3)
    assert slopes["chains"] == pytest.approx({"time, all": 1.0, "time, from 8": 1.0, "memory": 0.8}, abs=1e-3)


def test_memory_that_does_not_grow_has_no_exponent():
    assert math.isnan(growth(series("weights", (10, 100, 1000, 10**4), float, lambda n: 1e8 + n), "weights")[1])


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


def test_handwriting_is_framed_by_its_background(monkeypatch):
    monkeypatch.delenv("PYRO_APD_DATA", raising=False)
    inner, framed = handwriting(), framed_handwriting()
    assert framed[0].shape[1:] == framed[2].shape[1:] == (1, 32, 32)
    for i in (0, 2):
        assert torch.equal(framed[i][..., 2:-2, 2:-2], inner[i])
        assert (framed[i][..., :2, :] == inner[i].min()).all()
        assert (framed[i][..., -2:] == inner[i].min()).all()
        assert torch.equal(framed[i + 1], inner[i + 1])


def test_a_residual_network_is_sampled_with_group_norm():
    x, y = torch.randn(12, 1, 32, 32), torch.arange(12) % 10
    model = BNN(resnet(1, 4), prior_scale="fan_in", batch_norm="group")
    chain = SGLD(model, 1e-6, batch_size=4, seed=0, compile=False).begin((x, y), {}, warmup_steps=1)
    chain.advance(2)
    assert chain.path == "captured"
    assert bool(chain.theta.isfinite().all())
