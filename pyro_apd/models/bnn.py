# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Any :class:`torch.nn.Module` as a Bayesian neural network, a Pyro model, in one line.

For models beyond one network and one likelihood, write a :class:`pyro.nn.PyroModule`. The rest of this package takes
either.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.parameter import UninitializedParameter

from pyro_apd.data.minibatch import Call
from pyro_apd.errors import DataError, ModelError
from pyro_apd.models.bayesian_part import BayesianPart, PartSpec, select
from pyro_apd.models.handlers import part_of_model
from pyro_apd.models.head_inputs import head_inputs
from pyro_apd.models.last_layer import refuse_last_layer
from pyro_apd.models.likelihood_choice import LikelihoodOptions, LikelihoodSpec, make_likelihood
from pyro_apd.models.network_inputs import NetworkInputs
from pyro_apd.models.normalisation import BATCH_NORMS, with_group_norm
from pyro_apd.models.priors import PriorSpec, adapter_priors, map_tensors, parameter_priors
from pyro_apd.models.row_weights import checked_class_weight, row_scale
from pyro_apd.runtime import checks

_LOG = logging.getLogger("pyro_apd")

# Rows by which it is seen what the outputs are.
_FEW_ROWS = 2
# Layers that a warning names.
_NUM_NAMED = 5

