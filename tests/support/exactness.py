# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Many chains at once, held to a Gaussian that is known exactly.

One chain of 20,000 steps and 512 chains of 750 give as many independent draws; the second takes a few per cent of the
time. Standard errors come from the chains, which are independent, so that no autocorrelation time is estimated.
"""

import torch

from pyro_apd.kernels.engine.chain_set import ChainSet

# Two-sided, for the few dozen numbers of a test: chance alone exceeds it once in 150,000 numbers.
STANDARD_ERRORS = 4.5


def draws_of_chains(kernel, args, *, num_chains=512, num_draws=20, every=30, warmup=150):
    """``(C, S, n)`` in double precision.

    :param every: Langevin steps per draw.
    :param warmup: Langevin steps before the first.
    """
    chain = kernel.begin(args, {}, warmup_steps=0, num_samples=num_draws, chains=ChainSet(count=num_chains))
    draws = []
    with torch.no_grad():
        chain.advance(warmup)
        for _ in range(num_draws):
            chain.advance(every)
            draws.append(chain.theta.double().clone())
    return torch.stack(draws, 1)


def assert_gaussian(draws_CSn, mean, covariance, *, excess=0.0):
    """Mean and covariance, whitened, are zero and one within standard errors.

    :param excess: share by which any variance may be too large beside them, as by the noise of mini-batches.
    """
    root = torch.linalg.cholesky(covariance.double())
    white_CSn = torch.linalg.solve_triangular(root, (draws_CSn - mean.double()).mT, upper=False).mT
    means_Cn = white_CSn.mean(1)
    error_n = means_Cn.std(0) / len(means_Cn) ** 0.5
    assert (means_Cn.mean(0).abs() < STANDARD_ERRORS * error_n).all(), (means_Cn.mean(0), error_n)
    products_Cnn = torch.einsum("csi,csj->cij", white_CSn, white_CSn) / white_CSn.shape[1]
    error_nn = products_Cnn.std(0) / len(products_Cnn) ** 0.5
    off_nn = products_Cnn.mean(0) - torch.eye(len(root))
    assert (off_nn > -STANDARD_ERRORS * error_nn - excess * (1 - torch.eye(len(root)))).all(), (off_nn, error_nn)
    assert (off_nn < STANDARD_ERRORS * error_nn + excess).all(), (off_nn, error_nn)
    assert error_nn.max() < 0.04, "too few draws to tell a wrong temperature"


def assert_resumes(kernel, begin, data, taken, total):
    """A chain that goes on from its state after ``taken`` steps is the same bit for bit after ``total``."""
    chain, resumed = (kernel.begin(data, {}, **begin) for _ in range(2))
    with torch.no_grad():
        if taken:
            chain.advance(taken)
        state = chain.state_dict()
        chain.advance(total - taken)
        resumed.load_state_dict(state)
        resumed.advance(total - taken)
    assert torch.equal(resumed.theta, chain.theta)
    assert resumed.warmup.report() == chain.warmup.report()
