# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The training loop: averages the generator, keeps the best of it by held-out distance, and survives interruption."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_apd.distillation.objective import Judge, Objective
from pyro_apd.generators import Generator
from pyro_apd.generators.draw_blocks import together
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.ranks import Ranks


@dataclass(frozen=True)
class Schedule:
    """How to take the generator's steps.

    :ivar int num_steps: generator steps.
    :ivar float learning_rate: Adam's; beta = (0.5, 0.9) as is usual against a critic.
    :ivar float coherent: how far a step may move what a parameter's entries add up to, relative to its size; None for
        no bound.
    :ivar bool is_annealed: let the rate fall to zero, and judge and keep a moving average of the generator.
    :ivar int num_evaluations: how many states are judged.
    :ivar int num_judged: draws that a state is judged by.
    """

    num_steps: int
    learning_rate: float
    is_annealed: bool = True
    coherent: float | None = None
    num_evaluations: int = 20
    num_judged: int = 200

    def rates(self, generator: Generator, trained: list[nn.Parameter]) -> list[float]:
        """Adam's rate for each parameter.

        Adam moves all entries by about the rate, and together, so that what n of them add up to moves by n times the
        rate; n independent entries of size one add up to the root of n. Many entries have to move slower, by that root.
        Rows as long as a draw count as one parameter.
        """
        if self.coherent is None:
            return [self.learning_rate] * len(trained)
        is_long = [parameter.shape[-1] == generator.output_size for parameter in trained]
        num_long = sum(parameter.numel() for parameter, long in zip(trained, is_long, strict=True) if long)
        counts = [num_long if long else parameter.numel() for parameter, long in zip(trained, is_long, strict=True)]
        return [min(self.learning_rate, self.coherent / count**0.5) for count in counts]


@dataclass
class Training:
    """What came of a training; the generator holds its best state.

    :ivar dict figures: of the best state, on held-out draws.
    :ivar int best_step: the step at which it was reached.
    :ivar dict log: numbers by name, one for each evaluation.
    :ivar str stopped: why training ended before its time, or None.
    :ivar bool is_interrupted: whether that was Ctrl-C.
    """

    figures: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    log: dict[str, list[float]] = field(default_factory=dict)
    stopped: str | None = None
    is_interrupted: bool = False


