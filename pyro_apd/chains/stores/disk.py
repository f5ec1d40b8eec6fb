# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Draws in files: a folder that a run writes in constant memory, and that can be read before it is complete.

::

    draws.json       format, layout, dtype, shape; written after the others, so that a folder with it is a store
    theta.npy        (C, S, D), unconstrained draws
    statistics.npy   (C, S, 4): 1 where the draw was written, then potential, grad_norm and step_size
    constrained.npy  (C, S, K), constrained values of the sites that are not real; made when they are read

Files are written with ordinary writes and read through a memory mapping. Written draws then take no memory of the
process, and a full disk is an error and not a crash. A draw exists once its ``1`` is written, after the draw itself, so
that a killed process leaves a store that can be read.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_apd.chains.stores.base import STATISTICS, DrawStore, as_bytes
from pyro_apd.chains.stores.npy import DTYPES, damaged, make_npy, map_npy, npy_header, write_all
from pyro_apd.errors import shortened
from pyro_apd.models.layout import Layout
from pyro_apd.runtime import checks
from pyro_apd.runtime.files import atomic_write, check_regular, remove_leftovers, with_message

logger = logging.getLogger("pyro_apd")

FORMAT_VERSION = 1
_KIND = "pyro_apd draws"
_FILES = ("draws.json", "theta.npy", "statistics.npy", "constrained.npy")
# A longer draws.json is not read, so that a hostile one cannot fill the memory.
_MAX_DESCRIPTION = 4 * 2**20
# Draws on an accelerator are copied to the host in groups of this size, since each copy waits for the device.
_PENDING = 32


