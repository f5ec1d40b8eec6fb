# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""``benchmarks.mnist_samplers``: averages over draws, budgets, and what is stored, on the digits."""

import math

import pytest
import torch

from benchmarks import mnist_samplers
from benchmarks.distillation_cases import CASES
from pyro_apd import BNN, SGLD, metrics

DIGITS = mnist_samplers.SIZES["64-50-10"]


def test_the_average_is_that_of_the_probabilities():
    model = BNN(torch.nn.Linear(3, 4))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 3, generator=generator), torch.randint(4, (20,), generator=generator)
    draws = [
        {
            "net.weight": torch.randn(4, 3, generator=generator),
            "net.bias": torch.randn(4, generator=generator),
        }
        for _ in range(3)
    ]
    average = mnist_samplers.Average(model, {"test": (x, y)})
    for draw in draws:
        average.add(draw)
    probs_SNK = torch.stack([(x @ draw["net.weight"].T + draw["net.bias"]).softmax(-1) for draw in draws])
    found = average.measured()["test"]
    assert found["nll"] == pytest.approx(metrics.negative_log_likelihood(probs_SNK.mean(0), y), rel=1e-5)
    assert found["error"] == pytest.approx(1 - metrics.accuracy(probs_SNK.mean(0), y))
    assert found["error_of_one"] == pytest.approx(float((probs_SNK.argmax(-1) != y).double().mean()))


@pytest.mark.slow
@pytest.mark.parametrize(("limits", "num_draws"), [({"num_steps": 24}, 4), ({"budget": 0.0}, 1)])
def test_a_run_ends_at_its_limit_and_has_one_draw_at_least(limits, num_draws):
    problem = CASES["digits"].build(0)
    kernel = SGLD(problem.model, 1e-5, batch_size=50, thinning=4, seed=0, compile=False)
    found = mnist_samplers.run(kernel, problem, 2, **limits)
    assert found["num_draws"] == num_draws
    assert found["num_steps"] == 4 * (2 + num_draws)
    assert found["cpu_seconds"] > 0
    assert math.isfinite(found["test"]["nll"])
    assert "validation" not in found


@pytest.mark.slow
def test_the_quick_form_compares_the_recommended_kernel_with_the_papers(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(mnist_samplers, "RESULTS", tmp_path)
    mnist_samplers.main(["--quick"])
    table = capsys.readouterr().out.split("64-50-10")[-1].splitlines()
    assert [line.split("|")[2].strip() for line in table if line.startswith("| 0")] == [
        "SGLD, paper",
        "recommended, SGHMC",
    ]
    assert not list(tmp_path.iterdir())


def test_what_is_stored_is_not_run_again(monkeypatch):
    entry = {"cpu_seconds": 1.0}
    results = {f"64-50-10/0/{name}": entry for name in ("SGLD, paper", "recommended")}
    monkeypatch.setattr(mnist_samplers, "run", lambda *_, **__: pytest.fail("it is stored"))
    mnist_samplers.compared("64-50-10", DIGITS, 0, results, ["recommended"], lambda: pytest.fail("nothing is new"))
    assert len(results) == 2
