# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What :mod:`benchmarks.distillation` distils: models, data and chains, which are cached on disk.

Draws are split by their index in the chain: of every ten, the last two are held out from everything that is fitted. So
a generator is compared with draws it never saw, from the same segments of the chain. On MNIST the rows for choosing
settings are the 10,000 of the training file that no chain was conditioned on.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import large_networks
from pyro_apd import BNN, MCLMC, MCMC, SGHMC, SGLD, datasets, open_store
from pyro_apd.chains.stores.base import DrawStore
from pyro_apd.models.normalisation import with_group_norm

CACHE = Path(os.environ.get("PYRO_APD_CACHE", Path.home() / ".cache" / "pyro_apd" / "benchmarks"))
PERIOD, HELD_OUT = 10, 2
# Bytes of a run whose draws are held in memory.
_IN_MEMORY = 4 * 10**9
# Steps of Adam before a chain that starts at a trained network.
NUM_TRAINED = 1200
# Sizes of generators and stored draws, in networks of float32.
BUDGETS = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 12.0)


@dataclass(frozen=True)
class Problem:
    """A model and its rows.

    :ivar tuple train: inputs and targets that the chains are conditioned on.
    :ivar tuple test: inputs and targets to compare predictions on.
    :ivar ood: out-of-distribution inputs by name.
    :ivar validation: inputs and targets for choosing settings; None if there are none.
    """

    model: BNN
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    ood: dict[str, Tensor]
    validation: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Chains:
    """How a case is sampled: ``num_draws`` of each chain, ``thinning`` steps of the kernel apart.

    :ivar int warm_start: steps of Adam before the warm-up, from a draw of the prior.
    """

    step_size: float | str
    batch_size: int | None
    thinning: int
    warmup: int
    num_draws: int
    num_chains: int = 1
    kernel: type[SGLD] | type[SGHMC] | type[MCLMC] = SGLD
    warm_start: int | None = None


@dataclass(frozen=True)
class Case:
    """A case of the benchmark.

    :ivar build: from a seed to the problem.
    :ivar tuple networks: sizes, in networks of float32, of the generators and stored draws to compare.
    :ivar net: makes the network, which is trained before it is sampled; from a draw of its prior a deep one learns
        very slowly. None if chains start at such draws.
    :ivar tuple without: beginnings of the names of methods that take too long.
    :ivar int num_sets: sets of draws that are compared, one by one, where those of one set differ too much.
    """

    name: str
    build: Callable[[int], Problem]
    chains: Chains
    networks: tuple[float, ...] = BUDGETS
    net: Callable[[], nn.Module] | None = None
    without: tuple[str, ...] = ()
    num_sets: int = 1

    def folder(self, seed: int, quick: bool = False) -> Path:
        """Where the chains are cached."""
        return CACHE / f"{self.name}-{seed}{'-quick' if quick else ''}"

    def sample(self, problem: Problem, seed: int, quick: bool = False) -> DrawStore:
        """The chains' draws: from the cache, else sampled and cached."""
        chains = self.chains
        num_draws, warmup, thinning = chains.num_draws, chains.warmup, chains.thinning
        if quick:
            num_draws, warmup, thinning = 50, 25, max(1, thinning // 10)
        folder = self.folder(seed, quick)
        if (folder / "complete").exists():
            return open_store(folder / "draws")
        start: dict[str, Any] = {"compile": "auto", "warm_start": None if quick else chains.warm_start}
        model = problem.model
        if self.net is not None:
            torch.manual_seed(seed)
            model = image_model(trained(self.net(), problem, 3 if quick else NUM_TRAINED))
            start = {"compile": False, "init_strategy": model.init_to_network}
        kernel = chains.kernel(
            model, chains.step_size, batch_size=chains.batch_size, thinning=thinning, seed=seed, **start
        )
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "draws", ignore_errors=True)  # of an interrupted run
        for path in folder.glob("*.npy"):
            path.unlink()
        mcmc = MCMC(
            kernel,
            num_draws,
            warmup_steps=warmup,
            num_chains=chains.num_chains,
            store="disk",
            store_path=folder / "draws",
            disable_progbar=True,
        )
        mcmc.run(*problem.train)
        (folder / "complete").touch()
        return open_store(folder / "draws")


