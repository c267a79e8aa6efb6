"""Common: what is registered. In: a kind and a name. Out: the member that carries the name, built from its options.

Members are found in three ways, all lazy: modules of this package (`consilium/<kind>/*.py`), entry points of other
packages (group `consilium.<kind>`, value = a module that registers on import), and calls of `register` by hand.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from consilium.errors import ConfigError

T = TypeVar("T", bound="Options")
R = TypeVar("R")
Kind = Literal["tuners", "strategies", "tasks", "sources"]
KINDS: tuple[Kind, ...] = ("tuners", "strategies", "tasks", "sources")
_PACKAGES: Mapping[Kind, str] = {
    "tuners": "consilium.tuners",
    "strategies": "consilium.strategies",
    "tasks": "consilium.tasks",
    "sources": "consilium.sites",
}


class Table(BaseModel):
    """Base of all that a configuration may hold. `true` is a number to Python, and "1" to pydantic; here neither is."""

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        if _has_truth(value) and not _takes_truth(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("true and false are no numbers and no text")
        if _is_quoted(value) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("a number is written without quotes")
        return value


def _is_quoted(value: object) -> bool:
    """Whether this is a text that reads like a number."""
    try:
        float(value if isinstance(value, str) else "none")
    except ValueError:
        return False
    return True


def _has_truth(value: object) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return isinstance(value, bool) or any(map(_has_truth, inner))


def _takes_truth(annotation: object) -> bool:
    """A model takes what its own keys take, and looks at them itself."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return annotation in (bool, object, Any) or any(map(_takes_truth, get_args(annotation)))


class Options(Table):
    """Base of every member's options: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Member:
    """One registered tuner, strategy, task or source; `build(options)` makes it."""

    kind: Kind
    name: str
    options: type[Options]
    build: Callable[[Any], Any]
    summary: str
    source: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


_members: dict[tuple[Kind, str], Member] = {}
_discovered: set[Kind] = set()


def register(
    kind: Kind, name: str, *, options: type[T], summary: str, source: str = "", facts: Mapping[str, str] | None = None
) -> Callable[[Callable[[T], R]], Callable[[T], R]]:
    """Decorate a class or function that takes the options and returns the member; a name may be given only once."""

    def add(build: Callable[[T], R]) -> Callable[[T], R]:
        known = _members.get((kind, name))
        if known is not None and known.build is not build:
            raise ConfigError(f"two {kind} are called {name!r}", received=f"{known.build!r} and {build!r}")
        _members[kind, name] = Member(kind, name, options, build, summary, source, dict(facts or {}))
        return build

    return add


def members(kind: Kind) -> dict[str, Member]:
    """All members of a kind by name, sorted; imports their modules on first use."""
    if kind not in _discovered:
        _discover(kind)
        _discovered.add(kind)
    return {name: member for (k, name), member in sorted(_members.items()) if k == kind}


def get(kind: Kind, name: str) -> Member:
    """The member of that name, or an error that lists the names there are."""
    found = members(kind)
    if name not in found:
        raise ConfigError(f"no {kind} of this name", where=kind, allowed=", ".join(found), received=name)
    return found[name]


def build(kind: Kind, name: str, options: Mapping[str, object]) -> Any:
    """Validate `options` with the member's own model and build it."""
    member = get(kind, name)
    return member.build(parse_options(member, options))


def parse_options(member: Member, options: Mapping[str, object]) -> Options:
    """The member's options, or a `ConfigError` that names the key, what is allowed and what was received."""
    try:
        return member.options.model_validate(dict(options))
    except ValidationError as error:
        raise options_error(f"{member.kind}.{member.name}", error, member.options) from error


def options_error(where: str, error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """Turn pydantic's first finding into our five-part error."""
    (first, *others), place = _alternatives(error, model)
    key = ".".join(map(str, place))
    if first["type"] == "extra_forbidden":
        what, allowed = f"unknown key: {key}", ", ".join(model.model_fields)
    else:
        what = f"this value cannot be used: {key}" if key else "these values do not go together"
        told = [first["msg"].removeprefix("Value error, "), *(each["msg"].removeprefix(_OPENING) for each in others)]
        allowed = " or ".join(told)
    return ConfigError(what, where=where, allowed=allowed, received=_shortened(repr(first["input"])))


def model_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """The model of the table in which a value lies."""
    for part in location[:-1]:
        if isinstance(part, int):  # a place in a list, whose tables were found with its name
            continue
        field = model.model_fields.get(part)
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        found = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if found is None:
            break
        model = found
    return model


def _alternatives(error: ValidationError, model: type[BaseModel]) -> tuple[list[ErrorDetails], tuple[int | str, ...]]:
    """The first finding, with those of the same value's other types where several are allowed, and its key."""
    found = error.errors()
    place = found[0]["loc"]
    field = model.model_fields.get(str(place[-2])) if len(place) > 1 else None
    types = [each for each in get_args(field.annotation) if each is not type(None)] if field else []
    if field is None or get_origin(field.annotation) not in (Union, UnionType) or len(types) < 2:
        return found[:1], place
    return [each for each in found if each["loc"][:-1] == place[:-1]], place[:-1]


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


_OPENING = "Input should be "
_LONGEST = 200  # characters of a value in a message: it may be a whole configuration


def _discover(kind: Kind) -> None:
    package = importlib.import_module(_PACKAGES[kind])
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{_PACKAGES[kind]}.{module.name}")
    for point in entry_points(group=f"consilium.{kind}"):
        try:
            point.load()
        except ConfigError:
            raise
        except Exception as error:
            where = f"entry point {point.name} = {point.value}, group consilium.{kind}"
            remedy = "mend or uninstall the package that declares it"
            received = f"{type(error).__name__}: {error}"
            raise ConfigError("a plug-in cannot be loaded", where=where, received=received, remedy=remedy) from error
