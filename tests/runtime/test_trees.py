# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What is relied on of torch's functions for nested arguments, which are not public, or of what takes their place."""

import importlib
import sys
import types
from collections import OrderedDict, namedtuple

import pytest
import torch

from pyro_apd.data.arguments import argument_name
from pyro_apd.runtime import trees

Pair = namedtuple("Pair", ["left", "right"])


def test_leaves_come_in_the_order_of_arguments_and_of_keys():
    nested = ((1, [2, None]), {"b": 3, "a": Pair(4, OrderedDict(z=5, y=6))})
    assert trees.tree_leaves(nested) == [1, 2, None, 3, 4, 5, 6]
    leaves, spec = trees.tree_flatten(nested)
    assert leaves == trees.tree_leaves(nested)
    assert trees.tree_unflatten([str(leaf) for leaf in leaves], spec) == (
        ("1", ["2", "None"]),
        {"b": "3", "a": Pair("4", OrderedDict(z="5", y="6"))},
    )


def test_paths_are_named_as_errors_name_them():
    paths = [path for path, _ in trees.tree_flatten_with_path(((1, [2]), {"key": {"deep": 3}}))[0]]
    assert [argument_name(path) for path in paths] == ["#0", "#1[0]", "'key'['deep']"]


def test_tensors_and_arrays_are_leaves():
    x = torch.zeros(2, 2)
    assert trees.tree_leaves((x, {"y": x.numpy()}))[0] is x
    assert len(trees.tree_leaves((x, {"y": x.numpy()}))) == 2


@pytest.fixture
def reloaded():
    yield lambda: importlib.reload(trees)
    importlib.reload(trees)


def test_the_public_module_is_taken_where_there_is_one(reloaded, monkeypatch):
    public = types.ModuleType("torch.utils.pytree")
    for name in trees.__all__:
        setattr(public, name, object())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.pytree", public)
        patch.setattr(torch.utils, "pytree", public, raising=False)
        assert reloaded().tree_leaves is public.tree_leaves


def test_without_it_the_private_one_is(reloaded, monkeypatch):
    from torch.utils import _pytree

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.pytree", None)
        assert reloaded().tree_leaves is _pytree.tree_leaves
