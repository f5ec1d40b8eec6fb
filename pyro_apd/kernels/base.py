# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What every stochastic-gradient MCMC kernel shares: Pyro's kernel contract, mini-batches, and watching for divergence.

A sampler is a subclass with one method, :meth:`StochasticGradientKernel._update`: its update equation.
"""

from __future__ import annotations

import math
import os
import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_apd.kernels.chain import Chain
from pyro_apd.kernels.schedules import Schedule, as_schedule
from pyro_apd.layout import Layout
from pyro_apd.potential import build_potential
from pyro_apd.pyro_state import seeded


class StochasticGradientKernel(MCMCKernel):
    """A kernel for :class:`pyro.infer.MCMC` and :class:`~pyro.infer.mcmc.api.StreamingMCMC` with mini-batch gradients.

    Mini-batches come in three styles; in each, U is that of the full data, with the prior counted once:

    (i) the model subsamples: ``pyro.plate("data", N, subsample_size=B)`` with ``pyro.subsample`` or the plate's
        indices; give the run the full data, and the kernel draws the indices;
    (ii) ``batch_size=B``: give the run the full tensors and write the model as for full-batch NUTS; every tensor
        argument with N rows is passed on B rows at a time;
    (iii) give the run one iterable of batches, such as a :class:`~torch.utils.data.DataLoader` (with ``num_data=N``
        where the iterable has no sized ``dataset``).

    :param model: a Pyro model with continuous latents. Weights must be drawn outside the data plate.
    :param step_size: epsilon, a positive number, or a callable from the Langevin step (from 0, warm-up included) to it.
    :param int batch_size: rows a mini-batch, style (ii); None uses whatever the model and the arguments say.
    :param int num_data: N, where it is not the leading dimension of the first tensor, or the loader does not tell.
    :param int thinning: Langevin steps a draw; ``num_samples`` and ``warmup_steps`` of the driver count draws.
    :param float temperature: T of the target exp(-U/T); 1 is the posterior.
    :param init_strategy: where chains start, as for Pyro's HMC; by default a draw from the prior.
    :param int seed: makes the run reproducible without touching the global generator. Chains of one run differ. If
        None, the seed is taken from the global generator.
    :param bool capture: capture the potential as a graph of tensor operations (see :mod:`pyro_apd.potential`).
    :raises ValueError: if a number is out of range.
    """

    model: Callable[..., Any] | None = None
    transforms: dict[str, Any] | None = None
    layout: Layout | None = None

    def __init__(
        self,
        model: Callable[..., Any],
        step_size: float | Schedule,
        *,
        batch_size: int | None = None,
        num_data: int | None = None,
        thinning: int = 1,
        temperature: float = 1.0,
        init_strategy: Callable[..., Any] = init_to_sample,
        seed: int | None = None,
        capture: bool = True,
    ) -> None:
        if not callable(model):
            raise ValueError(f"model={model!r} must be a Pyro model, that is a callable; got {type(model).__name__}.")
        for name, value in (("batch_size", batch_size), ("num_data", num_data), ("thinning", thinning)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive integer.")
        if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature={temperature!r} must be a finite number >= 0; 1 is the posterior.")
        self.model = model
        self.schedule = as_schedule(step_size)
        self.batch_size, self.num_data = batch_size, num_data
        self.thinning, self.temperature = thinning, float(temperature)
        self.init_strategy, self.seed, self.capture = init_strategy, seed, capture
        self._initial_params: dict[str, Tensor] | None = None
        self._chain: Chain | None = None
        self._num_chains_begun = 0
        self._home = (os.getpid(), torch.initial_seed())
        self._last_params: dict[str, Tensor] | None = None
        self._warmup_steps = self._num_draws = 0
        self._log: OrderedDict[str, str] = OrderedDict()
        self._started_at = self._logged_at = 0.0

    # -- Pyro's contract ----------------------------------------------------------------------------------------------

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Prepares a chain on the arguments of a run. The driver calls this.

        :raises ModelError: if the model's scaling cannot be established; the message says how to mend the model.
        :raises DataError: if the data are NaN, infinite, or outside the likelihood's support.
        :raises ValueError: if ``batch_size`` does not fit the data, or ``initial_params`` does not fit the model.
        """
        assert self.model is not None
        self._warmup_steps, self._num_draws = warmup_steps, 0
        self._started_at, self._logged_at = time.monotonic(), 0.0
        self._log = OrderedDict()
        seed = self._next_seed()
        with seeded(seed):
            potential, start = build_potential(
                InitMessenger(self.init_strategy)(self.model),
                args,
                kwargs,
                batch_size=self.batch_size,
                num_data=self.num_data,
                capture=self.capture,
            )
        # The strategy served to find the start. From here on every latent is given, and the bare model is enough.
        potential.model = self.model
        self.layout, self.transforms = potential.layout, potential.layout.transforms
        theta = potential.layout.unconstrain(start).detach()
        if self._initial_params is not None:
            theta = _checked_start(self._initial_params, potential.layout, theta)
        self._initial_params = potential.layout.split(theta)
        self._chain = Chain(potential, theta, self.schedule, self._update, seed, type(self).__name__)
        self._start_chain(self._chain)

    @property
    def initial_params(self) -> dict[str, Tensor] | None:
        """Where the chain starts: unconstrained values by site. Set it before ``setup``, and it is honoured."""
        return self._initial_params

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor] | None) -> None:
        self._initial_params = None if params is None else dict(params)

    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next draw: ``thinning`` Langevin steps on from the unconstrained ``params``.

        :raises DivergenceError: if the chain ran away; its ``draws`` hold what came before.
        """
        chain = self._running_chain()
        is_warm = self._num_draws >= self._warmup_steps
        self._num_draws += 1
        if len(chain.layout) == 0:
            return {}
        with torch.no_grad():
            if params is not self._last_params:
                chain.theta.copy_(chain.layout.join(params))
            chain.advance(self.thinning)
            self._last_params = chain.layout.split(chain.record(keep=is_warm))
        return self._last_params

    def logging(self) -> OrderedDict[str, str]:
        """What the progress bar shows. On a GPU it is read twice a second only, since reading waits for the device."""
        chain, now = self._running_chain(), time.monotonic()
        if chain.step and (chain.theta.device.type == "cpu" or now - self._logged_at > 0.5):
            self._log["step size"] = f"{chain.step_size:.2e}"
            self._log["potential"] = f"{float(chain.energy):.4g}"
            self._log["|grad|"] = f"{float(chain.gradient_norm):.3g}"
            self._log["steps/s"] = f"{chain.step / max(now - self._started_at, 1e-9):.0f}"
            self._logged_at = now
        return self._log

    def diagnostics(self) -> dict[str, Any]:
        """Of the finished chain: ``divergences`` (indices of draws; empty, as a chain that diverges raises) and, one
        entry a draw, ``potential`` (U on that draw's mini-batch), ``grad_norm`` and ``step_size``.

        :raises DivergenceError: if the last steps ran away unnoticed.
        """
        chain = self._running_chain()
        chain.check()
        series = {name: torch.stack(values) if values else torch.empty(0) for name, values in chain.trace.items()}
        return {"divergences": [], **{name: values.cpu() for name, values in series.items()}}

    def cleanup(self) -> None:
        """Lets go of the data and the chain's buffers. Safe to call twice; ``layout`` and ``transforms`` stay."""
        self._initial_params = None
        self._chain = None
        self._last_params = None

    def __getstate__(self) -> dict[str, Any]:
        # Generators, graphs and open loaders do not pickle; setup makes new ones in the process that samples.
        return {**self.__dict__, "_chain": None, "_last_params": None}

    # -- what a sampler defines ---------------------------------------------------------------------------------------

    @abstractmethod
    def _update(self, chain: Chain, gradient: Tensor, step_size: float) -> None:
        """Moves ``chain.theta`` ``(D,)`` in place by one step, given the gradient of U there."""

    def _start_chain(self, chain: Chain) -> None:
        """Prepares what the sampler keeps beside theta, such as momenta, in ``chain.auxiliary``."""

    # -- internals ----------------------------------------------------------------------------------------------------

    def _running_chain(self) -> Chain:
        if self._chain is None:
            raise RuntimeError(f"{type(self).__name__}.setup(warmup_steps, *args) comes first; the driver calls it.")
        return self._chain

    def _next_seed(self) -> int:
        """A seed for the next chain: by the number of chains begun before and, in a worker process, by its own."""
        if self.seed is None:
            return int(torch.randint(2**62, ()))
        worker = 0
        if os.getpid() != self._home[0]:
            # Pyro seeds the worker of chain i with the parent's initial seed plus i.
            worker = (torch.initial_seed() - self._home[1]) % 2**31
        stream = self.seed * 1_000_003 + self._num_chains_begun * 7_919 + worker
        self._num_chains_begun += 1
        return int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(stream % 2**62)))


def _checked_start(given: Mapping[str, Tensor], layout: Layout, like: Tensor) -> Tensor:
    """``initial_params`` as one vector.

    :raises ValueError: if sites or shapes are not the model's, or a value is not finite.
    """
    expected = {site.name: site.unconstrained_shape for site in layout}
    shapes = {name: tuple(torch.as_tensor(value).shape) for name, value in given.items()}
    if shapes != expected:
        raise ValueError(
            f"initial_params has sites and shapes {shapes}, but the model's unconstrained latents are {expected}. "
            "Values are unconstrained; for several chains MCMC(initial_params=) wants a leading dimension of chains."
        )
    theta = layout.join({name: torch.as_tensor(value).detach() for name, value in given.items()}).to(like)
    if not bool(torch.isfinite(theta).all()):
        raise ValueError("initial_params holds NaN or infinite values.")
    return theta
