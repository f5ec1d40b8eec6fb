# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which parameters and buffers a model reads beside its latents, and whether another model has the same."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_apd.errors import ArtifactError
from pyro_apd.models import frozen
from pyro_apd.models.bnn import BNN
from pyro_apd.models.frozen import FrozenTensors, digest, fixed_tensors, named_tensors, put_values, reading
from pyro_apd.runtime.global_state import preserved_param_store

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = X[:, 0]


def linear(seed, *sizes):
    layer = nn.Linear(*(sizes or (3, 4)))
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def last_layer(seed, head_seed=0):
    """A network with a frozen layer, and batch normalisation, before the last."""
    net = nn.Sequential(linear(seed), nn.BatchNorm1d(4), nn.ReLU(), linear(head_seed, 4, 1))
    net[0].requires_grad_(False)
    return net


class Head(PyroModule):
    """A backbone that nobody froze by name, a layer that is not used, and a buffer that only predictions use."""

    def __init__(self, seed, spare=0, scale=2.0):
        super().__init__()
        self.backbone = linear(seed)
        self.spare = linear(spare)
        self.register_buffer("scale", torch.tensor(scale))
        self.head = PyroModule[nn.Linear](4, 1)
        self.head.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))
        self.head.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.head(self.backbone(x)).squeeze(-1)
        if y is None:
            mean = mean * self.scale
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


