# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Compiled steps are the same steps.

Compiling takes ten seconds. Only what depends on the compiler compiles; elsewhere captured programs run as they are.
"""

import logging

import pytest
import torch
from torch.utils._pytree import tree_structure, tree_unflatten
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.kernels import PSGLD, SGHMC, SGLD
from pyro_apd.kernels.engine import step as step_module
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.step import compiled
from tests.support.models import Classifier, Conjugate

X, LABELS = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3


@pytest.fixture(autouse=True)
def _calls_stay_in_python(monkeypatch):
    """Compiling them too takes twice as long, and has a test of its own."""
    monkeypatch.setattr(step_module, "SMALL", 0)


@pytest.fixture
def programs_as_captured(monkeypatch):
    """All but the compiler: programs are captured, chosen and called as ever."""
    monkeypatch.setattr(step_module, "_inductor", lambda graph, examples, options: graph)


@pytest.fixture
def compilations(monkeypatch):
    """An entry for each program that would be compiled; it runs as it is."""
    found = []

    def uncompiled(function, *examples, is_small):
        found.append(1)
        spec = tree_structure(examples)
        return lambda *leaves: function(*tree_unflatten(list(leaves), spec))

    monkeypatch.setattr(step_module, "compiled", uncompiled)
    return found


def begin(kernel_class, compile, num_chains=None, data=(X, LABELS), thinning=2, **settings):
    kernel = kernel_class(Classifier(), 1e-3, batch_size=20, seed=1, compile=compile, thinning=thinning, **settings)
    return kernel.begin(data, {}, warmup_steps=0, num_samples=10, chains=ChainSet(count=num_chains))


def advance(chain, num_steps):
    with torch.no_grad():
        chain.advance(num_steps)
    return chain.theta


KERNELS = [(SGLD, {}), (SGHMC, {}), (PSGLD, {"use_gamma": True}), (SGLD, {"control_variates": True})]


@pytest.mark.slow
@pytest.mark.usefixtures("programs_as_captured")
@pytest.mark.parametrize(("kernel_class", "settings"), KERNELS)
def test_programs_are_the_same_steps(kernel_class, settings):
    assert_same_steps(kernel_class, settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel_class", "settings"),
    [*KERNELS[:1], *(pytest.param(*case, marks=pytest.mark.thorough) for case in KERNELS[1:])],
)
def test_compiled_steps_are_the_same_steps(kernel_class, settings):
    assert_same_steps(kernel_class, settings)


def assert_same_steps(kernel_class, settings):
    eager, fast = (begin(kernel_class, compile, **settings) for compile in (False, True))
    for num_steps in (5, 5, 7):  # the first step, and what a draw leaves over, go by the captured graph
        expected, found = advance(eager, num_steps), advance(fast, num_steps)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast.energy, eager.energy, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(fast.gradient_norm, eager.gradient_norm, rtol=1e-3, atol=1e-3)
    assert (eager.path, fast.path) == ("captured", "compiled")


@pytest.mark.usefixtures("programs_as_captured")
def test_programs_of_several_chains():
    eager, fast = (begin(SGHMC, compile, num_chains=3) for compile in (False, True))
    torch.testing.assert_close(advance(fast, 12), advance(eager, 12), rtol=1e-4, atol=1e-5)
    assert fast.path == "compiled"


@pytest.mark.usefixtures("programs_as_captured")
def test_programs_see_their_own_data():
    one = begin(SGLD, True)
    other = begin(SGLD, True, data=(X.flip(0) + 1, LABELS))
    expected = begin(SGLD, False, data=(X.flip(0) + 1, LABELS))
    advance(one, 10)
    torch.testing.assert_close(advance(other, 10), advance(expected, 10), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("programs_as_captured")
def test_a_ragged_batch_goes_by_the_captured_graph():
    batches = DataLoader(TensorDataset(X, LABELS), batch_size=25)
    chains = []
    for compile in (False, True):
        kernel = SGLD(Classifier(), 1e-3, seed=1, compile=compile, thinning=2)
        chains.append(kernel.begin((batches,), {}, warmup_steps=0))
    torch.testing.assert_close(advance(chains[1], 12), advance(chains[0], 12), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_ragged_batch_among_others_is_not_worth_a_program(compilations):
    batches = DataLoader(TensorDataset(X, LABELS), batch_size=25)  # 25, 25, 10
    chain = SGLD(Classifier(), 1e-3, seed=1, compile=True, thinning=5).begin((batches,), {}, warmup_steps=0)
    advance(chain, 60)  # every five steps have a short batch
    assert not compilations
    batches = DataLoader(TensorDataset(X, LABELS), batch_size=7)  # eight of 7, and one of 4
    chain = SGLD(Classifier(), 1e-3, seed=1, compile=True, thinning=5).begin((batches,), {}, warmup_steps=0)
    advance(chain, 200)
    assert compilations == [1]


@pytest.mark.slow
def test_long_runs_compile_and_short_ones_do_not(compilations, monkeypatch):
    monkeypatch.setattr(step_module, "COMPILE_STEPS", 40)
    advance(begin(SGLD, "auto", thinning=1), 20)
    assert not compilations
    advance(begin(SGLD, "auto", num_chains=2, thinning=1), 21)
    assert compilations == [1]
    advance(begin(SGLD, "auto", thinning=4), 8)  # 10 draws of 4 are known of beforehand
    assert compilations == [1, 1]
    advance(begin(SGLD, False, thinning=5), 60)
    assert compilations == [1, 1]
    chain = begin(SGLD, "auto", thinning=1)
    advance(chain, 41)  # reached on the way
    assert compilations == [1, 1, 1]
    assert chain.path == "compiled"


def test_without_a_compiler_steps_are_taken_all_the_same(monkeypatch, caplog):
    def broken(function, *examples, is_small):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(step_module, "compiled", broken)
    chain = begin(SGLD, True)
    with caplog.at_level(logging.WARNING, "pyro_apd"):
        found = advance(chain, 30)
    assert caplog.text.count("no C++ compiler") == 1
    assert chain.path == "captured"
    assert torch.equal(found, advance(begin(SGLD, False), 30))


def test_what_cannot_be_captured_is_not_compiled(monkeypatch):
    monkeypatch.setattr(step_module, "compiled", lambda *args, **settings: pytest.fail("compiled"))
    problem = Conjugate()
    chain = SGLD(problem.full, 1e-3, compile=True, capture=False).begin((problem.x, problem.y), {}, warmup_steps=0)
    advance(chain, 3)
    assert chain.path == "traced"


@pytest.mark.slow
def test_compiling_by_way_of_torch_compile_where_the_inner_interface_is_gone(monkeypatch):
    import torch._inductor

    def program(trees, scale):
        trees[0].add_(trees[1] * scale)
        return trees[0].sum(), trees[1]

    monkeypatch.delattr(torch._inductor, "compile")
    first, second, scale = torch.zeros(3), torch.arange(3.0), torch.tensor(2.0)
    total, other = compiled(program, (first, second), scale)(first, second, scale)
    assert first.tolist() == [0.0, 2.0, 4.0]
    assert float(total) == 6.0
    assert torch.equal(other, second)


@pytest.mark.slow
@pytest.mark.parametrize("is_small", [True, False])
def test_compiled_functions_change_their_arguments_in_place(is_small):
    def program(trees, scale):
        trees[0].add_(trees[1] * scale)
        return (trees[0].sum(),)

    first, second, scale = torch.zeros(3), torch.arange(3.0), torch.tensor(2.0)
    fast = compiled(program, (first, second), scale, is_small=is_small)
    assert first.tolist() == [0.0, 0.0, 0.0]  # the rehearsal was on copies
    fast(first, second, scale)
    fast(first, second, torch.tensor(10.0))
    assert first.tolist() == [0.0, 12.0, 24.0]


@pytest.mark.parametrize("compile", ["yes", None, 1])
def test_unknown_compile(compile):
    with pytest.raises(ValueError, match="compile="):
        SGLD(Classifier(), 1e-3, compile=compile)
