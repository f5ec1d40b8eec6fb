# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A Pyro model as a potential U(theta, mini-batch) and its gradient.

    U(theta) = - log p(theta) - log |d constrained / d theta| - (N/B) sum over the batch of log p(y | theta)

The model's Python code, with all of Pyro's handlers, runs a few times. Its tensor operations are captured as a graph, a
function of theta and of the tensors that change with the batch, and that graph runs at every step. Independent Gaussian
priors, which most weights of a Bayesian neural network have, are added in closed form. A graph is used only after it
has reproduced the model at points other than those of the capture. Otherwise the model is traced at every step, as in
Pyro.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_apd.data.arguments import not_finite
from pyro_apd.data.minibatch import Call, FullBatch, MinibatchSource
from pyro_apd.errors import DataError
from pyro_apd.models.capture import GaussianPriors, UnvalidatedInstances, capture
from pyro_apd.models.observations import without_missing_targets
from pyro_apd.models.structure import ModelStructure
from pyro_apd.models.supports import check_batch
from pyro_apd.models.tracing import (
    Site,
    check_latents,
    check_observed,
    run_from_prior,
    run_model,
)
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.operation_count import OperationCount
from pyro_apd.runtime.threads import one_thread

logger = logging.getLogger("pyro_apd")

#: The tensors of a mini-batch that change from step to step.
Inputs = tuple[Tensor, ...]
#: A state by site, in the order of the layout: flat unconstrained tensors ``(n,)`` or, for C chains, ``(C, n)``.
Pieces = tuple[Tensor, ...]
#: Gradients by site, and U, as a function of a state and of a mini-batch.
GradientFunction = Callable[[Pieces, Inputs], tuple[Pieces, Tensor]]


