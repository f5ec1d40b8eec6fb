# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""``step_size="auto"``: a step size from measured curvature and gradient noise, chosen during warm-up and then kept.

The step is the largest at which a Gaussian of the measured curvatures would come out too wide by no more than a stated
share (:mod:`pyro_apd.kernels.adaptation.dynamics` has the theory), for two
reasons together, discretisation and mini-batch noise:

* With up to 32 latents the Hessian and the noise are measured whole, and the share holds for **every direction**.
* With more, their spectra are estimated from random vectors, and the share holds for the **trace of the covariance**.
  In a Bayesian neural network most directions have little more curvature than the prior, so the few stiff ones hardly
  count: these are held back from the limit of stability instead, at 5 times the share of the way to it, and never more
  than half. At the default share the stiffest direction comes out twice too wide by discretisation, and mini-batch
  noise may widen stiff directions further.

Of chains that advance together one step goes for all: the share holds on their average, and the stiffest of them sets
the distance from instability. Where other processes have chains of the run, all measure their own at the same steps and
hand round the figures, never a state, so that the step is the one that a single process would choose.

A model of several modes or of strong curvature changes is no Gaussian: the share is then one of a Gaussian like it at
the points where it was measured.

The curvature of a network rises by orders of magnitude while it learns. So it is measured several times over the
warm-up, at equal distances; the step follows, and what is kept is the median of the measures in its last quarter.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_apd.data.minibatch import FullBatch, MinibatchSource, PlateSubsample, RowSubsample
from pyro_apd.data.row_reader import RowReader
from pyro_apd.kernels.adaptation.curvature import dense_hessian, hessian_product, lanczos
from pyro_apd.kernels.adaptation.dynamics import Dynamics
from pyro_apd.runtime.ranks import Ranks

logger = logging.getLogger("pyro_apd")

#: Share by which variances may come out too large, where nothing is said.
MAX_INFLATION = 0.1
#: Models of up to so many latents are measured direction by direction.
MAX_DENSE = 32

# Measures a warm-up, at least so many steps apart.
_NUM_MEASURES, _MIN_APART = 12, 50
# Measures from this share of the warm-up on decide.
_SETTLED = 0.75
# Products with the Hessian: for the largest curvature alone, and for a spectrum.
_NUM_LARGEST, _NUM_SPECTRUM = 8, 12
# Batches that the noise is measured by: where every direction counts by itself, and where only their sum does.
_NUM_NOISE_DENSE, _NUM_NOISE = 64, 8
# Batches that a whole Hessian is averaged over, at most.
_NUM_HESSIAN = 8
# Times that a chain may run away while its step is looked for.
_MAX_BACK_OFFS = 8
# What is aimed at, as a part of what is allowed: measures have errors.
_MARGIN = 0.9
# A step changes at most so much from one measure to the next by what the potential says.
_MAX_CHANGE = 4.0
# In warm-up the drift of a step moves the state by no more than this share of its norm.
_MAX_DRIFT = 0.05
# Measures early in the warm-up, as shares of it: what a wrong first step does is to be seen soon.
_EARLY = (0.01, 0.03)

