# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior of a billion weights on 64 GPUs, on paper: ``python -m benchmarks.billion``.

Nothing is measured here. It prints the tables of docs/scaling.md, computed from the assumptions below, which you can
change. A test compares the page with these tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common import markdown_table

GB, TB = 1e9, 1e12


@dataclass(frozen=True)
class Machine:
    """GPUs and their connections, from data sheets of the H100 SXM and of nodes with eight; all rates are per second.

    :ivar float bf16, tf32, fp32: operations of a GPU, dense.
    :ivar float hbm, nvlink, ib, pcie: bytes of a GPU, the last three each way.
    :ivar float disk_read, disk_write: bytes of a node's own disks.
    :ivar float normals: normal random numbers that a GPU generates.
    :ivar float compute_share, bandwidth_share: share of the peaks that is reached.
    """

    num_gpus: int = 64
    per_node: int = 8
    memory: float = 80 * GB
    host_memory: float = 2 * TB
    disk: float = 30 * TB
    bf16: float = 989e12
    tf32: float = 495e12
    fp32: float = 67e12
    hbm: float = 3.35 * TB
    nvlink: float = 450 * GB
    ib: float = 50 * GB
    pcie: float = 55 * GB
    disk_read: float = 40 * GB
    disk_write: float = 20 * GB
    normals: float = 1e11
    compute_share: float = 0.4
    bandwidth_share: float = 0.8

    @property
    def num_nodes(self) -> int:
        """Nodes."""
        return self.num_gpus // self.per_node

    def compute(self, operations: float, num_gpus: int, peak: float) -> float:
        """Seconds for this number of operations on this number of GPUs."""
        return operations / (num_gpus * peak * self.compute_share)

    def move(self, num_bytes: float, bandwidth: float) -> float:
        """Seconds to move this number of bytes."""
        return num_bytes / (bandwidth * self.bandwidth_share)

    def all_reduce(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds for a ring within a node, then between nodes for each GPU's share of its node's sum."""
        inside = min(num_gpus, self.per_node)
        seconds = 2 * self.move((inside - 1) / inside * num_bytes, self.nvlink)
        nodes = num_gpus // inside
        return seconds + 2 * self.move((nodes - 1) / nodes * num_bytes / inside, self.ib)


@dataclass(frozen=True)
class Work:
    """A vision transformer of the shape of ViT-g/14 on images of 224 x 224, and a run of SGLD on ImageNet.

    :ivar int tokens: per row of data.
    :ivar float step_size: the paper's 1e-6 for 50,000 images, times 50,000 / N.
    """

    weights: float = 1e9
    layers: int = 40
    width: int = 1408
    tokens: int = 257
    rows: float = 1.28e6
    row_bytes: float = 3 * 224 * 224
    batch: int = 1024
    step_size: float = 4e-8
    thinning: int = 1000
    draws: int = 1600
    rank: int = 64
    networks: int = 64
    probes: int = 96
    train_steps: int = 500

    @property
    def prior_sd(self) -> float:
        """1 / sqrt(width)."""
        return float(self.width**-0.5)

    @property
    def warmup(self) -> float:
        """Steps after which 5 % of the start is left where only the prior acts: 6 sd^2 / epsilon."""
        return 6 * self.prior_sd**2 / self.step_size

    def operations(self, rows: float, passes: int = 3) -> float:
        """Forward pass: 2 per weight and token; gradient: three times as many (Kaplan et al. 2020)."""
        return passes * 2 * self.weights * self.tokens * rows

    def activations(self, rows: float, itemsize: int = 2) -> float:
        """Bytes kept for a gradient: 34 per token, layer and unit of width at 2 bytes (Korthikanti et al. 2022, without
        those of attention, which fused attention does not keep)."""
        return 17 * itemsize * self.layers * self.width * self.tokens * rows


M, W = Machine(), Work()


def state_table() -> str:
    """Bytes of a chain's state on a GPU: in the package today, and split over eight GPUs."""
    net, gb = 4 * W.weights, "{:.1f}".format
    share = M.per_node
    today = {
        "weights, float32": (net, net / share),
        "weights for the passes, bfloat16": (0, net / 2),
        "gradient": (net, net / 2),
        "two earlier states, to restore after a divergence": (2 * net, 2 * net / share),
        "noise of a step": (net, net / share),
        "a draw being written": (net, net / share),
    }
    rows = [[name, gb(a / GB), gb(b / GB)] for name, (a, b) in today.items()]
    sums = [sum(column) for column in zip(*today.values(), strict=True)]
    rows.append(["**sum**", *(f"**{gb(value / GB)}**" for value in sums)])
    rows.append(["SGHMC's momenta, or PSGLD's second moments", gb(net / GB), gb(net / share / GB)])
    micro = W.batch / M.per_node / 4
    kept = W.activations(W.batch, 4), W.activations(micro)
    rows.append([f"activations: {W.batch:,} rows at once | {micro:.0f} rows at a time", *(gb(k / GB) for k in kept)])
    rows[-1][0] = rows[-1][0].replace(" | ", "; or ")
    return markdown_table(["GB", "one GPU, float32 (today)", "each of eight GPUs, bfloat16 passes"], rows)


def step_seconds(num_gpus: int) -> tuple[float, float, float]:
    """Seconds of computing, of summing gradients and of the update, in one step of a chain on this number of GPUs."""
    compute = M.compute(W.operations(W.batch), num_gpus, M.bf16)
    share = W.weights / num_gpus
    # Reads weights and gradient, writes weights in both precisions; generates the noise.
    update = M.move(12 * share, M.hbm) + share / M.normals
    return compute, M.all_reduce(2 * W.weights, num_gpus) if num_gpus > 1 else 0.0, update


def step_table() -> str:
    """Time of a step and of a run, by the number of GPUs per chain."""
    rows = []
    for num_gpus in (1, M.per_node, M.num_gpus):
        chains = M.num_gpus // num_gpus
        compute, reduce, update = step_seconds(num_gpus)
        step = compute + reduce + update
        warmup, draws = W.warmup * step / 3600, W.draws / chains * W.thinning * step / 3600
        rows.append(
            [
                f"{chains} of {num_gpus}",
                *(f"{1e3 * value:,.1f}" for value in (compute, reduce, update)),
                f"{chains / step:.1f}",
                f"{warmup:.1f}",
                f"{draws:.1f}",
                f"{warmup + draws:.0f}",
            ]
        )
    header = ["chains of GPUs", "passes, ms", "gradients' sum, ms", "update, ms", "chain-steps per second"]
    return markdown_table([*header, "warm-up, h", f"{W.draws:,} draws, h", "total, h"], rows)


def precision_table() -> str:
    """A step of one chain on one GPU by the precision of its products."""
    rows = []
    for name, peak in (("float32 (today's default)", M.fp32), ("TF32", M.tf32), ("bfloat16", M.bf16)):
        seconds = M.compute(W.operations(W.batch), 1, peak)
        rows.append([name, f"{seconds:.1f}", f"{W.warmup * seconds / 86400:.1f}"])
    return markdown_table(["products in", "s per step", "warm-up on one GPU, days"], rows)


def distil_table() -> str:
    """Where the time of a distillation goes."""
    net, per_node = 4 * W.weights, W.draws / M.num_nodes
    all_draws = W.draws * net
    gram = M.compute(2 * W.draws**2 * W.weights, M.num_gpus, M.tf32)
    parts = {
        f"read {W.draws:,} draws ({all_draws / TB:.1f} TB) from the nodes' disks": M.move(
            all_draws / M.num_nodes, M.disk_read
        ),
        "give each GPU all draws of its 1/64 of the weights": M.move(
            (M.num_nodes - 1) / M.num_nodes * per_node * net / M.per_node, M.ib
        ),
        "products of all pairs of draws": gram,
        f"basis of {W.rank} from these products": M.compute(2 * W.rank * W.draws * W.weights, M.num_gpus, M.tf32),
    }
    networks = W.networks * W.probes
    step = {
        f"{W.networks} networks from the basis, a 1/8 of each on each GPU, then combined": M.move(
            W.rank * W.weights / M.per_node, M.hbm
        )
        + M.move((M.per_node - 1) / M.per_node * net, M.nvlink),
        f"their outputs at {W.probes} probes, and gradients": M.compute(W.operations(networks), M.num_gpus, M.bf16),
        "the gradients back onto the basis": M.move(W.rank * W.weights / M.per_node, M.hbm)
        + M.move((M.per_node - 1) / M.per_node * net, M.nvlink),
        f"{W.networks} stored draws, one per GPU, from host memory": M.move(net * W.networks / M.num_gpus, M.pcie),
        "their outputs": M.compute(W.operations(networks, 1), M.num_gpus, M.bf16),
    }
    rows = [[name, f"{1e3 * seconds:,.0f}", "1", f"{seconds:.1f}"] for name, seconds in parts.items()]
    rows += [[name, f"{1e3 * s:,.0f}", str(W.train_steps), f"{s * W.train_steps:.1f}"] for name, s in step.items()]
    total = sum(parts.values()) + W.train_steps * sum(step.values())
    rows.append(["**sum**", "", "", f"**{total:.0f}**"])
    return markdown_table(["part", "ms", "times", "s"], rows)


def limits_table() -> str:
    """Bytes per weight of each part of the package today, and the number of weights for which 80 GB are enough."""
    measured = 40e6 / 79_510
    cases = [
        ("`distill`, training, as measured on 784-100-10: 40 MB for 79,510 weights", measured),
        (f"generator of rank {W.rank} in float32, to train", 4 * (W.rank + 1)),
        (f"generator of rank {W.rank} in int8, to draw from", W.rank + 4),
        ("a chain's state, float32", 24.0),
    ]
    rows = [[name, f"{size:,.0f}", f"{size * W.weights / GB:,.0f}", f"{M.memory / size:.1e}"] for name, size in cases]
    fits = (M.memory - 24 * W.weights) / W.activations(1, 4)
    rows.append(
        [
            f"activations of a batch of {W.batch:,}, float32, beside it",
            f"{W.activations(W.batch, 4) / W.weights:,.0f}",
            f"{W.activations(W.batch, 4) / GB:,.0f}",
            f"batches of {fits:.0f}",
        ]
    )
    return markdown_table(["part", "bytes per weight", "GB at 10⁹", "80 GB are enough for"], rows)


def traffic_table() -> str:
    """Disks, hosts and failures."""
    compute, reduce, update = step_seconds(M.per_node)
    step, net = compute + reduce + update, 4 * W.weights
    hours = (W.warmup + W.draws / M.num_nodes * W.thinning) * step / 3600
    gpu_hours, per_node = hours * M.num_gpus, W.draws / M.num_nodes
    rows = [
        ["images read per node", f"{W.batch / step * W.row_bytes / GB:.2f} GB/s", f"{M.disk_read / GB:.0f} GB/s"],
        ["all images", f"{W.rows * W.row_bytes / GB:.0f} GB", f"{M.disk / TB:.0f} TB of disk per node"],
        [
            f"a draw, every {W.thinning * step:.0f} s",
            f"{M.move(net, M.disk_write):.2f} s",
            f"{M.disk_write / GB:.0f} GB/s",
        ],
        ["draws per node", f"{per_node * net / TB:.1f} TB", f"{M.host_memory / TB:.0f} TB of host memory"],
        [
            "a checkpoint of a chain, three states",
            f"{3 * net / GB:.0f} GB, {M.move(3 * net, M.disk_write):.2f} s",
            "the same",
        ],
        ["GPU-hours", f"{gpu_hours:,.0f}", f"{gpu_hours / 50_700:.2f} interruptions, at one in 50,700"],
    ]
    return markdown_table(["what", "takes", "of"], rows)


TABLES = {
    "Bytes of a chain": state_table,
    "What breaks first": limits_table,
    "Time by precision": precision_table,
    "Time of a run": step_table,
    "Disks and failures": traffic_table,
    "Time of a distillation": distil_table,
}


def main() -> None:
    """Prints the tables."""
    print(f"Warm-up: 6 sd^2 / epsilon = {W.warmup:,.0f} steps, {W.warmup * W.batch / W.rows:.0f} epochs.")
    for title, table in TABLES.items():
        print(f"\n### {title}\n\n{table()}")


if __name__ == "__main__":
    main()
