# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Offline adversarial posterior distillation: a generator from the stored draws of a chain (paper, Algorithm 1)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_apd.distillation.critic import GAMES
from pyro_apd.distillation.effort import Effort, Work, choose_generator, choose_rank
from pyro_apd.distillation.failure import DistillationError, DistillationWarning, find_failures
from pyro_apd.distillation.objective import (
    AdversarialObjective,
    FunctionJudge,
    FunctionObjective,
    FunctionSpace,
    Judge,
    Objective,
    WeightJudge,
)
from pyro_apd.distillation.probes import Probes, RowArguments
from pyro_apd.distillation.source import HELD_OUT, Source, read_source, split_held_out
from pyro_apd.distillation.training import Schedule, Training, train
from pyro_apd.generators import GENERATORS, ChunkedGenerator, CoordinateGenerator, Generator, PaperGenerator
from pyro_apd.generators.chunked import CoordinatesAlone
from pyro_apd.generators.draw_blocks import DrawBlocks
from pyro_apd.generators.precision import check_dtype
from pyro_apd.generators.residual import Block
from pyro_apd.models.bnn import BNN
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.predictive import FunctionView, outputs
from pyro_apd.runtime.global_state import preserved_param_store, seeded
from pyro_apd.runtime.hashing import fingerprint
from pyro_apd.runtime.ranks import Ranks

logger = logging.getLogger("pyro_apd")

# A model that insists on its data as they are is still compared in function space, up to this many rows.
_MAX_WHOLE_ROWS = 512
# Draws that a critic compares a step.
_BATCH = 100
# Adam's for both players of the paper's games.
_PAPER_RATE = 1e-4
# Successive draws that make a mode.
_STRETCH = 12
# Noise is turned down by so much at a time, and so often at most.
_QUIETER, _MAX_QUIETER = 0.7, 10
# Of a training with fewer steps it is turned down first, and of any of a large network's.
_SHORT = 100
# Directions a matrix of weights in which noise is damped, up to half of its columns; narrow matrices have no noise, and
# nor have those so wide that their directions would be dear to find.
_NOISE_RANK = 32
_NOISY_COLUMNS = range(16, 4097)


def distill(
    source: Any,
    model: Callable[..., Any] | None = None,
    *,
    data: Sequence[Any] | None = None,
    num_steps: int | None = None,
    seed: int | None = None,
    generator: str | None = None,
    objective: str | None = None,
    rank: int | None = None,
    storage_dtype: str | None = None,
    probe_inputs: Sequence[Any] | None = None,
    group_by_chain: bool = False,
    strict: bool = False,
    progress: bool = True,
) -> DistilledPosterior:
    """Distils draws of a chain into a generator.

    ``generator="coordinates"`` starts at the Gaussian fit of each stretch of each chain in the principal coordinates of
    all draws, with noise for what these leave out. Where model and data are known, stretches and noise are then trained
    to make the energy distance between generator and chain small in function space, at inputs near the data and far
    from them. Where they are not, the logger ``pyro_apd`` says so, and stretches are trained against a learned critic
    (WGAN-GP), without noise.
    ``generator="chunked"`` is the same for large networks: the basis of the coordinates is held in ``int8``, with a
    scale a layer, and decoded a part at a time, and a latent does not grow with the network. Draws are read in parts in
    either case; memory is that of the basis and of a few networks, however many draws there are.
    ``generator="paper"`` is offline APD as published (Wang et al., ICML 2018): a perceptron to raw weights, trained by
    WGAN-GP; the paper takes 100,000 steps.

    A fifth of each chain is held out, five draws of every 25. The state that ships is that of the smallest distance
    to it.

    :param source: an ``MCMC`` after ``run``; or draws by site, ``(S, ...)``, with ``group_by_chain`` ``(C, S, ...)``.
    :param callable model: the Pyro model; by default that of the ``MCMC``'s kernel.
    :param tuple data: arguments of the model, with or without targets; by default those of the run.
    :param int num_steps: generator steps; by default 500, for ``"paper"`` 2,000. Networks of more than a million
        weights, or of as many products an input, get fewer, down to 50. 0 gives the start.
    :param int seed: makes the posterior, and its file, reproducible; the global generator stays as it was.
    :param str generator: ``"coordinates"``, ``"chunked"`` or ``"paper"``; by default the first, and the second for a
        million weights and more, unless draws or ``storage_dtype`` have more digits than it keeps.
    :param str objective: with ``generator="paper"``, the game that it is trained by: ``"wgan-gp"`` (default),
        ``"wgan"``, ``"lsgan"`` or ``"non-saturating"``, each as published.
    :param int rank: principal coordinates, each of which costs as much as a network at ``storage_dtype``. By default 40
        for one chain and 4 more for each other, up to 64 and a quarter of the draws; ``"chunked"`` up to 44 and half
        of the draws.
    :param str storage_dtype: precision of the posterior, and of the file that
        :meth:`~pyro_apd.DistilledPosterior.save` writes; by default ``"int8"``, a quarter of the bytes of a network in
        ``float32`` a coordinate; for ``"paper"``, and for draws of more digits, as the draws are. A chunked basis is
        in ``int8`` whatever it says.
    :param tuple probe_inputs: arguments of the model at whose rows functions are compared, instead of variations on
        ``data``.
    :param bool group_by_chain: whether a dict has a leading dimension for chains.
    :param bool strict: raise instead of warn if the generator collapsed, diverged or was interrupted.
    :param bool progress: show a progress bar.
    :raises TypeError: if ``source`` is neither, or ``data`` is not a tuple.
    :raises ValueError: if draws are too few, malformed or not the model's, or an argument is out of range.
    :raises DistillationError: with ``strict=True``, where :class:`DistillationWarning` would have been issued.
    """
    wishes = Wishes(generator, objective, num_steps, rank, storage_dtype, seed)
    draws = read_source(source, model, data, group_by_chain)
    posterior, training = distill_draws(draws, wishes, probe_inputs, progress)
    report(training, strict)
    return posterior


