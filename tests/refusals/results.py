# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Entries of one group, see :mod:`tests.refusals`."""

from tests.refusals.refusal import Refusal

_LINE = """
def line(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)
"""

_PROBS = "probs = torch.softmax(torch.randn(40, 3), -1)"

REFUSALS: list[Refusal] = [
    Refusal(
        title="Draws that name a latent by another name",
        example=f"{_LINE}\napd.Predictive(line, {{'weights': torch.zeros(5, 3)}})(x)",
        error=ValueError,
        mentions=("posterior_samples", "'w'", "'weights'", "drawn from the prior"),
        why="A latent without draws is drawn from its prior, and the predictions look like any other.",
        instead=f"{_LINE}\napd.Predictive(line, {{'w': torch.zeros(5, 3)}})(x)",
    ),
    Refusal(
        title="Draws of another shape than their site's",
        example=f"{_LINE}\napd.outputs(line, {{'w': torch.zeros(5, 2)}}, x)",
        error=ValueError,
        mentions=("draws['w']", "(2,)", "(3,)"),
        why="They are draws of another model, or lack the dimension of draws.",
    ),
    Refusal(
        title="Draws grouped by chain in the place of draws",
        example=f"{_LINE}\napd.Predictive(line, {{'w': torch.zeros(2, 5, 3)}})(x)",
        error=ValueError,
        mentions=("posterior_samples['w']", "(5, 3)", "without group_by_chain", "flatten(0, 1)"),
        why="The draws of a chain would be taken for the entries of one draw, and the model may run.",
        instead=f"{_LINE}\napd.Predictive(line, {{'w': torch.zeros(2, 5, 3).flatten(0, 1)}})(x)",
    ),
    Refusal(
        title="Probabilities that are NaN",
        example="apd.metrics.accuracy(torch.full((40, 3), torch.nan), labels)",
        error=ValueError,
        mentions=("probs_NK", "120 NaN", "draws or inputs"),
        why="The largest of several NaN is the first, so that they would count as predictions of class 0.",
    ),
    Refusal(
        title="Logits in the place of probabilities",
        example="apd.metrics.negative_log_likelihood(torch.randn(40, 3), labels)",
        error=ValueError,
        mentions=("probs_NK", "negative entries", "softmax(-1)"),
        why="Logits have an order, so that an accuracy comes out, but no calibration and no likelihood.",
        instead="apd.metrics.negative_log_likelihood(torch.randn(40, 3).softmax(-1), labels)",
    ),
    Refusal(
        title="Probabilities that do not sum to one",
        example="apd.uncertainty.predictive_entropy(torch.rand(5, 40, 3) + 1)",
        error=ValueError,
        mentions=("probs_SNK", "sum to one", "softmax(-1)", "(1 - p, p)"),
        why="Scores of them are no entropies.",
    ),
    Refusal(
        title="Labels that are no classes",
        example=f"{_PROBS}\napd.metrics.accuracy(probs, labels + 1)",
        error=ValueError,
        mentions=("labels_N", "from 0 to 2", "got 3 in row 2", "Number the classes from 0"),
        why="Classes counted from one would be shifted by one.",
        instead=f"{_PROBS}\napd.metrics.accuracy(probs, labels)",
    ),
    Refusal(
        title="Scores that are no tensor",
        example="apd.metrics.auroc([0.1, 0.4], torch.zeros(3))",
        error=ValueError,
        mentions=("scores_in", "list", "torch.as_tensor"),
        why="Arrays and lists have other rules of shapes and dtypes.",
        instead="apd.metrics.auroc(torch.as_tensor([0.1, 0.4]), torch.zeros(3))",
    ),
    Refusal(
        title="Unlabelled data with probabilities that are none",
        example="apd.active_learning.select('bald', torch.randn(5, 40, 3), 4)",
        error=ValueError,
        mentions=("probs_SNK", "negative entries", "softmax(-1)"),
        why="Any numbers have a largest score, and the data labelled next would be arbitrary.",
    ),
    Refusal(
        title="Inputs to detection that are not finite",
        example=f"{_LINE}\napd.ood.evaluate(line, {{'w': torch.randn(5, 3)}}, x, x / 0)",
        error=ValueError,
        mentions=("out_data", "NaN or infinity", "40 of 40 rows"),
        why="Their scores are NaN, or infinite and so always highest.",
    ),
    Refusal(
        title="Attacks on labels that are no classes",
        example="""
        from pyro_apd.adversarial import Attack, attack
        draws = {"net.weight": torch.zeros(5, 3, 3), "net.bias": torch.zeros(5, 3)}
        how = Attack("fgsm", epsilon=0.1)
        attack(apd.BNN(nn.Linear(3, 3)), draws, x.clamp(-1, 1), labels + 1, how, bounds=(-1, 1))
        """,
        error=ValueError,
        mentions=("`y`", "from 0 to 2", "got 3 in row 2"),
        why="An attack moves away from the true class; away from another one it may even help.",
    ),
    Refusal(
        title="A student that cannot be taught",
        example="""
        draws = {"net.weight": torch.zeros(5, 3, 3), "net.bias": torch.zeros(5, 3)}
        apd.baselines.dark_knowledge(draws, apd.BNN(nn.Linear(3, 3)), nn.Identity(), x)
        """,
        error=ValueError,
        mentions=("`student`", "parameters to train", "Identity"),
        why="A network without parameters predicts the same before and after.",
    ),
    Refusal(
        title="A comparison of draws of two shapes",
        example="""
        draws = {"w": torch.randn(12, 2, 3)}
        apd.diagnostics.compare(draws, {"w": torch.randn(12, 3)}, group_by_chain=False)
        """,
        error=ValueError,
        mentions=("'w'", "(2, 3)", "(3,)", "group_by_chain"),
        why="Draws by chain, taken for draws of a larger site, would be compared entry by entry with something else.",
        instead="""
        draws = {"w": torch.randn(12, 2, 3)}
        apd.diagnostics.compare(draws, {"w": torch.randn(12, 3)}, group_by_chain=True)
        """,
    ),
    Refusal(
        title="A dict of arrays in the place of tensors",
        example="apd.diagnostics.compare({'w': torch.randn(12, 3)}, {'w': np.zeros((12, 3))})",
        error=ValueError,
        mentions=("posterior['w']", "ndarray", "torch.as_tensor"),
        why="Draws are tensors by site, as `get_samples()` gives them.",
        instead="""
        array = np.random.default_rng(0).normal(size=(12, 3))
        apd.diagnostics.compare({'w': torch.randn(12, 3)}, {'w': torch.as_tensor(array, dtype=torch.float32)})
        """,
    ),
    Refusal(
        title="Distillation in inference mode",
        example="""
        with torch.inference_mode():
            apd.distill({"w": torch.randn(50, 3)}, num_steps=1)
        """,
        error=ValueError,
        mentions=("distill computes gradients", "torch.inference_mode()", "torch.no_grad()"),
        why="Its tensors can have no gradients. `torch.no_grad()` and `torch.autocast()` around make no difference.",
    ),
]
