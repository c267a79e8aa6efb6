"""What a person reads before they approve: all that leaves is told, in words that fit a terminal of 80 columns."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("flwr")

from consilium.deployment import consent
from consilium.errors import ConfigError
from tests.hospitals_apart import FEDERATION, Apart, made


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    return made(tmp_path_factory.mktemp("consent"))


def told(terms: dict[str, Any], width: int = 80) -> str:
    text = io.StringIO()
    Console(file=text, width=width, markup=False).print(consent.words(terms))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def of(folder: Path, *changes: tuple[str, str], site: str = "alpine") -> dict[str, Any]:
    """The terms of another agreement."""
    text = FEDERATION
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return consent.terms(made(folder, text).at(site))


def said(terms: dict[str, Any]) -> str:
    """The same in one line, wherever it was broken."""
    return " ".join(told(terms).split())


def test_what_a_person_approves_is_what_leaves(apart: Apart) -> None:
    terms = consent.terms(apart.at("alpine"))
    experiment = apart.resident("alpine").site.experiment
    assert terms["agreement"] == experiment.handshake.agreement
    assert {row["name"] for row in terms["leaves"]} == set(experiment.up(1))
    assert terms["bytes_by_round"] == [sum(row["bytes"] for row in terms["leaves"])] * 3
    assert "metrics" in {row["name"] for row in terms["numbers"]}
    with pytest.raises(ConfigError, match="another agreement"):
        consent.terms(apart.at("alpine"), "0" * 64)


def test_a_page_of_80_columns_hides_nothing(apart: Apart) -> None:
    terms = consent.terms(apart.at("harbour"))
    page = told(terms)
    assert all(len(line) <= 80 for line in page.splitlines())
    assert "…" not in page
    assert page.splitlines()[-1] == terms["agreement"], "last, and whole, to be read out"
    assert all(f"({row['name']})" in page for row in terms["numbers"])
    rows = re.findall(r"^(\S+) +(\d+) +([\d,]+)$", page, re.MULTILINE)
    assert sum(int(count) for _, count, _ in rows) == len(terms["leaves"])
    assert sum(int(size.replace(",", "")) for *_, size in rows) == terms["bytes_by_round"][0]


@pytest.mark.parametrize("width", [80, 40])
def test_no_name_ends_in_dots_however_long_it_is(width: int, apart: Apart) -> None:
    terms, long = consent.terms(apart.at("harbour")), "Q" * 100
    terms["task"]["classes"][1] = terms["sites"][0] = terms["leaves"][0]["name"] = terms["numbers"][0]["name"] = long
    page = told(terms, width)
    assert "…" not in page
    assert page.count("Q") == 400
    assert page.replace("\n", "").endswith(terms["agreement"])


def test_the_words_of_a_plain_agreement(apart: Apart) -> None:
    page = said(consent.terms(apart.at("harbour")))
    for words in (
        "harbour (this hospital); alpine, prairie; a coordinator at 127.0.0.1:9092",
        "3 rounds. In each: 1 pass over its training images, 8 at a time",
        "trained weights of the model, 13.3 kB in each round, 40.0 kB in all",
        "no part of the model is this hospital's alone",
        "it is not summed in secret before. The method needs no more than sums over hospitals",
        "No metric of fewer than 5 images or 5 patients leaves, and no reply of more than 67.1 MB.",
        "no differential privacy is used",
    ):
        assert words in page, words
    assert "subtract" not in page


def test_two_hospitals_can_reckon_what_the_other_sent(tmp_path: Path) -> None:
    two = of(tmp_path, ('sites = ["alpine", "harbour", "prairie"]', 'sites = ["alpine", "harbour"]'))
    assert "the other one can subtract its own and has yours" in said(two)


def test_what_is_personal_stays(tmp_path: Path) -> None:
    assert "and 12.3 kB of weights that are this hospital's alone" in said(of(tmp_path, ('"fedavg"', '"fedopal"')))


def test_single_updates_that_reach_others(tmp_path: Path) -> None:
    page = said(of(tmp_path, ('"fedavg"', '"ensemble"')))
    assert "what the other hospitals get may hold what a single one sent" in page
    assert "13.3 kB in 1 of 3 rounds, and" in page


def test_sizes_that_a_round_decides_are_no_zeros(apart: Apart) -> None:
    terms = consent.terms(apart.at("alpine"))
    for row in [*terms["leaves"], terms["arrives"][0]]:
        row |= {"shape": [None, 64], "bytes": 0}
    page = said(terms | {"bytes_by_round": [0, 0, 0]})
    assert "and 14 tensors as large as each round makes them, and the numbers below" in page
    assert "of weights of the model in a round, and 1 tensor as large as each round makes them" in page
    assert "blocks.*.attn.qkv.lora.shared.a 6 as trained" in page


def test_a_rank_of_its_own_is_what_leaves(tmp_path: Path) -> None:
    terms = of(tmp_path, ('"fedavg"', '"hetlora"\nranks = {alpine = 1}'))
    assert "7.2 kB in each round" in said(terms)


def test_steps_and_draws_and_pace(tmp_path: Path, apart: Apart) -> None:
    page = said(of(tmp_path, ("rounds = 3", "rounds = 1\nlocal_steps = 2\nparticipation = 0.5")))
    assert "1 round, for each of which 50% of the hospitals are drawn. In each: 2 steps of 8 images each" in page
    terms = consent.terms(apart.at("alpine"))
    terms["rules"] |= {"min_seconds": 90.0, "min_images": 1, "min_patients": 1}
    assert "fewer than 1 image or 1 patient leaves" in said(terms)
    assert "A new question of a kind is answered every 90 s at most." in said(terms)


def test_nothing_leaves_where_nothing_is_shared(tmp_path: Path) -> None:
    terms = of(tmp_path, ('"fedavg"', '"local"'))
    assert "leaves no weights of the model, and the numbers below" in said(terms)
    assert "Trained weights that leave" not in told(terms)
