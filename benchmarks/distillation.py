# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What each way to store a posterior loses, by bytes.

``python -m benchmarks.distillation [--data NAME ...] [--quick]``

Names are those of :data:`benchmarks.distillation_cases.CASES`, ``uci`` and ``all``. Chains are sampled once and cached
(see :mod:`benchmarks.distillation_cases`). Every method is fitted to the same draws and compared with the same number
of draws that were held out from all methods. Other draws of the chain are compared in the same way; their difference is
the resolution of the comparison. Where sets of so many draws differ much, figures are means over several sets. Results
are stored one by one, by seed and method, with date and commit (see :mod:`benchmarks.distillation_records`): a run of
some methods leaves the others as they are. What is stored is computed again only with ``--again``. Seconds are CPU
seconds of the process. All results that are stored make one figure, ``results/distillation_frontier.png``.

``--rows validation`` compares on rows that are neither for training nor for testing, and without the
out-of-distribution sets. Settings are to be chosen by these.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import RESULTS
from benchmarks.distillation_cases import CASES, Case, Problem, split
from benchmarks.distillation_figure import frontier
from benchmarks.distillation_methods import (
    Material,
    Method,
    default,
    draws_at_a_time,
    flow_matching,
    low_rank,
    mean_field,
    ours,
    paper,
    stored,
    swag,
    timed,
)
from benchmarks.distillation_records import Records
from benchmarks.distillation_tables import brief, summary, table
from benchmarks.distillation_targets import at_equal_bytes, targets
from benchmarks.memory import peak_anonymous
from pyro_apd.diagnostics.comparison.evaluation import Evaluation, Inputs, evaluate, similarities
from pyro_apd.models.layout import Layout
from pyro_apd.predictive.predictive import outputs

NUM_DRAWS = 100
# Weights that are compared one by one, and draws with draws by them.
MAX_WEIGHTS = 1_000_000
# Names for several cases.
SEVERAL = {"uci": ("concrete", "yacht"), "all": tuple(CASES)}
METHODS: dict[str, Method] = {
    "generator": ours,
    "stored, thinned": stored("float32"),
    "stored, herded": stored("float32", "herded"),
    "int8, thinned": stored("int8"),
    "int8, herded": stored("int8", "herded"),
    "int4, error feedback": stored("int4"),
    "int3, error feedback": stored("int3"),
    "int2, error feedback": stored("int2"),
    "low rank + diagonal": low_rank,
    "SWAG": swag,
    "flow matching": flow_matching,
}
# Methods of one size only.
FIXED: dict[str, Method] = {
    "default": default,
    "mean field": mean_field,
    **{f"paper, {name}": paper(name, 300) for name in ("wgan-gp", "wgan", "lsgan", "non-saturating")},
}


def predictions(problem: Problem, layout: Layout, blocks: Iterable[Tensor], rows: str) -> Evaluation:
    """Predictions of draws, a block ``(S, D)`` at a time, on the rows to compare on, and out of distribution."""
    parts = [_of_block(problem, layout, theta_SD, rows) for theta_SD in blocks]
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        theta_SD=torch.cat([part.theta_SD for part in parts]),
        values={name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
        log_prob_SN=torch.cat([part.log_prob_SN for part in parts if part.log_prob_SN is not None]),
    )


def _of_block(problem: Problem, layout: Layout, theta_SD: Tensor, rows: str) -> Evaluation:
    x, y = problem.test if rows == "test" else problem.validation or problem.train
    ood = problem.ood if rows == "test" else {}
    draws = layout.constrain(theta_SD)
    sets = {name: (value, None) for name, value in ood.items()}
    if y.is_floating_point():
        return evaluate(problem.model, draws, layout.names, Inputs((x, None), {}, (x, y), y, sets))
    values = {"": outputs(problem.model, draws, x).probs_SNK}
    values |= {name: outputs(problem.model, draws, value).probs_SNK for name, value in ood.items()}
    log_prob_SN = values[""].gather(-1, y.expand(len(theta_SD), -1).unsqueeze(-1)).squeeze(-1).log()
    return Evaluation(some_weights(theta_SD), "classes", values, log_prob_SN, y)


