# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Batch normalisation, which makes a prediction depend on the rest of its batch, replaced by group normalisation."""

from __future__ import annotations

from torch import nn

#: The layers that are replaced.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

# Wu & He (2018) find 32 groups as good as batch statistics; groups of too few channels carry little information.
_MAX_GROUPS, _MIN_CHANNELS = 32, 4


def with_group_norm(net: nn.Module) -> nn.Module:
    """Replaces each batch normalisation in ``net``, in place, by group normalisation (Wu & He, ECCV 2018).

    A layer of C channels gets the largest number of groups that divides C, is at most 32, and leaves at least 4
    channels per group; one group where there is no such number. Scale and shift keep their names and values, and the
    number of parameters stays the same.

    :param net: a network; it is changed.
    :returns: the network, or its replacement if it is a batch normalisation itself.
    """
    if isinstance(net, BATCH_NORMS):
        return _group_norm(net)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BATCH_NORMS):
                setattr(module, name, _group_norm(child))
    return net


def num_groups(num_channels: int) -> int:
    """Number of groups that :func:`with_group_norm` chooses for a number of channels."""
    possible = range(1, min(_MAX_GROUPS, num_channels // _MIN_CHANNELS) + 1)
    return max((count for count in possible if num_channels % count == 0), default=1)


def _group_norm(layer: nn.Module) -> nn.GroupNorm:
    assert isinstance(layer, BATCH_NORMS)
    norm = nn.GroupNorm(num_groups(layer.num_features), layer.num_features, layer.eps, layer.affine)
    if layer.affine:
        norm.weight, norm.bias = layer.weight, layer.bias
    return norm.train(layer.training)
