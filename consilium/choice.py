"""Common: a choice after the last round. In: candidates of the coordinator's state. Out: the one that sites like best.

Every site validates each candidate as it validates any model that comes in, and tells the same few numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consilium.protocols import ServerState, Specs


@dataclass(frozen=True)
class Choice:
    """Names of the candidates, the validation metric whose mean over sites decides, and the state of each."""

    candidates: tuple[str, ...]
    select: str
    take: Callable[[ServerState, Specs, str], ServerState]
