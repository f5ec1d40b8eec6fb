# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What a file loses at reduced precision: ``python -m benchmarks.precision``.

scikit-learn's digits, 64-50-10, 4 chains of SGLD as in the demo, one generator (a quarter of the demo's training). The
same 200 latents are used for the generator itself and for each file, so only the precision differs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_apd as apd
from benchmarks.common import markdown_table, write_json
from pyro_apd.generators.precision import DTYPES

NUM_DRAWS, NUM_STEPS = 200, 400


def distilled() -> tuple[Any, Any, Any]:
    """Model, data and posterior."""
    data = apd.datasets.digits(seed=0)
    model = apd.BNN(nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)), prior_scale=0.4)
    kernel = apd.SGLD(model, step_size=1e-4, batch_size=100, thinning=40, seed=0)
    mcmc = apd.MCMC(kernel, num_samples=100, warmup_steps=100, num_chains=4, disable_progbar=True)
    mcmc.run(data.x_train, data.y_train)
    return (
        model,
        data,
        apd.distill(mcmc, num_steps=NUM_STEPS, seed=0, storage_dtype="float32"),
    )  # the generator, before any rounding


def figures(model: Any, posterior: Any, x: Tensor, y: Tensor) -> tuple[dict[str, float], Tensor]:
    """Scores of the averaged prediction, and the prediction ``(N, K)``."""
    probs_SNK = apd.outputs(model, posterior.get_samples(NUM_DRAWS, seed=1), x).probs_SNK
    mean_NK = probs_SNK.mean(0)
    scores = {
        "accuracy": float((mean_NK.argmax(-1) == y).float().mean()),
        "nll": float(-mean_NK[torch.arange(len(y)), y].log().mean()),
        "mutual_information": float(apd.uncertainty.mutual_information(probs_SNK).mean()),
    }
    return scores, mean_NK


def main() -> None:
    """The table, and the JSON."""
    torch.set_num_threads(1)
    model, data, posterior = distilled()
    exact, exact_NK = figures(model, posterior, data.x_test, data.y_test)
    theta_SD = posterior.layout.unconstrain(posterior.get_samples(NUM_DRAWS, seed=1))
    # Distance between 200 draws and 200 others of the same generator at full precision: Monte-Carlo error alone.
    other_NK = apd.outputs(model, posterior.get_samples(NUM_DRAWS, seed=2), data.x_test).probs_SNK.mean(0)
    noise = 0.5 * float((other_NK - exact_NK).abs().sum(-1).mean())
    results, rows = {"noise_of_200_draws": noise, "scores": exact}, []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            path = Path(folder) / dtype
            posterior.save(path, dtype)
            loaded = apd.DistilledPosterior.load(path)
            scores, mean_NK = figures(model, loaded, data.x_test, data.y_test)
            error_SD = loaded.layout.unconstrain(loaded.get_samples(NUM_DRAWS, seed=1)) - theta_SD
            found = {
                "bytes": path.stat().st_size,
                "weights": float((error_SD.square().mean() / theta_SD.var(0).mean()).sqrt()),
                "total_variation": 0.5 * float((mean_NK - exact_NK).abs().sum(-1).mean()),
                **{name: scores[name] - exact[name] for name in scores},
            }
            results[dtype] = found
            cells = [
                f"{found[n]:+.1e}" for n in ("weights", "total_variation", "accuracy", "nll", "mutual_information")
            ]
            rows.append([dtype, f"{found['bytes']:,}", *cells])
    header = ["dtype", "bytes", "weights, rms / sd", "total variation", "accuracy", "NLL", "mean MI"]
    print(markdown_table(header, rows))
    print(f"\n200 other draws at full precision: total variation {noise:.1e}. Scores: {exact}")
    write_json("precision", results)


if __name__ == "__main__":
    main()
