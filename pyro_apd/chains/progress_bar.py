# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Progress bars of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pyro.infer.mcmc.logger import ProgressBar

from pyro_apd.chains.group import Plan

# Seconds between updates; writing what a bar shows costs more than a step.
_BAR_EVERY = 0.1


class ProgressBars:
    """Pyro's progress bars, updated at most a few times a second.

    Where they are disabled none is made: even a bar that shows nothing takes a lock that tqdm shares with all forked
    processes, and a process that is killed while it holds the lock never releases it.

    :param Plan plan: of the run.
    :param int count: number of bars.
    """

    def __init__(self, plan: Plan, count: int, is_disabled: bool) -> None:
        self._plan, self._shown, self._at = plan, [0] * count, 0.0
        self._bar = None if is_disabled else ProgressBar(plan.warmup_steps, plan.num_samples, num_bars=count)

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, index: int, num_done: int) -> None:
        """Shows how far a resumed chain has come."""
        if self._bar is not None:
            self._bar.update(num_done, pos=index)
        self._shown[index] = num_done

    def wants(self, num_done: int) -> bool:
        """Whether it is time for an update."""
        if self._bar is None or self._bar.disable:  # Pyro disables its own where output is not a terminal
            return False
        return num_done in (1, self._plan.total) or time.monotonic() - self._at > _BAR_EVERY

    def announce(self, text: str) -> None:
        """Shows what is being done before the next draw, in the first bar."""
        if self._bar is not None:
            self._bar.set_description(text, pos=0, refresh=True)

    def show(self, index: int, num_done: int, num_diverged: int, log: Mapping[str, str]) -> None:
        """Updates a bar."""
        if self._bar is None:
            return
        self._at = time.monotonic()
        stage = "Warmup" if num_done <= self._plan.warmup_steps else "Sample"
        name = stage if len(self._shown) == 1 else f"{stage} [{index + 1}]"
        self._bar.set_description(name, pos=index, refresh=False)
        # Vectorised chains report their own number.
        counted = {} if "diverged" in log else {"divergences": str(num_diverged)}
        self._bar.set_postfix({**log, **counted}, pos=index, refresh=False)
        self._bar.update(num_done - self._shown[index], pos=index)
        self._shown[index] = num_done
