# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Copies of a module that threads have to themselves."""

import copy
import pickle

from torch import nn

from pyro_apd.models.module_copies import ModuleCopies


def test_copies_share_tensors_and_are_used_again():
    module = nn.Linear(2, 3)
    copies = ModuleCopies(module)
    with copies.own() as first, copies.own() as second:
        assert len({id(module), id(first), id(second)}) == 3
        assert first.weight is module.weight
        assert second.bias is module.bias
    with copies.own() as third:
        assert third in (first, second)


def test_a_copy_of_the_owner_has_copies_of_its_own():
    owner = nn.Module()
    owner.net = nn.Linear(2, 3)
    owner.copies = ModuleCopies(owner.net)
    with owner.copies.own():
        pass
    for other in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        with other.copies.own() as net:
            assert net.weight is other.net.weight
            assert net.weight is not owner.net.weight
