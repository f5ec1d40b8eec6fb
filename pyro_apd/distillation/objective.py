# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What a generator is trained to make small, and what it is judged by on held-out draws."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_apd.distillation.critic import GAMES, Game, build_critic
from pyro_apd.distillation.probes import Probes
from pyro_apd.generators.draw_blocks import DrawBlocks, together
from pyro_apd.models.layout import Layout
from pyro_apd.predictive.predictive import FunctionView
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.ranks import Ranks
from pyro_apd.uncertainty import mutual_information

#: From a number of draws to as many draws of the generator, ``(S, D)``.
Generate = Callable[[int], Tensor]

# Bytes of intermediate results that the draws of a part have together, of filters often far more than of weights.
_RESULTS_BYTES = 64 * 2**20
# Spread, relative to the average over probes, below which a probe no longer gains weight.
_SPREAD_FLOOR = 0.05


class _SumOfDistances(torch.autograd.Function):
    """Sum over pairs of Euclidean distances ``(P,)`` between ``(P, S, F)`` and ``(P, T, F)``, with its gradient.

    Both come from one matrix of inverse distances, by products of matrices; differentiating :func:`torch.cdist` takes
    many times as long. With ``is_same`` a draw is not paired with itself.
    """

    @staticmethod
    def forward(ctx: Any, first_PSF: Tensor, second_PTF: Tensor, is_same: bool) -> Tensor:
        first_PS, second_PT = first_PSF.square().sum(-1), second_PTF.square().sum(-1)
        squares_PST = first_PS.unsqueeze(-1) + second_PT.unsqueeze(-2)
        # Below this a square is rounding.
        floor = torch.finfo(squares_PST.dtype).eps * (first_PS.mean() + second_PT.mean())
        squares_PST.baddbmm_(first_PSF, second_PTF.mT, alpha=-2)
        inverse_PST = squares_PST.clamp_(min=floor + torch.finfo(squares_PST.dtype).tiny).rsqrt_()
        if is_same:
            inverse_PST.diagonal(dim1=1, dim2=2).zero_()
        of_first_PSF = first_PSF * inverse_PST.sum(-1, keepdim=True) - inverse_PST @ second_PTF
        of_second_PTF = second_PTF * inverse_PST.sum(-2).unsqueeze(-1) - inverse_PST.mT @ first_PSF
        ctx.save_for_backward(of_first_PSF, of_second_PTF)
        # Euler: what is homogeneous of degree one is its gradient times its argument.
        return (first_PSF * of_first_PSF).sum((1, 2)) + (second_PTF * of_second_PTF).sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer_P: Tensor) -> tuple[Tensor, Tensor, None]:
        of_first_PSF, of_second_PTF = ctx.saved_tensors
        return outer_P[:, None, None] * of_first_PSF, outer_P[:, None, None] * of_second_PTF, None


def spread(values_PSF: Tensor) -> Tensor:
    """Mean distance between two different draws, ``(P,)``."""
    num_draws = values_PSF.shape[1]
    centred_PSF = values_PSF - values_PSF.detach().mean(1, keepdim=True)
    total_P: Tensor = _SumOfDistances.apply(centred_PSF, centred_PSF, True)  # type: ignore[no-untyped-call]
    return total_P / (num_draws * (num_draws - 1))


def energy_distance(fake_PSF: Tensor, real_PTF: Tensor, spread_P: Tensor | None = None) -> Tensor:
    """Energy distance between two samples, ``(P,)``, without bias (Szekely & Rizzo 2013).

    2 E|x - y| - E|x - x'| - E|y - y'|: zero where the distributions agree, in every moment. It is the game against
    the best critic among functions of bounded norm, whose answer is known in closed form, so that no critic has to be
    trained (Bellemare et al. 2017). Pairs of a draw with itself are left out: with them, a narrower generator would
    win.

    :param spread_P: that of ``real``, where it is known.
    """
    # Squares without the arguments' common part keep their digits.
    centre = real_PTF.mean(1, keepdim=True)
    fake_PSF, real_PTF = fake_PSF - centre, real_PTF - centre
    across_P: Tensor = _SumOfDistances.apply(fake_PSF, real_PTF, False)  # type: ignore[no-untyped-call]
    num_pairs = fake_PSF.shape[1] * real_PTF.shape[1]
    return 2 * across_P / num_pairs - spread(fake_PSF) - (spread(real_PTF) if spread_P is None else spread_P)


