# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a posterior, and the one place where they are read from what a user gives.

A posterior is given as draws by site, as an ``MCMC`` after ``run`` (Pyro's or this package's), as what stands in for
one (a store of draws, a run read from a file), or as an object that makes draws when asked, such as a
:class:`~pyro_apd.DistilledPosterior`. Every reader here checks what it was given; nothing behind it checks again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from pyro_apd.predictive.chain_draws import ChainDraws
from pyro_apd.runtime.checks import flag, integer
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.tensor_checks import is_dense, shape_of

#: Values by site.
Values = dict[str, Tensor]

# Bytes that are searched for NaN at a time.
_BLOCK_BYTES = 16 * 2**20


class Sampler(Protocol):
    """Makes draws when asked."""

    def get_samples(self, num_samples: int | None, /) -> Mapping[str, Tensor]:
        """Draws ``(S, ...)`` by site; None for the sampler's own number of them."""


class ChainSampler(Protocol):
    """Holds the draws of chains, as an ``MCMC`` after ``run`` does."""

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> Mapping[str, Tensor]:
        """Draws ``(S, ...)`` by site, or ``(C, S, ...)`` by chain."""


@runtime_checkable
class StreamSampler(Protocol):
    """Makes fresh draws when asked, also some at a time, as a :class:`~pyro_apd.DistilledPosterior` does."""

    def get_samples(self, num_samples: int | None = None) -> Mapping[str, Tensor]:
        """Draws ``(S, ...)`` by site."""

    def stream(self, num_samples: int | None = None, *, seed: int | None = None) -> DrawSource:
        """The same draws, each made when it is used."""


ModelCheck = Callable[[Callable[..., Any], Mapping[str, Tensor]], None] | None
#: What a user may give as a posterior.
PosteriorLike = Mapping[str, Tensor] | Sampler
#: What a user may give as chains.
ChainsLike = Mapping[str, Tensor] | ChainSampler


class DrawSource:
    """Draws that are made as they are used, some at a time, and the same each time.

    :param make: from latents ``(n, L)`` to values ``(n, ...)`` by site.
    :param Tensor latent_SL: latents of all draws.
    :param names: the sites.
    :param check: raises if the draws are not of a model; called with it, and the parameters and buffers that it read.
    """

    def __init__(
        self, make: Callable[[Tensor], Values], latent_SL: Tensor, names: Sequence[str], check: ModelCheck = None
    ) -> None:
        self._make = make
        self._latent_SL = latent_SL
        self.names = tuple(names)
        self.check = check

    def __len__(self) -> int:
        return len(self._latent_SL)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def part(self, start: int, stop: int) -> Values:
        """Draws ``start`` to ``stop``."""
        return self._make(self._latent_SL[start:stop])


#: Draws of a model's latents: in memory, or made as they are used.
Draws = Mapping[str, Tensor] | DrawSource


def draws_between(draws: Draws, start: int, stop: int) -> Values:
    """Draws ``start`` to ``stop`` as tensors by site."""
    if isinstance(draws, DrawSource):
        return draws.part(start, stop)
    return {name: value[start:stop] for name, value in draws.items()}


