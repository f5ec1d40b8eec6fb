# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Drawn weights in plain :class:`torch.nn.Module` networks, for tools that do not know Pyro: exporters, attacks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_apd.errors import ArtifactError
from pyro_apd.models.bayesian_part import BayesianPart
from pyro_apd.models.bnn import BNN
from pyro_apd.models.frozen import FrozenTensors, fixed_tensors, put_values
from pyro_apd.models.layout import Layout
from pyro_apd.models.module_copies import ModuleCopies
from pyro_apd.models.network_inputs import NetworkInputs
from pyro_apd.runtime.threads import one_thread
from pyro_apd.runtime.vectorisation import vectorised

#: From a network's outputs to predictions, by name.
LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda output: output.softmax(-1),
    "sigmoid": torch.sigmoid,
    "identity": lambda output: output,
    "softplus": torch.nn.functional.softplus,
    "first_half": lambda output: output[..., : output.shape[-1] // 2],
}


def plain_network(architecture: nn.Module, layout: Layout, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network with the values of one draw as its parameters, in evaluation mode.

    :param architecture: a :class:`~pyro_apd.BNN`, or a network whose parameters have the names of the sites, or of the
        sites without a common prefix.
    :param layout: the sites.
    :param values: one draw by site.
    :raises ValueError: if a trainable parameter has no site, or its site has another shape.
    """
    net, part = part_of(architecture, layout)
    made: dict[str, nn.Parameter] = {}
    for name, weight in part.weights(values, part.base(net)).items():
        owner, _, leaf = name.rpartition(".")
        module = net.get_submodule(owner)
        first = part.first_names[name]
        if first not in made:
            made[first] = nn.Parameter(weight.detach().clone())
        delattr(module, leaf)  # a buffer in a BNN
        module.register_parameter(leaf, made[first])
    return net.eval()


def network_tensors(net: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Parameters and buffers of a network that no draw replaces, by their names in the model that was sampled.

    :raises ValueError: as :func:`plain_network`.
    """
    if isinstance(net, BNN):
        return fixed_tensors(net)
    _check_plain(net, layout)
    prefix = _common_prefix(net, layout)
    return {prefix + name: tensor for name, tensor in fixed_tensors(net).items()}


def with_frozen(architecture: nn.Module, layout: Layout, frozen: FrozenTensors | None) -> nn.Module:
    """The network itself, if its frozen tensors are those of the posterior; a copy with the posterior's, if it has
    them.

    :raises ArtifactError: if they differ, and the posterior has digests only.
    :raises ValueError: as :func:`plain_network`.
    """
    if frozen is None:
        return architecture
    found = network_tensors(architecture, layout)
    # A plain network need not be the whole model: only what is inside of it is compared.
    expected = frozen.within(_common_prefix(architecture, layout))
    try:
        expected.check_tensors({name: found[name] for name in expected.read if name in found})
    except ArtifactError:
        values = expected.intact_values()
        if not values:
            raise
        architecture = copy.deepcopy(architecture)
        put_values(network_tensors(architecture, layout), values)
    return architecture


class Ensemble(nn.Module):
    """The average prediction of many networks, as one module; differentiable in its input.

    It may be called from several threads at once. Its networks stay in evaluation mode.

    :param architecture: as for :func:`plain_network`.
    :param layout: the sites.
    :param draws: values ``(S, ...)`` by site.
    :param str link: of :data:`LINKS`: the function of a network's outputs that is averaged. None uses that of the
        likelihood of a BNN.
    :param int chunk_size: networks evaluated together; None: all.
    :raises ValueError: as :func:`plain_network`, or if ``link`` is unknown, or missing for a plain network.
    """

    def __init__(
        self,
        architecture: nn.Module,
        layout: Layout,
        draws: Mapping[str, Tensor],
        *,
        link: str | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.link = check_link(link, architecture)
        self.chunk_size = chunk_size
        self.num_networks = len(next(iter(draws.values())))
        self.net = plain_network(architecture, layout, {n: v[0] for n, v in draws.items()}).requires_grad_(False)
        base, self._part = part_of(architecture, layout)
        self._draws_of = {site: f"draws_{i}" for i, site in enumerate(self._part.shapes(base))}
        for site, buffer in self._draws_of.items():
            self.register_buffer(buffer, draws[site].detach().clone())
        trained = self._part.base(base)
        self._base_of = {name: f"base_{i}" for i, name in enumerate(trained)}
        for name, buffer in self._base_of.items():
            self.register_buffer(buffer, trained[name].detach().clone())
        self._copies = ModuleCopies(self.net)

    def forward(self, x: Any = None, **named: Any) -> Tensor:
        """Average over the networks of their outputs after the link, in the shape of one network's outputs.

        :param x: inputs as of :meth:`~pyro_apd.BNN.forward`, and ``named`` further arguments of the network.
        """
        inputs = NetworkInputs.of(x, named)
        tensors = (*self.net.named_parameters(), *self.net.named_buffers())
        common = {name: tensor for name, tensor in tensors if name not in self._part.first_names}
        stacked = {site: self.get_buffer(buffer) for site, buffer in self._draws_of.items()}
        trained = {name: self.get_buffer(buffer) for name, buffer in self._base_of.items()}
        with self._copies.own() as net:

            def one(values: Mapping[str, Tensor]) -> tuple[Tensor]:
                output = inputs.call(net, {**common, **self._part.weights(values, trained)})
                return (LINKS[self.link](output),)

            (output_S,) = of_all_draws(one, stacked, self.net, self.chunk_size)
        return output_S.mean(0)

    def train(self, mode: bool = True) -> Ensemble:
        """As for any module, but the networks stay in evaluation mode."""
        super().train(mode)
        self.net.eval()
        return self

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"num_networks={self.num_networks}, link={self.link!r}"


def of_all_draws(
    one: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
    values_S: Mapping[str, Tensor],
    network: nn.Module,
    chunk_size: int | None = None,
) -> Sequence[Tensor]:
    """What a function of one draw gives for each of them, stacked.

    :param one: from values by site to tensors.
    :param values_S: draws by site.
    :param network: that the function runs, see :func:`~pyro_apd.runtime.vectorisation.vectorised`.
    :param int chunk_size: draws evaluated together; None: all.
    """

    def together() -> Sequence[Tensor]:
        with warnings.catch_warnings():  # of an operation that vmap does in a loop, as attention
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return torch.vmap(one, chunk_size=chunk_size)(dict(values_S))

    if not torch.compiler.is_exporting():  # vmap of a convolution takes the number of rows for a constant
        found = vectorised(together, network)
        if found is not None:
            return found
    num_draws = len(next(iter(values_S.values())))
    each = [one({name: value[i] for name, value in values_S.items()}) for i in range(num_draws)]
    return [torch.stack(parts) for parts in zip(*each, strict=True)]


def part_of(architecture: nn.Module, layout: Layout) -> tuple[nn.Module, BayesianPart]:
    """A copy of the network, and which of its parameters draws replace or change.

    :raises ValueError: as :func:`plain_network`.
    """
    if isinstance(architecture, BNN):
        with one_thread():  # a run of the model sets the weights of its network for a while
            net = copy.deepcopy(architecture.net)
        part = architecture.part
    else:
        _check_plain(architecture, layout)
        net = copy.deepcopy(architecture)
        first: dict[int, str] = {}
        named = [(n, p) for n, p in net.named_parameters(remove_duplicate=False) if p.requires_grad]
        names = {name: first.setdefault(id(parameter), name) for name, parameter in named}
        part = BayesianPart(names, prefix=_prefix(set(names.values()), layout))
    for site, shape in part.shapes(net).items():
        if site not in layout.names or layout[site].shape != shape:
            has = f"of shape {layout[site].shape}" if site in layout.names else "missing"
            name = next((name for name, of_name in part.sites.items() if of_name == site), site)
            raise ValueError(
                f"net has another architecture: parameter '{name}' has shape {shape}, site '{site}' is {has}. The "
                f"posterior draws {layout!r}."
            )
    return net, part


def _check_plain(net: nn.Module, layout: Layout) -> None:
    if not isinstance(net, nn.Module) or any(isinstance(module, PyroModule) for module in net.modules()):
        raise ValueError(
            f"net must be a pyro_apd.BNN, or a torch.nn.Module without PyroModules whose parameters have the names of "
            f"the sites {list(layout.names)}; got {type(net).__name__}."
        )


def _common_prefix(net: nn.Module, layout: Layout) -> str:
    """The prefix of names of the model within a network: of a BNN, which is the whole model, none."""
    if isinstance(net, BNN):
        return ""
    return _prefix({name for name, parameter in net.named_parameters() if parameter.requires_grad}, layout)


def _prefix(names: set[str], layout: Layout) -> str:
    """The common prefix of the sites before the names of the parameters, such as '' or 'net.'."""
    if not names:
        raise ValueError(
            "net has no trainable parameters, so there is nothing to draw. Set requires_grad=True on some."
        )
    example = min(names)
    for site in layout.names:
        prefix = site.removesuffix(example)
        if site.endswith(example) and all(prefix + name in layout.names for name in names):
            return prefix
    raise ValueError(
        f"net has parameters {sorted(names)}, which are not the sites {list(layout.names)}, with or without a common "
        "prefix. Pass a network with the architecture of the posterior."
    )


def check_link(link: str | None, architecture: nn.Module) -> str:
    """``link``, or that of the likelihood of a BNN.

    :raises ValueError: if it is unknown, or missing for a plain network.
    """
    if link is None and isinstance(architecture, BNN):
        link = architecture.link
        if link is None:
            raise ValueError(
                f"The outputs of a network with likelihood '{architecture.likelihood}' alone do not give its "
                "predictions. Pass link='identity' to average the outputs, or use pyro_apd.outputs."
            )
    if link not in LINKS:
        raise ValueError(
            f"link={link!r} must be one of {', '.join(map(repr, LINKS))}: the function of the outputs that is averaged "
            "over networks. None is for a pyro_apd.BNN; a plain network does not say whether its outputs are logits."
        )
    return link