GradientAndEnergy = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Target:
    """What is measured: a potential at a point.

    :ivar gradient: gradient of U ``(..., D)`` and U, at ``(..., D)`` on a batch.
    :ivar draw: the next batch.
    :ivar Tensor theta: the point, ``(D,)`` or ``(C, D)``.
    :ivar Dynamics dynamics: of the sampler, there.
    :ivar float temperature: T.
    :ivar epoch_length: batches an epoch without replacement: 1 for full data, None where batches count as independent.
    :ivar is_active: of C chains, ``(C,)``, those of other processes among them: which have not diverged; None for all.
    :ivar Ranks ranks: processes that have other chains of the run; by default there are none.
    :ivar rows: which of a run's chains are here, and ``of_chains``, how many it has; None where it has no others.
    """

    gradient: GradientAndEnergy
    draw: Callable[[], tuple[Tensor, ...]]
    theta: Tensor
    dynamics: Dynamics
    temperature: float = 1.0
    epoch_length: int | None = None
    is_active: Tensor | None = None
    ranks: Ranks = field(default_factory=Ranks)
    rows: range | None = None
    of_chains: int = 1

    def active(self, values: Tensor) -> Tensor:
        """Figures ``()`` or ``(C,)`` of the chains that go on, from those of all chains of the run."""
        return values if self.is_active is None else values[self.is_active]

    def everywhere(self, *figures: Tensor) -> tuple[Tensor, ...]:
        """Figures ``(C, ...)`` of all chains of the run, in their order, from those of the chains here.

        :raises RankError: if another process is gone.
        """
        if self.ranks.size == 1:
            return figures
        by_process = self.ranks.gathered([figure.cpu() for figure in figures])
        return tuple(torch.cat(parts) for parts in zip(*by_process, strict=True))

    def random(self, generator: torch.Generator) -> Tensor:
        """A random vector of the shape of ``theta``; a chain has the same whichever others are here."""
        if self.rows is None:
            return torch.randn(self.theta.shape, generator=generator).to(self.theta)
        found = torch.empty(self.theta.shape)
        for chain in range(self.of_chains):
            vector = torch.randn(self.theta.shape[-1], generator=generator)
            if chain in self.rows:
                found[chain - self.rows.start] = vector
        return found.to(self.theta)

    def product(self, batches: list[tuple[Tensor, ...]]) -> Callable[[Tensor], Tensor]:
        """Products with the Hessian on these batches, in the sampler's metric."""

        def gradient(theta: Tensor) -> Tensor:
            total = self.gradient(theta, batches[0])[0].clone()
            for batch in batches[1:]:
                total += self.gradient(theta, batch)[0]
            return total / len(batches)

        return lambda v: self.scaled(hessian_product(gradient, self.theta, self.scaled(v)))

    def scaled(self, vector: Tensor) -> Tensor:
        """``vector`` times the square root of the preconditioner."""
        metric = self.dynamics.metric
        return vector if metric is None else vector * metric.sqrt()


def epoch_length(source: MinibatchSource) -> int | None:
    """Batches that a source draws without replacement before it begins anew; None where that is not known."""
    if isinstance(source, FullBatch):
        return 1
    if source.replacement:
        return None
    if isinstance(source, (RowSubsample, RowReader)):
        assert source.num_data is not None
        return source.num_data // source.batch_size
    if isinstance(source, PlateSubsample) and len(source.plates) == 1:
        ((size, batch),) = source.plates.values()
        return size // batch
    # A loader may draw with replacement. Taking batches for independent errs on the side of small steps.
    return None


@dataclass(frozen=True)
class Directions:
    """A Gaussian's directions, one by one or as a quadrature of their spectrum.

    :ivar Tensor curvature: lambda ``(..., K)``, positive.
    :ivar Tensor weight: what T / lambda counts in the trace of the covariance, ``(..., K)``.
    :ivar Tensor noise: variance of the mini-batch gradient there, ``(..., K)``; of a quadrature, times the weight.
    :ivar Tensor largest: largest curvature, ``(...)``.
    :ivar bool is_dense: whether each is a direction of its own, to be held to the share by itself.
    """

    curvature: Tensor
    weight: Tensor
    noise: Tensor
    largest: Tensor
    is_dense: bool

    def everywhere(self, target: Target) -> Directions:
        """Those of all chains of the run."""
        here = (self.curvature, self.weight, self.noise, self.largest)
        curvature, weight, noise, largest = target.everywhere(*here)
        return Directions(curvature, weight, noise, largest, self.is_dense)

    def inflation(self, step_size: float, target: Target) -> Tensor:
        """By what share variances come out too large, ``(...)``: in the worst direction if dense, else of the trace."""
        ratio, of = target.dynamics.variance_ratio, (target.temperature, target.epoch_length)
        if self.is_dense:
            return ratio(step_size, self.curvature, self.noise, *of).amax(-1) - 1
        # Directions and noise are quadratures with nodes of their own: the ratio is linear in the noise.
        quiet = ratio(step_size, self.curvature, torch.zeros_like(self.curvature), *of)
        heat = ratio(step_size, self.curvature, torch.ones_like(self.curvature), *of) - quiet
        widened = torch.where(self.weight > 0, self.weight * quiet, 0.0)
        heated = torch.where(self.noise > 0, self.noise * heat, 0.0)
        total = ((widened + heated) / self.curvature).sum(-1) / (self.weight / self.curvature).sum(-1)
        return total.nan_to_num(math.inf) - 1


