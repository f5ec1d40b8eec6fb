# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Offline adversarial posterior distillation: a generator from the stored draws of a chain (paper, Algorithm 1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_apd.distillation.calibration import Calibration
from pyro_apd.distillation.failure import (
    DistillationError,
    DistillationWarning,
    Quality,
    find_disagreement,
    find_failures,
    find_shortage,
)
from pyro_apd.distillation.options import DistillOptions
from pyro_apd.distillation.setup import DistillationTask, PreparedTraining, prepare
from pyro_apd.distillation.source import HELD_OUT, Source, read_source, split_held_out
from pyro_apd.distillation.training import Training, train
from pyro_apd.generators.draw_blocks import blocks_of_draws
from pyro_apd.generators.subspace import SubspaceGenerator
from pyro_apd.models.bnn import BNN
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.runtime.cpu_threads import cpu_threads, threads_for
from pyro_apd.runtime.global_state import gradients, seeded
from pyro_apd.runtime.hashing import fingerprint
from pyro_apd.runtime.ranks import Ranks
from pyro_apd.runtime.seeds import derived_seed, seed_or_fresh
from pyro_apd.runtime.stages import stages

if TYPE_CHECKING:
    from pyro.infer import MCMC

    from pyro_apd.chains.stores.base import DrawStore


def distill(
    source: MCMC | DrawStore | Mapping[str, Tensor],
    model: Callable[..., Any] | None = None,
    *,
    data: Sequence[Any] | None = None,
    num_steps: int | None = None,
    seed: int | None = None,
    generator: str | None = None,
    objective: str | None = None,
    byte_budget: float | int | None = None,
    rank: int | None = None,
    storage_dtype: str | None = None,
    probe_inputs: Sequence[Any] | None = None,
    group_by_chain: bool = False,
    strict: bool = False,
    progress: bool = True,
) -> DistilledPosterior:
    """Distils draws of a chain into a generator.

    The default generator is fitted in closed form, in two passes over the draws. In each matrix of weights it keeps
    what the data determine, the part in the subspace of the layer's inputs, finely, and the rest coarsely, so that a
    whole posterior takes about as many bytes as one network (:class:`~pyro_apd.generators.SubspaceGenerator`). Where
    model and data are known, the inputs are gathered by running the model under a few draws, and two numbers are
    calibrated, so that generated draws disagree as much as the chain's do, near the data and far from them. Where they
    are not, the logger ``pyro_apd`` says so, and the subspace comes from the draws alone: directions in which all units
    of a layer vary little.
    With ``num_steps`` the distribution of the coordinates and the scales of noise are trained further, by the energy
    distance between generator and chain in function space (Szekely & Rizzo 2013), or where functions are not known
    against a learned critic (WGAN-GP).
    ``generator="paper"`` is offline APD as published (Wang et al., ICML 2018): a perceptron to raw weights, trained by
    WGAN-GP; the paper takes 100,000 steps.

    A fifth of each chain is held out, five draws of every 25. The state of the generator with the smallest distance to
    these is returned. Chains that diverged are left out; ``metadata["missing_chains"]`` has their numbers.

    :param source: an ``MCMC`` after ``run``; or draws by site, ``(S, ...)``, with ``group_by_chain`` ``(C, S, ...)``.
    :param callable model: the Pyro model; by default that of the ``MCMC``'s kernel.
    :param tuple data: arguments of the model, with or without targets; by default those of the run.
    :param int num_steps: generator steps; by default 200 for networks of fewer than 2,000 weights whose fit in closed
        form differs from held-out draws, none for others, and for ``"paper"`` 2,000.
    :param int seed: makes the posterior, and its file, reproducible; the global generator stays as it was.
    :param str generator: ``"subspace"``, the default, or ``"paper"``.
    :param str objective: with ``generator="paper"``, the GAN loss that it is trained by: ``"wgan-gp"`` (default),
        ``"wgan"``, ``"lsgan"`` or ``"non-saturating"``, each as published.
    :param byte_budget: size of the file, at most: networks at the precision of the draws as a float (``1.5``), or bytes
        as an integer. By default steps are as fine as keeps predictions close to the chain's resolution: about one
        network for a network of 80,000 weights, and a few for small ones, see ``docs/scaling.md``.
        :class:`DistillationWarning` says where a budget, or the number of draws, is too small for the posterior.
    :param int rank: coordinates of a chain; by default 96 divided by the number of chains, at least 12, and two thirds
        of a chain's draws at most. Where a chain mixes well, the generator repeats one draw more than these, by default
        100 in all, or 200 of networks of fewer than 2,000 weights. Where there is no spread around modes,
        ``metadata["distinct_draws"]`` has their number.
    :param str storage_dtype: precision of the numbers that are not integers, in memory and in the file that
        :meth:`~pyro_apd.DistilledPosterior.save` writes; by default ``"int8"``; for ``"paper"``, and for draws of more
        digits, that of the draws.
    :param tuple probe_inputs: arguments of the model at whose rows functions are compared, instead of variations of
        ``data``.
    :param bool group_by_chain: whether a dict has a leading dimension for chains.
    :param bool strict: raise instead of warn if the generator collapsed, diverged or was interrupted, or is too small.
    :param bool progress: show a progress bar.
    :raises TypeError: if ``source`` is neither, or ``data`` is not a tuple.
    :raises ValueError: if draws are too few, malformed or not of the model's sites, or an argument is out of range.
    :raises DistillationError: with ``strict=True``, where :class:`DistillationWarning` would have been issued.
    """
    options = DistillOptions(generator, objective, num_steps, rank, byte_budget, storage_dtype, seed)
    draws = read_source(source, model, data, group_by_chain)
    posterior, training = distill_draws(draws, options, probe_inputs, progress)
    report(posterior, training, strict)
    return posterior


