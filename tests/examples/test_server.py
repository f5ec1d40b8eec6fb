# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The server of the examples answers several clients at once, with what the ensemble gives."""

import http.client
import json
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.support.exported import subspace_posterior

EXAMPLES = Path(__file__).parents[2] / "examples"
MODULE = runpy.run_path(str(EXAMPLES / "server.py"))


@pytest.fixture
def served():
    """A running server, and its ensemble."""
    posterior, bnn = subspace_posterior()
    ensemble = posterior.ensemble(5, net=bnn, outputs=MODULE["OUTPUTS"], seed=0)
    server = MODULE["PredictionServer"](("127.0.0.1", 0), ensemble, 5)
    threads = torch.get_num_threads()
    server.start()
    yield server.server_port, ensemble
    server.stop()
    torch.set_num_threads(threads)
    assert not any(thread.is_alive() for thread in server._threads)


def ask(port, method, path, body=None, times=1):
    """Status and content of the last of several answers over one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        for _ in range(times):
            connection.request(method, path, body)
            response = connection.getresponse()
            content = json.loads(response.read())
        return response.status, content
    finally:
        connection.close()


def test_clients_get_what_the_ensemble_gives(served):
    port, ensemble = served
    rows = torch.randn(8, 3, 4)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda x: ask(port, "POST", "/predict", json.dumps({"x": x.tolist()}), 5), rows))
    for x, (status, found) in zip(rows, answers, strict=True):
        assert status == 200
        for name, value in ensemble(x).items():
            torch.testing.assert_close(torch.tensor(found[name]), value)


def test_bad_requests_are_answered_and_the_server_goes_on(served):
    port, _ = served
    for body in ("no json", '{"y": 1}', '{"x": [[1, 2]]}', '{"x": "text"}', "[]"):
        status, content = ask(port, "POST", "/predict", body)
        assert status == 400
        assert content["error"]
    assert ask(port, "POST", "/other", "{}")[0] == 404
    assert ask(port, "GET", "/nothing")[0] == 404
    assert ask(port, "GET", "/health") == (200, {"networks": 5})


def test_the_image_installs_what_the_page_documents():
    text = (EXAMPLES / "Dockerfile").read_text()
    page = (EXAMPLES.parent / "docs" / "ship_it.md").read_text()
    for package in ("numpy", "safetensors", "tqdm", "opt_einsum", "pyro-ppl", "pyro-api"):
        assert package in text
        assert package in page
    assert "dist/*.whl" in text