def distill_draws(
    draws: Source, wishes: Wishes, probe_inputs: Sequence[Any] | None, progress: bool, ranks: Ranks | None = None
) -> tuple[DistilledPosterior, Training]:
    """:func:`distill` once the draws are read, with parameters as there; :func:`report` is the caller's to call.

    :param Ranks ranks: processes that train together, with the same draws and seed; each gets the same posterior.
    """
    seed = int(torch.randint(2**31, ())) if wishes.seed is None else wishes.seed
    with seeded(seed, draws.theta_CSD.device), preserved_param_store():
        posterior, training = _distil(draws, wishes, probe_inputs, progress, ranks or Ranks())
    posterior.metadata["seed"] = seed
    # What is at hand draws what a file of it will.
    is_narrow = wishes.generator != "paper" and draws.theta_CSD.dtype == torch.float32
    posterior = posterior.rounded(wishes.storage_dtype or ("int8" if is_narrow else "float32"))
    _remember(posterior, draws)
    return posterior, training


def _remember(posterior: DistilledPosterior, draws: Source) -> None:
    """Notes which data the draws are of, and the network, where these can be had."""
    data = [value for value in draws.args or () if isinstance(value, Tensor)]
    if data and draws.has_all_data:
        posterior.metadata["data"] = fingerprint(*data)
    if isinstance(draws.model, BNN):
        posterior.bind(draws.model)


