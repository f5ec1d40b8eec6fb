# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Any :class:`torch.nn.Module` as a Bayesian neural network, a Pyro model, in a line.

For models that go beyond one network and one likelihood, write a :class:`pyro.nn.PyroModule`; everything else in this
package takes either.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint
from torch.nn.parameter import UninitializedParameter

from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.normalisation import BATCH_NORMS, with_group_norm

#: Standard deviation, distribution, or rule for the prior of one parameter.
Prior = float | str | Distribution
#: The same for all, by layer or parameter name, or computed.
PriorSpec = Prior | Mapping[str, Prior] | Callable[[str, Tensor], Prior]

_LOG = logging.getLogger("pyro_apd")

_BATCH_NORM = ("constant", "group")
_LIKELIHOODS = ("categorical", "gaussian", "bernoulli")
_NOISE_PRIORS: dict[str, Callable[[Tensor], Distribution]] = {
    "half_cauchy": dist.HalfCauchy,
    "half_normal": dist.HalfNormal,
}
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class BNN(PyroModule):
    """A network with a prior on every trainable parameter, and a likelihood.

    The model is called as ``bnn(x, y)``, or ``bnn(x)`` to predict. Latent sites are ``net.<parameter name>``, and
    ``noise_scale`` where the noise of a regression is learned; the observed site is ``obs`` in plate ``data``.

    The network given is copied, and the copy stays in evaluation mode: given weights, a Bayesian network is a
    function. Dropout is inactive then; a warning says where. Batch normalisation makes a prediction depend on its
    neighbours, and ``batch_norm`` says what becomes of it. Parameters that do not require gradients keep their values.

    :param torch.nn.Module net: from inputs ``(N, ...)`` to outputs ``(N, K)``, or ``(N,)`` and ``(N, 1)`` where the
        likelihood has one output for each datum.
    :param str likelihood: ``"categorical"`` (outputs are logits ``(N, K)``), ``"bernoulli"`` (logits; several outputs
        are independent labels of one datum) or ``"gaussian"`` (means).
    :param prior_scale: prior of the parameters, independent of each other. A float: normal around 0 with this standard
        deviation. ``"fan_in"``: standard deviation 1/sqrt(inputs of a unit) for weights, and 1 for biases and other
        parameters of one dimension (Neal, 1996). A :mod:`pyro.distributions` object: for each entry, unless it has the
        parameter's shape. A mapping from names of layers or parameters to these: the longest matching name wins,
        ``""`` matches all. A callable ``(name, parameter) ->`` any of these.
    :param float noise_scale: standard deviation of the observations of a regression; None to learn it.
    :param noise_prior: prior of a learned noise scale: ``"half_cauchy"``, ``"half_normal"`` or a distribution.
    :param float noise_prior_scale: scale of a noise prior given by name.
    :param int subsample_size: rows of ``x`` and ``y`` that the model itself draws at each run; leave it out where the
        kernel draws mini-batches. Predictions, without ``y``, are for all rows.
    :param str batch_norm: ``"constant"`` keeps batch normalisation with its running statistics as constants, which
        suits a trained network; a warning says where. ``"group"`` puts group normalisation in its place (Wu & He,
        2018), with the same parameters, which suits a network sampled from its prior.
    :raises ValueError: if an argument is none of the above.
    :raises ModelError: if the network has nothing to put a prior on, or cannot be a function of its weights.

    Example::

        bnn = BNN(nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)))
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: str = "categorical",
        prior_scale: PriorSpec = 1.0,
        *,
        noise_scale: float | None = None,
        noise_prior: str | Distribution = "half_cauchy",
        noise_prior_scale: float = 1.0,
        subsample_size: int | None = None,
        batch_norm: str = "constant",
    ) -> None:
        super().__init__()
        if likelihood not in _LIKELIHOODS:
            raise ValueError(f"`likelihood` must be one of {list(_LIKELIHOODS)}; got {likelihood!r}.")
        if subsample_size is not None and (not isinstance(subsample_size, int) or subsample_size < 1):
            raise ValueError(f"`subsample_size` must be a positive int or None; got {subsample_size!r}.")
        if batch_norm not in _BATCH_NORM:
            raise ValueError(f"`batch_norm` must be one of {list(_BATCH_NORM)}; got {batch_norm!r}.")
        self.likelihood = likelihood
        self.subsample_size = subsample_size
        net = _checked_copy(net, batch_norm)
        names = _names(net)
        priors = _priors(net, names, prior_scale)
        #: Prior by latent site.
        self.priors: dict[str, Distribution] = {f"net.{name}": prior for name, prior in priors.items()}
        # A parameter that appears twice in a network is one latent.
        self._sites = {name: f"net.{first}" for name, first in names.items()}
        self.noise_scale = noise_scale
        if likelihood == "gaussian":
            self._add_noise(noise_scale, noise_prior, noise_prior_scale, net.get_parameter(next(iter(names))))
        elif noise_scale is not None:
            raise ValueError(f"`noise_scale` belongs to likelihood='gaussian'; this one is {likelihood!r}.")
        _parameters_to_buffers(net)
        self.net = net

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Logits or means: ``(N, K)``, or ``(N,)`` with one output for each datum.

        :param torch.Tensor x: inputs ``(N, ...)``.
        :param torch.Tensor y: targets ``(N,)``, or ``(N, K)`` for several outputs: class indices of an integer dtype,
            0 and 1, or reals.
        :raises DataError: if targets do not fit the likelihood.
        :raises ModelError: if the network's outputs do not.
        """
        drawn = {site: pyro.sample(site, prior) for site, prior in self.priors.items()}
        noise = drawn.pop("noise_scale", self.noise_scale)
        size = None
        if y is not None:
            _check_rows(x, y)
            size = self.subsample_size if self.subsample_size and self.subsample_size < len(x) else None
        plate = pyro.plate("data", len(x), subsample_size=size, device=x.device)
        if y is not None and size is not None:
            with plate:
                x = pyro.subsample(x, event_dim=x.dim() - 1)
                y = pyro.subsample(y, event_dim=y.dim() - 1)
        weights = {name: drawn[site] for name, site in self._sites.items()}
        output = self._checked_output(torch.func.functional_call(self.net, weights, (x,)), len(x))
        fn = self._distribution(output, noise)
        if y is not None:
            y = self._checked_targets(y, output)
        with plate:
            pyro.sample("obs", fn, obs=y)
        return output

    @property
    def parameter_sites(self) -> dict[str, str]:
        """The latent site of each trainable parameter of the network, by every name that the parameter has."""
        return dict(self._sites)

    @property
    def init_to_network(self) -> Callable[[Any], Tensor]:
        """An ``init_strategy`` that starts where the network given was: trained, or as PyTorch initialised it.

        For kernels of this package, Pyro's, and its guides; all chains start there. A learned ``noise_scale`` starts
        at the median of its prior. From a draw of its prior a deep network hardly learns: train it, and sample from
        there::

            SGLD(bnn, 1e-5, init_strategy=bnn.init_to_network)
        """
        values = {site: self.net.get_buffer(name).clone() for name, site in self._sites.items()}
        strategy: Callable[[Any], Tensor] = init_to_value(values=values)
        return strategy

    def train(self, mode: bool = True) -> BNN:
        """As for any module, but the network stays in evaluation mode."""
        super().train(mode)
        self.net.eval()
        return self

    def extra_repr(self) -> str:
        """What ``print`` says besides the layers: the likelihood and the latent sites."""
        return f"likelihood={self.likelihood!r}, latents={sorted(self.priors)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BNN:
        # Module.to, .double, .cuda: priors go where the network goes.
        super()._apply(fn, recurse)
        self.priors = {site: _map_tensors(prior, fn) for site, prior in self.priors.items()}
        return self

    def _add_noise(self, scale: float | None, prior: str | Distribution, prior_scale: float, like: Tensor) -> None:
        if scale is not None:
            _check_scale("noise_scale", scale)
            return
        if isinstance(prior, str) and prior in _NOISE_PRIORS:
            _check_scale("noise_prior_scale", prior_scale)
            prior = _NOISE_PRIORS[prior](like.new_tensor(float(prior_scale)))
        elif not isinstance(prior, Distribution):
            raise ValueError(f"`noise_prior` must be one of {list(_NOISE_PRIORS)} or a distribution; got {prior!r}.")
        prior = _shaped(prior, "noise_scale", like.new_empty(()))
        if prior.support is not None and prior.support.check(like.new_tensor(-1.0)):
            raise ValueError(f"`noise_prior` must be over positive numbers; {type(prior).__name__} allows -1.")
        self.priors["noise_scale"] = prior

    def _checked_output(self, output: Any, num_data: int) -> Tensor:
        """The network's outputs without a last dimension of 1, where one number for each datum is meant."""
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != num_data:
            raise ModelError(f"The network must give one row for each of {num_data} inputs; it gives {shape}.")
        if self.likelihood == "categorical":
            if output.dim() != 2 or output.shape[1] < 2:
                raise ModelError(
                    f"likelihood='categorical' needs logits of shape ({num_data}, K) with K >= 2; the network gives "
                    f"{shape}. For two classes and one logit use likelihood='bernoulli'."
                )
            return output
        return output.squeeze(-1) if output.dim() == 2 else output

    def _distribution(self, output: Tensor, noise: Any) -> Any:
        if self.likelihood == "categorical":
            return dist.Categorical(logits=output)
        fn = dist.Bernoulli(logits=output) if self.likelihood == "bernoulli" else dist.Normal(output, noise)
        return fn.to_event(output.dim() - 1)

    def _checked_targets(self, y: Tensor, output: Tensor) -> Tensor:
        """Targets in the shape and dtype that the likelihood takes."""
        if self.likelihood == "categorical":
            _check_classes(y, output)
            return y
        if y.shape == (*output.shape, 1):
            y = y.squeeze(-1)
        if y.shape != output.shape:
            raise DataError(
                f"likelihood='{self.likelihood}' needs targets of shape {tuple(output.shape)}, as the network's "
                f"outputs; got {tuple(y.shape)}. Reshape the targets, or change the network's last layer."
            )
        y = y if y.is_floating_point() else y.to(output.dtype)
        # Looking at values waits for the device, so only where Pyro would too.
        if self.likelihood == "bernoulli" and dist.is_validation_enabled() and not ((y == 0) | (y == 1)).all():
            raise DataError("likelihood='bernoulli' needs targets 0 and 1; got others. For {-1, 1} use (y + 1) / 2.")
        return y


