"""Stage 0, config. In: tables of `[sites]`. Out: how a set becomes a federation, and how a site's images are split."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from consilium.registry import Options


def changed(model: BaseModel) -> set[str]:
    """Keys whose value is not the default; unlike pydantic's set fields it survives writing out and reading again."""
    return {name for name, field in type(model).model_fields.items() if getattr(model, name) != field.default}


class Partition(Options):
    """How a set becomes a federation; a group is never divided."""

    kind: Literal["natural", "iid", "dirichlet", "quantity"] = "natural"
    num_sites: int | None = Field(default=None, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _complete(self) -> Partition:
        needed = {
            "natural": set(),
            "iid": {"num_sites"},
            "dirichlet": {"num_sites", "alpha"},
            "quantity": {"num_sites"},
        }
        optional = {"quantity": {"alpha"}}.get(self.kind, set())
        given = {key for key in ("num_sites", "alpha") if getattr(self, key) is not None}
        if not needed[self.kind] <= given or not given <= needed[self.kind] | optional:
            raise ValueError(
                f"partition kind {self.kind!r} takes {sorted(needed[self.kind] | optional) or 'no numbers'}"
            )
        if self.kind == "natural" and "seed" in changed(self):
            raise ValueError("partition kind 'natural' draws nothing, so a seed has no effect")
        return self


class Split(Options):
    """Shares of train, val and test by group; or a column of the table; or a file written by `consilium data split`."""

    train: float = Field(default=0.7, ge=0, le=1)  # share of the groups of a site
    val: float = Field(default=0.1, ge=0, le=1)
    test: float = Field(default=0.2, ge=0, le=1)
    seed: int = 0  # of the draw
    column: str | None = None  # of the table, that says train, val or test
    file: Path | None = None  # written by `consilium data split`

    @model_validator(mode="after")
    def _whole(self) -> Split:
        if abs(self.train + self.val + self.test - 1) > 1e-9:
            raise ValueError("train + val + test must be 1")
        if self.column and self.file:
            raise ValueError("a split comes from a column or from a file, not both")
        if (self.column or self.file) and changed(self) & {"train", "val", "test", "seed"}:
            raise ValueError("shares and seed have no effect beside a given column or file")
        return self
