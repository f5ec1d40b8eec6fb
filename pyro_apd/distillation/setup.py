# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Prepares a training: the generator at its start, the objective, the evaluator and the schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_apd.distillation.budget import PredictionCost, TrainingBudget, choose_generator, choose_rank
from pyro_apd.distillation.critic import GAN_LOSSES
from pyro_apd.distillation.evaluators import Evaluator, FunctionEvaluator, WeightEvaluator
from pyro_apd.distillation.function_space import FunctionSpace, function_space
from pyro_apd.distillation.objective import AdversarialObjective, FunctionObjective, Objective
from pyro_apd.distillation.options import DistillOptions
from pyro_apd.distillation.probes import Probes
from pyro_apd.distillation.source import Source
from pyro_apd.distillation.training import Schedule
from pyro_apd.generators import ChunkedGenerator, CoordinateGenerator, Generator, PaperGenerator
from pyro_apd.generators.chunked import CoordinatesAlone
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.generators.residual import Block
from pyro_apd.models.layout import Layout
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.ranks import Ranks
from pyro_apd.runtime.seeds import derived_seed, fresh_seed

# Draws that a critic compares per step.
_CRITIC_BATCH = 100
# Adam's rate with a learned critic: of our generators, and of the paper's generator and critic.
_CRITIC_RATE, _PAPER_RATE = 1e-3, 1e-4
# Adam's rate in function space, and the bound on changes of sums, see `Schedule`.
_FUNCTION_RATE, _MAX_SUM_CHANGE = 3e-3, 0.6
_PAPER_STEPS = 2000
# Successive draws of a chain that make a segment, which is one mode of the generator.
_SEGMENT_LENGTH = 12
# Noise is reduced by this factor at a time, and at most so often.
_NOISE_FACTOR, _MAX_NOISE_REDUCTIONS = 0.7, 10
# Noise is reduced before trainings with fewer steps than this, and before all trainings of large networks.
_FEW_STEPS = 100
# Directions per matrix of weights in which noise is damped, up to half of its columns. Narrow matrices have no noise,
# and neither have very wide ones, since finding their directions would be expensive.
_NOISE_RANK = 32
_NOISY_COLUMNS = range(16, 4097)


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
    cost: PredictionCost
    ranks: Ranks

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
        return cls(source.layout, draws, held_out.rows(step), functions, budget, cost, ranks)

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

    :ivar Generator trained: the module that is trained; it shares its parameters with ``generator``.
    """

    generator: Generator
    objective: Objective
    evaluator: Evaluator
    schedule: Schedule
    trained: Generator


def prepare(task: DistillationTask, options: DistillOptions) -> PreparedTraining:
    """The training that ``options`` ask for, with torch's global random numbers."""
    if options.generator == "paper":
        return _prepare_paper(task, options)
    generator = _fit(task, options)
    # Location and basis are fitted to all draws. Steps on batches of draws would only add noise to these many numbers.
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(name not in ("basis", "location"))
    num_steps = options.steps(task.budget.num_steps)
    if task.functions is not None:
        return _prepare_in_function_space(task, task.functions, generator, num_steps)
    return _prepare_in_weight_space(task, generator, num_steps)


def _prepare_in_function_space(
    task: DistillationTask,
    functions: tuple[FunctionSpace, Probes],
    generator: CoordinateGenerator | ChunkedGenerator,
    num_steps: int,
) -> PreparedTraining:
    """Trains coordinates and noise."""
    num_probes = task.per_process(task.budget.num_probes)
    objective = FunctionObjective(
        *functions,
        task.draws,
        task.budget.batch_size,
        num_probes,
        result_bytes=num_probes * task.cost.num_bytes,
    )
    if num_steps and (num_steps < _FEW_STEPS or isinstance(generator, ChunkedGenerator)):
        _reduce_noise(generator, objective)
    evaluator = FunctionEvaluator(*functions, task.held_out, task.budget.num_probes)
    schedule = task.schedule(num_steps, _FUNCTION_RATE, _MAX_SUM_CHANGE)
    return PreparedTraining(generator, objective, evaluator, schedule, trained=generator)


