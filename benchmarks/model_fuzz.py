# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""10,000 models as users write them: each is refused, or its gradient is right. ``python -m benchmarks.model_fuzz``.

Each model is written as source code from one integer (:mod:`benchmarks.model_fuzz_models`); ``--show SEED`` prints it.
The potential that the kernels would use is built from it. The mean of its gradient over the batches of an epoch must be
the gradient on all data that plain Pyro computes, to 1e-4 of each latent's gradient, at two points. A model without a
fault must run. A model with a fault may be refused, unless plain Pyro shows that the fault makes no difference: in full
batches, and in plates that subsample.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import logging
import math
import random
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

import pyro_apd as apd
from benchmarks.common import markdown_table, write_json
from benchmarks.model_fuzz_models import Model, data_source, draw, model_source, reference_source
from pyro_apd.models.building import build_potential
from pyro_apd.models.potential import Potential

REFUSALS = (apd.ModelError, apd.DataError, ValueError)
TOLERANCE = 1e-4
# Entries of a latent's gradient below this share of the whole gradient are compared with the whole.
_SMALL = 1e-3
# Orders of the rows, at each of five points, in which a fault must make no difference to be harmless.
_NUM_ORDERS = 10
FAILURES = ("silent difference", "false refusal", "other error")


@dataclass(frozen=True)
class Result:
    """What became of one model.

    :ivar str outcome: ``right``, ``harmless fault``, ``refused rightly`` or one of :data:`FAILURES`.
    :ivar str detail: the message, or the size of the difference.
    """

    model: Model
    outcome: str
    detail: str = ""

    @property
    def kind(self) -> str:
        """The kind of the planted fault."""
        return f"kind {self.model.fault.kind}" if self.model.fault else "no fault"


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Global random states, default dtype and parameters as before; no warnings, no log."""
    dtype, python, of_numpy = torch.get_default_dtype(), random.getstate(), np.random.get_state()  # noqa: NPY002
    logger = logging.getLogger("pyro_apd")
    level = logger.level
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
            torch.set_default_dtype(dtype)
            random.setstate(python)
            np.random.set_state(of_numpy)  # noqa: NPY002


class Case:
    """A model that was written, and its reference, as objects."""

    def __init__(self, model: Model) -> None:
        pyro.set_rng_seed(model.seed % 2**32)
        data: dict[str, Any] = {}
        exec(compile(data_source(model), "<data>", "exec"), data)
        names = ["x", "y", *model.columns]
        self.rows = {name: data[name] for name in names}
        self._fixed = {"scale": data["scale"]} if model.option else {}
        reference = dict(data)
        exec(compile(reference_source(model), "<reference>", "exec"), reference)
        self.reference = reference["model"]
        exec(compile(model_source(model), "<model>", "exec"), data)
        self.model, self.args, self.kwargs, self.settings = (
            data[name] for name in ("model", "args", "kwargs", "settings")
        )
        self._takes_dict = model.signature == "dict" and model.style not in ("loader", "list")

    @property
    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the model, on all rows."""
        return ((dict(self.rows),), self._fixed) if self._takes_dict else ((), {**self.rows, **self._fixed})

    def gradient(
        self, model: Any, values: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """The gradient of U on all data by plain Pyro, at unconstrained ``values``; None where its latents are others.

        :param rows: indices of plates that subsample.
        """
        args, kwargs = self.call
        with pyro.validation_enabled(False):
            free = poutine.trace(poutine.condition(model, dict(rows))).get_trace(*args, **kwargs)
        fns = {name: free.nodes[name]["fn"] for name in _latents(free)}
        shapes = {n: biject_to(fn.support).inverse_shape(free.nodes[n]["value"].shape) for n, fn in fns.items()}
        if shapes != {name: value.shape for name, value in values.items()}:
            return None
        leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
        transforms = {name: biject_to(fn.support) for name, fn in fns.items()}
        constrained = {name: transforms[name](leaf) for name, leaf in leaves.items()}
        with pyro.validation_enabled(False):
            conditioned = poutine.condition(model, {**constrained, **rows})
            trace = poutine.trace(conditioned).get_trace(*args, **kwargs)
            if _latents(trace):
                return None
            jacobian = sum(transforms[n].log_abs_det_jacobian(leaves[n], constrained[n]).sum() for n in leaves)
            energy = -(trace.log_prob_sum() + jacobian)
        found = torch.autograd.grad(energy, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))


