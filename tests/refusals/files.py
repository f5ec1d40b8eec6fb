# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Entries of one group, see :mod:`tests.refusals`."""

import pyro_apd as apd
from tests.refusals.refusal import Refusal

_POSTERIOR = """
net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
net[0].requires_grad_(False)
mcmc = sample(apd.BNN(net, "gaussian"), x, y, num_chains=3)
posterior = apd.baselines.low_rank(mcmc, rank=2)
"""
_LOADED = (
    _POSTERIOR
    + """posterior.save("posterior.safetensors"{})
net[0].weight.data.zero_()
posterior = apd.DistilledPosterior.load("posterior.safetensors")
"""
)
_OF_WIDE = """
from pyro_apd.generators import LowRankGenerator
from pyro_apd.models.layout import Layout
posterior = apd.DistilledPosterior(Layout({"w": (10_000,)}), LowRankGenerator(10_000, 1))
"""

REFUSALS: list[Refusal] = [
    Refusal(
        "A posterior beside a network with another backbone",
        _LOADED.format("") + "posterior.network(net=net)",
        apd.ArtifactError,
        ("frozen weights", "'net.0.weight'", "save(path, frozen=True)"),
        "Draws of a last layer are other functions after another first layer. `ensemble` and `bind` refuse it, too.",
        instead=_LOADED.format(", frozen=True") + "posterior.network(net=net)",
    ),
    Refusal(
        "Predictions by a model with another backbone",
        _LOADED.format("") + "apd.Predictive(apd.BNN(net, 'gaussian'), guide=posterior, num_samples=2)(x)",
        apd.ArtifactError,
        ("frozen weights", "'net.0.weight'", "load_frozen(model)"),
        "`apd.outputs`, `check_model` and what builds on them compare frozen parameters and buffers likewise.",
        instead=_LOADED.format(", frozen=True")
        + "posterior.load_frozen(net)\napd.Predictive(apd.BNN(net, 'gaussian'), guide=posterior, num_samples=2)(x)",
    ),
    Refusal(
        "Stored draws of a model with another backbone",
        """
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        net[0].requires_grad_(False)
        sample(apd.BNN(net, "gaussian"), x, y, num_chains=3, store="disk", store_path="draws")
        net[0].weight.data.zero_()
        apd.distill(apd.open_store("draws"), apd.BNN(net, "gaussian"), data=(x, y))
        """,
        apd.ArtifactError,
        ("frozen weights", "'net.0.weight'"),
        "A folder of draws knows digests of the frozen weights of its model, as the file of a posterior does.",
    ),
    Refusal(
        "A run whose backbone has changed before it is distilled",
        """
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        net[0].requires_grad_(False)
        bnn = apd.BNN(net, "gaussian")
        mcmc = sample(bnn, x, y, num_chains=3)
        bnn.net[0].weight.data.zero_()
        apd.distill(mcmc, num_steps=1)
        """,
        apd.ArtifactError,
        ("frozen weights", "'net.0.weight'"),
        "A run notes digests of the frozen weights. All that takes a run or a posterior beside a model compares them: "
        "`distill`, `compare`, `report`, `to_arviz`, `ood`, `adversarial`, `baselines`.",
    ),
    Refusal(
        "Restoring frozen weights that are not in the file",
        _LOADED.format("") + "posterior.load_frozen(net)",
        apd.ArtifactError,
        ("does not hold frozen weights", "save(path, frozen=True)"),
        "A file holds digests of the frozen weights, and their numbers only where these are asked for.",
    ),
    Refusal(
        "Saving frozen weights that nobody knows",
        _LOADED.format("") + 'posterior.save("posterior.safetensors", frozen=True)',
        ValueError,
        ("frozen=True", "not known here", "distill()"),
        "The file would lack what it promises.",
        instead=_POSTERIOR + 'posterior.save("posterior.safetensors", frozen=True)',
    ),
    Refusal(
        "Draws by default that fill the memory",
        _OF_WIDE + 'posterior.num_samples = 1_000_000\nposterior.save("posterior.safetensors")',
        ValueError,
        ("num_samples is 1,000,000", "40,000 MB", "get_samples()"),
        "Whoever loads the file and asks for draws would lose the machine; such a file is not read either.",
        instead=_OF_WIDE + 'posterior.num_samples = 1_000\nposterior.save("posterior.safetensors")',
    ),
    Refusal(
        "A file whose draws are infinite",
        _OF_WIDE
        + """torch.nn.init.constant_(posterior.generator.location, 3e38)
posterior.save("posterior.safetensors")
apd.DistilledPosterior.load("posterior.safetensors")""",
        apd.ArtifactError,
        ("draws may be as large as 3e+38", "torch.float32"),
        "All numbers in the file are finite, and predictions would be NaN for some draws only.",
    ),
    Refusal(
        "A file that is a pipe, a device or a folder",
        'import os\nos.mkfifo("posterior.safetensors")\napd.DistilledPosterior.load("posterior.safetensors")',
        apd.ArtifactError,
        ("posterior.safetensors", "a pipe or a device, not a file"),
        "Reading a pipe waits for someone to write to it.",
    ),
    Refusal(
        "A file that is made to be slow to read",
        """
        import struct
        with open("posterior.safetensors", "wb") as file:
            file.write(struct.pack("<Q", 2**20) + bytes(2**20))
        apd.DistilledPosterior.load("posterior.safetensors")
        """,
        apd.ArtifactError,
        ("its header has 1,048,576 bytes", "at most 524,288 are accepted"),
        "Of two megabytes of text a reader could build hundreds of thousands of objects.",
    ),
    Refusal(
        "Matrices of a generator that overlap",
        """
        from pyro_apd.generators import SubspaceGenerator
        matrices = [(0, 2, 3, -1, 0, 2), (3, 3, 3, -1, 0, 2)]
        SubspaceGenerator(18, matrices, num_chains=1, num_modes=1, rank=2, path_rank=0)
        """,
        ValueError,
        ("Matrices overlap at entry 3",),
        "A small file could ask for any number of random numbers per draw.",
        instead="""
        from pyro_apd.generators import SubspaceGenerator
        matrices = [(0, 2, 3, -1, 0, 2), (6, 3, 3, -1, 0, 2)]
        SubspaceGenerator(18, matrices, num_chains=1, num_modes=1, rank=2, path_rank=0)
        """,
    ),
    Refusal(
        "A folder that is no store of draws",
        """
        import os
        os.makedirs("draws/draws.json")
        apd.open_store("draws")
        """,
        ValueError,
        ("store at", "draws.json is a folder"),
        "Whatever is wrong with the files of a store, the error is a `ValueError` that names the file.",
    ),
]
