"""Common: the exceptions of Consilium. In: what went wrong. Out: one sentence that says how to mend it.

ConsiliumError
├── ConfigError      a key, a value or a pairing in the configuration
├── DataError        tables, images, splits
├── BackboneError    a checkpoint that does not load or is not supported
├── WireError        a message that holds what was not declared, or lacks what was
├── StateError       a run folder, checkpoint or site state that does not fit
└── TrainingError    non-finite numbers, a quorum that was not reached
"""

from __future__ import annotations


class ConsiliumError(Exception):
    """An error a user can act on: what, where, allowed, received, remedy."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        allowed: object = None,
        received: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        self.allowed, self.received = allowed, received
        super().__init__(self._text())

    def _text(self) -> str:
        rows = [("where", self.where), ("allowed", self.allowed), ("received", self.received), ("remedy", self.remedy)]
        return "\n".join([self.what, *(f"  {label}: {value}" for label, value in rows if value is not None)])

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.allowed, self.received, self.remedy)


def _rebuild(
    kind: type[ConsiliumError], what: str, where: str | None, allowed: object, received: object, remedy: str | None
) -> ConsiliumError:
    return kind(what, where=where, allowed=allowed, received=received, remedy=remedy)


class ConfigError(ConsiliumError):
    """A key, a value or a pairing in the configuration."""


class DataError(ConsiliumError):
    """Tables, images, splits."""


class BackboneError(ConsiliumError):
    """A checkpoint that does not load, or a model that is not supported."""


class WireError(ConsiliumError):
    """A message that holds what was not declared, or lacks what was."""


class StateError(ConsiliumError):
    """A run folder, checkpoint or site state that does not fit."""


class TrainingError(ConsiliumError):
    """Non-finite numbers, or a quorum that was not reached."""
