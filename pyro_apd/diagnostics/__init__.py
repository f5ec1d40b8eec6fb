# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Would you ship this posterior? Chain and generator side by side, in figures, plots, ArviZ and one HTML page."""

from pyro_apd.diagnostics import plots
from pyro_apd.diagnostics.arviz import save_netcdf, to_arviz
from pyro_apd.diagnostics.convergence import convergence
from pyro_apd.diagnostics.fidelity import Fidelity, compare
from pyro_apd.diagnostics.report import report

__all__ = ["Fidelity", "compare", "convergence", "plots", "report", "save_netcdf", "to_arviz"]