def some_weights(theta_SD: Tensor) -> Tensor:
    """The weights of draws that are compared one by one: of large networks some, evenly spaced."""
    return theta_SD[:, :: -(-theta_SD.shape[1] // MAX_WEIGHTS)].contiguous()


def compared(reference: Evaluation, other: Evaluation) -> dict[str, float]:
    """All metrics of a set of draws, and those relative to the reference."""
    return {**other.metrics(), **similarities(reference, other)}


def novelty(train_ND: Tensor, held_ND: Tensor, theta_SD: Tensor) -> dict[str, float]:
    """Whether draws are new, in units of each weight's standard deviation.

    ``nearest``: distance of a draw to the nearest training draw, relative to held-out draws (medians); 0 is a
    copy. ``support``: estimated number of distinct draws, by the birthday paradox (Arora, Risteski & Zhang 2018): pairs
    divided by pairs closer than a third of the usual distance; the number of pairs if there are none of these.
    """
    mean_D, sd_D = train_ND.mean(0), train_ND.std(0).clamp_min(1e-12)
    train_ND, held_ND, theta_SD = ((value - mean_D) / sd_D for value in (train_ND, held_ND[:NUM_DRAWS], theta_SD))
    usual = torch.cdist(held_ND, train_ND).amin(1).median()
    apart_SS = torch.cdist(theta_SD, theta_SD)
    num_same = int((apart_SS.triu(1) + torch.ones_like(apart_SS).tril() * 1e9 < usual / 3).sum())
    num_pairs = len(theta_SD) * (len(theta_SD) - 1) // 2
    return {
        "nearest": float(torch.cdist(theta_SD, train_ND).amin(1).median() / usual),
        "support": num_pairs / max(1, num_same) if len(theta_SD) == NUM_DRAWS else float(len(theta_SD)),
    }


def run_seed(case: Case, seed: int, options: argparse.Namespace, records: Records) -> None:
    """Fits and compares what is missing for a case and seed; adds each result to the records."""
    problem = case.build(seed)
    store = case.sample(problem, seed, options.quick)
    train_CTD, held_CHD = split(store.theta_CSD, case.folder(seed, options.quick))
    held_ND = held_CHD.transpose(0, 1).flatten(0, 1)
    # As many draws of each: mutual information grows with their number.
    num_draws = min(NUM_DRAWS, len(held_ND))
    reference = predictions(problem, store.layout, _spaced(held_ND, num_draws), options.rows)
    material = Material(problem, store.layout, train_CTD.contiguous(), seed)
    fitted_ND, num_sets = material.interleaved(), case.num_sets
    sets = [_spaced(fitted_ND[k::num_sets], num_draws) for k in range(num_sets)]
    others = [compared(reference, predictions(problem, store.layout, blocks, options.rows)) for blocks in sets]
    some_train_ND, some_held_ND = some_weights(fitted_ND), some_weights(held_ND)
    records.add(seed, "held-out SGLD", compared(reference, reference))
    records.add(seed, "other draws", _mean(others))
    wanted = [(f"{name}, {k:g}", method, k) for name, method in METHODS.items() for k in case.networks]
    wanted += [(name, method, 0.0) for name, method in FIXED.items()]
    for label, method, networks in wanted:
        is_wanted = not options.methods or label.startswith(tuple(options.methods))
        is_stored = label in records.of(seed) and not options.again
        if is_stored or not is_wanted or label.startswith(case.without):
            continue
        before = _reset_peak()
        with peak_anonymous() as anonymous:
            fitted, seconds = timed(method, material, networks)
        beyond = _memory("VmHWM") - before
        if fitted is None:
            continue
        torch.manual_seed(1000 + seed)
        figures: list[dict[str, float]] = []
        for _ in range(num_sets if fitted.is_endless else 1):
            drawn: list[Tensor] = []
            found = predictions(problem, store.layout, _noted(fitted.blocks(num_draws), drawn), options.rows)
            figures.append(compared(reference, found) | novelty(some_train_ND, some_held_ND, torch.cat(drawn)))
        sizes = {"networks": fitted.num_bytes / (4 * material.size), "bytes": fitted.num_bytes}
        records.add(seed, label, {**sizes, "seconds": seconds, "peak_bytes": beyond, **anonymous, **_mean(figures)})
        stored = records.of(seed)
        print(f"{case.name} seed {seed} {label}: {seconds:.1f} s, {brief(stored[label], stored)}", flush=True)


def _mean(sets: list[dict[str, float]]) -> dict[str, float]:
    """Of figures by name."""
    return {name: sum(figures[name] for figures in sets) / len(sets) for name in sets[0]}


def _memory(name: str) -> int:
    """Resident bytes, now (``VmRSS``) or at most (``VmHWM``); 0 if the system does not report it."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _reset_peak() -> int:
    """Resets the peak; returns the resident bytes now."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")
    return _memory("VmRSS")


def _spaced(draws_ND: Tensor, count: int) -> Iterator[Tensor]:
    """So many draws, evenly spaced, in blocks."""
    count = min(count, len(draws_ND))
    for index_N in torch.linspace(0, len(draws_ND) - 1, count).round().long().split(draws_at_a_time(draws_ND.shape[1])):
        yield draws_ND[index_N]


def _noted(blocks: Iterable[Tensor], seen: list[Tensor]) -> Iterator[Tensor]:
    """Blocks of draws, of which some weights are appended to ``seen``."""
    for theta_SD in blocks:
        seen.append(some_weights(theta_SD))
        yield theta_SD


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=[*CASES, *SEVERAL], default=["digits"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="only methods whose names begin with this")
    parser.add_argument("--rows", choices=["test", "validation"], default="test")
    parser.add_argument("--again", action="store_true", help="also run what is already stored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="short chains, one seed, nothing stored: checks that it runs"
    )
    return parser.parse_args()


def main() -> None:
    """Prints a table per case."""
    options = parse()
    torch.set_num_threads(options.threads)
    names = list(dict.fromkeys(name for choice in options.data for name in SEVERAL.get(choice, (choice,))))
    for name in names:
        case, path = CASES[name], RESULTS / f"distillation_{name}.json"
        is_stored = options.rows == "test" and not options.quick
        records = Records(path if is_stored else None)
        for seed in options.seeds[:1] if options.quick else options.seeds:
            run_seed(case, seed, options, records)
        known = records.by_seed
        print(table(case, known), flush=True)
        print(summary(case, known), flush=True)
        print(targets(case, known), flush=True)
        print(at_equal_bytes(case, known), flush=True)
    if not options.quick and options.rows == "test":
        frontier(RESULTS)


if __name__ == "__main__":
    main()
