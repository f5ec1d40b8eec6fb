# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What distillation lost: a generator compared with the chain it was fitted to, function space first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_apd.diagnostics.comparison.doubts import doubts
from pyro_apd.diagnostics.comparison.evaluation import (
    Evaluation,
    check_sampled_model,
    evaluate,
    find_inputs,
    model_of,
)
from pyro_apd.diagnostics.comparison.few_bits import few_bits
from pyro_apd.diagnostics.comparison.metric_rows import metric_rows
from pyro_apd.diagnostics.comparison.split import Split, baseline_draws, split_draws
from pyro_apd.diagnostics.comparison.verdict import Row, overall
from pyro_apd.diagnostics.draws import draw_shapes, posterior_bytes
from pyro_apd.diagnostics.formatting import counted
from pyro_apd.distillation.source import num_draws_for
from pyro_apd.predictive.chain_draws import ChainDraws
from pyro_apd.predictive.draws import ChainsLike, PosteriorLike, Values, read_chains
from pyro_apd.runtime.checks import integer
from pyro_apd.runtime.global_state import preserved_param_store, seeded
from pyro_apd.runtime.optional_packages import require
from pyro_apd.runtime.seeds import checked_seed

if TYPE_CHECKING:
    from pyro_apd.diagnostics.comparison.fidelity_table import Fidelity

__all__ = ["compare"]

# Verdict of a row.
_REPEATS = "repeats networks, as it says"
# Draws that can be compared, at least.
MIN_SAMPLES = 8
# Up to this share of the variance between half-chains, chains count as mixed.
_MIXED_SHARE = 0.05


def compare(
    mcmc: ChainsLike,
    posterior: PosteriorLike,
    model: Callable[..., Any] | None = None,
    x: Any = None,
    y: Tensor | None = None,
    *,
    ood: Mapping[str, Any] | None = None,
    baselines: Mapping[str, PosteriorLike] | None = None,
    num_samples: int = 100,
    seed: int | None = 0,
    group_by_chain: bool | None = None,
) -> Fidelity:
    """What the generator lost of the chain.

    Metrics of ``num_samples`` draws of the chain, evenly thinned, against as many of the generator, and against the
    draws that could be stored in the bytes of the generator's file (taken from between those of the first column where
    there are enough). Similarities (agreement, total variation, correlation, sd ratios) are between half sets: the
    chain's column holds one half of the chain against the other, the generator's a half of the chain against half of
    the generator's draws, so that both compare sets of the same size.

    ``resolution`` is four standard errors of the difference, which come from ways of halving the chain (in time, and
    chains against chains, where these say more) and the generator's draws: no p-value, since draws of a chain are not
    independent. Function space and memorised draws decide the verdict (function space alone, where the
    posterior says that it repeats draws); weights are unidentified.

    The chain's column is of the draws that :func:`pyro_apd.distill` held out, where there are as many as asked for.
    Chains that diverged are left out, and ``notes`` says which.

    :param mcmc: a :class:`pyro.infer.MCMC` after ``run``, or a dict of draws ``(S, ...)`` or ``(C, S, ...)``.
    :param posterior: a :class:`~pyro_apd.posterior.posterior.DistilledPosterior`, or a dict of draws ``(S, ...)``.
    :param model: the Pyro model, called as ``model(x)`` and, for the likelihood, ``model(x, y)``; default that of the
        kernel.
    :param x: inputs, a tensor or a tuple of arguments; preferably not those that the chain was conditioned on. Default
        the arguments of ``mcmc.run``; without any, weights alone are compared.
    :param Tensor y: targets, one per datum. Without them there is no accuracy, NLL or ECE.
    :param ood: out-of-distribution inputs by name.
    :param baselines: other ways to hold the posterior, by name: dicts of draws, all of which are used, or posteriors,
        of which as many draws are made as of the generator. Each is a further column, and does not change the verdict.
        By default the strongest at equal bytes, draws stored in two bits a weight, where model and inputs are known:
        :func:`pyro_apd.baselines.stored_draws` with ``dtype="int2"``. ``{}`` for none.
    :param int num_samples: draws of either, at least 8; rounded down to the same number of each chain, one or more.
    :param int seed: for the generator's draws; the same seed gives the same metrics.
    :param bool group_by_chain: whether a dict ``mcmc`` is ``(C, S, ...)``; default by the shapes of ``posterior``.
    :raises ValueError: if there are fewer than 8 draws, sites differ, or arguments do not belong together.
    :raises TypeError: if an argument is of a kind that holds no draws.
    :raises ArtifactError: if the model has other frozen weights than the one that was sampled or distilled.
    """
    require("pandas", purpose="A comparison")  # which takes a while
    from pyro_apd.diagnostics.comparison.fidelity_table import Fidelity

    hint = "Standard errors come from its halves."
    num_samples = integer("num_samples", num_samples, at_least=MIN_SAMPLES, hint=hint)
    seed = checked_seed(seed)
    chain = read_chains(mcmc, shapes=draw_shapes(posterior), group_by_chain=group_by_chain)
    model = model_of(mcmc, model)
    inputs, notes = find_inputs(mcmc, model, x, y, ood)
    split = split_draws(chain, posterior, num_samples, seed)
    if baselines is None:
        baselines = few_bits(chain, posterior, split, model, inputs, seed)
    others = baseline_draws(baselines, split.draws["chain"], split.chains * split.draws_each, seed)
    check_sampled_model((mcmc, posterior), model, split.draws["chain"], inputs)
    # Finding the structure of the model draws from its prior.
    with preserved_param_store(), seeded(seed, chain.device), torch.no_grad():
        every = {**split.draws, **others}
        sets = {name: evaluate(model, draws, list(chain.values), inputs) for name, draws in every.items()}
        rows, mixing = metric_rows(chain, sets, split)
    spread = bool((sets["chain"].theta_SD.std(0) > 0).any())
    doubted = doubts(mcmc, posterior)
    num_distinct = _num_distinct(posterior)
    if num_distinct is not None:
        rows = [_told(row) for row in rows]
    status, verdict = overall([row for row in rows if row.verdict != _REPEATS], mixing, spread, doubted)
    return Fidelity(
        rows,
        status,
        verdict[0].upper() + verdict[1:],
        num_samples=sets["chain"].num_draws,
        num_stored=split.num_stored,
        num_bytes=_num_bytes(chain, posterior, split, baselines),
        mixing=mixing,
        chain_name=chain.name,
        notes=doubted + notes + _notes(rows, chain, mixing, split, num_distinct) + _baseline_notes(rows, others),
        per_input=_per_input(sets),
    )


