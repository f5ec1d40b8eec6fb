# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Likelihoods of :class:`~pyro_apd.BNN`: from a network's outputs and further latents to a distribution of targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import logsigmoid, softplus

from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.counts import OverdispersedPoisson
from pyro_apd.models.priors import noise_scale_prior
from pyro_apd.runtime import checks

# Scale of the prior of the first cutpoint, and of the logarithms of the distances between cutpoints.
_CUTPOINT_SCALE = 1.0


class Likelihood(ABC):
    """From outputs ``(N, ...)`` to a distribution of one target per row, with batch shape ``(N,)``.

    :ivar str name: as users give it.
    :ivar str link: name in :data:`~pyro_apd.models.networks.LINKS` of the function of the outputs that is the mean of
        the targets, or their probabilities; None where the outputs alone do not give it.
    """

    name = ""
    link: str | None = "identity"

    def latents(self, like: Tensor) -> dict[str, Distribution]:
        """Priors of latents besides the network's, by site, with dtype and device of ``like``."""
        del like
        return {}

    def num_classes(self, output: Tensor) -> int | None:
        """Number of classes that a target is one of; None where it is no class."""
        del output
        return None

    def checked_output(self, output: Any, num_data: int) -> Tensor:
        """The network's outputs, in the shape that :meth:`distribution` takes.

        :raises ModelError: if they have another shape; the message names likelihoods that take it.
        """
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != num_data:
            raise ModelError(f"The network must give one row for each of {num_data} inputs; it gives {shape}.")
        return self._fitting(output)

    @abstractmethod
    def distribution(self, output: Tensor, latents: Mapping[str, Any]) -> Any:
        """Distribution of the targets given outputs and values of :meth:`latents`."""

    @abstractmethod
    def checked_targets(self, y: Tensor, output: Tensor) -> Tensor:
        """Targets in the shape and dtype of the distribution's values.

        :raises DataError: if they do not fit; the message says how to change them, or which likelihood takes them.
        """

    def _fitting(self, output: Tensor) -> Tensor:
        """One target per output: without a last dimension of 1."""
        return output.squeeze(-1) if output.dim() == 2 else output


