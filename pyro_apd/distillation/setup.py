# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Prepares a training: the generator at its start, the objective, the evaluator and the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_apd.distillation.budget import TrainingBudget
from pyro_apd.distillation.critic import GAN_LOSSES
from pyro_apd.distillation.evaluators import Evaluator, FunctionEvaluator, WeightEvaluator
from pyro_apd.distillation.failure import find_disagreement
from pyro_apd.distillation.function_space import FunctionSpace, function_space
from pyro_apd.distillation.objective import AdversarialObjective, FunctionObjective, Objective
from pyro_apd.distillation.options import DistillOptions
from pyro_apd.distillation.probes import Probes
from pyro_apd.distillation.source import Source
from pyro_apd.distillation.subspace import FittedSubspace, fit_default
from pyro_apd.distillation.training import Schedule
from pyro_apd.generators import Generator, PaperGenerator
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.operation_count import OperationCount
from pyro_apd.runtime.ranks import Ranks
from pyro_apd.runtime.seeds import derived_seed
from pyro_apd.runtime.stages import unseen

# Draws that a critic compares per step.
_CRITIC_BATCH = 100
# Adam's rate with a learned critic: of our generators, and of the paper's generator and critic.
_CRITIC_RATE, _PAPER_RATE = 1e-3, 1e-4
# Adam's rate in function space, and the bound on changes of sums, see `Schedule`.
_FUNCTION_RATE, _MAX_SUM_CHANGE = 3e-3, 0.6
_PAPER_STEPS = 2000
# Networks with fewer numbers are trained for so many steps by default, about five seconds, where the start is farther
# from held-out draws than the error of the distance, about a hundredth, or its draws disagree wrongly on the data.
_TINY, _TINY_STEPS, _ACCEPTED_DISTANCE = 2000, 200, 0.015
# Weights that are compared where functions are not known, at most, and random projections of them.
_MAX_ENTRIES, _NUM_FEATURES = 4096, 32
# Of generating a weight and its gradient, on one thread.
_WEIGHT_SECONDS = 5e-9
# What a training changes of the default generator; what is left are integers and their units.
TRAINED = ("modes", "spread", "noise_cap", "noise_rows", "noise_columns", "null_rows", "null_columns")


@dataclass(frozen=True)
class DistillationTask:
    """Draws to fit, and how to compare them.

    :ivar DrawBlocks draws: to train on.
    :ivar held_out: blocks of the draws to evaluate with; iterated once.
    :ivar functions: how to compare draws as functions; None where they are compared as weights.
    """

    layout: Layout
    draws: DrawBlocks
    held_out: Iterator[Tensor]
    functions: tuple[FunctionSpace, Probes] | None
    budget: TrainingBudget
    cost: OperationCount
    ranks: Ranks
    frozen: FrozenTensors | None = None

    @classmethod
    def of(
        cls,
        source: Source,
        probe_inputs: Sequence[Any] | None,
        train_index: Tensor,
        held_out_index: Tensor,
        ranks: Ranks,
    ) -> DistillationTask:
        """The task of a source, whose draws are divided by index."""
        functions = function_space(source, probe_inputs)
        cost = _prediction_cost(source, functions)
        budget = TrainingBudget.of(source.layout.size, cost.num_products)
        held_out = DrawBlocks(source.theta_CSD, held_out_index)
        step = -(-len(held_out) // budget.num_evaluation_draws)
        draws = DrawBlocks(source.theta_CSD, train_index)
        return cls(source.layout, draws, held_out.rows(step), functions, budget, cost, ranks, source.frozen)

    @property
    def step_seconds(self) -> float:
        """Estimated time of a training step on one thread, right to a factor of about two."""
        by_input = self.budget.num_probes * self.cost.gradient_seconds
        return self.budget.batch_size * (by_input + _WEIGHT_SECONDS * self.layout.size)

    def per_process(self, count: int) -> int:
        """The share of each process in ``count`` draws or inputs per step."""
        return -(-count // self.ranks.size)

    def schedule(self, num_steps: int, learning_rate: float, max_sum_change: float | None = None) -> Schedule:
        """The schedule of a training, with as many evaluations as the budget has."""
        return Schedule(
            num_steps,
            learning_rate,
            max_sum_change=max_sum_change,
            num_evaluations=self.budget.num_evaluations,
            num_evaluation_draws=self.budget.num_evaluation_draws,
        )


@dataclass
class PreparedTraining:
    """A generator with all that its training takes.

    :ivar fitted: the start of the default generator.
    """

    generator: Generator
    objective: Objective
    evaluator: Evaluator
    schedule: Schedule
    fitted: FittedSubspace | None = None


def prepare(task: DistillationTask, options: DistillOptions, note: Callable[[str], None] = unseen) -> PreparedTraining:
    """The training that ``options`` ask for, with torch's global random numbers.

    :param callable note: is told what is being done.
    """
    if options.generator == "paper":
        return _prepare_paper(task, options)
    fitted = fit_default(task.layout, task.draws, task.functions, options, task.cost.num_products, task.frozen, note)
    generator = fitted.generator
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] in TRAINED)
    if task.functions is None:
        features = WeightFeatures(task.draws)
        objective: Objective = AdversarialObjective(
            features,
            task.draws.map(features),
            _CRITIC_RATE,
            batch_size=task.per_process(_CRITIC_BATCH),
            ranks=task.ranks,
        )
        evaluator: Evaluator = WeightEvaluator(features, task.held_out)
        schedule = task.schedule(options.steps(0), _CRITIC_RATE)
        return PreparedTraining(generator, objective, evaluator, schedule, fitted)
    num_probes = task.per_process(task.budget.num_probes)
    objective = FunctionObjective(
        *task.functions,
        task.draws,
        task.budget.batch_size,
        num_probes,
        result_bytes=num_probes * task.cost.num_bytes,
    )
    evaluator = FunctionEvaluator(*task.functions, task.held_out, task.budget.num_probes)
    schedule = task.schedule(
        options.steps(_TINY_STEPS if task.layout.size < _TINY else 0), _FUNCTION_RATE, _MAX_SUM_CHANGE
    )
    if options.num_steps is None and find_disagreement(fitted.calibration) is None:
        schedule = replace(schedule, accepted_distance=_ACCEPTED_DISTANCE)
    return PreparedTraining(generator, objective, evaluator, schedule, fitted)


