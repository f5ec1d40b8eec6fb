# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_apd.chains.checkpoint import Checkpoint, Progress, read_checkpoint, write_checkpoint
from pyro_apd.chains.group import GroupRun, Plan, begin, rebuilt_error
from pyro_apd.chains.stores.base import MemoryStore, kept_layout
from pyro_apd.kernels.engine.chain_set import ChainSet
from tests.chains.walk import LAYOUT, Walk


class Listening:
    """Notes what it is told."""

    def __init__(self, every=None, path=None):
        self.drawn, self.every, self.path, self.saved = [], every, path, []

    def drew(self, chains, num_done, num_diverged):
        self.drawn.append((num_done, num_diverged))

    def is_due(self, chains, num_done):
        return self.every is not None and num_done % self.every == 0

    def checkpoint(self, chains, progress):
        write_checkpoint(self.path, Checkpoint({}, {chains.first: progress}))
        self.saved.append(progress.num_done)


def draw(kernel, plan, width=None, first=0, progress=None, store=None, listener=None, kept=LAYOUT):
    chains = ChainSet(first, width)
    store = MemoryStore(kept, plan.num_chains, plan.num_samples, torch.empty(0)) if store is None else store
    progress = Progress() if progress is None else progress
    run = GroupRun(kernel, begin(kernel, plan, chains, (), {}), plan, store, progress)
    run.run(Listening() if listener is None else listener)
    return store, progress


