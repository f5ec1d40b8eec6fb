# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One step of a sampler as a function of tensors, run as it stands or compiled.

The state is kept by site, each tensor with a storage of its own: compiled code then writes products of matrices where
they belong and moves the weights in the same pass. Noise comes in from outside, since generators do not compile well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_apd.capture import capture
from pyro_apd.kernels.noise import Noise
from pyro_apd.potential import Inputs, Pieces, Potential

logger = logging.getLogger("pyro_apd")

#: Steps, over all chains, from which compiling is taken to pay: it costs some ten seconds, and gains about 0.3 ms each.
COMPILE_STEPS = 30_000


@dataclass(frozen=True)
class Step:
    """What a sampler's update has before it. Tensors are by site, ``(n,)`` or ``(C, n)``.

    :ivar theta: the state, to be moved in place.
    :ivar auxiliary: what the sampler keeps beside it, to be changed in place.
    :ivar gradient: of U at theta, on this step's mini-batch.
    :ivar noise: standard normal.
    :ivar Tensor size: epsilon, ``()``, or ``(C, 1)`` where chains may differ.
    :ivar gradient_at: gradient of U at another state, on the same mini-batch.
    :ivar int num_data: N, or 1 where the model has no data.
    """

    theta: Pieces
    auxiliary: Mapping[str, Pieces]
    gradient: Pieces
    noise: Pieces
    size: Tensor
    gradient_at: Callable[[Pieces], Pieces]
    num_data: int


Update = Callable[[Step], None]


class Stepper:
    """Takes steps: by the captured or traced gradient and the update as written, or both compiled into one.

    :param potential: what is sampled.
    :param update: a sampler's update.
    :param noise: where noise comes from.
    :param compile: True, False, or ``"auto"``: once ``expected_steps``, or the steps taken, reach
        :data:`COMPILE_STEPS`. By steps and not by time, so that a seed gives the same draws again.
    :param expected_steps: steps that the run will take at least, over all chains.
    :ivar str path: ``"compiled"``, or the potential's ``"captured"`` or ``"traced"``.
    """

    def __init__(
        self, potential: Potential, update: Update, noise: Noise, compile: bool | str, expected_steps: int
    ) -> None:
        self._potential, self._update, self._noise = potential, update, noise
        self._compile, self._expected_steps = compile, expected_steps
        self._sizes = [site.size for site in potential.layout]
        self._programs: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
        self.path = "traced"

    def take(
        self, theta: Pieces, auxiliary: Mapping[str, Pieces], size: Tensor, inputs: Inputs, steps_taken: int
    ) -> tuple[Tensor, Tensor]:
        """Moves ``theta`` and ``auxiliary`` in place by one step on the batch ``inputs``.

        :param steps_taken: over all chains, so far.
        :returns: U before the step and the squared norm of its gradient, ``()`` or ``(C,)``.
        """
        program = self._program(theta, auxiliary, size, inputs, steps_taken)
        if program is not None:
            return program(theta, auxiliary, self._noise.raw(), size, inputs)
        gradients = self._potential.gradient_function(theta, inputs)
        self.path = self._potential.path
        return self._step(gradients, theta, auxiliary, self._noise.normal(), size, inputs)

    def _step(
        self,
        gradients: Callable[[Pieces, Inputs], tuple[Pieces, Tensor]],
        theta: Pieces,
        auxiliary: Mapping[str, Pieces],
        noise: Tensor,
        size: Tensor,
        inputs: Inputs,
    ) -> tuple[Tensor, Tensor]:
        gradient, energy = gradients(theta, inputs)
        squared_norm = sum((g * g).sum(-1) for g in gradient)
        pieces = tuple(noise.split(self._sizes, -1))
        num_data = self._potential.source.num_data or 1
        self._update(Step(theta, auxiliary, gradient, pieces, size, lambda at: gradients(at, inputs)[0], num_data))
        return energy, squared_norm  # type: ignore[return-value]

    def _program(
        self, theta: Pieces, auxiliary: Mapping[str, Pieces], size: Tensor, inputs: Inputs, steps_taken: int
    ) -> Callable[..., Any] | None:
        """The compiled step for inputs of these shapes; None where it is not wanted, not yet, or cannot be had."""
        if not self._compile:
            return None
        if self._compile == "auto" and max(self._expected_steps, steps_taken) < COMPILE_STEPS:
            return None
        key = tuple((tuple(t.shape), t.dtype) for t in inputs)
        if key not in self._programs:
            self._programs[key] = self._build(theta, auxiliary, size, inputs)
        return self._programs[key]

    def _build(
        self, theta: Pieces, auxiliary: Mapping[str, Pieces], size: Tensor, inputs: Inputs
    ) -> Callable[..., Any] | None:
        gradients = self._potential.gradient_function(theta, inputs)
        if self._potential.path != "captured":
            logger.info("Steps are not compiled: the model could not be captured.")
            return None

        def step(theta: Pieces, auxiliary: Any, raw: Tensor, size: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
            return self._step(gradients, theta, auxiliary, self._noise.to_normal(raw), size, inputs)

        # Compiling runs the step once: on copies.
        copies = [_copied(tree) for tree in (theta, auxiliary, self._noise.raw_like(), size, inputs)]
        began = time.monotonic()
        try:
            program = compile_graph(capture(step, *copies))
            program(*copies)
        except Exception as error:  # no compiler, or a model that it fails on: the captured graph still works
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("Steps are not compiled, which is slower: %s.", reason)
            return None
        logger.info("Compiled the step in %.1f s.", time.monotonic() - began)
        self.path = "compiled"
        return program


def compile_graph(graph: Callable[..., Any]) -> Callable[..., Any]:
    """``graph``, which :func:`~pyro_apd.capture.capture` made, compiled for inputs of the shapes it is first given."""
    # The code of each captured graph is its own, and is only ever called with the same shapes. Checking that at each
    # call would take a tenth of a small step. The method itself is compiled, not the module, whose call all share.
    forward = graph.forward  # type: ignore[attr-defined]
    options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False for _ in guards]}
    try:
        return torch.compile(forward, fullgraph=True, dynamic=False, options=options)
    except (RuntimeError, TypeError):  # an older torch does not know the option
        return torch.compile(forward, fullgraph=True, dynamic=False)


def _copied(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.clone(), tree)
