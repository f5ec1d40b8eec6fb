# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""MCMC kernels with mini-batch gradients for Pyro's drivers."""

from pyro_apd.kernels.adaptation.drift import WarmupWarning
from pyro_apd.kernels.adaptation.excursions import ExcursionWarning
from pyro_apd.kernels.adaptation.gradient_noise import InflationWarning
from pyro_apd.kernels.adaptation.mixing import MixingWarning, TemperatureWarning
from pyro_apd.kernels.engine import schedules
from pyro_apd.kernels.engine.schedules import Constant, Cyclical, PolynomialDecay
from pyro_apd.kernels.mclmc import MCLMC
from pyro_apd.kernels.psgld import PSGLD
from pyro_apd.kernels.recommended import recommended_kernel
from pyro_apd.kernels.sghmc import SGHMC
from pyro_apd.kernels.sgld import SGLD

__all__ = [
    "MCLMC",
    "PSGLD",
    "SGHMC",
    "SGLD",
    "Constant",
    "Cyclical",
    "ExcursionWarning",
    "InflationWarning",
    "MixingWarning",
    "PolynomialDecay",
    "TemperatureWarning",
    "WarmupWarning",
    "recommended_kernel",
    "schedules",
]
