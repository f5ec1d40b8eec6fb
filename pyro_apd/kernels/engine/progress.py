# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What the progress bar shows of chains."""

from __future__ import annotations

import time
from collections import OrderedDict

from pyro_apd.kernels.engine.chain import Chain

# Seconds between updates, on a CPU and elsewhere, where reading waits for the device.
_APART, _APART_ON_DEVICE = 0.1, 0.5


class Progress:
    """The last row of the progress bar, from the start of a run on."""

    def __init__(self) -> None:
        self._row: OrderedDict[str, str] = OrderedDict()
        self._started_at = time.monotonic()
        self._updated_at = 0.0

    def row(self, chain: Chain) -> OrderedDict[str, str]:
        """Of several chains the mean, the number that diverged, and all steps per second."""
        now = time.monotonic()
        apart = _APART if chain.energy.device.type == "cpu" else _APART_ON_DEVICE
        if chain.step and now - self._updated_at > apart:
            self._row["step size"] = f"{chain.step_size:.2e}"
            self._row["potential"] = f"{float(chain.energy.mean()):.4g}"
            self._row["|grad|"] = f"{float(chain.gradient_norm.mean()):.3g}"
            self._row["diverged"] = f"{len(chain.divergences)}/{chain.num_chains or 1}"
            self._row["steps/s"] = f"{chain.step * (chain.num_chains or 1) / max(now - self._started_at, 1e-9):.0f}"
            self._updated_at = now
        return self._row
