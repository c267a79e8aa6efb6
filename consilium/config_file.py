"""Stage 0, config. In: a TOML file, or `a.b=value`. Out: a plain table that nobody has looked at yet."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any

from consilium.errors import ConfigError

START = "adapter.safetensors"  # in a folder that a run can start from


def digest_of_start(folder: Path | None) -> str | None:
    """Which values a run starts from; ConfigError where there are none."""
    if folder is None:
        return None
    try:
        return hashlib.sha256((folder / START).read_bytes()).hexdigest()
    except OSError as error:
        remedy = "give a folder that `consilium merge` or `consilium export --format safetensors` wrote"
        what = "there is nothing to start from"
        raise ConfigError(what, where="start", received=str(error), remedy=remedy) from error


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; ConfigError where there is none, or no TOML in it."""
    if not path.is_file():
        raise ConfigError(
            "the configuration file does not exist", received=str(path), remedy="give the path of a TOML file"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin with a mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("the configuration is not valid TOML", where=str(path), received=str(error)) from error


def override(table: dict[str, Any], assignment: str) -> None:
    """Carry out `a.b=value` on the table, in place; the value is TOML, or else a string."""
    key, separator, text = assignment.partition("=")
    if not separator or not key.strip():
        raise ConfigError(
            "an override is written key=value", where="--set", received=assignment, allowed="train.rounds=3"
        )
    put(table, key.strip(), _value(text.strip()))


def put(table: dict[str, Any], key: str, value: object) -> None:
    """Give the dotted key a value, in place; a number picks from a list, and the only table of a list needs none."""
    *parents, last = key.split(".")
    target: Any = table
    for parent in parents:
        target = _inside(target, parent)
    if isinstance(target, list) and len(target) == 1:
        target = target[0]
    if not isinstance(target, dict):
        raise ConfigError(
            "this key holds no table", where=key, received=repr(target), allowed="tuner.0.rank=4 for a list"
        )
    target[last] = value


def _inside(target: Any, key: str) -> Any:
    """The table below `key`, made if absent; None where there can be none."""
    if isinstance(target, list):
        return target[int(key)] if key.isdecimal() and int(key) < len(target) else None
    return target.setdefault(key, {}) if isinstance(target, dict) else None


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
