# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""History of a run of active learning: queried data and test metrics, saved after each round."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_apd.posterior.posterior import DistilledPosterior
from pyro_apd.predictive.draws import PosteriorLike
from pyro_apd.runtime import tensor_file
from pyro_apd.runtime.files import atomic_write
from pyro_apd.runtime.tensor_file import FileKind

#: Of the file; raised when what is in it changes its meaning.
FORMAT = 1

#: Draws by site, or a generator: what a warm run can keep.
KeptPosterior = Mapping[str, Tensor] | DistilledPosterior

_DRAWS = FileKind(
    "pyro_apd_draws",
    "file of draws",
    "what a run with history_path= wrote",
    "Move the history away to start the run over.",
)


@dataclass(frozen=True)
class Round:
    """One round: a posterior of the data labelled so far, and what it wants labelled next.

    :ivar int num_labels: labelled data that the posterior is of.
    :ivar float accuracy: of its averaged prediction on the test data.
    :ivar float negative_log_likelihood: likewise, nats a datum.
    :ivar list wanted: positions in the pool that it wants labelled next; the next round has them.
    :ivar float seconds: wall time.
    """

    num_labels: int
    accuracy: float
    negative_log_likelihood: float
    wanted: list[int]
    seconds: float

    def outcome(self) -> dict[str, Any]:
        """Everything but the time it took."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}


@dataclass
class History:
    """The rounds of one run. Printed, it is a table.

    :ivar dict settings: what the run was given, and the SHA-256 of its data.
    :ivar list initial: positions in the pool that were labelled from the start.
    :ivar list rounds: :class:`Round` by round.
    """

    settings: dict[str, Any]
    initial: list[int]
    rounds: list[Round] = field(default_factory=list)

    @property
    def labelled(self) -> list[int]:
        """Positions in the pool that the last round was fitted to, in the order of labelling."""
        return [*self.initial, *(i for one in self.rounds[:-1] for i in one.wanted)]

    @property
    def wanted(self) -> list[int]:
        """Positions in the pool to have labelled next."""
        return self.rounds[-1].wanted if self.rounds else []

    @property
    def num_labels(self) -> list[int]:
        """Labelled data by round."""
        return [one.num_labels for one in self.rounds]

    @property
    def accuracy(self) -> list[float]:
        """Test accuracy by round."""
        return [one.accuracy for one in self.rounds]

    @property
    def mean_accuracy(self) -> float:
        """Mean test accuracy over rounds: the normalised area under the learning curve."""
        return sum(self.accuracy) / len(self.rounds)

    def labels_to_reach(self, accuracy: float) -> int | None:
        """The fewest labels with at least that test accuracy; None if it was never reached."""
        return next((one.num_labels for one in self.rounds if one.accuracy >= accuracy), None)

    def outcome(self) -> dict[str, Any]:
        """All that a seed determines: everything but times."""
        rounds = [one.outcome() for one in self.rounds]
        return {"settings": self.settings, "initial": self.initial, "rounds": rounds}

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> History:
        """Inverse of :meth:`to_json`.

        :raises ValueError: if it is not a history.
        """
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, while this version reads {FORMAT}")
            rounds = [Round(**one) for one in content["rounds"]]
            return cls(dict(content["settings"]), list(content["initial"]), rounds)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"This is no history of active learning: {error}.") from error

    def __str__(self) -> str:
        lines = ["  labels  accuracy     NLL  seconds"]
        lines += [
            f"{one.num_labels:8d}  {one.accuracy:8.4f}  {one.negative_log_likelihood:6.3f}  {one.seconds:7.1f}"
            for one in self.rounds
        ]
        return "\n".join([f"acquisition: {self.settings.get('acquisition')}", *lines])


class HistoryFile:
    """A history on disk, and beside it the last posterior where the next round starts from it.

    Both are written after each round, atomically. The history names the posterior that belongs to it, so that an
    interruption at any moment leaves a matching pair.

    :param path: the JSON file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self, settings: Mapping[str, Any]) -> tuple[History | None, KeptPosterior | None]:
        """The history there is, None if none, and the last posterior, None if it was not kept.

        :raises ValueError: if the file is of a run with other settings, or no history.
        """
        if not self.path.exists():
            return None, None
        try:
            content = json.loads(self.path.read_text())
        except ValueError as error:
            raise ValueError(f"{self.path} is not JSON ({error}); move it away to start over.") from error
        history = History.from_json(content)
        unlike = {
            name: (history.settings.get(name), settings.get(name))
            for name in {*history.settings, *settings}
            if history.settings.get(name) != settings.get(name)
        }
        if unlike:
            said = "; ".join(f"{name}: {theirs!r} there, {ours!r} here" for name, (theirs, ours) in unlike.items())
            raise ValueError(f"{self.path} is of a run with other settings ({said}). Give another `history_path`.")
        return history, self._read_state(content.get("state"))

    def write(self, history: History, posterior: PosteriorLike | None = None) -> None:
        """Replaces the history on disk, and the posterior where one is given.

        :raises ValueError: if the posterior is neither draws nor a :class:`~pyro_apd.DistilledPosterior`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = history.to_json()
        if posterior is not None:
            content["state"] = self._write_state(posterior, len(history.rounds))
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        for old in self.path.parent.glob(f"{self.path.stem}.round-*.safetensors"):
            if old.name != content.get("state", {}).get("file"):
                old.unlink()

    def _write_state(self, posterior: PosteriorLike, number: int) -> dict[str, str]:
        path = self.path.with_name(f"{self.path.stem}.round-{number:04d}.safetensors")
        if isinstance(posterior, DistilledPosterior):
            posterior.save(path)
            return {"file": path.name, "kind": "distilled"}
        if isinstance(posterior, Mapping) and all(isinstance(value, Tensor) for value in posterior.values()):
            tensor_file.write(_DRAWS, posterior, "{}", path)
            return {"file": path.name, "kind": "draws"}
        raise ValueError(
            "A warm run can be kept in `history_path` where posteriors are draws by site or a DistilledPosterior; this "
            f"is a {type(posterior).__name__}. Leave `history_path` out, or use retraining='cold'."
        )

    def _read_state(self, known: Mapping[str, str] | None) -> KeptPosterior | None:
        if known is None:
            return None
        path = self.path.with_name(Path(known["file"]).name)
        if known["kind"] == "distilled":
            return DistilledPosterior.load(path)
        return tensor_file.read(_DRAWS, path)[1]
