# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A Gaussian of low rank plus a diagonal, as a generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.generators.base import LARGEST_LATENT, Generator, check_sizes, peak


class LowRankGenerator(Generator):
    """``location + z1 @ deviations + scale * z2``: covariance ``deviations' deviations + diag(scale^2)``.

    Cost: ``rank + 2`` networks.

    :param int output_size: D, numbers of a draw.
    :param int rank: K, number of deviations.
    """

    def __init__(self, output_size: int, rank: int) -> None:
        super().__init__()
        check_sizes(output_size=output_size, rank=rank)
        self.output_size = output_size
        self.rank = rank
        self.latent_size = rank + output_size
        self.location = nn.Parameter(torch.zeros(output_size))
        self.deviations = nn.Parameter(torch.zeros(rank, output_size))
        self.scale = nn.Parameter(torch.zeros(output_size))

    @classmethod
    def of(cls, location_D: Tensor, deviations_KD: Tensor, scale_D: Tensor) -> LowRankGenerator:
        """The generator with these parameters."""
        generator = cls(len(location_D), len(deviations_KD)).to(location_D)
        with torch.no_grad():
            generator.location.copy_(location_D)
            generator.deviations.copy_(deviations_KD)
            generator.scale.copy_(scale_D)
        return generator

    @property
    def config(self) -> dict[str, Any]:
        """See :class:`Generator`."""
        return {"kind": "low-rank", "output_size": self.output_size, "rank": self.rank}

    def forward(self, latent_SL: Tensor) -> Tensor:
        """See :class:`Generator`."""
        first_SK, second_SD = latent_SL.split([self.rank, self.output_size], dim=-1)
        theta_SD: Tensor = torch.addmm(self.location, first_SK, self.deviations) + self.scale * second_SD
        return theta_SD

    def bound(self) -> float:
        """See :class:`Generator`."""
        deviation = self.rank * peak(self.deviations) + peak(self.scale)
        return peak(self.location) + LARGEST_LATENT * deviation
