# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The loop: fit, predict, have some more labelled (protocol of Gal, Islam and Ghahramani, ICML 2017)."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_apd import metrics
from pyro_apd.active_learning.acquisition import Acquisition, check_acquisition, select
from pyro_apd.active_learning.history import History, HistoryFile, Round
from pyro_apd.active_learning.posteriors import Chain, Posterior
from pyro_apd.errors import ModelError
from pyro_apd.predictive.draws import PosteriorLike, take_draws
from pyro_apd.predictive.predictive import outputs
from pyro_apd.runtime.checks import choice, integer, is_integer
from pyro_apd.runtime.global_state import seeded
from pyro_apd.runtime.hashing import fingerprint
from pyro_apd.runtime.seeds import derived_generator, derived_seed, seed_or_fresh
from pyro_apd.runtime.tensor_checks import check_inputs, checked_labels

_RETRAINING = ("cold", "warm")


def run(
    model: Callable[..., Any],
    x_pool: Tensor,
    y_pool: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    *,
    posterior: Posterior | None = None,
    acquisition: Acquisition = "bald",
    initial: int | Sequence[int] | Tensor = 20,
    batch_size: int = 10,
    num_rounds: int = 50,
    retraining: str = "cold",
    num_score_draws: int = 50,
    num_test_draws: int = 50,
    pool_subset: int | None = None,
    seed: int = 0,
    history_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> History:
    """Active learning on a pool whose labels are known but looked at only where they are asked for.

    Each round fits a posterior to what is labelled, states its accuracy on the test data, and has the ``batch_size``
    data labelled that the acquisition wants most. The defaults are the protocol of Gal et al. (2017): 20 labels, then
    10 a round up to 510, each round from scratch. Queries of the last round are recorded; their labels are not used.

    :param callable model: a Pyro model of a classification, called as ``model(x, y)`` and ``model(x)``.
    :param torch.Tensor x_pool: inputs ``(N, ...)``.
    :param torch.Tensor y_pool: their classes ``(N,)``.
    :param torch.Tensor x_test: inputs ``(M, ...)`` to state accuracy on; never looked at otherwise.
    :param torch.Tensor y_test: their classes ``(M,)``.
    :param posterior: callable ``(model, x, y, seed, previous)`` to draws by site, or to an object with
        ``get_samples(num_samples)``; see :mod:`~pyro_apd.active_learning.posteriors`. By default a :class:`Chain`.
    :param acquisition: one of :data:`~pyro_apd.active_learning.ACQUISITIONS`, or a function from ``probs_SNK`` to
        scores ``(N,)``.
    :param initial: data labelled from the start: their positions, or how many, drawn evenly over classes by the seed.
    :param int batch_size: labels a round.
    :param int num_rounds: posteriors fitted; the labels come to ``initial + (num_rounds - 1) * batch_size``.
    :param str retraining: ``"cold"``: each round from scratch; ``"warm"``: from what the round before gave.
    :param int num_score_draws: draws that acquisition scores are taken from.
    :param int num_test_draws: draws that the test prediction averages over.
    :param int pool_subset: unlabelled data to look at in each round, drawn by the seed; None: all.
    :param int seed: makes the run reproducible; the global generators stay as they are.
    :param history_path: JSON file in which the history is kept after each round, and from which a run with the same
        settings goes on. What it gives is what it had given without the interruption.
    :param bool progress: show a bar.
    :raises ValueError: if an argument is out of range, sizes disagree, or ``history_path`` is of another run.
    :raises ModelError: if the model's observed site is no classification.
    """
    posterior = Chain() if posterior is None else posterior
    num_rounds = integer("num_rounds", num_rounds)
    check_acquisition(acquisition)
    settings: dict[str, Any] = {
        "model": _name(model),
        "acquisition": _name(acquisition),
        "posterior": _name(posterior),
        "batch_size": integer("batch_size", batch_size),
        "retraining": choice("retraining", retraining, _RETRAINING),
        "num_score_draws": integer("num_score_draws", num_score_draws),
        "num_test_draws": integer("num_test_draws", num_test_draws),
        "pool_subset": None if pool_subset is None else integer("pool_subset", pool_subset),
        "seed": seed_or_fresh(seed),
    }
    _check_data(x_pool, y_pool, x_test, y_test)
    start = _initial(initial, y_pool, settings["seed"])
    needed = len(start) + (num_rounds - 1) * settings["batch_size"]
    if needed > len(x_pool):
        raise ValueError(
            f"{num_rounds} rounds need {needed} labels, and the pool has {len(x_pool)}; take fewer rounds or a smaller "
            "`batch_size`."
        )
    settings["data"] = fingerprint(x_pool, y_pool, x_test, y_test)["sha256"]
    data = _Data(x_pool, y_pool, x_test, y_test)
    task = _Task(model, data, posterior, acquisition, retraining == "warm", settings)
    return _loop(task, start, num_rounds, history_path, progress)


@dataclass(frozen=True)
class _Data:
    x_pool: Tensor
    y_pool: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class _Task:
    """What stays the same from round to round."""

    model: Callable[..., Any]
    data: _Data
    posterior: Posterior
    acquisition: Acquisition
    is_warm: bool
    settings: dict[str, Any]

    def seed(self, number: int, purpose: str) -> int:
        """A seed for one purpose in one round: a run that goes on needs no state of a generator."""
        return derived_seed(self.settings["seed"], "round", number, purpose)


def _loop(
    task: _Task, start: list[int], num_rounds: int, history_path: str | os.PathLike[str] | None, progress: bool
) -> History:
    file = None if history_path is None else HistoryFile(history_path)
    known: History | None = None
    previous: PosteriorLike | None = None
    if file is not None:
        known, previous = file.read(task.settings)
    history = History(task.settings, start) if known is None else known
    if history.initial != start:
        raise ValueError(f"{history_path} began with other labels than `initial`; give another `history_path`.")
    missing = range(len(history.rounds), num_rounds)
    for number in (bar := tqdm(missing, desc="Active learning", disable=not progress, leave=False)):
        # Also for a posterior that draws by the global generator.
        with seeded(task.seed(number, "global"), task.data.x_pool.device):
            one, previous = _round(task, history, number, previous)
        history.rounds.append(one)
        if file is not None:
            file.write(history, previous if task.is_warm else None)
        bar.set_postfix(labels=one.num_labels, accuracy=f"{one.accuracy:.4f}")
    return History(history.settings, history.initial, history.rounds[:num_rounds])


def _round(task: _Task, history: History, number: int, previous: PosteriorLike | None) -> tuple[Round, PosteriorLike]:
    """Fit, predict, choose."""
    begun = time.monotonic()
    data, labelled = task.data, [*history.labelled, *history.wanted]
    index = torch.as_tensor(labelled, device=data.x_pool.device)
    fitted = task.posterior(
        task.model, data.x_pool[index], data.y_pool[index], task.seed(number, "fit"), previous if task.is_warm else None
    )
    probs_NK = _probabilities(
        task.model, fitted, data.x_test, task.settings["num_test_draws"], task.seed(number, "test")
    ).mean(0)
    one = Round(
        len(labelled),
        metrics.accuracy(probs_NK, data.y_test),
        metrics.negative_log_likelihood(probs_NK, data.y_test),
        _wanted(task, fitted, labelled, number),
        round(time.monotonic() - begun, 3),
    )
    return one, fitted


def _wanted(task: _Task, fitted: PosteriorLike, labelled: Sequence[int], number: int) -> list[int]:
    """Positions in the pool to have labelled next."""
    settings, seed = task.settings, task.seed(number, "acquire")
    is_free_N = torch.ones(len(task.data.x_pool), dtype=torch.bool)
    is_free_N[torch.as_tensor(labelled)] = False
    free = is_free_N.nonzero().squeeze(1)
    if len(free) == 0:
        return []
    if settings["pool_subset"] is not None:
        generator = derived_generator(task.seed(number, "subset"))
        free = free[torch.randperm(len(free), generator=generator)[: settings["pool_subset"]].sort().values]
    if task.acquisition == "random":
        probs_SNK = torch.zeros(1, len(free), 1)  # nothing is predicted where nothing is asked
    else:
        inputs = task.data.x_pool[free.to(task.data.x_pool.device)]
        probs_SNK = _probabilities(task.model, fitted, inputs, settings["num_score_draws"], task.seed(number, "score"))
    return free[select(task.acquisition, probs_SNK, settings["batch_size"], seed=seed)].tolist()


def _probabilities(model: Callable[..., Any], fitted: PosteriorLike, x: Tensor, count: int, seed: int) -> Tensor:
    """``(S, N, K)`` under ``count`` draws, or all where there are fewer."""
    result = outputs(model, take_draws(fitted, count, seed, x.device), x)
    if result.probs_SNK is None:
        raise ModelError(
            f"Active learning needs class probabilities; site '{result.site}' is of kind '{result.kind}', not a "
            "categorical or Bernoulli one."
        )
    return result.probs_SNK


def balanced(y: Tensor, count: int, *, seed: int | None = None) -> list[int]:
    """``count`` positions, as evenly over the classes as may be.

    :param torch.Tensor y: classes ``(N,)``.
    :param int count: positions wanted, at most N.
    :param int seed: which of each class; None: the first of each, as in Wang et al. (2018).
    :raises ValueError: if ``count`` is out of range.
    """
    count = integer("count", count, at_most=len(y), hint="The upper limit is the number of data.")
    order = torch.arange(len(y))
    if seed is not None:
        order = torch.randperm(len(y), generator=derived_generator(seed_or_fresh(seed), "balanced"))
    y_shuffled = y.cpu()[order]
    # One of each class, then another of each, until there are enough.
    rank_N = torch.zeros(len(y), dtype=torch.long)
    for value in y_shuffled.unique():
        rank_N[y_shuffled == value] = torch.arange(int((y_shuffled == value).sum()))
    return order[rank_N.sort(stable=True).indices[:count]].tolist()


def _initial(initial: int | Sequence[int] | Tensor, y_pool: Tensor, seed: int) -> list[int]:
    """Positions to begin with.

    :raises ValueError: if they are none, repeated or out of range.
    """
    if is_integer(initial):
        hint = "The upper limit is the size of the pool."
        return balanced(y_pool, integer("initial", initial, at_most=len(y_pool), hint=hint), seed=seed)
    given = initial.tolist() if isinstance(initial, Tensor) else initial
    positions = list(given) if isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, str) else []
    positions = [int(i) if is_integer(i) else -1 for i in positions]
    if not positions or len(set(positions)) < len(positions) or not all(0 <= i < len(y_pool) for i in positions):
        raise ValueError(
            f"`initial` must be a number, or distinct positions from 0 to {len(y_pool) - 1}, at least one; got "
            f"{initial!r:.80}."
        )
    return positions


def _name(value: Any) -> str:
    """What tells a setting from another in a file."""
    if isinstance(value, str):
        return value
    if isinstance(value, torch.nn.Module):
        return f"{type(value).__qualname__} {hashlib.sha256(repr(value).encode()).hexdigest()[:12]}"
    if is_dataclass(value):
        return re.sub(" at 0x[0-9a-f]+", "", repr(value))  # a function's address differs from run to run
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _check_data(x_pool: Tensor, y_pool: Tensor, x_test: Tensor, y_test: Tensor) -> None:
    for suffix, x, y in (("pool", x_pool, y_pool), ("test", x_test, y_test)):
        check_inputs(f"`x_{suffix}`", x, is_real=False)
        checked_labels(f"`y_{suffix}`", y, len(x))
