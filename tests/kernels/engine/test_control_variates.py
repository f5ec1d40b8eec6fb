# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.kernels import SGLD
from pyro_apd.kernels.engine.control_variates import ControlVariates
from pyro_apd.models.building import build_potential
from tests.support.models import Conjugate

PROBLEM = Conjugate(num_data=203)
DATA = TensorDataset(PROBLEM.x, PROBLEM.y)
STYLES = {
    "plate": (PROBLEM.subsampling, (PROBLEM.x, PROBLEM.y), {}),
    "batch_size": (PROBLEM.full, (PROBLEM.x, PROBLEM.y), {"batch_size": 50}),
    "loader": (PROBLEM.full, (DataLoader(DATA, batch_size=50, shuffle=True),), {}),
    "loader of lists": (
        PROBLEM.full,
        ([(PROBLEM.x[:99], PROBLEM.y[:99]), (PROBLEM.x[99:], PROBLEM.y[99:])],),
        {"num_data": 203},
    ),
}


def exact(theta):
    residual = PROBLEM.x @ theta - PROBLEM.y
    return theta + PROBLEM.x.T @ residual


@pytest.mark.parametrize("style", STYLES)
def test_gradient_at_the_centre_is_that_of_all_data(style):
    model, args, settings = STYLES[style]
    potential, _ = build_potential(model, args, {}, **settings)
    centre = torch.tensor([0.5, -0.3, 0.1])
    control = ControlVariates(potential)
    control.prepare((centre,))
    torch.testing.assert_close(control.full_gradient[0], exact(centre), rtol=1e-4, atol=1e-2)
    full, _ = build_potential(PROBLEM.full, (PROBLEM.x, PROBLEM.y), {})
    torch.testing.assert_close(control.energy, full.value(centre, ()), rtol=1e-4, atol=1e-2)
    # There, every mini-batch gives the gradient of all data.
    for _ in range(3):
        inputs = potential.source.draw()
        gradient, energy = control.gradient_function((centre,), inputs)((centre,), inputs)
        torch.testing.assert_close(gradient[0], exact(centre), rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(energy, control.energy)


def test_noise_is_smaller_near_the_centre_and_the_mean_is_right():
    potential, _ = build_potential(PROBLEM.full, (PROBLEM.x, PROBLEM.y), {}, batch_size=29)  # 7 batches an epoch
    control = ControlVariates(potential)
    control.prepare((PROBLEM.mean,))
    theta = PROBLEM.mean + 0.07
    plain, better = [], []
    for _ in range(7 * 40):
        inputs = potential.source.draw()
        plain.append(potential.gradient(theta, inputs)[0])
        better.append(control.gradient_function((theta,), inputs)((theta,), inputs)[0][0])
    plain, better = torch.stack(plain), torch.stack(better)
    torch.testing.assert_close(better.mean(0), exact(theta), rtol=1e-3, atol=1e-2)
    assert better.var(0).sum() < 0.05 * plain.var(0).sum()


def test_several_chains_have_centres_of_their_own():
    potential, _ = build_potential(PROBLEM.full, (PROBLEM.x, PROBLEM.y), {}, batch_size=50)
    centres = torch.randn(3, 3)
    control = ControlVariates(potential)
    control.prepare((centres,))
    torch.testing.assert_close(control.full_gradient[0], torch.stack([exact(c) for c in centres]), rtol=1e-4, atol=1e-2)
    assert control.energy.shape == (3,)


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (PROBLEM.full, (PROBLEM.x, PROBLEM.y), "no mini-batches"),
        (
            PROBLEM.full,
            (DataLoader(DATA, batch_size=50, shuffle=True, drop_last=True),),
            "holds 200 rows, the data 203",
        ),
    ],
)
def test_batches_that_do_not_cover_the_data(model, args, message):
    kernel = SGLD(model, 1e-3, control_variates=True)
    kernel.setup(0, *args)
    with pytest.raises(ValueError, match=message):
        kernel.sample(kernel.initial_params)


def test_several_plates_are_refused():
    def model(x, y):
        w = PROBLEM.weights()
        for name in ("one", "two"):
            with pyro.plate(name, len(x), subsample_size=50) as rows:
                pyro.sample(f"obs {name}", dist.Normal(x[rows] @ w, 1.0), obs=y[rows])

    kernel = SGLD(model, 1e-3, control_variates=True)
    kernel.setup(0, PROBLEM.x, PROBLEM.y)
    with pytest.raises(ValueError, match="'one', 'two'"):
        kernel.sample(kernel.initial_params)


def test_covering_draws_nothing_from_the_global_generator():
    potential, _ = build_potential(*STYLES["loader"][:2], {})
    before = torch.get_rng_state()
    ControlVariates(potential).prepare((torch.zeros(3),))
    assert torch.equal(torch.get_rng_state(), before)
