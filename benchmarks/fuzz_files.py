# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""20,000 damaged and malicious files: each loads correctly or raises ArtifactError. ``python -m
benchmarks.fuzz_files``.

Damage: bytes changed, files truncated or extended, tensors exchanged. It must be detected, or make no difference.
Malicious changes have a matching digest, as anyone who writes a file can compute. Any value of header or description is
replaced; lists and tables get up to 100,000 entries; numbers of tensors are scaled up to the largest that their dtype
has; digests and values of frozen tensors are exchanged; the entropy code of integers gets other parts, tables and
factors, and is of other and larger tensors. A file that loads must then draw what it describes, finite numbers, from a
generator of at most 32 times the bytes of the file, or 512 KiB more (sixteen integers of two bytes for each byte of
code), and draws by default must not take more than a thousand bytes for each byte of the file, or 256 MiB. ``pyro-apd
inspect`` describes it or refuses it. Folders of stored draws are damaged likewise. No case may take more than 2 s of
CPU time, or 200 MB above what the process had at its start, or have a message of 1,000 characters.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import json
import logging
import math
import random
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pyro_apd as apd
from benchmarks.common import write_json
from pyro_apd.chains.stores.base import STATISTICS
from pyro_apd.chains.stores.disk import DiskStore
from pyro_apd.cli import inspect
from pyro_apd.generators import DropoutGenerator, LowRankGenerator, SubspaceGenerator, build_generator
from pyro_apd.generators.entropy_code import encode
from pyro_apd.models.frozen import FrozenTensors, digest
from pyro_apd.models.layout import Layout
from pyro_apd.posterior.artifact import KIND, METADATA_KEY
from pyro_apd.posterior.integers import CODE_NAME
from pyro_apd.runtime import tensor_file

FILES = Path(__file__).parent.parent / "tests" / "files"
SEEDS = (
    "posterior_v2_float16", "posterior_v2_float32", "posterior_v2_int8", "posterior_v2_coordinates_int8",
    "posterior_v2_chunked_int8", "posterior_v3_subspace_int8",
)  # fmt: skip
MAX_SECONDS, MAX_BYTES, MAX_MESSAGE = 2.0, 200e6, 1000
# Dtypes of integers in an entropy code.
_CODED = (torch.int8, torch.int16)
# Entries of lists that are made long.
_LONG = (100, 3_000, 30_000, 100_000)
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


def entry_like(value: Any, i: int) -> Any:
    """One of many entries for a list or table that has ``value``."""
    if isinstance(value, list) and len(value) == 6 and all(isinstance(number, int) for number in value):
        return [4 * i, 2, 2, -1, 0, 2]
    if isinstance(value, list) and len(value) == 4 and all(isinstance(number, int) for number in value):
        return [i, 1, 1, 1]
    if isinstance(value, dict) and "name" in value:
        return {**value, "name": f"site {i}"}
    return value


def long_lists(contents: bytes, rng: random.Random) -> bytes:
    """A list or table of the description with very many entries."""
    header, description, data = split(contents)
    found = [(o, k) for o, k in [(description, key) for key in description] + places(description) if o[k]]
    owner, key = rng.choice([place for place in found if isinstance(place[0][place[1]], (list, dict))])
    value, count = owner[key], rng.choice(_LONG)
    if isinstance(value, list):
        example = rng.choice(value)
        owner[key] = [entry_like(example, i) for i in range(count)] if rng.random() < 0.7 else [example] * count
    else:
        example = rng.choice(list(value.values()))
        owner[key] = {**value, **{f"{rng.choice(list(value))}{i}": example for i in range(count)}}
    return sealed(header, description, data)


def overlapping(contents: bytes, rng: random.Random) -> bytes:
    """Blocks or layers of a generator repeated, moved or enlarged, and more draws by default."""
    header, description, data = split(contents)
    for name in ("noise", "layers", "chunks", "matrices"):
        blocks = description["generator"].get(name)
        if isinstance(blocks, list) and blocks and rng.random() < 0.9:
            block = copy.deepcopy(rng.choice(blocks))
            if isinstance(block, list):
                block[rng.randrange(len(block))] += rng.choice([-1, 1, 10, 10**6, 2**40])
            blocks.insert(rng.randrange(len(blocks) + 1), block)
    if rng.random() < 0.5:
        description["num_samples"] = 10 ** rng.randint(2, 7)
    return sealed(header, description, data)


