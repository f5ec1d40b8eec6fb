# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A run read back from the file that :func:`~pyro_apd.diagnostics.save_netcdf` wrote."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor

from pyro_apd.diagnostics.arviz_export import compat
from pyro_apd.diagnostics.arviz_export.variables import FUNCTIONS, PARAMETERS, PROJECTIONS


class StoredRun:
    """The part of a finished :class:`pyro.infer.MCMC` that diagnostics need, read from a file.

    :param path: NetCDF file with the group ``posterior``, as of ``save_netcdf(to_arviz(mcmc), path)``.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is of another kind, or holds no chain.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        idata = compat.read(path)
        posterior = compat.arrays(idata, "posterior")
        self._samples = {
            name: torch.tensor(values)
            for name, values in posterior.items()
            if name not in (PARAMETERS, PROJECTIONS, FUNCTIONS)
        }
        source = idata["posterior"].attrs.get("source") if posterior else None
        if not self._samples or source == "generator":
            found = sorted(posterior) or "no group posterior"
            whose = " of a generator" if source == "generator" else ""
            raise ValueError(
                f"'{path}' holds no draws of a chain, but {found}{whose}; write it with "
                "save_netcdf(to_arviz(mcmc), path), with all weights."
            )
        #: What made the chain, such as ``SGLD``.
        self.chain_name = str(source or "chain")
        #: Settings of the kernel and the driver, as far as the file has them.
        self.settings: dict[str, Any] = json.loads(idata["posterior"].attrs.get("kernel_settings", "{}"))
        #: Kernel, step size, excursions and warnings of the run, as far as the file has them.
        self.sampler_summary: dict[str, Any] = json.loads(idata["posterior"].attrs.get("sampler", "{}"))
        #: Numbers of the chains of the run that are not in the file, and of those that diverged.
        self.missing_chains: list[int] = json.loads(idata["posterior"].attrs.get("missing_chains", "[]"))
        self.diverged_chains: list[int] = json.loads(idata["posterior"].attrs.get("diverged_chains", "[]"))
        self.num_chains, self.num_samples = next(iter(self._samples.values())).shape[:2]
        whole = range(self.num_chains + len(self.missing_chains))
        #: Numbers of the chains that are in the file.
        self.chains = [chain for chain in whole if chain not in self.missing_chains]
        stats = compat.arrays(idata, "sample_stats")
        self._diagnostics: list[dict[str, Any]] = [
            {
                name if name != "diverging" else "divergences": torch.tensor(values[chain])
                if name != "diverging"
                else values[chain].nonzero()[0].tolist()
                for name, values in stats.items()
            }
            for chain in range(self.num_chains)
        ]

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """All draws: ``(C, S, ...)`` by site, or ``(C * S, ...)``.

        :raises ValueError: if ``num_samples`` is given: a file draws no more.
        """
        if num_samples is not None:
            raise ValueError(f"`num_samples` must be None for a run read from a file; got {num_samples}.")
        return dict(self._samples) if group_by_chain else {n: v.flatten(0, 1) for n, v in self._samples.items()}
