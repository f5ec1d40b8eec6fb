# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Excursions: chains whose potential leaves what their own history allows, without ending at infinity.

A step that is too large for some region of the posterior throws a chain out. Where the prior or the likelihood's tails
pull it back, nothing becomes infinite, but what it draws meanwhile is not of the posterior. The potential shows it: at
temperature T the potential of a Gaussian of D latents has the mean D T / 2 above its lowest value and the standard
deviation w = T sqrt(D / 2). For log-concave densities the standard deviation is at most sqrt(2) w (Nguyen, 2013; Wang,
2014), and heavy tails are no worse, since exp(-U) falls exponentially in U whatever the shape. So a chain may be

* 10 spreads above the median of its recent potentials. The spread is the larger of w and the distance from the median
  down to the 16 % quantile, which excursions do not widen;
* or D T / 2 + 10 w above the lowest of them: a chain that starts at a mode has to rise by D T / 2.

A mini-batch with an outlying row is not an excursion, nor is a state at which single rows are far off: where batches
can be read, an earlier state is asked about the same batch, and must be within the limit there; and the mean over eight
other batches must be beyond it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Spreads above the median that a chain may be.
_SPREADS = 10.0
# The potentials at so many checks count, and so many are a history. Before, they only set a limit to steps that are
# still being adapted, whose first may be far too large.
_WINDOW, _MIN_KNOWN = 64, 8
# Quantile whose distance from the median is one sd of a Gaussian.
_LOW = 0.16
#: What a step size is divided by after an excursion. Regions of high curvature are rare, so a step just below one that
#: failed fails as well, only later.
REDUCTION = 4.0


class ExcursionWarning(UserWarning):
    """Some of the kept draws were made while a chain was outside of what its own history allows."""


def rise_to_equilibrium(num_latents: int, temperature: float) -> float:
    """By how much the potential may exceed its lowest value: D T / 2 and ten standard deviations."""
    return temperature * (num_latents / 2 + _SPREADS * math.sqrt(num_latents / 2))


class ExcursionWatch:
    """Compares potentials with the limit that a chain's history sets; never waits for the device.

    :param int num_latents: D.
    :param float temperature: T; at 0 nothing counts as an excursion.
    :ivar limit: largest potential allowed, ``()`` or ``(C,)``; None as long as too little is known.
    """

    def __init__(self, num_latents: int, temperature: float) -> None:
        self.temperature = temperature
        self._width = temperature * math.sqrt(num_latents / 2)
        self._rise = rise_to_equilibrium(num_latents, temperature)
        self._energies: Tensor | None = None  # at the last checks, (K,) or (K, C)
        self._flags: list[Tensor] = []
        self.limit: Tensor | None = None

    def add(self, energy: Tensor) -> None:
        """The potential at a check, ``()`` or ``(C,)``. What is beyond the limit does not raise the limit."""
        if self.temperature == 0:
            return
        if self._energies is not None:
            energy = torch.where(self.beyond(energy) | ~torch.isfinite(energy), self._energies[-1], energy)
        before = energy.new_empty((0, *energy.shape)) if self._energies is None else self._energies[1 - _WINDOW :]
        self._energies = torch.cat([before, energy.unsqueeze(0)])
        known = self._energies.sort(0).values
        last = len(known) - 1
        low, middle = known[round(_LOW * last)], known[round(0.5 * last)]
        spread = (middle - low).clamp_min(self._width)
        self.limit = torch.maximum(middle + _SPREADS * spread, known[0] + self._rise)

    @property
    def has_history(self) -> bool:
        """Whether enough is known to call a draw an excursion."""
        return self._energies is not None and len(self._energies) >= _MIN_KNOWN

    def restart(self) -> None:
        """Forgets what was seen, for example because the chains were moved."""
        self._energies, self.limit = None, None

    def beyond(self, energy: Tensor) -> Tensor:
        """Which chains are beyond the limit, ``()`` or ``(C,)``."""
        return torch.zeros_like(energy, dtype=torch.bool) if self.limit is None else energy > self.limit

    def keep(self, is_beyond: Tensor) -> None:
        """Notes for a draw that is kept whether it is an excursion, ``()`` or ``(C,)``."""
        self._flags.append(is_beyond)

    @property
    def num_kept(self) -> int:
        """Draws noted by :meth:`keep`."""
        return len(self._flags)

    def marked(self) -> list[list[int]]:
        """Numbers of the kept draws that are excursions, for each chain. Waits for the device."""
        if not self._flags:
            return []
        flags_SC = torch.stack(self._flags).reshape(len(self._flags), -1).cpu()
        return [torch.nonzero(column).flatten().tolist() for column in flags_SC.unbind(1)]

    def state_dict(self) -> dict[str, Any]:
        """All that was seen."""
        energies = [] if self._energies is None else list(self._energies)
        return {"energies": energies, "flags": list(self._flags), "limit": self.limit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._energies = torch.stack(list(state["energies"])) if state["energies"] else None
        self._flags, self.limit = list(state["flags"]), state["limit"]


def excursion_message(marked: Mapping[int, Sequence[int]], num_draws: int, step_size: float) -> str:
    """The warning's text.

    :param marked: numbers of draws by number of chain, of chains with excursions.
    :param num_draws: kept draws of a chain.
    :param step_size: of the last step.
    """
    count = sum(len(draws) for draws in marked.values())
    first = {chain: list(draws[:3]) for chain, draws in marked.items()}
    smaller = step_size / REDUCTION
    exponent = math.floor(math.log10(smaller))
    advised = math.floor(smaller / 10**exponent) * 10.0**exponent
    return (
        f"{count} kept draws of {num_draws} per chain are excursions: the potential was above all that the chain's own "
        f"history allows, as the step size is too large for regions that the chain came to. First draws by chain: "
        f"{first}; diagnostics()['excursions'] has all. They are not draws of the posterior. Sample again with "
        f"step_size={advised:.0e} or less, or leave these draws out."
    )
