# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Batch normalisation, under which a prediction depends on its neighbours, replaced by normalisation of each datum."""

from __future__ import annotations

from torch import nn

#: What is replaced.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# Wu & He (2018) find 32 groups as good as batch statistics; groups of fewer channels than this say little of a datum.
_MAX_GROUPS, _MIN_CHANNELS = 32, 4


def with_group_norm(net: nn.Module) -> nn.Module:
    """Replaces each batch normalisation in ``net``, in place, by group normalisation (Wu & He, ECCV 2018).

    A layer of C channels gets the largest number of groups that divides C, is at most 32, and leaves 4 channels and
    more to each; one group where there is none. Scale and shift keep their names and values, and there are as many
    parameters as before.

    :param net: a network; it is changed.
    :returns: the network, or what stands in its place where it was itself a batch normalisation.
    """
    if isinstance(net, BATCH_NORMS):
        return _group_norm(net)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BATCH_NORMS):
                setattr(module, name, _group_norm(child))
    return net


def num_groups(num_channels: int) -> int:
    """Groups for so many channels, as :func:`with_group_norm` chooses them."""
    possible = range(1, min(_MAX_GROUPS, num_channels // _MIN_CHANNELS) + 1)
    return max((count for count in possible if num_channels % count == 0), default=1)


def _group_norm(layer: nn.Module) -> nn.GroupNorm:
    assert isinstance(layer, BATCH_NORMS)
    norm = nn.GroupNorm(num_groups(layer.num_features), layer.num_features, layer.eps, layer.affine)
    if layer.affine:
        norm.weight, norm.bias = layer.weight, layer.bias
    return norm.train(layer.training)
