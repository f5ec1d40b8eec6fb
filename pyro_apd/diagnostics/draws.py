# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Draws as the diagnostics want them: of a chain with its chains kept apart, of a generator under a seed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_apd.chains.stores.base import all_finite
from pyro_apd.runtime.global_state import seeded

Draws = dict[str, Tensor]


@dataclass(frozen=True)
class ChainDraws:
    """All draws of one or more chains.

    :ivar dict values: constrained values ``(C, S, ...)`` by site.
    :ivar str name: what made them, such as ``SGLD``; for legends.
    """

    values: Draws
    name: str = "chain"

    @property
    def num_chains(self) -> int:
        """Chains, ``C``."""
        return next(iter(self.values.values())).shape[0]

    @property
    def num_draws(self) -> int:
        """Draws of each chain, ``S``."""
        return next(iter(self.values.values())).shape[1]

    @property
    def device(self) -> torch.device:
        """Where the draws are."""
        return next(iter(self.values.values())).device

    @property
    def num_bytes(self) -> int:
        """What all draws take as tensors."""
        return sum(value.numel() * value.element_size() for value in self.values.values())

    @property
    def bytes_per_draw(self) -> int:
        """What one network takes."""
        return self.num_bytes // (self.num_chains * self.num_draws)

    def pooled(self, steps_M: Sequence[int]) -> Draws:
        """Draws at the given steps of every chain, chain after chain, ``(C M, ...)`` a site."""
        index = torch.as_tensor(steps_M, dtype=torch.long)
        return {name: value[:, index.to(value.device)].flatten(0, 1) for name, value in self.values.items()}

    def at(self, chains_M: Sequence[int], steps_M: Sequence[int]) -> Draws:
        """Draws at pairs of chain and step, ``(M, ...)`` a site."""
        chains, steps = torch.as_tensor(chains_M, device=self.device), torch.as_tensor(steps_M, device=self.device)
        return {name: value[chains, steps] for name, value in self.values.items()}


