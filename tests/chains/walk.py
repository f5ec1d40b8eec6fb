# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A kernel that walks at random, diverges when told to, and costs nothing: what the driver needs, and no more."""

from collections import OrderedDict

import torch
from torch.distributions import constraints

from pyro_apd.errors import DivergenceError
from pyro_apd.models.layout import Layout

LAYOUT = Layout({"w": (3,), "scale": (), "b": (2, 2)}, {"scale": constraints.positive})


class WalkChain:
    """One chain, or several vectorised; chain i is the same in both."""

    def __init__(self, kernel, chains, start):
        self.kernel, self.layout, self.chains, self.first = kernel, kernel.layout, chains, chains.first
        self._is_single = chains.count is None
        self._generators = [torch.Generator().manual_seed(seed) for seed in chains.seeds(kernel.seed)]
        self._theta = torch.stack([torch.randn(self.layout.size, generator=g) for g in self._generators])
        if start is not None:
            self._theta = self.layout.join(start).reshape(chains.size, -1).clone()
        self.step, self.is_warm, self.divergences = 0, False, []
        self.num_observed = 0

    @property
    def theta(self):
        return self._theta[0] if self._is_single else self._theta

    def advance(self, num_steps):
        for _ in range(num_steps):
            self.step += 1
            for i, generator in enumerate(self._generators):
                if any(error.chain == i for error in self.divergences):
                    continue
                if self.step == self.kernel.noticed_after.get(self.first + i):
                    self._diverge(i)
                    continue
                noise = torch.randn(self.layout.size, generator=generator)
                self._theta[i] = 0.5 * self._theta[i] + noise
                if self.step > self.kernel.diverges_after.get(self.first + i, 10**9):
                    self._theta[i] = torch.inf

    def _diverge(self, i):
        error = DivergenceError(
            f"chain {self.first + i} ran away",
            step=self.step,
            site="w",
            step_size=1.0,
            suggested_step_size=0.1,
            draws={},
            chain=i,
            last_good_step=max(self.step - self.kernel.look_every, 0),
        )
        self._theta[i] = -7.0  # the last good state
        self.divergences.append(error)
        if len(self.divergences) == len(self._generators) and self.chains.is_whole_run:
            raise error

    def end_warmup(self):
        assert not self.is_warm
        self.is_warm = True

    def statistics(self):
        energy = self._theta.square().sum(-1)
        energy = energy[0] if self._is_single else energy
        return {"potential": energy, "grad_norm": 2 * energy, "step_size": 0.1}

    def observe(self):
        self.num_observed += 1

    def fixed_point_values(self):
        return {"prior": None, "likelihood": None}

    def state_dict(self):
        generators = [generator.get_state() for generator in self._generators]
        progress = {"step": self.step, "is_warm": self.is_warm, "num_observed": self.num_observed}
        return {"theta": self._theta, "generators": generators, **progress}

    def load_state_dict(self, state):
        self._theta, self.step, self.is_warm = state["theta"].clone(), state["step"], state["is_warm"]
        self.num_observed = state["num_observed"]
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.set_state(saved)


class Walk:
    """:param dict diverges_after: the last good step by chain; it is noticed two steps later.
    :param int look_every: steps since the chain was last found well, when it is noticed.
    """

    model = None

    def __init__(self, seed=0, thinning=1, diverges_after=None, layout=LAYOUT, look_every=2):
        self.seed, self.thinning, self.layout = seed, thinning, layout
        self.transforms = layout.transforms
        self.diverges_after = dict(diverges_after or {})
        self.noticed_after = {chain: step + 2 for chain, step in self.diverges_after.items()}
        self._num_ended, self.look_every = 0, look_every

    def begin(self, args, kwargs, *, warmup_steps, num_samples, chains, initial_params):
        return WalkChain(self, chains, initial_params)

    def end(self, chain):
        self._num_ended += 1

    def report(self, chain):
        return {"path": f"on foot, seen {chain.num_observed} times"}

    def cleanup(self):
        pass

    def logging(self):
        return OrderedDict([("steps/s", "1")])