def largest_curvature(target: Target, generator: torch.Generator) -> Tensor:
    """Largest curvature ``(...)`` in the sampler's metric, on one batch."""
    return lanczos(target.product([target.draw()]), target.random(generator), _NUM_LARGEST).largest


def measure_directions(target: Target, generator: torch.Generator) -> Directions:
    """Curvature and gradient noise at a point: whole for small models, as spectra for large ones."""
    return _measure_dense(target) if target.theta.shape[-1] <= MAX_DENSE else _measure_spectra(target, generator)


def _measure_dense(target: Target) -> Directions:
    length = target.epoch_length
    batches = [target.draw() for _ in range(min(length or _NUM_HESSIAN, _NUM_HESSIAN))]
    hessian = dense_hessian(target.product(batches), target.theta)
    values, vectors = torch.linalg.eigh(hessian.nan_to_num(0.0))
    noise_MD = _gradient_noise(target, _NUM_NOISE_DENSE)
    noise = torch.zeros_like(values)
    if noise_MD.dim() > 0:
        noise = torch.einsum("m...d,...dk->m...k", noise_MD, vectors).square().sum(0)
    curvature, largest = _positive(values, values.abs().amax(-1))
    return Directions(curvature, torch.ones_like(curvature), noise, largest, is_dense=True)


def _measure_spectra(target: Target, generator: torch.Generator) -> Directions:
    product = target.product([target.draw()])
    probe = target.scaled(target.random(generator))
    seen = lanczos(product, probe, _NUM_SPECTRUM)
    noise_MD = _gradient_noise(target, _NUM_NOISE)
    if noise_MD.dim() == 0:
        curvature, largest = _positive(seen.nodes, seen.largest)
        return Directions(curvature, seen.weights, torch.zeros_like(curvature), largest, is_dense=False)
    # A random mixture of the batches' deviations has the covariance of their noise.
    mixture = torch.randn(len(noise_MD), generator=generator, dtype=torch.float64)
    vector = (noise_MD.movedim(0, -1) @ mixture).to(target.theta)
    vector = vector * (noise_MD.square().sum((0, -1)).sqrt().to(vector) / vector.norm(dim=-1)).unsqueeze(-1)
    # In the trace over theta, a preconditioner counts once more.
    noisy = lanczos(product, target.scaled(vector), _NUM_SPECTRUM)
    nodes = torch.cat([seen.nodes, noisy.nodes], -1)
    curvature, largest = _positive(nodes, torch.maximum(seen.largest, noisy.largest))
    none_seen, none_noisy = torch.zeros_like(noisy.weights), torch.zeros_like(seen.weights)
    return Directions(
        curvature,
        torch.cat([seen.weights, none_seen], -1),
        torch.cat([none_noisy, noisy.weights], -1),
        largest,
        is_dense=False,
    )


def _gradient_noise(target: Target, num_batches: int) -> Tensor:
    """Deviations of batch gradients from their mean ``(M, ..., D)``, scaled so that their squares sum to the variance.

    A scalar 0 where every batch is all the data.
    """
    length = target.epoch_length
    if length == 1:
        return torch.zeros(())
    gradients = [
        target.scaled(target.gradient(target.theta, target.draw())[0]).double().cpu() for _ in range(num_batches)
    ]
    stacked = torch.stack(gradients)
    # Of one epoch's batches, which cancel, the sample variance is too large by k / (k - 1).
    share = 1.0 if length is None or length < num_batches else (length - 1) / length
    return (stacked - stacked.mean(0)) * math.sqrt(share / (num_batches - 1))


