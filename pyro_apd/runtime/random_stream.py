# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Random numbers of a thread's own for code that draws from torch's global generators.

The global generators belong to the process: to seed them for a while and to restore them afterwards gives other threads
numbers that are not theirs, and takes from them what they had drawn.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pyro_apd.runtime.threads import one_thread

_SAMPLERS = (
    *("rand", "randn", "randint", "randperm"),
    *("normal", "bernoulli", "multinomial", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet"),
    *("rrelu", "rrelu_"),
)
_METHODS = (
    *("normal_", "uniform_", "random_", "exponential_", "cauchy_", "geometric_", "log_normal_"),
    *("bernoulli", "bernoulli_", "multinomial"),
)
_INITIALISERS = (
    *("uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_"),
    *("kaiming_normal_", "orthogonal_", "sparse_"),
)
# What draws, but takes no generator, by parts of its name.
_OTHERS = ("dropout", "gumbel_softmax", "rrelu", "attention", "lstm", "gru", "rnn_", "fractional_max_pool", "lowrank")


def _functions(owner: Any, names: tuple[str, ...]) -> set[Callable[..., Any]]:
    return {getattr(owner, name) for name in names}


_WITH_GENERATOR = frozenset(
    _functions(torch, _SAMPLERS) | _functions(Tensor, _METHODS) | _functions(torch.nn.init, _INITIALISERS)
)


def _without_generator() -> frozenset[Callable[..., Any]]:
    """Functions of torch that draw from the global generators and cannot be given another one."""
    found = {
        function
        for owner in (torch, functional)
        for name, function in vars(owner).items()
        if callable(function) and any(part in name for part in _OTHERS)
    }
    return frozenset(found - _WITH_GENERATOR)


_WITHOUT_GENERATOR = _without_generator()
# With a generator, these draw the same for all of :func:`torch.vmap`; the other function of each pair does not.
_LIKE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.rand_like: torch.rand,
    torch.randn_like: torch.randn,
    torch.randint_like: torch.randint,
}
_DRAWING = _WITH_GENERATOR | _WITHOUT_GENERATOR | _LIKE.keys()


class _Lending(threading.local):
    """Whether a stream of this thread has lent its state: one around it then leaves the draws alone."""

    is_on = False


_LENDING = _Lending()


class RandomStream(TorchFunctionMode):
    """Context in which torch's functions draw from generators of this object, in this thread alone.

    The numbers are those that the global generators give after :func:`torch.manual_seed`. It may be entered again, and
    then goes on where it stopped. A function that takes no generator, such as dropout, gets the global one in the
    stream's state for the time of its call.

    :param int seed: of the generators.
    :param device: whose generator there is beside that of the CPU; draws on others are not redirected.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self._on_host = torch.Generator().manual_seed(seed)
        device = _indexed(torch.device(device))
        self._on_gpu = torch.Generator(device).manual_seed(seed) if device.type == "cuda" else None
        # A process that is forked inside must not repeat the numbers of this one.
        self._process = os.getpid()

    def get_state(self) -> Tensor:
        """State of the generator on the CPU, as of :meth:`torch.Generator.get_state`."""
        return self._on_host.get_state()

    def set_state(self, state: Tensor) -> None:
        """Sets the generator on the CPU to such a state."""
        self._on_host.set_state(state)

    def states(self) -> tuple[bytes, ...]:
        """States of all its generators, for comparison."""
        generators = [self._on_host] if self._on_gpu is None else [self._on_host, self._on_gpu]
        return tuple(generator.get_state().numpy().tobytes() for generator in generators)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # First what most calls are: they are to cost little.
        if func not in _DRAWING or os.getpid() != self._process or _LENDING.is_on:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if func in _WITHOUT_GENERATOR:
            with self._lent():
                return func(*args, **kwargs)
        if func in _LIKE:
            func, args, kwargs = _by_shape(func, *args, **kwargs)
        if kwargs.get("generator") in (None, torch.default_generator):
            device = _device(args, kwargs)
            generator = next((g for g in (self._on_host, self._on_gpu) if g is not None and g.device == device), None)
            if generator is not None:
                kwargs = {**kwargs, "generator": generator}
        return func(*args, **kwargs)

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """Context in which the global generators have the state of the stream, and give it back at the end."""
        on_gpu = self._on_gpu
        devices = [] if on_gpu is None else [on_gpu.device]
        with one_thread(), torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.get_state())
            if on_gpu is not None:
                torch.cuda.set_rng_state(on_gpu.get_state(), on_gpu.device)
            _LENDING.is_on = True
            try:
                yield
            finally:
                _LENDING.is_on = False
                self.set_state(torch.get_rng_state())
                if on_gpu is not None:
                    on_gpu.set_state(torch.cuda.get_rng_state(on_gpu.device))


def _by_shape(
    func: Callable[..., Any], like: Tensor, *bounds: int, memory_format: Any = None, **options: Any
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """A call of ``torch.rand(shape)`` for one of ``torch.rand_like(tensor)``, and so on."""
    options = {"dtype": like.dtype, "device": like.device, **options}
    return _LIKE[func], (*bounds, like.shape), options


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Where a sampler draws: as it is told, else where its first tensor is, else on torch's default device."""
    device = kwargs.get("device")
    if device is None:
        tensor = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), None)
        device = torch.get_default_device() if tensor is None else tensor.device
    return _indexed(torch.device(device))


def _indexed(device: torch.device) -> torch.device:
    """The same device, with the number of the present one where it has none."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())
