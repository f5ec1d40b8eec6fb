# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Attacks on what a posterior predicts; the attacks themselves are foolbox's.

**References**

Goodfellow, Shlens and Szegedy, *Explaining and Harnessing Adversarial Examples*, ICLR 2015 (FGSM).
Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, ICLR 2018 (PGD).
Athalye, Carlini and Wagner, *Obfuscated Gradients Give a False Sense of Security*, ICML 2018 (expectation).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.errors import ModelError
from pyro_apd.predictive.draws import PosteriorLike, Values, take_draws
from pyro_apd.predictive.model_check import check_frozen
from pyro_apd.predictive.predictive import FunctionView, outputs
from pyro_apd.runtime.checks import choice, integer, is_number, number
from pyro_apd.runtime.global_state import gradients, preserved_param_store, seeded
from pyro_apd.runtime.seeds import checked_seed
from pyro_apd.runtime.tensor_checks import check_inputs, checked_labels

METHODS = ("fgsm", "fgsm_minimal", "pgd")
THROUGH = ("one", "mean", "expectation")

Bounds = tuple[float, float]

_UNITS = "It is in the units of the inputs."


@dataclass(frozen=True)
class Attack:
    """An attack in the L-infinity norm that wants any other class than the true one.

    ``through`` says what the attacker differentiates: ``"one"`` network, drawn once (the paper's, and weak: it knows
    nothing of the other networks); ``"mean"``, the averaged prediction of ``num_draws`` networks drawn once; or
    ``"expectation"``, the averaged prediction of as many networks *drawn again at each step* (Athalye et al. 2018), the
    adaptive attack on a predictor that draws its networks.

    :ivar str method: ``"pgd"`` (projected gradient), ``"fgsm"`` (one step of ``epsilon``), or ``"fgsm_minimal"`` (one
        step of the least of ``num_steps`` evenly spaced sizes up to ``epsilon`` that changes the attacked prediction).
    :ivar float epsilon: the largest change of any entry of an input, in the units of the inputs.
    :ivar str through: ``"one"``, ``"mean"`` or ``"expectation"``.
    :ivar int num_draws: networks averaged by ``"mean"``, and in each step of ``"expectation"``.
    :ivar int num_steps: steps of PGD; sizes tried by ``"fgsm_minimal"``.
    :ivar float step_size: of PGD, in the units of the inputs; by default 2.5 ``epsilon`` / ``num_steps``.
    :ivar bool random_start: whether PGD starts anywhere within ``epsilon``.
    :raises ValueError: if an argument is out of range.
    """

    method: str = "pgd"
    epsilon: float = math.nan
    through: str = "expectation"
    num_draws: int = 20
    num_steps: int = 40
    step_size: float | None = None
    random_start: bool = True

    def __post_init__(self) -> None:
        choice("method", self.method, METHODS)
        choice("through", self.through, THROUGH)
        integer("num_draws", self.num_draws)
        integer("num_steps", self.num_steps)
        number("epsilon", self.epsilon, above=0, hint=_UNITS)
        if self.step_size is not None:
            number("step_size", self.step_size, above=0, hint=_UNITS)

    @property
    def name(self) -> str:
        """Method and what it goes through, for tables."""
        method = {"fgsm": "FGSM", "fgsm_minimal": "FGSM, minimal", "pgd": "PGD"}[self.method]
        through = {"one": "one network", "mean": "mean", "expectation": "expectation"}[self.through]
        return f"{method}, {through}"


@dataclass(frozen=True)
class Attacked:
    """What an attack made.

    :ivar Tensor x: attacked inputs, shaped as the inputs.
    :ivar Tensor distance_N: largest change of an entry by input, in the units of the inputs.
    :ivar Tensor found_N: for ``"fgsm_minimal"``, whether a size was found; an input is as it was where none was. True
        throughout for others.
    """

    x: Tensor
    distance_N: Tensor
    found_N: Tensor


def attack(
    model: Callable[..., Any],
    posterior: PosteriorLike,
    x: Tensor,
    y: Tensor,
    how: Attack,
    *,
    bounds: Bounds,
    seed: int = 0,
    batch_size: int = 500,
) -> Attacked:
    """Attacks the averaged prediction of a posterior.

    :param callable model: a Pyro model of a classification, called as ``model(x)``.
    :param posterior: draws ``(S, ...)`` by site, or an object with ``get_samples(num_samples)``. Of stored draws, those
        drawn again are a random choice.
    :param torch.Tensor x: inputs ``(N, ...)``.
    :param torch.Tensor y: their classes ``(N,)``, which the attack moves away from.
    :param Attack how: the attack.
    :param tuple bounds: least and greatest value that an entry of an input can take.
    :param int seed: makes the attack reproducible; the global generators stay as they are.
    :param int batch_size: inputs attacked together.
    :raises ImportError: if foolbox is not installed.
    :raises ValueError: if inputs are out of bounds, classes are none, or sizes disagree.
    :raises ModelError: if the model's observed site is no classification.
    :raises ArtifactError: if the model has other frozen weights than the one that was sampled.
    """
    foolbox = _foolbox()
    if not isinstance(how, Attack):
        raise ValueError(f"`how` must be an Attack, such as Attack('pgd', epsilon=0.1); got {how!r:.80}.")
    bounds = checked_bounds(bounds, how.epsilon)
    x, y = checked_data(x, y, bounds)
    parts = []
    batch_size = integer("batch_size", batch_size)
    with gradients("attack"), seeded(checked_seed(seed), x.device), preserved_param_store():
        victim = _Victim(model, posterior, x[:1], how)
        checked_labels("`y`", y, len(x), victim.num_classes)
        target = foolbox.PyTorchModel(victim, bounds=bounds, device=x.device)
        for rows_x, rows_y in zip(x.split(batch_size), y.split(batch_size), strict=True):
            run = _minimal if how.method == "fgsm_minimal" else _fixed
            parts.append(run(foolbox, target, rows_x, rows_y, how))
    x_attacked, found_N = (torch.cat(column) for column in zip(*parts, strict=True))
    distance_N = (x_attacked - x).abs().flatten(1).amax(1)
    return Attacked(x_attacked, distance_N, found_N)


