# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Every test starts from the same seed with Pyro's validation on, and must leave global state as it found it."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("MPLBACKEND", "Agg")

import pyro
import pyro.distributions as dist
import pytest
import torch
from tqdm import tqdm

from tests.support.rounding import OtherRounding

# Matrices here are small: threads cost more than they give, and on a shared machine they wait for each other.
torch.set_num_threads(1)
# Tests fork: a thread of tqdm's that has its lock at that moment would leave it locked in the child.
tqdm.monitor_interval = 0

if "PYTEST_XDIST_WORKER" not in os.environ:
    # Compiled programs are shared by all workers of a run, and by no two runs: a stored program hides what changed.
    _programs = tempfile.mkdtemp(prefix="pyro_apd_tests_")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _programs
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """A test with neither mark is fast. Files with slow tests come first, so that no worker ends with them alone."""
    for item in items:
        if not any(item.iter_markers("slow")) and not any(item.iter_markers("thorough")):
            item.add_marker("fast")
    slow = {item.path for item in items if any(item.iter_markers("slow"))}
    files = list(dict.fromkeys(item.path for item in items))
    first, last = [path for path in files if path in slow], [path for path in files if path not in slow]
    # Two workers begin with a half each, and take from the end of the other's when they are done.
    order = [*first[::2], *last[::2], *first[1::2], *last[1::2]]
    place = {path: i for i, path in enumerate(order)}
    items.sort(key=lambda item: place[item.path])


@pytest.fixture(autouse=True, scope="session")
def _other_rounding():
    """On request, the arithmetic of another processor."""
    salt = os.environ.get("PYRO_APD_TEST_ROUNDING")
    if salt is None:
        yield
        return
    with OtherRounding(salt):
        yield


@pytest.fixture(autouse=True)
def _clean_global_state():
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    assert dist.is_validation_enabled(), "the test, or what it calls, left Pyro's validation off"
    assert torch.get_default_dtype() == dtype, "the default dtype was changed"
    assert torch.get_num_threads() == threads, "the number of threads was changed"
    assert not list(pyro.get_param_store().keys()), "the param store was left with entries"


@pytest.fixture(scope="module")
def benchmark_cache(tmp_path_factory):
    """One cache for all tests of a file, so that chains and fits are shared as they are between experiments."""
    from benchmarks import distillation_cases

    patch = pytest.MonkeyPatch()
    patch.setattr(distillation_cases, "CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()
