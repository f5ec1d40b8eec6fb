# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Refuses models whose log joint density is not a function of latents and data alone.

A model that draws random numbers (dropout in training mode) has another potential at every step, and one that writes to
its own tensors (batch normalisation in training mode) another one after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from pyro_apd.data.minibatch import Call
from pyro_apd.errors import ModelError
from pyro_apd.models.row_terms import ModelRun, differs
from pyro_apd.models.tracing import check_latents, run_model
from pyro_apd.runtime.global_state import other_random_states
from pyro_apd.runtime.random_stream import RandomStream

# Runs in which random numbers that were drawn must have had no effect. What they change in one run of 50 escapes all of
# them in one of 400 models.
_NUM_REPEATS = 300


@dataclass
class ModuleEffects:
    """What modules did beside returning outputs, in the runs of a :func:`watched_modules`.

    :ivar drawing: the innermost module that drew random numbers first; None where none did.
    :ivar written: modules with the names of their own tensors that they wrote to.
    """

    drawing: nn.Module | None = None
    written: list[tuple[nn.Module, str]] = field(default_factory=list)


@contextmanager
def watched_modules(random_state: Callable[[], Any] = tuple) -> Iterator[ModuleEffects]:
    """Context in which every call of a module is watched. At its end, tensors that modules wrote to are restored.

    :param random_state: returns the states of the generators that the modules draw from, for comparison.
    """
    effects = ModuleEffects()
    active: list[tuple[nn.Module, Any, dict[str, tuple[Tensor, Tensor]]]] = []
    changed: list[tuple[Tensor, Tensor]] = []

    def before(module: nn.Module, args: Any) -> None:
        own = {**dict(module.named_buffers(recurse=False)), **dict(module.named_parameters(recurse=False))}
        copies = {name: (tensor, tensor.detach().clone()) for name, tensor in own.items()}
        active.append((module, random_state(), copies))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        while active:
            entered, state, copies = active.pop()
            if entered is module:
                break
        if effects.drawing is None and state != random_state():
            effects.drawing = module
        for name, (tensor, copy) in copies.items():
            if not torch.equal(tensor, copy):
                effects.written.append((module, name))
                changed.append((tensor, copy))

    handles = register_module_forward_pre_hook(before), register_module_forward_hook(after)
    try:
        yield effects
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for tensor, copy in reversed(changed):
                tensor.copy_(copy)


def refuse_writes(model: Callable[..., Any], effects: ModuleEffects) -> None:
    """Raises ModelError if a module wrote to its own tensors."""
    if effects.written:
        module, tensor = effects.written[0]
        fix = "leave max_norm out" if getattr(module, "max_norm", None) else f"call {_path(model, module)}.eval() first"
        raise ModelError(
            f"Module {_described(model, module)} writes to its '{tensor}' in every run of the model (batch "
            "normalisation in training mode does, and an embedding with max_norm): the posterior would depend on the "
            f"number of steps. To sample from it, {fix}. apd.BNN(net) puts the network into evaluation mode."
        )


def check_repeatable(model: Callable[..., Any], call: Call, points: Sequence[Mapping[str, Tensor]]) -> None:
    """Runs the model twice with the same latents; both must give the same densities, to the last bit on a CPU.

    :param points: constrained values of the latents, the start last: at the first of them densities are compared, and
        at all of them the model must have the same latents.
    :raises ModelError: if densities differ, or the model changes the values, naming the module or site.
    """
    # Not at the start, which a model that writes to its latents has changed already; but there if it fails elsewhere.
    *others, start = points
    values = next((point for point in others[:1] if _is_possible(model, call, point)), start)
    stream = RandomStream(0, next((value.device for value in values.values()), "cpu"))

    def random_state() -> Any:
        return stream.states(), torch.get_rng_state().numpy().tobytes(), other_random_states()

    state = random_state()
    with stream, watched_modules(random_state) as effects:
        first = _run(model, call, values)
    has_drawn = state != random_state()
    for _ in range(_NUM_REPEATS if has_drawn else 1):
        with stream:
            name = _differing_site(first, _run(model, call, values))
        if name is not None:
            raise ModelError(_drawing_message(model, effects.drawing, name) if has_drawn else _changing_message(name))
    for point in others:
        _check_latents_at(model, call, point)


def _is_possible(model: Callable[..., Any], call: Call, values: Mapping[str, Tensor]) -> bool:
    try:
        run_model(model, call, {name: value.clone() for name, value in values.items()})
    except Exception:  # values that no chain may ever have
        return False
    return True


def _check_latents_at(model: Callable[..., Any], call: Call, values: Mapping[str, Tensor]) -> None:
    for scale in (0.03, 1.0, 3.0):
        scaled = {name: scale * value if value.numel() == 1 else value for name, value in values.items()}
        given = {name: value.clone() for name, value in scaled.items()}
        try:
            trace = run_model(model, call, given)
        except Exception:  # values that no chain may ever have
            continue
        check_latents(trace, values)
        _refuse_changed(given, scaled)


def _changing_message(name: str) -> str:
    return (
        f"Site '{name}' has another density in two runs of the model with the same latents and data. The model must be "
        "a function of both alone: it may not count its calls or keep values from one to the next."
    )


def _run(model: Callable[..., Any], call: Call, values: Mapping[str, Tensor]) -> ModelRun:
    given = {name: value.clone() for name, value in values.items()}
    run = ModelRun(run_model(model, call, given), torch.arange(0), given)
    _refuse_changed(given, values)
    return run


def _refuse_changed(given: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in given.items():
        if not torch.equal(value, values[name]):
            raise ModelError(
                f"The model writes to the value of latent site '{name}' in place, which is the state of the chain (an "
                "embedding with max_norm does). Leave max_norm out, or work on a copy: value.clone()."
            )


def _differing_site(one: ModelRun, other: ModelRun) -> str | None:
    """The first site that is in one run only, or has other terms."""
    names = {*one.latents, *one.observed}, {*other.latents, *other.observed}
    for name in (*one.latents, *one.observed, *other.observed):
        if name not in names[0] or name not in names[1] or one.site(name).scale != other.site(name).scale:
            return name
        first, second = one.site(name).terms, other.site(name).terms
        if first.shape != second.shape:
            return name
        # The order of sums on a GPU may change from run to run.
        if differs(first, second) if first.is_cuda else not _same_bits(first, second):
            return name
    return None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if torch.equal(one, other):
        return True
    return torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one.isnan(), other.isnan())


def _drawing_message(model: Callable[..., Any], module: nn.Module | None, site: str) -> str:
    if module is None:
        who, fix = "The model's own code", "draw them once before the run and pass them as an argument"
    else:
        who = f"Module {_described(model, module)}"
        fix = f"call {_path(model, module)}.eval() first, or leave the module out; apd.BNN(net) does the former"
    return (
        f"{who} draws random numbers while all latents are given, and they change site '{site}': every step would have "
        f"another potential, and the same seed other draws. To sample from the model, {fix}."
    )


def _described(model: Callable[..., Any], module: nn.Module) -> str:
    return f"'{_name(model, module) or type(module).__name__}' ({type(module).__name__})"


def _path(model: Callable[..., Any], module: nn.Module) -> str:
    name = _name(model, module)
    return f"model.{name}" if name else "its"


def _name(model: Callable[..., Any], module: nn.Module) -> str:
    root = unwrap(model)
    if not isinstance(root, nn.Module):
        return ""
    return next((name for name, found in root.named_modules() if found is module), "")
