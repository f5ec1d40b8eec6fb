# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Adversarial inputs: attacks through a posterior, what it keeps of its accuracy, and whether it notices.

Attacks are foolbox's (``pip install 'pyro-apd[apps]'``). Sizes are in the units of the inputs.

Example::

    attacks = [
        adversarial.Attack("fgsm", epsilon=0.1, through="one"),
        adversarial.Attack("pgd", epsilon=0.1, through="expectation"),
    ]
    print(adversarial.evaluate(model, posterior, x_test, y_test, attacks, bounds=(-1, 1)))
"""

from pyro_apd.adversarial.attacks import METHODS, THROUGH, Attack, Attacked, attack
from pyro_apd.adversarial.evaluation import SCORES, Evaluation, Row, evaluate

__all__ = ["METHODS", "SCORES", "THROUGH", "Attack", "Attacked", "Evaluation", "Row", "attack", "evaluate"]