def extreme(contents: bytes, rng: random.Random) -> bytes:
    """A tensor scaled, so that its numbers come near to the largest of their dtype, or are NaN."""
    header, description, data = split(contents)
    changed = bytearray(data)
    tensors = [entry for name, entry in header.items() if name not in ("__metadata__", tensor_file.DIGEST_NAME)]
    for entry in rng.sample(tensors, rng.randint(1, len(tensors))):
        dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(
            entry["dtype"]
        )
        start, stop = entry["data_offsets"]
        if dtype is None or start == stop:
            continue
        values = torch.frombuffer(bytearray(changed[start:stop]), dtype=dtype).clone()
        top = torch.finfo(dtype).max
        values *= rng.choice([10.0, 1e10, top**0.25, top**0.5, top**0.9])
        if rng.random() < 0.5:
            values[rng.randrange(len(values))] = rng.choice([top, -top, top / 2, float("nan"), float("inf")])
        changed[start:stop] = values.view(torch.uint8).numpy().tobytes()
    return sealed(header, description, bytes(changed))


def other_code(contents: bytes, rng: random.Random) -> bytes:
    """The entropy code of integers with other bytes or sizes of its parts, or of other and larger tensors."""
    header, description, data = split(contents)
    entry = header.get(CODE_NAME)
    if entry is None:
        return extreme(contents, rng)
    start, stop = entry["data_offsets"]
    code = data[start:stop]
    sizes = list(struct.unpack("<4I", code[:16]))
    parts = [code[a:b] for a, b in itertools.pairwise(itertools.accumulate(sizes, initial=16))]
    which, action = rng.randrange(4), rng.random()
    if action < 0.3:
        parts[which] = flipped(parts[which], rng) if parts[which] else rng.randbytes(8)
    elif action < 0.6:  # a side that can be decompressed
        side = bytearray(zlib.decompress(parts[0]))
        for _ in range(rng.randint(1, 20)):
            side[rng.randrange(len(side))] = rng.randrange(256)
        parts[0] = zlib.compress(bytes(side), 9)
    elif action < 0.7:
        parts[which] = resized(parts[which] + b"1234", rng)
    elif action < 0.75:
        parts[0] = zlib.compress(bytes(10**7), 9)
    elif action < 0.85:
        sizes[which] = rng.choice([0, 1, 2**31, 2**32 - 1, sizes[which] + 1])
    code = struct.pack("<4I", *(sizes if 0.75 <= action < 0.85 else map(len, parts))) + b"".join(parts)
    if action >= 0.85:
        code = _other_sizes(description["generator"], rng)
    _resize_code(header, code)
    return sealed(header, description, data[:start] + code + data[stop:])


def _other_sizes(config: dict[str, Any], rng: random.Random) -> bytes:
    """Changes sizes of a generator, and returns the code of as many zeros or large numbers as it then has."""
    sizes = sorted({"rank", "path_rank", "num_chains", "output_size"} & config.keys())
    for name in rng.sample(sizes, 2):
        config[name] = max(0, config[name] * rng.choice([1, 2, 10, 100]) + rng.randint(-1, 1))
    for entry in config.get("matrices", ()):
        entry[5] = max(1, entry[5] + rng.randint(-2, 2))
    try:
        with torch.device("meta"):
            tensors = build_generator(config).state_dict()
    except ValueError:
        return b""
    shapes = [(tensors[n].shape, tensors[n].dtype) for n in sorted(tensors) if tensors[n].dtype in _CODED]
    if sum(math.prod(shape) for shape, _ in shapes) > 2**21:
        return b""
    largest = rng.choice([1, 100])
    return encode([torch.randint(0, largest, shape).to(dtype) for shape, dtype in shapes])


def _resize_code(header: dict[str, Any], code: bytes) -> None:
    """The header for a code of another length."""
    old = header[CODE_NAME]["data_offsets"]
    longer = len(code) - (old[1] - old[0])
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= old[1]:
            entry["data_offsets"] = [edge + longer for edge in entry["data_offsets"]]
    header[CODE_NAME] = {**header[CODE_NAME], "shape": [len(code)], "data_offsets": [old[0], old[1] + longer]}


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bytes": flipped, "length": resized, "tensors swapped": swapped, "hostile header": hostile,
    "long lists": long_lists, "overlapping blocks": overlapping, "extreme numbers": extreme,
    "code of integers": other_code,
}  # fmt: skip
DAMAGE = ("bytes", "length", "tensors swapped")


