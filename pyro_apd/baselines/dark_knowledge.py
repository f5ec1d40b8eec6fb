# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Bayesian dark knowledge: one network that predicts what a whole posterior predicts on average.

**References**

Balan, Rathod, Murphy and Welling, *Bayesian Dark Knowledge*, NeurIPS 2015, algorithm 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from pyro_apd.errors import ModelError
from pyro_apd.predictive.draws import PosteriorLike, StreamSampler, Values, check_draws, read_draws
from pyro_apd.predictive.model_check import check_frozen
from pyro_apd.predictive.predictive import FunctionView, outputs
from pyro_apd.runtime.checks import integer, number
from pyro_apd.runtime.global_state import gradients, seeded
from pyro_apd.runtime.seeds import checked_seed
from pyro_apd.runtime.tensor_checks import check_inputs, shape_of

# Draws of a generator are made again every so many steps.
_RENEW = 50


class DarkKnowledge(nn.Module):
    """A student that was taught the predictive distribution of a posterior.

    It gives the average prediction only: what the draws agree or disagree about is not in it, hence no mutual
    information. Draws that disagree show as a flat prediction, or a large variance.

    :ivar torch.nn.Module net: the student.
    :ivar str kind: ``"categorical"``, ``"bernoulli"`` or ``"normal"``.
    :ivar list losses: nats a datum by step.
    """

    def __init__(self, net: nn.Module, kind: str, losses: list[float]) -> None:
        super().__init__()
        self.net, self.kind, self.losses = net, kind, losses

    def forward(self, x: Tensor) -> Tensor:
        """Class probabilities ``(N, K)``, failure first where there are two; else means and variances ``(N, 2)``."""
        output: Tensor = self.net(x)
        if self.kind == "categorical":
            return output.softmax(-1)
        if self.kind == "bernoulli":
            logit = output.reshape(len(x), 1)
            return torch.cat([-logit, logit], dim=-1).sigmoid()
        return torch.stack([output[:, 0], output[:, 1].exp()], dim=-1)


def dark_knowledge(
    source: PosteriorLike,
    model: Callable[..., Any],
    student: nn.Module,
    x: Tensor,
    *,
    num_steps: int = 2000,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    input_noise: float = 0.0,
    draws_per_step: int = 10,
    seed: int | None = None,
    progress: bool = True,
) -> DarkKnowledge:
    """Distils the *predictive* of a chain or generator into one network, for those who cannot afford S passes.

    Each step shows the student a batch of inputs, blurred by noise, and what some draws predict there on average; the
    student minimises the divergence of its prediction from theirs. For a regression it learns the mean and the log
    variance of the mixture.

    :param source: an ``MCMC`` after ``run``, a dict of draws ``(S, ...)``, or a
        :class:`~pyro_apd.DistilledPosterior`, of which new draws are made during training.
    :param callable model: the Pyro model, called as ``model(x)``; one observed site, of one number per row of ``x``.
    :param torch.nn.Module student: from ``(B, ...)`` to logits ``(B, K)``; to one logit, for a Bernoulli site; to mean
        and log variance ``(B, 2)`` for a regression. A copy is trained.
    :param torch.Tensor x: inputs ``(N, ...)``; no targets are needed.
    :param int num_steps: steps of Adam, whose learning rate falls to zero along a cosine.
    :param int batch_size: rows of ``x`` a step.
    :param float learning_rate: of Adam, at the start.
    :param float weight_decay: of the student, as in AdamW.
    :param float input_noise: standard deviation of the noise added to inputs, in units of ``x``.
    :param int draws_per_step: draws that teach in each step.
    :param int seed: makes the result reproducible without touching the global generator.
    :param bool progress: whether to show a bar.
    :raises ValueError: if a number is out of range, draws are malformed, or the student's output has another shape.
    :raises RuntimeError: if the student diverged.
    :raises ModelError: if the model does not have one observed site with a mean and variance.
    :raises ArtifactError: if the model has other frozen weights than the one that was sampled.
    """
    num_steps = integer("num_steps", num_steps)
    batch_size = integer("batch_size", batch_size)
    draws_per_step = integer("draws_per_step", draws_per_step)
    check_inputs("`x`", x, is_real=False)
    x = x.detach()
    _check_student(student)
    learning_rate = number("learning_rate", learning_rate, at_least=0)
    weight_decay = number("weight_decay", weight_decay, at_least=0)
    input_noise = number("input_noise", input_noise, at_least=0)
    with gradients("dark_knowledge"), seeded(checked_seed(seed), x.device):
        teacher = _Teacher(source, model, x[: min(batch_size, len(x))], draws_per_step)
        net = copy.deepcopy(student).to(x.device).train()
        optimiser = torch.optim.AdamW(net.parameters(), lr=learning_rate, weight_decay=weight_decay)
        losses = []
        for inputs in _batches(x, num_steps, batch_size, input_noise, optimiser, progress):
            target = teacher(inputs)
            loss = _loss(_output(net, inputs), target, teacher.kind)
            optimiser.zero_grad()
            loss.backward()
            losses.append(loss.detach())
    values = torch.stack(losses).tolist()
    if not all(map(math.isfinite, values)):
        raise RuntimeError(
            f"The student diverged: its loss is not finite from step {[math.isfinite(v) for v in values].index(False)} "
            f"on. Give a smaller learning_rate than {learning_rate:g}."
        )
    return DarkKnowledge(net.requires_grad_(False).eval(), teacher.kind, values)