def of_placeholders(backbone, head):
    """A function whose latents replace the parameters of ``head``, of which it takes the shapes."""

    def model(x, y=None):
        weights = {
            name: pyro.sample(name, dist.Normal(torch.zeros_like(p), 1.0).to_event(p.dim()))
            for name, p in head.named_parameters()
        }
        mean = torch.func.functional_call(head, weights, (backbone(x),)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    return model


def weighted(features, x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(features(x) @ w, 1.0), obs=y)


def of_list(layers):
    return lambda x, y=None: weighted(lambda x: layers[0](x), x, y)


first, second = linear(1), linear(2)


def of_a_global(x, y=None):
    return weighted(lambda x: torch.vmap(lambda row: first(row))(x), x, y)


def of_another_global(x, y=None):
    return weighted(lambda x: torch.vmap(lambda row: second(row))(x), x, y)


class Service:
    """A model as a method of an object."""

    def __init__(self, backbone):
        self.backbone = backbone

    def model(self, x, y=None):
        return weighted(self.backbone, x, y)


def known(model, *args):
    with preserved_param_store():
        sites = [n for n, _ in poutine.trace(model).get_trace(*args).iter_stochastic_nodes()]
    return FrozenTensors.of(model, sites, args)


def check(expected, model, *args):
    with preserved_param_store(), poutine.block(), reading(model) as read:
        model(*args)
    expected.check(model, read)


PAIRS = {
    "BNN": (lambda: BNN(last_layer(1), "gaussian"), lambda: BNN(last_layer(2), "gaussian"), "net.0.weight"),
    "PyroModule": (lambda: Head(1), lambda: Head(2), "backbone.weight"),
    "function": (
        lambda: of_placeholders(linear(1), linear(0, 4, 1)),
        lambda: of_placeholders(linear(2), linear(0, 4, 1)),
        "backbone.weight",
    ),
    "wrapped": (lambda: poutine.scale(Head(1), scale=2.0), lambda: poutine.scale(Head(2), scale=2.0), "backbone.bias"),
    "partial": (lambda: functools.partial(weighted, linear(1)), lambda: functools.partial(weighted, linear(2)), "bias"),
    "list": (lambda: of_list([linear(1)]), lambda: of_list([linear(2)]), "weight"),
    "global": (lambda: of_a_global, lambda: of_another_global, "weight"),
    "method": (lambda: Service(linear(1)).model, lambda: Service(linear(2)).model, "weight"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_another_backbone_is_refused_and_the_same_is_not(name):
    make, make_other, tensor = PAIRS[name]
    expected = known(make(), X, Y)
    assert tensor in expected.read
    for args in ((X, Y), (X,)):
        check(expected, make(), *args)
        with pytest.raises(ArtifactError, match=rf"other frozen weights.*'{tensor}', float32 \[.*holds other numbers"):
            check(expected, make_other(), *args)


def test_what_latents_replace_does_not_count():
    expected = known(of_placeholders(linear(1), linear(3, 4, 1)), X, Y)
    assert set(expected.read) == {"backbone.weight", "backbone.bias"}
    assert not expected.unread
    check(expected, of_placeholders(linear(1), linear(4, 4, 1)), X, Y)
    check(known(BNN(last_layer(1, 3), "gaussian"), X, Y), BNN(last_layer(1, 4), "gaussian"), X, Y)


def test_what_is_not_read_does_not_count_but_a_buffer_that_only_predictions_read_does():
    expected = known(Head(1), X, Y)
    assert set(expected.read) == {"backbone.weight", "backbone.bias"}
    check(expected, Head(1, spare=5), X)
    check(expected, Head(1, scale=3.0), X, Y)
    with pytest.raises(ArtifactError, match=r"'scale', float32 \[\], holds other numbers"):
        check(expected, Head(1, scale=3.0), X)


def test_statistics_of_batch_normalisation_count_and_its_counter_does_not():
    net = last_layer(1)
    expected = known(BNN(net, "gaussian"), X, Y)
    net[1].num_batches_tracked += 1
    check(expected, BNN(net, "gaussian"), X, Y)
    assert set(fixed_tensors(BNN(net))) == set(expected.read)
    net[1].running_mean += 0.1
    with pytest.raises(ArtifactError, match=r"'net\.1\.running_mean'"):
        check(expected, BNN(net, "gaussian"), X, Y)


def test_frozen_tensors_that_one_of_the_models_lacks():
    without = functools.partial(weighted, lambda x: torch.cat([x, x[:, :1]], 1))
    with pytest.raises(ArtifactError, match=r"'weight', float32 \[4, 3\], was not there"):
        check(known(without, X, Y), functools.partial(weighted, linear(1)), X)
    with pytest.raises(ArtifactError, match="'weight' is missing"):
        check(known(functools.partial(weighted, linear(1)), X, Y), without, X)


def test_a_module_and_a_function_around_it_have_the_same_names():
    head = Head(1)

    def model(x, y=None):
        return head(x, y)

    assert named_tensors(model).keys() == named_tensors(head).keys()
    two = named_tensors(of_placeholders(linear(1), linear(2, 4, 1)))
    assert set(two) == {"backbone.weight", "backbone.bias", "head.weight", "head.bias"}


def test_a_model_that_cannot_be_run_is_not_known_and_draws_nothing():
    assert FrozenTensors.of(Head(1), ["head.weight"], ("nonsense",)) is None
    assert FrozenTensors.of(Head(1), ["head.weight"]) is None
    assert set(FrozenTensors.of(BNN(last_layer(1), "gaussian"), []).read) == set(fixed_tensors(BNN(last_layer(1))))
    model, before = Head(1), torch.get_rng_state()
    FrozenTensors.of(model, ["head.weight", "head.bias"], (X, Y))
    assert not list(pyro.get_param_store().keys())
    assert torch.equal(torch.get_rng_state(), before)


def test_without_dispatch_modes_of_torch_nothing_is_read(monkeypatch):
    """They are not torch's public interface; should they move, this says so."""
    assert frozen._recorder() is not None
    monkeypatch.setattr(frozen, "_recorder", lambda: None)
    assert known(Head(1), X, Y).read == {}


def test_no_batch_is_taken_from_the_loader_of_a_run():
    """It would change which batches the run gets."""
    taken = []

    class Batches:
        def __iter__(self):
            taken.append(1)
            return iter([(X, Y)])

    assert FrozenTensors.of_run(Head(1), [], (Batches(),), {}, num_data=6) is None
    assert set(FrozenTensors.of_run(BNN(last_layer(1), "gaussian"), [], (Batches(),), {}, num_data=6).read) == set(
        fixed_tensors(BNN(last_layer(1)))
    )
    assert not taken
    assert set(FrozenTensors.of_run(Head(1), ["head.weight", "head.bias"], (X, Y), {}).read) == {
        "backbone.weight",
        "backbone.bias",
    }


def test_torch_does_not_import_its_compiler_for_it():
    """Torch wraps the method in one that does, unless the class says otherwise, which is not its public interface."""
    assert not hasattr(frozen._recorder().__torch_dispatch__, "__wrapped__")


def test_a_digest_is_of_dtype_shape_and_numbers():
    value = torch.arange(6.0)
    assert digest(value) == digest(value.clone()) == digest(torch.stack([value, value], 1)[:, 0])
    assert len({digest(v) for v in (value, value.double(), value.reshape(2, 3), value + 1, value[:0])}) == 5
    assert digest(torch.zeros((), dtype=torch.bool)) != digest(torch.ones((), dtype=torch.bool))


def test_digests_of_large_tensors_are_remembered_until_they_change(monkeypatch):
    value = nn.Parameter(torch.zeros(2**18))
    computed = []
    monkeypatch.setattr(frozen, "_digest", lambda tensor: computed.append(tensor) or str(len(computed)))
    assert [digest(value), digest(value)] == ["1", "1"]
    with torch.no_grad():
        value[7] = 1.0
    assert digest(value) == "2"
    value.data.fill_(3.0)
    assert digest(value) == "3"
    value.data = value.data.clone()
    assert digest(value) == "4"
    key = id(value)
    assert key in frozen._KNOWN
    del value
    computed.clear()
    assert key not in frozen._KNOWN


def test_values_are_put_all_or_none():
    net = linear(1)
    values = {name: tensor.detach().clone() for name, tensor in linear(2).named_parameters()}
    put_values(dict(net.named_parameters()), values)
    assert torch.equal(net.weight, values["weight"])
    for wrong in ({"bias": torch.zeros(5)}, {"bias": torch.zeros(4).double()}, {"other": torch.zeros(4)}):
        with pytest.raises(ArtifactError, match="do not fit"):
            put_values(dict(net.named_parameters()), {"weight": torch.zeros(4, 3), **wrong})
    assert torch.equal(net.weight, values["weight"])


def test_values_that_changed_since_are_not_given():
    model = Head(1)
    expected = known(model, X, Y)
    assert set(expected.intact_values()) == {"backbone.weight", "backbone.bias"}
    model.backbone.weight.data += 1
    assert expected.intact_values() == {}


@pytest.mark.parametrize("description", [None, [], {}, {"read": {}}, {"read": {"a": 1}, "unread": {}}])
def test_malformed_descriptions(description):
    with pytest.raises(ValueError, match="two tables of digests"):
        FrozenTensors.from_json(description)


def test_many_differences_make_a_short_message():
    expected = FrozenTensors({f"layer.{i}." + "x" * 300: "0" for i in range(500)})
    with pytest.raises(ArtifactError, match="other frozen weights") as caught:
        expected.check_tensors({})
    assert len(str(caught.value)) < 1000
