# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The result of a comparison: a :class:`pandas.DataFrame` with a verdict.

Imported only when a comparison is made, because it imports pandas.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import pandas
from torch import Tensor

from pyro_apd.diagnostics.comparison.verdict import INDISTINGUISHABLE, Row
from pyro_apd.diagnostics.formatting import finite_only, format_bytes, format_number

_COLUMNS = ("chain", "generator", "stored", "resolution")
_FACTS = (
    *("rows", "status", "verdict", "num_samples", "num_stored", "num_bytes", "mixing", "chain_name", "notes"),
    "per_input",
)


class Fidelity(pandas.DataFrame):
    """A generator compared with its chain. Made by :func:`~pyro_apd.diagnostics.compare`.

    It is a :class:`pandas.DataFrame` with a row for each metric, indexed by its name, and the columns ``label``,
    ``group``, ``chain``, ``generator``, ``stored``, ``resolution``, ``status`` and ``verdict``, and one for each
    baseline that was given. What pandas makes of it (selections, copies) is a plain one. Printed, it is a table with
    the verdict above.

    :ivar tuple rows: :class:`~pyro_apd.diagnostics.comparison.verdict.Row` by row;
        ``fidelity["mean_mi"]`` is one of them, while
        ``fidelity["chain"]`` is a column.
    :ivar str status: ``indistinguishable``, ``loses``, ``departs`` or ``unclear``: of the whole; by row it is
        ``fidelity["status"]``.
    :ivar str verdict: the same in words; by row, ``fidelity["verdict"]``.
    :ivar int num_samples: draws of chain and of generator, of which the metrics are.
    :ivar int num_stored: stored draws of the same size as the generator's file.
    :ivar dict num_bytes: ``chain`` (all its draws), ``generator`` (its file), ``stored``, ``network`` (one draw), and
        by the names of baselines.
    :ivar float mixing: share of the variance of the chain's predictions that is between half-chains; NaN if unknown.
    :ivar str chain_name: the chain's kernel, such as ``SGLD``.
    :ivar tuple notes: remarks for the reader.
    :ivar dict per_input: by ``chain`` and ``generator``: scores ``(N,)`` by ``entropy``, ``mi`` (or ``sd``,
        ``epistemic``), those of out-of-distribution sets as ``mi[noise]``, and the averaged prediction as ``mean``;
        targets as ``per_input["targets"]["y"]``. On the CPU; empty after :meth:`from_json`.
    """

    _metadata = list(_FACTS)  # noqa: RUF012 (pandas's way to keep attributes)

    def __init__(
        self,
        rows: Sequence[Row],
        status: str,
        verdict: str,
        *,
        num_samples: int,
        num_stored: int,
        num_bytes: Mapping[str, int],
        mixing: float,
        chain_name: str,
        notes: Sequence[str] = (),
        per_input: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        names = list(rows[0].baselines) if rows else []
        columns = [field.name for field in fields(Row) if field.name not in ("name", "baselines")]
        index = pandas.Index([row.name for row in rows], name="name")
        super().__init__([asdict(row) | dict(row.baselines) for row in rows], index=index, columns=[*columns, *names])
        facts = (tuple(rows), status, verdict, num_samples, num_stored, dict(num_bytes), mixing, chain_name)
        for name, value in zip(_FACTS, (*facts, tuple(notes), dict(per_input or {})), strict=True):
            object.__setattr__(self, name, value)  # columns of the same name stay columns

    @property
    def _constructor(self) -> Any:
        return pandas.DataFrame

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str) or key in self.columns:
            return super().__getitem__(key)
        for row in self.rows:
            if row.name == key:
                return row
        raise KeyError(f"No metric '{key}'; there are {[row.name for row in self.rows]}.")

    def __str__(self) -> str:
        stored = f"{self.num_stored} stored"
        header = ("", self.chain_name, "generator", stored, *self.baselines, "resolution", "verdict")
        lines = []
        for row in self.rows:
            numbers = (row.chain, row.generator, row.stored, *row.baselines.values(), row.resolution)
            same = row.status == "indistinguishable"
            lines.append((row.label, *map(format_number, numbers), "=" if same else row.verdict))
        sizes = (format_bytes(self.num_bytes[column]) for column in (*_COLUMNS[:3], *self.baselines))
        lines.append(("bytes", *sizes, "", self.compression))
        last = len(header) - 1
        widths = [max(len(line[i]) for line in (header, *lines)) for i in range(last)]

        def formatted(line: Sequence[str]) -> str:
            cells = [line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, last)), line[last]]
            return "  ".join(cells).rstrip()

        table, group = [formatted(header)], ""
        for line, row in zip(lines, (*self.rows, None), strict=True):
            if row is not None and row.group != group:
                group = row.group
                table.append(f"-- {group}")
            table.append(formatted(line))
        legend = f"= {INDISTINGUISHABLE}"
        return "\n".join([self.verdict, "", *table, "", legend, *(f"* {note}" for note in self.notes)])

    __repr__ = __str__

    @property
    def baselines(self) -> list[str]:
        """Names of the baselines that were given."""
        return list(self.rows[0].baselines) if self.rows else []

    @property
    def compression(self) -> str:
        """How much smaller than the chain the generator is, in words."""
        ratio = self.num_bytes["chain"] / self.num_bytes["generator"]
        networks = self.num_bytes["generator"] / self.num_bytes["network"]
        size = f"{ratio:.3g} times smaller" if ratio >= 1 else f"{1 / ratio:.3g} times larger"
        return f"{size} than the chain; {networks:.3g} networks"

    def to_frame(self) -> pandas.DataFrame:
        """A plain DataFrame of the rows, indexed by name."""
        return pandas.DataFrame(self)

    def to_json(self, indent: int | None = None) -> str:
        """All but the per-input arrays; what is not finite becomes null. :meth:`from_json` reads it."""
        plain = {name: getattr(self, name) for name in _FACTS if name not in ("rows", "per_input")}
        plain["rows"] = [asdict(row) for row in self.rows]
        return json.dumps(finite_only(plain), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Fidelity:
        """What :meth:`to_json` wrote; null becomes NaN.

        :raises ValueError: if ``text`` is not of that kind.
        """
        try:
            facts = json.loads(text)
            rows = [_row(row) for row in facts.pop("rows")]
            return cls(rows, **{**facts, "mixing": _number("mixing", facts["mixing"])})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"`text` is not what Fidelity.to_json() writes: {error!r}.") from error

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def _row(values: Mapping[str, Any]) -> Row:
    row = {name: _number(name, value) for name, value in values.items()}
    baselines = {name: math.nan if value is None else value for name, value in row.pop("baselines", {}).items()}
    return Row(**row, baselines=baselines)


def _number(name: str, value: Any) -> Any:
    return math.nan if value is None and name in (*_COLUMNS, "mixing") else value
