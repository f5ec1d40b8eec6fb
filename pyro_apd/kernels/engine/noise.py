# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Noise for Langevin steps, which on a CPU costs about as much as the gradient.

Half of the cost of normal noise is PyTorch's Mersenne twister. For float32 on a CPU, raw bits come from NumPy's SFC64,
at a third of the cost, and the caller applies the Box-Muller transform: a compiled step fuses it with the update. Each
chain has its own generator, so that a chain's noise is the same whether it runs alone or with others. On an
accelerator, where each generator is a separate call, one serves all chains, unless they have to be independent of each
other's presence.

Three-point noise takes a byte per number and no transcendental function. A step of order 1 keeps its weak order with it
(Kloeden & Platen 1992, section 14.1), since its moments up to order 3, and all odd ones, are those of a normal, and
the fourth is 2.977 instead of 3. What a draw has of it is a sum over the steps between draws, so that there have to be
many, see :data:`MIN_THINNING`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Raw numbers drawn at once for each chain: small models would otherwise spend their time on the calls.
_BLOCK = 16384
_BITS = 24  # of a float32's mantissa
_MASK = 2**_BITS - 1
# Bytes of 256 for each of the two points that are not 0: a sixth, rounded.
_POINT = 43

#: Steps from draw to draw, at least, for which three-point noise is accepted.
MIN_THINNING = 20