class Potential:
    """The potential of a model under a source of mini-batches.

    Every gradient is that of one chain or, where tensors have a leading dimension, of C chains at once, each on its own
    mini-batch.

    :param model: a Pyro model.
    :param source: of its mini-batches.
    :param ModelStructure structure: what :func:`~pyro_apd.models.structure.examine` established about the model.
    :param Call example: a call of the model.
    :param bool capture: whether to try the captured graph; otherwise the model is traced at every step.
    :param bool latents_only: leave out the observed sites.
    :ivar str path: ``"captured"`` or ``"traced"``, from the first gradient on.
    :ivar OperationCount operations: of a run of the model on a batch; zero where it is not known.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        source: MinibatchSource,
        structure: ModelStructure,
        example: Call,
        *,
        capture: bool = True,
        latents_only: bool = False,
    ) -> None:
        self.source = source
        self.model = model
        self.layout = structure.layout
        self._structure = structure
        self._example = example
        self._is_capturing = capture
        self._latents_only = latents_only
        self._graphs: dict[tuple[Any, ...], GradientFunction] = {}
        self._priors: GaussianPriors | None = None
        self.path = "traced"
        self.operations = OperationCount()

    @property
    def model(self) -> Callable[..., Any]:
        """The model. With mini-batches it is without the latents that are targets for ``obs_mask=``."""
        return self._model

    @model.setter
    def model(self, model: Callable[..., Any]) -> None:
        self._model = model if self.source.is_full else without_missing_targets(model)

    def draw_start(self) -> dict[str, Tensor]:
        """Another draw of the latents from the prior, or by the model's ``init_strategy``; constrained."""
        trace = run_from_prior(self.model, self._example)
        return {name: trace.nodes[name]["value"].detach() for name in self.layout.names}

    def count_operations(self, start: Mapping[str, Tensor]) -> None:
        """Sets :attr:`operations`, by a run of the model at constrained values of the latents."""
        with seeded(0):  # for the rows of its own plates
            self.operations = OperationCount.of(lambda: run_model(self.model, self._example, start))

    @property
    def num_data(self) -> int | None:
        """N; None where no argument has rows."""
        return self.source.num_data

    def prior_alone(self, inputs: Inputs | None = None) -> Potential:
        """The potential of the prior: the part of U that does not depend on data. It takes no batches.

        :param inputs: a batch of the source, on which the model is called; by default the next one.
        """
        call = self._call(self.source.draw() if inputs is None else inputs)
        structure = ModelStructure(self.layout, self._structure.start)
        source = FullBatch.calling(call)
        source.start(torch.Generator().manual_seed(0))
        return Potential(self.model, source, structure, call, capture=self._is_capturing, latents_only=True)

    def check_batch(self, inputs: Inputs) -> None:
        """Looks for the cause of a step that failed in its batch ``inputs``, of one chain.

        :raises DataError: if the batch holds NaN or infinite entries, or values outside the likelihood's support.
        """
        call = self.source.bind(inputs)
        missing = not_finite(call.args, call.kwargs)
        if missing is not None and not self.is_finite_at_start(inputs):
            raise missing
        check_batch(self.model, self._call(inputs), self._structure.start)

    def is_finite_at_start(self, inputs: Inputs) -> bool:
        """Whether U and its gradient are finite at the start, on a batch ``inputs`` of one chain."""
        theta = self.layout.unconstrain(self._structure.start)
        gradient, energy = self.traced_gradient(theta, inputs)
        return bool(torch.isfinite(gradient).all() & torch.isfinite(energy))

    @one_thread()
    def value(self, theta: Tensor, inputs: Inputs) -> Tensor:
        """U at ``theta`` ``(D,)``, by running the model; a scalar."""
        return self._by_trace(self.model, self.layout.split(theta), inputs, frozenset())

    def gradient(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The gradient of U, and U, at ``theta``, on the batch ``inputs`` that the source drew.

        :param theta: ``(D,)``, or ``(C, D)`` with ``inputs`` of C chains.
        :returns: ``(D,)`` and ``()``, or ``(C, D)`` and ``(C,)``.
        """
        gradients, energy = self.gradients(self._contiguous_pieces(theta), inputs)
        return torch.cat(gradients, -1) if gradients else torch.zeros_like(theta), energy

    def gradients(self, pieces: Pieces, inputs: Inputs) -> tuple[Pieces, Tensor]:
        """The same by site, without joining the sites."""
        return self.gradient_function(pieces, inputs)(pieces, inputs)

    def gradient_function(self, pieces: Pieces, inputs: Inputs) -> GradientFunction:
        """The function that :meth:`gradients` calls for tensors of these shapes: the captured graph, or the model."""
        if not self._is_capturing:
            return self._traced_gradients
        key = (pieces[0].shape[:-1] if pieces else (), *((tuple(t.shape), t.dtype) for t in inputs))
        if key not in self._graphs:
            self._graphs[key] = self._prepare(pieces, inputs)
        return self._graphs[key]

    @property
    def gaussian_priors(self) -> GaussianPriors:
        """The independent Gaussian priors that were found at the capture; none where the potential is traced."""
        return GaussianPriors({}, 0.0) if self._priors is None else self._priors

    def traced_gradient(self, theta: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """As :meth:`gradient`, by running the model's code: slower, and correct for any model that Pyro can run."""
        gradients, energy = self._traced_gradients(self.pieces(theta), inputs)
        return torch.cat(gradients, -1) if gradients else torch.zeros_like(theta), energy

    def pieces(self, theta: Tensor) -> Pieces:
        """``(..., D)`` by site, as views ``(..., n)``."""
        return tuple(theta.split([site.size for site in self.layout], dim=-1)) if len(self.layout) else ()

    def _contiguous_pieces(self, theta: Tensor) -> Pieces:
        """The inputs of a graph. Views of the states of several chains have other strides than at its capture."""
        return tuple(piece.contiguous() for piece in self.pieces(theta))

    @one_thread()
    def _traced_gradients(self, pieces: Pieces, inputs: Inputs) -> tuple[Pieces, Tensor]:
        if pieces and pieces[0].dim() > 1:
            by_chain = [
                self._traced_gradients(tuple(p[c] for p in pieces), tuple(t[c] for t in inputs))
                for c in range(len(pieces[0]))
            ]
            gradients = tuple(torch.stack(parts) for parts in zip(*(g for g, _ in by_chain), strict=True))
            return gradients, torch.stack([energy for _, energy in by_chain])
        with torch.enable_grad(), pyro.validation_enabled(False):
            leaves = [piece.detach().requires_grad_() for piece in pieces]
            energy = self._by_trace(self.model, self._unconstrained(leaves), inputs, frozenset())
            return tuple(torch.autograd.grad(energy, leaves, materialize_grads=True)), energy.detach()

    def _unconstrained(self, pieces: Sequence[Tensor]) -> dict[str, Tensor]:
        return {s.name: p.reshape(s.unconstrained_shape) for s, p in zip(self.layout, pieces, strict=True)}

    def _by_trace(
        self, model: Callable[..., Any], unconstrained: Mapping[str, Tensor], inputs: Inputs, skipped: frozenset[str]
    ) -> Tensor:
        trace = run_model(model, self._call(inputs), self.layout.constrain_sites(unconstrained))
        check_latents(trace, self.layout.names)
        if self._structure.observed is not None:
            check_observed(trace, self.layout.names, self._structure.observed)
        scaled, latents = self._structure.scaled, frozenset(self.layout.names)

        def is_unscaled(name: str, site: Site) -> bool:
            return name not in scaled and name not in skipped and (name in latents or not self._latents_only)

        log_joint = trace.log_prob_sum(is_unscaled)
        if scaled:
            by_kernel = self.source.scale(inputs)
            by_model = 1.0
            if any(scaled.values()):
                # A plate's own N/B is exact for its batch. LoaderBatches explains why its factor may differ.
                assert self.source.num_data is not None
                by_model = by_kernel * inputs[0].shape[0] / self.source.num_data
            for is_scaled, factor in ((False, by_kernel), (True, by_model)):
                names = frozenset(name for name, flag in scaled.items() if flag == is_scaled)
                if names:
                    log_joint = log_joint + factor * trace.log_prob_sum(lambda name, site, n=names: name in n)
        log_joint = log_joint + self.layout.log_abs_det_jacobian_sites(unconstrained)
        if not isinstance(log_joint, Tensor):
            # Where every site has a closed form, the rest is a number, but it must depend on theta for autograd.
            log_joint = log_joint + 0.0 * sum(value.sum() for value in unconstrained.values())
        potential: Tensor = -log_joint
        return potential

    def _call(self, inputs: Inputs) -> Call:
        """The call of the model on a batch."""
        call = self.source.bind(inputs)
        if not self._structure.pass_through:
            return call
        indices = {name: torch.arange(inputs[0].shape[0]) for name in self._structure.pass_through}
        return Call(call.args, call.kwargs, {**call.indices, **indices})

    @one_thread()
    def _prepare(self, pieces: Pieces, inputs: Inputs) -> GradientFunction:
        """The captured graph for inputs of these shapes; otherwise the traced gradients, with the reason logged."""
        position = self.source.state_dict()  # the comparison below draws batches that belong to no chain
        try:
            if self._priors is None:
                self._priors = self._find_priors(pieces, inputs)
            graph = self._capture(pieces, inputs)
            self._verify(graph, pieces, inputs)
        except DataError:
            raise
        except Exception as error:  # a model may do anything that a graph cannot; tracing still works
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("The model is traced at every step, which is slower: it cannot be captured (%s).", reason)
            self.path = "traced"
            return self._traced_gradients
        finally:
            self.source.load_state_dict(position)
        self.path = "captured"
        logger.debug("Captured the potential; Gaussian priors in closed form: %s.", sorted(self._priors.names))
        return graph

    def _find_priors(self, pieces: Pieces, inputs: Inputs) -> GaussianPriors:
        first = [piece.detach() if piece.dim() == 1 else piece[0].detach() for piece in pieces]
        call = self.source.bind(inputs if not pieces or pieces[0].dim() == 1 else tuple(t[0] for t in inputs))
        with pyro.validation_enabled(False):
            traces = [
                run_model(self.model, call, self.layout.constrain_sites(self._unconstrained(point)))
                for point in (first, [0.5 * piece + 0.1 for piece in first])
            ]
        return GaussianPriors.of(self.layout, traces)

    def _capture(self, pieces: Pieces, inputs: Inputs) -> GradientFunction:
        priors = self._priors
        assert priors is not None
        unvalidated = UnvalidatedInstances()
        model = unvalidated(self.model)

        def rest(pieces: Pieces, inputs: Inputs) -> Tensor:
            return self._by_trace(model, self._unconstrained(pieces), inputs, priors.names)

        def gradients_and_energy(pieces: Pieces, inputs: Inputs) -> tuple[Pieces, Tensor]:
            function = torch.func.grad_and_value(rest)
            if pieces[0].dim() > 1:
                function = torch.vmap(function, in_dims=(0, 0 if inputs else None))
            gradients, energy = function(pieces, inputs)
            return priors.add_to(self.layout, pieces, gradients, energy)

        try:
            return capture(gradients_and_energy, tuple(piece.detach().clone() for piece in pieces), inputs)
        finally:
            unvalidated.restore()

    def _verify(self, graph: GradientFunction, pieces: Pieces, inputs: Inputs) -> None:
        """Compares the graph with the model at other points, and on other batches where there are any."""
        theta = torch.cat(pieces, -1).detach()
        generator = torch.Generator(device=theta.device).manual_seed(0)
        for scale in (0.0, 0.1, 1.0):
            noise = torch.empty_like(theta).normal_(generator=generator)
            point = theta + scale * noise * (theta.std() if theta.numel() > 1 else 1.0)
            drawn = self.source.draw()
            other = drawn if [t.shape for t in drawn] == [t.shape for t in inputs] else inputs
            parts, energy = graph(self._contiguous_pieces(point), other)
            gradient = torch.cat(parts, -1)
            if theta.dim() > 1:  # one of several chains is enough: the last, whose batch is not the first one
                gradient, energy, point, other = gradient[-1], energy[-1], point[-1], tuple(t[-1] for t in other)
            expected, expected_energy = self.traced_gradient(point, other)
            error = (gradient - expected).norm()
            close = error <= 1e-3 * expected.norm() + 1e-6
            if not bool(close) and bool(torch.isfinite(expected).all()):
                raise RuntimeError(f"its graph gives another gradient than the model, relative error {error:.1e}")
            if not torch.allclose(energy, expected_energy, rtol=1e-3, equal_nan=True):
                raise RuntimeError(f"its graph gives U = {float(energy):g}, the model {float(expected_energy):g}")