def evenly_spaced(available: int, wanted: int) -> list[int]:
    """``min(wanted, available)`` indices in the middle of equal segments of ``range(available)``."""
    count = min(wanted, available)
    return [(2 * i + 1) * available // (2 * count) for i in range(count)]


def read_chains(
    source: ChainsLike,
    argument: str = "mcmc",
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    group_by_chain: bool | None = None,
) -> ChainDraws:
    """All draws of chains, checked.

    :param source: an ``MCMC`` after ``run``, what stands in for one, or values by site ``(S, ...)`` or ``(C, S, ...)``.
    :param str argument: the user's name for it, for errors.
    :param shapes: shape of one draw by site, from which the form of a dict is told.
    :param group_by_chain: whether a dict is ``(C, S, ...)``; None asks ``shapes``, and without these takes it for
        ``(S, ...)``.
    :raises TypeError: if ``source`` is of a kind that holds no draws.
    :raises ValueError: if there are no draws, a value is not a tensor of draws or not finite, or sites disagree about
        the number of chains or draws.
    """
    name = "chain"
    if group_by_chain is not None:
        flag("group_by_chain", group_by_chain)
    values: Mapping[str, Tensor]
    if isinstance(source, Mapping):
        values = source
        if group_by_chain is None:
            check_draws(values, argument)
            known = {site: len(shape) for site, shape in (shapes or {}).items() if site in values}
            group_by_chain = bool(known) and all(values[site].dim() == known[site] + 2 for site in known)
        if not group_by_chain:
            check_draws(values, argument)
            values = {site: value.unsqueeze(0) for site, value in values.items()}
    else:
        accepted = "an MCMC after run(), or a dict of draws by site as get_samples() gives it"
        _check_has_draws(source, argument, accepted)
        if not _keeps_chains(source):
            raise TypeError(f"`{argument}` must be {accepted}; {type(source).__name__} does not group by chain.")
        values = _samples(source.get_samples(group_by_chain=True), argument)
        name = getattr(source, "chain_name", None) or type(kernel_of(source) or source).__name__
    _check_sites(values, argument, num_dims=2)
    _check_finite(values, argument)
    return ChainDraws({site: value.detach() for site, value in values.items()}, name, *_incomplete_chains(source))


def _incomplete_chains(source: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of the chains that are missing, and of those that diverged, where a run or its store says so."""
    missing = getattr(source, "missing_chains", ())
    return tuple(missing), tuple(getattr(source, "diverged_chains", ()))


def read_draws(
    posterior: PosteriorLike, num_samples: int | None = None, argument: str = "posterior", *, seed: int | None = None
) -> Values:
    """Draws ``(S, ...)`` by site, checked: ``num_samples`` of a sampler, or as many of a dict, evenly spaced.

    Chains follow each other in a dict, so that its first draws would be those of the first chain.

    :param int num_samples: draws wanted; None for all of a dict or of chains, and a sampler's own number.
    :param str argument: the user's name for ``posterior``, for errors.
    :param int seed: makes a sampler's draws reproducible; None uses torch's global generator.
    :raises TypeError: if ``posterior`` is of a kind that holds no draws.
    :raises ValueError: as :func:`read_chains`.
    """
    values = (
        _spaced(posterior, num_samples, argument)
        if isinstance(posterior, Mapping)
        else _sampled(posterior, num_samples, argument, seed, _device_of(posterior))
    )
    _check_finite(values, argument)
    return {site: value.detach() for site, value in values.items()}


def take_draws(
    posterior: PosteriorLike,
    count: int,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    argument: str = "posterior",
) -> Values:
    """``count`` draws by site; of a dict a random choice, or all where there are no more. For repeated use.

    :param int seed: makes the choice reproducible; None uses torch's global generator.
    :param device: the device whose global generator a sampler uses.
    :raises TypeError: if ``posterior`` is of a kind that holds no draws.
    :raises ValueError: if there are no draws, they are not finite, or sites disagree about their number.
    """
    if not isinstance(posterior, Mapping):
        values = _sampled(posterior, count, argument, seed, device)
    else:
        total = check_draws(posterior, argument)
        values = {site: value.detach() for site, value in posterior.items()}
        if total > count:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            chosen = torch.randperm(total, generator=generator)[:count].sort().values
            values = {site: value[chosen.to(value.device)] for site, value in values.items()}
    _check_finite(values, argument)
    return values


def spread_draws(posterior: PosteriorLike, num_samples: int, argument: str = "posterior", *, seed: int | None) -> Draws:
    """Draws that represent a posterior: fresh ones of a generator, made as they are used; all of a dict; of chains
    ``num_samples``, evenly spaced in time.

    Parameters and errors as of :func:`read_draws`.
    """
    if isinstance(posterior, StreamSampler):
        return posterior.stream(num_samples, seed=seed)
    if isinstance(posterior, Mapping):
        return read_draws(posterior, None, argument)
    if not _keeps_chains(posterior):
        return read_draws(posterior, num_samples, argument, seed=seed)
    chains = read_chains(posterior, argument)
    return chains.pooled(evenly_spaced(chains.num_draws, max(1, num_samples // chains.num_chains)))


def kernel_of(source: object) -> object | None:
    """The kernel of an ``MCMC``; None where there is none."""
    return getattr(source, "kernel", None)


def run_arguments(source: object) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments and keyword arguments of ``mcmc.run``; None before it, or where nothing kept them.

    Pyro's ``MCMC`` has them in private attributes only. Should these change, the arguments count as unknown, and the
    user is asked for them.
    """
    args = getattr(source, "_args", None)
    if not isinstance(args, tuple):
        return None
    return args, dict(getattr(source, "_kwargs", None) or {})


def check_draws(draws: object, argument: str = "draws") -> int:
    """Number of draws ``S`` in a dict of tensors ``(S, ...)``, or in a :class:`DrawSource`.

    :raises ValueError: if there are no sites or no draws, if a value is not a tensor with a leading dimension, or if
        leading dimensions disagree.
    """
    if isinstance(draws, DrawSource) and len(draws):
        return len(draws)
    return _check_sites(draws, argument, num_dims=1)[0]


def check_chunk_size(chunk_size: object) -> None:
    """:raises ValueError: if it is neither None nor a positive integer."""
    if chunk_size is not None:
        integer("chunk_size", chunk_size, hint="Or None, to choose it by memory.")


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite; of many entries, a part at a time."""
    if values.numel() * values.element_size() <= _BLOCK_BYTES or values.dim() == 0:
        return bool(values.isfinite().all())
    if len(values) == 1:
        return all_finite(values[0])
    return all(all_finite(part) for part in values.split(max(1, len(values) // 16)))


def not_finite_error(site: str, argument: str, count: int) -> ValueError:
    """The error for ``count`` numbers of a site that are NaN or infinite."""
    return ValueError(
        f"Draws of site '{site}' hold {count} NaN or infinite numbers, in `{argument}`: the chain diverged. Sample "
        "again with a smaller step size."
    )


def _spaced(values: Mapping[str, Tensor], num_samples: int | None, argument: str) -> Values:
    total = check_draws(values, argument)
    if num_samples is None or num_samples >= total:
        return dict(values)
    index = torch.tensor(evenly_spaced(total, num_samples))
    return {site: value[index.to(value.device)] for site, value in values.items()}


def _sampled(
    posterior: Sampler, count: int | None, argument: str, seed: int | None, device: torch.device | str
) -> Values:
    accepted = (
        "an MCMC after run(), a DistilledPosterior or another object with get_samples(num_samples), or a dict of draws "
        "(S, ...) by site"
    )
    _check_has_draws(posterior, argument, accepted)
    with seeded(seed, device), torch.no_grad():
        values = _samples(posterior.get_samples(count), argument)
    check_draws(values, argument)
    return values


def _keeps_chains(source: object) -> TypeGuard[ChainSampler]:
    """Whether draws can be had by chain."""
    get_samples = getattr(source, "get_samples", None)
    return callable(get_samples) and "group_by_chain" in inspect.signature(get_samples).parameters


def _check_has_draws(source: object, argument: str, accepted: str) -> None:
    """Refuses what has no ``get_samples``, and an ``MCMC`` before its run.

    Pyro's ``MCMC`` keeps its draws in the private ``_samples``, which is None before ``run``. Should that change,
    :func:`_samples` refuses what its ``get_samples`` gives.
    """
    if not callable(getattr(source, "get_samples", None)):
        raise TypeError(f"`{argument}` must be {accepted}; got {type(source).__name__}.")
    if getattr(source, "_samples", ()) is None:
        raise _not_run(argument)


def _samples(found: Mapping[str, Tensor] | None, argument: str) -> Values:
    if found is None:
        raise _not_run(argument)
    return dict(found)


def _not_run(argument: str) -> ValueError:
    return ValueError(f"`{argument}` has no draws yet: call mcmc.run(...) first.")


def _check_sites(draws: object, argument: str, num_dims: int) -> tuple[int, ...]:
    """Sizes of the leading dimensions, which all sites share: of draws, or of chains and draws."""
    form = "(S, ...)" if num_dims == 1 else "(C, S, ...)"
    leading = "the draws along its first dimension" if num_dims == 1 else "chains and draws along its first dimensions"
    if not isinstance(draws, Mapping) or not draws:
        raise ValueError(
            f"`{argument}` must be a dict of tensors {form} by site name with at least one site; got {draws!r:.80}."
        )
    for site, value in draws.items():
        if not is_dense(value) or value.dim() < num_dims or value.is_complex():
            raise ValueError(
                f"`{argument}['{site}']` must be a tensor with {leading}, {form}; got {shape_of(value)}. "
                "Use torch.as_tensor(...), to_dense() of a sparse tensor, and unsqueeze(0) where it is one draw."
            )
    if not any(value.shape[num_dims:].numel() for value in draws.values()):
        raise ValueError(f"`{argument}` holds no numbers: each of its sites {sorted(draws)} has size 0.")
    sizes = {site: tuple(value.shape[:num_dims]) for site, value in draws.items()}
    if len(set(sizes.values())) > 1:
        what = "draws along their first dimension" if num_dims == 1 else "chains and draws"
        shown = {site: size[0] for site, size in sizes.items()} if num_dims == 1 else sizes
        raise ValueError(
            f"The sites of `{argument}` have different numbers of {what}: {shown}. All must agree; was one site "
            "sliced, or drawn with another group_by_chain?"
        )
    size = next(iter(sizes.values()))
    if 0 in size:
        raise ValueError(f"`{argument}` holds zero draws of {sorted(draws)}; at least one is needed.")
    return size


def _check_finite(values: Mapping[str, Tensor], argument: str) -> None:
    for site, value in values.items():
        if value.is_floating_point() and not all_finite(value):
            raise not_finite_error(site, argument, int((~value.isfinite()).sum()))


def _device_of(posterior: object) -> torch.device | str:
    if not isinstance(posterior, torch.nn.Module):
        return "cpu"
    return next((tensor.device for tensor in (*posterior.parameters(), *posterior.buffers())), torch.device("cpu"))