def train(
    generator: Generator,
    objective: Objective,
    judge: Judge,
    schedule: Schedule,
    *,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> Training:
    """Trains a generator in place, by torch's global random numbers.

    Over several processes each takes the steps on draws of its own, by averaged gradients
    (:class:`~torch.nn.parallel.DistributedDataParallel`), and the first judges for all.

    Ctrl-C and numbers that are not finite end it early, with the best state so far.

    :param Generator generator: what to train; parameters that need no gradient stay as they are.
    :param Objective objective: what to make small.
    :param Judge judge: chooses the checkpoint.
    :param Schedule schedule: length and rate.
    :param bool progress: show a bar.
    :param Ranks ranks: the processes that train together; each has the same generator and draws.
    :raises RankError: if one of them is gone.
    """
    ranks = ranks or Ranks()
    like = generator(torch.zeros(1, generator.latent_size).to(next(generator.parameters())))

    def latents(count: int) -> Tensor:
        return generator.latents(count, like)

    average = _copy(generator) if schedule.is_annealed else generator
    result = Training()
    watch = _Watch(judge, average, latents, like, result, schedule.num_judged, ranks)
    step = 0
    with tqdm(total=schedule.num_steps, desc="Distil", disable=not progress, leave=True) as bar:
        try:
            is_finite = watch.look(0, None)
            for step, loss in enumerate(_steps(generator, average, latents, objective, schedule, ranks), start=1):
                bar.update()
                if step % max(1, schedule.num_steps // schedule.num_evaluations) == 0 or step == schedule.num_steps:
                    is_finite = watch.look(step, loss)
                    bar.set_postfix(loss=f"{float(loss):.3f}", **{k: f"{v:.3f}" for k, v in _last(result.log).items()})
                if not is_finite:
                    result.stopped = f"training diverged by step {step} of {schedule.num_steps}"
                    break
        except KeyboardInterrupt:
            result.stopped = f"training was interrupted at step {step} of {schedule.num_steps}"
            result.is_interrupted = True
    watch.restore(generator)
    return result


class _Watch:
    """Judges states as training goes, and keeps the best."""

    def __init__(
        self,
        judge: Judge,
        average: Generator,
        latents: Callable[[int], Tensor],
        like: Tensor,
        result: Training,
        num_judged: int,
        ranks: Ranks,
    ) -> None:
        self._judge, self._average, self._latents, self._device = judge, average, latents, like.device
        # Some at a time: so many draws of a large network are more than a step of training holds. Always the same.
        part = together(average.output_size * like.element_size())
        self._counts = [min(part, num_judged - start) for start in range(0, num_judged, part)]
        self._seed, self._ranks = int(torch.randint(2**31, ())), ranks
        self._result, self._best, self._smallest = result, _trained_state(average), math.inf

    @torch.no_grad()
    def look(self, step: int, loss: Tensor | None) -> bool:
        """Logs a state and keeps it if it is the best, or as good as; whether its figures are finite."""
        seen = None
        if self._ranks.rank == 0:
            seen = self._judge.figures(self._draws()), None if loss is None else float(loss)
        figures, loss_seen = self._ranks.broadcast_object(seen)
        is_finite = all(math.isfinite(value) for value in figures.values())
        _append(self._result.log, step, figures, loss_seen)
        if is_finite and figures["distance"] < self._smallest + self._judge.tolerance:
            self._smallest = min(self._smallest, figures["distance"])
            self._result.figures, self._result.best_step = figures, step
            self._best = _trained_state(self._average)
        return is_finite

    @torch.no_grad()
    def restore(self, generator: Generator) -> None:
        """Puts the best state into the generator."""
        for name, parameter in generator.named_parameters():
            if name in self._best:
                parameter.copy_(self._best[name])
                self._ranks.broadcast(parameter.data, 0)

    def _draws(self) -> Iterator[Tensor]:
        with seeded(self._seed, self._device):
            for count in self._counts:
                yield self._average(self._latents(count))


def _steps(
    generator: Generator,
    average: nn.Module,
    latents: Callable[[int], Tensor],
    objective: Objective,
    schedule: Schedule,
    ranks: Ranks,
) -> Iterator[Tensor]:
    """Takes the steps one by one, and yields the loss of each."""
    module = ranks.data_parallel(generator)
    if ranks.size > 1:
        torch.manual_seed(int(torch.randint(2**31, ())) + ranks.rank)
    trained = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    rates = schedule.rates(generator, trained)
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(trained, rates, strict=True)]
    optimiser = torch.optim.Adam(groups, betas=(0.5, 0.9))
    # The average looks back over the last two hundredths of a training, whatever its length.
    decay = max(0.0, 1.0 - 5.0 / max(schedule.num_steps, 1))
    for step in range(schedule.num_steps):
        if schedule.is_annealed:
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * (1.0 - step / schedule.num_steps)
        optimiser.zero_grad()
        with ranks.reporting_lost_processes():
            loss = objective.backward(lambda count: module(latents(count)))
        optimiser.step()
        if average is not generator:
            with torch.no_grad():
                for mean, value in zip(average.parameters(), generator.parameters(), strict=True):
                    if value.requires_grad:
                        mean.lerp_(value, 1.0 - decay)
        yield loss


def _copy(generator: Generator) -> Generator:
    """A copy that shares what is not trained, which is most of it."""
    tensors = [*generator.parameters(), *generator.buffers()]
    shared = {id(tensor): tensor for tensor in tensors if not tensor.requires_grad}
    return copy.deepcopy(generator, shared)


def _trained_state(generator: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in generator.named_parameters() if p.requires_grad}


def _append(log: dict[str, list[float]], step: int, figures: dict[str, float], loss: float | None) -> None:
    """Four digits a number: the log travels in the file."""
    entries = {"step": float(step), "loss": math.nan if loss is None else loss, **figures}
    for name in log.keys() | entries.keys():
        value = entries.get(name, math.nan)
        log.setdefault(name, []).append(float(f"{value:.4g}"))


def _last(log: dict[str, list[float]]) -> dict[str, float]:
    return {name: values[-1] for name, values in sorted(log.items()) if name not in ("step", "loss")}
