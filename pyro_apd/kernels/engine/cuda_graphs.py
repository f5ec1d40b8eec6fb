# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""CUDA graphs: small steps on a GPU are bound by the time to launch their kernels, and a graph is one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Program = Callable[..., Sequence[Tensor]]


def replayed(program: Program, kept: Sequence[Tensor], given: Sequence[Tensor]) -> Program:
    """``program`` as a CUDA graph, for the very tensors ``kept``, which it changes in place.

    :param program: of ``(*kept, *given)``; it was called before, so that nothing is left to compile.
    :param kept: tensors that live as long as the program is used.
    :param given: examples of the arguments that differ from call to call.
    :returns: a function of the same arguments; what it returns belongs to its caller.
    :raises RuntimeError: if the graph cannot be captured, or its results differ from the program's.
    """
    buffers = [tensor.clone() for tensor in given]
    before = [tensor.clone() for tensor in kept]
    rehearsed = [tensor.clone() for tensor in kept]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as CUDA asks: a call outside the graph first
        expected = [tensor.clone() for tensor in program(*rehearsed, *buffers)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads that read batches ahead may allocate meanwhile, which does not concern this graph.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = program(*kept, *buffers)

    def replay(*arguments: Tensor) -> list[Tensor]:
        for buffer, tensor in zip(buffers, arguments[len(kept) :], strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return [output.clone() for output in outputs]

    found = replay(*kept, *given)
    is_same = all(
        torch.allclose(*pair, equal_nan=True) for pair in zip([*found, *kept], [*expected, *rehearsed], strict=True)
    )
    for tensor, value in zip(kept, before, strict=True):
        tensor.copy_(value)
    if not is_same:
        raise RuntimeError("the CUDA graph gives other results than the steps it was captured from")
    return replay
