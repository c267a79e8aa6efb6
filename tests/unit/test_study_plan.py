"""A study file becomes configurations, each valid, each once; what is wrong is said before anything runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from consilium.errors import ConfigError
from consilium.study.file import StudyFile
from consilium.study.plan import Plan, plan

BASE = """
[sites]
source = "phantom"
num_images = 64
image_size = 32
[backbone]
name = "test_vit"
weights = "random"
image_size = 32
[strategy]
name = "fedprox"
mu = 0.5
"""
STUDY = """
name = "both"
base = "base.toml"
seeds = [0, 3]
[axes.tuner.lora]
tuner = [{ name = "lora", rank = 2 }]
[axes.tuner.linear]
tuner = [{ name = "linear" }]
[axes.where.natural]
sites.partition = { kind = "natural" }
[axes.where.iid]
sites.partition = { kind = "iid", num_sites = 3 }
"""


def planned(folder: Path, text: str = STUDY, *settings: str, base: str = BASE) -> Plan:
    (folder / "base.toml").write_text(base)
    (folder / "study.toml").write_text(text)
    return plan(folder / "study.toml", settings)


def test_every_combination_once_with_its_keys_and_all_others_of_the_base(tmp_path: Path) -> None:
    made = planned(tmp_path, STUDY + '[grid]\n"train.rounds" = [1, 2]\n')
    settings = [tuple(cell.settings.values()) for cell in made.cells]
    assert settings == [(t, w, r) for t in ("lora", "linear") for w in ("natural", "iid") for r in (1, 2)]
    for cell in made.cells:
        assert cell.config is not None
        assert cell.config.tuner[0].name == cell.settings["tuner"]
        assert cell.config.sites.partition.kind == cell.settings["where"]
        assert cell.config.train.rounds == cell.settings["train.rounds"]
        assert (cell.config.backbone.name, cell.config.sites.options()["num_images"]) == ("test_vit", 64)
    assert made.study.seeds == (0, 3)


def test_what_lies_deep_is_replaced_as_a_whole_and_so_is_a_member_by_another(tmp_path: Path) -> None:
    text = 'name = "x"\nbase = "base.toml"\n[axes.s.a]\nstrategy.name = "fedavg"\n[axes.s.b]\nstrategy.mu = 1.0\n'
    text += '[axes.p.x]\nsites.partition.kind = "natural"\n[axes.p.y]\ntrain.rounds = 3\n'
    base = BASE.replace("[sites]", '[sites]\npartition = { kind = "iid", num_sites = 2 }')
    made = planned(tmp_path, text, base=base)
    found = {tuple(cell.settings.values()): cell.config for cell in made.cells}
    assert [found[s, "x"].strategy.name for s in "ab"] == ["fedavg", "fedprox"]  # type: ignore[union-attr]
    assert [found["a", p].sites.partition.num_sites for p in "xy"] == [None, 2]  # type: ignore[union-attr]


def test_paths_of_variants_start_at_the_study_and_those_of_the_base_at_the_base(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/base.toml").write_text('engine.cache = "c"\n')
    text = 'name = "x"\nbase = "deep/base.toml"\n[axes.w.a]\nbackbone.weights = "w.bin"\n[axes.w.b]\ntrain.rounds = 1\n'
    first = planned(tmp_path, text).cells[0].config
    assert first is not None
    assert (first.backbone.weights, first.engine.cache) == (tmp_path / "w.bin", tmp_path / "deep/c")


def test_overrides_change_the_study_or_else_its_base(tmp_path: Path) -> None:
    words = ("seeds=[7]", "train.rounds=4", "base.train.batch_size=5", "axes.tuner.lora.tuner=[{name='lora', rank=1}]")
    made = planned(tmp_path, STUDY, *words)
    first = made.cells[0].config
    assert first is not None
    assert (made.study.seeds, first.train.rounds, first.train.batch_size) == ((7,), 4, 5)
    assert first.tuner[0].options() == {"rank": 1}


def test_excluded_combinations_are_left_out_and_said(tmp_path: Path) -> None:
    made = planned(tmp_path, STUDY + '[[exclude]]\ntuner = "linear"\nwhere = ["iid"]\n')
    assert [dict(cell) for cell in made.excluded] == [{"tuner": "linear", "where": "iid"}]
    assert len(made.cells) == 3


def test_what_only_a_combination_makes_impossible_is_refused_there(tmp_path: Path) -> None:
    text = 'name = "x"\nbase = "base.toml"\n[grid]\nevaluation.every = [1, 5]\ntrain.rounds = [2, 6]\n'
    made = planned(tmp_path, text, base=BASE + '[evaluation]\nserve = "best"\n')
    refused = {tuple(cell.settings.values()): cell.refused for cell in made.cells if cell.refused}
    assert list(refused) == [(5, 2)]
    assert "nothing to choose from" in refused[5, 2]


MISTAKES = {
    "unknown table": ("[axes.tuner.lora]", "[comparing]\n[axes.tuner.lora]", "unknown key: comparing"),
    "no axis": (STUDY[STUDY.index("[axes") :], "", "varies something"),
    "empty axis": ("[axes.tuner.lora]", "[axes.empty]\n[axes.tuner.lora]", "axes.empty"),
    "empty grid": ("[axes.tuner.lora]", "[grid]\ntrain.rounds = []\n[axes.tuner.lora]", "grid.train.rounds"),
    "a value twice": ("[axes.tuner.lora]", "[grid]\ntrain.rounds = [1, 1]\n[axes.tuner.lora]", "given twice"),
    "unknown key": ("rank = 2", "rnk = 2", "unknown key: rnk"),
    "unknown key of a table": ('sites.partition = { kind = "n', 'sites.pt = 1\nsites.partition = { kind = "n', "pt"),
    "wrong everywhere": ("rank = 2", "rank = 0", "rank"),
    "same variants": ('kind = "iid", num_sites = 3', 'kind = "natural"', "the same configuration"),
    "a key twice": ("[axes.tuner.lora]", "[grid]\nsites.partition.seed = [1]\n[axes.tuner.lora]", "given twice"),
    "a key of a list twice": ("[axes.tuner.lora]", '[grid]\n"tuner.0.rank" = [1]\n[axes.tuner.lora]', "given twice"),
    "the seed as a key": ("[axes.tuner.lora]", "[grid]\nseed = [1]\n[axes.tuner.lora]", "the seed is no axis"),
    "the seed in a variant": ('tuner = [{ name = "l', 'seed = 4\ntuner = [{ name = "l', "the seed is no axis"),
    "a reserved name": ("[axes.tuner.lora]", "[axes.value.x]\ntrain.rounds = 1\n[axes.tuner.lora]", "column"),
    "unknown excluded axis": ("[axes.tuner.lora]", '[[exclude]]\nx = "lora"\n[axes.tuner.lora]', "no such axis"),
    "unknown excluded value": ("[axes.tuner.lora]", '[[exclude]]\ntuner = "x"\n[axes.tuner.lora]', "no such value"),
    "empty rule": ("[axes.tuner.lora]", "[[exclude]]\n[axes.tuner.lora]", "exclude everything"),
    "all excluded": ("[axes.tuner.lora]", '[[exclude]]\ntuner = ["lora", "linear"]\n[axes.tuner.lora]', "every comb"),
    "unknown method": ("[axes.tuner.lora]", '[compare]\nmethod = "x"\n[axes.tuner.lora]', "compare.method"),
    "method within": ("[axes.tuner.lora]", '[compare]\nwithin = ["tuner"]\n[axes.tuner.lora]', "compare.within"),
    "unknown baseline": ("[axes.tuner.lora]", '[compare]\nbaseline = "x"\n[axes.tuner.lora]', "compare.baseline"),
    "a seed twice": ("[0, 3]", "[0, 0]", "each seed once"),
    "no seed": ("[0, 3]", "[]", "seeds"),
    "no base": ("base.toml", "bare.toml", "does not exist"),
    "a name that is no folder": ('"both"', '"a/b"', "slash"),
    "no workers": ("[axes.tuner.lora]", "[resources]\nworkers = 0\n[axes.tuner.lora]", "resources.workers"),
    "no size": ("[axes.tuner.lora]", '[resources]\nmemory = "lots"\n[axes.tuner.lora]', "resources.memory"),
    "selects on test": (
        "[axes.tuner.lora]",
        '[compare]\nsplit = "test"\n[select]\nover = ["where"]\n[axes.tuner.lora]',
        "validation images",
    ),
    "selects the method": ("[axes.tuner.lora]", '[select]\nover = ["tuner"]\n[axes.tuner.lora]', "select.over"),
    "unequal tries": (
        "[axes.tuner.lora]",
        '[select]\nover = ["where"]\n[[exclude]]\ntuner = "linear"\nwhere = "iid"\n[axes.tuner.lora]',
        "unequal budgets",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_file_stops_before_anything_runs(mistake: str, tmp_path: Path) -> None:
    old, new, said = MISTAKES[mistake]
    assert old in STUDY
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, STUDY.replace(old, new, 1))
    assert said in str(caught.value)


def test_all_axes_but_the_method_and_the_searched_are_held_fixed(tmp_path: Path) -> None:
    made = planned(tmp_path, STUDY + '[grid]\n"train.rounds" = [1, 2]\n[select]\nover = ["train.rounds"]\n')
    assert (made.compare.method, made.compare.within, made.compare.split) == ("tuner", ("where",), "val")
    assert planned(tmp_path).compare.split == "test"


@pytest.mark.parametrize(
    "setting",
    [
        "tuner.rank=3",
        "tuner.0.rank=3",
        "base.tuner.rank=3",
        'sites.partition={ kind = "natural" }',
        "sites.partition.seed=4",
    ],
)
def test_a_setting_that_the_study_varies_is_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match="the study varies this key itself"):
        planned(tmp_path, STUDY, setting)


PAGE = (Path(__file__).parents[2] / "docs/study.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL))
def test_the_studies_on_the_page_are_valid(text: str, tmp_path: Path) -> None:
    made = planned(tmp_path, text)
    assert not any(cell.refused for cell in made.cells)


def test_the_page_names_every_key_and_file() -> None:
    assert [key for key in StudyFile.model_fields if f"`{key}`" not in PAGE and f"[{key}" not in PAGE] == []
    assert all(f"`{name}`" in PAGE for name in ("study.json", "selected.toml", "report.html"))