@pytest.mark.parametrize("width", [None, 2])
def test_draws_after_warmup_are_kept_thinned(width):
    plan = Plan(num_samples=4, warmup_steps=3, num_chains=width or 1)
    store, progress = draw(Walk(thinning=2), plan, width)
    chain = begin(Walk(), plan, ChainSet(0, width), (), {})
    for step in range(14):
        chain.advance(1)
        if step >= 7 and step % 2:
            assert torch.equal(store.theta_CSD[:, (step - 7) // 2], chain.theta.reshape(width or 1, -1))
    assert store.counts == [4] * (width or 1)
    assert progress.num_done == 7
    torch.testing.assert_close(store.statistics["potential"], store.theta_CSD.square().sum(-1))


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_warmup_ends_once_and_before_the_first_kept_draw(warmup_steps):
    seen = []
    plan = Plan(2, warmup_steps, 1, hook=lambda k, p, stage, i: seen.append(chain.is_warm))
    chain = begin(Walk(), plan, ChainSet(0), (), {})
    GroupRun(Walk(), chain, plan, MemoryStore(LAYOUT, 1, 2, torch.empty(0)), Progress()).run(Listening())
    assert seen == [False] * warmup_steps + [True] * 2


@pytest.mark.parametrize(
    ("width", "num_chains", "stages"),
    [(None, 1, ("Warmup", "Sample")), (None, 2, ("Warmup [1]", "Sample [1]")), (2, 2, ("Warmup", "Sample"))],
)
def test_hooks_as_pyros(width, num_chains, stages):
    calls, kernel = [], Walk()
    plan = Plan(2, 1, num_chains, hook=lambda *call: calls.append(call))
    store, _ = draw(kernel, plan, width, first=0 if width or num_chains == 1 else 1)
    assert [(stage, i) for _, _, stage, i in calls] == [(stages[0], 0), (stages[1], 0), (stages[1], 1)]
    assert all(k is kernel for k, *_ in calls)
    # Earlier calls' params are still what they were.
    for i in (0, 1):
        theta = LAYOUT.join(calls[1 + i][1])
        assert torch.equal(theta, store.theta_CSD[:, i] if width else store.theta_CSD[num_chains - 1, i])


def test_initial_params_by_group():
    start = {"w": torch.zeros(3, 3), "scale": torch.arange(3.0), "b": torch.zeros(3, 2, 2)}
    plan = Plan(1, 0, 3, start)
    assert LAYOUT.split(begin(Walk(), plan, ChainSet(2), (), {}).theta)["scale"] == 2
    assert LAYOUT.split(begin(Walk(), plan, ChainSet(0, 3), (), {}).theta)["scale"].tolist() == [0, 1, 2]


def test_only_kept_sites_are_stored():
    plan = Plan(3, 0, 1)
    every, _ = draw(Walk(), plan)
    some, _ = draw(Walk(), plan, kept=kept_layout(LAYOUT, ["b", "scale"]))
    assert set(some.samples()) == {"b", "scale"}
    assert torch.equal(some.samples()["b"], every.samples()["b"])


def test_the_listener_hears_of_every_draw():
    listener = Listening()
    draw(Walk(), Plan(2, 1, 1), listener=listener)
    assert listener.drawn == [(1, 0), (2, 0), (3, 0)]


# In 3 + 5 draws of 2 steps: the last good step is 11, in the 6th draw; draws 0 and 1 of those kept are good.
@pytest.mark.parametrize("width", [None, 2])
def test_a_diverged_chain_ends_and_the_others_go_on(width):
    plan = Plan(num_samples=5, warmup_steps=3, num_chains=2)
    good = Walk(thinning=2)
    bad = Walk(thinning=2, diverges_after={1: 11})
    groups = [(width, 0)] if width else [(None, 0), (None, 1)]
    expected, store = (MemoryStore(LAYOUT, 2, 5, torch.empty(0)) for _ in range(2))
    for width, first in groups:
        draw(good, plan, width, first, store=expected)
        _, progress = draw(bad, plan, width, first, store=store)
    assert torch.equal(store.theta_CSD[0], expected.theta_CSD[0])
    assert torch.equal(store.theta_CSD[1, :2], expected.theta_CSD[1, :2])
    assert store.counts == [5, 2]
    (note,) = progress.divergences
    assert (note["chain"], note["first_draw"]) == (1, 2)


@pytest.mark.parametrize("width", [None, 2])
def test_divergence_in_warmup_leaves_no_draws(width):
    plan = Plan(3, 5, 2)
    store = MemoryStore(LAYOUT, 2, 3, torch.empty(0))
    _, progress = draw(Walk(diverges_after={0: 1}), plan, width, store=store)
    assert progress.divergences[0]["first_draw"] == 0
    assert store.counts[0] == 0


def test_draws_since_the_last_look_are_given_up():
    store, _ = draw(Walk(diverges_after={0: 100}, look_every=50), Plan(200, 0, 1))
    assert store.counts == [52]  # noticed at step 102


def test_the_only_chain_keeps_its_draws_from_before():
    store, progress = draw(Walk(diverges_after={0: 7}), Plan(20, 2, 1))
    assert store.counts == [5]
    assert progress.num_done == 22
    error = rebuilt_error(progress.divergences[0])
    assert (error.chain, error.step, error.site) == (0, 9, "w")
    assert "ran away" in str(error)


def test_all_of_a_group_diverge():
    store, progress = draw(Walk(diverges_after={0: 4, 1: 6}), Plan(20, 2, 2), width=2)
    assert [(note["chain"], note["first_draw"]) for note in progress.divergences] == [(0, 2), (1, 4)]
    assert max(store.counts) < 20


@pytest.mark.parametrize("stop", [1, 3, 5, 7])
@pytest.mark.parametrize("width", [None, 2])
def test_resuming_continues_bit_for_bit(width, stop, tmp_path):
    class Stopped(Exception):
        pass

    def stopping(kernel, params, stage, i):
        if (i if stage == "Warmup" else i + 3) == stop:
            raise Stopped

    count = width or 1
    expected, _ = draw(Walk(), Plan(6, 3, count), width)
    store = MemoryStore(LAYOUT, count, 6, torch.empty(0))
    listener = Listening(every=2, path=tmp_path / "c")
    with pytest.raises(Stopped):
        draw(Walk(), Plan(6, 3, count, hook=stopping, checkpoint_every=2), width, store=store, listener=listener)
    saved = read_checkpoint(tmp_path / "c")
    progress = saved.chains[0] if saved else Progress()
    assert progress.num_done == stop // 2 * 2
    draw(Walk(), Plan(6, 3, count, checkpoint_every=2), width, progress=progress, store=store, listener=listener)
    assert torch.equal(store.theta_CSD, expected.theta_CSD)
    assert listener.saved[-1] == 9
    report = {"path": "on foot, seen 6 times"}  # also those of before the stop
    assert read_checkpoint(tmp_path / "c").chains[0] == Progress(9, None, [], report)


def test_a_chain_that_diverged_before_the_checkpoint_is_noted_once(tmp_path):
    kernel, listener = Walk(diverges_after={1: 3}), Listening(every=6, path=tmp_path / "c")
    expected, _ = draw(kernel, Plan(6, 3, 2), width=2)
    store, _ = draw(kernel, Plan(6, 3, 2, checkpoint_every=6), width=2, listener=listener)
    write_checkpoint(tmp_path / "d", Checkpoint({}, {}))
    saved = read_checkpoint(tmp_path / "c.previous").chains[0]
    assert (saved.num_done, len(saved.divergences)) == (6, 1)
    kernel.noticed_after = {}
    kernel.diverges_after = {}
    _, progress = draw(kernel, Plan(6, 3, 2), width=2, progress=saved, store=store)
    assert len(progress.divergences) == 1
    assert torch.equal(store.theta_CSD[0], expected.theta_CSD[0])


def test_no_latents():
    from pyro_apd.models.layout import Layout

    calls = []
    plan = Plan(2, 1, 1, hook=lambda *call: calls.append(call[1]))
    empty = Layout({})
    draw(Walk(layout=empty), plan, kept=empty)
    assert calls == [{}] * 3
