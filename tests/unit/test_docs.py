from __future__ import annotations

from pathlib import Path

from consilium import registry
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