def _batches(
    x: Tensor, num_steps: int, batch_size: int, input_noise: float, optimiser: torch.optim.Optimizer, progress: bool
) -> Iterator[Tensor]:
    """Batches of blurred rows; after each comes a step of the optimiser, whose rate falls along a cosine."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
    for _ in tqdm(range(num_steps), desc="Dark knowledge", disable=not progress, leave=False):
        row_B = torch.randint(len(x), (min(batch_size, len(x)),), device=x.device)
        inputs = x[row_B]
        if input_noise:
            inputs = inputs + input_noise * torch.randn_like(inputs)
        yield inputs
        optimiser.step()
        schedule.step()


class _Teacher:
    """Average predictions of some draws: probabilities ``(B, K)``, or means and variances ``(B, 2)``."""

    def __init__(self, source: PosteriorLike, model: Callable[..., Any], x: Tensor, draws_per_step: int) -> None:
        #: Where fresh draws come from; None where all draws there are, are in the pool.
        self._sampler = source if isinstance(source, StreamSampler) else None
        self._count = draws_per_step
        self._step = 0
        self._pool = read_draws(source, None, "source") if self._sampler is None else self._fresh(self._sampler)
        num_draws = check_draws(self._pool, "source")
        check_frozen(source, model, self._pool, (x,), {})
        example = outputs(model, {n: v[:1] for n, v in self._pool.items()}, x)
        self.kind = "normal" if example.kind == "other" else example.kind
        found = example.mean_SN if example.probs_SNK is None else example.probs_SNK
        if found is None or found.shape[1] != len(x):
            raise ModelError(
                f"Site '{example.site}' must have a mean and variance, and one number for each of the {len(x)} rows of "
                "`x`, for a network to be taught what it predicts."
            )
        self._num_draws = num_draws
        self._view = FunctionView(model, self._pool, x)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        if self._sampler is not None and self._step and self._step % _RENEW == 0:
            self._pool = self._fresh(self._sampler)
        self._step += 1
        index = torch.randint(self._num_draws, (self._count,), device=inputs.device)
        value_SBF = self._view({n: v[index] for n, v in self._pool.items()}, inputs)
        if self.kind == "categorical":
            return value_SBF.exp().mean(0)
        if self.kind == "bernoulli":
            return value_SBF.sigmoid().mean(0)
        mean_SB, variance_SB = value_SBF[..., 0], (2 * value_SBF[..., 1]).exp()
        mean_B = mean_SB.mean(0)
        return torch.stack([mean_B, variance_SB.mean(0) + (mean_SB - mean_B).square().mean(0)], dim=-1)

    def _fresh(self, sampler: StreamSampler) -> Values:
        return read_draws(sampler, max(100, 10 * self._count), "source")


def _loss(output: Tensor, target: Tensor, kind: str) -> Tensor:
    """Cross-entropy from the teacher, in nats a datum: its divergence plus what does not depend on the student."""
    if kind == "bernoulli":
        _check_output(output.reshape(len(output), -1), (len(target), 1))
        return functional.binary_cross_entropy_with_logits(output.reshape(-1, 1), target)
    _check_output(output, tuple(target.shape))
    if kind == "categorical":
        return functional.cross_entropy(output, target)
    mean_B, log_variance_B = output.unbind(-1)
    squares_B = target[:, 1] + (target[:, 0] - mean_B).square()
    return 0.5 * (log_variance_B + squares_B * (-log_variance_B).exp() + math.log(2 * math.pi)).mean()


def _output(net: nn.Module, inputs: Tensor) -> Tensor:
    try:
        output: Tensor = net(inputs)
    except RuntimeError as error:
        raise ValueError(
            f"`student` fails on rows of `x` of {shape_of(inputs)} ({str(error).splitlines()[0]:.200}); give one that "
            "takes such inputs."
        ) from error
    return output


def _check_output(output: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(output.shape) != shape:
        raise ValueError(
            f"`student` gives outputs of shape {tuple(output.shape)}, and {shape} are needed: logits by class, or mean "
            "and log variance. Change its last layer."
        )


def _check_student(student: nn.Module) -> None:
    if not isinstance(student, nn.Module) or not any(value.requires_grad for value in student.parameters()):
        raise ValueError(f"`student` must be a torch.nn.Module with parameters to train; got {type(student).__name__}.")
    for name, value in student.named_parameters():
        if not bool(value.isfinite().all()):
            raise ValueError(f"`student` has NaN or infinity in its parameter '{name}'; make another.")
