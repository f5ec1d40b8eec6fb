# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Losses that the generator minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_apd.distillation.critic import GAN_LOSSES, GANLoss, build_critic
from pyro_apd.distillation.function_space import FunctionSpace, joined
from pyro_apd.distillation.probes import Probes
from pyro_apd.generators.draw_blocks import DrawBlocks, draws_per_block
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.ranks import Ranks
from pyro_apd.runtime.seeds import derived_seed, fresh_seed

#: From a number of draws to as many draws of the generator, ``(S, D)``.
Generate = Callable[[int], Tensor]

# Bytes of intermediate results of the draws of a block. Convolutions have far more of these than of weights.
_RESULTS_BYTES = 64 * 2**20


class Objective(ABC):
    """Loss that the generator minimises."""

    @abstractmethod
    def backward(self, generate: Generate) -> Tensor:
        """Adds the gradient of the loss on fresh draws to that of the generator's parameters, and returns the loss."""


class FunctionObjective(Objective):
    """Energy distance between generator and chain, at fresh probe inputs in each step.

    :param FunctionSpace space: how draws are compared.
    :param Probes probes: makes the inputs.
    :param theta_SD: draws of the chain, as a tensor or in blocks.
    :param int batch_size: draws of the generator, and as many of the chain, per step.
    :param int num_probes: inputs per step.
    :param int result_bytes: size of the intermediate results per draw, for all inputs.
    """

    def __init__(
        self,
        space: FunctionSpace,
        probes: Probes,
        theta_SD: Tensor | DrawBlocks,
        batch_size: int = 64,
        num_probes: int = 96,
        result_bytes: int = 0,
    ) -> None:
        self._space = space
        self._probes = probes
        self._theta_SD = theta_SD
        self._batch_size = batch_size
        self._num_probes = num_probes
        self._result_bytes = result_bytes

    def backward(self, generate: Generate) -> Tensor:
        """See :class:`Objective`.

        Draws of a large network are made in blocks, and made again for the gradient, so that a step takes the memory
        of one block.
        """
        inputs, spans, real = self._batch()
        if len(spans) == 1:
            loss = self._space.distance(self._space.views(generate(self._batch_size), inputs), real)
            loss.backward()
            return loss.detach()
        seed = fresh_seed()

        def views(i: int) -> list[Tensor]:
            with seeded(derived_seed(seed, "block", i), real[0].device):
                return self._space.views(generate(spans[i].stop - spans[i].start), inputs)

        with torch.no_grad():
            fake = [view.requires_grad_() for view in joined(views(i) for i in range(len(spans)))]
        loss = self._space.distance(fake, real)
        gradients = torch.autograd.grad(loss, fake)
        for i, span in enumerate(spans):
            torch.autograd.backward(views(i), [gradient[:, span] for gradient in gradients])
        return loss.detach()

    @torch.no_grad()
    def value(self, generate: Generate) -> Tensor:
        """The loss on fresh draws, without its gradient."""
        inputs, spans, real = self._batch()
        fake = joined(self._space.views(generate(span.stop - span.start), inputs) for span in spans)
        return self._space.distance(fake, real)

    @torch.no_grad()
    def _batch(self) -> tuple[tuple[Tensor, ...], list[slice], list[Tensor]]:
        """Fresh inputs, the blocks of a batch, and the views of a batch of the chain's draws."""
        inputs = self._probes.draw(self._num_probes)
        spans = _spans(self._batch_size, self._theta_SD, self._result_bytes)
        row_S = even_rows(self._theta_SD, self._batch_size)
        return inputs, spans, joined(self._space.views(self._theta_SD[row_S[span]], inputs) for span in spans)


def _spans(count: int, theta_SD: Tensor | DrawBlocks, result_bytes: int) -> list[slice]:
    """Blocks of ``count`` draws."""
    length = draws_per_block(theta_SD.shape[-1] * theta_SD.dtype.itemsize)
    length = max(1, min(length, _RESULTS_BYTES // max(1, result_bytes)))
    return [slice(start, min(start + length, count)) for start in range(0, count, length)]


class AdversarialObjective(Objective):
    """A GAN loss with a learned critic, by default WGAN-GP (Gulrajani et al. 2017), as in Wang et al. 2018.

    :param callable features: from draws ``(S, D)`` to what the critic sees, ``(S, F)``.
    :param real_SF: what the critic sees of the chain's draws, as a tensor or in blocks.
    :param float learning_rate: of the critic, unless the GAN loss has its own.
    :param GANLoss gan_loss: losses of critic and generator.
    :param int batch_size: draws of the generator, and as many of the chain, per step of critic or generator.
    :param Ranks ranks: the processes that train together.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        real_SF: Tensor | DrawBlocks,
        learning_rate: float,
        gan_loss: GANLoss = GAN_LOSSES["wgan-gp"],
        batch_size: int = 100,
        ranks: Ranks | None = None,
    ) -> None:
        self._features = features
        self._real_SF = real_SF
        self._gan_loss = gan_loss
        self._batch_size = batch_size
        self._critic: nn.Sequential = build_critic(real_SF.shape[-1]).to(real_SF.device, real_SF.dtype)
        self._averaging = (ranks or Ranks()).data_parallel(self._critic)
        self._optimiser = gan_loss.optimiser(self._critic.parameters(), learning_rate)

    def backward(self, generate: Generate) -> Tensor:
        """See :class:`Objective`; the critic is trained first."""
        for _ in range(self._gan_loss.critic_steps):
            with torch.no_grad():
                fake_SF = self._features(generate(self._batch_size))
            loss = self._gan_loss.of_critic(self._averaging, pick(self._real_SF, self._batch_size), fake_SF)
            self._optimiser.zero_grad()
            loss.backward()
            self._optimiser.step()
            self._gan_loss.constrain(self._critic)
        self._critic.requires_grad_(False)  # only the generator's gradient is needed here
        loss = self._gan_loss.of_generator(self._critic(self._features(generate(self._batch_size))))
        loss.backward()
        self._critic.requires_grad_(True)
        return loss.detach()


def pick(values_SD: Tensor | DrawBlocks, count: int) -> Tensor:
    """``count`` rows, ``(count, D)``: see :func:`even_rows`."""
    return values_SD[even_rows(values_SD, count)]


def even_rows(values_SD: Tensor | DrawBlocks, count: int) -> Tensor:
    """Row numbers ``(count,)``: of a tensor, drawn with replacement; of blocks, evenly over chains and along them.

    Most of the noise of a distance between two batches comes from segments of chains that are not evenly represented.
    """
    device = values_SD.device
    num_rows = len(values_SD)
    if isinstance(values_SD, Tensor):
        return torch.randint(num_rows, (count,), device=device)
    order_S = torch.randperm(count, device=device)
    quantile_S = ((order_S + torch.rand(count, device=device)) / count + torch.rand((), device=device)) % 1.0
    return (quantile_S * num_rows).long().clamp(max=num_rows - 1)