def evenly_spaced(available: int, wanted: int) -> list[int]:
    """``min(wanted, available)`` indices in the middle of equal stretches of ``range(available)``."""
    count = min(wanted, available)
    return [(2 * i + 1) * available // (2 * count) for i in range(count)]


def read_chain(
    mcmc: Any, shapes: Mapping[str, tuple[int, ...]] | None = None, group_by_chain: bool | None = None
) -> ChainDraws:
    """Draws of an ``MCMC`` after ``run``, or of a dict.

    :param mcmc: an object with ``get_samples(group_by_chain=True)``, or values by site ``(S, ...)`` or ``(C, S, ...)``.
    :param shapes: shape of one draw by site, from which the form of a dict is told.
    :param group_by_chain: the form of a dict; None asks ``shapes``, and without these takes it for ``(S, ...)``.
    :raises TypeError: if ``mcmc`` is neither.
    :raises ValueError: if there are no draws, or sites disagree about the number of chains or draws.
    """
    if isinstance(mcmc, Mapping):
        name, values = "chain", dict(mcmc)
        _check(values, "mcmc", leading=1)
        if group_by_chain is None:
            known = {site: len(shape) for site, shape in (shapes or {}).items() if site in values}
            group_by_chain = bool(known) and all(values[site].dim() == known[site] + 2 for site in known)
        if not group_by_chain:
            values = {site: value.unsqueeze(0) for site, value in values.items()}
    elif callable(getattr(mcmc, "get_samples", None)):
        if getattr(mcmc, "_samples", ()) is None:
            raise ValueError("`mcmc` has no draws yet: call mcmc.run(...) first.")
        name = getattr(mcmc, "chain_name", None) or type(getattr(mcmc, "kernel", mcmc)).__name__
        values = mcmc.get_samples(group_by_chain=True)
    else:
        raise TypeError(
            f"`mcmc` must be an MCMC after run(), or a dict of draws by site as get_samples() gives it; got "
            f"{type(mcmc).__name__}."
        )
    _check(values, "mcmc", leading=2)
    return ChainDraws({site: value.detach() for site, value in values.items()}, name)


def draw_posterior(posterior: Any, num_samples: int | None, seed: int | None) -> Draws:
    """Draws of a generator, ``(S, ...)`` a site; of a dict the first ``num_samples``.

    :raises TypeError: if ``posterior`` is neither a dict nor has ``get_samples``.
    :raises ValueError: if there are no draws, or sites disagree about their number.
    """
    if isinstance(posterior, Mapping):
        values = {site: value[:num_samples] for site, value in posterior.items()}
    elif callable(getattr(posterior, "get_samples", None)):
        with seeded(seed, _device_of(posterior)), torch.no_grad():
            values = posterior.get_samples(num_samples)
    else:
        raise TypeError(
            f"`posterior` must have get_samples(num_samples), as a DistilledPosterior has, or be a dict of draws "
            f"(S, ...) by site; got {type(posterior).__name__}."
        )
    _check(values, "posterior", leading=1)
    return {site: value.detach() for site, value in values.items()}


def draw_shapes(posterior: Any) -> dict[str, tuple[int, ...]] | None:
    """Shape of one draw by site, without drawing where that can be had."""
    if posterior is None:
        return None
    if isinstance(posterior, Mapping):
        return {site: tuple(value.shape[1:]) for site, value in posterior.items()}
    layout = getattr(posterior, "layout", None)
    if layout is not None:
        return {site.name: tuple(site.shape) for site in layout}
    return {site: tuple(value.shape[1:]) for site, value in draw_posterior(posterior, 1, seed=0).items()}


def posterior_bytes(posterior: Any) -> int:
    """Size of the generator's file; of a dict, what its tensors take."""
    if isinstance(posterior, Mapping):
        return sum(value.numel() * value.element_size() for value in posterior.values())
    num_bytes = getattr(posterior, "num_bytes", None)
    if num_bytes is None:
        raise ValueError("`posterior` has no `num_bytes`, so it cannot be weighed against stored draws.")
    return int(num_bytes)


def kernel_settings(mcmc: Any) -> dict[str, Any]:
    """Plain values that the kernel's constructor was given, as far as the kernel shows them under the same names."""
    kernel = getattr(mcmc, "kernel", None)
    if kernel is None:
        return dict(getattr(mcmc, "settings", {}))  # of a run read from a file
    settings: dict[str, Any] = {"kernel": type(kernel).__name__}
    for name in inspect.signature(type(kernel).__init__).parameters:
        value = getattr(kernel, name, None)
        if isinstance(value, (bool, int, float, str)):
            settings[name] = value
    for name in ("num_chains", "num_samples", "warmup_steps"):
        value = getattr(mcmc, name, None)
        if isinstance(value, int):
            settings[name] = value
    return settings


def flat(draws: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Values of the named sites side by side, ``(S, D)``."""
    return torch.cat([draws[name].flatten(1) if draws[name].dim() > 1 else draws[name][:, None] for name in names], 1)


def _check(values: Mapping[str, Tensor], argument: str, leading: int) -> None:
    if not values:
        raise ValueError(f"`{argument}` holds no sites.")
    sizes = {}
    for site, value in values.items():
        if not isinstance(value, Tensor) or value.dim() < leading:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`{argument}` must hold tensors with draws in front; site '{site}' is {what}.")
        sizes[site] = tuple(value.shape[:leading])
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Sites of `{argument}` disagree about the number of chains or draws: {sizes}.")
    if 0 in next(iter(sizes.values())):
        raise ValueError(f"`{argument}` holds no draws: sites have leading dimensions {next(iter(sizes.values()))}.")
    for site, value in values.items():
        if value.is_floating_point() and not all_finite(value):
            raise ValueError(f"Draws of site '{site}' of `{argument}` hold NaN or infinite values; the run diverged.")


def _device_of(posterior: Any) -> torch.device | str:
    if not isinstance(posterior, torch.nn.Module):
        return "cpu"
    return next((tensor.device for tensor in (*posterior.parameters(), *posterior.buffers())), torch.device("cpu"))
