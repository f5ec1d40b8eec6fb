# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The warm-up of adjusted microcanonical trajectories, which are accepted or rejected.

As that of :mod:`~pyro_apd.kernels.adaptation.microcanonical`, with another aim. An energy error that is Gaussian with
the variance s^2 has the mean s^2 / 2, since exp(-error) has the mean 1, and is accepted with the mean probability
2 Phi(-s / 2). So epsilon is the one at which trajectories have the variance of :data:`ACCEPTANCE`.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

from pyro_apd.kernels.adaptation.microcanonical import MicrocanonicalChain, MicrocanonicalWarmUp
from pyro_apd.kernels.adaptation.mixing import MixingWarning

#: Mean probability of acceptance that epsilon is chosen for. The paper has 0.9; the optimum is flat.
ACCEPTANCE = 0.85
#: From where on a run warns.
LOW_ACCEPTANCE = 0.4
# Steps from one reading to the next: a share of the warm-up, at most so many.
_SHARE, _MAX_APART = 200, 50
#: Variance of the energy error of a trajectory at :data:`ACCEPTANCE`.
TRAJECTORY_VARIANCE = (2 * NormalDist().inv_cdf(ACCEPTANCE / 2)) ** 2


class AdjustedWarmUp(MicrocanonicalWarmUp):
    """Adapts chains whose fourth tensor of ``energy`` is the sum of acceptance probabilities.

    Parameters as for :class:`~pyro_apd.kernels.adaptation.microcanonical.MicrocanonicalWarmUp`.
    """

    #: Mean probability since the warm-up, over all chains here, and that of the chain where it is lowest.
    acceptance: float | None = None
    lowest: float | None = None

    def __init__(self, num_steps: int, *args: Any) -> None:
        super().__init__(num_steps, *args)
        # A trajectory takes as long as many steps, and forgets as much.
        self._apart = min(max(num_steps // _SHARE, 1), _MAX_APART)

    def report(self) -> dict[str, Any]:
        """Also ``acceptance``."""
        found = super().report()
        return found if self.acceptance is None else {**found, "acceptance": self.acceptance}

    def end_kept(self, chain: MicrocanonicalChain) -> None:
        """Reads the acceptance of the trajectories since the last reading."""
        _, _, count, accepted = chain.auxiliary["energy"]
        of_chains = self._of_active_here(chain, (accepted / count).reshape(-1))
        self.acceptance, self.lowest = float(of_chains.mean()), float(of_chains.min())

    def _warn_of_energy(self, chain: MicrocanonicalChain) -> None:
        if self.lowest is None or self.lowest >= LOW_ACCEPTANCE:
            return
        text = (
            f"Trajectories of a chain were accepted with a mean probability of {self.lowest:.2g} (all: "
            f"{self.acceptance:.2g}) at step_size={chain.step_size:.3g}, so that it moves slowly. Take a smaller "
            "step_size, or 'auto' with a longer warm-up."
        )
        self._warn(text, MixingWarning)
