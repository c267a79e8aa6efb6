"""Composition: a study as a value. In: a study file and overrides. Out: a `StudyFile`, validated, and its base table.

Keys of the base configuration and of what is varied are not looked at here: plan.py validates every configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, ValidationError, field_validator

from consilium import config_file, paths
from consilium.config import Config
from consilium.errors import ConfigError
from consilium.registry import Options, options_error

Table = dict[str, Any]
Seed = Annotated[int, Field(ge=0)]


def flat(table: Mapping[str, Any], name: str = "") -> Table:
    """Dotted keys -> values: dotted keys may be written with quotes or without."""
    found: Table = {}
    for key, value in table.items():
        inner = f"{name}.{key}".strip(".")
        found |= flat(value, inner) if isinstance(value, Mapping) else {inner: value}
    return found


class CompareConfig(Options):
    """What the tables and figures compare."""

    method: str | None = None  # None: the axis "tuner", or else the first axis
    within: tuple[str, ...] | None = None  # None: every other axis
    metric: str = "balanced_accuracy"
    split: Literal["val", "test"] | None = None  # None: test; val where something is selected
    level: Literal["pooled", "mean", "worst"] = "pooled"
    model: Literal["global", "personal", "before_aggregation"] = "global"
    baseline: str | None = None
    references: str | None = None  # a value of the method: what its runs have as references is compared too


class SelectConfig(Options):
    """Which values are to be chosen, for each method, on the validation images."""

    over: Annotated[tuple[str, ...], Field(min_length=1)]


def _unless_auto(value: object) -> object:
    return None if value == "auto" else value


class ResourcesConfig(Options):
    """How much of this machine the runs may take together; "auto" or None: as much as is free."""

    workers: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_unless_auto)] = None
    memory: Annotated[ByteSize | None, BeforeValidator(_unless_auto)] = None  # "12GB", or a number of bytes


class StudyFile(Options):
    """The keys of a study file."""

    name: str
    base: Path | Table = Field(default_factory=dict)
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    axes: dict[str, Annotated[dict[str, Table], Field(min_length=1)]] = Field(default_factory=dict)
    exclude: tuple[Table, ...] = ()
    use: Path | None = None  # what another study selected
    notes: tuple[str, ...] = ()  # said wherever the outcome is shown
    compare: CompareConfig = CompareConfig()
    select: SelectConfig | None = None
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        try:
            return Config(name=name).name
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error

    @field_validator("grid", mode="before")
    @classmethod
    def _dotted(cls, grid: object) -> object:
        return flat(grid) if isinstance(grid, dict) else grid

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("each seed once")
        return seeds


@dataclass(frozen=True)
class Loaded:
    """A study file, the table of its base configuration (paths absolute), and where relative paths start."""

    study: StudyFile
    base: Table
    home: Path


def load(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read and validate; `a.b=value` changes the study where `a` is one of its keys, else the base configuration, as
    `base.a.b=value` always does."""
    table, home = config_file.read(path), path.resolve().parent
    own = [text for text in overrides if _is_own(text)]
    for text in own:
        config_file.override(table, text)
    try:
        study = StudyFile.model_validate(paths.absolute(table, StudyFile, home))
    except ValidationError as error:
        raise options_error(f"study {path}", error, _model_at(error)) from error
    base = _base(study, home, [text.strip().removeprefix("base.") for text in overrides if text not in own])
    if "seed" in base and "seeds" not in study.model_fields_set:
        study = study.model_copy(update={"seeds": (base["seed"],)})
    return Loaded(study, base, home)


def _is_own(text: str) -> bool:
    first, *deeper = text.partition("=")[0].strip().split(".")
    return first in StudyFile.model_fields and not (first == "base" and deeper)


def _model_at(error: ValidationError) -> type[Options]:
    inner: dict[str, type[Options]] = {"compare": CompareConfig, "select": SelectConfig, "resources": ResourcesConfig}
    place = error.errors()[0]["loc"]
    return inner.get(str(place[0]), StudyFile) if len(place) > 1 else StudyFile


def _base(study: StudyFile, home: Path, overrides: Sequence[str]) -> Table:
    if not isinstance(study.base, Path):
        table, home = dict(study.base), home
    elif study.base.suffix != ".toml":
        raise ConfigError("no run configuration", where="study.base", allowed="a TOML file", received=str(study.base))
    else:
        table, home = config_file.read(study.base), study.base.parent
    for text in overrides:
        config_file.override(table, text)
    return paths.absolute(table, Config, home)