def _checked_copy(net: nn.Module, batch_norm: str) -> nn.Module:
    if not isinstance(net, nn.Module):
        raise ValueError(f"`net` must be a torch.nn.Module; got {type(net).__name__}.")
    if any(isinstance(module, PyroModule) for module in net.modules()):
        raise ValueError(
            "`net` is, or contains, a PyroModule, which has priors of its own: it is a Pyro model already."
        )
    if any(isinstance(parameter, UninitializedParameter) for parameter in net.parameters()):
        raise ModelError("`net` has lazy layers of unknown shape; call it once on an example input first.")
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ModelError("`net` has no parameter that requires gradients: there is nothing to put a prior on.")
    inactive = [name for name, module in net.named_modules() if isinstance(module, _DROPOUT)]
    if inactive:
        _LOG.warning("Dropout layers %s do nothing in a Bayesian network: its weights are the randomness.", inactive)
    net = copy.deepcopy(net).eval()
    if batch_norm == "group":
        return with_group_norm(net)
    _check_batch_norm({name: module for name, module in net.named_modules() if isinstance(module, BATCH_NORMS)})
    return net


def _check_batch_norm(layers: Mapping[str, Any]) -> None:
    """Refuses layers without running statistics; of others, says what they do."""
    batchwise = [name for name, layer in layers.items() if layer.running_mean is None]
    if batchwise:
        raise ModelError(
            f"Layers {batchwise} normalise by the batch at hand (track_running_stats=False), so that a prediction "
            "would depend on its neighbours. Pass batch_norm='group', or use GroupNorm or LayerNorm."
        )
    fresh = [name for name, layer in layers.items() if not int(layer.num_batches_tracked or 0)]
    if fresh:
        _LOG.warning(
            "Batch normalisation layers %s use their running statistics as constants, and have seen no data yet: they "
            "do nothing but scale and shift. Pass batch_norm='group' to normalise each datum by itself, or train the "
            "network first.",
            fresh,
        )
    trained = [name for name in layers if name not in fresh]
    if trained:
        _LOG.warning("Batch normalisation layers %s use their running statistics as constants.", trained)