class DiskStore(DrawStore):
    """Draws in a folder with the files of this module. Made by :meth:`create` or :func:`open_store`.

    Its tensors map the files: they take memory as they are read, which the system can reclaim. Changing them in place
    does not change the files.

    :ivar Path path: the folder.
    """

    def __init__(self, path: Path, description: Mapping[str, Any]) -> None:
        layout = Layout.from_json(description["layout"])
        super().__init__(layout, *description["shape"][:2])
        self.path, self.info = path, dict(description.get("info", {}))
        self._description = description
        self.dtype: torch.dtype = getattr(torch, description["dtype"])
        self._statistics_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self._maps: dict[str, Tensor] = {}
        self._files: dict[str, tuple[int, int]] = {}
        self._pending: list[tuple[int, int, Tensor, Tensor]] = []

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        layout: Layout,
        num_chains: int,
        num_draws: int,
        dtype: torch.dtype,
        info: Mapping[str, Any] | None = None,
        replacing: str | None = None,
    ) -> DiskStore:
        """Makes the folder, with files of the full size, which take space on disk as they fill.

        A store at this path without draws is replaced; tensors that map its files stay valid.

        :param replacing: ``info["run"]`` of a store that is replaced also with its draws.
        :raises FileExistsError: if ``path`` is a file, a folder with other files, or a store of other draws.
        :raises OSError: if the disk has no space for the draws.
        """
        path = Path(path).absolute()
        # A run that was killed while it made the files leaves some of them.
        remove_leftovers(path / "draws.json")
        if path.exists() and not (path.is_dir() and set(os.listdir(path)) <= set(_FILES)):
            raise FileExistsError(f"store_path='{path}' exists and is no store of draws; give another path.")
        path.mkdir(parents=True, exist_ok=True)
        if (path / "draws.json").exists():
            _check_replaceable(path, replacing)
            logger.info("Replacing the store of draws at '%s'.", path)
        for name in _FILES:
            (path / name).unlink(missing_ok=True)
        shape = (num_chains, num_draws, layout.size)
        _check_space(path, shape, dtype)
        description = {
            "kind": _KIND,
            "format": FORMAT_VERSION,
            "layout": layout.to_json(),
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "statistics": ["is_kept", *STATISTICS],
            "info": dict(info or {}),
        }
        text = json.dumps(description, indent=1)
        store = cls(path, json.loads(text))
        store.layout = layout
        make_npy(path / "theta.npy", shape, dtype)
        make_npy(path / "statistics.npy", (num_chains, num_draws, 1 + len(STATISTICS)), store._statistics_dtype)
        with atomic_write(path / "draws.json") as temporary:
            temporary.write_text(text + "\n")
        return store

    @property
    def counts(self) -> list[int]:
        """Number of draws by chain: those before the first that is not marked as kept."""
        self.flush()
        # Read from the file: another process may be writing, and a private mapping need not show that.
        path = self._readable("statistics.npy")
        shape, dtype, offset = npy_header(path)
        numbers = np.fromfile(path, dtype, math.prod(shape), offset=offset)
        kept_CS = torch.from_numpy(numbers.reshape(shape)[:, :, 0] == 1)
        return [self.num_draws if bool(row.all()) else int(row.int().argmin()) for row in kept_CS]

    @property
    def theta_CSD(self) -> Tensor:
        """All draws, unconstrained, mapped."""
        self.flush()
        mapped = self._map("theta.npy")
        return mapped.view(torch.bfloat16) if self.dtype == torch.bfloat16 else mapped

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Statistics of every draw, ``(C, S)`` each, mapped."""
        self.flush()
        statistics_CSK = self._map("statistics.npy")
        return {name: statistics_CSK[:, :, 1 + i] for i, name in enumerate(STATISTICS)}

    def write(self, chain: int, draw: int, theta_CD: Tensor, statistics: Mapping[str, Any]) -> None:
        """Writes to the files; from an accelerator, several draws at a time.

        :raises OSError: if the disk is full.
        """
        statistics_CK = theta_CD.new_ones((len(theta_CD), 1 + len(STATISTICS)), dtype=self._statistics_dtype)
        for i, name in enumerate(STATISTICS):
            statistics_CK[:, 1 + i] = statistics[name]
        for ended in self._ended.intersection(range(chain, chain + len(theta_CD))):
            statistics_CK[ended - chain, 0] = 0
        if theta_CD.device.type == "cpu":
            self._put_draw(chain, draw, theta_CD, statistics_CK)
            return
        self._pending.append((chain, draw, theta_CD.clone(), statistics_CK))
        if len(self._pending) >= _PENDING:
            self.flush()

    def truncate(self, chain: int, count: int) -> None:
        """Removes the draws of a chain from ``count`` on."""
        self.flush()
        for draw in range(count, self.counts[chain]):
            self._put("statistics.npy", chain, draw, torch.zeros(1 + len(STATISTICS), dtype=self._statistics_dtype))

    def flush(self, durably: bool = False) -> None:
        """Writes pending draws; with ``durably``, synced to the disk."""
        pending, self._pending = self._pending, []
        if pending:
            # Draws of the same shape are copied to the host together.
            for _, group in _by_shape(pending).items():
                theta_NCD = torch.stack([theta for _, _, theta, _ in group]).cpu()
                statistics_NCK = torch.stack([statistics_CK for *_, statistics_CK in group]).cpu()
                for (chain, draw, _, _), theta_CD, statistics_CK in zip(group, theta_NCD, statistics_NCK, strict=True):
                    self._put_draw(chain, draw, theta_CD, statistics_CK)
        if durably:
            for file, _ in self._files.values():
                os.fsync(file)

    def close(self) -> None:
        """Closes the files for writing; draws stay readable."""
        self.flush()
        for file, _ in self._files.values():
            os.close(file)
        self._files = {}

    def remove(self) -> None:
        """Deletes the folder. Its tensors stay valid."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return {**self.__dict__, "_maps": {}, "_files": {}, "_pending": []}

    def __del__(self) -> None:
        for file, _ in getattr(self, "_files", {}).values():
            os.close(file)

    def _put_draw(self, chain: int, draw: int, theta_CD: Tensor, statistics_CK: Tensor) -> None:
        for i in range(len(theta_CD)):
            self._put("theta.npy", chain + i, draw, theta_CD[i])
        # After the draws, since the statistics mark a draw as kept.
        for i in range(len(theta_CD)):
            self._put("statistics.npy", chain + i, draw, statistics_CK[i])

    def _put(self, name: str, chain: int, draw: int, values: Tensor) -> None:
        if name not in self._files:
            _, _, offset = npy_header(self.path / name)
            self._files[name] = (os.open(self.path / name, os.O_WRONLY | getattr(os, "O_BINARY", 0)), offset)
        file, start = self._files[name]
        data = as_bytes(values)
        try:
            write_all(file, data, start + (chain * self.num_draws + draw) * data.nbytes)
        except OSError as error:
            message = (
                f"Cannot write draw {draw} of chain {chain} to '{self.path}': {error.strerror or error}. The draws "
                "before it are intact: open_store reads them, and a run with checkpoint= continues from there once "
                "files can be written."
            )
            raise with_message(error, message) from error

    def _map(self, name: str) -> Tensor:
        if name not in self._maps:
            self._maps[name] = map_npy(self._readable(name))
        return self._maps[name]

    def _readable(self, name: str) -> Path:
        """Path of a file; of one that was removed while it is written, that of the open file, which has the draws."""
        path = self.path / name
        description = self.path / "draws.json"
        if description.exists() and _read_description(self.path) != self._description:
            raise ValueError(
                f"The store at '{self.path}' was replaced by that of another run since it was opened here. Read the "
                "new one by open_store(path); of this one, draws that were read before are intact."
            )
        return Path(f"/dev/fd/{self._files[name][0]}") if name in self._files and not path.exists() else path

    def _buffer(self, size: int) -> Tensor:
        # A new file, since that of an earlier reading may have fewer draws.
        (self.path / "constrained.npy").unlink(missing_ok=True)
        self._maps.pop("constrained.npy", None)
        if "constrained.npy" in self._files:
            os.close(self._files.pop("constrained.npy")[0])
        make_npy(self.path / "constrained.npy", (self.num_chains, self.num_draws, size), self.dtype)
        return torch.empty(0)

    def _fill(self, buffer: Tensor, chain: int, start: int, values: Tensor) -> None:
        for i, row in enumerate(values.to(self.dtype)):
            self._put("constrained.npy", chain, start + i, row)

    def _filled(self, buffer: Tensor) -> Tensor:
        mapped = self._map("constrained.npy")
        return mapped.view(torch.bfloat16) if self.dtype == torch.bfloat16 else mapped