def examples(folder: Path) -> list[bytes]:
    """Valid files: those of earlier versions, and one of each generator, one of them with frozen tensors."""
    frozen = {"backbone.weight": torch.linspace(-1, 1, 12).reshape(3, 4), "backbone.calls": torch.tensor(3)}
    layout = Layout({"w": (20, 16), "scale": ()}, {"scale": torch.distributions.constraints.positive})
    noise, size = [[0, 10, 16, 2], [160, 10, 16, 1]], layout.size
    earlier = {"output_size": size, "rank": 3, "num_modes": 2, "noise": noise}
    matrices = [(0, 10, 16, -1, 0, 4), (160, 16, 10, -1, 1, 10)]
    generators = [
        build_generator({"kind": "coordinates", **earlier, "bend": 4}),
        build_generator({"kind": "chunked", **earlier, "chunks": [160, 160, 1]}),
        SubspaceGenerator(size, matrices, num_chains=2, num_modes=3, rank=4, path_rank=2),
        DropoutGenerator(size, [(0, 10, 16, 1), (160, 10, 16, 1)]),
        LowRankGenerator(size, 2),
        SubspaceGenerator(size, [(0, 20, 16, -1, 0, 16)], num_chains=1, num_modes=2, rank=3, path_rank=0).double(),
    ]
    contents = [(FILES / f"{name}.safetensors").read_bytes() for name in SEEDS]
    values = torch.Generator().manual_seed(0)
    for i, generator in enumerate(generators):
        for tensor in generator.state_dict().values():
            random_values = torch.randn(tensor.shape, generator=values)
            tensor.copy_(0.3 * random_values if tensor.is_floating_point() else (3 * random_values).round())
        known = FrozenTensors({n: digest(t) for n, t in frozen.items()}, values=frozen) if i in (0, 3) else None
        posterior = apd.DistilledPosterior(layout, generator, metadata={"notes": ["a", {"b": 1}]}, frozen=known)
        posterior.training_log = {"loss": [1.0, 0.5]}
        posterior.save(folder / "example", dtype=("float32", "int8", "float16")[i % 3], frozen=known is not None)
        contents.append((folder / "example").read_bytes())
    return contents


def check_message(error: Exception) -> None:
    """Whether a user can read it."""
    length = len(str(error))
    assert length < MAX_MESSAGE, f"a message of {length} characters"


def outcome(kind: str, contents: bytes, original: bytes, path: Path) -> str:
    """``refused`` or ``loaded``.

    :raises AssertionError: if a file loads incorrectly. Any error other than ArtifactError is raised.
    """
    path.write_bytes(contents)
    try:
        posterior = apd.DistilledPosterior.load(path)
    except apd.ArtifactError as error:
        check_message(error)
        with contextlib.suppress(apd.ArtifactError):
            inspect.as_json(path)
        return "refused"
    assert len(inspect.describe(path)) < 100 * len(contents)
    inspect.as_json(path)
    held = sum(p.numel() * p.element_size() for p in posterior.generator.state_dict().values())
    assert held <= 32 * len(contents) + 2**19, "the generator is larger than the file justifies"
    draws = posterior.get_samples(2, seed=0)
    assert {n: tuple(v.shape[1:]) for n, v in draws.items()} == {s.name: s.shape for s in posterior.layout}
    assert all(bool(value.isfinite().all()) for value in draws.values()), "draws are not finite"
    by_default = posterior.num_samples * sum(4 * value[0].numel() for value in draws.values())
    assert by_default <= max(256 * 2**20, 1000 * len(contents)), "draws by default fill the memory"
    if kind in DAMAGE:
        path.write_bytes(original)
        for name, value in apd.DistilledPosterior.load(path).get_samples(2, seed=0).items():
            assert torch.equal(value, draws[name]), "damage was not found"
    return "loaded"


