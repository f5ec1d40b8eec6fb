# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A deep ensemble (Lakshminarayanan et al., NeurIPS 2017) for :mod:`benchmarks.tabular`.

Adam at a rate of 0.01 on mini-batches of 100 rows, starts of PyTorch. Each member holds out 15 % of the rows, drawn
for it alone, and keeps the weights with the best loss there. It stops after 50 epochs without a better one, or after
1,000 in all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gaussian_nll_loss, softplus

from benchmarks.function_space_networks import cpu_seconds
from benchmarks.tabular_cases import SMALLEST_SCALE, Table, network
from pyro_apd.runtime.seeds import derived_seed

GROUP, RATE, BATCH_SIZE, HELD_OUT = 5, 0.01, 100, 0.15
MAX_EPOCHS, PATIENCE = 1_000, 50


def ensemble_outputs(table: Table, hidden: tuple[int, ...], seed: int, seconds: float) -> Tensor:
    """Outputs ``(M, N, K)`` of the members on the test rows.

    Groups of five members are trained until so many CPU seconds are used, the last group to its end.
    """
    outputs: list[Tensor] = []
    begun, net = cpu_seconds(), network((table.x.shape[1], *hidden, table.num_outputs))
    while not outputs or cpu_seconds() - begun < seconds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "group", len(outputs)))
            outputs.append(_trained(table, net))
    return torch.cat(outputs)


def _trained(table: Table, net: nn.Sequential) -> Tensor:
    """A group's outputs ``(5, N, K)`` on the test rows."""
    params = _starts(net)
    optimizer = torch.optim.Adam(params.values(), lr=RATE)
    order_MN = torch.stack([torch.randperm(len(table.x)) for _ in range(GROUP)])
    num_held_out = round(HELD_OUT * len(table.x))
    held_out, rows = order_MN[:, :num_held_out], order_MN[:, num_held_out:]
    best_M, since_M = torch.full((GROUP,), torch.inf), torch.zeros(GROUP)
    best = {name: value.detach().clone() for name, value in params.items()}
    for _ in range(MAX_EPOCHS):
        shuffled = rows.gather(1, torch.rand(rows.shape).argsort(1))
        for batch in shuffled.split(BATCH_SIZE, 1):
            optimizer.zero_grad()
            _losses(table, net, params, batch).sum().backward()
            optimizer.step()
        with torch.no_grad():
            loss_M = _losses(table, net, params, held_out)
        is_better_M = (loss_M < best_M) & (since_M <= PATIENCE)
        best_M, since_M = torch.where(is_better_M, loss_M, best_M), torch.where(is_better_M, 0.0, since_M + 1)
        for name, value in params.items():
            best[name][is_better_M] = value.detach()[is_better_M]
        if bool((since_M > PATIENCE).all()):
            break
    with torch.no_grad():
        return _outputs(net, best, table.x_test.expand(GROUP, *table.x_test.shape))


def _starts(net: nn.Sequential) -> dict[str, Tensor]:
    """Parameters ``(5, ...)`` at PyTorch's starts."""
    members = []
    for _ in range(GROUP):
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        members.append({name: value.detach().clone() for name, value in net.named_parameters()})
    return {name: torch.stack([member[name] for member in members]).requires_grad_() for name in members[0]}


def _outputs(net: nn.Sequential, params: dict[str, Tensor], x_MNF: Tensor) -> Tensor:
    outputs: Tensor = torch.vmap(lambda values, x: torch.func.functional_call(net, values, (x,)))(params, x_MNF)
    return outputs


def _losses(table: Table, net: nn.Sequential, params: dict[str, Tensor], rows_MB: Tensor) -> Tensor:
    """Negative log-likelihood ``(M,)``, the mean over each member's rows."""
    outputs_MBK, y_MB = _outputs(net, params, table.x[rows_MB]), table.y[rows_MB]
    if table.num_classes:
        return cross_entropy(outputs_MBK.mT, y_MB, reduction="none").mean(1)
    mean_MB, raw_MB = outputs_MBK.unbind(-1)
    variance_MB = (softplus(raw_MB) + SMALLEST_SCALE).square()
    return gaussian_nll_loss(mean_MB, y_MB, variance_MB, eps=SMALLEST_SCALE**2, reduction="none").mean(1)
