# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The paper's active learning and adversarial inputs run on the smoke budget, and their settings are what they say."""

import json

import pytest
import torch

from benchmarks.paper import __main__ as command
from benchmarks.paper import active_learning, adversarial
from benchmarks.paper.common import Options
from benchmarks.paper.settings import image_setting


@pytest.mark.slow
@pytest.mark.usefixtures("benchmark_cache")
@pytest.mark.parametrize(
    ("name", "protocol", "in_table"),
    [
        pytest.param("active_learning", "corrected", "| MC-dropout, entropy | ", marks=pytest.mark.thorough),
        pytest.param("active_learning", "faithful", "| MC-dropout, entropy | ", marks=pytest.mark.thorough),
        pytest.param("adversarial", "faithful", "| APD, paper's generator | ", marks=pytest.mark.thorough),
        pytest.param("adversarial", "corrected", "| APD, paper's generator | ", marks=pytest.mark.thorough),
    ],
)
def test_smoke(name, protocol, in_table, tmp_path, capsys, monkeypatch):
    arguments = [name, "--protocol", protocol, "--budget", "smoke", "--results", str(tmp_path), "--threads", "1"]
    command.main(arguments)
    stored = json.loads((tmp_path / f"paper_{name}_{protocol}_smoke.json").read_text())
    assert stored["figures"]
    assert in_table in capsys.readouterr().out
    assert in_table in (tmp_path / "paper_tables.md").read_text()
    assert (tmp_path / f"paper_{name}_{protocol}_smoke.png").stat().st_size > 5000

    def again(*args, **kwargs):
        raise AssertionError("what was stored is run again")

    monkeypatch.setattr(adversarial, "one", again)
    monkeypatch.setattr(active_learning, "one_run", again)
    command.main(arguments)
    assert in_table in capsys.readouterr().out


def test_the_whole_protocol_is_twenty_labels_and_forty_nine_times_ten():
    for protocol in ("faithful", "corrected"):
        options = Options(protocol, "cpu", digits=True)
        jobs = dict(active_learning.jobs(options))
        names = active_learning.methods(options, active_learning.digits_pool(options, 0))
        # The paper's generator once only: it takes a quarter of an hour.
        assert len(jobs) == 5 * len(names) - 4 * (active_learning.PAPER in names)
        assert {job.args[5] for job in jobs.values()} == {50}
        assert active_learning.CONTROL in names
        assert names[active_learning.CONTROL][0] == "random"


def test_the_authors_posterior_in_active_learning():
    seen = {}

    published = active_learning.AsPublished((64, 50, 10), 12, 1, 0.05)
    pool = active_learning.digits_pool(Options("faithful", "smoke"), 0)
    model = pool.model(0)

    class Recording(active_learning.Chain):
        def __call__(self, model, x, y, seed, previous=None):
            kernel = self.make_kernel(model, len(x), seed)
            seen.update(kernel=kernel, model=model, settings=self)
            return "draws"

    patch = pytest.MonkeyPatch()
    patch.setattr(active_learning, "Chain", Recording)
    assert published(model, pool.x_pool[:40], pool.y_pool[:40], 3, None) == "draws"
    patch.undo()
    assert seen["kernel"].temperature == 1e-3
    assert seen["kernel"].schedule(0) == pytest.approx(0.05 / 40)
    assert (seen["settings"].warmup_steps, seen["settings"].num_samples) == (2, 10)
    sd = seen["model"].priors["net.0.weight"].base_dist.scale
    assert float(sd.flatten()[0] ** -2) == pytest.approx(0.05 * 40)


@pytest.mark.parametrize(("num_inputs", "rate"), [(64, 0.05), (256, 0.0125), (9, 0.05)])
def test_dropout_as_published(num_inputs, rate, monkeypatch):
    seen = {}

    def recording(model, x, y, **settings):
        seen.update(model=model, **settings)
        return "network"

    monkeypatch.setattr(active_learning.apd.baselines, "mc_dropout", recording)
    sizes, x = (num_inputs, 5, 3), torch.zeros(40, num_inputs)
    dropout = active_learning.Dropout(sizes, {"num_steps": 7})
    assert dropout(None, x, torch.zeros(40).long(), 3, None) == "network"
    assert (seen["num_steps"], seen["seed"]) == (7, 3)
    assert seen["learning_rate"] == pytest.approx(rate)
    sd = seen["model"].priors["net.0.weight"].base_dist.scale
    assert float(sd.flatten()[0] ** -2) == pytest.approx(0.05 * 40)
    site = {"name": "net.0.weight", "fn": seen["model"].priors["net.0.weight"], "value": None, "is_observed": False}
    torch.testing.assert_close(seen["init_strategy"](site), seen["model"].net.get_buffer("0.weight"))


def test_corrected_chains_go_as_far_on_more_inputs():
    options, one = Options("corrected", "cpu"), [torch.zeros(1)] * 4
    lengths = []
    for num_inputs in (64, 640):
        chain = active_learning.methods(options, active_learning.Pool((num_inputs, 5, 3), 1.0, *one))["SGLD, entropy"][
            1
        ]
        lengths.append(chain.thinning * active_learning.step_size(num_inputs, 100))
    assert lengths[0] == pytest.approx(lengths[1])


def test_intervals_by_student():
    # Mean 2, sd 1, n 3: t(0.975, 2) = 4.3027, over the square root of 3.
    assert active_learning.interval([1.0, 2.0, 3.0]) == "2.0000 [-0.4841, 4.4841]"
    assert active_learning.interval([2.0]) == "2.0000"


def test_rows_that_are_attacked_are_spread_and_of_the_right_part():
    options = Options("corrected", "cpu", digits=True)
    problem = image_setting(options).problem(0)
    x, y = adversarial.rows(options, problem)
    assert len(x) == len(y) == len(problem.test[0])
    fewer = adversarial.rows(Options("corrected", "smoke"), problem)
    assert len(fewer[0]) == 40
    assert torch.equal(fewer[0][0], x[0])
    assert torch.equal(fewer[0][-1], x[-1])
    assert set(fewer[1].tolist()) == set(range(10))


def test_attacks_of_the_protocols():
    faithful = adversarial.attacks(Options("faithful", "full"))
    assert {how.through for how in faithful.values()} == {"one"}
    pgd = faithful["PGD 0.3"]
    assert (pgd.epsilon, pgd.step_size, pgd.num_steps, pgd.random_start) == (0.3, 0.02, 40, False)
    assert faithful["FGSM, least size"].num_steps == 1000
    corrected = adversarial.attacks(Options("corrected", "cpu"))
    assert {how.through for how in corrected.values()} == {"one", "mean", "expectation"}
    assert all(how.random_start for how in corrected.values())


def test_what_the_paper_compares_is_attacked_and_our_generator():
    for protocol in ("faithful", "corrected"):
        options = Options(protocol, "cpu", digits=True)
        expected = {"SGD", "MC-dropout", "SGLD", "APD, paper's generator", "APD"}
        assert expected <= set(adversarial.compared(options)) <= {*expected, "APD, online"}