def split(theta_CSD: Tensor, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Draws to fit ``(C, T, D)``, and held out ``(C, H, D)``: copies in memory, those of many bytes in a folder."""
    index = torch.arange(theta_CSD.shape[1])
    is_held_out = index % PERIOD >= PERIOD - HELD_OUT
    if folder is None or theta_CSD.numel() * theta_CSD.element_size() <= _IN_MEMORY:
        return theta_CSD[:, ~is_held_out], theta_CSD[:, is_held_out]
    return (
        _copied(theta_CSD, index[~is_held_out], folder / "fitted.npy"),
        _copied(theta_CSD, index[is_held_out], folder / "held_out.npy"),
    )


def _copied(theta_CSD: Tensor, index_T: Tensor, path: Path) -> Tensor:
    """Some draws of each chain, in a file that is mapped."""
    num_chains, _, size = theta_CSD.shape
    if not path.exists():
        part = path.with_suffix(".part")
        shape = (num_chains, len(index_T), size)
        file = np.lib.format.open_memmap(part, "w+", theta_CSD.numpy().dtype, shape)
        for to, i in enumerate(index_T.tolist()):
            file[:, to] = theta_CSD[:, i].numpy()
        file.flush()
        part.rename(path)
    return torch.from_numpy(np.load(path, mmap_mode="r+"))


def network(*sizes: int) -> nn.Sequential:
    """A perceptron with ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def digits(seed: int) -> Problem:
    """scikit-learn's digits, 64-50-10."""
    data = datasets.digits(seed=seed)
    model = BNN(network(64, 50, 10), likelihood="categorical", prior_scale=0.4)
    ood = {"noise": datasets.noise(data.x_test, seed=seed), "inverted": datasets.inverted(data.x_test)}
    return Problem(model, (data.x_train, data.y_train), (data.x_test, data.y_test), ood)


def mnist(*hidden: int, num_rows: int = 10_000) -> Callable[[int], Problem]:
    """MNIST with the paper's split and prior: 50,000 rows to train on; five sets of 2,000 in the same range.

    :param int num_rows: test rows, of 10,000, and the same share of the other sets.
    """

    def build(seed: int) -> Problem:
        data = datasets.mnist(_root())
        model = BNN(network(784, *hidden, 10), likelihood="categorical", prior_scale=0.02**0.5)
        generator = torch.Generator().manual_seed(0)
        ood = {
            "notMNIST": datasets.notmnist(root=_root()),
            "Omniglot": datasets.omniglot(root=_root()),
            "CIFAR grey": datasets.cifar10_gray(root=_root()),
            "Gaussian": torch.randn(2000, 784, generator=generator).clamp(-1, 1),
            "uniform": 2 * torch.rand(2000, 784, generator=generator) - 1,
        }
        ood = {name: value[: num_rows // 5] for name, value in ood.items()}
        train, test = (data.x_train[:50_000], data.y_train[:50_000]), (data.x_test[:num_rows], data.y_test[:num_rows])
        return Problem(model, train, test, ood, (data.x_train[50_000:], data.y_train[50_000:]))

    return build


def toy(seed: int) -> Problem:
    """The paper's twenty points in the plane, and points far from these."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.tensor([[-2.0, -2.0]] * 10 + [[2.0, 2.0]] * 10)
    x, x_test = (centre + 0.3**0.5 * torch.randn(20, 2, generator=generator) for _ in range(2))
    y = (torch.arange(20) >= 10).long()
    model = BNN(network(2, 10, 10, 2), likelihood="categorical", prior_scale=1.0)
    angle = torch.linspace(0, 2 * torch.pi, 101)[:100]
    ring = 5 * torch.stack([angle.cos(), angle.sin()], -1)
    axis = torch.linspace(-5, 5, 21)
    return Problem(model, (x, y), (x_test, y), {"ring": ring, "grid": torch.cartesian_prod(axis, axis)})


def uci(name: str) -> Callable[[int], Problem]:
    """50 hidden units and a learned noise scale, on one of the published splits, standardised by its training rows."""

    def build(seed: int) -> Problem:
        table = np.loadtxt(Path(_root()) / "uci" / f"{name}.txt")
        state = np.random.RandomState(1)
        for _ in range(seed + 1):
            order = state.choice(range(len(table)), len(table), replace=False)
        train, test = np.split(table[order], [round(0.9 * len(table))])
        mean, sd = train.mean(0), train.std(0)
        rows = [torch.as_tensor((part - mean) / np.where(sd > 0, sd, 1.0)).float() for part in (train, test)]
        model = BNN(network(table.shape[1] - 1, 50, 1), likelihood="gaussian", prior_scale="fan_in")
        x = rows[1][:, :-1]
        return Problem(
            model,
            (rows[0][:, :-1], rows[0][:, -1]),
            (x, rows[1][:, -1]),
            {"three times as far": 3 * x, "noise": datasets.noise(x, seed=seed)},
        )

    return build


def images(net: Callable[[], nn.Module], padding: int = 0, num_rows: int = 500) -> Callable[[int], Problem]:
    """A convolutional network, with group normalisation, on the images of MNIST: 50,000 to train on.

    :param int padding: background around images.
    :param int num_rows: for tests, and for choosing settings.
    """

    def build(seed: int) -> Problem:
        data = datasets.mnist(_root())

        def rows(x: Tensor, y: Tensor, span: slice) -> tuple[Tensor, Tensor]:
            x_NCHW = functional.pad(x[span].view(-1, 1, 28, 28), (padding,) * 4, value=float(x.min()))
            return x_NCHW, y[span]

        return Problem(
            image_model(net()),
            rows(data.x_train, data.y_train, slice(50_000)),
            rows(data.x_test, data.y_test, slice(num_rows)),
            {},
            rows(data.x_train, data.y_train, slice(50_000, 50_000 + num_rows)),
        )

    return build


def image_model(net: nn.Module) -> BNN:
    """A network for images as a model."""
    return BNN(net, likelihood="categorical", prior_scale="fan_in")


def trained(net: nn.Module, problem: Problem, num_steps: int) -> nn.Module:
    """A network after so many steps of Adam, with a rate that falls to zero in the second half."""
    x, y = problem.train
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(num_steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, 2 * (1 - step / num_steps))
        row = torch.randint(len(x), (32,))
        loss = functional.cross_entropy(net(x[row]), y[row])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return net


def conv_net() -> nn.Module:
    """The paper's, with group normalisation in place of batch normalisation."""
    return with_group_norm(large_networks.paper_conv_net())


def resnet20() -> nn.Module:
    """The same of ResNet-20."""
    return with_group_norm(large_networks.resnet())


def _root() -> str:
    return os.environ.get(datasets.DATA_VARIABLE, "../shared/data")


_MNIST = Chains(1e-6, 100, 200, 200, 800)
# As much noise of gradients, by rows, as in the chains of MNIST, to a factor of three.
_DEEP = Chains(1e-7, 32, 10, 100, 500, kernel=SGHMC)
# Weights are a draw of their prior to begin with, and stay one where the data say nothing; seven CPU minutes in all.
_WIDE = Chains(5e-8, 100, 12, 30, 200, kernel=SGHMC, warm_start=500)
_SLOW = ("SWAG", "paper")
# The recommended kernels, which mix.
_MIXED = Chains("auto", None, 20, 100, 250, num_chains=4, kernel=SGHMC)
_MIXED_TABLE = Chains("auto", None, 10, 100, 500, num_chains=4, kernel=MCLMC)
# Methods that need all draws in memory, or several networks.
_NOT_IN_PARTS = (*_SLOW, "stored", "int8", "int4", "int3", "int2", "low rank", "flow", "default", "mean field")
CASES = {
    case.name: case
    for case in (
        Case("toy", toy, Chains(5e-3, None, 40, 250, 500), num_sets=4),
        Case("digits", digits, Chains(1e-4, 100, 40, 300, 600), (*BUDGETS[:6], 5.0, *BUDGETS[6:])),
        Case("digits8", digits, Chains(1e-4, 100, 40, 300, 300, num_chains=8), (2.0, 4.0, 8.0, 11.0, 16.0)),
        Case("digits_mixed", digits, _MIXED, (*BUDGETS[2:], 16.0)),
        Case("concrete_mixed", uci("concrete"), _MIXED_TABLE, (4.0, 8.0, 12.0, 24.0, 48.0), num_sets=4),
        Case("concrete", uci("concrete"), Chains(3e-5, 100, 60, 500, 500), num_sets=4),
        Case("yacht", uci("yacht"), Chains(1e-5, 50, 100, 500, 500), num_sets=4),
        Case("mnist", mnist(100), _MNIST, (*BUDGETS[:5], 3.2, *BUDGETS[5:])),
        Case("mnist400", mnist(400, 400), Chains(1e-6, 100, 150, 200, 600), without=("paper",)),
        Case("mlp1m", mnist(670, 670, num_rows=2000), Chains(1e-6, 100, 100, 200, 250), without=_SLOW),
        Case("mlp10m", mnist(2790, 2790, num_rows=500), _WIDE, (2.0,), without=_NOT_IN_PARTS),
        Case("conv", images(conv_net), _DEEP, (1.0, 2.0, 4.0, 8.0), conv_net, _SLOW, num_sets=4),
        Case("resnet20", images(resnet20, padding=2), _DEEP, (1.0, 2.0, 4.0, 8.0), resnet20, _SLOW, num_sets=4),
    )
}  # fmt: skip
