# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""SGLD against a posterior in closed form: ``python -m benchmarks.conjugate``.

Linear regression, 3 weights, 200 rows, noise and prior sd 1; batches of 50; 4,000 draws of 12 steps, 3 seeds.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import markdown_table, write_json
from pyro_apd import SGLD

STEP_SIZE, BATCH_SIZE, SEEDS = 8e-4, 50, (0, 1, 2)


def weights() -> Tensor:
    """The latents, three of them."""
    return pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def full(x: Tensor, y: Tensor) -> None:
    """A model as for full-batch NUTS."""
    w = weights()
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)


def subsampling(x: Tensor, y: Tensor) -> None:
    """A model that subsamples itself."""
    w = weights()
    with pyro.plate("data", len(x), subsample_size=BATCH_SIZE) as rows:
        pyro.sample("obs", dist.Normal(x[rows] @ w, 1.0), obs=y[rows])


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(200, 3, generator=generator)
    y = x @ torch.tensor([1.0, -1.0, 0.5]) + torch.randn(200, generator=generator)
    precision = x.T @ x + torch.eye(3)
    covariance, mean = torch.linalg.inv(precision), torch.linalg.solve(precision, x.T @ y)
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH_SIZE, shuffle=True)
    styles = {
        "full batch": (full, (x, y), {}),
        "(i) subsampling plate": (subsampling, (x, y), {}),
        "(ii) batch_size": (full, (x, y), {"batch_size": BATCH_SIZE}),
        "(iii) loader": (full, (loader,), {}),
    }
    rows, results = [], []
    for temperature in (1.0, 0.25):
        for style, (model, args, settings) in styles.items():
            errors, ratios = [], []
            for seed in SEEDS:
                kernel = SGLD(model, STEP_SIZE, temperature=temperature, thinning=12, seed=seed, **settings)
                mcmc = MCMC(kernel, num_samples=4000, warmup_steps=50, disable_progbar=True)
                mcmc.run(*args)
                draws = mcmc.get_samples()["w"]
                exact = temperature * covariance
                errors.append(float(((draws.mean(0) - mean) / exact.diagonal().sqrt()).abs().max()))
                ratios.append(float(torch.cov(draws.T).trace() / exact.trace()))
            results.append({"style": style, "temperature": temperature, "mean_error_sd": errors, "trace_ratio": ratios})
            rows.append([style, f"{temperature:g}", f"{max(errors):.3f}", " ".join(f"{ratio:.3f}" for ratio in ratios)])
    print(markdown_table(["style", "T", "largest error of the mean, in sd", "trace(cov) / true, by seed"], rows))
    curvature = float(torch.linalg.eigvalsh(precision)[-1])
    print(f"\nDiscretisation alone: up to {1 / (1 - STEP_SIZE * curvature / 4):.3f}.")
    print(f"Written to {write_json('conjugate', results)}")


if __name__ == "__main__":
    main()
