"""Stage 0, config. In: the table [unseen]. Out: how sites that took no part are measured with a few images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from consilium.registry import Options


class UnseenConfig(Options):
    """What sites of `sites.held_out` make of a few images of their own, after the run; see docs/unseen.md."""

    shots: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 4, 16, 64), min_length=1)  # k, images per class
    draws: int = Field(default=5, ge=1)  # of the k images; the images of a smaller k are among those of a larger one
    trains: Literal["personal", "head", "all"] | None = Field(
        default=None,
        description="what these images train; left out: what the strategy keeps personal or, where that is nothing, "
        "all that is trained",
    )
    steps: int = Field(default=50, ge=1)  # of the optimiser, for every k, on a schedule of their own

    @field_validator("shots")
    @classmethod
    def _once(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(shots)) < len(shots):
            raise ValueError("a number of images per class is given twice")
        return tuple(sorted(shots))
