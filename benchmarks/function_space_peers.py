# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""BDE and BlackJAX's NUTS on the networks of :mod:`benchmarks.function_space_networks`, in a Python that has them.

``python function_space_peers.py bde|nuts IN.npz OUT.npz``. ``IN`` holds ``x``, ``y``, ``hidden`` (units per layer),
``prior_sd`` and ``seed``; for NUTS ``num_chains`` and ``num_draws``; for BDE perhaps ``n_samples``. ``OUT`` gets draws
``(C, S, ...)`` of ``weight.0``, ``bias.0`` and so on, as in PyTorch, and ``cpu_seconds``, compiling included and
imports not. Nothing of this package is imported.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

#: Of the regression in the README of ``sklearn-contrib-bde`` 1.0.2.
README = {"epochs": 200, "validation_split": 0.15, "lr": 1e-3, "weight_decay": 1e-4, "warmup_steps": 5000}
README |= {"n_samples": 2000, "n_thinning": 2, "patience": 10, "n_members": 8}


def bde(job: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Draws ``(C, S, I, O)`` and ``(C, S, O)`` by layer, at the README's settings but for the model's own."""
    from bde import BdeRegressor
    from bde.loss import GaussianNLL

    model = {"hidden_layers": job["hidden"].tolist(), "activation": "silu", "loss": GaussianNLL()}
    model |= {"prior_family": "normal", "prior_kwargs": {"scale": float(job["prior_sd"])}}
    settings = README | ({"n_samples": int(job["n_samples"])} if "n_samples" in job else {})
    regressor = BdeRegressor(**model, **settings, seed=int(job["seed"]))
    regressor.fit(job["x"], job["y"])
    return regressor.positions_eT_


def nuts(job: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The same of NUTS, from draws of the prior, with window adaptation over as many steps as there are draws."""
    import blackjax
    import jax
    import jax.numpy as jnp

    x, y, prior_sd = jnp.asarray(job["x"]), jnp.asarray(job["y"]), float(job["prior_sd"])
    sizes = [x.shape[1], *job["hidden"].tolist(), 2]

    def log_density(layers: list[tuple[Any, Any]]) -> Any:
        hidden = x
        for weight, bias in layers[:-1]:
            hidden = jax.nn.silu(hidden @ weight + bias)
        mean, raw = (hidden @ layers[-1][0] + layers[-1][1]).T
        scale = jax.nn.softplus(raw) + 1e-6
        prior = sum(jnp.sum((value / prior_sd) ** 2) for value in jax.tree_util.tree_leaves(layers))
        return -0.5 * prior - jnp.sum(0.5 * ((y - mean) / scale) ** 2 + jnp.log(scale))

    def start(key: Any) -> list[tuple[Any, Any]]:
        keys = jax.random.split(key, len(sizes))
        of_layer = [prior_sd * jax.random.normal(k, (i + 1, o)) for k, i, o in zip(keys[1:], sizes, sizes[1:])]  # noqa: B905
        return [(value[:-1], value[-1]) for value in of_layer]

    @jax.jit
    def chain(key: Any) -> list[tuple[Any, Any]]:
        begin, warm, run = jax.random.split(key, 3)
        adaptation = blackjax.window_adaptation(blackjax.nuts, log_density)
        (state, parameters), _ = adaptation.run(warm, start(begin), num_steps=int(job["num_draws"]))
        step = blackjax.nuts(log_density, **parameters).step

        def body(state: Any, key: Any) -> tuple[Any, Any]:
            state, _ = step(key, state)
            return state, state.position

        return jax.lax.scan(body, state, jax.random.split(run, int(job["num_draws"])))[1]

    keys = jax.random.split(jax.random.PRNGKey(int(job["seed"])), int(job["num_chains"]))
    chains = [jax.tree_util.tree_map(np.asarray, chain(key)) for key in keys]
    return jax.tree_util.tree_map(lambda *of_chain: np.stack(of_chain), *chains)


def main() -> None:
    """Runs the job."""
    which, source, target = sys.argv[1:]
    with np.load(source) as file:
        job = dict(file)
    import jax  # noqa: F401  its import is not what is measured

    begun = time.process_time()
    layers = {"bde": bde, "nuts": nuts}[which](job)
    draws = {}
    for i, (weight, bias) in enumerate(layers):
        draws[f"weight.{i}"], draws[f"bias.{i}"] = np.asarray(weight).swapaxes(-1, -2), np.asarray(bias)
    np.savez(target, cpu_seconds=time.process_time() - begun, **draws)


if __name__ == "__main__":
    main()
