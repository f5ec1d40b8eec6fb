# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Likelihoods of mini-batches that are not a sum over rows, or whose N/B is unclear."""

from pyro_apd.errors import DataError, ModelError
from tests.refusals.refusal import Refusal

_REGRESSION = """
def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
"""


def _entry(title, body, mentions, why, instead="", *, run="sample(model, x, y, batch_size=10)", error=ModelError):
    """A regression model with other last lines."""

    def written(lines):
        return _REGRESSION + "".join(f"    {line}\n" for line in lines.strip().splitlines()) + run

    return Refusal(title, written(body), error, mentions, why, written(instead) if instead else "")


_SUM = 'with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)'

REFUSALS = [
    _entry(
        "Statistics of the batch",
        """
z = (x - x.mean(0)) / x.std(0)
with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(z @ w, 1.0), obs=y)
        """,
        ("'obs'", "not a sum over rows", "full batch"),
        "Each batch has its own mean, so that the mini-batches have another posterior than the data.",
        _SUM,
    ),
    _entry(
        "What is done where the batch leans to one side",
        """
f = x @ w
with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(2 * f if f.mean() > 0 else f, 1.0), obs=y)
        """,
        ("'obs'", "not a sum over rows", "a statistic of the batch"),
        "The same row counts otherwise in a batch with others. The model is run on batches of one row alone to see it.",
        _SUM,
    ),
    _entry(
        "The number of rows in batches of one row",
        'with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, len(x) ** 0.5), obs=y)',
        ("'obs'", "changes with the number of rows", "constants in place of len(x)"),
        "With one row in each batch it does not change, and yet is another one than for all data.",
        _SUM,
        run="sample(model, x, y, batch_size=1)",
    ),
    _entry(
        "Lagged targets in mini-batches",
        """
lag = torch.cat([y[:1], y[:-1]])
with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(lag + x @ w, 1.0), obs=y)
        """,
        ("'obs'", "a lagged value", "pass them as arguments"),
        "In a batch of random rows, the row before is not the row before in time. With the full batch it runs.",
    ),
    _entry(
        "Groups by their rank in the batch",
        """
g = (x[:, 0] > 1.8).long()
a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))[torch.unique(g, return_inverse=True)[1]]
with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w + a, 1.0), obs=y)
        """,
        ("'obs'", "torch.unique", "before the run"),
        "In a batch that lacks a group the others get other numbers, and so other latents.",
        """
g = (x[:, 0] > 1.8).long()
a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))[g]
with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w + a, 1.0), obs=y)
        """,
    ),
    _entry(
        "A Gaussian process over the rows of a batch",
        'K = x @ x.T + torch.eye(len(x))\npyro.sample("obs", dist.MultivariateNormal(w[0].expand(len(x)), K), obs=y)',
        ("'obs'", "not a sum over rows"),
        "The rows of a batch are correlated with rows outside it.",
    ),
    _entry(
        "N/B in the value of a factor",
        'with pyro.plate("data", len(x)): pyro.factor("fit", 40 / len(x) * dist.Normal(x @ w, 1.0).log_prob(y))',
        ("'fit'", "number of rows", "constants in place of len(x)"),
        "The kernel multiplies by N/B, too.",
        'with pyro.plate("data", len(x)): pyro.factor("fit", dist.Normal(x @ w, 1.0).log_prob(y))',
    ),
    _entry(
        "Noise from the number of rows",
        'with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, len(x) ** 0.5), obs=y)',
        ("'obs'", "number of rows"),
        "A batch has fewer rows than the data, and so another noise.",
        'with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, 40**0.5), obs=y)',
    ),
    _entry(
        "N/B by hand beside the plate",
        """
with poutine.scale(scale=40 / len(x)), pyro.plate("data", 40, subsample_size=len(x)):
    pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        """,
        ("'obs'", "counts twice", "State N once"),
        "The posterior would have the temperature of (N/B) times the data.",
        'with pyro.plate("data", 40, subsample_size=len(x)): pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)',
    ),
    _entry(
        "N/B by hand, once for each row",
        """
with pyro.plate("data", len(x)), poutine.scale(scale=torch.full((len(x),), 4.0)):
    pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        """,
        ("'obs'", "scaled by 4", "counts twice"),
        "The kernel multiplies by N/B, too.",
        _SUM,
    ),
    _entry(
        "Tensors of B rows in the model",
        """
with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, torch.ones(10)), obs=y)
        """,
        ("batches of 10 rows", "len(x) in place of a number"),
        "How the likelihood depends on the number of rows cannot be seen.",
        'with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, torch.ones(len(x))), obs=y)',
    ),
    _entry(
        "A plate of some rows of a batch",
        """
keep = x[:, 0] > 1.8
with pyro.plate("data", int(keep.sum())): pyro.sample("obs", dist.Normal(x[keep] @ w, 1.0), obs=y[keep])
        """,
        ("size cannot be zero", "poutine.mask(mask=keep)"),
        "Some batches have no such row, and the number of terms does not follow the rows.",
        """
keep = x[:, 0] > 1.8
with pyro.plate("data", len(x)), poutine.mask(mask=keep): pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        """,
    ),
    _entry(
        "A fixed subset of the rows by subsample=",
        """
with pyro.plate("data", len(x), subsample=torch.arange(10)) as rows:
    pyro.sample("obs", dist.Normal(x[rows] @ w, 1.0), obs=y[rows])
        """,
        ("'data'", "the same 10 rows", "subsample_size=10"),
        "A plate counts each of its rows N/B times, as if they stood for all rows.",
        """
with pyro.plate("data", len(x), subsample_size=10) as rows:
    pyro.sample("obs", dist.Normal(x[rows] @ w, 1.0), obs=y[rows])
        """,
        run="sample(model, x, y)",
    ),
    _entry(
        "A factor for each pair of rows",
        'pyro.factor("fit", dist.Normal((x @ w)[:, None], 1.0).log_prob(y))',
        ("'fit'", "(40, 40)", "squeeze(-1)", "terms.sum()"),
        "Every target is scored by every mean. If pairs are meant, give their sum.",
        'pyro.factor("fit", dist.Normal(x @ w, 1.0).log_prob(y).sum())',
        run="sample(model, x, y)",
        error=DataError,
    ),
    Refusal(
        "Means in a column against targets in a row",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        sample(model, x, y)
        """,
        DataError,
        ("'obs'", "(40, 40)", "squeeze(-1)", ".to_event(1)"),
        "Means `(N, 1)` and targets `(N,)` broadcast to `(N, N)`: every target is scored by every mean.",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3, 1), 1.0).to_event(2))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal((x @ w).squeeze(-1), 1.0), obs=y)
        sample(model, x, y)
        """,
    ),
    Refusal(
        "Several outputs without to_event",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
        sample(model, x, torch.stack([y, y], -1))
        """,
        ModelError,
        ("'obs'", ".to_event(1)"),
        "Inside a plate the last dimension of a distribution is the plate's.",
        """
        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
            with pyro.plate("data", len(x)): pyro.sample("obs", dist.Normal(x @ w, 1.0).to_event(1), obs=y)
        sample(model, x, torch.stack([y, y], -1))
        """,
    ),
]