def distill_draws(
    source: Source,
    options: DistillOptions,
    probe_inputs: Sequence[Any] | None,
    progress: bool,
    ranks: Ranks | None = None,
) -> tuple[DistilledPosterior, Training]:
    """:func:`distill` once the draws are read, with parameters as there. The caller is to call :func:`report`.

    :param Ranks ranks: processes that train together, with the same draws and seed; each gets the same posterior.
    """
    seed = seed_or_fresh(options.seed)
    source = replace(source, frozen=source.frozen_tensors())
    with gradients("distill"), seeded(derived_seed(seed, "distillation"), source.theta_CSD.device):
        posterior, training = _fit_and_train(source, options, probe_inputs, progress, ranks or Ranks())
    posterior.metadata["seed"] = seed
    # The posterior in memory has the precision of its file, and draws the same.
    posterior = posterior.rounded(options.file_dtype(source.theta_CSD.dtype))
    _note_data_and_network(posterior, source)
    return posterior, training


def _fit_and_train(
    source: Source, options: DistillOptions, probe_inputs: Sequence[Any] | None, progress: bool, ranks: Ranks
) -> tuple[DistilledPosterior, Training]:
    """:func:`distill` with random numbers of torch's functions, and before the posterior is rounded."""
    num_chains, num_draws, _ = source.theta_CSD.shape
    train_index, held_out_index = split_held_out(num_draws)
    task = DistillationTask.of(source, probe_inputs, train_index, held_out_index, ranks)
    with cpu_threads(threads_for(task.step_seconds, source.theta_CSD.device)):
        with stages("Fit of the generator", progress) as note:
            prepared = prepare(task, options, note)
        training = train(
            prepared.generator,
            prepared.objective,
            prepared.evaluator,
            prepared.schedule,
            progress=progress,
            ranks=ranks,
        )
    fitted = prepared.fitted
    calibration = None if fitted is None else fitted.calibration
    if calibration is not None and training.best_step:
        assert task.functions is not None
        assert isinstance(prepared.generator, SubspaceGenerator)
        calibration = calibration.of_trained(prepared.generator, task.functions, task.draws, task.cost.num_products)
    network_bytes = source.layout.size * source.theta_CSD.element_size()
    _judge(training, prepared, calibration, options.byte_budget, network_bytes)
    metadata = {
        "num_chains": num_chains,
        "num_draws": num_draws,
        **({"missing_chains": list(source.missing_chains)} if source.missing_chains else {}),
        **({"sampler": dict(source.sampler)} if source.sampler else {}),
        "held_out": HELD_OUT if len(held_out_index) < num_draws else None,
        "space": "weights" if task.functions is None else "functions",
        **({} if calibration is None else {"calibration": calibration.to_json()}),
        **({} if fitted is None or fitted.num_distinct is None else {"distinct_draws": fitted.num_distinct}),
        "num_steps": training.num_steps,
        "best_step": training.best_step,
        "metrics": {name: float(f"{value:.4g}") for name, value in training.metrics.items()},
    }
    generator = prepared.generator.requires_grad_(False).eval()
    return DistilledPosterior(source.layout, generator, metadata=metadata, training_log=training.log), training


