# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""What distilled posteriors are compared against.

Each gives what :class:`~pyro_apd.Predictive` takes: draws by site as ``posterior_samples``, or a
:class:`~pyro_apd.DistilledPosterior` as ``guide``; but for :func:`dark_knowledge`, whose student is a prediction.
"""

from pyro_apd.baselines.dark_knowledge import DarkKnowledge, dark_knowledge
from pyro_apd.baselines.deep_ensemble import deep_ensemble
from pyro_apd.baselines.low_rank import low_rank
from pyro_apd.baselines.map_estimate import map_estimate
from pyro_apd.baselines.mc_dropout import mc_dropout
from pyro_apd.baselines.stored_draws import StoredDraws, stored_draws
from pyro_apd.baselines.swag import swag

__all__ = [
    "DarkKnowledge",
    "StoredDraws",
    "dark_knowledge",
    "deep_ensemble",
    "low_rank",
    "map_estimate",
    "mc_dropout",
    "stored_draws",
    "swag",
]
