# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One self-contained HTML page about a distilled posterior: the verdict first, then the evidence."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_apd.chains.summary import sampler_summary, summary_lines
from pyro_apd.diagnostics.arviz_export.export import sample_stats, versions
from pyro_apd.diagnostics.comparison.evaluation import Inputs, check_sampled_model, find_inputs, model_of
from pyro_apd.diagnostics.comparison.fidelity import compare
from pyro_apd.diagnostics.comparison.split import split_draws
from pyro_apd.diagnostics.draws import draw_shapes, flat, kernel_settings
from pyro_apd.diagnostics.formatting import counted, format_bytes, format_number
from pyro_apd.diagnostics.html import pictures
from pyro_apd.diagnostics.html.examples import check_image_shape, examples
from pyro_apd.diagnostics.mixing.function_space import FunctionProbe
from pyro_apd.diagnostics.mixing.health import Health, chain_health, layer_health
from pyro_apd.models.bnn import BNN
from pyro_apd.predictive.chain_draws import ChainDraws
from pyro_apd.predictive.draws import ChainsLike, PosteriorLike, evenly_spaced, read_chains, read_draws
from pyro_apd.runtime.files import atomic_write
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.optional_packages import require

if TYPE_CHECKING:
    from pyro_apd.diagnostics.comparison.fidelity_table import Fidelity

_FUNCTIONS, _FUNCTION_DRAWS = 6, 1000
# Prior scales that are named.
_SCALES = 6


def report(
    mcmc: ChainsLike,
    posterior: PosteriorLike,
    model: Callable[..., Any] | None = None,
    x: Any = None,
    y: Tensor | None = None,
    *,
    path: str | os.PathLike[str],
    ood: Mapping[str, Any] | None = None,
    baselines: Mapping[str, PosteriorLike] | None = None,
    fidelity: Fidelity | None = None,
    title: str = "A distilled posterior against its chain",
    num_samples: int = 100,
    seed: int | None = 0,
    group_by_chain: bool | None = None,
    image_shape: Sequence[int] | None = None,
) -> Path:
    """Writes one HTML page that needs no network and no JavaScript, and returns its path.

    Verdict and table of function space come first, then figures of predictions, weights, health of the chain and
    training, and the provenance. It follows the reader's light or dark setting. The same arguments and
    seed give the same file. It appears whole or not at all.

    Arguments not named here are those of :func:`~pyro_apd.diagnostics.compare`.

    :param path: the file to write.
    :param Fidelity fidelity: of :func:`~pyro_apd.diagnostics.compare` on the same arguments, if at hand.
    :param str title: heading of the page.
    :param image_shape: ``(H, W)`` or ``(C, H, W)``, where inputs are images in flat rows. Images of which chain and
        generator are most and least sure are shown, or rows of a table.
    :raises FileNotFoundError: if the folder does not exist.
    :raises ValueError: as :func:`~pyro_apd.diagnostics.compare`.
    :raises ArtifactError: likewise.
    """
    # Opened and checked first, so that mistakes cost no computation.
    with atomic_write(path) as temporary:
        check_image_shape(x, image_shape)
        if fidelity is None:
            fidelity = compare(
                *(mcmc, posterior, model, x, y),
                ood=ood,
                baselines=baselines,
                num_samples=num_samples,
                seed=seed,
                group_by_chain=group_by_chain,
            )
        chain = read_chains(mcmc, shapes=draw_shapes(posterior), group_by_chain=group_by_chain)
        page = {"title": title, "seed": seed, **_of_fidelity(fidelity)}
        page |= _of_draws(chain, posterior, fidelity, seed)
        model = model_of(mcmc, model)
        inputs = find_inputs(mcmc, model, x, y, ood)[0]
        check_sampled_model((mcmc, posterior), model, chain.pooled([0]), inputs)
        page["functions"] = _functions(chain, posterior, model, inputs, fidelity, seed)
        page["example_rows"], page["example_pictures"] = examples(fidelity.per_input, inputs, image_shape)
        page |= _of_run(mcmc, chain, model, inputs, seed)
        page["settings"] = {**_of_model(model, posterior), **page["settings"]}
        temporary.write_text(_render(page), encoding="utf-8")
    return Path(path)


def _of_fidelity(fidelity: Fidelity) -> dict[str, Any]:
    return {
        "fidelity": fidelity,
        "function_rows": [row for row in fidelity.rows if row.group != "weight space"],
        "weight_rows": [row for row in fidelity.rows if row.group == "weight space"],
        "predictions": pictures.of_predictions(fidelity),
        "ledger": _ledger(fidelity),
        "negative_energy": any(row.name.startswith("energy") and row.generator < 0 for row in fidelity.rows),
    }