def _judge(
    training: Training,
    prepared: PreparedTraining,
    calibration: Calibration | None,
    byte_budget: float | int | None,
    network_bytes: float,
) -> None:
    """Notes whether the default generator is too small, or its draws disagree too much or too little on the data."""
    fitted = prepared.fitted
    if fitted is None:
        return

    def default() -> Quality:
        assert fitted.default is not None
        found = fitted.default()
        count = prepared.schedule.num_evaluation_draws
        return Quality(prepared.evaluator.metrics(blocks_of_draws(found.generator, count, count)), found.calibration)

    if fitted.default_bytes is not None and byte_budget is not None:
        own = Quality(training.metrics, calibration)
        networks = fitted.default_bytes / network_bytes
        training.shortage = find_shortage(byte_budget, fitted.default_bytes, networks, own, default)
    else:
        training.disagreement = find_disagreement(calibration)


def _note_data_and_network(posterior: DistilledPosterior, source: Source) -> None:
    """Notes which data the draws are of, and the network, where these are known."""
    data = [value for value in source.args or () if isinstance(value, Tensor)]
    if data and source.has_all_data:
        posterior.metadata["data"] = fingerprint(*data)
    posterior.frozen = source.frozen
    if isinstance(source.model, BNN):
        posterior.bind(source.model)


def report(posterior: DistilledPosterior, training: Training, strict: bool) -> None:
    """Warns the caller's caller if a generator failed, see :func:`distill`, and notes that in the posterior's metadata;
    raises if ``strict``."""
    failures = find_failures(training.metrics)
    if not training.metrics:
        failures.append("no state of the generator had finite metrics")
    if training.shortage is not None:
        failures.append(training.shortage.reason)
    if training.disagreement is not None:
        failures.append(training.disagreement)
    if training.stopped is not None:
        failures.insert(0, f"{training.stopped}; this is the best state before, of step {training.best_step}")
    if not failures:
        return
    metrics = ", ".join(f"{name} {value:.3g}" for name, value in sorted(training.metrics.items()))
    advice = "more draws, more steps (num_steps) or more coordinates (rank)"
    if training.shortage is not None:
        advice = training.shortage.advice
    posterior.metadata["warnings"] = failures
    message = (
        f"{'; '.join(failures)}. Metrics on held-out draws, over inputs near the data and far from it: "
        f"{metrics or 'none'}. Use {advice}. pyro_apd.diagnostics.compare shows what was lost, and stored draws in as "
        "many bytes."
    )
    if strict:
        raise DistillationError(f"Distillation failed: {message}")
    warnings.warn(f"The generator is returned, but it is not good: {message}", DistillationWarning, stacklevel=3)