def nearest_neighbour_distance(fake_SR: Tensor, real_TR: Tensor) -> Tensor:
    """Mean distance to the nearest draw of the other sample, over both directions.

    Draws off the chain's path raise the one direction, a part of the path never visited raises the other.
    """
    distance_ST = torch.cdist(fake_SR, real_TR)
    return 0.5 * (distance_ST.amin(1).mean() + distance_ST.amin(0).mean())


class FunctionSpace:
    """Draws as functions of probe inputs.

    :param FunctionView view: from constrained draws to function values ``(S, N, F)``.
    :param Layout layout: of the draws.
    :param str kind: of the observed site, as in :class:`~pyro_apd.predictive.predictive.Outputs`.
    """

    def __init__(self, view: FunctionView, layout: Layout, kind: str) -> None:
        self._view, self._layout, self._kind = view, layout, kind

    def views(self, theta_SD: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Function values ``(P, S, F)``, on each scale that matters.

        Log-probabilities tell draws apart everywhere, probabilities where the decision falls; each alone lets the
        generator be wrong where the other looks. The last view is the one that users see.
        """
        values_PSF = self._view(self._layout.constrain(theta_SD), *inputs).transpose(0, 1)
        if self._kind == "categorical":
            return [values_PSF, values_PSF.exp()]
        if self._kind == "bernoulli":
            return [values_PSF, torch.cat([-values_PSF, values_PSF], dim=-1).sigmoid()]
        return [values_PSF]

    def distance(self, fake: list[Tensor], real: list[Tensor]) -> Tensor:
        """Energy distance relative to the chain's own spread, averaged over probes and summed over views."""
        total = real[0].new_zeros(())
        for fake_PSF, real_PTF in zip(fake, real, strict=True):
            spread_P = spread(real_PTF)
            floor = _SPREAD_FLOOR * spread_P.mean() + torch.finfo(spread_P.dtype).eps
            total = total + (energy_distance(fake_PSF, real_PTF, spread_P) / (spread_P + floor)).mean()
        return total

    def mutual_information(self, views: list[Tensor]) -> Tensor | None:
        """Mean over probes, in nats; None unless the model classifies."""
        if self._kind not in ("categorical", "bernoulli"):
            return None
        return mutual_information(views[-1].transpose(0, 1)).mean()


class Objective(ABC):
    """What a generator is trained to make small."""

    @abstractmethod
    def backward(self, generate: Generate) -> Tensor:
        """Adds the gradient of the loss on fresh draws to that of the generator's parameters; returns the loss."""


class FunctionObjective(Objective):
    """Energy distance between generator and chain at fresh probe inputs in each step.

    :param FunctionSpace space: where to compare.
    :param Probes probes: where the inputs come from.
    :param theta_SD: draws of the chain, as a tensor or in blocks.
    :param int batch_size: draws of either a step.
    :param int num_probes: inputs a step.
    :param int result_bytes: what is computed on the way from a draw to its function values, all inputs together.
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
        self._space, self._probes, self._theta_SD = space, probes, theta_SD
        self._batch_size, self._num_probes, self._result_bytes = batch_size, num_probes, result_bytes

    def backward(self, generate: Generate) -> Tensor:
        """See :class:`Objective`.

        Draws of a large network are made a part at a time, and again for the gradient, so that a step takes the memory
        of a part.
        """
        inputs, spans, real = self._batch()
        if len(spans) == 1:
            loss = self._space.distance(self._space.views(generate(self._batch_size), inputs), real)
            loss.backward()
            return loss.detach()
        seeds = torch.randint(2**31, (len(spans),)).tolist()

        def views(i: int) -> list[Tensor]:
            with seeded(seeds[i], real[0].device):
                return self._space.views(generate(spans[i].stop - spans[i].start), inputs)

        with torch.no_grad():
            fake = [view.requires_grad_() for view in _joined(views(i) for i in range(len(spans)))]
        loss = self._space.distance(fake, real)
        gradients = torch.autograd.grad(loss, fake)
        for i, span in enumerate(spans):
            torch.autograd.backward(views(i), [gradient[:, span] for gradient in gradients])
        return loss.detach()

    @torch.no_grad()
    def value(self, generate: Generate) -> Tensor:
        """The loss on fresh draws, without its gradient."""
        inputs, spans, real = self._batch()
        fake = _joined(self._space.views(generate(span.stop - span.start), inputs) for span in spans)
        return self._space.distance(fake, real)

    @torch.no_grad()
    def _batch(self) -> tuple[tuple[Tensor, ...], list[slice], list[Tensor]]:
        """Fresh inputs, parts of a batch, and the views of a batch of the chain's draws."""
        inputs, spans = (
            self._probes.draw(self._num_probes),
            _spans(self._batch_size, self._theta_SD, self._result_bytes),
        )
        row_S = even_rows(self._theta_SD, self._batch_size)
        return inputs, spans, _joined(self._space.views(self._theta_SD[row_S[span]], inputs) for span in spans)


def _spans(count: int, theta_SD: Tensor | DrawBlocks, result_bytes: int) -> list[slice]:
    """Parts of so many draws."""
    length = together(theta_SD.shape[-1] * theta_SD.dtype.itemsize)
    length = max(1, min(length, _RESULTS_BYTES // max(1, result_bytes)))
    return [slice(start, min(start + length, count)) for start in range(0, count, length)]


def _joined(parts: Iterable[list[Tensor]]) -> list[Tensor]:
    """Views of all draws from those of parts of them."""
    return [torch.cat(views, 1) for views in zip(*parts, strict=True)]


class AdversarialObjective(Objective):
    """A game against a learned critic: by default WGAN-GP (Gulrajani et al. 2017), as in Wang et al. 2018.

    :param callable features: from draws ``(S, D)`` to what the critic sees, ``(S, F)``.
    :param real_SF: what the critic sees of the chain's draws, as a tensor or in blocks.
    :param float learning_rate: of the critic, where the game has none of its own.
    :param Game game: what either makes small.
    :param int batch_size: draws of either a step; each step of the critic sees fresh draws.
    :param Ranks ranks: the processes that train together.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        real_SF: Tensor | DrawBlocks,
        learning_rate: float,
        game: Game = GAMES["wgan-gp"],
        batch_size: int = 100,
        ranks: Ranks | None = None,
    ) -> None:
        self._features, self._real_SF, self._game, self._batch_size = features, real_SF, game, batch_size
        self._critic: nn.Sequential = build_critic(real_SF.shape[-1]).to(real_SF.device, real_SF.dtype)
        self._averaging = (ranks or Ranks()).data_parallel(self._critic)
        self._optimiser = game.optimiser(self._critic.parameters(), learning_rate)

    def backward(self, generate: Generate) -> Tensor:
        """See :class:`Objective`; the critic is trained first."""
        for _ in range(self._game.critic_steps):
            with torch.no_grad():
                fake_SF = self._features(generate(self._batch_size))
            loss = self._game.of_critic(self._averaging, pick(self._real_SF, self._batch_size), fake_SF)
            self._optimiser.zero_grad()
            loss.backward()
            self._optimiser.step()
            self._game.constrain(self._critic)
        self._critic.requires_grad_(False)  # its gradient is nobody's here
        loss = self._game.of_generator(self._critic(self._features(generate(self._batch_size))))
        loss.backward()
        self._critic.requires_grad_(True)
        return loss.detach()


class Judge(ABC):
    """Figures of a generator against held-out draws. The smallest ``distance`` wins, never the best NLL.

    :cvar float tolerance: a later state wins against one whose distance is smaller by less than this.
    """

    tolerance = 0.0

    @abstractmethod
    def figures(self, theta: Tensor | Iterable[Tensor]) -> dict[str, float]:
        """``distance``, ``spread_ratio`` and, for classification, ``mi_ratio`` of generated draws.

        :param theta: draws ``(S, D)``, or parts of them.
        """


class FunctionJudge(Judge):
    """Compares in function space, at probes that stay the same.

    Distances, in units of the chain's spread, are known to about a hundredth.

    :param held_out: draws of the chain that were not trained on, ``(T, D)``, or parts of them.
    """

    tolerance = 0.01

    def __init__(
        self, space: FunctionSpace, probes: Probes, held_out: Tensor | Iterable[Tensor], num_probes: int = 96
    ) -> None:
        self._space, self._inputs = space, probes.draw(num_probes)
        self._real = self._views(held_out)

    @torch.no_grad()
    def _views(self, theta: Tensor | Iterable[Tensor]) -> list[Tensor]:
        return _joined(self._space.views(part_ND, self._inputs) for part_ND in _parts(theta))

    @torch.no_grad()
    def figures(self, theta: Tensor | Iterable[Tensor]) -> dict[str, float]:
        """See :class:`Judge`."""
        fake, real = self._views(theta), self._real
        if not all(bool(value.isfinite().all()) for value in fake):
            return {"distance": math.nan, "spread_ratio": math.nan}
        figures = {
            "distance": float(self._space.distance(fake, real)),
            "spread_ratio": _ratio(spread(fake[-1]).mean(), spread(real[-1]).mean()),
        }
        fake_mi, real_mi = self._space.mutual_information(fake), self._space.mutual_information(real)
        if fake_mi is not None and real_mi is not None:
            figures["mi_ratio"] = _ratio(fake_mi, real_mi)
        return figures


class WeightJudge(Judge):
    """Compares in weight space, for want of functions.

    :param callable features: from draws ``(S, D)`` to what is compared, ``(S, F)``.
    :param held_out: draws of the chain that were not trained on, ``(T, D)``, or parts of them.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], held_out: Tensor | Iterable[Tensor]) -> None:
        self._features = features
        self._real_TF = torch.cat([features(part_ND) for part_ND in _parts(held_out)])

    @torch.no_grad()
    def figures(self, theta: Tensor | Iterable[Tensor]) -> dict[str, float]:
        """See :class:`Judge`."""
        fake_SF, real_TF = torch.cat([self._features(part_ND) for part_ND in _parts(theta)]), self._real_TF
        return {
            "distance": float(nearest_neighbour_distance(fake_SF, real_TF)),
            "spread_ratio": _ratio(spread(fake_SF[None])[0], spread(real_TF[None])[0]),
        }


def pick(values_SD: Tensor | DrawBlocks, count: int) -> Tensor:
    """``count`` rows, ``(count, D)``: see :func:`even_rows`."""
    return values_SD[even_rows(values_SD, count)]


def even_rows(values_SD: Tensor | DrawBlocks, count: int) -> Tensor:
    """Numbers ``(count,)`` of rows: of a tensor, drawn with replacement; of blocks, evenly over chains and along them.

    Stretches of chains represented unevenly in a batch are most of the noise of a distance between two.
    """
    device, num_rows = values_SD.device, len(values_SD)
    if isinstance(values_SD, Tensor):
        return torch.randint(num_rows, (count,), device=device)
    order_S = torch.randperm(count, device=device)
    quantile_S = ((order_S + torch.rand(count, device=device)) / count + torch.rand((), device=device)) % 1.0
    return (quantile_S * num_rows).long().clamp(max=num_rows - 1)


def _parts(theta: Tensor | Iterable[Tensor]) -> Iterable[Tensor]:
    return (theta,) if isinstance(theta, Tensor) else theta


def _ratio(fake: Tensor, real: Tensor) -> float:
    return float(fake / real.clamp(min=torch.finfo(real.dtype).eps))