@dataclass(frozen=True)
class Wishes:
    """What :func:`distill` was asked for; None for the defaults. A round of several takes a share of the steps.

    :raises ValueError: naming what is out of range or has no meaning.
    """

    generator: str | None = None
    objective: str | None = None
    num_steps: int | None = None
    rank: int | None = None
    storage_dtype: str | None = None
    seed: int | None = None
    share_of_steps: int = 1

    def __post_init__(self) -> None:
        if self.storage_dtype is not None:
            check_dtype(self.storage_dtype, "storage_dtype")
        if self.generator is not None and self.generator not in GENERATORS:
            raise ValueError(
                f"generator={self.generator!r} is not known; choose one of {sorted(GENERATORS)}, or None, which "
                "chooses by size."
            )
        for name, value, smallest in (("num_steps", self.num_steps, 0), ("seed", self.seed, 0), ("rank", self.rank, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < smallest):
                raise ValueError(
                    f"{name}={value!r} must be an integer of at least {smallest}, or None for the default."
                )
        if self.generator == "paper" and self.rank is not None:
            raise ValueError(
                f"rank={self.rank} has no meaning for generator='paper', which has no coordinates; leave it out."
            )
        if self.objective is not None and (self.generator != "paper" or self.objective not in GAMES):
            raise ValueError(
                f"objective={self.objective!r} with generator={self.generator or 'coordinates'!r}: accepted are "
                f"{sorted(GAMES)} with generator='paper'; the other generators' objective follows from what is known "
                "of the model."
            )

    def steps(self, default: int) -> int:
        """Generator steps to take, where ``default`` is what nobody asked otherwise for."""
        return (default if self.num_steps is None else self.num_steps) // self.share_of_steps


@dataclass(frozen=True)
class _Task:
    """What a generator is fitted to and judged by, and how much."""

    layout: Layout
    draws: DrawBlocks
    held_out: Iterator[Tensor]
    functions: tuple[FunctionSpace, Probes] | None
    effort: Effort
    work: Work
    ranks: Ranks

    def share(self, count: int) -> int:
        """What each process takes of a step's work."""
        return -(-count // self.ranks.size)


def _distil(
    draws: Source, wishes: Wishes, probe_inputs: Sequence[Any] | None, progress: bool, ranks: Ranks
) -> tuple[DistilledPosterior, Training]:
    """:func:`distill` once its arguments are in order, by torch's global random numbers."""
    num_chains, num_draws, _ = draws.theta_CSD.shape
    train_index, held_out_index = split_held_out(num_draws)
    train_draws = DrawBlocks(draws.theta_CSD, train_index)
    held_out = DrawBlocks(draws.theta_CSD, held_out_index)
    functions = function_space(draws, probe_inputs)
    work = _work(draws, functions)
    effort = Effort.of(draws.layout.size, work.num_products)
    task = _Task(draws.layout, train_draws, _thinned(held_out, effort.num_judged), functions, effort, work, ranks)
    prepared = _prepare_paper(task, wishes) if wishes.generator == "paper" else _prepare_coordinates(task, wishes)
    training = train(
        prepared.trained or prepared.generator,
        prepared.objective,
        prepared.judge,
        prepared.schedule,
        progress=progress,
        ranks=ranks,
    )
    metadata = {
        "num_chains": num_chains,
        "num_draws": num_draws,
        "held_out": HELD_OUT if len(held_out_index) < num_draws else None,
        "space": "weights" if functions is None else "functions",
        "num_steps": prepared.schedule.num_steps,
        "best_step": training.best_step,
        "figures": {name: float(f"{value:.4g}") for name, value in training.figures.items()},
    }
    shipped = prepared.generator.requires_grad_(False).eval()
    return DistilledPosterior(draws.layout, shipped, metadata=metadata, training_log=training.log), training


@dataclass
class _Prepared:
    """A generator with everything that training it takes; ``trained`` is what shares its parameters in its place."""

    generator: Generator
    objective: Objective
    judge: Judge
    schedule: Schedule
    trained: Generator | None = None


def _prepare_coordinates(task: _Task, wishes: Wishes) -> _Prepared:
    """Starts at the Gaussian fit; trains coordinates and noise where functions are known, else coordinates."""
    effort = task.effort
    generator = _fit(task, wishes)
    # Steps by a batch of draws cannot better what all draws say of so many numbers; they would only add noise to them.
    for name, parameter in generator.named_parameters():
        parameter.requires_grad_(name not in ("basis", "location"))
    num_steps = wishes.steps(effort.num_steps)
    if task.functions is not None:
        num_probes = task.share(effort.num_probes)
        objective = FunctionObjective(
            *task.functions,
            task.draws,
            effort.batch_size,
            num_probes,
            result_bytes=num_probes * task.work.num_bytes,
        )
        if num_steps and (num_steps < _SHORT or isinstance(generator, ChunkedGenerator)):
            _quieten(generator, objective)
        return _Prepared(
            generator,
            objective,
            FunctionJudge(*task.functions, task.held_out, effort.num_probes),
            _schedule(effort, num_steps, 3e-3, coherent=0.6),
        )
    if isinstance(generator, ChunkedGenerator):
        # Draws without noise are their coordinates: nothing as long as a draw is made.
        held_out = [generator.projected(part_ND) for part_ND in task.held_out]
        return _Prepared(
            generator,
            AdversarialObjective(
                _identity,
                task.draws.map(generator.projected),
                1e-3,
                batch_size=task.share(_BATCH),
                ranks=task.ranks,
            ),
            WeightJudge(_identity, held_out),
            _schedule(effort, num_steps, 1e-3),
            trained=CoordinatesAlone(generator),
        )
    location_D, dual_DR = generator.location.detach(), torch.linalg.pinv(generator.basis.detach())

    def coordinates(theta_SD: Tensor) -> Tensor:
        coordinates_SR: Tensor = (theta_SD - location_D) @ dual_DR
        return coordinates_SR

    return _Prepared(
        generator,
        AdversarialObjective(
            coordinates, task.draws.map(coordinates), 1e-3, batch_size=task.share(_BATCH), ranks=task.ranks
        ),
        WeightJudge(coordinates, task.held_out),
        _schedule(effort, num_steps, 1e-3),
    )


def _fit(task: _Task, wishes: Wishes) -> CoordinateGenerator | ChunkedGenerator:
    """The start of the generator asked for, or of that which suits the size of the network."""
    num_chains, num_draws, size = task.draws.shape
    kind = wishes.generator or choose_generator(size, task.draws.dtype, wishes.storage_dtype)
    rank = choose_rank(kind, num_chains, num_draws) if wishes.rank is None else wishes.rank
    noise = () if task.functions is None else _noise_blocks(task.layout)
    if kind == "chunked":
        sizes = [site.size for site in task.layout if site.size]
        return ChunkedGenerator.fit(task.draws, rank, _STRETCH, noise, sizes=sizes)
    generator = CoordinateGenerator.fit(task.draws, rank, _STRETCH, noise)
    generator.fold()
    return generator


@torch.no_grad()
def _quieten(generator: CoordinateGenerator | ChunkedGenerator, objective: FunctionObjective) -> None:
    """Turns the noise down while that brings draws nearer to the chain's, as functions.

    Of few draws, few coordinates are kept, and what they leave out moves together; as noise of every weight by itself
    it comes out too loud. A training of few steps, or of a large network, does not come to undo that.
    """
    like = generator.location.new_zeros(())
    seed = int(torch.randint(2**31, ()))

    def value() -> float:
        with seeded(seed, like.device):
            return float(objective.value(lambda count: generator(generator.latents(count, like))))

    smallest = value()
    for _ in range(_MAX_QUIETER):
        generator.scale_noise(_QUIETER)
        quieter = value()
        if not quieter < smallest:
            generator.scale_noise(1 / _QUIETER)
            break
        smallest = quieter


def _schedule(effort: Effort, num_steps: int, learning_rate: float, **options: Any) -> Schedule:
    return replace(
        Schedule(num_steps, learning_rate, **options),
        num_evaluations=effort.num_evaluations,
        num_judged=effort.num_judged,
    )


def _prepare_paper(task: _Task, wishes: Wishes) -> _Prepared:
    """Raw weights, no standardisation, a constant rate, no averaging, as published; only the checkpoint is chosen."""
    game = GAMES[wishes.objective or "wgan-gp"]
    judge: Judge = (
        WeightJudge(_identity, task.held_out)
        if task.functions is None
        else FunctionJudge(*task.functions, task.held_out, task.effort.num_probes)
    )
    return _Prepared(
        PaperGenerator(task.draws.shape[2]).to(task.draws.device, task.draws.dtype),
        AdversarialObjective(_identity, task.draws, _PAPER_RATE, game, task.share(_BATCH), task.ranks),
        judge,
        _schedule(
            task.effort,
            wishes.steps(2000),
            game.learning_rate or _PAPER_RATE,
            is_annealed=False,
        ),
    )


def _noise_blocks(layout: Layout) -> list[Block]:
    """Matrices of weights that are to have noise: all but the last, whose noise nothing would average out."""
    matrices = [site for site in layout if len(site.unconstrained_shape) >= 2]
    blocks = []
    for site in matrices[:-1]:
        rows = site.unconstrained_shape[0]
        columns = site.size // max(rows, 1)
        if columns in _NOISY_COLUMNS:
            blocks.append(Block(site.start, rows, columns, min(_NOISE_RANK, columns // 2)))
    return blocks


def _work(draws: Source, functions: tuple[FunctionSpace, Probes] | None) -> Work:
    """What a prediction for one input takes, where functions are known."""
    if functions is None:
        return Work()
    space, probes = functions
    example_SD = draws.theta_CSD[0, :1]
    with seeded(0, example_SD.device):  # an aside, which leaves the random numbers of the training alone
        inputs = probes.draw(1)
    return Work.of(lambda: space.views(example_SD, inputs))


def function_space(source: Source, probe_inputs: Sequence[Any] | None) -> tuple[FunctionSpace, Probes] | None:
    """How to see draws as functions; None, with the reason in the log, where that cannot be.

    :raises ValueError: if there are ``probe_inputs``, and the model cannot be run on them.
    """
    args = source.args if probe_inputs is None else tuple(probe_inputs)
    if source.model is None or args is None:
        lacking = "model" if source.model is None else "data"
        if probe_inputs is not None:
            raise ValueError("`probe_inputs` need a model to be given to; pass `model=` as well.")
        logger.info("No %s at hand: distilling in weight space, blind to what the draws predict.", lacking)
        return None
    example_SD = source.theta_CSD[0, :2]
    try:
        rows = RowArguments(source.model, args, source.kwargs if probe_inputs is None else {})
        probes = Probes(rows.rows, as_they_are=probe_inputs is not None)
        return _viewed(rows, source, probes.draw(Effort.num_probes), example_SD), probes
    except Exception as error:
        logger.info("The model cannot be run on a choice of rows (%s).", error)
        reason = error
    if probe_inputs is not None:
        raise ValueError(f"The model cannot be run on `probe_inputs`: {reason}") from reason
    try:
        whole = _WholeData(source.model, args, source.kwargs)
        space = _viewed(whole, source, (), example_SD)
        if space.views(example_SD, ())[0].shape[0] <= _MAX_WHOLE_ROWS:
            return space, whole
        reason = ValueError(f"more than {_MAX_WHOLE_ROWS} rows, which cannot be thinned")
    except Exception as error:
        reason = error
    logger.info("Distilling in weight space, blind to what the draws predict: %s.", reason)
    return None


class _WholeData(Probes):
    """The data as they are, for a model that takes them no other way."""

    def __init__(self, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._call = (model, tuple(args), dict(kwargs))

    def __call__(self) -> Any:
        model, args, kwargs = self._call
        return model(*args, **kwargs)

    def draw(self, count: int) -> tuple[Tensor, ...]:
        """No inputs: the model has them."""
        return ()


def _viewed(model: Callable[..., Any], source: Source, inputs: tuple[Tensor, ...], example_SD: Tensor) -> FunctionSpace:
    """The function space of a model, after a trial run with gradients."""
    draws = source.layout.constrain(example_SD)
    kind = outputs(model, draws, *inputs).kind
    space = FunctionSpace(FunctionView(model, draws, *inputs), source.layout, kind)
    values = space.views(example_SD.clone().requires_grad_(), inputs)[0]
    if not values.requires_grad or not bool(values.isfinite().all()):
        raise ValueError("function values are not finite, or not differentiable")
    return space


def report(training: Training, strict: bool) -> None:
    """Warns the caller's caller, or raises, if the generator did not come out well."""
    failures = find_failures(training.figures)
    if not training.figures:
        failures.append("no state of the generator had finite figures")
    if training.stopped is not None:
        failures.insert(0, f"{training.stopped}; this is the best state before, of step {training.best_step}")
    if not failures:
        return
    figures = ", ".join(f"{name} {value:.3g}" for name, value in sorted(training.figures.items()))
    message = (
        f"Distillation went wrong: {'; '.join(failures)}. Figures on held-out draws: {figures or 'none'}. Give it more "
        "draws, more steps (num_steps) or more coordinates (rank), or compare with pyro_apd.diagnostics.compare first."
    )
    if strict:
        raise DistillationError(message)
    warnings.warn(message, DistillationWarning, stacklevel=3)


def _thinned(draws: DrawBlocks, count: int) -> Iterator[Tensor]:
    """At most ``count`` rows, evenly spaced, some at a time."""
    return draws.rows(step=-(-len(draws) // count))


def _identity(theta_SD: Tensor) -> Tensor:
    return theta_SD
