# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior for programs without Python or Pyro: one function from inputs to averages over networks, as a module that
:func:`torch.export.export` takes, and as an ONNX file."""

from pyro_apd.export.fixed_latents import fixed_latents
from pyro_apd.export.prediction import PosteriorPrediction

__all__ = ["PosteriorPrediction", "fixed_latents"]
