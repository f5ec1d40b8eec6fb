# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Figures of a chain and the generator that was fitted to it.

Every function draws on the axes it is given, or on those of a new figure, and returns them; none shows or saves
anything or touches pyplot. Legends name chain and generator (``SGLD``, ``generator``); colours can be told apart
by colour-blind readers, shapes and dashes without colour.
"""

from pyro_apd.diagnostics.plots.chain import density, ess, forest, rank_bars, trace
from pyro_apd.diagnostics.plots.predictions import (
    calibration_curve,
    quality_against_bytes,
    roc_curve,
    score_histograms,
    score_scatter,
)
from pyro_apd.diagnostics.plots.regression import calibration_of_intervals, regression_band
from pyro_apd.diagnostics.plots.style import NAMES
from pyro_apd.diagnostics.plots.surfaces import decision_surfaces
from pyro_apd.diagnostics.plots.training import STEPS, are_numbers, training_curves
from pyro_apd.diagnostics.plots.weights import principal_pair, weight_sd

__all__ = [
    "NAMES",
    "STEPS",
    "are_numbers",
    "calibration_curve",
    "calibration_of_intervals",
    "decision_surfaces",
    "density",
    "ess",
    "forest",
    "principal_pair",
    "quality_against_bytes",
    "rank_bars",
    "regression_band",
    "roc_curve",
    "score_histograms",
    "score_scatter",
    "trace",
    "training_curves",
    "weight_sd",
]
