"""Stage 0, config: keys of `[engine]`. In: a table. Out: how a simulation is carried out, validated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from consilium.registry import Options


class EngineConfig(Options):
    """How a simulation is carried out. Bits depend on threads, device, compile, stacked_sites, prefix_cache alone."""

    name: Literal["simulate"] = "simulate"
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = (
        1  # sites at the same time; auto: one per core, at most one per site
    )
    pool: Literal["auto", "threads", "processes"] = "auto"  # what workers are; auto: threads, unless dropout is drawn
    threads: int = Field(default=1, ge=1)  # of torch in each worker; another number may change last bits
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: the GPU where there is one
    prefix_cache: bool = Field(
        default=True,
        strict=True,
        description="keep what the blocks below the trained ones make of images, in the cache and in memory; not of "
        "augmented ones. In float32 on a processor with no effect on bits, else on the last ones",
    )
    gradient_checkpointing: bool = Field(default=False, strict=True)  # blocks computed twice: less memory, same bits
    compile: bool = Field(default=False, strict=True)  # blocks by torch.compile: for a GPU; other last bits
    stacked_sites: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="sites of a round that train as one batch, at most those drawn; changes last bits. auto: 4 to 8 on "
        "a processor where a batch has at most 4 images and 160 tokens and four groups are left, else 1",
    )
    cache: Path | None = None  # folder of the decoded-image store; None: the user's cache folder
    state_key_file: Path | None = None  # of 64 hexadecimal digits, owner's alone: sites' states are encrypted
    state_key_variable: str | None = Field(default=None, min_length=1)  # or the environment variable that holds the key

    @model_validator(mode="after")
    def _one_key(self) -> EngineConfig:
        if self.state_key_file is not None and self.state_key_variable is not None:
            raise ValueError("a key comes from state_key_file or from state_key_variable, not both")
        return self
