# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Histories on disk."""

import json

import pytest
import torch

from pyro_apd.active_learning.history import History, HistoryFile, Round
from pyro_apd.generators import PaperGenerator
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.posterior import DistilledPosterior

SETTINGS = {"seed": 0, "acquisition": "bald"}


def history(rounds=2):
    made = [Round(3 + i, 0.5 + 0.1 * i, 1.0, [10 + i], 0.25) for i in range(rounds)]
    return History(dict(SETTINGS), [0, 1, 2], made)


def test_what_is_written_is_read(tmp_path):
    file = HistoryFile(tmp_path / "new" / "run.json")
    assert file.read(SETTINGS) == (None, None)
    file.write(history())
    assert file.read(SETTINGS) == (history(), None)
    assert file.read(SETTINGS)[0].labelled == [0, 1, 2, 10]


def test_a_table():
    lines = str(history()).splitlines()
    assert lines[0] == "acquisition: bald"
    assert [line.split()[:2] for line in lines[2:]] == [["3", "0.5000"], ["4", "0.6000"]]


def test_the_last_posterior_is_kept_and_only_the_last(tmp_path):
    file = HistoryFile(tmp_path / "run.json")
    layout = Layout({"a": (3,)})
    posterior = DistilledPosterior(layout, PaperGenerator(3, 2, 4))
    file.write(history(1), {"a": torch.arange(4.0)})
    assert torch.equal(file.read(SETTINGS)[1]["a"], torch.arange(4.0))
    file.write(history(2), posterior)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    read = file.read(SETTINGS)[1]
    assert torch.equal(read.get_samples(3, seed=0)["a"], posterior.get_samples(3, seed=0)["a"])
    with pytest.raises(ValueError, match=r"this is a list. Leave `history_path` out, or use retraining='cold'"):
        file.write(history(3), [1.0])


def test_what_is_no_history(tmp_path):
    path = tmp_path / "run.json"
    for content, message in (
        ("{", "is not JSON"),
        ("{}", "no history of active learning: 'format'"),
        (json.dumps({**history().to_json(), "format": 99}), "format 99, while this version reads 1"),
        (json.dumps({**history().to_json(), "rounds": [{"labels": 3}]}), "no history"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            HistoryFile(path).read(SETTINGS)