_BATCH_NORM = ("constant", "group")
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class BNN(PyroModule):
    """A network with priors on its trainable parameters, or on a part of a trained network, and a likelihood.

    The model is called as ``bnn(x, y)`` or ``bnn(x, y, weights)``, or ``bnn(x)`` to predict. Latent sites are
    ``net.<parameter name>``, and those of the likelihood, such as ``noise_scale`` where the noise of a regression is
    learned; the observed site is ``obs`` in plate ``data``.

    The network is copied, and the copy stays in evaluation mode: given its weights, a Bayesian network is a
    deterministic function. Dropout has no effect then; a warning names its layers. Batch normalisation makes a
    prediction depend on the other rows of its batch; ``batch_norm`` chooses a replacement. Parameters that are not
    latent keep their values.

    :param torch.nn.Module net: from inputs ``(N, ...)`` to outputs ``(N, K)``, or ``(N,)`` and ``(N, 1)`` where the
        likelihood has one output for each datum. It may take several inputs, see :meth:`forward`; of outputs with an
        attribute ``logits``, as those of `transformers`, that is used.
    :param likelihood: by name, for outputs f. ``"categorical"``: classes 0 to K - 1, logits f ``(N, K)``.
        ``"bernoulli"``: 0 and 1, logits f; several outputs are independent labels of one datum. ``"ordinal"``: classes
        in an order, P(y <= k) = sigmoid(c_k - f) with latent ``cutpoints`` c. ``"gaussian"``: normal around f.
        ``"gaussian_by_input"``: outputs ``(N, 2 K)`` are K means and K raw scales r of a normal distribution with
        standard deviation softplus(r) + ``noise_floor``. ``"student_t"``: Student's t around f. ``"poisson"``: counts
        with mean softplus(f), as exp(f) of draws from a wide prior overflows. ``"negative_binomial"``: counts with mean
        m = softplus(f) and variance m + (o m)^2, latent ``overdispersion`` o, a priori HalfNormal(1). Or a function
        from the outputs to a :mod:`pyro.distributions` object of batch shape ``(N,)``, by ``.to_event`` where a row has
        several targets.
    :param prior_scale: prior of the parameters, independent of each other. A float: normal around 0 with this standard
        deviation. ``"fan_in"``: standard deviation 1/sqrt(inputs of a unit) for weights, and 1 for biases and other
        parameters of one dimension (Neal, 1996). A :mod:`pyro.distributions` object: for each entry, unless it has the
        parameter's shape. A mapping from names of layers or parameters to these: the longest matching name is used,
        ``""`` matches all. A callable ``(name, parameter) ->`` any of these.
    :param bayesian: which parameters are latent. None: all that require gradients. ``"last_layer"``: those of the
        linear layer that the network defines last. A name of a parameter or layer, or a pattern such as ``"*.bias"``.
        ``"lora:RANK"``: changes of low rank, W + B A, of all linear layers, projections of attention and convolutions,
        or of some, ``"lora:4:query,value"``; the trained network is their prior mean, and the number ``prior_scale``
        how much they may change the output of a unit. A list of these. A callable ``(name, parameter) -> bool``. The
        rest keeps its values. Where all latents are within the layer that gives the outputs, its inputs are computed
        once, see :meth:`features`.
    :param float noise_scale: standard deviation of the observations of a regression, or scale of ``"student_t"``; None
        to learn it.
    :param noise_prior: prior of a learned noise scale: ``"half_cauchy"``, ``"half_normal"`` or a distribution.
    :param float noise_prior_scale: scale of a noise prior given by name.
    :param float noise_floor: least standard deviation of ``"gaussian_by_input"``, in the targets' unit; default 0.01.
    :param float degrees_of_freedom: of ``"student_t"``; default 4.
    :param int num_classes: of ``"ordinal"``.
    :param class_weight: one positive number for each class ``(K,)``, by which the log-likelihood of its rows is
        multiplied. For weights of single rows call ``bnn(x, y, weights)``.
    :param int subsample_size: rows of ``x`` and ``y`` that the model itself draws at each run; leave it out where the
        kernel draws mini-batches. Predictions, without ``y``, are for all rows.
    :param str batch_norm: ``"constant"`` keeps batch normalisation with its running statistics as constants, which
        suits a trained network; a warning names the layers. ``"group"`` replaces it by group normalisation (Wu & He,
        2018) with the same parameters, which suits a network sampled from its prior.
    :raises ValueError: if an argument is none of the above.
    :raises ModelError: if the network has nothing to put a prior on, or cannot be a function of its weights.

    Example::

        bnn = BNN(nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10)))
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: LikelihoodSpec = "categorical",
        prior_scale: PriorSpec = 1.0,
        *,
        bayesian: PartSpec = None,
        noise_scale: float | None = None,
        noise_prior: str | Distribution = "half_cauchy",
        noise_prior_scale: float = 1.0,
        noise_floor: float | None = None,
        degrees_of_freedom: float | None = None,
        num_classes: int | None = None,
        class_weight: Sequence[float] | Tensor | None = None,
        subsample_size: int | None = None,
        batch_norm: str = "constant",
    ) -> None:
        super().__init__()
        options = LikelihoodOptions(
            noise_scale, noise_prior, noise_prior_scale, noise_floor, degrees_of_freedom, num_classes
        )
        self._likelihood = make_likelihood(likelihood, options)
        self.likelihood = self._likelihood.name
        if subsample_size is not None:
            subsample_size = checks.integer("subsample_size", subsample_size, hint="None uses all rows.")
        self.subsample_size = subsample_size
        refuse_last_layer(net, self.likelihood)
        net = _checked_copy(net, checks.choice("batch_norm", batch_norm, _BATCH_NORM))
        self._part = select(net, bayesian)
        names, adapters = self._part.names, self._part.adapters
        priors = parameter_priors(net, names, prior_scale, adapters)
        #: Prior by latent site.
        self.priors: dict[str, Distribution] = {f"net.{name}": prior for name, prior in priors.items()}
        for adapter in adapters:
            self.priors |= adapter_priors(adapter, net.get_parameter(adapter.parameter).detach(), prior_scale)
        like = net.get_parameter(next(iter(self._part.first_names)))
        self._extra_latents = self._likelihood.latents(like)
        self.priors |= self._extra_latents
        weight = checked_class_weight(class_weight, self._likelihood)
        self._class_weight = None if weight is None else weight.to(like.device, like.dtype)
        self.noise_scale = getattr(self._likelihood, "noise_scale", None)
        _parameters_to_buffers(net)
        self.net = net

    @part_of_model()
    def forward(
        self,
        x: Any = None,
        y: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        features: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The network's outputs: ``(N, K)``, or ``(N,)`` with one output for each datum.

        :param x: inputs ``(N, ...)``: a tensor; a tuple of the network's positional arguments; or a dict of its keyword
            arguments, such as a tokenizer gives. A network that takes the dict itself gets ``(dict,)``.
        :param torch.Tensor y: targets ``(N,)``, or ``(N, K)`` for several outputs: class indices of an integer dtype,
            0 and 1, counts, or reals.
        :param torch.Tensor weights: of the rows, ``(N,)``, 0 or more: by what the log-likelihood of each is multiplied.
            Predictions do not depend on them.
        :param torch.Tensor features: what :meth:`features` gave for the inputs, in place of them.
        :param inputs: further keyword arguments of the network.
        :raises DataError: if there are no inputs, targets do not fit the likelihood, or weights do not fit the rows.
        :raises ModelError: if the network takes other inputs, its outputs do not fit the likelihood, or this is called
            in Pyro's handlers while another thread runs a model.
        """
        drawn = {site: pyro.sample(site, prior) for site, prior in self.priors.items()}
        call = NetworkInputs.of(x, inputs) if features is None else NetworkInputs.of(features, {})
        num_rows, size = call.num_rows, None
        if y is not None:
            _check_rows(num_rows, y)
            size = self.subsample_size if self.subsample_size and self.subsample_size < num_rows else None
        plate = pyro.plate("data", num_rows, subsample_size=size, device=call.device)
        if y is not None and size is not None:
            with plate:
                call = call.map_rows(lambda rows: pyro.subsample(rows, event_dim=rows.dim() - 1))
                y = pyro.subsample(y, event_dim=y.dim() - 1)
                weights = None if weights is None else pyro.subsample(weights, event_dim=0)
        output = self._likelihood.checked_output(self._outputs(drawn, call, features is not None), call.num_rows)
        fn = self._likelihood.distribution(output, {site: drawn[site] for site in self._extra_latents})
        scale = None
        if y is not None:
            y = self._likelihood.checked_targets(y, output)
            scale = row_scale(self._likelihood, self._class_weight, y, weights, output)
        with plate, nullcontext() if scale is None else poutine.scale(scale=scale):
            pyro.sample("obs", fn, obs=y)
        return output

    def _outputs(self, drawn: Mapping[str, Tensor], call: NetworkInputs, is_head: bool) -> Any:
        """Outputs of the network for its inputs, or of the layer that holds all latents for its own."""
        weights = self.network_weights(drawn)
        if not is_head:
            return call.call(self.net, weights)
        head = self._part.module()
        within = {name.removeprefix(f"{head}."): weight for name, weight in weights.items()}
        return call.call(self.net.get_submodule(head), within)

    def first_outputs(self, values: Mapping[str, Tensor], call: Call) -> Any:
        """What the network gives for the first rows of a call of the model at one draw, by site."""
        given = inspect.signature(self.forward).bind(*call.args, **call.kwargs).arguments
        features = given.get("features")
        inputs = NetworkInputs.of(*((given.get("x"), given.get("inputs", {})) if features is None else (features, {})))
        return self._outputs(values, inputs.map_rows(lambda tensor: tensor[:_FEW_ROWS]), features is not None)

    @property
    def part(self) -> BayesianPart:
        """Which parameters of the network are latent, and its adapters."""
        return self._part

    def network_weights(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of the network that depend on the latents, by every name, from one draw.

        :param values: the draw by site.
        """
        return self._part.weights(values, self._part.base(self.net))

    def features(self, x: Any = None, *, batch_size: int = 256, **inputs: Any) -> Tensor:
        """Inputs ``(N, ...)`` of the layer that holds all latents: with them the rest of the network is run once.

        Kernels, predictions, distillation and comparisons do this by themselves where inputs are tensors in memory, and
        remember it as long as inputs and network are the same. Call it to keep features on disk, or for inputs that are
        larger than memory, and give them in place of the inputs: ``mcmc.run(features=bnn.features(x), y=y)``.

        :param x: inputs as of :meth:`forward`, and ``inputs`` likewise.
        :param int batch_size: rows that the network is run on together.
        :raises ModelError: if the latents are not within one layer that gives the outputs of the network, or a row's
            features depend on other rows.
        """
        batch_size = checks.integer("batch_size", batch_size)
        return head_inputs(self.net, self._part, NetworkInputs.of(x, inputs), batch_size)

    @property
    def parameter_sites(self) -> dict[str, str]:
        """The latent site of each trainable parameter of the network, by every name of the parameter."""
        return self._part.sites

    @property
    def link(self) -> str | None:
        """The function of the outputs that gives probabilities or means of the targets, as
        :meth:`~pyro_apd.DistilledPosterior.ensemble` takes it; None if it needs the likelihood's latents."""
        return self._likelihood.link

    @property
    def init_to_network(self) -> Callable[[Any], Tensor]:
        """An ``init_strategy`` that starts at the weights of the network given: trained, or PyTorch's initial values.

        It suits kernels of this package, Pyro's kernels and guides; all chains start there. A learned ``noise_scale``
        starts at the median of its prior. From a draw of its prior a deep network hardly learns: train it first, and
        start sampling at the trained weights::

            SGLD(bnn, 1e-5, init_strategy=bnn.init_to_network)
        """
        strategy: Callable[[Any], Tensor] = init_to_value(values=self.network_values)
        return strategy

    @property
    def network_values(self) -> dict[str, Tensor]:
        """The weights of the network given, by latent site. Of a change W + B A, B is 0."""
        values = {site: self.net.get_buffer(name).clone() for name, site in self._part.sites.items()}
        for adapter in self._part.adapters:
            a, b = (self.priors[site] for site in adapter.sites)
            # With A at its mean, 0, no step would leave: there the gradients of both vanish.
            noise = torch.randn(a.mean.shape, generator=torch.Generator().manual_seed(len(values)))
            values |= dict(zip(adapter.sites, (noise.to(a.mean) * a.stddev, torch.zeros_like(b.mean)), strict=True))
        return values

    def train(self, mode: bool = True) -> BNN:
        """As for any module, but the network stays in evaluation mode."""
        super().train(mode)
        self.net.eval()
        return self

    def extra_repr(self) -> str:
        """What ``print`` shows besides the layers: the likelihood and the latent sites."""
        return f"likelihood={self.likelihood!r}, latents={sorted(self.priors)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BNN:
        # Called by Module.to, .double, .cuda: priors get the dtype and device of the network.
        super()._apply(fn, recurse)
        self.priors = {site: map_tensors(prior, fn) for site, prior in self.priors.items()}
        self._class_weight = None if self._class_weight is None else fn(self._class_weight)
        return self


def _checked_copy(net: nn.Module, batch_norm: str) -> nn.Module:
    if not isinstance(net, nn.Module):
        raise ValueError(f"net must be a torch.nn.Module; got {type(net).__name__}.")
    if any(isinstance(module, PyroModule) for module in net.modules()):
        raise ValueError(
            "net is, or contains, a PyroModule, which has its own priors: it is a Pyro model already. Pass it to the "
            "kernel as it is."
        )
    if any(isinstance(parameter, UninitializedParameter) for parameter in net.parameters()):
        raise ModelError("net has lazy layers of unknown shape; call it once on an example input first.")
    inactive = [name for name, module in net.named_modules() if isinstance(module, _DROPOUT)]
    if inactive:
        shown = inactive if len(inactive) <= _NUM_NAMED else [*inactive[:_NUM_NAMED], f"{len(inactive)} in all"]
        _LOG.warning("Dropout layers %s have no effect in a Bayesian network: its weights are random.", shown)
    net = copy.deepcopy(net).eval()
    if batch_norm == "group":
        return with_group_norm(net)
    _check_batch_norm({name: module for name, module in net.named_modules() if isinstance(module, BATCH_NORMS)})
    return net


def _check_batch_norm(layers: Mapping[str, Any]) -> None:
    """Refuses layers without running statistics; warns about the others."""
    batchwise = [name for name, layer in layers.items() if layer.running_mean is None]
    if batchwise:
        raise ModelError(
            f"Layers {batchwise} normalise by the present batch (track_running_stats=False), so that a prediction "
            "would depend on the other rows of its batch. Pass batch_norm='group', or use GroupNorm or LayerNorm."
        )
    fresh = [name for name, layer in layers.items() if not int(layer.num_batches_tracked or 0)]
    if fresh:
        _LOG.warning(
            "Batch normalisation layers %s use their running statistics as constants, and have seen no data yet: they "
            "only scale and shift. Pass batch_norm='group' to normalise each datum separately, or train the network "
            "first.",
            fresh,
        )
    trained = [name for name in layers if name not in fresh]
    if trained:
        _LOG.warning("Batch normalisation layers %s use their running statistics as constants.", trained)


def _parameters_to_buffers(net: nn.Module) -> None:
    """Turns parameters into buffers: they follow ``.to(...)``, and neither Pyro's parameter store nor an optimiser
    sees them."""
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())


def _check_rows(num_rows: int, y: Any) -> None:
    if not isinstance(y, Tensor):
        raise DataError(f"Targets must be a tensor; got {type(y).__name__}. Use torch.as_tensor(y).")
    if y.dim() == 0 or len(y) != num_rows:
        raise DataError(f"There are {num_rows} inputs, but targets of shape {tuple(y.shape)}; each input needs one.")
