# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior and its network as one module: from inputs to averages and scores over networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_apd.errors import ExportError
from pyro_apd.export.fixed_latents import heads, keys, normals
from pyro_apd.generators import Generator
from pyro_apd.models.bnn import BNN
from pyro_apd.models.layout import Layout
from pyro_apd.models.network_prediction import NetworkPrediction
from pyro_apd.models.networks import of_all_draws
from pyro_apd.runtime import checks
from pyro_apd.uncertainty.program_scores import Scores

_LATENTS = ("fixed", "input")


@dataclass(frozen=True)
class PredictionSettings:
    """What an exported posterior computes.

    :ivar tuple outputs: names of averages and scores, of class probabilities or of reals, as in
        :mod:`pyro_apd.uncertainty.program_scores`.
    :ivar int num_draws: S, networks that are averaged, where their latents are fixed.
    :ivar str latent: ``"fixed"``: always the same networks; ``"input"``: the program takes latents ``(S, L)``.
    :ivar int seed: of fixed latents.
    :ivar str link: of a plain network's outputs, as of :meth:`DistilledPosterior.ensemble`.
    :ivar float interval: probability between ``"lower"`` and ``"upper"``.
    """

    outputs: tuple[str, ...] = ("mean",)
    num_draws: int = 100
    latent: str = "fixed"
    seed: int = 0
    link: str | None = None
    interval: float = 0.9

    def __post_init__(self) -> None:
        checks.integer("num_draws", self.num_draws)
        checks.integer("seed", self.seed, at_least=0)
        checks.choice("latent", self.latent, _LATENTS)


class PosteriorPrediction(nn.Module):
    """From inputs, and latents where these are not fixed, to averages and scores over networks.

    It draws no random numbers: the same inputs always give the same outputs. :func:`torch.export.export` takes it, and
    :meth:`DistilledPosterior.export_onnx` writes what it computes.

    :param Generator generator: of the draws.
    :param Layout layout: the sites.
    :param architecture: the network, as of :meth:`DistilledPosterior.bind`.
    :param settings: see :class:`PredictionSettings`.
    :raises ValueError: if the network does not fit, or an output is not known.
    :raises ExportError: if the network has adapters, or a likelihood of whose predictions there are no scores.

    Example::

        module = PosteriorPrediction(posterior.generator, posterior.layout, bnn, PredictionSettings(num_draws=20))
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    """

    head_SH: Tensor
    key_S: Tensor

    def __init__(
        self, generator: Generator, layout: Layout, architecture: nn.Module, settings: PredictionSettings
    ) -> None:
        super().__init__()
        _check_part(architecture)
        self.settings, self.layout = settings, layout
        self.generator = generator
        with torch.no_grad():
            like = next((v for v in generator.state_dict().values() if v.is_floating_point()), torch.zeros(()))
            zeros_SL = torch.zeros(1, generator.latent_size, dtype=like.dtype, device=like.device)
            example = {name: value[0] for name, value in layout.constrain(generator(zeros_SL)).items()}
        self.network = NetworkPrediction(architecture, layout, example, settings.link)
        self.scores = Scores.of(self.network.link, settings.outputs, settings.interval)
        if settings.latent == "fixed":
            self.register_buffer("head_SH", heads(generator, settings.num_draws, settings.seed).to(like))
            self.register_buffer("key_S", keys(settings.num_draws, settings.seed).to(like.device))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return self.scores.names

    def latents(self) -> Tensor:
        """The fixed latents ``(S, L)``."""
        count = self.generator.latent_size - self.head_SH.shape[1]
        noise_SL = torch.vmap(lambda key: normals(key, count))(self.key_S)
        return torch.cat([self.head_SH, noise_SL.to(self.head_SH.dtype)], 1)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One tensor per output.

        :param inputs: of the network, ``(N, ...)`` each; then latents ``(S, L)`` where these are not fixed.
        """
        if self.settings.latent == "input":
            *inputs_N, latent_SL = inputs
        else:
            inputs_N, latent_SL = list(inputs), self.latents()
        values_S = self.layout.constrain(self.generator(latent_SL))

        def one(values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            return self.network(values, *inputs_N)  # type: ignore[no-any-return]

        return self.scores(*of_all_draws(one, values_S, self.network))  # type: ignore[no-any-return]


def _check_part(architecture: nn.Module) -> None:
    """
    :raises ExportError: if draws change weights instead of replacing them.
    """
    if isinstance(architecture, BNN) and architecture.part.adapters:
        names = [adapter.name for adapter in architecture.part.adapters]
        raise ExportError(
            f"Adapters, bayesian='lora:...', cannot be exported yet; this network has them at {names}. Use "
            "posterior.ensemble(num_samples, outputs=[...]) in Python, or make whole layers Bayesian, such as "
            "bayesian='last_layer'."
        )
