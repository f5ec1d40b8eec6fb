# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""One run of the driver: which chains, in which processes, into which store, from which checkpoint."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
import torch.multiprocessing

from pyro_apd.chains.checkpoint import (
    Checkpoint,
    CheckpointError,
    Progress,
    previous_path,
    read_checkpoint,
    write_checkpoint,
)
from pyro_apd.chains.group import GroupRun, begin
from pyro_apd.chains.identity import check_identity, run_identity
from pyro_apd.chains.progress_bar import ProgressBars
from pyro_apd.chains.settings import Settings, draws_path
from pyro_apd.chains.stores.base import DrawStore, MemoryStore, kept_layout
from pyro_apd.chains.stores.disk import DiskStore, open_store
from pyro_apd.chains.workers import Job, run_workers
from pyro_apd.data.loader import refuse_worker_processes
from pyro_apd.kernels.engine.chain_set import ChainSet
from pyro_apd.kernels.engine.temperature import Temperature
from pyro_apd.models.frozen import FrozenTensors
from pyro_apd.models.layout import Layout
from pyro_apd.runtime.announcements import listening
from pyro_apd.runtime.file_lock import locked
from pyro_apd.runtime.files import with_message
from pyro_apd.runtime.seeds import derived_seed, fresh_seed
from pyro_apd.runtime.threads import give_way

if TYPE_CHECKING:
    from pyro_apd.kernels.base import StochasticGradientKernel
    from pyro_apd.kernels.engine.chain import Chain

logger = logging.getLogger("pyro_apd")