class Categorical(Likelihood):
    """Classes 0 to K - 1; outputs are logits ``(N, K)``."""

    name = "categorical"
    link: str | None = "softmax"

    def num_classes(self, output: Tensor) -> int | None:
        """K."""
        return output.shape[-1]

    def distribution(self, output: Tensor, latents: Mapping[str, Any]) -> Any:
        """See :class:`Likelihood`."""
        return dist.Categorical(logits=output)

    def checked_targets(self, y: Tensor, output: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        num_classes = output.shape[1]
        _check_class_indices(y, self.name, num_classes, f"as the network has {num_classes} outputs")
        return y

    def _fitting(self, output: Tensor) -> Tensor:
        if output.dim() != 2 or output.shape[1] < 2:
            raise ModelError(
                f"likelihood='categorical' needs logits of shape ({len(output)}, K) with K >= 2; the network gives "
                f"{tuple(output.shape)}. For two classes and one logit use likelihood='bernoulli', for classes in an "
                "order and one output 'ordinal', for real targets 'gaussian'."
            )
        return output


class _ByEntry(Likelihood):
    """Targets of the shape of the outputs, independent given these."""

    def checked_targets(self, y: Tensor, output: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        return self._of_shape(y, output)

    def _of_shape(self, y: Tensor, like: Tensor) -> Tensor:
        if y.shape == (*like.shape, 1):
            y = y.squeeze(-1)
        if y.shape != like.shape:
            raise DataError(
                f"likelihood='{self.name}' needs targets of shape {tuple(like.shape)}, as {self._shaped_by}; got "
                f"{tuple(y.shape)}. Reshape the targets, or change the network's last layer.{self._other(y, like)}"
            )
        return y if y.is_floating_point() else y.to(like.dtype)

    @property
    def _shaped_by(self) -> str:
        return "the network's outputs"

    def _other(self, y: Tensor, like: Tensor) -> str:
        """Which likelihood takes targets of this shape, if one does."""
        columns = like.shape[-1] if like.dim() == 2 else 1
        if self.name == "gaussian" and columns == 2 * (y.shape[-1] if y.dim() == 2 else 1):
            return " Two outputs for each target are those of likelihood='gaussian_by_input'."
        if y.dim() == 1 and columns > 1 and not y.is_floating_point():
            return f" {columns} outputs and one class for each row are those of likelihood='categorical'."
        return ""


class Bernoulli(_ByEntry):
    """Targets 0 and 1; outputs are logits."""

    name = "bernoulli"
    link: str | None = "sigmoid"

    def num_classes(self, output: Tensor) -> int | None:
        """Two, with one label per row."""
        return 2 if output.dim() == 1 else None

    def distribution(self, output: Tensor, latents: Mapping[str, Any]) -> Any:
        """See :class:`Likelihood`."""
        return dist.Bernoulli(logits=output).to_event(output.dim() - 1)

    def checked_targets(self, y: Tensor, output: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        y = self._of_shape(y, output)
        # Reading values waits for the device, so they are checked only where Pyro would check them, too.
        if dist.is_validation_enabled() and not ((y == 0) | (y == 1)).all():
            raise DataError(
                "likelihood='bernoulli' needs targets 0 and 1; got others. For {-1, 1} use (y + 1) / 2, for more "
                "classes likelihood='categorical', for counts 'poisson', for real targets 'gaussian'."
            )
        return y


class Gaussian(_ByEntry):
    """Real targets with the same noise for all; outputs are means.

    :param float noise_scale: standard deviation of the noise; None to learn it.
    :param prior: of a learned one, as in :func:`~pyro_apd.models.priors.noise_scale_prior`, with ``prior_scale``.
    """

    name = "gaussian"

    def __init__(self, noise_scale: float | None, prior: str | Distribution, prior_scale: float) -> None:
        if noise_scale is not None:
            noise_scale = checks.number("noise_scale", noise_scale, above=0, hint="None learns it.")
        self.noise_scale = noise_scale
        self._prior = prior, prior_scale

    def latents(self, like: Tensor) -> dict[str, Distribution]:
        """``noise_scale``, where it is learned."""
        return {} if self.noise_scale is not None else {"noise_scale": noise_scale_prior(*self._prior, like)}

    def distribution(self, output: Tensor, latents: Mapping[str, Any]) -> Any:
        """See :class:`Likelihood`."""
        return self._around(output, latents.get("noise_scale", self.noise_scale)).to_event(output.dim() - 1)

    def _around(self, output: Tensor, noise: Any) -> Any:
        return dist.Normal(output, noise)


class StudentT(Gaussian):
    """Real targets with outliers: Student's t around the outputs.

    :param float degrees_of_freedom: of the noise; its variance is finite above 2.
    """

    name = "student_t"

    def __init__(
        self, degrees_of_freedom: float, noise_scale: float | None, prior: str | Distribution, prior_scale: float
    ) -> None:
        super().__init__(noise_scale, prior, prior_scale)
        self.degrees_of_freedom = checks.number("degrees_of_freedom", degrees_of_freedom, above=0)

    def _around(self, output: Tensor, noise: Any) -> Any:
        return dist.StudentT(torch.full_like(output, self.degrees_of_freedom), output, noise)


class GaussianByInput(_ByEntry):
    """Real targets with noise that depends on the input: the first K outputs are means, the last K raw scales.

    Standard deviation = softplus(raw scale) + ``noise_floor`` (compare Lakshminarayanan et al., 2017). Without a floor
    the density grows without bound around a row that is fitted exactly.
    """

    name = "gaussian_by_input"
    link: str | None = "first_half"

    def __init__(self, noise_floor: float) -> None:
        self.noise_floor = checks.number("noise_floor", noise_floor, above=0)

    def distribution(self, output: Tensor, latents: Mapping[str, Any]) -> Any:
        """See :class:`Likelihood`."""
        mean, raw = output.chunk(2, dim=-1)
        fn = dist.Normal(mean, softplus(raw) + self.noise_floor)
        if mean.shape[-1] > 1:
            return fn.to_event(1)
        return dist.Normal(fn.loc.squeeze(-1), fn.scale.squeeze(-1))

    def checked_targets(self, y: Tensor, output: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        mean = output[..., : output.shape[-1] // 2]
        return self._of_shape(y, mean.squeeze(-1))

    def _fitting(self, output: Tensor) -> Tensor:
        if output.dim() != 2 or output.shape[1] % 2:
            raise ModelError(
                f"likelihood='gaussian_by_input' needs outputs of shape ({len(output)}, 2 K): K means, then K raw "
                f"scales; the network gives {tuple(output.shape)}. For means alone use likelihood='gaussian'."
            )
        return output

    @property
    def _shaped_by(self) -> str:
        return "half of the network's outputs, the means"


class Poisson(_ByEntry):
    """Counts with mean softplus(output).

    The usual exp(output) overflows, or gives counts in the billions, at outputs that draws from a wide prior have.
    """

    name = "poisson"
    link: str | None = "softplus"

    def distribution(self, output: Tensor, latents: Mapping[str, Any]) -> Any:
        """See :class:`Likelihood`."""
        return dist.Poisson(_positive(output)).to_event(output.dim() - 1)

    def checked_targets(self, y: Tensor, output: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        y = self._of_shape(y, output)
        if dist.is_validation_enabled() and not ((y >= 0) & (y == y.floor())).all():
            raise DataError(
                f"likelihood='{self.name}' needs counts 0, 1, 2, ... as targets; got others. For real targets use "
                "likelihood='gaussian' or 'student_t'."
            )
        return y


class NegativeBinomial(Poisson):
    """Counts that vary more than a Poisson's: mean m = softplus(output), variance m + (o m)^2.

    The overdispersion o = 1/sqrt(phi) is latent, with prior HalfNormal(1); 0 is the Poisson distribution, which a
    prior of the number phi would rule out.
    """

    name = "negative_binomial"

    def latents(self, like: Tensor) -> dict[str, Distribution]:
        """``overdispersion``."""
        return {"overdispersion": dist.HalfNormal(like.new_tensor(1.0))}

    def distribution(self, output: Tensor, latents: Mapping[str, Any]) -> Any:
        """See :class:`Likelihood`."""
        fn = OverdispersedPoisson(_positive(output), latents["overdispersion"])
        return fn.to_event(output.dim() - 1)


class Ordinal(Likelihood):
    """Classes 0 to K - 1 in an order, from one output f and latent ``cutpoints`` c: P(y <= k) = sigmoid(c_k - f).

    At the median of the cutpoints' prior, all classes are equally probable where f is 0.

    :param int num_classes: K.
    """

    name = "ordinal"
    link: str | None = None

    def __init__(self, num_classes: Any) -> None:
        if num_classes is None:
            raise ValueError("likelihood='ordinal' needs the number of classes: num_classes=5 for classes 0 to 4.")
        self._num_classes = checks.integer("num_classes", num_classes, at_least=2)

    def num_classes(self, output: Tensor) -> int | None:
        """K."""
        return self._num_classes

    def latents(self, like: Tensor) -> dict[str, Distribution]:
        """``cutpoints`` ``(K - 1,)``."""
        shares = torch.arange(1, self._num_classes, dtype=like.dtype, device=like.device) / self._num_classes
        even = shares.logit()
        loc = torch.cat([even[:1], even.diff().log()])
        base = dist.Normal(loc, torch.full_like(loc, _CUTPOINT_SCALE)).to_event(1)
        return {"cutpoints": dist.TransformedDistribution(base, [OrderedTransform()])}

    def distribution(self, output: Tensor, latents: Mapping[str, Any]) -> Any:
        """See :class:`Likelihood`."""
        # As dist.OrderedLogistic, which takes differences of probabilities, that round to 0, and writes in place, which
        # vmap cannot do. With a > b, sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)).
        cuts = latents["cutpoints"]
        above = cuts - output.unsqueeze(-1)
        below = torch.nn.functional.pad(logsigmoid(above), (0, 1))
        beyond = torch.nn.functional.pad(logsigmoid(-above), (1, 0))
        width = torch.nn.functional.pad(torch.log(-torch.expm1(-cuts.diff())), (1, 1))
        return dist.Categorical(logits=below + beyond + width)

    def checked_targets(self, y: Tensor, output: Tensor) -> Tensor:
        """See :class:`Likelihood`."""
        _check_class_indices(y, self.name, self._num_classes, f"as num_classes={self._num_classes}")
        return y

    def _fitting(self, output: Tensor) -> Tensor:
        if output.dim() > 2 or (output.dim() == 2 and output.shape[1] != 1):
            raise ModelError(
                f"likelihood='ordinal' needs one output for each of {len(output)} inputs; the network gives "
                f"{tuple(output.shape)}. For a logit for each class use likelihood='categorical'."
            )
        return output.squeeze(-1) if output.dim() == 2 else output


def _positive(output: Tensor) -> Tensor:
    """softplus, which is 0 in single precision below about -100, kept positive."""
    return softplus(output).clamp(min=torch.finfo(output.dtype).tiny)


def _check_class_indices(y: Tensor, name: str, num_classes: int, reason: str) -> None:
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        fix = "one-hot rows: y.argmax(-1)" if y.dim() == 2 else "y.long()"
        real = "" if y.dtype == torch.bool or y.dim() == 2 else ", or likelihood='gaussian' for real targets"
        raise DataError(f"likelihood='{name}' needs class indices of an integer dtype; got {y.dtype}. Use {fix}{real}.")
    if y.dim() != 1:
        fix = "y.squeeze(-1)" if y.shape[-1] == 1 else "y.argmax(-1)"
        raise DataError(f"likelihood='{name}' needs targets of shape (N,); got {tuple(y.shape)}. Use {fix}.")
    # Reading values waits for the device, so they are checked only where Pyro would check them, too.
    if dist.is_validation_enabled() and len(y) and not ((y >= 0) & (y < num_classes)).all():
        raise DataError(
            f"Targets must be classes 0 to {num_classes - 1}, {reason}; got {int(y.min())} to {int(y.max())}. Classes "
            "that count from 1 need y - 1."
        )
