# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""MC-dropout: one network, trained and used with units left out at random.

**References**

Gal and Ghahramani, *Dropout as a Bayesian Approximation*, ICML 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_apd.baselines.descent import Descent, Start, check_counts, descend, init_to_layers
from pyro_apd.data.index_stream import Generators
from pyro_apd.data.minibatch import Call, RowSubsample
from pyro_apd.errors import ModelError
from pyro_apd.generators.dropout import DropoutGenerator
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout
from pyro_apd.models.potential import Potential
from pyro_apd.models.structure import examine
from pyro_apd.models.tracing import StartMessenger, run_model
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.runtime.checks import number
from pyro_apd.runtime.global_state import gradients, preserved_param_store, seeded
from pyro_apd.runtime.seeds import derived_generator, derived_seed, seed_or_fresh


@gradients("mc_dropout")
def mc_dropout(
    model: Callable[..., Any],
    *args: Any,
    rate: float = 0.5,
    sites: Sequence[str] | None = None,
    num_steps: int = 5000,
    batch_size: int | None = None,
    learning_rate: float = 0.05,
    momentum: float = 0.0,
    decay: bool = False,
    validation: tuple[Any, ...] | None = None,
    check_every: int = 1000,
    init_strategy: Callable[..., Any] | None = None,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> DistilledPosterior:
    """Trains one network with dropout, and gives a posterior whose draws are that network with units left out.

    Leaving out an input of a layer is leaving out the weights that it meets, so each draw is an ordinary network of the
    model's own sites, and everything that takes a posterior takes this one. A draw leaves out the same units for every
    datum; the distribution of a datum's prediction is that of the usual dropout layer, which draws for each
    datum in each pass. In training, too, the rows of a mini-batch share what is left out: the loss has the same mean,
    and varies more.
    The prior is evaluated on the weights before dropout.

    Other parameters, and errors, as of :func:`~pyro_apd.baselines.map_estimate`. What ``validation`` compares is the
    network with all units.

    :param float rate: probability that an input is left out, in (0, 1).
    :param sites: matrices of weights ``(outputs, inputs, ...)`` whose inputs are left out; of a convolution, whole
        channels. By default every latent of two dimensions or more but the first, whose inputs are the data.
    :returns: a posterior as :func:`~pyro_apd.distill` gives; its file takes one network.
    :raises ModelError: if the model has no such sites, or has constrained values there.
    """
    check_counts(check_every=check_every)
    rate = number("rate", rate, above=0, below=1)
    descent = Descent(num_steps, learning_rate, momentum, decay)
    seed = seed_or_fresh(seed)
    with preserved_param_store(), seeded(derived_seed(seed, "start")):
        start, masking = _prepare(model, args, kwargs, rate, sites, batch_size, init_strategy or init_to_layers, seed)
    theta_D = descend(start, descent, "MC-dropout", progress, model, validation, check_every)
    generator = masking.generator(theta_D)
    posterior = DistilledPosterior(start.potential.layout, generator)
    posterior.metadata = {"method": "MC-dropout", "rate": rate, "seed": seed}
    posterior.frozen = FrozenTensors.of_run(model, posterior.layout.names, args, kwargs)
    return posterior


class _Masking:
    """Which inputs are left out, and a model in which they are.

    :param Layout layout: the model's latents.
    :param sites: names of those whose inputs are left out.
    """

    def __init__(self, layout: Layout, sites: Sequence[str] | None, rate: float) -> None:
        matrices = [site.name for site in layout if len(site.shape) >= 2]
        chosen = matrices[1:] if sites is None else list(sites)
        unknown = [name for name in chosen if name not in matrices]
        if unknown:
            raise ValueError(f"`sites` names {unknown}; latents of two dimensions or more are {matrices}.")
        if not chosen:
            raise ModelError(
                f"Nothing can be left out: the model's latents are {list(layout.names)}, of which matrices "
                f"{matrices}, and the first meets the data. Name matrices whose inputs may be left out in `sites`."
            )
        constrained = [name for name in chosen if not layout[name].is_real]
        if constrained:
            raise ModelError(f"Sites {constrained} are constrained; leaving out an input would make a weight zero.")
        self.layout, self.rate = layout, float(rate)
        self.sites = [name for name in matrices if name in chosen]
        self.units = [layout[name].shape[1] for name in self.sites]

    def masks(self, factor_L: Tensor) -> dict[str, Tensor]:
        """Factors by site, shaped so that they multiply its weights."""
        parts = factor_L.split(self.units)
        dims = [len(self.layout[name].shape) - 2 for name in self.sites]
        return {name: part.reshape(1, -1, *[1] * dim) for name, part, dim in zip(self.sites, parts, dims, strict=True)}

    def draw(self, generator: torch.Generator) -> Tensor:
        """Factors of all inputs ``(L,)``: 0, or 1 / (1 - rate)."""
        uniform_L = torch.rand(sum(self.units), generator=generator, device=generator.device)
        return (uniform_L >= self.rate).to(uniform_L) / (1 - self.rate)

    def generator(self, theta_D: Tensor) -> DropoutGenerator:
        """The posterior's generator, of trained weights."""
        layers = []
        for name in self.sites:
            site = self.layout[name]
            layers.append((site.start, site.shape[0], site.shape[1], math.prod(site.shape[2:])))
        generator = DropoutGenerator(self.layout.size, layers, self.rate).to(theta_D)
        with torch.no_grad():
            generator.weights.copy_(theta_D)
        return generator


class _MaskedModel:
    """A model whose first argument says what is left out."""

    def __init__(self, model: Callable[..., Any], masking: _Masking) -> None:
        self._model, self._masking = model, masking

    def __call__(self, factor_L: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _MaskMessenger(self._masking.masks(factor_L)):
            return self._model(*args, **kwargs)


class _MaskMessenger(Messenger):
    """Multiplies what sites give to the model; handlers around it, which score the prior, see the weights whole."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._masks = masks

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._masks:
            msg["value"] = msg["value"] * self._masks[msg["name"]].to(msg["value"])


class _MaskedRows(RowSubsample):
    """Rows of full tensors, and what is left out in that step."""

    def __init__(self, masking: _Masking, args: Sequence[Any], kwargs: Mapping[str, Any], batch_size: int) -> None:
        super().__init__(args, kwargs, batch_size)
        self._masking = masking

    def start(self, generators: Generators) -> None:
        """Begins with one network; see :class:`~pyro_apd.data.minibatch.RowSubsample`."""
        assert isinstance(generators, torch.Generator)
        super().start(generators)
        self._generator = generators

    def draw(self) -> tuple[Tensor, ...]:
        """Row indices ``(B,)``, and factors ``(L,)``."""
        return (*super().draw(), self._masking.draw(self._generator))

    def bind(self, inputs: tuple[Tensor, ...]) -> Call:
        """The factors, and the arguments reduced to the rows."""
        rows, factor_L = inputs
        call = super().bind((rows,))
        return replace(call, args=(factor_L, *call.args))


def _prepare(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rate: float,
    sites: Sequence[str] | None,
    batch_size: int | None,
    init_strategy: Callable[..., Any],
    seed: int,
) -> tuple[Start, _Masking]:
    """The potential of the model with inputs left out, its scaling as of the model without."""
    num_rows = next((len(value) for value in args if isinstance(value, Tensor) and value.dim()), 0)
    if not num_rows:
        raise ValueError("mc_dropout needs the full data as tensors among the model's arguments; there are none.")
    size = min(batch_size or num_rows, num_rows)
    rows = RowSubsample(args, kwargs, size)
    device = args[0].device if isinstance(args[0], Tensor) else "cpu"
    generator = derived_generator(seed, "batches", device=device)
    rows.start(generator)
    inputs = rows.draw()
    starting = StartMessenger(init_strategy)(model)
    structure = examine(starting, rows, inputs, run_model(starting, rows.bind(inputs)))
    masking = _Masking(structure.layout, sites, rate)
    masked = _MaskedRows(masking, args, kwargs, size)
    masked.start(generator)
    potential = Potential(_MaskedModel(model, masking), masked, structure, masked.bind(masked.draw()))
    masked.start(generator)
    return Start(potential, structure.layout.unconstrain(structure.start).detach().clone()), masking
