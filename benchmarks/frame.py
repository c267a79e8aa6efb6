"""The frame of all benchmarks. In: contestants and targets. Out: rows with ratio and spread, and every raw sample.

Contestants alternate (A B A B ...), so that a machine that slows down slows all of them. A ratio is the median of the
ratios of neighbours in time; its spread runs from the smallest to the largest of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Scale:
    """How much is done; `quick` is for a look and for tests, its numbers are no results."""

    quick: bool = False

    def repeats(self, full: int, quick: int = 1) -> int:
        """So many repeats."""
        return quick if self.quick else full

    def pick(self, full: Any, quick: Any) -> Any:
        """The size of a job."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Estimate:
    """A number with the smallest and largest of its repeats."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The median and the range."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One line of the table. `target`: (direction, value), or none where a number is only stated."""

    what: str
    measured: Estimate
    unit: str = "x"  # x: a ratio
    target: tuple[Literal["<=", ">="], float] | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        if self.target is None:
            return None
        way, limit = self.target
        return self.measured.value <= limit if way == "<=" else self.measured.value >= limit


@dataclass
class Result:
    """What a benchmark found. `facts`: what was checked or is needed to read the numbers, plain JSON values."""

    rows: list[Row] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(
        self,
        what: str,
        measured: Estimate | float,
        unit: str = "x",
        target: tuple[Literal["<=", ">="], float] | None = None,
        note: str = "",
    ) -> None:
        """Append a row; a bare number has no spread."""
        exact = measured if isinstance(measured, Estimate) else Estimate(measured, measured, measured)
        self.rows.append(Row(what, exact, unit, target, note))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [{**asdict(row), "met": row.met} for row in self.rows]
        return {"rows": rows, "samples": self.samples, "facts": self.facts}


class Skipped(Exception):
    """A benchmark that cannot run here, with the reason."""


def alternate(contestants: Mapping[str, Callable[[], float]], repeats: int, warm_up: int = 0) -> dict[str, list[float]]:
    """What each contestant returned in each repeat, taken in turn; the first `warm_up` turns are thrown away."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warm_up + repeats):
        for name, contestant in contestants.items():
            value = contestant()
            if number >= warm_up:
                samples[name].append(value)
    return samples


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Of neighbours in time."""
    return Estimate.of([a / b for a, b in zip(above, below, strict=True)])


def check(holds: bool, what: str) -> None:
    """A benchmark that did another job than it says is worth nothing: RuntimeError."""
    if not holds:
        raise RuntimeError(f"the benchmark did not do its job: {what}")