class _Victim(nn.Module):
    """From inputs ``(N, ...)`` to log-probabilities ``(N, K)`` of the averaged prediction; differentiable in inputs.

    Their softmax is the averaged prediction itself, so that what takes them for logits takes them right.
    """

    def __init__(self, model: Callable[..., Any], posterior: PosteriorLike, example: Tensor, how: Attack) -> None:
        super().__init__()
        self._posterior, self._is_fresh = posterior, how.through == "expectation"
        self._count, self._device = 1 if how.through == "one" else how.num_draws, example.device
        self._draws = self._drawn()
        check_frozen(posterior, model, self._draws, (example,), {})
        found = outputs(model, self._draws, example)
        if found.probs_SNK is None:
            raise not_classification(found.kind)
        self._kind = found.kind
        #: Classes, ``K``.
        self.num_classes: int = found.probs_SNK.shape[-1]
        self._view = FunctionView(model, self._draws, example)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self._is_fresh:
            self._draws = self._drawn()
        value_SNF = self._view(self._draws, x)
        if self._kind == "bernoulli":
            value_SNF = nn.functional.logsigmoid(torch.cat([-value_SNF, value_SNF], dim=-1))
        # The logarithm of a mean of probabilities, also of those too small to be told from zero.
        return value_SNF.logsumexp(0) - math.log(len(value_SNF))

    def _drawn(self) -> Values:
        return take_draws(self._posterior, self._count, None, self._device)


def _fixed(foolbox: Any, target: Any, x: Tensor, y: Tensor, how: Attack) -> tuple[Tensor, Tensor]:
    """FGSM or PGD with a budget: attacked inputs, and True for each."""
    if how.method == "fgsm":
        method = foolbox.attacks.LinfFastGradientAttack()
    else:
        step_size = 2.5 * how.epsilon / how.num_steps if how.step_size is None else how.step_size
        method = foolbox.attacks.LinfProjectedGradientDescentAttack(
            abs_stepsize=step_size, steps=how.num_steps, random_start=how.random_start
        )
    _, x_attacked, _ = method(target, x, y, epsilons=how.epsilon)
    return x_attacked, torch.ones(len(x), dtype=torch.bool, device=x.device)


def _minimal(foolbox: Any, target: Any, x: Tensor, y: Tensor, how: Attack) -> tuple[Tensor, Tensor]:
    """FGSM of the least size that is enough: attacked inputs, and for which there was one."""
    method = foolbox.attacks.LinfFastGradientAttack()
    x_attacked = x.clone()
    with torch.no_grad():
        found_N = target(x).argmax(-1) != y
    for step in range(1, how.num_steps + 1):
        left = (~found_N).nonzero().squeeze(1)
        if len(left) == 0:
            break
        _, x_tried, is_changed = method(target, x[left], y[left], epsilons=how.epsilon * step / how.num_steps)
        x_attacked[left[is_changed]] = x_tried[is_changed]
        found_N[left[is_changed]] = True
    return x_attacked, found_N


def checked_bounds(bounds: Bounds, epsilon: float) -> Bounds:
    """The bounds as a tuple.

    :raises ValueError: if they are none, or a change of ``epsilon`` is larger than their range.
    """
    values = tuple(bounds) if isinstance(bounds, (tuple, list)) else ()
    if (
        len(values) != 2
        or not all(is_number(value) and math.isfinite(value) for value in values)
        or not (values[0] < values[1])
    ):
        raise ValueError(
            f"`bounds` must be (least, greatest) value of an input's entries, such as (-1, 1); got {bounds!r:.80}."
        )
    if epsilon > values[1] - values[0]:
        raise ValueError(
            f"`epsilon`={epsilon!r} is larger than the whole range of `bounds`={values!r}; it is in the units of the "
            "inputs."
        )
    return values[0], values[1]


def checked_data(x: Tensor, y: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Inputs, and their classes as ``int64``.

    :raises ValueError: if inputs are none or out of bounds, classes are none, or sizes disagree.
    """
    check_inputs("`x`", x)
    if x.dim() < 2:
        raise ValueError(f"`x` must be a floating-point tensor (N, ...) of rows; got shape {tuple(x.shape)}.")
    if isinstance(y, Tensor) and y.is_floating_point():
        raise ValueError(f"`y` must hold the class of each of {len(x)} inputs, as integers; got {y.dtype}.")
    y = checked_labels("`y`", y, len(x))
    least, greatest = map(float, x.detach().aminmax())
    if not (bounds[0] <= least and greatest <= bounds[1]):
        raise ValueError(
            f"`x` has values from {least:g} to {greatest:g}, outside `bounds`={bounds!r}. Give the bounds of "
            "the data as they are; epsilon is in the same units."
        )
    return x.detach(), y


def not_classification(kind: str) -> ModelError:
    """The error for a model whose observed site is none."""
    return ModelError(f"Attacks need a classification; the observed site of the model is {kind!r}.")


def _foolbox() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # old names of SciPy's, in attacks not used here
            import foolbox
    except ImportError as error:
        raise ImportError(
            f"Attacks are made by foolbox, which cannot be imported ({error}): pip install 'pyro-apd[apps]'."
        ) from error
    return foolbox