def _latents(trace: poutine.Trace) -> list[str]:
    """Names of the sites that a run drew, apart from the indices of plates."""
    return [name for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name])]


def points(sizes: int, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Two points of the unconstrained space, near its origin and farther from it."""
    numbers = np.random.default_rng([seed, 1])
    return [torch.as_tensor(scale * numbers.normal(size=sizes)).to(dtype) for scale in (0.3, 0.8)]


def epoch(potential: Potential) -> list[tuple[tuple[Tensor, ...], float]]:
    """Batches of one epoch, and their weights."""
    source = potential.source
    if source.is_full:
        return [(source.draw(), 1.0)]
    if len(source.plates) < 2:
        return list(source.cover())
    batches = every_batch(source.plates)
    return [(batch, 1 / len(batches)) for batch in batches]


def every_batch(plates: Mapping[str, tuple[int, int]]) -> list[tuple[Tensor, ...]]:
    """Indices of plates that subsample; each row of a plate occurs equally often with each of the others."""
    by_plate = [
        [torch.arange(first, first + batch) % size for first in range(0, math.lcm(size, batch), batch)]
        for size, batch in plates.values()
    ]
    return list(itertools.product(*by_plate))


def mean_gradient(potential: Potential, theta: Tensor) -> Tensor:
    """The gradient of U, averaged over an epoch."""
    parts = [weight * potential.gradient(theta, inputs)[0] for inputs, weight in epoch(potential)]
    return torch.stack(parts).sum(0)


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor] | None) -> float:
    """The largest relative difference of a latent's gradient; infinite where the latents are others."""
    if wanted is None or set(found) != set(wanted):
        return float("inf")
    whole = float(torch.cat([g.reshape(-1) for g in wanted.values()]).norm())
    parts = []
    for name, gradient in wanted.items():
        error = float((found[name].reshape(-1) - gradient.reshape(-1)).norm())
        parts.append(error / max(float(gradient.norm()), _SMALL * whole, 1e-12))
    return max(parts) if all(part == part for part in parts) else float("inf")


def try_model(model: Model) -> Result:
    """Builds the potential of a model, and compares it with plain Pyro."""
    with untouched():
        case = Case(model)
        try:
            potential, _ = build_potential(case.model, case.args, case.kwargs, **case.settings, capture=False)
            theta = points(potential.layout.size, model.seed, getattr(torch, model.dtype))
            worst = max(_error(case, potential, point) for point in theta)
        except REFUSALS as error:
            return _refused(model, case, error)
        except Exception as error:
            return Result(model, "other error", f"{type(error).__name__}: {error}")
    if worst <= TOLERANCE:
        return Result(model, "harmless fault" if model.fault else "right", f"{worst:.1e}")
    if model.dtype == "float32":  # rounding, if it is gone in double precision
        return replace(try_model(replace(model, dtype="float64")), model=model)
    return Result(model, "silent difference", f"{worst:.1e}")


def _error(case: Case, potential: Potential, theta: Tensor) -> float:
    wanted = case.gradient(case.reference, potential.layout.split(theta), {})
    return difference(potential.layout.split(mean_gradient(potential, theta)), wanted)


def _refused(model: Model, case: Case, error: Exception) -> Result:
    message = f"{type(error).__name__}: {error}"
    if len(str(error)) >= 1000 or not str(error):
        return Result(model, "other error", f"a message of {len(str(error))} characters: {message[:300]}")
    if _must_run(model, case):
        return Result(model, "false refusal", message)
    return Result(model, "refused rightly", message)


def _must_run(model: Model, case: Case) -> bool:
    """Whether a refusal is false: of a model without a fault, or with one that makes no difference in plain Pyro.

    The latter is seen in full batches and over an epoch of a plate.
    """
    if model.may_be_refused:
        return False
    if model.fault is None:
        return True
    if model.style not in ("full", "plate") or model.fault.kind == 4 or model.style in model.fault.tolerated:
        return False
    plates = {"data": (model.num_data, model.batch_size)} if model.style == "plate" else {}
    if model.plate == "two plates, both subsample":
        plates["outs"] = (3, 2)
    args, kwargs = case.call
    with pyro.validation_enabled(False):
        trace = poutine.trace(case.reference).get_trace(*args, **kwargs)
    latents = {name: trace.nodes[name] for name in _latents(trace)}
    values = {name: biject_to(site["fn"].support).inv(site["value"]) for name, site in latents.items()}
    tolerance = 1e-9 if model.dtype == "float64" else 1e-5
    # Around a draw of the prior, and around the origin: where a draw is extreme, a likelihood may have no gradient.
    around = ((1.0, 0.0), (1.0, 0.5), (1.0, 1.5), (0.0, 0.3), (0.0, 0.8))
    for share, scale in around * (_NUM_ORDERS if plates else 1):  # few orders may show no difference by chance
        order = {name: torch.randperm(size) for name, (size, _) in plates.items()}
        batches = [
            {name: order[name][rows] for name, rows in zip(plates, batch, strict=True)} for batch in every_batch(plates)
        ]
        point = {name: share * value + scale * torch.randn_like(value) for name, value in values.items()}
        try:
            wanted = case.gradient(case.reference, point, {})
            parts = [case.gradient(case.model, point, rows) for rows in batches]
        except Exception:  # a fault that plain Pyro cannot run, either
            return False
        if any(part is None for part in parts):
            return False
        mean = {n: torch.stack([p[n] for p in parts]).mean(0) for n in point}  # type: ignore[index]
        if difference(mean, wanted) >= tolerance:
            return False
    return True


# ---- Many models


def fuzz(num_models: int, seed: int, *, progress: bool = False) -> list[Result]:
    """The results of models ``seed``, ``seed + 1``, ..."""
    results = []
    for i in range(num_models):
        results.append(try_model(draw(seed + i)))
        if progress and (i + 1) % 1000 == 0:
            print(f"{i + 1:,} models", file=sys.stderr)
    return results


def table(results: Sequence[Result]) -> str:
    """Counts of outcomes by kind of fault."""
    outcomes = ["right", "harmless fault", "refused rightly", *FAILURES]
    counts = collections.Counter((result.kind, result.outcome) for result in results)
    kinds = sorted({result.kind for result in results}, key=lambda kind: (kind != "no fault", kind))
    rows = [[kind, *(f"{counts[kind, outcome]:,}" for outcome in outcomes)] for kind in kinds]
    return markdown_table(["planted", *outcomes], rows)


def causes(results: Sequence[Result]) -> str:
    """Failures by outcome, fault and message: how many, and a seed for each style of batches."""
    groups: dict[tuple[str, ...], dict[str, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for result in results:
        if result.outcome in FAILURES:
            model = result.model
            message = "" if result.outcome == "silent difference" else _without_numbers(result.detail)[:100]
            fault = f"kind {model.fault.kind}: {model.fault.name}" if model.fault else "no fault"
            groups[result.outcome, fault, message][model.style].append(model.seed)
    lines = []
    for group, by_style in sorted(groups.items(), key=lambda item: (item[0][0], -sum(map(len, item[1].values())))):
        seeds = ", ".join(f"{style} {len(found)} ({found[0]})" for style, found in sorted(by_style.items()))
        lines.append(f"{sum(map(len, by_style.values())):5}  {' | '.join(filter(None, group))} | {seeds}")
    return "\n".join(lines)


def _without_numbers(message: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "#", " ".join(message.split()))


def show(seed: int) -> None:
    """Prints a model's code, its reference and its outcome."""
    model = draw(seed)
    fault = f"kind {model.fault.kind}, {model.fault.name}" if model.fault else "none"
    print(f"# seed {seed}; fault: {fault}; batches: {model.style}\n{data_source(model)}\n{model_source(model)}")
    print(f"# The density that is meant, on all data:\n{reference_source(model)}")
    result = try_model(model)
    print(f"# {result.outcome}: {result.detail}")


def main() -> None:
    """10,000 models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, metavar="SEED")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.show is not None:
        show(options.show)
        return
    start = time.perf_counter()
    results = fuzz(options.models, options.seed, progress=True)
    print(table(results))
    print(f"{time.perf_counter() - start:.0f} s")
    failed = [result for result in results if result.outcome in FAILURES]
    print(causes(failed))
    write_json("model_fuzz", dict(collections.Counter(f"{r.kind}: {r.outcome}" for r in results)))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