def store_outcome(rng: random.Random, folder: Path) -> str:
    """A damaged folder of stored draws: ``refused`` by ValueError or OSError, or ``loaded``."""
    path = folder / "store"
    shutil.rmtree(path, ignore_errors=True)  # a run does not replace the draws of another
    layout = Layout({"w": (3,), "scale": ()}, {"scale": torch.distributions.constraints.positive})
    store = DiskStore.create(path, layout, 2, 5, torch.float32)
    for draw in range(5):
        store.write(0, draw, torch.full((2, 4), float(draw)), dict.fromkeys(STATISTICS, 0.0))
    store.close()
    file = path / rng.choice(["draws.json", "theta.npy", "statistics.npy"])
    contents = bytearray(file.read_bytes())
    if file.suffix == ".json" and rng.random() < 0.7:
        description = json.loads(contents)
        owner, key = rng.choice(places(description))
        owner[key] = copy.deepcopy(rng.choice(HOSTILE))
        contents = bytearray(json.dumps(description).encode())
    elif rng.random() < 0.3:
        contents = bytearray(rng.choice([b"[" * 10**6, b"", contents[: rng.randrange(len(contents))]]))
    else:
        for _ in range(rng.randint(1, 4)):
            contents[rng.randrange(min(len(contents), 128))] = rng.choice(b"(){}[]',:\\\n\0 0a")
    file.write_bytes(contents)
    try:
        found = apd.open_store(path)
    except (ValueError, OSError) as error:
        check_message(error)
        return "refused"
    values = found.samples()
    assert all(len(value) <= 2 for value in values.values())
    return "loaded"


def memory() -> int:
    """Largest memory of this process, in bytes, since the last :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def forget_peak() -> None:
    """Lets :func:`memory` start anew."""
    Path("/proc/self/clear_refs").write_text("5")


@dataclass
class Costs:
    """What the most expensive case took.

    :ivar int start: bytes that the process had before the first case.
    :ivar bool is_limited: whether a case that takes too much fails.
    """

    start: int
    is_limited: bool
    seconds: float = 0.0
    num_bytes: int = 0

    @contextmanager
    def of_case(self) -> Iterator[None]:
        """Measures a case."""
        if sys.platform == "linux":
            forget_peak()
        began = time.process_time()
        yield
        self.seconds = max(self.seconds, time.process_time() - began)
        self.num_bytes = max(self.num_bytes, memory() - self.start if sys.platform == "linux" else 0)
        if self.is_limited:
            assert self.seconds < MAX_SECONDS, f"a case took {self.seconds:.1f} s"
            assert self.num_bytes < MAX_BYTES, f"a case took {self.num_bytes / 1e6:.0f} MB"


def fuzz(num_cases: int, seed: int, folder: Path, is_limited: bool = True) -> tuple[dict[str, int], Costs]:
    """Counts of outcomes by kind of case, and the largest costs."""
    rng, counts = random.Random(seed), collections.Counter()  # type: ignore[var-annotated]
    originals = examples(folder)
    costs = Costs(memory() if sys.platform == "linux" else 0, is_limited)
    for case in range(num_cases):
        original, kind = originals[case % len(originals)], rng.choice([*MUTATIONS, "stored draws"])
        try:
            if kind == "stored draws":
                with costs.of_case():
                    found = store_outcome(rng, folder)
            else:
                contents = MUTATIONS[kind](original, rng)
                with costs.of_case():
                    found = outcome(kind, contents, original, folder / "case")
            counts[f"{kind}: {found}"] += 1
        except BaseException:
            print(f"case {case}, seed {seed}, {kind}", file=sys.stderr)
            raise
    return dict(sorted(counts.items())), costs


def main() -> None:
    """20,000 cases."""
    torch.set_num_threads(1)
    logging.getLogger("pyro_apd").setLevel(logging.ERROR)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts, costs = fuzz(20_000, 0, Path(folder))
    print("\n".join(f"{name:28} {count:6,}" for name, count in counts.items()))
    print(
        f"{time.perf_counter() - start:.0f} s; at most {costs.seconds:.2f} s and {costs.num_bytes / 1e6:.0f} MB a case"
    )
    largest = {"largest seconds": round(costs.seconds, 2), "largest MB": round(costs.num_bytes / 1e6)}
    write_json("fuzz_files", {**counts, **largest})


if __name__ == "__main__":
    main()
