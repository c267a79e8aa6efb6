from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import typer

from consilium import cli, config, metrics, registry, run_folder
from scripts import generate_docs, strategy_table

ROOT = Path(__file__).parents[2]


def test_the_configuration_page_is_what_the_code_says() -> None:
    assert generate_docs.TARGET.read_text(encoding="utf-8") == generate_docs.render(), "run `make docs`"


def test_the_page_names_every_member_and_its_keys() -> None:
    page = generate_docs.render()
    for kind in registry.KINDS:
        for name, member in registry.members(kind).items():
            assert f"### `{name}`" in page
            assert all(f"| `{key}` |" in page for key in member.options.model_fields)


STRATEGIES = [m for m in registry.members("strategies").values() if m.build.__module__.startswith("consilium.")]


@pytest.mark.parametrize("member", STRATEGIES, ids=lambda member: member.name)
def test_the_header_of_a_strategy_names_its_family_and_the_tests_that_pin_it(member: registry.Member) -> None:
    lacking = strategy_table.missing(member)
    assert not lacking, "\n".join(lacking)


def test_the_table_of_strategies_is_what_the_code_says() -> None:
    page = strategy_table.render()
    assert strategy_table.TARGET.read_text(encoding="utf-8") == page, "run `make docs`"
    assert all(page.count(f"\n| `{member.name}`") == 3 for member in STRATEGIES)


def test_formulas_and_bytes_of_the_table_are_each_other() -> None:
    """4 for each scalar, 9 for the head and a bit for each tensor that may travel."""
    for name, times, symbols in (("fedavg", 1, "ABH"), ("fedper", 1, "AB"), ("fedsa", 1, "A"), ("scaffold", 2, "ABH")):
        pieces, _ = strategy_table.example(name)
        sizes, bits = strategy_table.sizes(pieces), len(pieces.wire("up", 3))
        num_bytes = 4 * times * sum(sizes[symbol] for symbol in symbols) + 9 + -(-bits // 8)
        formula = " + ".join(symbols) if times == 1 else f"{times} ({' + '.join(symbols)})"
        assert set(strategy_table.messages(pieces, "up")) == {(formula, num_bytes)}


def test_every_invariant_has_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (I\d+) \| .*? \| .*? \| (.*?) \|", page, flags=re.MULTILINE))
    assert list(rows) == [f"I{number}" for number in range(1, 25)]
    assert all("`test_" in tests for tests in rows.values())
    named = set(re.findall(r"`((?:test_\w+::)?test_\w+)`", page)) - {path.stem for path in ROOT.glob("tests/*/*.py")}
    assert not [test for test in sorted(named) if not strategy_table.place_of(test)], (
        "a test that the page names is gone"
    )


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


def test_the_recipe_of_fedopal_names_every_option_and_tests_that_exist() -> None:
    page = (ROOT / "docs" / "fedopal.md").read_text(encoding="utf-8")
    keys = set(registry.get("strategies", "fedopal").options.model_fields)
    assert {key for key in keys if f"`{key}" not in page} == set()
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in set(re.findall(r"`(test_\w+)`", page)) if f"def {name}(" not in code] == []
    fields = registry.get("strategies", "fedopal").options.model_json_schema()["properties"]
    for key in ("penalty", "side", "head", "server", "hard"):
        allowed = re.findall(r"'enum': \[(.*?)\]", str(fields[key]))
        values = {value.strip(" '") for group in allowed for value in group.split(",")}
        assert {v for v in values if f'"{v}"' not in page} - {"shared", "personal", "both"} == set(), key
