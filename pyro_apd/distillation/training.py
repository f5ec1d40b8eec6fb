# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The training loop: averages the generator, keeps its best state by held-out distance, and can be interrupted."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_apd.distillation.evaluators import Evaluator
from pyro_apd.distillation.failure import Shortage
from pyro_apd.distillation.objective import Objective
from pyro_apd.generators import Generator
from pyro_apd.generators.draw_blocks import draws_per_block
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.ranks import Ranks
from pyro_apd.runtime.seeds import derived_seed, fresh_seed


@dataclass(frozen=True)
class Schedule:
    """How to take the generator's steps.

    :ivar int num_steps: generator steps.
    :ivar float learning_rate: Adam's; beta = (0.5, 0.9) as is usual against a critic.
    :ivar float max_sum_change: bound on how far a step may move the sum of a parameter's entries, relative to the sum's
        size; None for no bound.
    :ivar bool is_annealed: let the rate decay to zero, and evaluate and keep a moving average of the generator.
    :ivar int num_evaluations: how many states are evaluated.
    :ivar int num_evaluation_draws: draws per evaluation.
    :ivar float accepted_distance: no step is taken if the start is no farther than this from held-out draws; None for
        no such bound.
    """

    num_steps: int
    learning_rate: float
    is_annealed: bool = True
    max_sum_change: float | None = None
    num_evaluations: int = 20
    num_evaluation_draws: int = 200
    accepted_distance: float | None = None

    def pays(self, metrics: dict[str, float]) -> bool:
        """Whether steps are to be taken from a start with these metrics."""
        return self.accepted_distance is None or metrics.get("distance", math.inf) > self.accepted_distance

    def rates(self, trained: list[nn.Parameter]) -> list[float]:
        """Adam's rate for each parameter.

        Adam moves every entry by about the rate, often in the same direction, so that the sum of n entries moves by n
        times the rate, while n independent entries of size one have a sum of the size of sqrt(n). Parameters with many
        entries therefore need a rate that falls with sqrt(n).
        """
        if self.max_sum_change is None:
            return [self.learning_rate] * len(trained)
        return [min(self.learning_rate, self.max_sum_change / p.numel() ** 0.5) for p in trained]


