# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Functions in several processes that find each other as those of torchrun do, forked so that nothing is imported."""

import faulthandler
import os
import pickle
import socket
import sys
import traceback

import torch.multiprocessing

# No test waits longer.
_TIMEOUT = 60


def on_ranks(function, size, tmp_path, *, is_grouped=True):
    """What ``function(rank)`` returns on each rank, or the exception that it raised; an exit code where it died.

    :param is_grouped: whether the environment tells of the others.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    paths = [tmp_path / f"result{rank}.pickle" for rank in range(size)]
    environments = [
        {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
         "MASTER_PORT": str(port)} for r in range(size)
    ]  # fmt: skip
    processes = [
        context.Process(target=_child, args=(function, rank, environments[rank] if is_grouped else {}, path))
        for rank, path in enumerate(paths)
    ]
    for path in paths:
        path.unlink(missing_ok=True)
    for process in processes:
        process.start()
    for process in processes:
        process.join(_TIMEOUT)
    is_hanging = any(process.is_alive() for process in processes)
    for process in processes:
        process.kill()
        process.join()
    assert not is_hanging, "a process hangs"
    return [
        pickle.loads(path.read_bytes()) if path.exists() else process.exitcode
        for path, process in zip(paths, processes, strict=True)
    ]


def _child(function, rank, environment, path):
    faulthandler.dump_traceback_later(_TIMEOUT - 5, file=sys.__stderr__)  # where it hangs
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        result = function(rank)
    except Exception as error:
        traceback.print_exc()
        result = error
    contents = pickle.dumps(result)
    path.write_bytes(contents)
