from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import typer

from consilium import cli, config, metrics, registry, run_folder
from scripts import generate_docs

ROOT = Path(__file__).parents[2]


def test_the_configuration_page_is_what_the_code_says() -> None:
    assert generate_docs.TARGET.read_text(encoding="utf-8") == generate_docs.render(), "run `make docs`"


def test_the_page_names_every_member_and_its_keys() -> None:
    page = generate_docs.render()
    for kind in registry.KINDS:
        for name, member in registry.members(kind).items():
            assert f"### `{name}`" in page
            assert all(f"| `{key}` |" in page for key in member.options.model_fields)


README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("  #")[0].split() for line in re.findall(r"^consilium (.+)$", README, flags=re.MULTILINE)]


def test_the_configuration_in_the_readme_is_valid() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    assert config.from_dict(tomllib.loads(text)).tuner[0].name == "lora"


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_the_commands_in_the_readme_are_understood(words: list[str]) -> None:
    group = typer.main.get_command(cli.app)
    while isinstance(group, typer.core.TyperGroup):
        context = group.make_context("consilium", list(words), resilient_parsing=True)
        name, command, words = group.resolve_command(context, words)
        assert command is not None
        group = command
    assert group.make_context(name, list(words)).params


def test_every_decision_is_listed() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "docs" / "decisions").glob("0*.md") if f"({path.name})" not in index] == []


def test_the_architecture_names_the_files_of_a_run_folder_and_the_keys_of_harm() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [name for name in (run_folder.CONFIG, run_folder.SPLIT, run_folder.DONE) if f"`{name}`" not in page] == []
    columns = {"id": ["1", "2"], "site": "east", "group": ["1", "2"], "label": [0, 1], "p.a": [0.9, 0.1]}
    table = pd.DataFrame({**columns, "p.b": [0.1, 0.9]})
    keys = metrics.sites_harmed(table, table, ("a", "b"), bootstrap=2).keys()
    (named,) = re.findall(r"`sites_harmed\.{(.*?)}`", page)
    assert set(named.split(",")) == keys
