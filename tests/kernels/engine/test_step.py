# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Compiled steps are the same steps.

Compiling takes ten seconds. Only what depends on the compiler compiles; elsewhere captured programs run as they are.
"""

import logging
from collections import OrderedDict

import pytest
import torch
from torch.utils._pytree import tree_structure, tree_unflatten
from torch.utils.data import DataLoader, TensorDataset

from pyro_apd.kernels import PSGLD, SGHMC, SGLD
from pyro_apd.kernels.engine import programs
from pyro_apd.kernels.engine import step as step_module
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.programs import Estimate, compiled
from pyro_apd.runtime.announcements import listening
from tests.support.models import Classifier, Conjugate

X, LABELS = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3


@pytest.fixture(autouse=True)
def _calls_stay_in_python(monkeypatch):
    """Compiling them too takes twice as long, and has a test of its own."""
    monkeypatch.setattr(step_module, "SMALL", 0)
    monkeypatch.setattr(programs, "_KEPT", OrderedDict())


@pytest.fixture
def programs_as_captured(monkeypatch):
    """All but the compiler: programs are captured, chosen and called as ever."""
    monkeypatch.setattr(programs, "_inductor", lambda graph, examples, options: graph)


@pytest.fixture
def compilations(monkeypatch):
    """An entry for each program that would be compiled; it runs as it is."""
    found = []

    def uncompiled(function, *examples, **settings):
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


KERNELS = [(SGLD, {}), (SGHMC, {}), (PSGLD, {"decay": 0.9}), (SGLD, {"control_variates": True})]
KERNELS += [(SGLD, {"noise": "three-point", "thinning": 20})]


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
    monkeypatch.setattr(Estimate, "min_steps", 40)
    advance(begin(SGLD, "auto", thinning=1), 20)
    advance(begin(SGLD, "auto", num_chains=4, thinning=1), 20)
    assert not compilations
    advance(begin(SGLD, "auto", num_chains=4, thinning=1), 42)
    assert compilations == [1]
    advance(begin(SGLD, "auto", thinning=4), 8)  # 10 draws of 4 are known of beforehand
    assert compilations == [1, 1]
    advance(begin(SGLD, False, thinning=5), 60)
    assert compilations == [1, 1]
    chain = begin(SGLD, "auto", thinning=1)
    advance(chain, 41)  # reached on the way
    assert compilations == [1, 1, 1]
    assert chain.path == "compiled"


@pytest.mark.slow
def test_a_second_run_of_the_same_shapes_takes_the_programs_of_the_first(monkeypatch):
    found = []
    monkeypatch.setattr(programs, "_inductor", lambda graph, examples, options: found.append(1) or graph)
    advance(begin(SGLD, True), 10)
    advance(begin(SGLD, True), 10)
    assert len(found) == 1
    moved = (X.flip(0) + 1, LABELS)
    again, expected = begin(SGLD, True, data=moved), begin(SGLD, False, data=moved)
    torch.testing.assert_close(advance(again, 10), advance(expected, 10), rtol=1e-4, atol=1e-5)
    assert len(found) == 1
    advance(begin(SGLD, True, num_chains=2), 10)
    advance(begin(SGHMC, True), 10)
    advance(begin(SGLD, True, temperature=0.5), 10)
    assert len(found) == 4


def test_a_program_that_is_kept_takes_the_constants_of_its_caller(monkeypatch):
    found = []
    monkeypatch.setattr(programs, "_inductor", lambda graph, examples, options: found.append(1) or graph)

    def adding(constant):
        return compiled(lambda x: (x + constant,), torch.zeros(2))

    constants = torch.ones(2), torch.tensor([3.0, 4.0])
    first, second = map(adding, constants)
    assert first(torch.zeros(2))[0].tolist() == [1.0, 1.0]
    assert second(torch.zeros(2))[0].tolist() == [3.0, 4.0]
    constants[0].fill_(7.0)  # as parameters of a network may be
    assert first(torch.zeros(2))[0].tolist() == [7.0, 7.0]
    assert len(found) == 1
    for size in range(3, 3 + programs.MAX_KEPT):
        compiled(lambda x: (x + 1,), torch.zeros(size))
    assert len(programs._KEPT) == programs.MAX_KEPT
    adding(constants[1])
    assert len(found) == 2 + programs.MAX_KEPT  # the oldest was given up


@pytest.mark.slow
@pytest.mark.usefixtures("programs_as_captured")
def test_compiling_is_announced_with_what_it_gains(caplog):
    shown = []
    with caplog.at_level(logging.INFO, "pyro_apd"), listening(shown.append):
        advance(begin(SGLD, True), 5)
        advance(begin(SGLD, True), 5)  # by the program of the first
        assert shown == ["Compiling 2 steps, about 12 s"]
        kernel = SGLD(Classifier(), 1e-3, batch_size=20, seed=1, thinning=5)
        advance(kernel.begin((X, LABELS), {}, warmup_steps=0, num_samples=40_000), 11)
    assert shown[1:] == ["Compiling 5 steps, about 15 s; the run's 200,000 steps then take about 144 s less"]
    assert caplog.text.index(shown[0]) < caplog.text.index("Compiled 2 steps in")


def test_what_compiling_saves():
    one, four = Estimate(4, 3760, unroll=5), Estimate(4, 3760, num_chains=4, unroll=5)
    assert one.cost == four.cost == 15
    assert one.saved(10_000) == pytest.approx(7.2)
    assert four.saved(10_000) == pytest.approx(7.2 + 3.9, abs=0.1)
    assert one.saved(one.min_steps) == pytest.approx(one.cost, rel=1e-3)


def test_without_a_compiler_steps_are_taken_all_the_same(monkeypatch, caplog):
    def broken(function, *examples, **settings):
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