class Noise:
    """A stream of noise for one chain, or for C chains at once.

    :param Tensor like: a state ``(D,)`` or ``(C, D)``, whose shape, dtype and device noise has.
    :param seeds: one per chain.
    :param int at_once: steps for which :meth:`raw` is usually asked, so that they lie together.
    :param bool per_chain: give each chain a generator of its own also on an accelerator.
    :param str kind: ``"normal"`` or ``"three-point"``.
    """

    def __init__(
        self, like: Tensor, seeds: Sequence[int], at_once: int = 1, per_chain: bool = False, kind: str = "normal"
    ) -> None:
        self._shape, self._size, self._dtype = like.shape, like.shape[-1], like.dtype
        is_cpu = like.device.type == "cpu"
        is_from_bits = kind != "normal" or (is_cpu and like.dtype == torch.float32)
        self._form = FORMS[kind] if is_from_bits else None
        self._is_numpy = is_cpu and is_from_bits
        self._is_shared = not (is_cpu or per_chain)
        self._buffer = like.new_empty((1, *like.shape), dtype=self._form.dtype if self._form else None)
        self._device_generators = [torch.Generator(device=like.device).manual_seed(seed) for seed in seeds]
        self._generators = [np.random.SFC64(seed) for seed in seeds]
        per_word = self._form.per_word if self._form else 2
        self._words = -(-self._size // per_word)  # of 64 bits, per step of one chain
        self._width = per_word * self._words if self._is_numpy else self._size  # numbers per step of one chain
        self._steps = at_once * max(1, _BLOCK // max(self._words * at_once, 1))
        self._raw_KCB = torch.empty(0)
        self._normal_KCD: Tensor | None = None
        self._position = 0  # steps taken from the present block; 0 where there is none yet
        self._before_block = self._generator_states()

    def raw(self, num_steps: int) -> Tensor:
        """The next steps' noise ``(K, ...)``, in the form that :meth:`to_normal` takes; valid until the next call."""
        if self._is_shared:
            return self._filled(self._buffers(num_steps), self._device_generators[0])
        left = self._steps - self._position % self._steps  # of this block, or of the next where this is used up
        if num_steps <= left:
            self._advance()
            taken = self._raw_KCB[self._position - 1 : self._position - 1 + num_steps]
            self._position += num_steps - 1
        else:
            taken = torch.stack([self._next_raw() for _ in range(num_steps)])
        return taken.view(num_steps, *self._shape[:-1], self._width)

    def raw_like(self, num_steps: int) -> Tensor:
        """A tensor of zeros of the form that :meth:`raw` gives."""
        return self._buffer.new_zeros((num_steps, *self._shape[:-1], self._width))

    def to_normal(self, raw: Tensor) -> Tensor:
        """Noise ``(K, ...)`` of the state's shape from what :meth:`raw` gave: a function of tensors alone."""
        return raw if self._form is None else self._form.to_noise(raw, self._dtype)[..., : self._size]

    def normal(self) -> Tensor:
        """The next step's noise; valid until the next call."""
        if self._is_shared:
            return self.to_normal(self.raw(1))[0]
        self._advance()
        if self._normal_KCD is None:
            self._normal_KCD = self.to_normal(self._raw_KCB)
        return self._normal_KCD[self._position - 1].view(self._shape)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        before = self._generator_states() if self._is_shared else self._before_block
        return {"before_block": before, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, on a stream of the same shape."""
        if self._is_shared:
            self._device_generators[0].set_state(state["before_block"]["device"])
            return
        if self._is_numpy:
            for generator, words in zip(self._generators, state["before_block"]["sfc64"], strict=True):
                template = generator.state
                template["state"]["state"] = words.numpy().view(np.uint64).copy()
                generator.state = {**template, "has_uint32": 0, "uinteger": 0}
        else:
            for device_generator, words in zip(self._device_generators, state["before_block"]["torch"], strict=True):
                device_generator.set_state(words)
        self._position = 0
        if state["position"]:
            self._advance()
        self._before_block, self._position = state["before_block"], int(state["position"])

    def _buffers(self, num_steps: int) -> Tensor:
        if len(self._buffer) != num_steps:
            self._buffer = self._buffer.new_empty((num_steps, *self._shape))
        return self._buffer

    def _next_raw(self) -> Tensor:
        self._advance()
        return self._raw_KCB[self._position - 1]

    def _advance(self) -> None:
        if self._position in (0, self._steps):
            self._before_block, self._position = self._generator_states(), 0
            blocks = self._blocks()
            self._raw_KCB = blocks[0].unsqueeze(1) if len(blocks) == 1 else torch.stack(blocks, 1)
            self._normal_KCD = None
        self._position += 1

    def _blocks(self) -> list[Tensor]:
        """The next numbers of each chain, ``(K, B)``."""
        if not self._is_numpy or self._form is None:
            empty = [self._buffer.new_empty((self._steps, self._width)) for _ in self._device_generators]
            return [self._filled(block, g) for block, g in zip(empty, self._device_generators, strict=True)]
        count = self._steps * self._words
        raw = [torch.from_numpy(g.random_raw(count).view(np.int64)).view(self._form.dtype) for g in self._generators]
        return [numbers.view(self._steps, self._width) for numbers in raw]

    def _filled(self, block: Tensor, generator: torch.Generator) -> Tensor:
        """With raw numbers, in place, from a generator of torch."""
        return block.normal_(generator=generator) if self._form is None else block.random_(generator=generator)

    def _generator_states(self) -> dict[str, Any]:
        if self._is_shared:
            return {"device": self._device_generators[0].get_state()}
        if not self._is_numpy:
            return {"torch": [generator.get_state() for generator in self._device_generators]}
        return {"sfc64": [torch.from_numpy(g.state["state"]["state"].view(np.int64).copy()) for g in self._generators]}


def box_muller(bits: Tensor) -> Tensor:
    """Standard normals ``(..., 2h)`` from random 32-bit integers ``(..., 2h)``, Box & Muller (1958).

    Uniforms have 24 bits, as PyTorch's own have, so that no normal exceeds 5.77 in size.
    """
    first, second = bits.chunk(2, dim=-1)
    radius = torch.sqrt(-2.0 * torch.log(((first & _MASK) + 1).float() * 2.0**-_BITS))
    angle = (second & _MASK).float() * (2 * math.pi * 2.0**-_BITS)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], -1)


def three_point(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """-a, 0 or a from random bytes of the same shape; a and -a with probability 43/256 each, and a variance of 1."""
    number = raw.to(torch.int32)
    sign = (number < _POINT).to(dtype) - (number >= 256 - _POINT).to(dtype)
    return sign * math.sqrt(128 / _POINT)


@dataclass(frozen=True)
class Form:
    """How noise is made from bits.

    :ivar dtype: of raw numbers.
    :ivar int per_word: raw numbers in 64 bits.
    :ivar to_noise: noise of a dtype from raw numbers.
    """

    dtype: torch.dtype
    per_word: int
    to_noise: Callable[[Tensor, torch.dtype], Tensor]


FORMS = {
    "normal": Form(torch.int32, 2, lambda raw, _: box_muller(raw)),
    "three-point": Form(torch.uint8, 8, three_point),
}


def checked_noise(kind: Any, thinning: int) -> str:
    """``kind``, where it suits the number of steps per draw.

    :raises ValueError: if there is no such noise, or there are too few steps.
    """
    if not isinstance(kind, str) or kind not in FORMS:
        raise ValueError(f"noise={kind!r} must be {' or '.join(repr(name) for name in FORMS)}.")
    if kind != "normal" and thinning < MIN_THINNING:
        raise ValueError(
            f"noise={kind!r} is for thinning of at least {MIN_THINNING}, got thinning={thinning}: a draw's noise must "
            "be a sum over many steps. Set a larger thinning, or leave out noise."
        )
    return kind
