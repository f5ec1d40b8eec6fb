# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The posteriors compared in the paper's tables, fitted once per setting and seed, and cached.

Faithful: on the draws after 500 steps. Corrected: on a chain with sufficient burn-in, beside the baselines that were
missing. Two errors of the published code are in neither: in its active learning the generator was never trained, and
its MC-dropout did not drop units.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pyro_apd as apd
from benchmarks import distillation_cases
from benchmarks.distillation_cases import Problem
from benchmarks.paper.common import Options, warnings_noted
from benchmarks.paper.settings import Setting
from pyro_apd import baselines

Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Fitted:
    """A posterior, and its cost.

    :ivar posterior: draws by site ``(S, ...)``, or an object with ``get_samples``.
    :ivar int num_bytes: bytes to store it.
    :ivar float seconds: to fit it, without the chain that it may use.
    :ivar list notes: warnings during the fit.
    """

    posterior: Any
    num_bytes: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    def draws(self, count: int, seed: int) -> Draws:
        """This number of draws; a random choice of stored ones, or all if there are no more."""
        if not isinstance(self.posterior, Mapping):
            samples: Draws = self.posterior.get_samples(count, seed=seed)
            return samples
        total = len(next(iter(self.posterior.values())))
        if total <= count:
            return dict(self.posterior)
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values
        return {name: value[chosen.to(value.device)] for name, value in self.posterior.items()}


@dataclass(frozen=True)
class Material:
    """What a method may use."""

    setting: Setting
    problem: Problem
    seed: int

    @property
    def chain(self) -> Draws:
        """All draws of the chain, ``(S, ...)`` by site."""
        store = self.setting.chain(self.problem, self.seed)
        theta_SD = store.theta_CSD.transpose(0, 1).flatten(0, 1).to(self.setting.options.device)
        return store.layout.constrain(theta_SD)


def sgld(material: Material) -> Draws:
    """The chain's draws."""
    return material.chain


def stochastic_gradient(material: Material) -> Draws:
    """One network, as published: rate 0.05, no momentum, the best of several checks on the validation rows."""
    return baselines.map_estimate(material.problem.model, *material.problem.train, **_training(material))


def dropout(material: Material) -> Any:
    """The same with half of the hidden units dropped."""
    return baselines.mc_dropout(material.problem.model, *material.problem.train, rate=0.5, **_training(material))


def ensemble(material: Material) -> Draws:
    """Five point estimates."""
    return baselines.deep_ensemble(
        material.problem.model, *material.problem.train, num_networks=5, **_training(material)
    )


def swag(material: Material) -> Any:
    """A Gaussian along the path of a point estimate."""
    options, settings = material.setting.options, _training(material)
    settings = {name: value for name, value in settings.items() if name not in ("validation", "check_every")}
    more = {"rank": 10, "num_iterates": options.by_budget(10, 30, 200)}
    more["steps_per_iterate"] = options.by_budget(2, 100, 500)
    return baselines.swag(material.problem.model, *material.problem.train, **more, **settings)


def distilled(material: Material) -> Any:
    """Ours."""
    return _distil(material, num_steps=material.setting.options.by_budget(5, None, None))


def distilled_as_published(material: Material) -> Any:
    """The paper's generator: 100,000 steps with the full budget, as published; fewer with the CPU budget."""
    return _distil(material, num_steps=material.setting.options.by_budget(5, PAPER_STEPS, 100_000), generator="paper")


def distilled_online(material: Material) -> Any:
    """Chains and generator advance together, and draw as many networks as the stored chain has."""
    options, chains = material.setting.options, material.setting.case.chains
    num_chains = options.by_budget(2, 4, 4)
    return apd.distill_online(
        material.setting.kernel(material.problem, material.seed),
        *material.problem.train,
        num_samples=chains.num_draws // num_chains,
        warmup_steps=chains.warmup,
        num_chains=num_chains,
        num_steps=options.by_budget(5, None, None),
        seed=material.seed,
        progress=False,
    )


def _training(material: Material) -> dict[str, Any]:
    options = material.setting.options
    return {
        "batch_size": 100,
        "num_steps": options.by_budget(40, 10_000, 200_000),
        "learning_rate": 0.05,
        "validation": material.problem.validation,
        "check_every": options.by_budget(20, 1000, 1000),
        "seed": material.seed,
        "progress": False,
    }


