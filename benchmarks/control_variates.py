# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What control variates save: ``python -m benchmarks.control_variates``.

Logistic regression with three weights on 5,000 rows, batches of 20, against the exact posterior by quadrature. Each row
is an SGLD run of 2,000 draws of 50 steps from the mode, 3 seeds. The share of the discretisation is computed for a
Gaussian. The rest is mini-batch noise and Monte-Carlo error (about 0.05 at this length).
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC
from torch import Tensor

from benchmarks.common import markdown_table, write_json
from pyro_apd import SGLD

NUM_DATA, BATCH_SIZE, SEEDS = 5000, 20, (0, 1, 2)
STEP_SIZES = (1e-5, 3e-5, 1e-4)


def model(x: Tensor, y: Tensor) -> None:
    """Logistic regression with standard normal weights."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)


def data() -> tuple[Tensor, Tensor]:
    """Three standard normal predictors, and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_DATA, 3, generator=generator)
    probs = torch.sigmoid(x @ torch.tensor([1.0, -1.5, 0.5]))
    return x, torch.bernoulli(probs, generator=generator)


def log_density(w_GD: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Log joint density at each of G points, in double precision."""
    logits = w_GD.double() @ x.double().T
    log_likelihood = (logits * y.double() - torch.nn.functional.softplus(logits)).sum(-1)
    return log_likelihood - 0.5 * w_GD.double().square().sum(-1)


def exact_posterior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mode, mean and covariance by quadrature, and the Hessian of U at the mode."""
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(20):  # Newton's method
        energy = -log_density(w.unsqueeze(0), x, y).sum()
        (gradient,) = torch.autograd.grad(energy, w)
        hessian = torch.func.hessian(lambda v: -log_density(v.unsqueeze(0), x, y).sum())(w.detach())
        w = (w - torch.linalg.solve(hessian, gradient)).detach().requires_grad_()
    mode, root = w.detach(), torch.linalg.cholesky(torch.linalg.inv(hessian))
    axis = torch.linspace(-5.5, 5.5, 23, dtype=torch.float64)
    grid = mode + torch.cartesian_prod(axis, axis, axis) @ root.T
    weight = torch.softmax(torch.cat([log_density(part, x, y) for part in grid.split(500)]), 0)
    mean = weight @ grid
    return mode, mean, (weight.unsqueeze(-1) * (grid - mean)).T @ (grid - mean), hessian


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    x, y = data()
    mode, mean, covariance, hessian = exact_posterior(x, y)
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance))
    curvature = torch.linalg.eigvalsh(hessian)
    rows, results = [], []
    for step_size in STEP_SIZES:
        for name, has_control in (("plain", False), ("control variates", True)):
            errors, ratios = [], []
            for seed in SEEDS:
                kernel = SGLD(
                    model, step_size, batch_size=BATCH_SIZE, thinning=50, seed=seed, control_variates=has_control
                )
                start = {"w": mode.float()}
                mcmc = MCMC(kernel, num_samples=2000, warmup_steps=40, initial_params=start, disable_progbar=True)
                mcmc.run(x, y)
                white = (mcmc.get_samples()["w"].double() - mean) @ whiten.T
                spectrum = torch.linalg.eigvalsh(torch.cov(white.T))
                errors.append(float((spectrum - 1).abs().max()))
                ratios.append(float(spectrum.mean()))
            own = float((1 / (1 - step_size * curvature / 4)).mean())
            results.append({"step_size": step_size, "method": name, "largest_error": errors, "variance_ratio": ratios})
            rows.append(
                [f"{step_size:g}", name, *(" ".join(f"{v:.2f}" for v in vs) for vs in (ratios, errors)), f"{own:.2f}"]
            )
    header = ["step size", "gradient", "variance / exact", "largest error of a direction", "discretisation alone"]
    print(markdown_table(header, rows))
    print(f"Written to {write_json('control_variates', results)}")


if __name__ == "__main__":
    main()
