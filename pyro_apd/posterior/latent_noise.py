# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The auxiliary site of the latent of a draw, when a posterior runs as a guide."""

from __future__ import annotations

from typing import NoReturn

import pyro.distributions as dist
from torch import Tensor

#: Name of the auxiliary sample site of the latent of a draw, when the posterior runs as a guide. Without this site,
#: Pyro's vectorised Predictive would see S times the same draw.
NOISE_SITE = "_apd_noise"

#: The message of every density that is asked for.
NO_DENSITY = (
    "A distilled posterior has no log_prob: its density is implicit. Use its draws (get_samples, Predictive); SVI, "
    "WeighedPredictive and importance sampling need a guide with a density, such as an AutoNormal."
)


class LatentNoise(dist.Normal):
    """Standard normal latents without a density, since theirs is not the density of the draw.

    Inference that asks for one raises here, instead of returning weights that mean nothing.
    """

    def log_prob(self, value: Tensor) -> NoReturn:
        """Not available.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError(NO_DENSITY)