@dataclass
class Training:
    """Result of a training; the generator holds its best state.

    :ivar dict metrics: of the best state, on held-out draws.
    :ivar int best_step: the step at which it was reached.
    :ivar int num_steps: steps that were planned; none if the start needed none.
    :ivar dict log: lists of numbers by name, one number per evaluation.
    :ivar Shortage shortage: why the bytes of the generator are too few, or None.
    :ivar str disagreement: what is wrong with its draws on the data, or None.
    :ivar str stopped: why training ended early, or None.
    :ivar bool is_interrupted: whether the reason was Ctrl-C.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    num_steps: int = 0
    log: dict[str, list[float]] = field(default_factory=dict)
    shortage: Shortage | None = None
    disagreement: str | None = None
    stopped: str | None = None
    is_interrupted: bool = False


def train(
    generator: Generator,
    objective: Objective,
    evaluator: Evaluator,
    schedule: Schedule,
    *,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> Training:
    """Trains a generator in place, with random numbers of torch's functions.

    With several processes each takes the steps on draws of its own, with averaged gradients
    (:class:`~torch.nn.parallel.DistributedDataParallel`), and the first evaluates for all.

    Ctrl-C and numbers that are not finite end the training early, with the best state so far.

    :param Generator generator: to be trained; parameters that need no gradient stay as they are.
    :param Objective objective: loss that the generator minimises.
    :param Evaluator evaluator: chooses the state that is kept.
    :param Schedule schedule: number of steps, and learning rate.
    :param bool progress: show a progress bar.
    :param Ranks ranks: the processes that train together; each has the same generator and draws.
    :raises RankError: if one of them is gone.
    """
    ranks = ranks or Ranks()
    seed = fresh_seed()
    with torch.no_grad():  # a graph would hold all that the draw was decoded from
        like = generator(torch.zeros(1, generator.latent_size).to(next(generator.parameters()))).new_empty(0)

    def latents(count: int) -> Tensor:
        return generator.latents(count, like)

    average = _copy(generator) if schedule.is_annealed else generator
    result = Training()
    num_draws = schedule.num_evaluation_draws
    best = _BestState(evaluator, average, latents, result, num_draws, derived_seed(seed, "evaluation"), ranks)
    step = 0
    try:
        is_finite = best.evaluate(0, None)
        result.num_steps = schedule.num_steps if schedule.pays(result.metrics) else 0
        with tqdm(total=result.num_steps, desc="Distil", disable=not (progress and result.num_steps)) as bar:
            steps = _steps(generator, average, latents, objective, schedule, ranks, seed) if result.num_steps else ()
            for step, loss in enumerate(steps, start=1):
                bar.update()
                if step % max(1, schedule.num_steps // schedule.num_evaluations) == 0 or step == schedule.num_steps:
                    is_finite = best.evaluate(step, loss)
                    bar.set_postfix(loss=f"{float(loss):.3f}", **{k: f"{v:.3f}" for k, v in _last(result.log).items()})
                if not is_finite:
                    result.stopped = f"training diverged by step {step} of {schedule.num_steps}"
                    break
    except KeyboardInterrupt:
        result.stopped = f"training was interrupted at step {step} of {schedule.num_steps}"
        result.is_interrupted = True
    best.restore(generator)
    return result


class _BestState:
    """Evaluates states of the generator during training, and keeps the best."""

    def __init__(
        self,
        evaluator: Evaluator,
        average: Generator,
        latents: Callable[[int], Tensor],
        result: Training,
        num_draws: int,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self._evaluator = evaluator
        self._average = average
        self._latents = latents
        self._result = result
        self._seed = seed
        self._ranks = ranks
        # All draws of a large network together would need more memory than a step of training, hence the blocks.
        like = next(average.parameters())
        self._device = like.device
        length = draws_per_block(average.output_size * like.element_size())
        self._counts = [min(length, num_draws - start) for start in range(0, num_draws, length)]
        self._tensors = _trained_state(average)
        self._smallest_distance = math.inf

    @torch.no_grad()
    def evaluate(self, step: int, loss: Tensor | None) -> bool:
        """Logs a state, and keeps it if it is the best up to the tolerance; whether its metrics are finite."""
        found = None
        if self._ranks.rank == 0:
            found = self._evaluator.metrics(self._draws()), None if loss is None else float(loss)
        metrics, loss_value = self._ranks.broadcast_object(found)
        is_finite = all(math.isfinite(value) for value in metrics.values())
        _append(self._result.log, step, metrics, loss_value)
        if is_finite and metrics["distance"] < self._smallest_distance + self._evaluator.tolerance:
            self._smallest_distance = min(self._smallest_distance, metrics["distance"])
            self._result.metrics = metrics
            self._result.best_step = step
            self._tensors = _trained_state(self._average)
        return is_finite

    @torch.no_grad()
    def restore(self, generator: Generator) -> None:
        """Copies the best state into the generator."""
        for name, parameter in generator.named_parameters():
            if name in self._tensors:
                parameter.copy_(self._tensors[name])
                self._ranks.broadcast(parameter.data, 0)

    def _draws(self) -> Iterator[Tensor]:
        """The same latents in every evaluation, so that states are not chosen by their random numbers."""
        stream = seeded(self._seed, self._device)
        for count in self._counts:
            with stream:  # left before the caller goes on
                draws = self._average(self._latents(count))
            yield draws


def _steps(
    generator: Generator,
    average: nn.Module,
    latents: Callable[[int], Tensor],
    objective: Objective,
    schedule: Schedule,
    ranks: Ranks,
    seed: int,
) -> Iterator[Tensor]:
    """Takes the steps, and yields the loss after each."""
    module = ranks.data_parallel(generator)
    own = None if ranks.size == 1 else derived_seed(seed, "steps", ranks.rank)
    stream = seeded(own, next(generator.parameters()).device)
    trained = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    rates = schedule.rates(trained)
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(trained, rates, strict=True)]
    optimiser = torch.optim.Adam(groups, betas=(0.5, 0.9))
    # The moving average has a memory of a fifth of the training, whatever its length.
    decay = max(0.0, 1.0 - 5.0 / max(schedule.num_steps, 1))
    for step in range(schedule.num_steps):
        if schedule.is_annealed:
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * (1.0 - step / schedule.num_steps)
        optimiser.zero_grad()
        with ranks.reporting_lost_processes(), stream:
            loss = objective.backward(lambda count: module(latents(count)))
        optimiser.step()
        if average is not generator:
            with torch.no_grad():
                for mean, value in zip(average.parameters(), generator.parameters(), strict=True):
                    if value.requires_grad:
                        mean.lerp_(value, 1.0 - decay)
        yield loss


def _copy(generator: Generator) -> Generator:
    """A copy that shares the tensors that are not trained, which are most of it."""
    tensors = [*generator.parameters(), *generator.buffers()]
    shared = {id(tensor): tensor for tensor in tensors if not tensor.requires_grad}
    return copy.deepcopy(generator, shared)


def _trained_state(generator: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in generator.named_parameters() if p.requires_grad}


def _append(log: dict[str, list[float]], step: int, metrics: dict[str, float], loss: float | None) -> None:
    """Adds an evaluation to the log, rounded to four digits, since the log is saved in the posterior's file."""
    entries = {"step": float(step), "loss": math.nan if loss is None else loss, **metrics}
    for name in log.keys() | entries.keys():
        value = entries.get(name, math.nan)
        log.setdefault(name, []).append(float(f"{value:.4g}"))


def _last(log: dict[str, list[float]]) -> dict[str, float]:
    return {name: values[-1] for name, values in sorted(log.items()) if name not in ("step", "loss")}