def _distil(material: Material, **settings: Any) -> Any:
    problem = material.problem
    return apd.distill(
        material.chain, problem.model, data=problem.train, seed=material.seed, progress=False, **settings
    )


#: Steps of the paper's generator on the digits on the CPU budget, of the 100,000 that are published.
PAPER_STEPS = 1500
#: Methods that the CPU budget leaves out on MNIST, unless they are requested by name.
EXPENSIVE = ("APD, online", "APD, paper's generator", "deep ensemble", "SWAG")

METHODS: dict[str, Callable[[Material], Any]] = {
    "SGD": stochastic_gradient,
    "MC-dropout": dropout,
    "SGLD": sgld,
    "APD": distilled,
    "APD, online": distilled_online,
    "APD, paper's generator": distilled_as_published,
    "stored draws, thinned": lambda material: baselines.stored_draws(material.chain, STORED),
    "SWAG": swag,
    "deep ensemble": ensemble,
}
#: Networks of float32 that the stored draws may take: as many as our generator.
STORED = 12
#: Methods that need no chain, and are therefore the same in both protocols.
WITHOUT_CHAIN = ("SGD", "MC-dropout", "deep ensemble", "SWAG")
#: In the paper's tables, and ours on the same chain.
PUBLISHED = ("SGD", "MC-dropout", "SGLD", "APD, paper's generator", "APD")


def methods(options: Options) -> list[str]:
    """Names of the methods that a protocol compares: faithful, those of the paper and ours; corrected, all.

    Left out with the CPU budget on MNIST: the paper's generator, whose step takes three seconds of one core, so that
    100,000 take three and a half days; and methods that run their own chains or train their own networks. On the digits
    all are run, and ``--methods`` runs those it names.
    """
    names = [name for name in METHODS if not options.is_faithful or name in PUBLISHED]
    if options.has_images and options.budget == "cpu" and options.only is None:
        names = [name for name in names if name not in EXPENSIVE]
    return [name for name in names if options.wants(name)]


def fitted(method: str, setting: Setting, problem: Problem, seed: int) -> Fitted:
    """A posterior: from the cache, else fitted and cached. Chains have a separate cache."""
    material = Material(setting, problem, seed)
    if method == "SGLD":
        return of(sgld(material), 0.0)
    slug = "".join(c if c.isalnum() else "_" for c in method.lower())
    name = setting.case.name if method not in WITHOUT_CHAIN else setting.case.name.split("-")[0]
    path = distillation_cases.CACHE / "paper" / f"{name}-{setting.options.budget}-{seed}" / slug
    if not path.with_suffix(".json").exists():
        torch.manual_seed(seed)
        start = time.monotonic()
        with warnings_noted() as notes:
            posterior = METHODS[method](material)
        _keep(path, posterior, {"seconds": time.monotonic() - start, "notes": notes})
    return _load(path, setting.options.device)


def of(posterior: Any, seconds: float, notes: Sequence[str] = ()) -> Fitted:
    """A posterior with its size."""
    if isinstance(posterior, Mapping):
        num_bytes = sum(value.numel() * value.element_size() for value in posterior.values())
    else:
        num_bytes = posterior.num_bytes
    return Fitted(posterior, num_bytes, seconds, list(notes))


def _keep(path: Path, posterior: Any, facts: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_draws = isinstance(posterior, Mapping)
    if is_draws:
        save_file({name: value.contiguous().cpu() for name, value in posterior.items()}, path.with_suffix(".draws"))
    else:
        posterior.save(path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps({**facts, "is_draws": is_draws}))


def _load(path: Path, device: str) -> Fitted:
    known = json.loads(path.with_suffix(".json").read_text())
    if known["is_draws"]:
        draws = load_file(path.with_suffix(".draws"))
        return of({name: value.to(device) for name, value in draws.items()}, known["seconds"], known["notes"])
    posterior = apd.DistilledPosterior.load(path.with_suffix(".safetensors"), device=device)
    return of(posterior, known["seconds"], known["notes"])