def _positive(curvature: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Curvatures by their size, and none below a millionth of the largest: where U bends down, no Gaussian is near."""
    largest = torch.where(largest > 0, largest, 1e-12)
    return torch.maximum(curvature.abs(), 1e-6 * largest.unsqueeze(-1)), largest


@dataclass(frozen=True)
class Choice:
    """A step size, and why.

    :ivar float step_size: epsilon.
    :ivar str bound: what bounds it: ``"inflation"`` or ``"stability"``.
    :ivar float inflation: predicted share by which variances come out too large.
    :ivar float largest_curvature: lambda in the stiffest direction, in the sampler's metric.
    """

    step_size: float
    bound: str
    inflation: float
    largest_curvature: float


def stable_step_size(largest: float, dynamics: Dynamics, max_inflation: float) -> float:
    """The largest step that keeps the stiffest direction at a distance from the limit of stability."""
    return min(5 * max_inflation, 0.5) * dynamics.limit / largest


def choose(directions: Directions, target: Target, max_inflation: float) -> Choice:
    """The largest step size that keeps both rules of this module."""
    largest = float(target.active(directions.largest).max())
    high = stable_step_size(largest, target.dynamics, max_inflation)
    if target.temperature == 0:
        return Choice(high, "stability", 0.0, largest)

    def inflation(step_size: float) -> float:
        return float(target.active(directions.inflation(step_size, target)).mean())

    allowed = _MARGIN * max_inflation
    if inflation(high) <= allowed:
        return Choice(high, "stability", inflation(high), largest)
    low = high * 1e-6
    if not inflation(low) <= allowed:
        # No step would do, as where gradients are not finite: what is stable is the least bad.
        return Choice(high, "stability", inflation(high), largest)
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if inflation(middle) <= allowed else (low, middle)
    return Choice(low, "inflation", inflation(low), largest)


class AutoStep:
    """The step size of a chain, or of chains that advance together, over its warm-up.

    All its state is numbers: vectors that it starts from are drawn anew at each measure.

    :param float max_inflation: share by which variances may come out too large.
    :param int num_warmup: Langevin steps of the warm-up; with 0, what is measured at the start is kept.
    :param int seed: of the vectors that it starts from.
    :ivar float step_size: the present step size.
    """

    def __init__(self, max_inflation: float, num_warmup: int, seed: int) -> None:
        self.max_inflation, self.num_warmup, self.seed = max_inflation, num_warmup, seed
        self.step_size = math.nan
        self._choices: list[Choice] = []
        self._energies: list[float] = []
        self._lowest = 0.0
        self._num_back_offs = 0
        count = max(1, min(_NUM_MEASURES, num_warmup // _MIN_APART))
        early = [int(num_warmup * share) for share in _EARLY] if count > 1 else []
        self._marks = sorted({num_warmup * i // count for i in range(count + 1)}.union(early))
        self._num_done = 0

    @property
    def is_settled(self) -> bool:
        """Whether the step size is final."""
        return self._num_done == len(self._marks)

    def __call__(self, step: int) -> float:
        """The step size, as of a schedule."""
        return self.step_size

    def is_due(self, step: int) -> bool:
        """Whether it is time to measure, before Langevin step ``step``."""
        return not self.is_settled and step >= self._marks[self._num_done]

    def measure(self, target: Target) -> None:
        """Measures, and sets the step size. Waits for the device.

        :raises ValueError: if U is flat, so that no step size is better than another.
        """
        generator = torch.Generator().manual_seed((self.seed + 7_919 * self._num_done) % 2**62)
        is_last = self._num_done == len(self._marks) - 1
        if target.is_active is not None and not bool(target.is_active.any()):
            # All chains stand still, and say so when they are over.
            self._num_done += 1
            return
        if is_last or self._marks[self._num_done] >= _SETTLED * self.num_warmup:
            choice = choose(measure_directions(target, generator).everywhere(target), target, self.max_inflation)
            self._choices.append(choice)
            wanted, largest = choice.step_size, choice.largest_curvature
        else:
            (of_chains,) = target.everywhere(largest_curvature(target, generator))
            largest = float(target.active(of_chains).max())
            wanted = stable_step_size(max(largest, 1e-12), target.dynamics, self.max_inflation)
        self._num_done += 1
        if not math.isfinite(wanted):
            # The start has no finite potential, or the chain ran away: its own watch says so at the next step.
            wanted = self.step_size if math.isfinite(self.step_size) else 1e-12
        gradient, energies = target.gradient(target.theta, target.draw())
        # The drift of one step, compared with the state: from far away a gradient can be large where curvature is not.
        drift = target.scaled(target.scaled(gradient)).norm(dim=-1) / (1.0 + target.theta.norm(dim=-1))
        drift, energies = target.everywhere(drift, energies)
        energy = float(target.active(energies).mean())
        fastest = 2 * _MAX_DRIFT / max(float(target.active(drift).max()), 1e-30)
        self.step_size = self._guarded(min(wanted, fastest) if math.isfinite(fastest) else wanted, energy)
        self._energies.append(energy)
        if self.is_settled:
            self._settle()
        else:
            logger.debug(
                "step_size='auto': %.3g for now; largest curvature %.3g, U %.4g.", self.step_size, largest, energy
            )

    def back_off(self, step: int) -> bool:
        """Takes a tenth of the step size, after a chain ran away by Langevin ``step``; False where it is too late.

        The next measures may not go far beyond it at once.
        """
        if self.is_settled or self._num_back_offs == _MAX_BACK_OFFS:
            return False
        self._num_back_offs += 1
        self.step_size /= 10
        self._lowest = min(self._lowest, self.step_size)
        logger.info("step_size='auto': a chain ran away by step %d; going on with %.3g.", step, self.step_size)
        return True

    def _guarded(self, wanted: float, energy: float) -> float:
        """A step that the potential does not speak against.

        Steps that are too large make networks with a learned noise scale take everything for noise. That is flat, and
        would ask for larger steps still. So a chain above where it started slows down, and one that rose keeps its
        step.
        """
        if not self._energies:
            self._lowest = wanted / _MAX_CHANGE**3
            return wanted
        if energy > self._energies[0]:
            return min(wanted, max(self.step_size / _MAX_CHANGE, self._lowest))
        return min(wanted, self.step_size * (1.0 if energy > self._energies[-1] else _MAX_CHANGE))

    def _settle(self) -> None:
        ranked = sorted(self._choices, key=lambda choice: choice.step_size)
        # Of an even number, the smaller of the two in the middle.
        self.step_size = ranked[(len(ranked) - 1) // 2].step_size
        logger.info("%s", self.explanation())

    def explanation(self) -> str:
        """What was chosen and why, in a sentence or two."""
        found = self.report()
        return (
            f"step_size='auto': chose {found['step_size']:.3g}, bound by {found['bound']}. Variances are predicted "
            f"{found['inflation']:.1%} too large ({found['allowed']:.0%} allowed); the largest curvature is "
            f"{found['largest_curvature']:.3g}. Measured {found['num_measures']} times in {self.num_warmup} steps."
        )

    def report(self) -> dict[str, Any]:
        """What was chosen and why: ``step_size``, ``bound`` (``"inflation"`` or ``"stability"``), the predicted
        ``inflation``, ``allowed``, ``largest_curvature`` (in the sampler's metric) and ``num_measures``. Empty before.
        """
        if not self.is_settled or not self._choices:
            return {}
        ranked = sorted(self._choices, key=lambda choice: choice.step_size)
        middle = ranked[(len(ranked) - 1) // 2]
        return {
            "step_size": self.step_size,
            "bound": middle.bound,
            "inflation": middle.inflation,
            "allowed": self.max_inflation,
            "largest_curvature": middle.largest_curvature,
            "num_measures": len(self._marks),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "step_size": self.step_size,
            "num_done": self._num_done,
            "energies": list(self._energies),
            "lowest": self._lowest,
            "num_back_offs": self._num_back_offs,
            "choices": [vars(choice) | {} for choice in self._choices],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, on an object made with the same arguments."""
        self.step_size, self._num_done = float(state["step_size"]), int(state["num_done"])
        self._energies, self._lowest = [float(value) for value in state["energies"]], float(state["lowest"])
        self._choices = [Choice(**choice) for choice in state["choices"]]
        self._num_back_offs = int(state["num_back_offs"])


def checked_max_inflation(max_inflation: float) -> float:
    """``max_inflation`` as a float.

    :raises ValueError: if it is not a positive finite number.
    """
    is_number = isinstance(max_inflation, (int, float)) and not isinstance(max_inflation, bool)
    if not (is_number and math.isfinite(max_inflation) and max_inflation > 0):
        raise ValueError(
            f"max_inflation={max_inflation!r} must be a positive number: the share by which step_size='auto' lets "
            f"variances come out too large. The default is {MAX_INFLATION}."
        )
    return float(max_inflation)
