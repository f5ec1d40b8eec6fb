# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A Pyro model as a potential U(theta, mini-batch) and its gradient.

    U(theta) = - log p(theta) - log |d constrained / d theta| - (N/B) sum over the batch of log p(y | theta)

The model's Python code, with all of Pyro's handlers, runs a few times. What it computes is captured as a graph of
tensor operations in (theta, what changes with the batch), and that graph runs at every step. Independent Gaussian
priors, which carry most weights of a Bayesian neural network, enter in closed form. A graph is used only after it has
reproduced the model at points it was not captured at; otherwise the model is traced at every step, as Pyro would.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_apd.errors import DataError
from pyro_apd.minibatch import (
    Call,
    FullBatch,
    LoaderBatches,
    MinibatchSource,
    PlateSubsample,
    RowSubsample,
    check_finite,
    is_loader,
)
from pyro_apd.scaling import Anatomy, check_densities, examine, run_model, subsampled_plates

logger = logging.getLogger("pyro_apd")

Inputs = tuple[Tensor, ...]
GradientAndValue = Callable[..., tuple[Tensor, Tensor]]


class Potential:
    """The potential of a model under a source of mini-batches.

    :param model: a Pyro model.
    :param source: where its mini-batches come from.
    :param Anatomy anatomy: what :func:`~pyro_apd.scaling.examine` established about the model.
    :param bool capture: whether to try the captured graph; otherwise the model is traced at every step.
    :ivar str path: ``"captured"`` or ``"traced"``, once a gradient was asked for.
    """

    def __init__(
        self, model: Callable[..., Any], source: MinibatchSource, anatomy: Anatomy, *, capture: bool = True
    ) -> None:
        self.model, self.source, self.layout = model, source, anatomy.layout
        self._anatomy = anatomy
        self._latents = frozenset(anatomy.layout.names)
        self._is_capturing = capture
        self._graphs: dict[tuple[Any, ...], GradientAndValue] = {}
        self._gaussian: _GaussianPrior | None = None
        self.path = "traced"

    def value(self, theta: Tensor, inputs: Inputs) -> Tensor:
        """U at ``theta`` ``(D,)``, by running the model; a scalar."""
        return self._by_trace(self.model, theta, inputs, frozenset())

    def gradient(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Gradient of U ``(D,)`` and U at ``theta`` ``(D,)``, on the batch ``inputs`` that the source drew."""
        if not self._is_capturing:
            return self.traced_gradient(theta, inputs)
        key = tuple((tuple(t.shape), t.dtype) for t in inputs)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._prepare(theta, inputs)
        return graph(theta, *inputs)

    def traced_gradient(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The same through the model's own code: slower, and right for any model that Pyro can run."""
        with torch.enable_grad(), pyro.validation_enabled(False):
            leaf = theta.detach().requires_grad_()
            energy = self.value(leaf, inputs)
            (gradient,) = torch.autograd.grad(energy, leaf)
        return gradient, energy.detach()

    def _by_trace(self, model: Callable[..., Any], theta: Tensor, inputs: Inputs, skipped: frozenset[str]) -> Tensor:
        call = self.source.bind(inputs)
        if self._anatomy.pass_through:
            rows = inputs[0].shape[0]
            indices = {name: torch.arange(rows) for name in self._anatomy.pass_through}
            call = Call(call.args, call.kwargs, {**call.indices, **indices})
        trace = run_model(model, call, self.layout.constrain(theta))
        scaled = self._anatomy.scaled
        log_joint = trace.log_prob_sum(lambda name, site: name not in scaled and name not in skipped)
        if scaled:
            by_kernel, by_model = self.source.scale(inputs), 1.0
            if any(scaled.values()):
                # A plate's own N/B is exact for its batch; see LoaderBatches for why an epoch may want another.
                assert self.source.num_data is not None
                by_model = by_kernel * inputs[0].shape[0] / self.source.num_data
            for is_scaled, factor in ((False, by_kernel), (True, by_model)):
                names = frozenset(name for name, flag in scaled.items() if flag == is_scaled)
                if names:
                    log_joint = log_joint + factor * trace.log_prob_sum(lambda name, site, n=names: name in n)
        if not self.layout.is_real:
            log_joint = log_joint + self.layout.log_abs_det_jacobian(theta)
        # Where every site has a closed form, what is left is a number, and still must be a function of theta.
        return -(log_joint if isinstance(log_joint, Tensor) else log_joint + 0.0 * theta.sum())

    def _prepare(self, theta: Tensor, inputs: Inputs) -> GradientAndValue:
        """The captured graph for inputs of these shapes, or the traced path with the reason logged."""
        try:
            if self._gaussian is None:
                self._gaussian = _GaussianPrior.of(self, theta, inputs)
            graph = self._capture(theta, inputs)
            self._verify(graph, theta, inputs)
        except DataError:
            raise
        except Exception as error:  # whatever a model does that a graph cannot, tracing still can
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("The model is traced at every step, which is slower: it cannot be captured (%s).", reason)
            self.path = "traced"
            return lambda theta, *inputs: self.traced_gradient(theta, inputs)
        self.path = "captured"
        logger.debug("Captured the potential; Gaussian priors in closed form: %s.", sorted(self._gaussian.names))
        return graph

    def _capture(self, theta: Tensor, inputs: Inputs) -> GradientAndValue:
        from torch.fx.experimental.proxy_tensor import make_fx

        gaussian = self._gaussian
        assert gaussian is not None

        unvalidated = _UnvalidatedInstances()
        model = unvalidated(self.model)

        def rest(theta: Tensor, *inputs: Tensor) -> Tensor:
            return self._by_trace(model, theta, inputs, gaussian.names)

        def gradient_and_value(theta: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            gradient, energy = torch.func.grad_and_value(rest)(theta, *inputs)
            return gaussian.add_to(theta, gradient.detach(), energy.detach())

        try:
            with pyro.validation_enabled(False):
                return make_fx(gradient_and_value)(theta.detach().clone(), *inputs)
        finally:
            unvalidated.restore()

    def _verify(self, graph: GradientAndValue, theta: Tensor, inputs: Inputs) -> None:
        """Compares the graph with the model at new points, and on other batches where there are any."""
        generator = torch.Generator(device=theta.device).manual_seed(0)
        for scale in (0.0, 0.1, 1.0):
            noise = torch.empty_like(theta).normal_(generator=generator)
            point = theta.detach() + scale * noise * (theta.detach().std() if theta.numel() > 1 else 1.0)
            drawn = self.source.draw()
            other = drawn if [t.shape for t in drawn] == [t.shape for t in inputs] else inputs
            gradient, energy = graph(point, *other)
            expected, expected_energy = self.traced_gradient(point, other)
            error = (gradient - expected).norm()
            close = error <= 1e-3 * expected.norm() + 1e-6
            if not bool(close) and bool(torch.isfinite(expected).all()):
                raise RuntimeError(f"its graph gives another gradient than the model, relative error {error:.1e}")
            if not torch.allclose(energy, expected_energy, rtol=1e-3, equal_nan=True):
                raise RuntimeError(f"its graph gives U = {float(energy):g}, the model {float(expected_energy):g}")


class _GaussianPrior:
    """The sites whose prior is an independent Gaussian with constant parameters, as two vectors over theta.

    Its part of U is half of ``precision * (theta - loc)**2`` up to a constant, which is kept, so that energies agree.
    """

    def __init__(self, names: frozenset[str], loc: Tensor, precision: Tensor, constant: Tensor) -> None:
        self.names, self._loc, self._precision, self._constant = names, loc, precision, constant

    @classmethod
    def of(cls, potential: Potential, theta: Tensor, inputs: Inputs) -> _GaussianPrior:
        """Finds them by running the model at two points: parameters that moved belong to a hierarchy, and stay out."""
        layout = potential.layout
        loc, precision = torch.zeros_like(theta), torch.zeros_like(theta)
        constant = torch.zeros((), dtype=theta.dtype, device=theta.device)
        names = set()
        with pyro.validation_enabled(False):
            traces = [
                run_model(potential.model, potential.source.bind(inputs), layout.constrain(point))
                for point in (theta.detach(), 0.5 * theta.detach() + 0.1)
            ]
        for site in layout:
            here, there = (_gaussian_parameters(trace.nodes[site.name]) for trace in traces)
            if here is None or there is None or not all(map(torch.equal, here, there)):
                continue
            names.add(site.name)
            loc[site.start : site.stop], scale = here[0].reshape(-1), here[1].reshape(-1)
            precision[site.start : site.stop] = scale.square().reciprocal()
            constant = constant + scale.log().sum() + 0.5 * scale.numel() * torch.log(torch.tensor(2 * torch.pi))
        return cls(frozenset(names), loc, precision, constant)

    def add_to(self, theta: Tensor, gradient: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient and U with this prior's part added."""
        if not self.names:
            return gradient, energy
        deviation = theta - self._loc
        pull = self._precision * deviation
        return gradient + pull, energy + 0.5 * torch.dot(pull, deviation) + self._constant


def _gaussian_parameters(site: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Mean and sd, each of the site's full shape; None if it is not an unscaled, unmasked independent Gaussian."""
    fn, shape = site["fn"], site["value"].shape
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    # ExpandedDistribution and MaskedDistribution are other types: they stay with autograd unless exactly Normal.
    if type(fn) not in (dist.Normal, torch.distributions.Normal) or site["mask"] is not None or site["scale"] != 1.0:
        return None
    return fn.loc.detach().expand(shape), fn.scale.detach().expand(shape)


class _UnvalidatedInstances(Messenger):
    """Switches argument validation off in distributions that were built before, until :meth:`restore`.

    ``pyro.validation_enabled(False)`` reaches only those built inside. Densities are taken after the model has run,
    so leaving the context does not switch it on again. A torch that renames the attribute makes the capture fail, and
    the model is then traced at every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._changed: list[tuple[Any, bool]] = []

    def restore(self) -> None:
        """Switches validation on again where it was."""
        while self._changed:
            fn, flag = self._changed.pop()
            fn._validate_args = flag

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        while fn is not None:
            flag = getattr(fn, "_validate_args", False)
            if flag:
                self._changed.append((fn, flag))
                fn._validate_args = False
            fn = getattr(fn, "base_dist", None)


def build_potential(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    batch_size: int | None = None,
    num_data: int | None = None,
    generator: torch.Generator | None = None,
    capture: bool = True,
) -> tuple[Potential, dict[str, Tensor]]:
    """The potential of ``model`` on the arguments of a run, in whichever of the three mini-batch styles they are.

    :param args: the model's arguments, or one iterable of batches.
    :param kwargs: its keyword arguments.
    :param int batch_size: rows a batch, for a model written for the full data.
    :param int num_data: size of the full data, where ``args`` does not show it.
    :param generator: source of the first batch.
    :returns: the potential, and one draw of the latents from the prior (constrained), to start from.
    :raises ModelError: if the scaling of a likelihood cannot be established; the message says how to mend the model.
    :raises DataError: if data are NaN or infinite, or outside the likelihood's support.
    :raises ValueError: if ``batch_size`` does not fit the data.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    source, call, trace = _open_source(model, args, kwargs, batch_size, num_data, generator)
    anatomy = examine(model, source, call, trace)
    source.start(generator)  # the batch looked at belongs to no epoch
    return Potential(model, source, anatomy, capture=capture), anatomy.start


def _open_source(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_size: int | None,
    num_data: int | None,
    generator: torch.Generator,
) -> tuple[MinibatchSource, Call, poutine.Trace]:
    """The source of batches, the first call that it makes, and the model's run on it."""
    source: MinibatchSource
    if is_loader(args, num_data):
        if batch_size is not None:
            raise ValueError(
                f"batch_size={batch_size} is for full tensors; this run was given an iterable of batches, which has "
                "its own. Leave batch_size out."
            )
        source = LoaderBatches(args[0], kwargs, num_data)
    elif batch_size is not None:
        source = RowSubsample(args, kwargs, batch_size, num_data)
    else:
        source = FullBatch(args, kwargs)
    check_finite(Call(args if not isinstance(source, LoaderBatches) else (), dict(kwargs)))
    source.start(generator)
    call = source.bind(source.draw())
    if isinstance(source, LoaderBatches):
        check_finite(call)
    with pyro.validation_enabled(True):
        trace = run_model(model, call)
        check_densities(trace)
    plates = subsampled_plates(trace)
    if plates and isinstance(source, FullBatch):
        source = PlateSubsample(args, kwargs, plates)
        source.start(generator)
        call = source.bind(source.draw())
    return source, call, trace