def _num_bytes(
    chain: ChainDraws, posterior: PosteriorLike, split: Split, baselines: Mapping[str, PosteriorLike]
) -> dict[str, int]:
    return {
        "chain": chain.num_bytes,
        "generator": posterior_bytes(posterior),
        "stored": split.num_stored * chain.bytes_per_draw,
        "network": chain.bytes_per_draw,
        **{name: posterior_bytes(other) for name, other in baselines.items()},
    }


def _told(row: Row) -> Row:
    """Repeated draws of a posterior that says so are no loss: what it predicts decides."""
    is_told = row.group == "memory" and row.status == "loses"
    return replace(row, status="departs", verdict=_REPEATS) if is_told else row


def _num_distinct(posterior: PosteriorLike) -> int | None:
    metadata = getattr(posterior, "metadata", None)
    found = metadata.get("distinct_draws") if isinstance(metadata, Mapping) else None
    return found if isinstance(found, int) else None


def _notes(rows: Sequence[Row], chain: ChainDraws, mixing: float, split: Split, num_distinct: int | None) -> list[str]:
    notes = chain.remarks()
    if num_distinct is not None:
        repeated = counted(num_distinct, "network")
        notes.append(f"The generator repeats {repeated}, apart from noise, as its metadata say.")
    if chain.num_chains == 1:
        notes.append("One chain: modes that it never visited are missing in the generator too, and no metric shows it.")
    if mixing == mixing:
        notes.append(_mixing_note(chain.num_chains, mixing))
    if split.num_stored == 0:
        notes.append("The generator's file is smaller than one network, so there is no baseline of stored draws.")
    else:
        notes.append(
            f"The generator is closer to the chain than {counted(split.num_stored, 'stored draw')} of the same size in "
            f"{_num_closer(rows, [row.stored for row in rows])} metrics."
        )
    if split.is_fitted:
        each, unseen = split.draws_each, split.num_unseen
        notes.append(
            f"{each} draws of each chain are compared; {unseen} were held out, the generator may be fitted to others."
        )
        enough = f"num_samples={unseen * split.chains} or " if unseen * split.chains >= MIN_SAMPLES else ""
        notes.append(f"For held-out draws alone: {enough}chains of {num_draws_for(each)} draws.")
    if split.overlap:
        notes.append("Stored draws include draws of the chain's own column, so they look better than they are.")
    return notes


def _baseline_notes(rows: Sequence[Row], others: Mapping[str, Values]) -> list[str]:
    notes = []
    for name, draws in others.items():
        count = counted(len(next(iter(draws.values()))), "draw")
        closer = _num_closer(rows, [row.baselines[name] for row in rows])
        notes.append(f"The generator is closer to the chain than {name} ({count}) in {closer} metrics.")
    return notes


def _num_closer(rows: Sequence[Row], values: Sequence[float]) -> str:
    """In how many metrics the generator is closer to the chain than these values, of how many."""
    pairs = [(row, value) for row, value in zip(rows, values, strict=True) if value == value and row.chain == row.chain]
    return f"{sum(abs(row.generator - row.chain) < abs(value - row.chain) for row, value in pairs)} of {len(pairs)}"


def _mixing_note(num_chains: int, mixing: float) -> str:
    share = f"{100 * mixing:.0f} % of the variation is between half-chains; 0 % is ideal."
    if mixing < _MIXED_SHARE:
        return share
    return f"{'The chain has' if num_chains == 1 else 'The chains have'} not fully mixed: {share}"


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
