"""`true` is no number: not for any option of any member, nor for any key of any table of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from consilium import config, registry
from consilium.config import Config
from consilium.deployment.files import Deployment
from consilium.deployment.gate import GateConfig, TagRule
from consilium.errors import ConfigError
from consilium.study.file import StudyFile


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model, and those of its tables."""
    yield model
    for field in model.model_fields.values():
        yield from (found for kind in parts(field.annotation) for found in models(kind))


def parts(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for each in get_args(annotation):
        yield from parts(each)


def kinds(annotation: Any) -> set[Any]:
    return {annotation} | {kind for each in get_args(annotation) for kind in kinds(each)}


MEMBERS = [member.options for kind in registry.KINDS for member in registry.members(kind).values()]
OURS = (Config, Deployment, GateConfig, TagRule, StudyFile)
EVERY = sorted({found for model in (*MEMBERS, *OURS) for found in models(model)}, key=lambda m: m.__qualname__)
FIELDS = [(model, name) for model in EVERY for name in model.model_fields]


def test_all_kinds_of_tables_are_looked_at() -> None:
    assert len(MEMBERS) > 40
    assert all(issubclass(model, registry.Table) for model in EVERY)


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_truth_is_taken_where_it_is_meant_and_nowhere_else(model: type[BaseModel], name: str) -> None:
    found = kinds(model.model_fields[name].annotation)
    takes = bool(found & {bool, Any, object})
    table = any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in found)  # its keys are others' lines
    for value in (True, [True], *([] if table else [{"key": True}])):
        with pytest.raises(ValidationError) as caught:
            model.model_validate({name: value, "no such key": 0})
        refused = any(error["loc"][:1] == (name,) for error in caught.value.errors())
        assert refused or takes, (value, caught.value)


@pytest.mark.parametrize(
    "table",
    [
        {"seed": True},
        {"tuner": [{"name": "lora", "rank": True}]},
        {"train": {"rounds": True}},
        {"train": {"learning_rates": {"head": True}}},
        {"sites": {"tolerate_corrupt": False}},
        {"backbone": {"mean": [0.5, 0.5, True]}},
        {"strategy": {"name": "fedprox", "mu": True}},
        {"engine": {"workers": True}},
    ],
)
def test_the_message_says_where(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="true and false are no numbers"):
        config.from_dict(table)


PLAIN = [(model, name) for model, name in FIELDS if model.model_fields[name].annotation in (int, float)]


@pytest.mark.parametrize(("model", "name"), PLAIN, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_a_number_in_quotes_is_a_text(model: type[BaseModel], name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({name: "1", "no such key": 0})
    assert any(each["loc"] == (name,) and "without quotes" in each["msg"] for each in caught.value.errors())


def test_truth_where_it_is_meant() -> None:
    found = config.from_dict({"train": {"schedule": {"restart": True}}, "engine": {"compile": False}})
    assert found.train.schedule.restart is True