def _prepare_in_weight_space(
    task: DistillationTask, generator: CoordinateGenerator | ChunkedGenerator, num_steps: int
) -> PreparedTraining:
    """Trains coordinates, which a critic compares."""
    schedule = task.schedule(num_steps, _CRITIC_RATE)
    batch_size = task.per_process(_CRITIC_BATCH)
    if isinstance(generator, ChunkedGenerator):
        # Draws without noise are determined by their coordinates, so that no tensor as long as a draw is needed.
        held_out = [generator.projected(block_ND) for block_ND in task.held_out]
        objective = AdversarialObjective(
            _identity, task.draws.map(generator.projected), _CRITIC_RATE, batch_size=batch_size, ranks=task.ranks
        )
        evaluator = WeightEvaluator(_identity, held_out)
        return PreparedTraining(generator, objective, evaluator, schedule, trained=CoordinatesAlone(generator))
    location_D = generator.location.detach()
    dual_DR = torch.linalg.pinv(generator.basis.detach())

    def coordinates(theta_SD: Tensor) -> Tensor:
        coordinates_SR: Tensor = (theta_SD - location_D) @ dual_DR
        return coordinates_SR

    objective = AdversarialObjective(
        coordinates, task.draws.map(coordinates), _CRITIC_RATE, batch_size=batch_size, ranks=task.ranks
    )
    evaluator = WeightEvaluator(coordinates, task.held_out)
    return PreparedTraining(generator, objective, evaluator, schedule, trained=generator)


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
    return PreparedTraining(generator, objective, evaluator, replace(schedule, is_annealed=False), trained=generator)


def _fit(task: DistillationTask, options: DistillOptions) -> CoordinateGenerator | ChunkedGenerator:
    """The generator that was asked for, or that suits the size of the network, fitted to the draws."""
    num_chains, num_draws, size = task.draws.shape
    kind = options.generator or choose_generator(size, task.draws.dtype, options.storage_dtype)
    rank = choose_rank(kind, num_chains, num_draws) if options.rank is None else options.rank
    noise = () if task.functions is None else _noise_blocks(task.layout)
    if kind == "chunked":
        sizes = [site.size for site in task.layout if site.size]
        return ChunkedGenerator.fit(task.draws, rank, _SEGMENT_LENGTH, noise, sizes=sizes)
    generator = CoordinateGenerator.fit(task.draws, rank, _SEGMENT_LENGTH, noise)
    generator.fold()
    return generator


@torch.no_grad()
def _reduce_noise(generator: CoordinateGenerator | ChunkedGenerator, objective: FunctionObjective) -> None:
    """Scales the noise down as long as that brings draws nearer to the chain's in function space.

    Few draws give few coordinates. What these leave out is correlated between weights, and independent noise of the
    same size changes functions more than it. A training of few steps, or of a large network, would not correct that.
    """
    like = generator.location.new_zeros(())
    seed = fresh_seed()

    def loss() -> float:
        with seeded(seed, like.device):
            return float(objective.value(lambda count: generator(generator.latents(count, like))))

    smallest = loss()
    for _ in range(_MAX_NOISE_REDUCTIONS):
        generator.scale_noise(_NOISE_FACTOR)
        reduced = loss()
        if not reduced < smallest:
            generator.scale_noise(1 / _NOISE_FACTOR)
            break
        smallest = reduced


def _noise_blocks(layout: Layout) -> list[Block]:
    """Matrices of weights that get noise: all but the last, whose noise no later layer would average out."""
    matrices = [site for site in layout if len(site.unconstrained_shape) >= 2]
    blocks = []
    for site in matrices[:-1]:
        rows = site.unconstrained_shape[0]
        columns = site.size // max(rows, 1)
        if columns in _NOISY_COLUMNS:
            blocks.append(Block(site.start, rows, columns, min(_NOISE_RANK, columns // 2)))
    return blocks


def _prediction_cost(source: Source, functions: tuple[FunctionSpace, Probes] | None) -> PredictionCost:
    """The cost of a prediction for one input, where functions are known."""
    if functions is None:
        return PredictionCost()
    space, probes = functions
    example_SD = source.theta_CSD[0, :1]
    with seeded(derived_seed(0, "prediction cost"), example_SD.device):  # leaves the training's random numbers alone
        inputs = probes.draw(1)
    return PredictionCost.of(lambda: space.views(example_SD, inputs))


def _identity(theta_SD: Tensor) -> Tensor:
    return theta_SD
