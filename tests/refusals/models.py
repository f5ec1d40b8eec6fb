# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Models whose density is not one function of latents and data."""

from pyro_apd.errors import ModelError
from tests.refusals.refusal import Refusal

REFUSALS = [
    Refusal(
        "A prior from the number of rows",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), len(x) ** -0.5).to_event(1))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        sample(model, x, y, batch_size=10)
        """,
        ModelError,
        ("'w'", "number of rows", "constants"),
        "In a mini-batch of B rows, `len(x)` is B.",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 40**-0.5).to_event(1))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        sample(model, x, y, batch_size=10)
        """,
    ),
    Refusal(
        "A prior inside poutine.scale",
        """
        def model(x, y=None):
            with poutine.scale(scale=40 / len(x)):
                w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        sample(model, x, y, batch_size=10)
        """,
        ModelError,
        ("'w'", "N/B", "poutine.scale"),
        "The prior would count N/B times.",
    ),
    Refusal(
        "A handler around the run",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        with poutine.scale(scale=0.1): sample(model, x, y)
        """,
        ModelError,
        ("ScaleMessenger", "around the model"),
        "The kernel runs the model by itself, without the handlers around it.",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        sample(poutine.scale(model, scale=0.1), x, y)
        """,
    ),
    Refusal(
        "A softmax as the last layer of apd.BNN",
        """
        net = nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1))
        sample(apd.BNN(net, likelihood="categorical"), x, labels)
        """,
        ModelError,
        ("net[1]", "Softmax", "logits", "del net[1]"),
        "The likelihood takes logits: probabilities in their place can say no more than 58 % of three classes.",
        """
        net = nn.Sequential(nn.Linear(3, 3))
        sample(apd.BNN(net, likelihood="categorical"), x, labels)
        """,
    ),
    Refusal(
        "A forward() that ends in a sigmoid, in apd.BNN",
        """
        class Net(nn.Linear):
            def forward(self, x): return torch.sigmoid(super().forward(x))
        sample(apd.BNN(Net(3, 1), likelihood="bernoulli"), x, labels.clamp(max=1))
        """,
        ModelError,
        ("Sigmoid", "logits", "Leave that out"),
        "As above; a log-softmax gives logits, and is taken.",
        """
        sample(apd.BNN(nn.Linear(3, 1), likelihood="bernoulli"), x, labels.clamp(max=1))
        """,
    ),
    Refusal(
        "Dropout in training mode",
        """
        dropout = nn.Dropout(0.5)
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(dropout(x) @ w, 1.0), obs=y)
        sample(model, x, y)
        """,
        ModelError,
        ("Dropout", "random numbers", ".eval()"),
        "Every step would have another potential. `apd.BNN` puts a network into evaluation mode.",
        """
        dropout = nn.Dropout(0.5).eval()
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(dropout(x) @ w, 1.0), obs=y)
        sample(model, x, y)
        """,
    ),
    Refusal(
        "Random numbers inside the model",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal((x + torch.randn_like(x)) @ w, 1.0), obs=y)
        sample(model, x, y)
        """,
        ModelError,
        ("random numbers", "'obs'", "argument"),
        "The same seed would give other draws.",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        sample(model, x + torch.randn_like(x), y)
        """,
    ),
    Refusal(
        "A seed set inside the model",
        """
        def model(x, y=None):
            torch.manual_seed(1)
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal((x + torch.randn_like(x)) @ w, 1.0), obs=y)
        sample(model, x, y)
        """,
        ModelError,
        ("random numbers", "argument"),
        "It is set for the model alone, and has no effect in a run.",
    ),
    Refusal(
        "Batch normalisation in training mode",
        """
        norm = nn.BatchNorm1d(3)
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(norm(x) @ w, 1.0), obs=y)
        sample(model, x, y)
        """,
        ModelError,
        ("BatchNorm1d", "running_mean", ".eval()"),
        "It writes its statistics in every run of the model, so that predictions depend on the number of steps.",
    ),
    Refusal(
        "Embeddings with max_norm",
        """
        class Net(pyro.nn.PyroModule):
            def __init__(self):
                super().__init__()
                self.table = pyro.nn.PyroModule[nn.Embedding](3, 2, max_norm=1.0)
                self.table.weight = pyro.nn.PyroSample(dist.Normal(torch.zeros(3, 2), 9.0).to_event(2))
            def forward(self, labels):
                pyro.sample("obs", dist.Normal(self.table(labels).sum(), 1.0), obs=torch.tensor(0.0))
        sample(Net(), labels)
        """,
        ModelError,
        ("max_norm",),
        "The layer writes to its weights, which are the state of the chain.",
    ),
    Refusal(
        "A latent behind a condition",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0)) if w > 0 else 0.0
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x[:, 0] * w + b, 1.0), obs=y)
        sample(model, x, y)
        """,
        ModelError,
        ("'b'", "torch.where"),
        "A chain has one set of latents.",
        """
        def model(x, y=None):
            w, b = pyro.sample("w", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(x[:, 0] * w + torch.where(w > 0, b, 0.0), 1.0), obs=y)
        sample(model, x, y)
        """,
    ),
    Refusal(
        "A loop over a subsample",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            for i in pyro.plate("data", len(x), subsample_size=5):
                pyro.sample(f"obs_{i}", dist.Normal(x[i] @ w, 1.0), obs=y[i])
        sample(model, x, y)
        """,
        ModelError,
        ("'data'", "loop", "y[rows]"),
        "The names of its sites change from step to step.",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x), subsample_size=5) as rows:
                pyro.sample("obs", dist.Normal(x[rows] @ w, 1.0), obs=y[rows])
        sample(model, x, y)
        """,
    ),
    Refusal(
        "Data, and nothing observed",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        sample(model, x)
        """,
        ModelError,
        ("observes nothing", "obs="),
        "Without targets the draws are from the prior.",
    ),
    Refusal(
        "No latent",
        """
        def model(x, y):
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x[:, 0], 1.0), obs=y)
        sample(model, x, y)
        """,
        ModelError,
        ("no latent", "pyro.sample"),
        "There is nothing to sample.",
    ),
]
