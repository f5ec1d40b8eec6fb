# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What distillation lost: a generator against the chain it was fitted to, function space first."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_apd.diagnostics.draws import (
    ChainDraws,
    Draws,
    draw_posterior,
    draw_shapes,
    evenly_spaced,
    posterior_bytes,
    read_chain,
)
from pyro_apd.diagnostics.evaluation import Evaluation, evaluate, find_inputs
from pyro_apd.diagnostics.resolution import (
    STANDARD_ERRORS,
    balanced_halves,
    mean_similarities,
    resolved_errors,
    share_between_pieces,
    standard_errors,
)
from pyro_apd.diagnostics.verdict import POORLY_MIXED_SHARE, Row, judge, lookup, overall
from pyro_apd.pyro_state import preserved_param_store, seeded

if TYPE_CHECKING:
    import pandas

__all__ = ["Fidelity", "compare"]

_COLUMNS = ("chain", "generator", "stored", "resolution")


@dataclass(frozen=True)
class Fidelity:
    """A generator against its chain. Made by :func:`compare`; prints as a table.

    :ivar tuple rows: :class:`~pyro_apd.diagnostics.verdict.Row` by row; ``fidelity["mean_mi"]`` is one of them.
    :ivar str status: ``indistinguishable``, ``loses``, ``departs`` or ``unclear``.
    :ivar str verdict: the same in words.
    :ivar int num_samples: draws of chain and of generator that the figures are of.
    :ivar int num_stored: stored draws that take the generator's bytes.
    :ivar dict num_bytes: ``chain`` (all its draws), ``generator`` (its file), ``stored``, ``network`` (one draw).
    :ivar float mixing: share of the variance of the chain's predictions that lies between half-chains; NaN if unknown.
    :ivar str chain_name: what made the chain, such as ``SGLD``.
    :ivar tuple notes: what a reader should know besides.
    :ivar dict per_input: by ``chain`` and ``generator``: scores ``(N,)`` by ``entropy``, ``mi`` (or ``sd``,
        ``epistemic``), those of out-of-distribution sets as ``mi[noise]``, and the averaged prediction as ``mean``;
        targets as ``per_input["targets"]["y"]``. On the CPU.
    """

    rows: tuple[Row, ...]
    status: str
    verdict: str
    num_samples: int
    num_stored: int
    num_bytes: dict[str, int]
    mixing: float
    chain_name: str
    notes: tuple[str, ...] = ()
    per_input: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"No figure '{name}'; there are {[row.name for row in self.rows]}.")

    def __str__(self) -> str:
        stored = f"{self.num_stored} stored"
        header = ("", self.chain_name, "generator", stored, "resolution", "verdict")
        lines = [(row.label, *(format_number(getattr(row, c)) for c in _COLUMNS), row.verdict) for row in self.rows]
        lines.append(("bytes", *(format_bytes(self.num_bytes[c]) for c in _COLUMNS[:3]), "", self.compression))
        widths = [max(len(line[i]) for line in (header, *lines)) for i in range(5)]

        def formatted(line: Sequence[str]) -> str:
            cells = [line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, 5)), line[5]]
            return "  ".join(cells).rstrip()

        table, group = [formatted(header)], ""
        for line, row in zip(lines, (*self.rows, None), strict=True):
            if row is not None and row.group != group:
                group = row.group
                table.append(f"-- {group}")
            table.append(formatted(line))
        return "\n".join([self.verdict, "", *table, "", *(f"* {note}" for note in self.notes)])

    @property
    def compression(self) -> str:
        """How much smaller than the chain the generator is, in words."""
        ratio = self.num_bytes["chain"] / self.num_bytes["generator"]
        networks = self.num_bytes["generator"] / self.num_bytes["network"]
        size = f"{ratio:.3g} times smaller" if ratio >= 1 else f"{1 / ratio:.3g} times larger"
        return f"{size} than the chain; {networks:.3g} networks"

    def to_frame(self) -> pandas.DataFrame:
        """A row for each figure, indexed by name."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows]).set_index("name")

    def to_json(self, indent: int | None = None) -> str:
        """All but the per-input arrays; what is not finite becomes null."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("rows", "per_input")}
        plain["rows"] = [asdict(row) for row in self.rows]
        return json.dumps(_finite(plain), indent=indent)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def compare(
    mcmc: Any,
    posterior: Any,
    model: Callable[..., Any] | None = None,
    x: Any = None,
    y: Tensor | None = None,
    *,
    ood: Mapping[str, Any] | None = None,
    num_samples: int = 100,
    seed: int | None = 0,
    group_by_chain: bool | None = None,
) -> Fidelity:
    """What the generator lost of the chain.

    Figures of ``num_samples`` draws of the chain, evenly thinned, against as many of the generator, and against the
    draws that could be stored in the bytes of the generator's file (taken from between those of the first column where
    there are enough). Likenesses (agreement, total variation, correlation, sd ratios) are between half sets: the
    chain's column holds one half of the chain against the other, the generator's a half of the chain against half of
    the generator's draws, so that the two are of like size.

    ``resolution`` is 3.5 standard errors of the difference, which come from ways of halving the chain (in time, and
    chains against chains, whichever says more) and the generator's draws: no p-value, since draws of a chain are not
    independent. Function space decides the verdict; weights are unidentified.

    The chain's column is of the draws that :func:`pyro_apd.distill` held out, where there are as many as asked for.

    :param mcmc: a :class:`pyro.infer.MCMC` after ``run``, or a dict of draws ``(S, ...)`` or ``(C, S, ...)``.
    :param posterior: a :class:`~pyro_apd.posterior.DistilledPosterior`, or a dict of draws ``(S, ...)``.
    :param model: the Pyro model, called as ``model(x)`` and, for the likelihood, ``model(x, y)``; default that of the
        kernel.
    :param x: inputs, a tensor or a tuple of arguments; preferably not those that the chain was conditioned on. Default
        the arguments of ``mcmc.run``; without any, weights alone are compared.
    :param Tensor y: targets, one a datum. Without them there is no accuracy, NLL or ECE.
    :param ood: out-of-distribution inputs by name.
    :param int num_samples: draws of either, at least 8; rounded down to the same number of each chain, one or more.
    :param int seed: for the generator's draws; the same seed gives the same figures.
    :param bool group_by_chain: whether a dict ``mcmc`` is ``(C, S, ...)``; default by the shapes of ``posterior``.
    :raises ValueError: if there are fewer than 8 draws, sites differ, or arguments do not belong together.
    :raises TypeError: if an argument is of a kind that holds no draws.
    """
    if num_samples < 8:
        raise ValueError(f"`num_samples` must be at least 8, or its halves say nothing; got {num_samples}.")
    chain = read_chain(mcmc, draw_shapes(posterior), group_by_chain)
    model = model if model is not None else getattr(getattr(mcmc, "kernel", None), "model", None)
    inputs, notes = find_inputs(mcmc, model, x, y, ood)
    split = split_draws(chain, posterior, num_samples, seed)
    # Finding the structure of the model draws from its prior.
    with preserved_param_store(), seeded(seed, chain.device), torch.no_grad():
        sets = {name: evaluate(model, draws, list(chain.values), inputs) for name, draws in split.draws.items()}
        rows, mixing = _rows(sets, split.chains, split.draws_each)
    spread = bool((sets["chain"].theta_SD.std(0) > 0).any())
    status, verdict = overall(rows, mixing, spread)
    num_bytes = {
        "chain": chain.num_bytes,
        "generator": posterior_bytes(posterior),
        "stored": split.num_stored * chain.bytes_per_draw,
        "network": chain.bytes_per_draw,
    }
    return Fidelity(
        rows=tuple(rows),
        status=status,
        verdict=verdict[0].upper() + verdict[1:],
        num_samples=sets["chain"].num_draws,
        num_stored=split.num_stored,
        num_bytes=num_bytes,
        mixing=mixing,
        chain_name=chain.name,
        notes=tuple(notes + _notes(rows, chain, mixing, split)),
        per_input=_per_input(sets),
    )


