# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The warm-up of microcanonical Langevin dynamics: step size, preconditioner and length L.

After Robnik, De Luca, Silverstein & Seljak (JMLR 2023) and Sommer et al. (ICLR 2025):

* **Start.** With an automatic step size, starts that are far too wide are shrunk, and some steps of Adam follow: far
  from a mode, energy errors mislead.
* **Step size.** Microcanonical dynamics keeps its energy; steps of a finite size epsilon do not. The variance of the
  error of a step grows as the sixth power of epsilon, and the bias of the draws grows with it. Epsilon is the one at
  which that variance is ``ENERGY_VARIANCE`` per weight.
* **Preconditioner.** The standard deviations of each chain's own states, measured over three windows of the warm-up; on
  mini-batches the noise of their gradients, see :mod:`~pyro_apd.kernels.adaptation.batch_noise`.
* **L**, the length over which the direction of motion is forgotten: the root of the sum of the variances at first, and
  at last a quarter of the distance that a chain covers in an integrated autocorrelation time.

On mini-batches the energy error is measured by trial steps from the present state, all on one batch. The noise of the
gradient is measured as well, and L and epsilon become smaller where it would widen the draws; see
:mod:`~pyro_apd.kernels.adaptation.gradient_noise`. Chains that advance together have one step size; each has its own L.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pyro_apd.kernels.adaptation.batch_noise import BatchNoise
from pyro_apd.kernels.adaptation.excursions import REDUCTION
from pyro_apd.kernels.adaptation.gradient_noise import (
    GradientNoise,
    InflationWarning,
    energy_message,
    noise_message,
    slowdown,
    slowdown_message,
)
from pyro_apd.kernels.adaptation.microcanonical_settings import ENERGY_VARIANCE, MicrocanonicalSettings
from pyro_apd.kernels.adaptation.state_statistics import (
    MAX_CHANGE,
    RunningMoments,
    autocorrelation_time,
    mean_without_outliers,
    step_change,
)
from pyro_apd.kernels.adaptation.warmup import AdaptedChain, WarmUp

if TYPE_CHECKING:
    from pyro_apd.kernels.engine.chain_set import ChainSet

logger = logging.getLogger("pyro_apd")

#: Variance of the energy error, per weight, from where on a given step size is warned of: variances came out 17 % too
#: large there.
MAX_ENERGY_VARIANCE = 1e-2
#: Most steps of Adam before an automatic warm-up, and the largest share of the warm-up's steps that they may be.
NUM_OPTIMISED, OPTIMISED_SHARE = 500, 0.25


# Windows that variances are measured over, as shares of the warm-up: from where the start has been left behind to where
# the preconditioner is final.
_WINDOWS = (0.05, 0.12, 0.25, 0.6)
# Steps from one reading to the next: a share of the warm-up, within bounds.
_SHARE, _MIN_APART, _MAX_APART = 200, 5, 50
# Trials from a guess of the step size to one that is about right.
_NUM_TRIALS = 30
# Factor by which a reading raises the step size at most, and the part of a change that is made.
_MAX_RISE, _GAIN = 2.0, 0.5
# Times that chains may diverge or go on an excursion while the step size is adapted; what it is divided by where one
# diverged.
_MAX_BACK_OFFS, _LOST = 8, 10.0
# Coordinates that autocorrelation is measured in; points in time kept of them, at most, and fewest to be used.
_NUM_COORDINATES, _NUM_POINTS, _MIN_POINTS = 64, 1024, 50
# L over the distance covered in an autocorrelation time. On a heteroscedastic network of 262 weights, mean of three
# seeds, factors of 0.2, 0.4 and 1 made sds of functions 0.7, 3.1 and 7.1 % larger than at a tenth of the energy
# variance, at 101, 126 and 174 effective draws per CPU second.
_LENGTH_FACTOR = 0.25


class MicrocanonicalChain(AdaptedChain, Protocol):
    """What this module needs of a :class:`~pyro_apd.kernels.engine.chain.Chain`.

    :ivar auxiliary: by name, ``scale``: the preconditioner ``(D,)`` or ``(C, D)``; ``length``: L ``(1,)`` or
        ``(C, 1)``; ``energy``: three tensors of that shape, of which the second is the sum of squared energy errors and
        the third their number.
    """

    auxiliary: dict[str, tuple[Tensor, ...]]


