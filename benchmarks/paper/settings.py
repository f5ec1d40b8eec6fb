# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The network, data and chain of an experiment on images, in either protocol.

Faithful: chains start at PyTorch's initialisation of a network, with a burn-in of 500 steps, although the prior's
directions need 40,000. Corrected: they start at a draw from the prior, with a burn-in of 40,000 steps. Both have the
published step size, prior and batches, and 200,000 steps in total, except for the faithful chain with the CPU budget,
which has 40,000. Chains are kept in the cache of :mod:`benchmarks.distillation_cases`, whose own chains are those of
the corrected protocol.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import distillation_cases
from benchmarks.distillation_cases import CASES, Case, Chains, Problem
from benchmarks.paper.common import Options, warnings_noted
from pyro_apd import MCMC, SGLD, open_store
from pyro_apd.chains.stores.base import DrawStore
from pyro_apd.runtime.global_state import seeded


@dataclass(frozen=True)
class Setting:
    """A case, and its options.

    :ivar Case case: model, data and chain.
    :ivar Options options: protocol and budget.
    """

    case: Case
    options: Options

    def problem(self, seed: int) -> Problem:
        """Model and rows, on the requested device."""
        with seeded(seed):
            problem = self.case.build(seed)
        device = self.options.device
        return Problem(
            problem.model.to(device),
            _moved(problem.train, device),
            _moved(problem.test, device),
            {name: x.to(device) for name, x in problem.ood.items()},
            None if problem.validation is None else _moved(problem.validation, device),
        )

    def chain(self, problem: Problem, seed: int) -> DrawStore:
        """Draws of SGLD: from the cache, else sampled and cached."""
        folder, chains = distillation_cases.CACHE / f"{self.case.name}-{seed}", self.case.chains
        if not (folder / "complete").exists():
            kernel = self.kernel(problem, seed)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / "draws", ignore_errors=True)  # of an interrupted run
            keep = {"store": "disk", "store_path": folder / "draws", "disable_progbar": True}
            with warnings_noted() as notes:
                MCMC(kernel, chains.num_draws, warmup_steps=chains.warmup, **keep).run(*problem.train)
            (folder / "complete").write_text("\n".join(notes))
        return open_store(folder / "draws")

    def kernel(self, problem: Problem, seed: int) -> SGLD:
        """The sampler of the protocol."""
        chains = self.case.chains
        start = {"init_strategy": problem.model.init_to_network}
        return SGLD(
            problem.model,
            chains.step_size,
            batch_size=chains.batch_size,
            thinning=chains.thinning,
            seed=seed,
            **(start if self.options.is_faithful else {}),
        )


def image_setting(options: Options, hidden: tuple[int, ...] = (100,)) -> Setting:
    """The network of the paper with these hidden layers on MNIST; 64-50-10 on the digits if there are no data."""
    if not options.has_images:
        case = CASES["digits"]
        chains = Chains(1e-4, 100, 5, 40, 60) if options.is_smoke else case.chains
        if options.is_faithful:
            chains = replace(chains, warmup=max(1, 500 // chains.thinning) if not options.is_smoke else 4)
        return Setting(_renamed(case, chains, options), options)
    case = CASES["mnist" if hidden == (100,) else "mnist400"]
    if hidden not in ((100,), (400, 400)):
        raise ValueError(f"The paper's networks have hidden layers (100,) and (400, 400); got {hidden}.")
    chains = case.chains
    if (
        options.is_faithful
    ):  # 500 steps of burn-in; as published 200,000 steps and a draw every 20, if the budget allows
        chains = replace(chains, thinning=20, warmup=25, num_draws=9975)
        if options.budget != "full":
            chains = replace(chains, thinning=50, warmup=10, num_draws=790)
    return Setting(_renamed(case, chains, options), options)


def _renamed(case: Case, chains: Chains, options: Options) -> Case:
    """A separate name in the cache for a separate chain."""
    if chains == case.chains and not options.is_faithful:
        return case
    parts = [case.name, options.protocol, *([options.budget] if options.budget != "cpu" else [])]
    return replace(case, name="-".join(parts), chains=chains)


def _moved(rows: tuple[Tensor, Tensor], device: str | torch.device) -> tuple[Tensor, Tensor]:
    return rows[0].to(device), rows[1].to(device)