def _names(net: nn.Module) -> dict[str, str]:
    """Every name of every trainable parameter, and the first name of the same parameter."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in net.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }


def _parameters_to_buffers(net: nn.Module) -> None:
    """So that the network follows ``.to(...)``, but nothing is left for Pyro's parameter store or an optimiser."""
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())


def _priors(net: nn.Module, names: Mapping[str, str], spec: PriorSpec) -> dict[str, Distribution]:
    """Prior of each parameter, with its shape, dtype and device."""
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters() if name in names.values()}
    if isinstance(spec, Mapping):
        unknown = [key for key in spec if not any(_is_within(name, key) for name in names)]
        if unknown:
            raise ValueError(f"`prior_scale` names {unknown}, which match no parameter; there are {list(parameters)}.")
    priors = {}
    for name, parameter in parameters.items():
        prior = spec
        if isinstance(spec, Mapping):
            matching = [key for key in spec if _is_within(name, key)]
            if not matching:
                raise ValueError(f"`prior_scale` has nothing for '{name}'; add it, its layer, or '' for all the rest.")
            prior = spec[max(matching, key=len)]
        elif callable(spec) and not isinstance(spec, Distribution):
            prior = spec(name, parameter)
        priors[name] = _prior(prior, name, parameter)
    return priors


