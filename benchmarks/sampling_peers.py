# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What :mod:`benchmarks.sampling` compares with: SGLD on the same network, written in four ways, and its floor.

Each runs in its own process (:mod:`benchmarks.sampling_worker`), and takes steps only while its parent waits. All make
the same step: theta - (epsilon/2) grad U(theta) + N(0, epsilon T), with U over the full data and rows drawn at random.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

BATCH_SIZE, PRIOR_SD, STEP_SIZE, THINNING = 100, 0.141, 1e-6, 20


@dataclass(frozen=True)
class Job:
    """What a contestant is to sample, and how.

    :ivar tuple sizes: units per layer, inputs and outputs included.
    :ivar int num_data: rows of the data.
    :ivar bool is_alike: all rows are equal, so that a gradient does not depend on the batch.
    :ivar compile: setting of pyro_apd: ``"auto"``, True or False.
    """

    sizes: tuple[int, ...]
    num_data: int
    num_threads: int = 1
    device: str = "cpu"
    step_size: float = STEP_SIZE
    temperature: float = 1.0
    is_alike: bool = False
    compile: str | bool = "auto"

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs ``(N, I)`` in [-1, 1] and classes ``(N,)``."""
        generator = np.random.default_rng(0)
        x = 2 * generator.random((self.num_data, self.sizes[0]), dtype=np.float32) - 1
        y = np.random.default_rng(2).integers(0, self.sizes[-1], self.num_data)
        if self.is_alike:
            x[:], y[:] = x[0].copy(), y[0]
        return x, y

    def start(self) -> list[np.ndarray]:
        """Weights ``(O, I)`` and biases ``(O,)``, layer by layer."""
        generator = np.random.default_rng(1)
        shapes = [s for i, o in pairwise(self.sizes) for s in ((o, i), (o,))]
        return [(0.1 * generator.standard_normal(shape)).astype(np.float32) for shape in shapes]


class Contestant(ABC):
    """Something that takes SGLD steps.

    :cvar int unit: steps are taken in multiples of it.
    :cvar int num_chains: chains that one step moves.
    """

    unit = 1
    num_chains = 1

    def __init__(self, job: Job) -> None:
        self.job = job

    @abstractmethod
    def advance(self, num_steps: int) -> None:
        """Takes steps; returns when they are done, or queued on a device."""

    @abstractmethod
    def theta(self) -> np.ndarray:
        """The state ``(D,)`` or ``(C, D)``, in the order of :meth:`Job.start`."""

    def one_step(self) -> np.ndarray:
        """The state after the first step."""
        self.advance(1)
        return self.theta()

    def run(self, clock: Any) -> None:
        """Repeatedly takes as many steps as a :class:`~benchmarks.sampling_worker.Clock` asks for."""
        while True:
            self.advance(clock.next_block())


class TorchContestant(Contestant):
    """What contestants on PyTorch share: the data, and the start as leaves."""

    def __init__(self, job: Job) -> None:
        import torch

        super().__init__(job)
        torch.manual_seed(0)
        x, y = job.data()
        self.x, self.y = torch.from_numpy(x).to(job.device), torch.from_numpy(y).to(job.device)
        self.params = [torch.from_numpy(value).to(job.device) for value in job.start()]
        self.noise = math.sqrt(job.step_size * job.temperature)

    def theta(self) -> np.ndarray:
        """See :class:`Contestant`."""
        return np.concatenate([p.detach().cpu().numpy().ravel() for p in self.params])


class HandWritten(TorchContestant):
    """(a) A careful hand-written loop: the prior's gradient in closed form, the update in place.

    With the prior in the loss it takes 10 to 40 % longer, with indexing by brackets up to 6 %; one ``_foreach`` call
    for all tensors, or a factor on the weights in place of the prior's gradient, makes no difference beyond 3 %.
    """

    def advance(self, num_steps: int) -> None:
        """See :class:`Contestant`."""
        import torch
        import torch.nn.functional as F

        x, y, params, job = self.x, self.y, self.params, self.job
        scale, precision = job.num_data / BATCH_SIZE, PRIOR_SD**-2
        layers = list(zip(params[::2], params[1::2], strict=True))
        for p in params:
            p.requires_grad_()
        for _ in range(num_steps):
            rows = torch.randint(job.num_data, (BATCH_SIZE,), device=job.device)
            h = x.index_select(0, rows)
            for weight, bias in layers[:-1]:
                h = F.relu(F.linear(h, weight, bias))
            loss = scale * F.cross_entropy(F.linear(h, *layers[-1]), y.index_select(0, rows), reduction="sum")
            gradients = torch.autograd.grad(loss, params)
            with torch.no_grad():
                for p, g in zip(params, gradients, strict=True):
                    p.add_(g.add_(p, alpha=precision), alpha=-0.5 * job.step_size)
                    p.add_(torch.randn_like(p), alpha=self.noise)


class Posteriors(TorchContestant):
    """(b) ``posteriors.sgmcmc.sgld`` in place, with a log posterior as in its documentation."""

    def __init__(self, job: Job) -> None:
        import torch.nn.functional as F

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of tensordict, one for each of its classes
            import posteriors

        super().__init__(job)
        net = _network(job.sizes).to(job.device)
        function, scale = posteriors.model_to_function(net), job.num_data / BATCH_SIZE

        def log_posterior(params: dict[str, Any], batch: tuple[Any, Any]) -> tuple[Any, Any]:
            inputs, targets = batch
            logits = function(params, inputs)
            log_likelihood = -F.cross_entropy(logits, targets, reduction="sum")
            prior = posteriors.diag_normal_log_prob(params, sd_diag=PRIOR_SD, normalize=False)
            return scale * log_likelihood + prior, logits

        # Its drift is lr times the gradient, and its noise has variance 2 lr T.
        self.transform = posteriors.sgmcmc.sgld.build(log_posterior, lr=job.step_size / 2, temperature=job.temperature)
        names = [name for name, _ in net.named_parameters()]
        self.state = self.transform.init(dict(zip(names, self.params, strict=True)))

    def advance(self, num_steps: int) -> None:
        """See :class:`Contestant`."""
        import torch

        for _ in range(num_steps):
            rows = torch.randint(self.job.num_data, (BATCH_SIZE,), device=self.job.device)
            self.state, _ = self.transform.update(self.state, (self.x[rows], self.y[rows]), inplace=True)

    def theta(self) -> np.ndarray:
        """See :class:`Contestant`."""
        return np.concatenate([p.detach().cpu().numpy().ravel() for p in self.state.params.values()])


class BlackJax(Contestant):
    """(c) ``blackjax.sgld`` with the whole loop under ``lax.scan``: indices, gather, gradient and update compiled."""

    unit = 100

    def __init__(self, job: Job) -> None:
        import blackjax
        import jax
        import jax.numpy as jnp

        super().__init__(job)
        self.x, self.y = (jnp.asarray(value) for value in job.data())
        self.state = (jax.random.key(0), [jnp.asarray(value) for value in job.start()])
        self._block_until_ready = jax.block_until_ready

        def log_prior(params: list[Any]) -> Any:
            return -0.5 * PRIOR_SD**-2 * sum(jnp.sum(p**2) for p in params)

        def log_likelihood(params: list[Any], datum: tuple[Any, Any]) -> Any:
            h, y = datum
            for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
                h = jax.nn.relu(weight @ h + bias)
            return jax.nn.log_softmax(params[-2] @ h + params[-1])[y]

        gradient = blackjax.sgmcmc.gradients.grad_estimator(log_prior, log_likelihood, job.num_data)
        sgld = blackjax.sgld(gradient)

        def many(state: Any, x: Any, y: Any, num_steps: int) -> Any:
            def step(state: Any, _: None) -> tuple[Any, None]:
                key, position = state
                key, for_rows, for_noise = jax.random.split(key, 3)
                rows = jax.random.randint(for_rows, (BATCH_SIZE,), 0, job.num_data)
                # Its drift is the step times the gradient, and its noise has variance 2 T times the step.
                position = sgld.step(for_noise, position, (x[rows], y[rows]), job.step_size / 2, job.temperature)
                return (key, position), None

            return jax.lax.scan(step, state, None, length=num_steps)[0]

        self._many = jax.jit(many, static_argnums=3)

    def advance(self, num_steps: int) -> None:
        """See :class:`Contestant`."""
        for length in (self.unit,) * (num_steps // self.unit) or (num_steps,):
            self.state = self._many(self.state, self.x, self.y, length)
        self._block_until_ready(self.state)

    def theta(self) -> np.ndarray:
        """See :class:`Contestant`."""
        return np.concatenate([np.asarray(p).ravel() for p in self.state[1]])


class PyroPotential(TorchContestant):
    """(d) ``potential_fn`` of Pyro's own ``initialize_model`` at every step.

    It rejects models that subsample, so the rows are an argument of the model, a tensor that is overwritten in place.
    Validation is switched off before the priors are created, because they store the setting.
    """

    def __init__(self, job: Job) -> None:
        import pyro
        import torch
        from pyro.infer.mcmc.util import initialize_model

        super().__init__(job)
        pyro.enable_validation(False)
        self.rows = torch.arange(BATCH_SIZE, device=job.device)
        model = pyro_model(job)
        names = site_names(job)
        self.z = dict(zip(names, self.params, strict=True))
        _, self.potential_fn, _, _ = initialize_model(
            model, model_args=(self.x, self.y, self.rows), initial_params=self.z
        )

    def advance(self, num_steps: int) -> None:
        """See :class:`Contestant`."""
        import torch
        from pyro.ops.integrator import potential_grad

        for _ in range(num_steps):
            torch.randint(self.job.num_data, (BATCH_SIZE,), out=self.rows)
            gradients, _ = potential_grad(self.potential_fn, self.z)
            with torch.no_grad():
                for name, value in self.z.items():
                    value.add_(gradients[name], alpha=-0.5 * self.job.step_size)
                    value.add_(torch.randn_like(value), alpha=self.noise)


class Floor(TorchContestant):
    """The arithmetic that every SGLD step needs: gather of the batch, two products per hidden layer, the noise.

    The products are the layer's output and its weights' gradient; what a further hidden layer needs beyond these, the
    gradient with respect to its inputs, is left out, as are the output layer and everything elementwise.
    """

    def __init__(self, job: Job) -> None:
        import torch

        super().__init__(job)
        self.batch = self.x[:BATCH_SIZE].clone()
        self.normal = torch.empty(sum(p.numel() for p in self.params), device=job.device)
        self.layers: list[tuple[Any, ...]] = []
        for weight in self.params[:-2:2]:
            num_out, num_in = weight.shape
            h = self.batch if not self.layers else torch.randn(BATCH_SIZE, num_in, device=job.device)
            out, gradient = torch.empty(BATCH_SIZE, num_out, device=job.device), torch.empty_like(weight)
            self.layers.append((h, weight.T, out, torch.randn_like(out).T, gradient))

    def advance(self, num_steps: int) -> None:
        """See :class:`Contestant`."""
        import torch

        epoch = torch.randperm(self.job.num_data, device=self.job.device)
        for i in range(num_steps):
            begin = i * BATCH_SIZE % (self.job.num_data - BATCH_SIZE)
            torch.index_select(self.x, 0, epoch[begin : begin + BATCH_SIZE], out=self.batch)
            for h, weight, out, delta, gradient in self.layers:
                torch.mm(h, weight, out=out)
                torch.mm(delta, h, out=gradient)
            self.normal.normal_()


def _network(sizes: tuple[int, ...]) -> Any:
    from torch import nn

    layers: list[Any] = []
    for num_in, num_out in pairwise(sizes):
        layers += [nn.Linear(num_in, num_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def site_names(job: Job) -> list[str]:
    """Latent sites of :func:`pyro_model`, in the order of :meth:`Job.start`."""
    return [f"net.{name}" for name, _ in _network(job.sizes).named_parameters()]


def pyro_model(job: Job) -> Any:
    """The network as a Pyro model with ``PyroSample`` weights, called with ``(x, y)``, or with ``(x, y, rows)``."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.nn import PyroModule, PyroSample
    from pyro.nn.module import to_pyro_module_

    class Network(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = _network(job.sizes)
            to_pyro_module_(self.net)
            sd = torch.tensor(PRIOR_SD, device=job.device)
            for module in self.net.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    prior = dist.Normal(torch.zeros_like(sd), sd).expand(parameter.shape).to_event(parameter.dim())
                    setattr(module, name, PyroSample(prior))

        def forward(self, x: Any, y: Any, rows: Any = None) -> None:
            logits = self.net(x if rows is None else x[rows])
            with pyro.plate("data", len(x), subsample=rows):
                pyro.sample("obs", dist.Categorical(logits=logits), obs=y if rows is None else y[rows])

    return Network()
