# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior beside a network with other frozen weights is refused, or has them in its file."""

import copy

import pytest
import torch
from torch import nn

from pyro_apd.errors import ArtifactError
from pyro_apd.generators import LowRankGenerator
from pyro_apd.models.bnn import BNN
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.predictive import Predictive, outputs

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3
REFUSED = r"other frozen weights.*'net\.0\.(weight|bias)'"


def network(seed, norm=False):
    """A frozen layer, and one that is not; the second is at zero."""
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 3))
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data.normal_(generator=generator)
    net[0].requires_grad_(False)
    return net.eval()


@pytest.fixture
def saved(tmp_path):
    """A posterior of ``BNN(network(1))``, and its two files."""
    bnn = BNN(network(1))
    layout = Layout({"net.2.weight": (3, 4), "net.2.bias": (3,)})
    generator = LowRankGenerator(layout.size, 2)
    values = torch.Generator().manual_seed(0)
    for parameter in generator.parameters():
        parameter.data.normal_(generator=values)
    posterior = DistilledPosterior(layout, generator, frozen=FrozenTensors.of(bnn, layout.names, (X, Y)))
    posterior.save(tmp_path / "digests")
    posterior.save(tmp_path / "whole", frozen=True, dtype="float16")
    return posterior, tmp_path / "digests", tmp_path / "whole"


def probabilities(posterior, model):
    reduced = Predictive(model, guide=posterior, num_samples=20, reduce=("mean_probability",))
    torch.manual_seed(0)
    return reduced(X)["mean_probability"]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_own_network_is_accepted_and_another_is_refused(saved, which):
    posterior = saved[which] if which == 0 else DistilledPosterior.load(saved[which])
    own, other = BNN(network(1)), BNN(network(2))
    posterior.check_model(own, X, Y)
    assert Predictive(own, guide=posterior, num_samples=3)(X)["obs"].shape == (3, 8)
    assert outputs(own, posterior.stream(3), X).probs_SNK.shape == (3, 8, 3)
    for attempt in (
        lambda: posterior.check_model(other, X, Y),
        lambda: posterior.check_model(other, X),
        lambda: Predictive(other, guide=posterior, num_samples=3)(X),
        lambda: probabilities(posterior, other),
        lambda: outputs(other, posterior.stream(3), X),
    ):
        with pytest.raises(ArtifactError, match=REFUSED) as caught:
            attempt()
        assert len(str(caught.value)) < 1000


def test_networks_are_refused_where_the_file_has_digests_only(saved):
    posterior = DistilledPosterior.load(saved[1])
    for own, other in ((network(1), network(2)), (BNN(network(1)), BNN(network(2)))):
        assert posterior.network(net=own)(X).shape == (8, 3)
        for attempt in (
            lambda other=other: posterior.network(net=other),
            lambda other=other: posterior.ensemble(3, net=other, link="softmax"),
            lambda other=other: posterior.bind(other),
        ):
            with pytest.raises(ArtifactError, match=REFUSED):
                attempt()
    net = network(1)
    posterior.bind(net)
    net[0].weight.data += 1
    with pytest.raises(ArtifactError, match=REFUSED):
        posterior.network()


def test_networks_get_the_weights_of_the_file_where_it_has_them(saved):
    whole, other = DistilledPosterior.load(saved[2]), network(2)
    before = copy.deepcopy(other.state_dict())
    expected = whole.ensemble(5, net=network(1), link="softmax", seed=0)(X)
    for net in (other, BNN(other)):
        assert torch.equal(whole.ensemble(5, net=net, link="softmax", seed=0)(X), expected)
        made = whole.network(net=net)
        assert torch.equal(made[0].weight, network(1)[0].weight)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_frozen_weights_are_put_into_a_model(saved):
    whole = DistilledPosterior.load(saved[2])
    bnn, net = BNN(network(2)), network(2)
    expected = probabilities(whole, BNN(network(1)))
    whole.load_frozen(bnn)
    whole.load_frozen(net)
    assert torch.equal(probabilities(whole, bnn), expected)
    assert torch.equal(net[0].weight, network(1)[0].weight)
    assert torch.equal(net[2].weight, network(2)[2].weight)
    with pytest.raises(ArtifactError, match=r"'net\.0\.bias'.* do not fit: the model does not have it"):
        whole.load_frozen(nn.Linear(4, 3))
    with pytest.raises(ArtifactError, match=r"save\(path, frozen=True\)"):
        DistilledPosterior.load(saved[1]).load_frozen(bnn)


def test_frozen_weights_survive_rounding_and_saving_again(saved, tmp_path):
    whole = DistilledPosterior.load(saved[2])
    whole.save(tmp_path / "again", frozen=True)
    assert (tmp_path / "again").read_bytes() == saved[2].read_bytes()
    assert whole.rounded("float16").frozen == whole.frozen
    assert whole.num_bytes < saved[2].stat().st_size


def test_weights_that_are_not_at_hand_cannot_be_saved(saved, tmp_path):
    with pytest.raises(ValueError, match="frozen=True: the frozen weights of the model are not known here"):
        DistilledPosterior.load(saved[1]).save(tmp_path / "p", frozen=True)
    posterior, *_ = saved
    posterior.frozen.values["net.0.weight"].add_(1)
    with pytest.raises(ValueError, match="or have changed since"):
        posterior.save(tmp_path / "p", frozen=True)
    posterior.save(tmp_path / "p")
    with pytest.raises(ValueError, match="frozen='yes' must be True or False"):
        posterior.save(tmp_path / "p", frozen="yes")


def test_a_posterior_that_knows_no_model_is_not_checked(saved, tmp_path):
    posterior, *_ = saved
    alone = DistilledPosterior(posterior.layout, posterior.generator)
    alone.save(tmp_path / "p")
    loaded = DistilledPosterior.load(tmp_path / "p")
    assert loaded.frozen is None
    loaded.check_model(BNN(network(2)), X, Y)
    loaded.network(net=network(2))
    with pytest.raises(ArtifactError, match="does not hold frozen weights"):
        loaded.load_frozen(network(2))


def test_a_model_without_frozen_weights(tmp_path):
    bnn = BNN(nn.Linear(5, 3))
    layout = Layout({"net.weight": (3, 5), "net.bias": (3,)})
    frozen = FrozenTensors.of(bnn, layout.names, (X, Y))
    assert frozen.read == {}
    posterior = DistilledPosterior(layout, LowRankGenerator(layout.size, 2), frozen=frozen)
    posterior.save(tmp_path / "p", frozen=True)
    loaded = DistilledPosterior.load(tmp_path / "p")
    loaded.check_model(BNN(nn.Linear(5, 3)), X, Y)
    loaded.network(net=nn.Linear(5, 3))
    other = nn.Linear(5, 3)
    before = [parameter.clone() for parameter in other.parameters()]
    loaded.load_frozen(other)
    assert all(map(torch.equal, other.parameters(), before))