@dataclass(frozen=True)
class _Split:
    """Draws that are compared, pooled, by ``chain``, ``generator`` and ``stored`` (where one fits)."""

    draws: dict[str, Draws]
    chains: int
    draws_each: int
    num_stored: int
    overlap: bool
    is_fitted: bool


def split_draws(chain: ChainDraws, posterior: Any, num_samples: int, seed: int | None) -> _Split:
    """The same number of draws of chain and generator, and stored ones of the generator's bytes."""
    if isinstance(posterior, Mapping):
        num_samples = min(num_samples, len(next(iter(draw_posterior(posterior, None, seed).values()))))
    unseen = held_out_steps(chain, posterior)
    each = max(1, num_samples // chain.num_chains)
    candidates = unseen if len(unseen) >= each else list(range(chain.num_draws))
    steps = [candidates[i] for i in evenly_spaced(len(candidates), each)]
    reference = chain.pooled(steps)
    count = chain.num_chains * len(steps)
    generated = draw_posterior(posterior, count, seed)
    if set(generated) != set(chain.values):
        raise ValueError(
            f"Sites of `posterior` {sorted(generated)} are not those of `mcmc` {sorted(chain.values)}; both must be of "
            "one model."
        )
    draws = {"chain": reference, "generator": {name: v.to(reference[name]) for name, v in generated.items()}}
    num_stored = min(posterior_bytes(posterior) // chain.bytes_per_draw, chain.num_chains * chain.num_draws)
    pool = [step for step in range(chain.num_draws) if step not in set(steps)]
    overlap = num_stored > len(pool) * chain.num_chains
    if overlap:
        pool = list(range(chain.num_draws))
    if num_stored:
        places = evenly_spaced(len(pool) * chain.num_chains, num_stored)
        draws["stored"] = chain.at([p // len(pool) for p in places], [pool[p % len(pool)] for p in places])
    is_fitted = len(candidates) > len(unseen) and not isinstance(posterior, Mapping)
    return _Split(draws, chain.num_chains, len(steps), num_stored, overlap, is_fitted)


def held_out_steps(chain: ChainDraws, posterior: Any) -> list[int]:
    """Draws of each chain that the generator was not fitted to, by what its distillation wrote down; else none."""
    known = getattr(posterior, "metadata", None) or {}
    rule = known.get("held_out")
    if not rule or (known.get("num_chains"), known.get("num_draws")) != (chain.num_chains, chain.num_draws):
        return []
    stop = rule["start"] + rule["length"]
    return [step for step in range(chain.num_draws) if rule["start"] <= step % rule["period"] < stop]


def _rows(sets: Mapping[str, Evaluation], num_chains: int, num_draws: int) -> tuple[list[Row], float]:
    chain, generator, stored = sets["chain"], sets["generator"], sets.get("stored")
    halves = balanced_halves(num_chains, num_draws)
    alike = balanced_halves(1, 2 * len(halves[0][0]))
    mixing = share_between_pieces(chain, num_chains, num_draws)
    errors, generator_errors = resolved_errors(chain, num_chains, num_draws), standard_errors(generator, alike)
    figures = {name: s.figures() for name, s in sets.items()}
    resolution = {n: STANDARD_ERRORS * math.hypot(errors[n], generator_errors[n]) for n in errors}
    own, own_sd = mean_similarities(chain, halves, chain, halves)
    other, other_sd = mean_similarities(chain, halves, generator, alike)
    figures["chain"] |= own
    figures["generator"] |= other
    resolution |= {name: STANDARD_ERRORS * math.hypot(own_sd[name], other_sd.get(name, 0.0)) for name in own}
    if stored is not None:
        everything = list(range(stored.num_draws))
        figures["stored"] |= mean_similarities(chain, halves, stored, [(everything, everything)] * len(halves))[0]
    num_data = chain.mean().shape[0] if chain.kind != "weights" else 1
    rows = []
    for name, value in figures["chain"].items():
        # Shares of data are never known better than to one datum.
        floor = 1 / num_data if not lookup(name).relative and chain.kind == "classes" else 0.0
        fine = max(resolution[name], floor, 1e-6 * abs(value))
        found = figures["generator"].get(name, math.nan)
        status, verdict = judge(name, value, found, fine, mixing > POORLY_MIXED_SHARE)
        kept = figures.get("stored", {}).get(name, math.nan)
        rows.append(Row(name, lookup(name).label, _group(name), value, found, kept, fine, status, verdict))
    return sorted(rows, key=lambda row: _order(row.group)), mixing


def _group(name: str) -> str:
    base, _, which = name.partition("[")
    if which:
        return f"out of distribution: {which[:-1]}"
    return "weight space" if base.startswith("weight") else "function space"


def _order(group: str) -> int:
    return ("function space", "out of distribution", "weight space").index(group.partition(":")[0])


def _notes(rows: Sequence[Row], chain: ChainDraws, mixing: float, split: _Split) -> list[str]:
    notes = []
    if chain.num_chains == 1:
        notes.append("One chain: modes that it never visited are unknown to it and to the generator alike.")
    if mixing == mixing:
        notes.append(
            f"{mixing:.0%} of the variance of the chain's predictions lies between half-chains (none if it mixes)."
        )
    closer = [r for r in rows if abs(r.generator - r.chain) < abs(r.stored - r.chain)]
    comparable = [r for r in rows if r.stored == r.stored and r.chain == r.chain]
    if split.num_stored == 0:
        notes.append("The generator's file is smaller than one network, so no stored draw is a rival.")
    else:
        notes.append(
            f"Closer to the chain than {split.num_stored} stored draws of the same bytes in {len(closer)} of "
            f"{len(comparable)} figures."
        )
    if split.is_fitted:
        notes.append("The chain's column holds draws that the generator may have been fitted to.")
    if split.overlap:
        notes.append("Stored draws include draws of the chain's own column, which flatters them.")
    return notes


def _per_input(sets: Mapping[str, Evaluation]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name in ("chain", "generator"):
        evaluation = sets[name]
        if evaluation.kind == "weights":
            return {}
        found[name] = {"mean": evaluation.mean().cpu()}
        for which in evaluation.values:
            suffix = f"[{which}]" if which else ""
            found[name] |= {f"{score}{suffix}": value.cpu() for score, value in evaluation.scores(which).items()}
    targets = sets["chain"].targets
    if targets is not None:
        found["targets"] = {"y": targets.cpu()}
    return found


def format_number(value: float) -> str:
    """Four decimals; a dash for what is not defined."""
    return "-" if value != value else f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def format_bytes(value: int) -> str:
    """Bytes in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} B"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
