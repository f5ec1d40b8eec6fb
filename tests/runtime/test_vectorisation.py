# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Which errors under vmap are vmap's, and which are the model's own; what is said of them, and how often."""

import functools
import gc
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pyro_apd.errors import ModelError
from pyro_apd.runtime import vectorisation
from pyro_apd.runtime.vectorisation import log_one_by_one, vectorised

DRAWS_S3 = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])


class Doubled(torch.autograd.Function):
    """A function without a rule for vmap."""

    @staticmethod
    def forward(ctx, value):
        return 2 * value

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def branches(value):
    return value if value.sum() > 0 else -value


def writes_to_a_captured_tensor(value):
    return torch.zeros(3).add_(value)


def writes_to_an_entry(value):
    total = torch.zeros(3)
    total[0] = value[0]
    return total


def has_no_batching_rule(value):
    return nn.functional.relu(torch._VF.gru_cell(torch.ones(1, 3), torch.ones(1, 1), *weights_of(value)))[0]


def weights_of(value):
    return value.expand(3, 3), torch.ones(3, 1)


def leaves_torch(value):
    return torch.as_tensor(np.asarray(value))


def copies(value):
    return torch.ones(3) * value.tolist()[0]


def depends_in_shape(value):
    return torch.repeat_interleave(torch.ones(3), value.abs().long()).sum()


def draws_other_random_numbers(value):
    return torch.zeros(3).normal_()


LIMITS = [
    branches,
    writes_to_a_captured_tensor,
    writes_to_an_entry,
    has_no_batching_rule,
    leaves_torch,
    copies,
    depends_in_shape,
    draws_other_random_numbers,
    Doubled.apply,
]


def mapped(model):
    return lambda: torch.vmap(model, randomness="different")(DRAWS_S3)


def once(model, error, at=1):
    """A model that raises an error in one of its calls."""
    calls = []

    @functools.wraps(model)
    def failing(value):
        calls.append(value)
        if len(calls) == at:
            raise error
        return model(value)

    return failing


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_result_is_returned_and_nothing_is_said(caplog):
    assert torch.equal(vectorised(mapped(torch.neg), torch.neg), -DRAWS_S3)
    assert not messages(caplog)


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: getattr(limit, "__qualname__", str(limit)))
def test_what_vmap_cannot_do_is_said_once_for_each_model(limit, caplog):
    calls = []

    def model(value):
        calls.append(value)
        return limit(value)

    for _ in range(3):
        assert vectorised(mapped(model), model) is None
    with pytest.raises(Exception, match=r".") as caught:
        mapped(model)()
    reason = str(caught.value).strip().splitlines()[0]
    assert messages(caplog) == [f"Evaluating draws one by one, which is slower: {reason}"]
    assert len(calls) == 3 + 2, "after the first failure, another attempt tells vmap's errors; later ones need none"


@pytest.mark.parametrize(
    "error", [RuntimeError("my own"), ValueError("my own"), IndexError("my own"), KeyError("my own")], ids=repr
)
@pytest.mark.parametrize(
    ("model", "at"), [(torch.neg, 1), (branches, 1), (branches, 2), (has_no_batching_rule, 1), (depends_in_shape, 2)]
)
def test_an_error_that_does_not_come_again_is_the_models_own(model, at, error, caplog):
    failing = once(model, error, at)
    with pytest.raises(type(error), match="my own") as caught:
        vectorised(mapped(failing), failing)
    assert caught.value is error
    assert caught.traceback[-1].name == "failing"
    assert not messages(caplog)


def test_an_error_of_torch_that_does_not_come_again_is_the_models_own():
    sizes = iter([4, 3, 3])

    def model(value):
        return value @ torch.ones(next(sizes))

    with pytest.raises(RuntimeError, match="size"):
        vectorised(mapped(model), model)


def test_the_models_own_error_in_a_later_call_is_not_hidden_by_what_is_known(caplog):
    failing = once(branches, RuntimeError("my own"), at=4)
    for _ in range(2):
        assert vectorised(mapped(failing), failing) is None
    with pytest.raises(RuntimeError, match="my own"):
        vectorised(mapped(failing), failing)
    assert len(messages(caplog)) == 1


@pytest.mark.parametrize("at", [1, 2])
def test_a_model_error_is_raised_at_once(at):
    calls = []

    def model(value):
        calls.append(value)
        if len(calls) == at:
            raise ModelError("as written")
        return branches(value)

    with pytest.raises(ModelError, match="as written"):
        vectorised(mapped(model), model)
    assert len(calls) == at


def test_each_model_and_each_kind_of_item_has_a_line_of_its_own(caplog):
    one, other = (functools.partial(limit) for limit in (branches, branches))
    for model, items in [(one, "draws"), (other, "draws"), (one, "blocks"), (one, "draws"), (other, "draws")]:
        assert vectorised(mapped(model), model, items) is None
    assert [message.split()[1] for message in messages(caplog)] == ["draws", "draws", "blocks"]


def test_a_wrapper_and_a_bound_method_count_as_what_they_call(caplog):
    class Network(nn.Module):
        def forward(self, value):
            return branches(value)

    def wrapper():
        outer = functools.partial(network)
        outer.__wrapped__ = network
        return outer

    network = Network()
    for model in (network, network.forward, wrapper(), wrapper()):
        assert vectorised(mapped(model), model) is None
    assert len(messages(caplog)) == 1


class Passing(TorchFunctionMode):
    """Sees each operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_mode_that_sees_operations_makes_no_difference(caplog):
    model = functools.partial(has_no_batching_rule)
    assert vectorised(mapped(model), model) is None
    with Passing():
        assert vectorised(mapped(model), model) is None
    assert len(messages(caplog)) == 1


def test_a_model_that_cannot_be_remembered_is_evaluated_all_the_same(caplog):
    class Unhashable:
        __hash__ = None

        def __call__(self, value):
            return branches(value)

    model = Unhashable()
    for _ in range(2):
        assert vectorised(mapped(model), model) is None
    assert len(messages(caplog)) == 2


def test_models_are_not_kept_alive():
    gc.collect()
    before = len(vectorisation._KNOWN)
    model = functools.partial(branches)
    assert vectorised(mapped(model), model) is None
    assert len(vectorisation._KNOWN) == before + 1
    del model
    gc.collect()
    assert len(vectorisation._KNOWN) <= before


def test_an_error_without_a_text_is_named_by_its_type(caplog):
    with caplog.at_level(logging.WARNING, logger="pyro_apd"):
        log_one_by_one(NotImplementedError())
    assert messages(caplog) == ["Evaluating draws one by one, which is slower: NotImplementedError"]
