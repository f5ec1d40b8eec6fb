# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Messages about sites whose likelihood is not one of a sum over rows."""

from __future__ import annotations

from pyro_apd.models.row_terms import ModelRun


def latent_in_plate_message(name: str, plate: str) -> str:
    """Why a latent may not lie in the plate of the data."""
    return (
        f"Latent site '{name}' lies inside the subsampled plate '{plate}': it has one value for each datum, and a "
        "mini-batch sees only some of them. If it is a weight, read it (or call the network) before the plate; if it "
        "should be data, pass its value with obs= (was the target given to mcmc.run?); if it is a local latent, "
        "marginalise it or use the full batch."
    )


def not_by_row_message(name: str, num_rows: int) -> str:
    """Of a site in which rows have an effect on each other."""
    return (
        f"Observed site '{name}' is not a sum over rows: in batches of {num_rows}, the log-likelihood of a row changes "
        "with the other rows or their order (a statistic of the batch, padding without a mask, a lagged value, a "
        "contrast, a Gaussian process, BatchNorm in training mode). The mini-batches would have another posterior than "
        "the data. Compute such values from all data before the run and pass them as arguments, one per row; or use "
        "the full batch."
    )


def by_number_message(name: str, few: int, more: int) -> str:
    """Of a site whose terms change with the number of rows."""
    return (
        f"Observed site '{name}': the log-likelihood of a row changes with the number of rows, {few} or {more} (N/B or "
        "1/len(x) in the value of a factor, a mean over the batch, or noise from len(x)). The kernel multiplies the "
        "sum over the rows of a batch by N/B itself: write the sum, and constants in place of len(x)."
    )


def other_number_message(batch_size: int, error: Exception) -> str:
    """What to write in a model that fails on another number of rows than ``batch_size``."""
    cause = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return (
        f"The model takes batches of {batch_size} rows and fails on one row more or less ({cause}), so that it cannot "
        "be seen how its likelihood depends on the number of rows. Size plates and tensors by the rows that the model "
        "is given: len(x) in place of a number."
    )


def changing_site_message(name: str, what: str, one: ModelRun, other: ModelRun) -> str:
    """Of a site that must not depend on the rows, but does."""
    first, second = one.site(name), other.site(name)
    values = f"{float(first.total):g} with {one.num_rows} rows, {float(second.total):g} with {other.num_rows}"
    cause = "on the number of rows" if one.num_rows != other.num_rows else "on which rows the batch holds"
    return (
        f"{what} '{name}' depends {cause}: its log-density is {values} at the same values. A mini-batch may change "
        "the likelihood only. Take it out of poutine.scale(N / len(x)), and use constants, computed from all data "
        "before the run, in place of len(x) or statistics of x."
    )