class Run:
    """One call of :meth:`pyro_apd.chains.MCMC.run`.

    :param stack: closed when the run is over, however it ends.
    :ivar range chains: numbers of the chains that the store has, in order of its rows.
    """

    def __init__(
        self,
        kernel: StochasticGradientKernel,
        settings: Settings,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stack: ExitStack,
    ) -> None:
        self.kernel = kernel
        self.settings = settings
        self.plan = settings.plan
        self.args = args
        self.kwargs = kwargs
        self.store: DrawStore | None = None
        #: Name of the run whose draws may be replaced: that of the same driver before.
        self.replacing: str | None = None
        self._stack = stack
        self._path = settings.checkpoint_path
        self._is_parallel = settings.chain_method == "parallel" and self.plan.num_chains > 1
        is_one = settings.chain_method == "vectorized" or self.plan.num_chains == 1
        width = self.plan.num_chains if self.plan.num_chains > 1 else None
        self.chains = range(self.plan.num_chains)
        self.groups = [ChainSet(0, width)] if is_one else [ChainSet(i) for i in range(self.plan.num_chains)]
        self.progress = {chains.first: Progress() for chains in self.groups}
        self._identity: dict[str, Any] = {}
        self._notes: dict[str, Any] = {}
        self._bars: ProgressBars | None = None

    def sample(self) -> None:
        """All chains, from where a checkpoint left them.

        :raises CheckpointError: if another run writes the same files.
        :raises OSError: if a folder for them cannot be made.
        """
        if self._is_parallel:
            refuse_worker_processes(self.args)
        for name, path in self._own_files().items():
            self._lock(name, path)
        saved = self._read()
        self._stack.callback(self.kernel.cleanup)
        self._stack.enter_context(_seeded_kernel(self.kernel, self._seed(saved)))
        done = {first: progress.num_done for first, progress in saved.chains.items()} if saved else {}
        pending = [chains for chains in self.groups if done.get(chains.first, 0) < self.plan.total]
        # The first chain has the layout, also where all chains run in other processes, or are finished.
        first = (pending or self.groups)[0] if not self._is_parallel else ChainSet(0)
        chain: Chain | None = begin(self.kernel, self.plan, first, self.args, self.kwargs)
        assert chain is not None
        store = self._open(chain, saved)
        if self._is_parallel:
            self.kernel.end(chain)
            self._run_workers()
            return
        for chains in self.groups:
            progress = self.progress[chains.first]
            if progress.num_done >= self.plan.total:
                continue
            if chain is None:
                chain = begin(self.kernel, self.plan, chains, self.args, self.kwargs)
            bars = ProgressBars(self.plan, 1, self.settings.disable_progbar)
            with bars as self._bars, listening(bars.announce):
                self._bars.start(0, progress.num_done)
                GroupRun(self.kernel, chain, self.plan, store, progress).run(self)
            chain = None

    @property
    def num_followed(self) -> int:
        """Number of chains whose outcome is known here."""
        return len(self.chains)

    def report(self, chain: int) -> dict[str, Any]:
        """What the kernel reported at the end of a chain, or of the group that it was in."""
        first = max(first for first in self.progress if first <= chain)
        report = dict(self.progress[first].report)
        if "temperatures" in report:
            report["temperatures"] = [Temperature(**reading) for reading in report["temperatures"]]
        if "excursions" in report:
            by_row = report["excursions"]
            report["excursions"] = by_row[chain - first] if by_row else []
        return report

    def divergences(self) -> list[dict[str, Any]]:
        """Notes of the chains that diverged."""
        noted = [note for progress in self.progress.values() for note in progress.divergences]
        return sorted(noted, key=lambda note: note["chain"])

    def settled_store(self) -> DrawStore:
        """The store as the caller asked for it."""
        assert self.store is not None
        if self.settings.store_path is not None or not isinstance(self.store, DiskStore):
            return self.store
        if self._device.type != "cpu":
            return MemoryStore.of(self.store, self._device)
        # The mapped files serve as memory; a copy would take as much again.
        store = MemoryStore.adopting(self.store)
        if self._path is None:
            self.store.remove()
        return store

    # -- a Listener ---------------------------------------------------------------------------------------------------

    def drew(self, chains: ChainSet, num_done: int, num_diverged: int) -> None:
        """Updates the progress bar, and lets other threads run models."""
        give_way()
        assert self._bars is not None
        if self._bars.wants(num_done):
            self._bars.show(0, num_done, num_diverged, self.kernel.logging())

    def is_due(self, chains: ChainSet, num_done: int) -> bool:
        """Whether it is time for a checkpoint."""
        return self.plan.checkpoint_every is not None and num_done % self.plan.checkpoint_every == 0

    def checkpoint(self, chains: ChainSet, progress: Progress) -> None:
        """Writes it."""
        self._save({chains.first: progress})

    # -- internals ----------------------------------------------------------------------------------------------------

    def _own_files(self) -> dict[str, Path]:
        """Checkpoint and store that this process alone writes, by the argument that names them."""
        files = {"checkpoint": self._path, "store_path": self.settings.store_path}
        return {name: path for name, path in files.items() if path is not None}

    def _lock(self, name: str, path: Path) -> None:
        """Reserves a file or a folder for this run, to its end."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"{name}='{path}': its folder cannot be made ({error.strerror}). Nothing was written."
            raise with_message(error, f"{message} Make the folder, or give another path.") from error

        def refusal(holder: str) -> CheckpointError:
            return CheckpointError(
                f"{name}='{path}' is in use by another run: {holder}. Wait until it ends, or give another path."
            )

        self._stack.enter_context(locked(path, refusal))

    def _read(self) -> Checkpoint | None:
        """The checkpoint to go on from."""
        return None if self._path is None else read_checkpoint(self._path)

    def _seed(self, saved: Checkpoint | None) -> int | None:
        """The run's seed, where the kernel has none and it is known."""
        return saved.notes.get("seed") if saved else None

    def _name(self) -> str:
        """A name by which this run's draws are recognised."""
        return os.urandom(8).hex()

    def _create(self, path: Path, kept: Layout, dtype: torch.dtype, info: Mapping[str, Any]) -> DiskStore:
        return DiskStore.create(path, kept, len(self.chains), self.plan.num_samples, dtype, info, self.replacing)

    def _save(self, saved: Mapping[int, Progress]) -> None:
        assert self._path is not None
        self._saved.update(saved)
        try:
            write_checkpoint(self._path, Checkpoint(self._identity, self._saved, self._notes))
        except OSError as error:
            last = next((path for path in (self._path, previous_path(self._path)) if path.exists()), None)
            advice = f" Once files can be written, the same call continues from '{last}'." if last else ""
            raise with_message(error, f"{error.strerror or error} {self._kept()}{advice}") from error

    def _kept(self) -> str:
        """A sentence on where the draws are after an error."""
        try:
            counts = self.store.counts if self.store is not None else []
        except (OSError, ValueError):
            return "The files of the draws cannot be read."
        return f"The draws so far, {counts} by chain, are in get_samples()."

    def _open(self, chain: Chain, saved: Checkpoint | None) -> DrawStore:
        """The store: new, or that of the checkpoint."""
        self._device = chain.theta.device
        dtype = chain.theta.dtype
        kept = kept_layout(chain.layout, self.settings.save_params)
        path = self.settings.store_path
        if self._path is not None:
            self._identity = self._describe(chain)
            if saved is not None:
                check_identity(self._path, saved.identity, self._identity)
                self._check_device(saved)
                self.store = self._resume(saved, kept)
                return self.store
            path = path or draws_path(self._path)
        elif path is None and self._is_parallel:
            path = _shared_folder(self.plan.num_chains * self.plan.num_samples * kept.size * dtype.itemsize)
            self._stack.callback(_remove_folder, path)
        if path is None:
            self.store = MemoryStore(kept, len(self.chains), self.plan.num_samples, chain.theta)
            self.store.info = self._frozen_tensors(chain.layout)
            return self.store
        self._notes = {"run": self._name(), **self._circumstances()}
        try:
            store = self._create(path, kept, dtype, {"run": self._notes["run"], **self._frozen_tensors(chain.layout)})
        except OSError as error:
            if error.errno is None:  # the store's own message
                raise
            message = f"Cannot write the draws to '{path}': {error.strerror}. Nothing was sampled yet."
            raise with_message(error, message) from error
        self._stack.callback(store.close)
        self.store = store
        self._saved = {first: Progress() for first in self.progress}
        if self._path is not None:
            self._save({})
        return store

    def _circumstances(self) -> dict[str, Any]:
        """Notes on how the run was begun."""
        versions = {"torch": torch.__version__}
        return {"seed": self.kernel.seed, "versions": versions, "device": self._device.type}

    def _check_device(self, saved: Checkpoint) -> None:
        """Checks that the random streams of chains that have not ended continue on this kind of device.

        :raises CheckpointError: if they do not.
        """
        device = saved.notes.get("device")
        if device != self._device.type and any(progress.state is not None for progress in saved.chains.values()):
            raise CheckpointError(
                f"The checkpoint '{self._path}' is of a run on '{device}', and this run is on '{self._device.type}', "
                f"where other random numbers are drawn. Move model and data to '{device}', or give another checkpoint=."
            )

    def _frozen_tensors(self, layout: Layout) -> dict[str, Any]:
        """Digests of what the model reads beside its latents, by which the draws are recognised as those of a model."""
        if self.kernel.model is None:
            return {}
        sizes = {name: getattr(self.kernel, name, None) for name in ("num_data", "batch_size")}
        frozen = FrozenTensors.of_run(self.kernel.model, layout.names, self.args, self.kwargs, **sizes)
        return {} if frozen is None else {"frozen": frozen.to_json()}

    def _resume(self, saved: Checkpoint, kept: Layout) -> DrawStore:
        assert self._path is not None
        path = self.settings.store_path or draws_path(self._path)
        try:
            store = open_store(path)
        except (FileNotFoundError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint '{self._path}' has no draws to continue: {error} Put the folder back, or give "
                "another checkpoint= to start the run over."
            ) from error
        if store.info.get("run") != saved.notes.get("run"):
            raise CheckpointError(
                f"The draws at '{path}' are not those of the checkpoint '{self._path}'. Put those back, or give "
                "another checkpoint= and store_path= to start the run over."
            )
        if saved.notes.get("versions") != {"torch": torch.__version__}:
            logger.warning("The checkpoint was made with %s; draws may differ in the last bits.", saved.notes)
        store.layout = kept
        self._stack.callback(store.close)
        counts = store.counts
        for chains in self.groups:
            progress = saved.chains[chains.first]
            for number in chains.numbers:
                expected = min(max(progress.num_done - self.plan.warmup_steps, 0), self.plan.num_samples)
                first = {note["chain"]: note["first_draw"] for note in progress.divergences}.get(number)
                row = chains.store_row(number)
                if counts[row] < expected and first is None:
                    raise CheckpointError(
                        f"The draws at '{path}' lack some that the checkpoint '{self._path}' counts: chain {number} "
                        f"has {counts[row]} of {expected}. Give another checkpoint= to start the run over."
                    )
                if first is None:
                    store.truncate(row, expected)
                else:
                    store.end(row, first)
        self.progress = saved.chains
        self._notes = saved.notes
        self._saved = dict(saved.chains)
        done = {first: progress.num_done for first, progress in saved.chains.items()}
        logger.info("Resuming from '%s': draws made, warm-up included, by chain: %s.", self._path, done)
        return store

    def _describe(self, chain: Chain) -> dict[str, Any]:
        """What identifies this run, by the name of what would differ in another."""
        return run_identity(self.kernel, self.settings, chain, self.args, self.kwargs)

    def _run_workers(self) -> None:
        assert isinstance(self.store, DiskStore)
        assert self.kernel.seed is not None
        numbers = [chains.first for chains in self.groups]
        jobs = [
            Job(
                self.kernel,
                self.plan,
                number,
                self.store.path,
                self.progress[number],
                seed=derived_seed(self.kernel.seed, "worker", number),
                is_reporting=not self.settings.disable_progbar,
                validates=pyro.distributions.is_validation_enabled(),
                dtype=torch.get_default_dtype(),
                parent=os.getpid(),
            )
            for number in numbers
            if self.progress[number].num_done < self.plan.total
        ]
        with ProgressBars(self.plan, self.plan.num_chains, self.settings.disable_progbar) as bars:
            for number in numbers:
                bars.start(number, self.progress[number].num_done)
            run_workers(jobs, self.args, self.kwargs, self._context(), bars.show, self._save, self.progress)

    def _context(self) -> Any:
        method = self.settings.mp_context
        is_on_gpu = self._device.type != "cpu"
        if method == "fork" and is_on_gpu:
            raise ValueError(
                "mp_context='fork' cannot be used on a GPU: use 'spawn', or chain_method='vectorized', which is faster."
            )
        return torch.multiprocessing.get_context(method or ("spawn" if is_on_gpu else None))


@contextmanager
def _seeded_kernel(kernel: StochasticGradientKernel, saved: int | None) -> Iterator[None]:
    """A kernel without a seed gets one for the run, from the global generator, so that all processes have the same."""
    given = kernel.seed
    if given is None:
        kernel.seed = fresh_seed() if saved is None else saved
    try:
        yield
    finally:
        kernel.seed = given


def _shared_folder(num_bytes: int) -> Path:
    """A folder for draws that several processes write: in shared memory if there is room, else with temporary files.

    Its name has the process's number, so that the files of a killed run can be told from files in use.
    """
    shared = Path("/dev/shm")
    has_room = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 1.1 * num_bytes
    return Path(tempfile.mkdtemp(prefix=f"pyro_apd_{os.getpid()}_", dir=shared if has_room else None))


def _remove_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
