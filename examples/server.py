# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A server of predictions, with eight threads of the standard library.

    python examples/server.py posterior.safetensors --model my_package.models:bnn --port 8000
    curl --data '{"x": [[0.1, 0.2, 0.3, 0.4]]}' http://127.0.0.1:8000/predict

A request has rows of inputs; the answer has one list per output. ``GET /health`` says that the server is up.
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch
from torch import nn

from pyro_apd import DistilledPosterior
from pyro_apd.cli.report import load_model

NUM_THREADS = 8
MAX_BYTES = 2**22
OUTPUTS = ("mean", "predictive_entropy", "mutual_information")


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other of a connection."""

    protocol_version = "HTTP/1.1"
    timeout = 10
    server: PredictionServer

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/health" else 404, {"networks": self.server.num_networks})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/predict" or not length.isdigit() or int(length) > MAX_BYTES:
            self.close_connection = True  # the body is not read
            self._answer(
                404 if self.path != "/predict" else 413, {"error": f"POST /predict, up to {MAX_BYTES:,} bytes"}
            )
            return
        try:
            x = torch.tensor(json.loads(self.rfile.read(int(length)))["x"], dtype=torch.float32)
            with torch.inference_mode():
                found = self.server.ensemble(x)
        except (ValueError, KeyError, TypeError, RuntimeError, IndexError) as error:
            self._answer(400, {"error": str(error)[:300]})
            return
        self._answer(200, {name: value.tolist() for name, value in found.items()})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: a line per request costs more than a small network's prediction."""


class PredictionServer(HTTPServer):
    """A listening socket from which a fixed number of threads accept connections."""

    request_queue_size = 128

    def __init__(self, address: tuple[str, int], ensemble: nn.Module, num_networks: int) -> None:
        super().__init__(address, Handler)
        self.ensemble, self.num_networks = ensemble, num_networks
        self._is_closing = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True) for _ in range(NUM_THREADS)]

    def start(self) -> None:
        """Begins to answer, in the background."""
        torch.set_num_threads(1)  # a request is one thread's work
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends all threads that wait for a connection."""
        self._is_closing.set()
        self.socket.shutdown(socket.SHUT_RDWR)
        self.server_close()
        for thread in self._threads:
            thread.join(timeout=Handler.timeout)

    def _accept(self) -> None:
        while not self._is_closing.is_set():
            try:
                connection, client = self.socket.accept()
            except OSError:
                return
            try:
                Handler(connection, client, self)
            except OSError:  # the client went away
                pass
            finally:
                self.shutdown_request(connection)


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("posterior")
    parser.add_argument("--model", required=True, metavar="MODULE:NAME")
    parser.add_argument("--num-networks", type=int, default=50)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    posterior = DistilledPosterior.load(arguments.posterior)
    ensemble = posterior.ensemble(arguments.num_networks, net=model, outputs=OUTPUTS, seed=0)  # type: ignore[arg-type]
    server = PredictionServer((arguments.host, arguments.port), ensemble, arguments.num_networks)
    server.start()
    print(f"http://{arguments.host}:{server.server_port}/predict", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.stop()


if __name__ == "__main__":
    main()
