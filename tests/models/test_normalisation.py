# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import nn

from pyro_apd.models.normalisation import num_groups, with_group_norm


@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (3, 1), (4, 1), (7, 1), (8, 2), (16, 4), (32, 8), (48, 12), (64, 16), (512, 32)]
)
def test_groups_divide_the_channels(channels, groups):
    assert num_groups(channels) == groups


def test_layers_at_any_depth_are_replaced_and_keep_their_parameters():
    inner = nn.Sequential(nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8))
    net = nn.Sequential(inner, nn.BatchNorm2d(8, affine=False), nn.ReLU())
    scale, names = inner[1].weight, [name for name, _ in net.named_parameters()]
    assert with_group_norm(net) is net
    assert [type(module) for module in net.modules()].count(nn.GroupNorm) == 2
    assert inner[1].weight is scale
    assert [name for name, _ in net.named_parameters()] == names
    assert net[1].weight is None
    x = torch.randn(5, 2, 3, 3)
    torch.testing.assert_close(net(x)[:2], net(x[:2]))


def test_a_layer_by_itself():
    norm = with_group_norm(nn.BatchNorm1d(12, eps=0.5).eval())
    assert isinstance(norm, nn.GroupNorm)
    assert norm.eps == 0.5
    assert not norm.training
