# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Online distillation as Pyro's streaming statistics, and as a hook: for kernels and drivers that are not ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.ops.streaming import StreamingStats
from torch import Tensor

from pyro_apd.chains.stores.base import STATISTICS, largest_block
from pyro_apd.chains.stores.even import EvenStore
from pyro_apd.distillation.offline import distill
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.runtime import checks

_NO_STATISTICS = dict.fromkeys(STATISTICS, torch.nan)


class OnlineDistillation(StreamingStats):
    """Keeps draws evenly spaced over each chain in memory of fixed size, and distils them on request.

    As statistics of :class:`pyro.infer.mcmc.StreamingMCMC`, of any kernel::

        online = OnlineDistillation(model, data=(x, y))
        mcmc = StreamingMCMC(NUTS(model), num_samples=10_000, statistics=online)
        mcmc.run(x, y)
        posterior = mcmc.get_statistics()

    or as a hook of any driver: ``MCMC(kernel, ..., hook_fn=online.hook)``, then ``online.get()``. With chains in
    other processes a hook runs there, and this object stays empty.

    :param callable model: the Pyro model.
    :param tuple data: its arguments, with or without targets.
    :param int buffer_size: draws kept per chain.
    :param options: of :func:`~pyro_apd.distill`, such as ``seed`` and ``rank``.
    :raises ValueError: if ``buffer_size`` is not an integer of at least 2.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        data: Sequence[Any] | None = None,
        *,
        buffer_size: int = 512,
        **options: Any,
    ) -> None:
        self.buffer_size = checks.integer("buffer_size", buffer_size, at_least=2)
        self._model = model
        self._data = data
        self._options = options
        self._buffers: dict[Hashable, EvenStore] = {}
        self._seen: dict[Hashable, int] = {}

    def update(self, sample: Mapping[Any, Tensor]) -> None:
        """Takes a draw: constrained values by site, or by ``(chain, site)`` as Pyro's driver has them."""
        by_chain: dict[Hashable, dict[str, Tensor]] = {}
        for key, value in sample.items():
            chain, name = key if isinstance(key, tuple) else (0, key)
            by_chain.setdefault(chain, {})[name] = value
        for chain, values in by_chain.items():
            self._add(chain, values)

    def merge(self, other: StreamingStats) -> OnlineDistillation:
        """Both together, with the options of this one; a chain with the same number in both counts as two.

        :raises TypeError: if the other is not an :class:`OnlineDistillation`.
        """
        if not isinstance(other, OnlineDistillation):
            raise TypeError(f"`other` must be an OnlineDistillation; got {type(other).__name__}.")
        merged = OnlineDistillation(self._model, self._data, buffer_size=self.buffer_size, **self._options)
        for i, part in enumerate((self, other)):
            merged._buffers |= {(i, chain): buffer for chain, buffer in part._buffers.items()}
            merged._seen |= {(i, chain): count for chain, count in part._seen.items()}
        return merged

    def get(self) -> DistilledPosterior:
        """The posterior of the draws so far.

        :raises ValueError: if there are none, or too few.
        """
        if not self._buffers:
            raise ValueError("There are no draws yet: run the chain first, with this object as its statistics or hook.")
        stores = list(self._buffers.values())
        # Chains may differ in length, if one was interrupted: the largest block that can be grouped.
        chains, count = largest_block([store.counts[0] for store in stores])
        # This layout has no supports, so that values stay constrained; distill reads supports from the model.
        theta_CSD = torch.stack([stores[chain].theta_CSD[0, :count] for chain in chains])
        draws = stores[0].layout.split(theta_CSD)
        posterior = distill(draws, self._model, data=self._data, group_by_chain=True, **self._options)
        keys = list(self._buffers)
        posterior.metadata |= {"online": True, "draws_seen": min(self._seen[keys[chain]] for chain in chains)}
        return posterior

    def hook(self, kernel: MCMCKernel, params: Mapping[str, Tensor], stage: str, i: int) -> None:
        """Pyro's ``hook_fn``: takes the draws after warm-up. Vectorised chains of this package come as one call."""
        if not stage.startswith("Sample"):
            return
        transforms = getattr(kernel, "transforms", None) or {}
        layout = getattr(kernel, "layout", None)
        is_several = isinstance(layout, Layout) and any(
            params[site.name].dim() > len(site.unconstrained_shape) for site in layout
        )
        values = {name: transforms[name].inv(value) if name in transforms else value for name, value in params.items()}
        if is_several:
            for chain in range(len(next(iter(values.values())))):
                self._add(chain, {name: value[chain] for name, value in values.items()})
        else:
            number = re.search(r"\[(\d+)\]", stage)
            self._add(int(number[1]) if number else 0, values)

    def _add(self, chain: Hashable, values: Mapping[str, Tensor]) -> None:
        if chain not in self._buffers:
            layout = Layout({name: values[name].shape for name in sorted(values)})
            like = next(iter(values.values()))
            self._buffers[chain] = EvenStore(layout, 1, self.buffer_size, like.detach().new_empty(0))
        buffer = self._buffers[chain]
        count = self._seen.get(chain, 0)
        buffer.write(0, count, buffer.layout.join(values).detach().unsqueeze(0), _NO_STATISTICS)
        self._seen[chain] = count + 1
