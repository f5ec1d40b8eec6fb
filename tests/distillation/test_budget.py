# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Large networks: the work that suits them, the bytes of a file, and what of the draws is read at a time."""

import warnings

import pytest
import torch
from torch import nn

from pyro_apd.distillation import DistillationWarning, distill
from pyro_apd.distillation.budget import TrainingBudget
from pyro_apd.models.bnn import BNN
from pyro_apd.models.layout import Layout

pytestmark = pytest.mark.slow

SIZES = (20, 16, 3)
LARGE = 1_000_000


@pytest.fixture
def few(monkeypatch):
    """What is tested does not hang on how finely generators are compared, and that is most of the time."""
    monkeypatch.setattr(
        TrainingBudget,
        "of",
        classmethod(lambda cls, *args: cls(num_steps=2, batch_size=12, num_probes=8, num_evaluation_draws=30)),
    )


def bayesian(sizes=SIZES):
    net = nn.Sequential(nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:]))
    return BNN(net, prior_scale="fan_in")


def data(sizes=SIZES):
    return torch.randn(40, sizes[0], generator=torch.Generator().manual_seed(1)), torch.arange(40) % sizes[-1]


def drifting(num_draws=60, sizes=SIZES):
    """Draws of a chain that moves."""
    shapes = {name: prior.batch_shape + prior.event_shape for name, prior in bayesian(sizes).priors.items()}
    layout = Layout(shapes)
    around_SD, path_SD = torch.randn(2, num_draws, layout.size, generator=torch.Generator().manual_seed(2))
    theta_SD = 0.3 * around_SD + 0.1 * path_SD.cumsum(0)
    return layout.split(theta_SD)


def of(known=True, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistillationWarning)
        known_by = {"model": bayesian(), "data": data()} if known else {}
        return distill(drifting(), **known_by, seed=0, progress=False, **options)


def test_work_falls_with_size_and_not_below_what_is_of_use():
    assert TrainingBudget.of(LARGE) == TrainingBudget() == TrainingBudget.of(500, 1000)
    larger, largest = TrainingBudget.of(4 * LARGE), TrainingBudget.of(1000 * LARGE)
    assert (larger.num_steps, larger.batch_size, larger.num_evaluation_draws) == (125, 32, 100)
    assert largest == TrainingBudget(50, 16, num_evaluation_draws=40, num_evaluations=5)
    assert TrainingBudget.of(1000, 4 * LARGE) == larger


@pytest.mark.parametrize("known", [True, False], ids=["functions", "weights"])
def test_a_file_stays_within_its_budget(few, known):
    size = of(known, num_steps=0).num_bytes
    for budget in (0.8 * size, 1.3 * size):
        posterior = of(known, byte_budget=int(budget), num_steps=0)
        assert (size < posterior.num_bytes) == (size < budget)
        assert posterior.num_bytes < 1.05 * budget
        networks = int(budget) / (4 * posterior.layout.size)
        assert of(known, byte_budget=networks, num_steps=0).num_bytes == pytest.approx(posterior.num_bytes, abs=20)
    with pytest.raises(ValueError, match=r"byte_budget: 500 bytes are too few .* the least is about .* bytes"):
        of(known, byte_budget=500, num_steps=0)


def of_budget(model, draws, budget, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistillationWarning)
        inputs = torch.randn(40, 2, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 2
        return distill(draws, model, data=inputs, byte_budget=budget, seed=0, progress=False, num_steps=0, **options)


def near(model):
    generator = torch.Generator().manual_seed(2)
    noise = {
        name: torch.randn(60, *prior.batch_shape, *prior.event_shape, generator=generator)
        for name, prior in model.priors.items()
    }
    return {name: 0.1 * value for name, value in noise.items()}


def deep(num_layers, **options):
    hidden = [module for _ in range(num_layers) for module in (nn.Linear(6, 6), nn.Tanh())]
    return BNN(nn.Sequential(nn.Linear(2, 6), *hidden, nn.Linear(6, 2)), **options)


@pytest.mark.parametrize(
    ("model", "budget", "options"),
    [
        (deep(2), 9_000, {"storage_dtype": "float32"}),
        (deep(30), 40_000, {}),
        (deep(30, bayesian="last_layer"), 7_400, {}),
    ],
    ids=["precision", "sites", "frozen"],
)
def test_all_that_a_file_holds_counts(few, model, budget, options):
    """Numbers in another precision, a description of many sites, digests of many frozen tensors."""
    size = of_budget(model, near(model), budget, **options).num_bytes
    assert 0.6 * budget < size <= budget


def test_numbers_of_more_digits_count(few):
    model = deep(2).double()
    draws = {name: value.double() for name, value in near(model).items()}
    inputs = torch.randn(40, 2, generator=torch.Generator().manual_seed(1)).double(), torch.arange(40) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DistillationWarning)
        posterior = distill(draws, model, data=inputs, byte_budget=18_000, seed=0, progress=False, num_steps=0)
    assert posterior.storage_dtype == "float32"
    assert 0.6 * 18_000 < posterior.num_bytes <= 18_000


@pytest.mark.parametrize("budget", [1e308, 10**400])
def test_a_budget_beyond_any_file_is_no_limit(few, budget):
    model = deep(0)
    expected = of_budget(model, near(model), 10**9).generator.state_dict()
    found = of_budget(model, near(model), budget).generator.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_training_changes_the_law_and_keeps_the_integers(few):
    start, trained = of(num_steps=0), of(num_steps=6)
    assert trained.training_log["step"][-1] == 6
    assert trained.metadata["metrics"]["distance"] < start.metadata["metrics"]["distance"] + 0.02
    after = trained.generator.state_dict()
    for name, value in start.generator.state_dict().items():
        assert value.is_floating_point() or torch.equal(value, after[name])
