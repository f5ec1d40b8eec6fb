# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Networks with the weights of a posterior: one, an average of many, and the same as a program without Python."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from pyro_apd.export.example import network_inputs
from pyro_apd.export.onnx_file import write_onnx
from pyro_apd.export.prediction import PosteriorPrediction, PredictionSettings
from pyro_apd.generators import Generator
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout
from pyro_apd.models.network_prediction import ScoringEnsemble
from pyro_apd.models.networks import Ensemble, plain_network, with_frozen


class PosteriorNetworks(nn.Module, ABC):
    """What a :class:`~pyro_apd.DistilledPosterior` does with a network."""

    layout: Layout
    generator: Generator
    frozen: FrozenTensors | None
    _architecture: tuple[nn.Module, ...]

    @abstractmethod
    def sample(self, sample_shape: Sequence[int] = torch.Size(), latent: Tensor | None = None) -> dict[str, Tensor]:
        """See :meth:`DistilledPosterior.sample <pyro_apd.DistilledPosterior.sample>`."""

    @abstractmethod
    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False, *, seed: int | None = None
    ) -> dict[str, Tensor]:
        """See :meth:`DistilledPosterior.get_samples <pyro_apd.DistilledPosterior.get_samples>`."""

    def bind(self, net: nn.Module) -> Self:
        """Sets the architecture for :meth:`network` and :meth:`ensemble`; it is not saved in the file.

        :param net: a :class:`~pyro_apd.BNN`, or a plain :class:`torch.nn.Module` whose parameters have the sites'
            names, with or without a prefix such as ``net.``.
        :returns: this posterior.
        :raises ValueError: if ``net`` has parameters that are no sites, or of other shapes.
        :raises ArtifactError: if its frozen weights are not those of the model that was sampled, and the posterior does
            not hold them.
        """
        plain_network(with_frozen(net, self.layout, self.frozen), self.layout, self._draw_of_zeros())
        self._architecture = (net,)  # in a tuple, so that it does not become a submodule
        return self

    def network(self, sample: Mapping[str, Tensor] | None = None, *, net: nn.Module | None = None) -> nn.Module:
        """A plain network with the weights of one draw as its parameters, in evaluation mode.

        :param dict sample: one draw by site, as of :meth:`sample`; None draws one.
        :param net: the architecture, as in :meth:`bind`; needed unless it was called.
        :raises ValueError: if there is no architecture, or it does not fit the draw.
        :raises ArtifactError: as :meth:`bind`.
        """
        sample = self.sample() if sample is None else sample
        unlike = {
            n: tuple(v.shape) for n, v in sample.items() if n in self.layout.names and v.shape != self.layout[n].shape
        }
        if unlike:
            raise ValueError(f"`sample` must be one draw, as of sample(); sites have shapes {unlike}.")
        return plain_network(self._architecture_or(net), self.layout, sample)

    def ensemble(
        self,
        num_samples: int | None = None,
        *,
        net: nn.Module | None = None,
        link: str | None = None,
        chunk_size: int | None = None,
        seed: int | None = None,
        outputs: Sequence[str] | None = None,
        interval: float = 0.9,
    ) -> Ensemble | ScoringEnsemble:
        """A module that returns the average prediction of ``num_samples`` networks, differentiable in its input.

        :param int num_samples: S; by default :attr:`num_samples`.
        :param net: the architecture, as in :meth:`bind`; needed unless it was called.
        :param str link: of the outputs before they are averaged, a name in ``pyro_apd.models.networks.LINKS``; not
            needed for a BNN.
        :param int chunk_size: networks evaluated together; None: all.
        :param int seed: makes the draws reproducible without touching the global generator.
        :param outputs: names of averages and scores, as of :meth:`export_onnx`: the module then returns a dict of
            these.
        :param float interval: probability between ``"lower"`` and ``"upper"``.
        :raises ValueError: if there is no architecture, it does not fit, ``link`` is not known or missing, an output is
            not known, or ``num_samples`` is not positive.
        :raises ExportError: if ``outputs`` are given for another likelihood than ``"categorical"``, ``"bernoulli"`` and
            ``"gaussian"``.
        :raises ArtifactError: as :meth:`bind`.
        """
        architecture = self._architecture_or(net)
        draws = self.get_samples(num_samples, seed=seed)
        if outputs is None:
            return Ensemble(architecture, self.layout, draws, link=link, chunk_size=chunk_size)
        return ScoringEnsemble(
            architecture, self.layout, draws, outputs, link=link, interval=interval, chunk_size=chunk_size
        ).eval()

    def prediction(
        self,
        net: nn.Module | None = None,
        outputs: Sequence[str] = ("mean",),
        *,
        num_draws: int = 100,
        latent: str = "fixed",
        link: str | None = None,
        interval: float = 0.9,
        seed: int = 0,
    ) -> PosteriorPrediction:
        """Averages and scores over networks as one module without random numbers, for :func:`torch.export.export`.

        It is the function that :meth:`export_onnx` writes, and the parameters are the same.

        :returns: a module that is called with the inputs of the network, and with latents ``(S, L)`` after these where
            they are inputs; it returns one tensor per output.
        :raises ValueError: as :meth:`export_onnx`.

        Example::

            module = posterior.prediction(bnn, ("mean", "mutual_information"), num_draws=20)
            program = torch.export.export(module, (x,), dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},),))
        """
        settings = PredictionSettings(tuple(outputs), num_draws, latent, seed, link, interval)
        return PosteriorPrediction(self.generator, self.layout, self._architecture_or(net), settings).eval()

    def export_onnx(
        self,
        path: str | os.PathLike[str],
        *,
        net: nn.Module | None = None,
        outputs: Sequence[str] = ("mean",),
        num_draws: int = 100,
        latent: str = "fixed",
        dtype: str = "float32",
        compact: bool = False,
        example: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
        link: str | None = None,
        interval: float = 0.9,
        seed: int = 0,
    ) -> None:
        """Writes an ONNX file of averages and scores over networks, which needs neither Python nor Pyro.

        The graph contains the generator, and draws the networks one after the other: the file has no draws in it. Its
        inputs are those of the network, with any number of rows, and ``latent`` ``(S, L)`` where latents are inputs.
        Outputs have the names that they are asked for by. If onnxruntime is installed, the file is compared with the
        posterior before it is written.

        :param path: file to write; an existing file is replaced.
        :param net: the architecture, as in :meth:`bind`; needed unless it was called.
        :param outputs: of class probabilities: ``"mean"`` ``(N, K)``, ``"predictive_entropy"``, ``"expected_entropy"``,
            ``"mutual_information"``, ``"max_probability"``, ``"model_variance"``, ``"variation_ratio"`` ``(N,)``, as in
            :mod:`pyro_apd.uncertainty`, and ``"networks"`` ``(S, N, K)``, the prediction of each. Of reals: ``"mean"``,
            ``"variance"``, ``"expected_variance"`` (noise), ``"model_variance"`` (networks), the bounds ``"lower"`` and
            ``"upper"`` of an observation, all ``(N, ...)``, and ``"networks"``.
        :param int num_draws: S, networks that are averaged, where latents are fixed.
        :param str latent: ``"fixed"``: always the same networks, whose latents the graph computes from ``seed``, see
            :func:`pyro_apd.export.fixed_latents`; ``"input"``: latents are standard normal numbers that the caller
            gives.
        :param str dtype: precision of the generator's numbers in the file, ``"float32"`` or ``"int8"``, as of
            :meth:`save`. Integers stay integers.
        :param bool compact: keep large tensors of integers in a code, which is decoded where the file is loaded: a file
            of little more than the posterior's size, which takes more memory and time to load.
        :param example: inputs of the network, with one row or more: of their values only shapes and dtypes matter. Not
            needed for a network that begins with a linear layer. A mapping names the inputs, and several are the
            network's first arguments, in their order; others are ``x``, or ``x_0``, ``x_1`` and so on.
        :param str link: of the outputs of a plain network, as in :meth:`ensemble`.
        :param float interval: probability between ``"lower"`` and ``"upper"``, of a mixture of normal distributions.
        :param int seed: of fixed latents.
        :raises ValueError: if an argument is none of the above, or the network does not fit.
        :raises ImportError: if packages of the extra ``onnx`` are missing; the message names them.
        :raises ExportError: if torch cannot export the network, it has adapters or a likelihood other than
            ``"categorical"``, ``"bernoulli"`` and ``"gaussian"``, or the file would compute something else.
        """
        prediction = self.prediction(
            net, outputs, num_draws=num_draws, latent=latent, link=link, interval=interval, seed=seed
        )
        write_onnx(prediction, network_inputs(prediction.network.net, example), path, dtype=dtype, compact=compact)

    def _architecture_or(self, net: nn.Module | None) -> nn.Module:
        if net is None and not self._architecture:
            raise ValueError(
                "A posterior draws weights and does not know their network. Pass net=, the pyro_apd.BNN or a "
                "torch.nn.Module of its architecture, or call posterior.bind(net) once."
            )
        return with_frozen(self._architecture[0] if net is None else net, self.layout, self.frozen)

    def _draw_of_zeros(self) -> dict[str, Tensor]:
        like = next((v for v in self.generator.state_dict().values() if v.is_floating_point()), torch.zeros(()))
        return self.sample(latent=like.new_zeros(self.generator.latent_size))