class MicrocanonicalWarmUp(WarmUp):
    """Adapts one chain, or C chains that advance together.

    Parameters as for :class:`~pyro_apd.kernels.adaptation.warmup.WarmUp`; ``settings`` say what is found.
    ``step_size`` is the present step size, where it is found here.
    """

    def __init__(
        self,
        num_steps: int,
        num_latents: int,
        temperature: float,
        chains: ChainSet,
        warm_start: int,
        settings: MicrocanonicalSettings,
    ) -> None:
        if settings.adapts_step:
            warm_start = max(warm_start, min(NUM_OPTIMISED, int(OPTIMISED_SHARE * num_steps)))
        super().__init__(num_steps, temperature, chains, None, warm_start, num_latents)
        self._settings, self.is_automatic = settings, settings.adapts_step
        self.shrinks_start = settings.adapts_step
        self.step_size, self._wanted, self._largest = math.nan, math.nan, math.inf
        self._apart = min(max(num_steps // _SHARE, _MIN_APART), _MAX_APART)
        self._next_reading = 0
        self._is_settled = False
        self._num_windows, self._num_back_offs = 0, 0
        self._moments, self._noise = RunningMoments(), BatchNoise(temperature)
        self._ratios: list[float] = []
        self._points: list[Tensor] = []
        self._point_steps: list[int] = []
        self._stride = 1
        self._found: dict[str, Any] = {}

    def __call__(self, step: int) -> float:
        """The step size, as of a schedule."""
        return self.step_size

    @property
    def checks_in_sync(self) -> bool:
        """See :class:`~pyro_apd.kernels.adaptation.warmup.WarmUp`."""
        return self.is_adapting and self._chains.is_distributed

    @property
    def is_adapting(self) -> bool:
        """See :class:`~pyro_apd.kernels.adaptation.warmup.WarmUp`."""
        return self._settings.adapts_step and not self._is_settled

    def before_step(self, chain: MicrocanonicalChain) -> None:  # type: ignore[override]
        """Adapts the chain, where it is time before its next step."""
        super().before_step(chain)
        if self._is_settled:
            return
        with torch.no_grad():
            if self._is_last_part and self._settings.adapts_length:
                self._record(chain)
            if chain.step >= self._next_reading:
                self._read(chain)

    def backs_off(self, chain: AdaptedChain, is_lost: bool, is_outside: bool = False) -> bool:
        """See :class:`~pyro_apd.kernels.adaptation.warmup.WarmUp`."""
        if not self.is_adapting or chain.step <= 1:
            return False
        if self.checks_in_sync:
            lost, outside = zip(*self._chains.peer_ranks.gathered((is_lost, is_outside)), strict=True)
            is_lost, is_outside = any(lost), any(outside)
        if not (is_lost or is_outside) or self._num_back_offs >= _MAX_BACK_OFFS:
            return False
        self._num_back_offs += 1
        self.step_size /= _LOST if is_lost else REDUCTION
        return True

    def report(self) -> dict[str, Any]:
        """What was found: ``step_size``, ``length``, and ``energy_variance`` per weight; on mini-batches also
        ``inflation``, the share by which their noise widens variances, ``allowed``, and ``slowdown``, the factor by
        which that costs more steps. Empty before.
        """
        return dict(self._found)

    def finish(self, chain: MicrocanonicalChain) -> None:  # type: ignore[override]
        """Warns, once, if the kept draws drifted, or have a bias that can be measured."""
        if not self._is_over and self._watch is not None:
            self._warn_of_noise(chain)
            self._warn_of_energy(chain)
        super().finish(chain)

    def state_dict(self) -> dict[str, Any]:
        """All that the continuation depends on."""
        return {
            **super().state_dict(),
            "step_size": self.step_size,
            "wanted": self._wanted,
            "largest": self._largest,
            "next_reading": self._next_reading,
            "is_settled": self._is_settled,
            "num_windows": self._num_windows,
            "num_back_offs": self._num_back_offs,
            "moments": self._moments.state_dict(),
            "noise": self._noise.state_dict(),
            "ratios": list(self._ratios),
            "points": list(self._points),
            "stride": self._stride,
            "point_steps": list(self._point_steps),
            "found": dict(self._found),
        }

    def load_state_dict(self, state: Mapping[str, Any], chain: AdaptedChain) -> None:
        """Inverse of :meth:`state_dict`, on a warm-up with the same settings."""
        super().load_state_dict(state, chain)
        self.step_size, self._wanted, self._largest = (float(state[k]) for k in ("step_size", "wanted", "largest"))
        self._next_reading, self._is_settled = int(state["next_reading"]), bool(state["is_settled"])
        self._num_windows, self._num_back_offs = int(state["num_windows"]), int(state["num_back_offs"])
        self._moments.load_state_dict(state["moments"])
        self._noise.load_state_dict(state["noise"])
        self._ratios, self._points = [float(value) for value in state["ratios"]], list(state["points"])
        self._stride, self._point_steps = int(state["stride"]), [int(step) for step in state["point_steps"]]
        self._found = dict(state["found"])

    # -- internals ----------------------------------------------------------------------------------------------------

    @property
    def _is_last_part(self) -> bool:
        """Whether the preconditioner is final."""
        return self._num_windows == len(_WINDOWS) - 1

    def _steps_to_forget(self, chain: AdaptedChain) -> dict[str, float]:
        """No theory says how long microcanonical dynamics takes."""
        return {}

    def _size(self, chain: AdaptedChain) -> float:
        return self.step_size if self._settings.adapts_step else chain.step_size

    def _set_size(self, size: float) -> None:
        self._wanted = size
        self.step_size = self._chains.same_on_data_ranks(min(size, self._largest))

    def _read(self, chain: MicrocanonicalChain) -> None:
        """A reading: corrects the step size and collects the state; at the end of a window, uses what it collected."""
        share = 1.0 if self.num_steps == 0 else chain.step / self.num_steps
        if chain.step == 0:
            self._try(chain)
        else:
            self._follow(chain)
            if share > _WINDOWS[0] and not self._is_last_part:
                self._moments.add(chain.theta)
                self._noise.add(chain)
                if share >= _WINDOWS[1 + self._num_windows]:
                    self._end_window(chain)
        self._next_reading = min(chain.step + self._apart, self.num_steps)
        if chain.step >= self.num_steps:
            self._settle(chain)

    def _try(self, chain: MicrocanonicalChain) -> None:
        """Finds a step size by trials at the present state alone."""
        if not self._settings.adapts_step:
            return
        size = 0.1 * math.sqrt(chain.theta.shape[-1])
        for _ in range(_NUM_TRIALS):
            change = step_change(self._trial(chain, size, 2), self._settings.energy_variance, 1.0, MAX_CHANGE)
            size *= change
            if 0.5 < change < 2:
                break
        self._set_size(size)

    def _follow(self, chain: MicrocanonicalChain) -> None:
        """Corrects the step size by the energy errors since the last reading, or on mini-batches by trials."""
        if chain.potential.source.epoch_length == 1:
            variances = self._of_active(chain, self._energy_variances(chain))
            for values in chain.auxiliary["energy"][1:]:
                values.zero_()
        else:
            variances = self._trial(chain, self._size(chain), 4)
        size = self._size(chain)
        if not self._is_last_part:
            size *= step_change(variances, self._settings.energy_variance, _GAIN, _MAX_RISE)
        else:
            ratios = variances / size**6
            self._ratios += ratios[torch.isfinite(ratios)].tolist()
            if self._ratios:
                size = (self._settings.energy_variance / max(mean_without_outliers(self._ratios), 1e-300)) ** (1 / 6)
        if self._settings.adapts_step:
            self._set_size(size)

    def _end_window(self, chain: MicrocanonicalChain) -> None:
        """Uses the variances of a window, and starts the next."""
        self._num_windows += 1
        scale = self._moments.scale()
        self._moments = RunningMoments()
        if scale is None:
            return
        if self._settings.preconditions:
            scale = self._noise.preconditioner(scale)
            chain.auxiliary["scale"][0].copy_(scale)
            # What was found in the metric of before says nothing in this one.
            self._largest = math.inf
            if self._settings.adapts_length:
                chain.auxiliary["length"][0].fill_(math.sqrt(scale.shape[-1]))
            self._try(chain)
        elif self._settings.adapts_length:
            chain.auxiliary["length"][0].copy_(scale.norm(dim=-1, keepdim=True))
        self._limit_noise(chain)

    def _record(self, chain: AdaptedChain) -> None:
        """Keeps some coordinates of the state, from which the autocorrelation time is computed."""
        if self._point_steps and chain.step - self._point_steps[-1] < self._stride:
            return
        self._point_steps.append(chain.step)
        theta = chain.theta
        self._points.append(theta[..., :: -(-theta.shape[-1] // _NUM_COORDINATES)].clone())
        if len(self._points) >= _NUM_POINTS:
            self._points, self._point_steps = self._points[1::2], self._point_steps[1::2]
            self._stride *= 2

    def _settle(self, chain: MicrocanonicalChain) -> None:
        """Ends the adaptation."""
        if len(self._points) >= _MIN_POINTS:
            points_TCK = torch.stack(self._points).double().cpu()
            points_TCK = points_TCK.reshape(len(points_TCK), -1, points_TCK.shape[-1])
            apart = (self._point_steps[-1] - self._point_steps[0]) / (len(points_TCK) - 1)
            length = chain.auxiliary["length"][0]
            found = (_LENGTH_FACTOR * apart * self._size(chain) * autocorrelation_time(points_TCK)).reshape(
                length.shape
            )
            length.copy_(torch.where(found > 0, found.to(length), length))  # nan and 0 where a chain does not move
        if self._settings.adapts_step or self.num_steps > 0:
            self._limit_noise(chain)
        self._points, self._moments, self._is_settled = [], RunningMoments(), True
        size = self._size(chain)
        if self._settings.adapts_step or self.num_steps > 0:
            self._found["step_size"] = size
            self._found["length"] = float(self._of_active(chain, chain.auxiliary["length"][0].reshape(-1)).mean())
        if self._ratios:
            self._found["energy_variance"] = mean_without_outliers(self._ratios) * size**6
        if self._settings.adapts_step:
            logger.info("Microcanonical warm-up found %s.", {k: float(f"{v:.3g}") for k, v in self._found.items()})

    def _limit_noise(self, chain: MicrocanonicalChain) -> None:
        """On mini-batches: measures the gradient's noise, and lowers L and epsilon where it would widen the draws."""
        if chain.potential.source.epoch_length == 1 or not math.isfinite(self._size(chain)):
            return
        noise_C2 = self._noise.measured(chain)
        if not bool(torch.isfinite(noise_C2).all()):
            return  # a batch with NaN, which the chain's next check reports
        length, num, allowed = chain.auxiliary["length"][0], chain.theta.shape[-1], self._settings.max_inflation
        if self._settings.adapts_step and self._settings.adapts_length:
            hottest, mean = self._of_active(chain, noise_C2).mean(0).tolist()
            lower, _ = GradientNoise(hottest, mean, num).limited(self.step_size, float(length.mean()), allowed)
            self._largest = math.inf if lower == self.step_size else lower
            self.step_size = self._chains.same_on_data_ranks(lower)
        size, inflations = self._size(chain), []
        for row, (hottest, mean) in zip(length.reshape(-1, 1), noise_C2.tolist(), strict=True):
            noise = GradientNoise(hottest, mean, num)
            if self._settings.adapts_length:
                lower, limit = noise.limited(size, float(row), allowed)
                row.fill_(limit * size / lower)
            inflations.append(noise.inflation(size, float(row)))
        self._found["inflation"] = float(self._of_active(chain, torch.tensor(inflations)).mean())
        self._found["allowed"] = allowed
        if self._settings.adapts_step and self._settings.adapts_length:
            self._found["slowdown"] = slowdown(self._wanted, size, float(length.mean()), num)

    @torch.no_grad()
    def _warn_of_noise(self, chain: MicrocanonicalChain) -> None:
        """Warns of mini-batches that widen the draws by more than is allowed, or cost more steps than they save."""
        allowed, inflation = self._settings.max_inflation, self._found.get("inflation")
        epoch_length, factor = chain.potential.source.epoch_length, self._found.get("slowdown", 1.0)
        if epoch_length == 1:
            return
        if inflation is None:
            hottest, mean = self._of_active_here(chain, self._noise.measured(chain)).mean(0).tolist()
            length = float(chain.auxiliary["length"][0].mean())
            inflation = GradientNoise(hottest, mean, chain.theta.shape[-1]).inflation(chain.step_size, length)
        if inflation > allowed:
            self._warn(noise_message(inflation, allowed), InflationWarning)
        if epoch_length is not None and factor > epoch_length:
            self._warn(slowdown_message(factor, epoch_length), InflationWarning)

    def _warn_of_energy(self, chain: MicrocanonicalChain) -> None:
        """Warns of a step size at which the energy errors of the kept draws, on all the data, are too large."""
        if chain.potential.source.epoch_length != 1 or not self._is_settled:
            return
        variances = self._of_active_here(chain, self._energy_variances(chain))
        variance = float(variances[torch.isfinite(variances)].mean())
        if variance > MAX_ENERGY_VARIANCE:
            text = energy_message(variance, ENERGY_VARIANCE, chain.step_size, self._settings.adapts_step)
            self._warn(text, InflationWarning)

    def _energy_variances(self, chain: MicrocanonicalChain) -> Tensor:
        """Per weight and chain, ``(C,)``, since the last reading; nan where there was no step."""
        total, count = chain.auxiliary["energy"][1:3]
        return (total / count).reshape(-1) / chain.theta.shape[-1]

    def _trial(self, chain: MicrocanonicalChain, size: float, num_steps: int) -> Tensor:
        squares = self._settings.trial(chain, size, num_steps)
        return self._of_active(chain, squares / chain.theta.shape[-1])

    def _of_active(self, chain: AdaptedChain, values_C: Tensor) -> Tensor:
        """Values ``(C, ...)`` of all chains of the run that have not diverged, float64 on the CPU."""
        return torch.cat(self._chains.peer_ranks.gathered(self._of_active_here(chain, values_C)))

    def _of_active_here(self, chain: AdaptedChain, values_C: Tensor) -> Tensor:
        """Of the chains of this process."""
        is_active = torch.ones(len(values_C), dtype=torch.bool)
        is_active[[error.chain for error in chain.divergences]] = False
        return values_C.double().cpu()[is_active]
