# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The distilled posterior: a generator of networks with the interface of Pyro's posteriors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_apd.generators import Generator, precision
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.handlers import part_of_model
from pyro_apd.models.layout import Layout
from pyro_apd.posterior import artifact, building, compatibility, estimates
from pyro_apd.posterior.estimates import Estimates
from pyro_apd.posterior.latent_noise import NO_DENSITY, NOISE_SITE, LatentNoise
from pyro_apd.posterior.networks import PosteriorNetworks
from pyro_apd.posterior.shown import shown
from pyro_apd.predictive.draws import DrawSource
from pyro_apd.runtime import checks
from pyro_apd.runtime.global_state import seeded, without_autocast
from pyro_apd.runtime.seeds import checked_seed


class DistilledPosterior(PosteriorNetworks):
    """A generator of draws from a posterior, distilled from draws of a chain (Wang et al., ICML 2018).

    It can be used wherever Pyro takes a posterior: :meth:`get_samples` as after :class:`~pyro.infer.MCMC`, and called
    as a guide as after :class:`~pyro.infer.SVI`. Draws are independent, and their number is not limited. One latent
    vector is one network: ``sample(latent=z)`` returns it again, and ``rsample(latent=z)`` differentiably.

    The density of its draws is implicit, as for any generative adversarial network: there is no ``log_prob``.

    :param Layout layout: the latent sites of the model.
    :param Generator generator: from latents ``(S, L)``, standard normal, to unconstrained draws ``(S, D)``.
    :param int num_samples: default number of draws of :meth:`get_samples`.
    :param dict metadata: seed, metrics, notes: anything that JSON holds. It is saved in the file.
    :param dict training_log: lists of numbers by name, one number per evaluation.
    :param str storage_dtype: precision of the file, see :attr:`storage_dtype`.
    :param frozen: digests of frozen parameters and buffers of the model; None if they are not known.
    :raises ValueError: if generator and layout disagree in size, or ``storage_dtype`` is not known.
    """

    def __init__(
        self,
        layout: Layout,
        generator: Generator,
        *,
        num_samples: int = 100,
        metadata: dict[str, Any] | None = None,
        training_log: dict[str, list[float]] | None = None,
        storage_dtype: str = "float32",
        frozen: FrozenTensors | None = None,
    ) -> None:
        super().__init__()
        if generator.output_size != layout.size:
            raise ValueError(
                f"The generator gives {generator.output_size} numbers per draw, but the layout has {layout.size}: "
                f"{layout!r}."
            )
        self.layout = layout
        self.generator: Generator = generator
        self.num_samples = num_samples
        self.metadata = {} if metadata is None else metadata
        self.training_log = {} if training_log is None else training_log
        self._storage_dtype = precision.check_dtype(storage_dtype, "storage_dtype")
        self._architecture: tuple[nn.Module, ...] = ()
        #: Frozen parameters and buffers of the model; None where they are not known, and are not checked.
        self.frozen = frozen

    @property
    def storage_dtype(self) -> str:
        """Precision in which :meth:`save` keeps the generator, and which :attr:`num_bytes` counts.

        ``"float32"`` keeps each number at the dtype that the generator has; ``"float16"`` and ``"bfloat16"`` take two
        bytes per number; ``"int8"`` one in large matrices, with a scale per row, and two elsewhere (see
        ``docs/format.md``). The generator in memory does not change; :meth:`rounded` returns one that draws as the file
        does.
        """
        return self._storage_dtype

    @property
    def latent_size(self) -> int:
        """Length ``L`` of the latent vector of a draw."""
        return self.generator.latent_size

    @property
    def device(self) -> torch.device:
        """Device of the generator and of its draws."""
        return self._like().device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point dtype of the generator and of its draws."""
        return self._like().dtype

    def rsample(self, sample_shape: Sequence[int] = torch.Size(), latent: Tensor | None = None) -> dict[str, Tensor]:
        """Draws networks: constrained values ``(*sample_shape, *site.shape)`` by site.

        Values are differentiable with respect to ``latent``, and to those parameters of :attr:`generator` that require
        a gradient. Each is a draw from the posterior. The draws of one call are spread evenly over chains and along
        them, as draws of an MCMC run are, so that averages over them vary less than over independent draws.

        :param sample_shape: leading dimensions of the draws.
        :param Tensor latent: latents ``(..., L)`` of the draws wanted, instead of fresh ones.
        :raises ValueError: if both are given, or ``latent`` is of another length than :attr:`latent_size`.

        Example::

            latent = torch.zeros(posterior.latent_size, requires_grad=True)
            distance = (posterior.rsample(latent=latent)["net.weight"] - target).square().sum()
            distance.backward()
        """
        like = self._like()
        if latent is None:
            count = torch.Size(sample_shape).numel()
            latent = self.generator.latents(count, like).reshape(*sample_shape, self.latent_size)
        elif len(tuple(sample_shape)) > 0:
            raise ValueError("`latent` determines the number of draws; leave `sample_shape` out.")
        if latent.shape[-1:] != (self.latent_size,):
            raise ValueError(
                f"`latent` has shape {tuple(latent.shape)}; its last dimension must be {self.latent_size}."
            )
        with without_autocast():
            theta_SD = self.generator(latent.reshape(-1, self.latent_size).to(like))
            return self.layout.constrain(theta_SD.reshape(*latent.shape[:-1], self.layout.size))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = torch.Size(), latent: Tensor | None = None) -> dict[str, Tensor]:
        """:meth:`rsample` without gradients; parameters and errors as there."""
        return self.rsample(sample_shape, latent)

    def get_samples(
        self, num_samples: int | None = None, group_by_chain: bool = False, *, seed: int | None = None
    ) -> dict[str, Tensor]:
        """Fresh draws in the form of ``MCMC.get_samples()``: ``(S, ...)`` by site, or ``(1, S, ...)`` by chain.

        :param int num_samples: S; by default :attr:`num_samples`, which is 100 unless it was set.
        :param bool group_by_chain: add a leading dimension for the one chain.
        :param int seed: makes the draws reproducible without touching the global generator.
        :raises ValueError: if ``num_samples`` is not positive.
        """
        num_samples = self._number(num_samples)
        with seeded(checked_seed(seed), self.device):
            draws = self.sample((num_samples,))
        return {name: value.unsqueeze(0) for name, value in draws.items()} if group_by_chain else draws

    def stream(self, num_samples: int | None = None, *, seed: int | None = None) -> DrawSource:
        """The draws of :meth:`get_samples`, each made when it is used, and made again when it is used again.

        Functions such as :func:`pyro_apd.outputs` take it in place of draws, and then hold only a chunk of networks.

        :param int num_samples: S; by default :attr:`num_samples`.
        :param int seed: makes the draws reproducible without touching the global generator.
        :raises ValueError: if ``num_samples`` is not positive.
        """
        latent_SL = self._latents(self._number(num_samples), seed)
        check = None if self.frozen is None else self.frozen.check
        return DrawSource(lambda latent: self.sample(latent=latent), latent_SL, self.layout.names, check)

    def quantiles(
        self, quantiles: float | Sequence[float] | Tensor, num_samples: int = 1000, *, seed: int | None = None
    ) -> Estimates:
        """Quantiles of every site, ``(Q, *site.shape)``, as of an autoguide: of the unconstrained numbers, constrained.

        They are estimates: ``.error`` holds the Monte-Carlo standard error of every entry. Dependent entries, such as
        those of a simplex, get values in the support of the site.

        :param quantiles: levels from 0 to 1.
        :param int num_samples: draws that they are estimated from, at least 2; all are in memory together.
        :param int seed: makes them reproducible without touching the global generator.
        :raises ValueError: if a level is not from 0 to 1, or there are fewer than 2 draws.
        """
        levels = estimates.check_levels(quantiles)
        latent_SL = self._latents(self._number(num_samples, least=2), seed)
        with torch.no_grad(), without_autocast():
            return estimates.quantiles(self.layout, self.generator(latent_SL), levels)

    def median(self, num_samples: int = 1000, *, seed: int | None = None) -> Estimates:
        """Median of every site, shaped as the site; see :meth:`quantiles`.

        :param int num_samples: draws that it is estimated from, at least 2.
        :param int seed: makes it reproducible without touching the global generator.
        :raises ValueError: if there are fewer than 2 draws.
        """
        found = self.quantiles([0.5], num_samples, seed=seed)
        error = {name: value[0] for name, value in found.error.items()}
        return Estimates({name: value[0] for name, value in found.items()}, error, found.num_samples)

    @part_of_model()
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """One draw as a guide: an auxiliary noise site and a Delta at every latent site. The arguments are ignored.

        :raises ModelError: if this is called in Pyro's handlers while another thread runs a model.
        """
        like = self._like()
        noise = LatentNoise(torch.zeros_like(like), torch.ones_like(like)).expand([self.latent_size]).to_event(1)
        latent = pyro.sample(NOISE_SITE, noise, infer={"is_auxiliary": True})
        values = self.sample(latent=latent)
        return {
            site.name: pyro.sample(site.name, dist.Delta(values[site.name], event_dim=len(site.shape)))
            for site in self.layout
        }

    def log_prob(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: a generator's density is implicit.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError(NO_DENSITY)

    @property
    def num_bytes(self) -> int:
        """Size of the file that :meth:`save` writes at :attr:`storage_dtype`, in bytes."""
        return len(artifact.to_bytes(self._artifact()))

    def save(self, path: str | os.PathLike[str], dtype: str | None = None, *, frozen: bool = False) -> None:
        """Writes one safetensors file with everything that drawing needs, atomically.

        Predictions also need the model's frozen parameters and buffers, where it has some. The file always holds a
        digest of them, so that another model is refused, and with ``frozen`` their numbers, so that they are restored.

        :param path: file to write; an existing file is replaced.
        :param str dtype: precision of the generator's numbers in the file, by default :attr:`storage_dtype`.
        :param bool frozen: also write the frozen parameters and buffers, exactly; see :meth:`load_frozen`.
        :raises ValueError: if ``dtype`` is not known, metadata are not what JSON holds, :attr:`num_samples` draws would
            take far more memory than the file, or frozen tensors are not at hand.
        :raises OSError: if the file cannot be written; an existing file is then unchanged.
        """
        values = compatibility.frozen_values(self.frozen) if checks.flag("frozen", frozen) else {}
        artifact.write(self._artifact(dtype), path, values)

    def load_frozen(self, model: Callable[..., Any]) -> None:
        """Copies frozen parameters and buffers of the file into ``model``, in place; latents stay as they are.

        :meth:`network` and :meth:`ensemble` do it by themselves, in their copy of the network.

        :param model: the Pyro model, or a network as in :meth:`bind`.
        :raises ArtifactError: if they are not in the file (see :meth:`save`), or the model has no such tensors.

        Example::

            posterior = DistilledPosterior.load("posterior.safetensors")   # saved with frozen=True
            bnn = BNN(make_network())
            posterior.load_frozen(bnn)
        """
        compatibility.restore(self.frozen, self.layout, model)

    def rounded(self, dtype: str | None = None) -> DistilledPosterior:
        """The posterior that :meth:`save` and :meth:`load` would return at that precision, without a file.

        :param str dtype: as in :meth:`save`.
        :returns: a new posterior, on the same device, whose ``storage_dtype`` is ``dtype``.
        :raises ValueError: if ``dtype`` is not known.
        """
        contents = self._artifact(dtype)
        tensors = precision.decode(precision.encode(contents.tensors, contents.dtype), contents.dtype)
        contents = replace(contents, tensors=tensors)
        rounded = self._from_artifact(contents, building.build(contents)).to(self.device)
        rounded._architecture = self._architecture
        return rounded

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> DistilledPosterior:
        """Reads what :meth:`save` wrote, at any precision. Nothing in the file is executed.

        The generator computes in the dtype that it had, also where the file is at reduced precision, and that precision
        is :attr:`storage_dtype`: saved again, the file has the same bytes.

        :raises ArtifactError: if the file is truncated, damaged, of another kind, or of another format version, or if
            its draws would not be finite.
        :raises FileNotFoundError: if there is none.
        """

        contents, generator = building.load(path)
        return cls._from_artifact(contents, generator).to(device)

    @classmethod
    def _from_artifact(cls, contents: artifact.Artifact, generator: Generator) -> DistilledPosterior:
        return cls(
            contents.layout,
            generator,
            num_samples=contents.num_samples,
            metadata=contents.metadata,
            training_log=contents.training_log,
            storage_dtype=contents.dtype,
            frozen=contents.frozen,
        )

    def check_model(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Checks that ``model``, called with these arguments, has the latent sites that are drawn here, and the frozen
        parameters and buffers of the model that was sampled, where these are known.

        :raises ArtifactError: if a site is missing in the model, or has another shape or support there; or if frozen
            weights differ, which the message names.
        """
        compatibility.check_model(self.layout, self.frozen, model, args, kwargs)

    def __repr__(self) -> str:
        """What it is of, its size, and what is known of its quality."""
        return shown(self)

    def _artifact(self, dtype: str | None = None) -> artifact.Artifact:
        return artifact.Artifact(
            layout=self.layout,
            generator=self.generator.config,
            tensors=dict(self.generator.state_dict()),
            num_samples=self.num_samples,
            metadata=self.metadata,
            training_log=self.training_log,
            dtype=self.storage_dtype if dtype is None else precision.check_dtype(dtype),
            compute_dtype=str(self.dtype).removeprefix("torch."),
            frozen=self.frozen,
        )

    def _latents(self, num_samples: int, seed: int | None) -> Tensor:
        like = self._like()
        with seeded(checked_seed(seed), like.device):
            return self.generator.latents(num_samples, like)

    def _number(self, num_samples: int | None, least: int = 1) -> int:
        return checks.integer("num_samples", self.num_samples if num_samples is None else num_samples, at_least=least)

    def _like(self) -> Tensor:
        """A scalar of the generator's floating dtype and device."""
        floating = (value for value in self.generator.state_dict().values() if value.is_floating_point())
        return next((value.new_zeros(()) for value in floating), torch.zeros(()))
