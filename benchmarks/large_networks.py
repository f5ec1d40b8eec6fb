# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Networks and data of :mod:`benchmarks.large`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import pyro_apd as apd
from pyro_apd.models.normalisation import with_group_norm


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut connection without parameters (He et al. 2016, option A)."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(num_out)
        self.stride, self.surplus = stride, num_out - num_in

    def forward(self, x: Tensor) -> Tensor:
        """From ``(N, I, H, W)`` to ``(N, O, H / stride, W / stride)``."""
        carried = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.surplus))
        inner = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(inner + carried)


def resnet(num_blocks: int = 3, width: int = 16, num_channels: int = 1, num_classes: int = 10) -> nn.Sequential:
    """The residual network of 6 n + 2 layers for 32 x 32 images (He et al. 2016, section 4.2): n = 3 is ResNet-20."""
    layers: list[nn.Module] = [nn.Conv2d(num_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
    layers.append(nn.ReLU())
    num_in = width
    for stage in range(3):
        for block in range(num_blocks):
            num_out = width * 2**stage
            layers.append(BasicBlock(num_in, num_out, 2 if stage and not block else 1))
            num_in = num_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_in, num_classes))


def paper_conv_net(width: int = 48, num_classes: int = 10) -> nn.Sequential:
    """The convolutional network of Wang et al. (2018) for active learning on 28 x 28 images, without its dropout."""

    def conv(num_in: int, num_out: int, size: int, padding: int = 0) -> list[nn.Module]:
        layers = [nn.Conv2d(num_in, num_out, size, padding=padding), nn.BatchNorm2d(num_out), nn.LeakyReLU(0.2)]
        return list(layers)

    wide = 2 * width
    return nn.Sequential(
        *conv(1, width, 3, 1), *conv(width, width, 3, 1), *conv(width, width, 3, 1),
        nn.MaxPool2d(2), nn.BatchNorm2d(width),
        *conv(width, wide, 3, 1), *conv(wide, wide, 3, 1), *conv(wide, wide, 3, 1),
        nn.MaxPool2d(2), nn.BatchNorm2d(wide),
        *conv(wide, wide, 3), *conv(wide, wide, 1), *conv(wide, num_classes, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def mlp(width: int) -> nn.Sequential:
    """784-h-h-10."""
    hidden = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(width, 10))


Data = tuple[Tensor, Tensor, Tensor, Tensor]


def synthetic(shape: Sequence[int], num_train: int = 1000, num_test: int = 200) -> Data:
    """Ten noisy prototypes."""
    generator = torch.Generator().manual_seed(0)
    label_N = torch.arange(num_train + num_test) % 10
    prototypes = torch.randn(10, *shape, generator=generator)
    x = 0.5 * prototypes[label_N] + torch.randn(num_train + num_test, *shape, generator=generator)
    return x[:num_train], label_N[:num_train], x[num_train:], label_N[num_train:]


def handwriting() -> Data:
    """2,000 and 500 images of MNIST, 28 x 28; synthetic ones if it is missing."""
    try:
        data = apd.datasets.mnist()
    except FileNotFoundError:
        return synthetic((1, 28, 28), 2000, 500)
    x_train, x_test = data.x_train[:2000].view(-1, 1, 28, 28), data.x_test[:500].view(-1, 1, 28, 28)
    return x_train, data.y_train[:2000], x_test, data.y_test[:500]


def framed_handwriting() -> Data:
    """The same padded with background to 32 x 32."""
    x_train, y_train, x_test, y_test = handwriting()
    x_train, x_test = (functional.pad(x, (2, 2, 2, 2), value=float(x.min())) for x in (x_train, x_test))
    return x_train, y_train, x_test, y_test


@dataclass(frozen=True)
class Case:
    """A network to sample and distil, and for how long.

    :ivar net: makes the network.
    :ivar data: makes its data.
    :ivar float step_size: of SGLD, and ``batch_size`` rows per step.
    :ivar int warm_start: steps of Adam before sampling, from a draw of the prior.
    :ivar int warmup: draws before the first that is kept.
    :ivar int num_draws: draws to distil from, ``thinning`` steps each.
    :ivar int num_trained: steps of Adam by which the network is trained before it is made Bayesian; the chain then
        starts there. Deep networks learn very slowly from a draw of their prior.
    """

    net: Callable[[], nn.Module]
    data: Callable[[], Data]
    step_size: float
    batch_size: int
    warm_start: int
    warmup: int
    num_draws: int
    thinning: int
    num_trained: int = 0

    def model(self, is_trained: bool = False) -> apd.BNN:
        """The Bayesian network, with group normalisation in place of batch normalisation."""
        torch.manual_seed(0)
        net = with_group_norm(self.net())
        if is_trained:
            self._train(net)
        return apd.BNN(net, prior_scale="fan_in")

    def _train(self, net: nn.Module) -> None:
        x, y, *_ = self.data()
        optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
        for _ in range(self.num_trained):
            row = torch.randint(len(x), (self.batch_size,))
            loss = functional.cross_entropy(net(x[row]), y[row])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()


CASES = {
    "mlp-1M": Case(lambda: mlp(670), lambda: synthetic((784,)), 1e-5, 100, 200, 30, 100, 10),
    "mlp-10M": Case(lambda: mlp(2790), lambda: synthetic((784,)), 1e-5, 100, 200, 30, 60, 10),
    "conv": Case(paper_conv_net, handwriting, 1e-5, 32, 0, 10, 40, 4, num_trained=400),
    "resnet20": Case(resnet, framed_handwriting, 1e-5, 32, 0, 50, 100, 4, num_trained=600),
}
QUICK = {
    "conv": Case(lambda: paper_conv_net(4), lambda: synthetic((1, 28, 28), 100, 20), 1e-5, 16, 0, 2, 12, 1, 3),
    "resnet20": Case(lambda: resnet(1, 4), lambda: synthetic((1, 32, 32), 100, 20), 1e-5, 16, 0, 2, 12, 1, 3),
    "mlp": Case(lambda: mlp(64), lambda: synthetic((784,), 100, 20), 1e-5, 16, 3, 2, 12, 1),
}
