# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Data and settings that are refused."""

from pyro_apd.errors import DataError, ModelError
from tests.refusals.refusal import Refusal

LOADER = "from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset, WeightedRandomSampler\n"
MODEL = """\
def model(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", {likelihood}, obs={target})
"""


def model(likelihood="dist.Normal(x @ w, 1.0)", target="y"):
    return MODEL.format(likelihood=likelihood, target=target)


REFUSALS: list[Refusal] = [
    Refusal(
        title="A loader that weights its rows",
        example=LOADER
        + """\
sampler = WeightedRandomSampler(torch.rand(40), 40)
sample(apd.BNN(nn.Linear(3, 3)), DataLoader(TensorDataset(x, labels), 10, sampler=sampler))
""",
        error=ValueError,
        mentions=("WeightedRandomSampler", "RandomSampler(dataset, replacement=True)", "poutine.scale"),
        why="Rows that come more often count as more data.",
        instead=LOADER
        + """\
data = TensorDataset(x, labels)
sample(apd.BNN(nn.Linear(3, 3)), DataLoader(data, 10, sampler=RandomSampler(data, replacement=True)))
""",
    ),
    Refusal(
        title="A sampler that repeats rows",
        example=LOADER
        + """\
rows = [0, 1, 2, 2, 2, 3, 4, 5]
sample(apd.BNN(nn.Linear(3, 3)), DataLoader(TensorDataset(x, labels), 4, sampler=rows))
""",
        error=ValueError,
        mentions=("row 2 3 times", "Subset(dataset, indices)"),
        why="A row that comes three times per epoch counts as three data.",
        instead=LOADER
        + """\
data = Subset(TensorDataset(x, labels), [0, 1, 2, 2, 2, 3, 4, 5])
sample(apd.BNN(nn.Linear(3, 3)), DataLoader(data, 4, shuffle=True))
""",
    ),
    Refusal(
        title="A loader that does not show its N",
        example=LOADER
        + """\
batches = TensorDataset(x.view(4, 10, 3), labels.view(4, 10))  # an item is a batch
sample(apd.BNN(nn.Linear(3, 3)), DataLoader(batches, batch_size=None))
""",
        error=ValueError,
        mentions=("batch_size=None", "num_data=N"),
        why="The likelihood of a batch is scaled to N rows. The length of this dataset is the number of batches.",
        instead=LOADER
        + """\
batches = TensorDataset(x.view(4, 10, 3), labels.view(4, 10))
sample(apd.BNN(nn.Linear(3, 3)), DataLoader(batches, batch_size=None), num_data=40)
""",
    ),
    Refusal(
        title="A stated N that is not the loader's",
        example=LOADER
        + """\
loader = DataLoader(TensorDataset(x, labels), 10, sampler=range(20))
sample(apd.BNN(nn.Linear(3, 3)), loader, num_data=40)
""",
        error=ValueError,
        mentions=("num_data=40", "20 rows", "Leave num_data out"),
        why="Rows 20 to 39 are never seen; scaled to 40, each of the others counts twice.",
    ),
    Refusal(
        title="An epoch that holds other rows than it says",
        example=LOADER
        + """\
known = lambda items: [torch.stack(column) for column in zip(*[(a, b) for a, b in items if b > 0])]
kernel = apd.SGLD(apd.BNN(nn.Linear(3, 3)), 1e-5, capture=False)
loader = DataLoader(TensorDataset(x, labels), 20, collate_fn=known)
apd.MCMC(kernel, 4, 2, disable_progbar=True).run(loader)
""",
        error=DataError,
        mentions=("held 26 rows, where 40 were expected", "num_data=N"),
        why="The loader leaves rows out, and is scaled to all of them. The rows of an epoch are counted.",
    ),
    Refusal(
        title="A sampler of your own that weights its rows",
        example=LOADER
        + """\
class Balanced(torch.utils.data.Sampler):
    def __len__(self): return 40
    def __iter__(self): return iter(torch.multinomial(1.0 + 3.0 * (labels == 0), 40, True).tolist())

sample(apd.BNN(nn.Linear(3, 3)), DataLoader(TensorDataset(x, labels), 10, sampler=Balanced()), num_data=40)
""",
        error=ValueError,
        mentions=("Balanced draws rows unequally often", "row 1,", "poutine.scale(scale=weights)"),
        why="Batch samplers that balance classes do so, too. What a sampler draws is counted over some epochs.",
    ),
    Refusal(
        title="Batches of unequal size",
        example="""\
def batches():
    while True:
        yield x[:2], labels[:2]
        yield x[2:], labels[2:]

sample(apd.BNN(nn.Linear(3, 3)), batches(), num_data=40)
""",
        error=DataError,
        mentions=("differ in size: 38 rows after at most 38, with 1 shorter before", "list of batches"),
        why="Scaled by N over its rows, each row of the small batch would count 19 times as much as one of the other.",
        instead="""\
batches = [(x[:2], labels[:2]), (x[2:], labels[2:])]
sample(apd.BNN(nn.Linear(3, 3)), batches, num_data=40)
""",
    ),
    Refusal(
        title="Padding that is not masked",
        example=LOADER
        + """\
def padded(items):
    return nn.utils.rnn.pad_sequence([row for row, _ in items], batch_first=True), torch.stack([b for _, b in items])
def model(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(w * x.mean(1), 1.0), obs=y)
sample(model, DataLoader([(torch.ones(1 + i % 7), y[i]) for i in range(40)], 10, collate_fn=padded))
""",
        error=ModelError,
        mentions=("'obs' is not a sum over rows", "padding without a mask"),
        why="The mean of a row changes with the longest row of its batch. The probe collates rows otherwise, too.",
    ),
    Refusal(
        title="A batch size above the data, with drop_last",
        example=LOADER
        + """\
sample(apd.BNN(nn.Linear(3, 3)), DataLoader(TensorDataset(x, labels), 64, shuffle=True, drop_last=True))
""",
        error=ValueError,
        mentions=("batch_size=64 and drop_last=True", "40 rows", "at most 40"),
        why="There would be no batch.",
    ),
    Refusal(
        title="Batches of something else than rows",
        example=LOADER
        + """\
packed = lambda items: (nn.utils.rnn.pack_sequence([a for a, _ in items]), torch.stack([b for _, b in items]))
sample(apd.BNN(nn.Linear(3, 3)), DataLoader(TensorDataset(x, labels), 10, collate_fn=packed))
""",
        error=DataError,
        mentions=("PackedSequence", "padded sequences and their lengths"),
        why="Sparse and nested tensors, and tensors without a dimension, are refused, too.",
    ),
    Refusal(
        title="Sequences with time first",
        example=LOADER
        + """\
time_first = lambda items: (torch.stack([a for a, _ in items], 1), torch.stack([b for _, b in items]))
sample(apd.BNN(nn.Linear(3, 3)), DataLoader(TensorDataset(x, labels), 10, collate_fn=time_first))
""",
        error=DataError,
        mentions=("#0 (3, 10), #1 (10,)", "Rows are the first dimension", "x.transpose(0, 1)"),
        why="A batch would have as many rows as steps of time.",
    ),
    Refusal(
        title="A stated N without effect",
        example="sample(apd.BNN(nn.Linear(3, 3)), x, labels, num_data=4000)",
        error=ValueError,
        mentions=("num_data=4000", "no argument has 4000 rows", "poutine.scale"),
        why="Every step uses all rows that are given, and nothing scales their likelihood.",
        instead="sample(apd.BNN(nn.Linear(3, 3)), x, labels)",
    ),
    Refusal(
        title="Batches in a list, without their number of rows",
        example="sample(apd.BNN(nn.Linear(3, 3)), [(x[:20], labels[:20]), (x[20:], labels[20:])])",
        error=DataError,
        mentions=("#0 is a list", "looks like batches", "num_data=N"),
        why="A list may be an argument of the model.",
        instead="sample(apd.BNN(nn.Linear(3, 3)), [(x[:20], labels[:20]), (x[20:], labels[20:])], num_data=40)",
    ),
    Refusal(
        title="Datasets, and names of files",
        example=LOADER + "sample(apd.BNN(nn.Linear(3, 3)), TensorDataset(x, labels))",
        error=DataError,
        mentions=("#0 is a TensorDataset", "DataLoader(dataset, batch_size=..., shuffle=True)"),
        why="Models compute with tensors.",
        instead=LOADER + "sample(apd.BNN(nn.Linear(3, 3)), DataLoader(TensorDataset(x, labels), 10, shuffle=True))",
    ),
    Refusal(
        title="A target outside the support, in any row",
        example="""\
labels[37] = 9
sample(apd.BNN(nn.Linear(3, 3)), x, labels, batch_size=5)
""",
        error=DataError,
        mentions=("'obs'", "value 9", "row 37", "integers from 0 to 2", "y - 1"),
        why="Every row is looked at once. Most distributions score a value outside their support without an error.",
        instead="sample(apd.BNN(nn.Linear(3, 3)), x, labels, batch_size=5)",
    ),
    Refusal(
        title="A row without a finite density",
        example=model(target="y.log()")
        + """\
y = y.abs(); y[37] = 0.0
sample(model, x, y, batch_size=5)
""",
        error=DataError,
        mentions=("'obs'", "no finite log-density", "-inf in row 37"),
        why="The chain would break where that row comes.",
    ),
    Refusal(
        title="An index out of range, in any row",
        example="""\
labels[37] = 9
net = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3))
sample(apd.BNN(net), labels, labels % 3, batch_size=5)
""",
        error=DataError,
        mentions=("row 37", "index out of range", "embedding"),
        why="The step at which that row comes would fail, or read other memory on a GPU.",
    ),
    Refusal(
        title="Missing values that count",
        example=model() + "y[37] = torch.nan\nsample(model, x, y)",
        error=DataError,
        mentions=("#1", "1 NaN", "poutine.mask(mask=~y.isnan())", "y.nan_to_num()"),
        why="One NaN makes every weight NaN. A NaN that is only masked still has a gradient of NaN.",
        instead="""\
def model(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)), pyro.poutine.mask(mask=~y.isnan()):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y.nan_to_num())

y[37] = torch.nan
sample(model, x, y)
""",
    ),
    Refusal(
        title="Data frames",
        example="""\
import pandas
sample(apd.BNN(nn.Linear(3, 3)), pandas.DataFrame(x.numpy()), labels)
""",
        error=DataError,
        mentions=("#0", "DataFrame", 'torch.tensor(x.to_numpy(dtype="float32"))'),
        why="The rows of a data frame are not its items.",
        instead="""\
import pandas
frame = pandas.DataFrame(x.numpy())
sample(apd.BNN(nn.Linear(3, 3)), torch.tensor(frame.to_numpy(dtype="float32")), labels)
""",
    ),
    Refusal(
        title="Sparse tensors",
        example="sample(apd.BNN(nn.Linear(3, 3)), x.to_sparse(), labels)",
        error=DataError,
        mentions=("#0", "sparse", "x.to_dense()"),
        why="Rows of sparse tensors cannot be taken.",
        instead="sample(apd.BNN(nn.Linear(3, 3)), x.to_sparse().to_dense(), labels)",
    ),
    Refusal(
        title="No rows",
        example="sample(apd.BNN(nn.Linear(3, 3)), x[:0], labels[:0])",
        error=DataError,
        mentions=("#0", "no rows"),
        why="The draws would be those of the prior.",
    ),
    Refusal(
        title="Arguments in another order",
        example=model() + "sample(model, y, x)",
        error=DataError,
        mentions=("#0 torch.float32 (40,)", "#1 torch.float32 (40, 3)", "mcmc.run(x, y)"),
        why="The error of torch names no argument.",
        instead=model() + "sample(model, x, y)",
    ),
    Refusal(
        title="Data of another dtype than the weights",
        example="""\
net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(2, 3))
sample(apd.BNN(net), x[:, None].double(), labels)
""",
        error=DataError,
        mentions=("#0 is torch.float64", "'net.0.weight' is torch.float32", "x.to(torch.float32)"),
        why="Linear, convolutional and recurrent layers fail on it, each with another error.",
        instead="""\
net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(2, 3))
sample(apd.BNN(net), x[:, None].double().to(torch.float32), labels)
""",
    ),
    Refusal(
        title="A latent site without entries",
        example="""\
def model(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(0), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(w.sum() + x[:, 0], 1.0), obs=y)

sample(model, x, y)
""",
        error=ModelError,
        mentions=("'w'", "no entries"),
        why="There is nothing to draw.",
    ),
    Refusal(
        title="Chains in processes, and a loader with worker processes",
        example="""\
from torch.utils.data import DataLoader, TensorDataset
loader = DataLoader(TensorDataset(x, labels), 10, num_workers=1)
sample(apd.BNN(nn.Linear(3, 3)), loader, num_chains=2, chain_method="parallel")
""",
        error=ValueError,
        mentions=("num_workers=1", "chain_method='parallel'", "num_workers=0"),
        why="The process of a chain cannot start others.",
    ),
    Refusal(
        title="Settings of another type",
        example="apd.SGLD(apd.BNN(nn.Linear(3, 3)), 1e-5, seed=torch.Generator())",
        error=ValueError,
        mentions=("seed=", "None or an integer from 0 to 2**64 - 1"),
        why="Numbers of Python and NumPy are accepted; each message says which range.",
        instead="apd.SGLD(apd.BNN(nn.Linear(3, 3)), np.float32(1e-5), seed=np.int64(3), batch_size=np.int64(5))",
    ),
    Refusal(
        title="Starts that are no dict",
        example=model() + "sample(model, x, y, initial_params=[0.0, 0.0, 0.0])",
        error=ValueError,
        mentions=("initial_params is a list", "by site"),
        why="Values belong to sites.",
        instead=model() + 'sample(model, x, y, initial_params={"w": np.zeros(3)})',
    ),
]
