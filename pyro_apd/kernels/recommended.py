# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which kernel to take for a model and its data, and why; ``docs/which_sampler.md`` has the measurements."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro_apd.errors import ModelError
from pyro_apd.kernels.base import StochasticGradientKernel
from pyro_apd.kernels.mclmc import MCLMC
from pyro_apd.kernels.psgld import PSGLD
from pyro_apd.kernels.sghmc import SGHMC
from pyro_apd.models.building import build_potential
from pyro_apd.models.potential import Potential

logger = logging.getLogger("pyro_apd")

#: Rows times weights up to which a step may use all rows: a few ms on one core.
FULL_BATCH_WORK = 10_000_000
#: Rows per mini-batch above it.
BATCH_SIZE = 100
#: Weights from which and up to which MCLMC is recommended on all rows: where it was measured to be the fastest.
MCLMC_WEIGHTS = (100, 2_000)
#: Langevin steps per draw, where ``thinning`` is not given.
THINNING = 20
# Settings that the potential depends on.
_OF_DATA = ("batch_size", "num_data", "replacement")


@dataclass(frozen=True)
class Problem:
    """What the choice depends on.

    :ivar int num_rows: N; None where the model has no data.
    :ivar int num_weights: D.
    :ivar bool has_batches: whether batches are given: by ``batch_size``, by the model's plate, or by a loader.
    :ivar bool can_batch: whether rows can be drawn from the data.
    :ivar bool is_cold: whether the temperature is 0, which MCLMC does not have.
    """

    num_rows: int | None
    num_weights: int
    has_batches: bool
    can_batch: bool = True
    is_cold: bool = False

    @property
    def size(self) -> str:
        """For people."""
        rows = "no data rows" if self.num_rows is None else f"{self.num_rows:,} rows"
        return f"{rows} and {self.num_weights:,} weights"

    @property
    def affords_all_rows(self) -> bool:
        """Whether a step can pay for the gradient on all rows."""
        return (self.num_rows or 1) * self.num_weights <= FULL_BATCH_WORK


@dataclass(frozen=True)
class Recommendation:
    """A kernel, its settings, and why.

    :ivar kernel: the class.
    :ivar settings: keyword arguments besides the step size, which is ``"auto"``.
    :ivar str reason: a sentence or two.
    """

    kernel: type[StochasticGradientKernel]
    settings: Mapping[str, Any]
    reason: str


def recommended_kernel(
    model: Callable[..., Any], *args: Any, model_kwargs: Mapping[str, Any] | None = None, **settings: Any
) -> StochasticGradientKernel:
    """The kernel to begin with, for a model and the arguments of its run, with ``step_size="auto"``.

    It is chosen by the number of rows and weights alone, so that the same call gives the same kernel on any machine.
    Nothing is sampled. Why it was chosen is logged, and is the kernel's ``reason``.

    :param model: a Pyro model, as for :class:`~pyro_apd.kernels.base.StochasticGradientKernel`.
    :param args: the arguments of ``mcmc.run``.
    :param model_kwargs: its keyword arguments.
    :param settings: of the kernel, such as ``seed``; they are kept as they are. A ``batch_size`` is kept too.
    :returns: the kernel, to be given to :class:`~pyro_apd.chains.MCMC`.
    :raises ModelError: as :meth:`~pyro_apd.kernels.base.StochasticGradientKernel.setup`; also ``DataError`` and
        ``ValueError``.
    :raises TypeError: if ``step_size`` is given, or a setting that the kernel does not have.

    Example::

        kernel = apd.recommended_kernel(model, x_train, y_train, seed=0)
        print(kernel.reason)
        mcmc = apd.MCMC(kernel, num_samples=500, warmup_steps=250, num_chains=4)
        mcmc.run(x_train, y_train)
    """
    if "step_size" in settings:
        raise TypeError(
            "recommended_kernel chooses step_size='auto'. For a step size of your own, construct the kernel: "
            "apd.SGHMC(model, step_size, ...)."
        )
    found = recommend(problem_of(model, args, model_kwargs or {}, settings))
    kernel = found.kernel(model, "auto", **{"thinning": THINNING, **found.settings, **settings})
    kernel.reason = found.reason
    logger.info("%s", found.reason)
    return kernel


def recommend(problem: Problem) -> Recommendation:
    """The choice, by sizes alone."""
    if problem.has_batches:
        return Recommendation(PSGLD, {}, f"PSGLD with the mini-batches that are given, for {problem.size}. {_BATCHES}")
    if problem.affords_all_rows:
        why = f"{problem.size} cost a few ms per gradient at most, so that each step can use all rows"
        if MCLMC_WEIGHTS[0] <= problem.num_weights <= MCLMC_WEIGHTS[1] and not problem.is_cold:
            return Recommendation(MCLMC, {}, f"MCLMC on all rows: {why}. {_MICROCANONICAL}")
        return Recommendation(SGHMC, {}, f"SGHMC on all rows: {why}, and has no mini-batch noise. {_ALL_ROWS}")
    if not problem.can_batch:
        why = f"{problem.size} make a step slow, but the rows of this model cannot be drawn in mini-batches"
        return Recommendation(SGHMC, {}, f"SGHMC on all rows: {why}. {_ALL_ROWS}")
    why = f"{problem.size} are too many for a gradient on all rows at each step"
    return Recommendation(
        PSGLD, {"batch_size": BATCH_SIZE}, f"PSGLD with mini-batches of {BATCH_SIZE}: {why}. {_BATCHES}"
    )


# Measured: docs/which_sampler.md.
_MICROCANONICAL = "On networks of this size it made three to four times the effective draws of SGHMC."
_ALL_ROWS = "With momenta it makes several times the effective draws of SGLD and PSGLD."
_BATCHES = (
    "SGHMC is faster with mini-batches too, but was far too wide on a network that learns its noise scale, where PSGLD "
    "was right."
)


def problem_of(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], settings: Mapping[str, Any]
) -> Problem:
    """Sizes of a model on the arguments of a run; its scaling is checked as by a run."""
    of_data = {name: settings[name] for name in _OF_DATA if name in settings}
    potential, is_cold = _potential(model, args, kwargs, of_data), settings.get("temperature") == 0
    has_batches = not potential.source.is_full
    problem = Problem(potential.num_data, potential.layout.size, has_batches=has_batches, is_cold=is_cold)
    if problem.has_batches or problem.affords_all_rows:
        return problem
    try:
        _potential(model, args, kwargs, of_data | {"batch_size": BATCH_SIZE})
    except (ModelError, ValueError) as error:
        logger.debug("No mini-batches: %s", error)
        return Problem(problem.num_rows, problem.num_weights, has_batches=False, can_batch=False)
    return problem


def _potential(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], settings: Mapping[str, Any]
) -> Potential:
    potential, _ = build_potential(model, args, kwargs, capture=False, seed=0, **settings)
    potential.source.close()
    return potential
