# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""10,000 damaged and malicious files: each loads correctly or raises ArtifactError. ``python -m
benchmarks.fuzz_files``.

Damage: bytes changed, files truncated or extended, tensors exchanged. It must be detected, or make no difference.
Malicious changes: any value of header or description replaced, with a matching digest, as anyone who writes a file can
compute. A file that loads must then draw what it describes, from a generator of at most four times the bytes of the
file.
"""

from __future__ import annotations

import collections
import copy
import json
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyro_apd as apd
from benchmarks.common import write_json
from pyro_apd.posterior.artifact import KIND, METADATA_KEY
from pyro_apd.runtime import tensor_file

FILES = Path(__file__).parent.parent / "tests" / "files"
SEEDS = ("posterior_v2_float16", "posterior_v2_float32", "posterior_v2_int8")
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 10**6, 2**31, 2**63, 10**30, 1e308, float("nan"), "", "x", "real", "simplex",
    "coordinates", "paper", "F64", "I8", [], {}, [0], [1], [2**40], [2**32, 2**32], [-1], [[]], {"kind": "simplex"},
    {"kind": "independent", "base": {"kind": "real"}, "dims": 10**9}, {"kind": "greater_than", "lower_bound": [1, 2]},
    {"kind": "interval", "lower_bound": 1.0, "upper_bound": -1.0}, "\ud800", "../../etc/passwd", "A" * 5000,
)  # fmt: skip


def split(contents: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header, description in it, and data of a valid file."""
    (length,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + length])
    return header, json.loads(header["__metadata__"][METADATA_KEY]), contents[8 + length :]


def sealed(header: dict[str, Any], description: Any, data: bytes) -> bytes:
    """A file of these, with a matching digest if the header is still readable."""
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"][METADATA_KEY] = json.dumps(description)
    text = json.dumps(header).encode()
    contents = bytearray(struct.pack("<Q", len(text)) + text + data)
    with tempfile.NamedTemporaryFile() as file:
        file.write(contents)
        file.flush()
        try:
            found = tensor_file.read_header(KIND, Path(file.name))
        except apd.ArtifactError:
            return bytes(contents)
    if found.digest is not None:
        place = slice(found.data_start + found.digest.start, found.data_start + found.digest.stop)
        contents[place] = tensor_file.digest_of(found, memoryview(contents)[found.data_start :])
    return bytes(contents)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((value, key), *places(item))]


def flipped(contents: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, half of the time in the header."""
    changed = bytearray(contents)
    end = len(changed) if rng.random() < 0.5 else min(len(changed), 2500)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(end)] = rng.randrange(256)
    return bytes(changed)


def resized(contents: bytes, rng: random.Random) -> bytes:
    """Truncated anywhere, or extended."""
    return (
        contents[: rng.randrange(len(contents))] if rng.random() < 0.7 else contents + rng.randbytes(rng.randint(1, 64))
    )


def swapped(contents: bytes, rng: random.Random) -> bytes:
    """Two tensors of the table that exchange places, or names."""
    header, _, data = split(contents)
    one, two = rng.sample([name for name in header if name != "__metadata__"], 2)
    header[one], header[two] = header[two], header[one]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def hostile(contents: bytes, rng: random.Random) -> bytes:
    """One to three values of header or description replaced, removed or added."""
    header, description, data = split(contents)
    for _ in range(rng.randint(1, 3)):
        target = header if rng.random() < 0.4 else description
        found = places(target)
        if not found:
            continue
        owner, key = rng.choice(found)
        action = rng.random()
        if action < 0.75:
            owner[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif action < 0.9:
            del owner[key]
        elif isinstance(owner, dict):
            owner[str(rng.choice(HOSTILE))[:50]] = copy.deepcopy(rng.choice(HOSTILE))
    return sealed(header, description, data)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes": flipped, "length": resized, "tensors swapped": swapped, "hostile header": hostile
}  # fmt: skip


def outcome(kind: str, contents: bytes, original: bytes, path: Path) -> str:
    """``refused`` or ``loaded``.

    :raises AssertionError: if a file loads incorrectly. Any error other than ArtifactError is raised.
    """
    path.write_bytes(contents)
    try:
        posterior = apd.DistilledPosterior.load(path)
    except apd.ArtifactError:
        return "refused"
    held = sum(p.numel() * p.element_size() for p in posterior.generator.state_dict().values())
    assert held <= 4 * len(contents), "the generator is larger than the file justifies"
    draws = posterior.get_samples(2, seed=0)
    assert {n: tuple(v.shape[1:]) for n, v in draws.items()} == {s.name: s.shape for s in posterior.layout}
    if kind != "hostile header":
        path.write_bytes(original)
        for name, value in apd.DistilledPosterior.load(path).get_samples(2, seed=0).items():
            assert torch.equal(value, draws[name]), "damage was not found"
    return "loaded"


def fuzz(num_cases: int, seed: int, folder: Path) -> dict[str, int]:
    """Counts of outcomes by kind of case."""
    rng, counts = random.Random(seed), collections.Counter()  # type: ignore[var-annotated]
    originals = [(FILES / f"{name}.safetensors").read_bytes() for name in SEEDS]
    for case in range(num_cases):
        original, (kind, mutate) = originals[case % len(originals)], rng.choice(list(MUTATIONS.items()))
        contents = mutate(original, rng)
        try:
            counts[f"{kind}: {outcome(kind, contents, original, folder / 'case')}"] += 1
        except Exception:
            print(f"case {case}, seed {seed}, {kind}", file=sys.stderr)
            raise
    return dict(sorted(counts.items()))


def main() -> None:
    """10,000 cases."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(10_000, 0, Path(folder))
    print("\n".join(f"{name:28} {count:6,}" for name, count in counts.items()))
    print(f"{time.perf_counter() - start:.0f} s")
    write_json("fuzz_files", counts)


if __name__ == "__main__":
    main()