class WeightFeatures:
    """Few numbers of a draw, where functions are not known: random projections of standardised weights.

    :param DrawBlocks draws: of the chain, which determine the units.
    """

    def __init__(self, draws: DrawBlocks) -> None:
        size = draws.shape[2]
        count = min(size, _MAX_ENTRIES)
        self._entry_E = torch.linspace(0, size - 1, count, dtype=torch.float64).round().long().to(draws.device)
        values_SE = torch.cat([block_SD[:, self._entry_E] for block_SD in draws.rows()])
        self._mean_E = values_SE.mean(0)
        scale_E = values_SE.std(0, correction=0)
        width = min(count, _NUM_FEATURES)
        to_features_EF = torch.eye(count) if width == count else torch.randn(count, width) / count**0.5
        self._to_features_EF = to_features_EF.to(values_SE) / scale_E.where(scale_E > 0, 1.0).unsqueeze(1)

    def __call__(self, theta_SD: Tensor) -> Tensor:
        """Features ``(S, F)`` of draws."""
        features_SF: Tensor = (theta_SD[:, self._entry_E] - self._mean_E) @ self._to_features_EF
        return features_SF


def _prepare_paper(task: DistillationTask, options: DistillOptions) -> PreparedTraining:
    """As published: raw weights, no standardisation, a constant rate, no averaging. Only the state kept is chosen."""
    gan_loss = GAN_LOSSES[options.objective or "wgan-gp"]
    evaluator: Evaluator = (
        WeightEvaluator(_identity, task.held_out)
        if task.functions is None
        else FunctionEvaluator(*task.functions, task.held_out, task.budget.num_probes)
    )
    generator = PaperGenerator(task.draws.shape[2]).to(task.draws.device, task.draws.dtype)
    objective = AdversarialObjective(
        _identity, task.draws, _PAPER_RATE, gan_loss, task.per_process(_CRITIC_BATCH), task.ranks
    )
    schedule = task.schedule(options.steps(_PAPER_STEPS), gan_loss.learning_rate or _PAPER_RATE)
    return PreparedTraining(generator, objective, evaluator, replace(schedule, is_annealed=False))


def _prediction_cost(source: Source, functions: tuple[FunctionSpace, Probes] | None) -> OperationCount:
    """The cost of a prediction for one input, where functions are known."""
    if functions is None:
        return OperationCount()
    space, probes = functions
    example_SD = source.theta_CSD[0, :1]
    with seeded(derived_seed(0, "prediction cost"), example_SD.device):  # leaves the training's random numbers alone
        inputs = probes.draw(1)
    return OperationCount.of(lambda: space.views(example_SD, inputs))


def _identity(theta_SD: Tensor) -> Tensor:
    return theta_SD
