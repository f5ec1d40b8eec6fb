# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A draw is the network with some inputs of its layers left out, and nothing else."""

import itertools
import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_apd.generators import DropoutGenerator, build_generator


def of(net, layers, rate=0.5):
    generator = DropoutGenerator(sum(p.numel() for p in net.parameters()), layers, rate)
    with torch.no_grad():
        generator.weights.copy_(torch.cat([p.flatten() for p in net.parameters()]))
    return generator


def with_weights(net, theta_D):
    weights, start = {}, 0
    for name, parameter in net.named_parameters():
        weights[name] = theta_D[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return lambda x: torch.func.functional_call(net, weights, (x,))


def test_a_draw_is_dropout_of_hidden_units():
    net, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(7, 3)
    generator = of(net, [(20, 2, 5, 1)], rate=0.3)
    latent_SL = torch.randn(6, 5)
    for theta_D, latent_L in zip(generator(latent_SL), latent_SL, strict=True):
        is_kept_L = torch.special.ndtr(latent_L) >= 0.3
        assert_close(with_weights(net, theta_D)(x), net[2](torch.relu(net[0](x)) * is_kept_L / 0.7))


def test_all_masks_average_to_what_a_dropout_layer_averages_to():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    generator = of(net, [(16, 2, 4, 1)])
    latent_SL = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)))
    mean = torch.stack([with_weights(net, theta)(x).softmax(-1) for theta in generator(latent_SL)]).mean(0)
    hidden = nn.functional.dropout(torch.relu(net[0](x)).expand(20_000, 5, 4), 0.5)
    assert_close(mean, net[2](hidden).softmax(-1).mean(0), atol=0.02, rtol=0)


def test_channels_of_a_convolution_are_dropped_whole():
    net, x = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2)), torch.randn(4, 1, 5, 5)
    generator = of(net, [(15, 2, 3, 4)])
    theta_SD = generator(torch.tensor([[1.0, -1.0, 1.0]]))
    hidden = torch.relu(net[0](x)) * torch.tensor([2.0, 0.0, 2.0])[:, None, None]
    assert_close(with_weights(net, theta_SD[0])(x), net[2](hidden))


def test_units_are_dropped_at_the_rate_given():
    generator = DropoutGenerator(400, [(0, 2, 200, 1)], rate=0.2)
    with torch.no_grad():
        generator.weights.fill_(1.0)
    dropped = (generator(torch.randn(200, 200)) == 0).double().mean()
    assert dropped.item() == pytest.approx(0.2, abs=0.01)


def test_config_and_state_rebuild_the_generator():
    original = of(nn.Linear(3, 2), [(0, 2, 3, 1)], rate=0.25)
    rebuilt = build_generator(json.loads(json.dumps(original.config)))
    rebuilt.load_state_dict(original.state_dict())
    latent_SL = torch.randn(6, original.latent_size)
    assert torch.equal(rebuilt(latent_SL), original(latent_SL))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": []}, "at least one layer"),
        ({"layers": [[0, 2, 3]]}, r"must be \(start, rows, units, repeats\)"),
        ({"layers": [[0, 2, 3.0, 1]]}, "must be"),
        ({"layers": [[0, 0, 3, 1]]}, "must be"),
        ({"layers": [[2, 2, 3, 1]]}, "reaches beyond the 7"),
        ({"layers": [[0, 1, 3, 1], [2, 1, 3, 1]]}, "must not overlap"),
        ({"layers": [[3, 1, 3, 1], [0, 1, 3, 1]]}, "must be in order"),
        ({"layers": [[0, 2, 3, 1]], "rate": 1.0}, "rate=1.0"),
        ({"layers": [[0, 2, 3, 1]], "rate": True}, "rate=True"),
        ({"layers": [[0, 2, 3, 1]], "width": 3}, "not those of a 'dropout' generator"),
    ],
)
def test_settings_that_describe_no_generator(settings, message):
    with pytest.raises(ValueError, match=message):
        build_generator({"kind": "dropout", "output_size": 7, **settings})
