# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One network of a posterior as a pure function of its weights and inputs, in operations that exporters know."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_apd.errors import ExportError
from pyro_apd.models.bnn import BNN
from pyro_apd.models.layout import Layout
from pyro_apd.models.module_copies import ModuleCopies
from pyro_apd.models.network_inputs import NetworkInputs
from pyro_apd.models.networks import check_link, of_all_draws, part_of, plain_network
from pyro_apd.uncertainty.program_scores import Scores

#: Site of the learned noise of a regression by :class:`~pyro_apd.BNN`.
_NOISE = "noise_scale"
#: Likelihoods of a BNN, and links of a plain network, whose predictions these scores are of.
_LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
_LINKS = ("softmax", "sigmoid", "identity")


class NetworkPrediction(nn.Module):
    """Class probabilities ``(N, ..., K)``, or means and variances ``(N, ...)``, of one network.

    Its parameters and buffers are what no draw replaces: frozen weights, running statistics.

    :param architecture: a :class:`~pyro_apd.BNN`, or a plain network as :meth:`DistilledPosterior.bind` takes it.
    :param Layout layout: the sites.
    :param example: one draw by site.
    :param str link: of the outputs; not needed for a BNN.
    :raises ValueError: as :func:`~pyro_apd.models.networks.plain_network`, or if ``link`` is unknown or missing.
    :raises ExportError: if predictions of the likelihood are neither class probabilities nor normal distributions.
    """

    def __init__(
        self, architecture: nn.Module, layout: Layout, example: Mapping[str, Tensor], link: str | None = None
    ) -> None:
        super().__init__()
        _check_likelihood(architecture)
        self.link = _checked_link(link, architecture)
        self.net = plain_network(architecture, layout, example).requires_grad_(False)
        base, self.part = part_of(architecture, layout)
        trained = self.part.base(base)
        self._base_of = {name: f"base_{i}" for i, name in enumerate(trained)}
        for name, buffer in self._base_of.items():
            self.register_buffer(buffer, trained[name].detach().clone())
        self.layout = layout
        self._fixed_noise = getattr(architecture, "noise_scale", None) if isinstance(architecture, BNN) else None
        self._squeezes = isinstance(architecture, BNN)
        self._has_noise_site = self._squeezes and _NOISE in layout.names
        for name in self.part.first_names:  # the draws' values take their place
            owner, _, leaf = name.rpartition(".")
            setattr(self.net.get_submodule(owner), leaf, nn.Parameter(torch.zeros(()), requires_grad=False))
        self._copies = ModuleCopies(self.net)

    def forward(self, values: Mapping[str, Tensor], *inputs: Any, **named: Any) -> tuple[Tensor, ...]:
        """Predictions of the network with one draw's values.

        :param values: constrained values by site.
        :param inputs: of the network, and ``named`` its keyword arguments.
        """
        trained = {name: self.get_buffer(buffer) for name, buffer in self._base_of.items()}
        weights = self.part.weights(values, trained)
        # The exporter knows the tensors of the module itself, and not those of a copy.
        with contextlib.nullcontext(self.net) if torch.compiler.is_exporting() else self._copies.own() as net:
            output = NetworkInputs(inputs, named).call(net, weights)
        if self.link == "softmax":
            return (output.softmax(-1),)
        if self._squeezes and output.dim() == 2 and output.shape[-1] == 1:
            output = output.squeeze(-1)
        if self.link == "sigmoid":
            return (torch.stack([torch.sigmoid(-output), torch.sigmoid(output)], -1),)
        if self._has_noise_site:
            return output, values[_NOISE].square().expand_as(output)
        return output, torch.full_like(output, (self._fixed_noise or 0.0) ** 2)


def _check_likelihood(architecture: nn.Module) -> None:
    """
    :raises ExportError: if predictions need more than the outputs' link and a noise scale.
    """
    if isinstance(architecture, BNN) and architecture.likelihood not in _LIKELIHOODS:
        raise ExportError(
            f"Scores and exported files are of likelihoods {', '.join(map(repr, _LIKELIHOODS))}; this network has "
            f"'{architecture.likelihood}'. Use pyro_apd.Predictive for its predictions, or "
            "posterior.ensemble(num_samples, net=net, link=...) for the average of its outputs."
        )


def _checked_link(link: str | None, architecture: nn.Module) -> str:
    """
    :raises ValueError: as :func:`~pyro_apd.models.networks.check_link`.
    :raises ExportError: if the link gives neither class probabilities nor reals with normal noise.
    """
    link = check_link(link, architecture)
    if link not in _LINKS:
        raise ExportError(
            f"Scores and exported files are of links {', '.join(map(repr, _LINKS))}; got link={link!r}. For the "
            "average over networks alone, use posterior.ensemble(num_samples, net=net, link=...) without outputs."
        )
    return link


class ScoringEnsemble(nn.Module):
    """Averages and scores over the predictions of many networks, by name; differentiable in the inputs.

    It may be called from several threads at once. Its networks stay in evaluation mode.

    :param architecture: as for :class:`NetworkPrediction`.
    :param layout: the sites.
    :param draws: values ``(S, ...)`` by site.
    :param outputs: names, as of :class:`~pyro_apd.uncertainty.program_scores.Scores`.
    :param str link: as for :class:`NetworkPrediction`.
    :param float interval: probability between ``"lower"`` and ``"upper"``.
    :param int chunk_size: networks evaluated together; None: all.
    :raises ValueError: as the two classes.
    """

    def __init__(
        self,
        architecture: nn.Module,
        layout: Layout,
        draws: Mapping[str, Tensor],
        outputs: Sequence[str],
        *,
        link: str | None = None,
        interval: float = 0.9,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.network = NetworkPrediction(architecture, layout, {n: v[0] for n, v in draws.items()}, link)
        self.scores = Scores.of(self.network.link, outputs, interval)
        self.chunk_size = chunk_size
        self._buffers_of = {site: f"draws_{i}" for i, site in enumerate(layout.names)}
        for site, buffer in self._buffers_of.items():
            self.register_buffer(buffer, draws[site].detach().clone())

    def forward(self, x: Any = None, **named: Any) -> dict[str, Tensor]:
        """One tensor by name of an output, ``(N, ...)``; ``"networks"`` is ``(S, N, ...)``.

        :param x: inputs as of :meth:`~pyro_apd.BNN.forward`, and ``named`` further arguments of the network.
        """
        call = NetworkInputs.of(x, named)
        values_S = {site: self.get_buffer(buffer) for site, buffer in self._buffers_of.items()}
        predictions_S = of_all_draws(
            lambda v: self.network(v, *call.args, **call.kwargs), values_S, self.network, self.chunk_size
        )
        return dict(zip(self.scores.names, self.scores(*predictions_S), strict=True))

    def train(self, mode: bool = True) -> ScoringEnsemble:
        """As for any module, but the networks stay in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self
