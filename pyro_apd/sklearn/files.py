# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""Files of fitted estimators: safetensors with a JSON description; nothing is pickled.

The posterior is in it as the bytes that :meth:`~pyro_apd.DistilledPosterior.save` writes, or as the draws of a chain.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from torch import Tensor

from pyro_apd._version import __version__
from pyro_apd.errors import ArtifactError
from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.runtime import tensor_file
from pyro_apd.sklearn.inputs import Scaling

_FORMAT = 1
_KIND = tensor_file.FileKind(
    "pyro_apd_estimator",
    "estimator",
    "what save() of an estimator wrote",
    "Save the estimator again, or download the file again.",
    ArtifactError,
    header_allowance=2**19,
)
_POSTERIOR = "posterior"
_DRAWS = "draws#"
_SCALINGS = ("_x_scaling", "_y_scaling")
# Attributes of a fitted estimator that JSON holds, where the estimator has them.
_ATTRIBUTES = ("n_features_in_", "sampler_", "_draws_seed", "_target_shape")
# Labels that JSON keeps as they are, by the kind of their array.
_LABEL_KINDS = "biufUO"


def write(estimator: Any, path: str | os.PathLike[str]) -> None:
    """See :meth:`~pyro_apd.sklearn.base.BaseBNN.save`."""
    tensors: dict[str, Tensor] = {}
    for name in _SCALINGS:
        if hasattr(estimator, name):
            scaling = getattr(estimator, name)
            tensors |= {f"{name}.mean": torch.as_tensor(scaling.mean), f"{name}.scale": torch.as_tensor(scaling.scale)}
    if getattr(estimator, "_class_factors", None) is not None:
        tensors["_class_factors"] = torch.as_tensor(estimator._class_factors)
    posterior = estimator.posterior_
    if isinstance(posterior, DistilledPosterior):
        with tempfile.TemporaryDirectory() as folder:
            posterior.save(Path(folder) / "posterior")
            contents = (Path(folder) / "posterior").read_bytes()
        tensors[_POSTERIOR] = torch.frombuffer(bytearray(contents), dtype=torch.uint8)
    else:
        tensors |= {_DRAWS + name: value for name, value in posterior.items()}
    description = {
        "format": _FORMAT,
        "estimator": type(estimator).__name__,
        "versions": {"pyro_apd": __version__, "scikit-learn": sklearn.__version__},
        "params": {name: _to_json(name, value) for name, value in estimator.get_params(deep=False).items()},
        "attributes": {name: getattr(estimator, name) for name in _ATTRIBUTES if hasattr(estimator, name)},
    }
    if hasattr(estimator, "feature_names_in_"):
        description["feature_names"] = [str(name) for name in estimator.feature_names_in_]
    if hasattr(estimator, "classes_"):
        description["classes"] = _labels_to_json(estimator.classes_)
    tensor_file.write(_KIND, tensors, json.dumps(description), path)


def read(cls: type[Any], path: str | os.PathLike[str]) -> Any:
    """See :meth:`~pyro_apd.sklearn.base.BaseBNN.load`."""
    path = Path(path)
    text, tensors = tensor_file.read(_KIND, path)
    try:
        description = tensor_file.parse_json(text)
        if description["format"] != _FORMAT:
            raise ArtifactError(
                f"{path} has format {description['format']!r} of estimators; this version of pyro_apd reads {_FORMAT}. "
                "Install the version that wrote it, or save the estimator again."
            )
        if description["estimator"] != cls.__name__:
            raise ArtifactError(f"{path} holds a {description['estimator']}; load it with that class's load().")
        return _estimator(cls, description, tensors)
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _KIND.failure(f"{path} is damaged: {error!r}. {_KIND.remedy}") from error


def _estimator(cls: type[Any], description: Any, tensors: dict[str, Tensor]) -> Any:
    estimator = cls(**{name: _from_json(value) for name, value in description["params"].items()})
    for name, value in description["attributes"].items():
        if name in _ATTRIBUTES:
            setattr(estimator, name, tuple(value) if isinstance(value, list) else value)
    if "feature_names" in description:
        estimator.feature_names_in_ = np.array(description["feature_names"], dtype=object)
    if "classes" in description:
        estimator.classes_ = _labels_from_json(description["classes"])
        factors = tensors.get("_class_factors")
        estimator._class_factors = None if factors is None else factors.numpy()
    for name in _SCALINGS:
        if f"{name}.mean" in tensors:
            setattr(estimator, name, Scaling(tensors[f"{name}.mean"].numpy(), tensors[f"{name}.scale"].numpy()))
    estimator.model_ = estimator._make_model()
    if _POSTERIOR in tensors:
        estimator.posterior_ = estimator.distilled_ = _posterior(tensors[_POSTERIOR])
        estimator.posterior_.bind(estimator.model_)
    else:
        draws = {n.removeprefix(_DRAWS): value for n, value in tensors.items() if n.startswith(_DRAWS)}
        sites = {name: tuple(prior.shape()) for name, prior in estimator.model_.priors.items()}
        if {name: tuple(value.shape[1:]) for name, value in draws.items()} != sites:
            raise ValueError("its draws are not those of its network")
        estimator.posterior_ = draws
    return estimator


def _posterior(contents: Tensor) -> DistilledPosterior:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "posterior"
        file.write_bytes(contents.numpy().tobytes())
        return DistilledPosterior.load(file)


def _to_json(name: str, value: Any) -> Any:
    """A parameter: dicts as pairs, as their keys need not be text; tuples as lists with a mark."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return {"tuple": [_to_json(name, item) for item in value]}
    if isinstance(value, dict):
        return {"pairs": [[_to_json(name, key), _to_json(name, item)] for key, item in value.items()]}
    if name == "random_state":  # a generator, which has moved on
        return None
    raise ValueError(
        f"{name}={value!r} cannot be saved: a file holds numbers, text, tuples and dicts. Set it to one of these, or "
        "keep the posterior alone: estimator.posterior_.save(path)."
    )


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_from_json(item) for item in value["tuple"])
    return {_from_json(key): _from_json(item) for key, item in value["pairs"]}


def _labels_to_json(labels: np.ndarray) -> dict[str, Any]:
    if labels.dtype.kind not in _LABEL_KINDS or not all(
        isinstance(v, (bool, int, float, str)) for v in labels.tolist()
    ):
        raise ValueError(f"classes_ of dtype {labels.dtype} cannot be saved; use numbers, text or booleans as labels.")
    return {"kind": labels.dtype.kind, "dtype": labels.dtype.str, "values": labels.tolist()}


def _labels_from_json(labels: dict[str, Any]) -> np.ndarray:
    if labels["kind"] not in _LABEL_KINDS:
        raise ValueError(f"labels of kind {labels['kind']!r}")
    return np.array(labels["values"], dtype=object if labels["kind"] == "O" else labels["dtype"])