def _is_within(name: str, key: str) -> bool:
    return key == "" or name == key or name.startswith(f"{key}.")


def _prior(prior: Any, name: str, parameter: Tensor) -> Distribution:
    if isinstance(prior, Distribution):
        return _shaped(prior, name, parameter)
    if prior == "fan_in":
        prior = 1.0 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 1.0
    if isinstance(prior, str):
        raise ValueError(
            f"The prior of '{name}' must be a standard deviation, 'fan_in' or a distribution; got {prior!r}."
        )
    _check_scale(f"prior_scale of '{name}'", prior)
    zero, scale = parameter.new_zeros(()), parameter.new_tensor(float(prior))
    normal: Distribution = dist.Normal(zero.expand(parameter.shape), scale.expand(parameter.shape)).to_event(
        parameter.dim()
    )
    return normal


def _shaped(prior: Distribution, name: str, parameter: Tensor) -> Distribution:
    """A distribution over one parameter, from one over an entry or over all of it."""
    if not hasattr(prior, "to_event"):
        raise ValueError(f"The prior of '{name}' is from torch.distributions; use the same of pyro.distributions.")
    if prior.support is None or prior.support.is_discrete:
        raise ValueError(
            f"The prior of '{name}', {type(prior).__name__}, is not continuous; gradients need one that is."
        )
    shape, event = parameter.shape, prior.event_shape
    batch = shape[: len(shape) - len(event)]
    try:
        if shape[len(batch) :] != event:
            raise ValueError("event shapes differ")
        # A copy by `expand` keeps its validation for good, which whoever switches it off globally does not expect.
        expanded = prior if prior.batch_shape == batch else prior.expand(batch)
        expanded = expanded.to_event(len(batch))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"The prior of '{name}' has batch shape {tuple(prior.batch_shape)} and event shape {tuple(event)}, which "
            f"do not make the parameter's shape {tuple(shape)}; give a scalar distribution or one of that shape."
        ) from error
    shaped: Distribution = _map_tensors(
        expanded, lambda t: t.to(parameter.device, parameter.dtype if t.is_floating_point() else None)
    )
    return shaped


def _map_tensors(value: Any, fn: Callable[[Tensor], Tensor], done: dict[int, Any] | None = None) -> Any:
    """A distribution with ``fn`` applied to every tensor that it is made of."""
    done = {} if done is None else done  # a transform and its inverse refer to each other
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (Distribution, Transform, Constraint)):
        twin = done[id(value)] = copy.copy(value)
        vars(twin).update({name: _map_tensors(part, fn, done) for name, part in vars(value).items()})
        return twin
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(part, fn, done) for part in value)
    return value


def _check_scale(name: str, scale: Any) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"The {name} must be a positive number; got {scale!r}.")


def _check_rows(x: Tensor, y: Any) -> None:
    if not isinstance(y, Tensor):
        raise DataError(f"Targets must be a tensor; got {type(y).__name__}. Use torch.as_tensor(y).")
    if y.dim() == 0 or len(y) != len(x):
        raise DataError(f"There are {len(x)} inputs, but targets of shape {tuple(y.shape)}; each input needs one.")


def _check_classes(y: Tensor, logits: Tensor) -> None:
    num_classes = logits.shape[1]
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        mend = "one-hot rows: y.argmax(-1)" if y.dim() == 2 else "y.long()"
        raise DataError(f"likelihood='categorical' needs class indices of an integer dtype; got {y.dtype}. Use {mend}.")
    if y.dim() != 1:
        mend = "y.squeeze(-1)" if y.shape[-1] == 1 else "y.argmax(-1)"
        raise DataError(f"likelihood='categorical' needs targets of shape (N,); got {tuple(y.shape)}. Use {mend}.")
    # Looking at values waits for the device, so only where Pyro would too.
    if dist.is_validation_enabled() and len(y) and not ((y >= 0) & (y < num_classes)).all():
        raise DataError(
            f"Targets must be classes 0 to {num_classes - 1}, as the network has {num_classes} outputs; got "
            f"{int(y.min())} to {int(y.max())}. Classes that count from 1 need y - 1."
        )