def open_store(path: str | os.PathLike[str]) -> DiskStore:
    """Opens the store that a run with ``store="disk"`` wrote, finished or not, also while it is being written.

    The store can be used in place of the run: ``distill(open_store(path), model, data=(x, y))``.

    :raises FileNotFoundError: if there is no store at ``path``.
    :raises ValueError: if it is damaged, or of a newer format.
    """
    path = Path(path).absolute()
    description = _read_description(path)
    _check_description(path, description)
    store = DiskStore(path, description)
    chains, draws, size = description["shape"]
    expected = {
        "theta.npy": ((chains, draws, size), DTYPES[store.dtype]),
        "statistics.npy": ((chains, draws, 1 + len(STATISTICS)), DTYPES[store._statistics_dtype]),
    }
    for name, (shape, dtype) in expected.items():
        found_shape, found_dtype, offset = npy_header(path / name)
        needed = offset + math.prod(shape) * np.dtype(dtype).itemsize
        if found_shape != shape or np.dtype(found_dtype) != np.dtype(dtype) or (path / name).stat().st_size < needed:
            raise damaged(
                path,
                f"{name} is {found_dtype} of shape {found_shape}, {(path / name).stat().st_size} bytes, and draws.json "
                f"asks for {dtype} of shape {shape}, {needed}",
            )
    return store


def _check_replaceable(path: Path, replacing: str | None) -> None:
    """:raises FileExistsError: if there are draws, of another run than ``replacing``."""
    try:
        store = open_store(path)
        if replacing is not None and store.info.get("run") == replacing:
            return
        counts, what = store.counts, "draws of an earlier run"
    except ValueError as error:
        counts, what = None, f"a store that cannot be read ({error})"
    if counts is None or any(counts):
        raise FileExistsError(
            shortened(
                f"store_path='{path}' holds {what}{f', {counts} by chain' if counts else ''}, which this run would "
                "replace. Give another path, or move the folder away. Draws are read by open_store(path), and a run "
                "that is to go on after a crash has checkpoint=."
            )
        )


def _read_description(path: Path) -> Any:
    file = path / "draws.json"
    try:
        size = check_regular(file).st_size
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"'{path}' holds no store of draws: it has no 'draws.json'. Give the store_path of a run with store='disk'."
        ) from None
    except ValueError as error:
        raise damaged(path, f"{error}") from error
    if size > _MAX_DESCRIPTION:
        raise damaged(path, f"draws.json has {size:,} bytes, and at most {_MAX_DESCRIPTION:,} are read")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"draws.json is not JSON ({error})") from error


def _check_space(path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    needed = math.prod(shape) * dtype.itemsize
    free = shutil.disk_usage(path).free
    if needed > free:
        raise OSError(
            f"The draws take {needed / 1e6:,.0f} MB ({shape[0]} chains of {shape[1]} draws of {shape[2]} numbers), and "
            f"'{path}' has {free / 1e6:,.0f} MB left. Keep fewer draws (thinning, save_params), or give another "
            "store_path."
        )


def _check_description(path: Path, description: Any) -> None:
    if not isinstance(description, dict) or description.get("kind") != _KIND:
        raise ValueError(f"'{path}/draws.json' does not describe a store of draws.")
    version = description.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version > FORMAT_VERSION:
        raise ValueError(
            f"The store at '{path}' has format {version!r:.40}; this pyro_apd reads up to {FORMAT_VERSION}. Update it: "
            "pip install -U pyro-apd."
        )
    try:
        layout = Layout.from_json(description["layout"])
        chains, draws, size = description["shape"]
        sound = size == layout.size and all(checks.is_integer(n) and 0 <= n < 2**48 for n in (chains, draws, size))
        sound = sound and getattr(torch, description["dtype"]) in DTYPES
        sound = sound and isinstance(description.get("info", {}), dict)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise damaged(path, f"draws.json is malformed ({error!r})") from error
    if not sound:
        raise damaged(path, "layout, shape, dtype and info in draws.json do not go together")


def _by_shape(pending: list[tuple[int, int, Tensor, Tensor]]) -> dict[Any, list[tuple[int, int, Tensor, Tensor]]]:
    groups: dict[Any, list[tuple[int, int, Tensor, Tensor]]] = {}
    for item in pending:
        groups.setdefault(tuple(item[2].shape), []).append(item)
    return groups
