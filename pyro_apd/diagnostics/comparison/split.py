# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which draws are compared: the chain's, thinned and held out where that is known; the generator's; stored ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pyro_apd.diagnostics.draws import posterior_bytes
from pyro_apd.predictive.chain_draws import ChainDraws
from pyro_apd.predictive.draws import PosteriorLike, Values, check_draws, evenly_spaced, read_draws

# Names of sets, sizes and columns that a comparison has by itself.
_NAMES = ("label", "group", "chain", "generator", "stored", "resolution", "status", "verdict", "network")


@dataclass(frozen=True)
class Split:
    """Draws that are compared.

    :ivar dict draws: pooled, by ``chain``, ``generator`` and ``stored`` (where one fits).
    :ivar list steps: which of each chain's draws ``chain`` holds.
    :ivar int chains: chains, each of which gave as many.
    :ivar int draws_each: draws of each.
    :ivar int num_stored: draws that take the generator's bytes.
    :ivar bool overlap: whether stored draws are among those of ``chain``.
    :ivar bool is_fitted: whether the generator may have seen those of ``chain``.
    :ivar int num_unseen: draws of each chain that it has not seen.
    """

    draws: dict[str, Values]
    steps: list[int]
    chains: int
    draws_each: int
    num_stored: int
    overlap: bool
    is_fitted: bool
    num_unseen: int


def split_draws(chain: ChainDraws, posterior: PosteriorLike, num_samples: int, seed: int | None) -> Split:
    """The same number of draws of chain and generator, and stored ones of the generator's bytes."""
    if isinstance(posterior, Mapping):
        num_samples = min(num_samples, check_draws(posterior, "posterior"))
    unseen = held_out_steps(chain, posterior)
    each = max(1, num_samples // chain.num_chains)
    candidates = unseen if len(unseen) >= each else list(range(chain.num_draws))
    steps = [candidates[i] for i in evenly_spaced(len(candidates), each)]
    reference = chain.pooled(steps)
    count = chain.num_chains * len(steps)
    generated = _like(reference, read_draws(posterior, count, seed=seed), "posterior")
    draws = {"chain": reference, "generator": generated}
    num_stored = min(posterior_bytes(posterior) // chain.bytes_per_draw, chain.num_chains * chain.num_draws)
    pool = [step for step in range(chain.num_draws) if step not in set(steps)]
    overlap = num_stored > len(pool) * chain.num_chains
    if overlap:
        pool = list(range(chain.num_draws))
    if num_stored:
        places = evenly_spaced(len(pool) * chain.num_chains, num_stored)
        draws["stored"] = chain.at([p // len(pool) for p in places], [pool[p % len(pool)] for p in places])
    is_fitted = len(candidates) > len(unseen) and not isinstance(posterior, Mapping)
    return Split(draws, steps, chain.num_chains, len(steps), num_stored, overlap, is_fitted, len(unseen))


def baseline_draws(
    baselines: Mapping[str, PosteriorLike] | None, reference: Values, count: int, seed: int | None
) -> dict[str, Values]:
    """All draws of dicts and ``count`` of anything else, by the user's names.

    :param reference: draws of the chain, whose sites, shapes and device they must have.
    """
    if not isinstance(baselines, Mapping | None):
        raise TypeError(
            f"`baselines` must be a dict of draws or posteriors by name; got {type(baselines).__name__}. Give "
            "baselines={'int2': apd.baselines.stored_draws(...)}."
        )
    found = {}
    for name, other in (baselines or {}).items():
        if not isinstance(name, str) or name in _NAMES:
            raise ValueError(f"A name in `baselines` must be a string other than {', '.join(_NAMES)}; got {name!r}.")
        argument = f"baselines[{name!r}]"
        wanted = None if isinstance(other, Mapping) else count
        found[name] = _like(reference, read_draws(other, wanted, argument, seed=seed), argument)
    return found


def _like(reference: Values, draws: Values, argument: str) -> Values:
    """Draws on the device and with the dtypes of the chain's.

    :raises ValueError: if sites or their shapes differ.
    """
    if set(draws) != set(reference):
        raise ValueError(
            f"Sites of `{argument}` {sorted(draws)} are not those of `mcmc` {sorted(reference)}; both must be of one "
            "model."
        )
    shapes = {name: (tuple(v.shape[1:]), tuple(draws[name].shape[1:])) for name, v in reference.items()}
    unlike = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    if unlike:
        raise ValueError(
            f"A draw has another shape in `mcmc` and in `{argument}`: {dict(list(unlike.items())[:3])}. Both must be "
            "of one model; of a dict by chain, (C, S, ...), say group_by_chain=True, and of one (S, ...) False."
        )
    return {name: value.to(reference[name]) for name, value in draws.items()}


def held_out_steps(chain: ChainDraws, posterior: object) -> list[int]:
    """Draws of each chain that the generator was not fitted to, by what its distillation wrote down; else none."""
    known = getattr(posterior, "metadata", None) or {}
    rule = known.get("held_out")
    if not rule or (known.get("num_chains"), known.get("num_draws")) != (chain.num_chains, chain.num_draws):
        return []
    stop = rule["start"] + rule["length"]
    return [step for step in range(chain.num_draws) if rule["start"] <= step % rule["period"] < stop]