def _of_draws(chain: ChainDraws, posterior: PosteriorLike, fidelity: Fidelity, seed: int | None) -> dict[str, Any]:
    """Weights, and what the file of the posterior holds."""
    draws = split_draws(chain, posterior, fidelity.num_samples, seed).draws
    thetas = {which: flat(draws[which], list(chain.values)) for which in ("chain", "generator")}
    return {
        "weights": pictures.of_weights(thetas["chain"], thetas["generator"], (fidelity.chain_name, "generator")),
        "training": pictures.of_training(getattr(posterior, "training_log", None) or {}),
        "metadata": _metadata(posterior),
    }


def _of_run(
    mcmc: object, chain: ChainDraws, model: Callable[..., Any] | None, inputs: Inputs | None, seed: int | None
) -> dict[str, Any]:
    """Health and provenance of the chain."""
    stats = sample_stats(mcmc, chain)
    with seeded(seed, chain.device):
        health = chain_health(chain, stats, model, inputs)
    return {
        "health": [_health(row) for row in health],
        "layers": layer_health(chain),
        "num_chains": chain.num_chains,
        "num_draws": chain.num_draws,
        "remarks": chain.remarks(),
        "divergences": int(stats["diverging"].sum()) if "diverging" in stats else None,
        "traces": pictures.of_chain(stats, chain.name),
        "settings": kernel_settings(mcmc),
        "sampler": summary_lines(sampler_summary(mcmc)),
        "versions": versions(),
    }


def _of_model(model: Callable[..., Any] | None, posterior: PosteriorLike) -> dict[str, Any]:
    """Model, likelihood, prior, and digest of the data, as far as they are known."""
    metadata = getattr(posterior, "metadata", None) or {}
    found: dict[str, Any] = {} if model is None else {"model": getattr(model, "__name__", type(model).__name__)}
    if isinstance(model, BNN):
        scales = sorted({f"{float(scale):.3g}" for scale in _prior_scales(model)})
        found |= {"likelihood": model.likelihood, "prior scales": ", ".join(scales[:_SCALES]) or "of your own"}
    if isinstance(metadata.get("data"), str):
        found["digest of the data"] = metadata["data"]
    if "seed" in metadata:
        found["seed of the distillation"] = metadata["seed"]
    return found


def _prior_scales(model: BNN) -> list[Tensor]:
    """Standard deviations of priors that are Gaussian, where all entries of a site have the same."""
    found = []
    for prior in model.priors.values():
        scale = getattr(getattr(prior, "base_dist", prior), "scale", None)
        if isinstance(scale, Tensor) and scale.numel() and bool((scale == scale.flatten()[0]).all()):
            found.append(scale.flatten()[0])
    return found


def _functions(
    chain: ChainDraws,
    posterior: PosteriorLike,
    model: Callable[..., Any] | None,
    inputs: Inputs | None,
    fidelity: Fidelity,
    seed: int | None,
) -> list[pictures.Picture]:
    """Function values on a few inputs, where there are any."""
    if model is None or inputs is None:
        return []
    steps = evenly_spaced(chain.num_draws, max(10, _FUNCTION_DRAWS // chain.num_chains))
    with seeded(seed, chain.device):
        probe = FunctionProbe(model, inputs, _FUNCTIONS)
        chain_SF = probe(chain.pooled(steps))
        draws = read_draws(posterior, max(fidelity.num_samples, 200), seed=seed)
        generator_SF = probe({name: value.to(chain.device) for name, value in draws.items()})
    if chain_SF is None or generator_SF is None:
        return []
    by_chain = chain_SF.reshape(chain.num_chains, len(steps), -1)
    return pictures.of_functions(by_chain, generator_SF, probe.names, (fidelity.chain_name, "generator"))


def _render(page: Mapping[str, Any]) -> str:
    jinja2 = require("jinja2", purpose="A report")

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": format_number, "bytes": format_bytes, "counted": counted}
    source = resources.files("pyro_apd.diagnostics.html").joinpath("report.html.jinja").read_text(encoding="utf-8")
    text: str = environment.from_string(source).render(page)
    return text


def _health(row: Health) -> dict[str, Any]:
    if math.isnan(row.rhat):
        words = "one chain: no R-hat" if not math.isnan(row.ess_bulk) else "constant, or too few draws"
    else:
        words = "mixed" if row.rhat < 1.05 else "mixes slowly" if row.rhat < 1.2 else "not mixed"
    return {
        "name": row.name,
        "group": row.group,
        "rhat": row.rhat,
        "bulk": row.ess_bulk,
        "tail": row.ess_tail,
        "words": words,
    }


def _ledger(fidelity: Fidelity) -> list[tuple[str, int, float]]:
    size = fidelity.num_bytes
    entries = [("one network", size["network"]), ("all draws of the chain", size["chain"])]
    entries += [
        ("the generator's file", size["generator"]),
        (counted(fidelity.num_stored, "stored draw"), size["stored"]),
    ]
    entries += [(name, size[name]) for name in fidelity.baselines]
    return [(name, value, value / size["network"]) for name, value in entries]


def _metadata(posterior: object) -> str:
    metadata = getattr(posterior, "metadata", None)
    return json.dumps(metadata, indent=2, sort_keys=True, default=str) if isinstance(metadata, Mapping) else ""
