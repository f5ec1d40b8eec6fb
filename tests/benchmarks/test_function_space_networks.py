# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The networks of ``benchmarks.function_space``: the potential written by hand, what is compared, and absent peers."""

import sys

import pytest
import torch

from benchmarks import function_space_networks as networks
from pyro_apd.models.building import build_potential


def network(hidden=(4,), num_rows=30):
    generator = torch.Generator().manual_seed(0)
    x, grid = (torch.randn(num, 3, generator=generator) for num in (num_rows, 5))
    return networks.Network("small", (3, *hidden, 2), x, x.sum(1), grid)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [(4,), (4, 5)])
def test_the_potential_written_by_hand_is_the_models(hidden):
    problem = network(hidden)
    potential, start = build_potential(problem.model, (problem.x, problem.y), {}, seed=0)
    theta = torch.stack([potential.layout.unconstrain(start), torch.full((problem.num_weights,), 0.1)])
    differences = []
    for row in theta:
        _, energy = potential.gradient(row, potential.source.draw())
        differences.append(float(energy - problem.potential(potential.layout.constrain(row))))
    assert differences[0] == pytest.approx(differences[1], abs=1e-3)
    assert problem.num_weights == potential.layout.size


def test_functions_are_means_and_log_scales():
    problem = network()
    weights = {"weight.0": torch.zeros(2, 7, 4, 3), "bias.0": torch.zeros(2, 7, 4)}
    weights |= {"weight.1": torch.zeros(2, 7, 2, 4), "bias.1": torch.tensor([0.5, -30.0]).expand(2, 7, 2)}
    functions = problem.functions(weights)
    assert functions.shape == (2, 7, 10)
    assert bool((functions[..., :5] == 0.5).all())
    assert float(functions[0, 0, 9]) == pytest.approx(-13.8155, abs=1e-3)  # log of the smallest scale


def draws(problem, shift, scale):
    generator = torch.Generator().manual_seed(1)
    shapes = {"weight.0": (4, 3), "bias.0": (4,), "weight.1": (2, 4), "bias.1": (2,)}
    found = {name: torch.randn(4, 200, *shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    found["bias.1"] = found["bias.1"] * 10 * scale + shift
    return networks.Run("a sampler", found, 2.0, {"warnings": ["UserWarning: of something"]})


def test_what_is_outside_of_the_goals():
    problem = network()
    reference = problem.functions(draws(problem, 0.0, 1.0).draws)
    same = networks.compared(draws(problem, 0.0, 1.0), problem, reference)
    assert same["within"]
    assert same["sd_ratio"] == 1.0
    assert same["per_second"] == same["ess"] / 2
    assert not networks.compared(draws(problem, 0.5, 1.0), problem, reference)["within"]
    assert not networks.compared(draws(problem, 0.0, 1.5), problem, reference)["within"]
    assert networks.cells(same)[-2:] == ["yes", "UserWarning"]
    first = networks.compared(draws(problem, 0.0, 1.0), problem, None)
    assert len(networks.cells(first)) == len(networks.cells(same)) == len(networks.HEADER)


def test_a_peer_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"BDE, 10 x the draws failed: [\s\S]*ModuleNotFoundError"):
        networks.peer(network(), "bde", sys.executable, n_samples=20)


def test_absent_data_are_skipped_with_a_word(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(networks, "DATA", tmp_path)
    networks.main()
    assert "skipped" in capsys.readouterr().out
