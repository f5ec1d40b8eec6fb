# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Settings of a run, and checks of the arguments that they are made of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_apd.chains.group import Hook, Plan
from pyro_apd.runtime.checks import choice, integer

#: How chains are run, which processes get all draws, and what several processes share among themselves.
METHODS = ("vectorized", "sequential", "parallel", "distributed")
GATHERS = ("rank0", "all", "none")
SPLITS = ("chains", "data")
# Checkpoints per run, by default.
_NUM_CHECKPOINTS = 20


@dataclass(frozen=True)
class Settings:
    """How the plan of a run is carried out; see :class:`~pyro_apd.chains.MCMC`.

    :ivar store_path: a folder for the draws; None keeps them in memory, or beside the checkpoint.
    :ivar checkpoint_path: a file; None for no checkpoints.
    :ivar gather: which of several processes get all draws.
    :ivar split: what is split over several processes, ``"chains"`` or ``"data"``.
    """

    plan: Plan
    chain_method: str
    save_params: list[str] | None = None
    store_path: Path | None = None
    checkpoint_path: Path | None = None
    mp_context: str | None = None
    disable_progbar: bool = False
    gather: str = "rank0"
    split: str = "chains"


def draws_path(checkpoint: Path) -> Path:
    """Where the draws of a run with a checkpoint are, by default."""
    return checkpoint.with_name(checkpoint.name + ".draws")


def refuse_files(kernel: MCMCKernel, path: str | os.PathLike[str] | None) -> None:
    """Checks that a kernel of Pyro or of others is not asked for files.

    :raises ValueError: if it is.
    """
    if path is not None:
        raise ValueError(
            f"store='disk' and checkpoint= are for this package's kernels; {type(kernel).__name__} has neither."
        )


def check_kinds(kernel: object, hook_fn: Hook | None, save_params: Sequence[str] | None) -> None:
    """Checks that arguments are of a kind that a run can use.

    :raises ValueError: if one of them is not.
    """
    is_kernel = callable(getattr(kernel, "begin", None)) or isinstance(kernel, MCMCKernel)
    if isinstance(kernel, type) or not is_kernel:
        got = f"the class {kernel.__name__}" if isinstance(kernel, type) else type(kernel).__name__
        raise ValueError(f"kernel must be an MCMC kernel, such as SGLD(model, step_size); got {got}.")
    if hook_fn is not None and not callable(hook_fn):
        raise ValueError(
            f"hook_fn must be a function, called as hook_fn(kernel, params, stage, i); got {type(hook_fn).__name__}."
        )
    is_listed = isinstance(save_params, (list, tuple, set, frozenset)) and all(isinstance(n, str) for n in save_params)
    if save_params is not None and not is_listed:
        example = [save_params] if isinstance(save_params, str) else ["net.weight"]
        raise ValueError(f"save_params must be a list of names of sites, such as {example}; got {save_params!r:.80}.")


def check_method(chain_method: str | None, gather: str | None, split: str | None) -> None:
    """Checks how chains are run.

    :raises ValueError: if a setting is not known, or settings do not go together.
    """
    if chain_method is not None:
        choice("chain_method", chain_method, METHODS)
    for name, value, accepted in (("gather", gather, GATHERS), ("split", split, SPLITS)):
        if value is not None and chain_method != "distributed":
            raise ValueError(f"{name}={value!r} goes with chain_method='distributed'; got {chain_method!r}.")
        if value is not None:
            choice(name, value, accepted)
    if split == "data" and gather is not None:
        raise ValueError(f"gather={gather!r} goes with split='chains'; with split='data' all have all draws.")


def checked_checkpoint(path: str | os.PathLike[str] | None, every: int | None) -> Path | None:
    """The path of the checkpoint; None for none.

    :raises ValueError: if it is no path, ``checkpoint_every`` is no positive integer, or there is no checkpoint for it.
    """
    if every is not None:
        integer("checkpoint_every", every)
        if path is None:
            raise ValueError(f"checkpoint_every={every} needs checkpoint=, the file to write to.")
    return None if path is None else _checked_path("checkpoint", path, "run.ckpt")


def _checked_path(name: str, path: str | os.PathLike[str], example: str) -> Path:
    """An absolute path.

    :raises ValueError: if it is none.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"{name}={path!r} must be a path, such as {name}={example!r}.")
    return Path(text).absolute()


def checkpoint_interval(path: Path | None, every: int | None, num_draws: int) -> int | None:
    """Draws between checkpoints of a run of ``num_draws``, warm-up included; None for no checkpoints."""
    return None if path is None else every or max(1, num_draws // _NUM_CHECKPOINTS)


def checked_store(store: str, store_path: str | os.PathLike[str] | None, checkpoint: Path | None) -> Path | None:
    """The folder for the draws; None keeps them in memory.

    :raises ValueError: if the settings do not go together.
    """
    choice("store", store, ("memory", "disk"))
    if store == "memory":
        if store_path is not None:
            raise ValueError(f"store_path={store_path!r} goes with store='disk'; got store='memory'.")
        return None
    if store_path is not None:
        return _checked_path("store_path", store_path, "draws")
    if checkpoint is None:
        raise ValueError("store='disk' needs store_path=, a folder for the draws.")
    return draws_path(checkpoint)


def checked_initial_params(params: Mapping[str, Tensor] | None, num_chains: int) -> dict[str, Tensor] | None:
    """With a leading dimension of chains.

    :raises ValueError: if it is given and not the number of chains.
    """
    if params is None:
        return None
    if not isinstance(params, Mapping):
        raise ValueError(
            f"initial_params is a {type(params).__name__}; give a dict of unconstrained values by site, such as "
            "{'w': torch.zeros(3)}."
        )
    values = {name: torch.as_tensor(value) for name, value in params.items()}
    if num_chains == 1:
        return {name: value.unsqueeze(0) for name, value in values.items()}
    for name, value in values.items():
        if value.dim() == 0 or len(value) != num_chains:
            raise ValueError(
                f"initial_params has '{name}' of shape {tuple(value.shape)}; with num_chains={num_chains} its leading "
                f"dimension must be {num_chains}, a start for each chain."
            )
    return values
