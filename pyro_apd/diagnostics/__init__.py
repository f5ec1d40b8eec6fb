# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Chain and generator compared: metrics with a verdict, plots, ArviZ containers and one HTML page."""

from typing import TYPE_CHECKING, Any

from pyro_apd.diagnostics import plots
from pyro_apd.diagnostics.arviz_export.export import save_netcdf, to_arviz
from pyro_apd.diagnostics.comparison.fidelity import compare
from pyro_apd.diagnostics.html.report import report
from pyro_apd.diagnostics.mixing.convergence import convergence

__all__ = ["Fidelity", "compare", "convergence", "plots", "report", "save_netcdf", "to_arviz"]

if TYPE_CHECKING:
    from pyro_apd.diagnostics.comparison.fidelity_table import Fidelity


def __getattr__(name: str) -> Any:
    """``Fidelity`` on first use: it is a DataFrame, and pandas takes half a second to import."""
    if name == "Fidelity":
        from pyro_apd.diagnostics.comparison.fidelity_table import Fidelity

        return Fidelity
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
