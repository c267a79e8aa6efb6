from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pandas as pd
import pytest

from consilium import __version__, cli, registry
from consilium.errors import BackboneError, ConfigError, ConsiliumError, DataError, StateError, TrainingError, WireError


def _call(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    return int(end.value.code or 0)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace one function by a recorder with its signature, so that a verb that drifts from it fails here."""

    def replace(module: str, name: str, result: object = None, error: BaseException | None = None) -> Any:
        target = getattr(__import__(module, fromlist=[name]), name)
        recorder = create_autospec(target, return_value=result, side_effect=error)
        monkeypatch.setattr(f"{module}.{name}", recorder)
        return recorder

    return replace


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "federation.toml"
    path.write_text('name = "trial"\n')
    return str(path)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("--help") == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("run", "check", "report", "predict", "export", "list", "data"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("--version") == 0
    assert capsys.readouterr().out.strip() == __version__


def test_run_hands_over_configuration_folder_and_resume(called: Any, file: str, tmp_path: Path) -> None:
    run = called("consilium.run", "run")
    words = ("--set", "train.rounds=3", "--set", "seed=4", "--out", str(tmp_path / "out"), "--resume", "--quiet")
    assert _call("run", file, *words) == 0
    config, out = run.call_args.args
    assert (config.name, config.train.rounds, config.seed, out) == ("trial", 3, 4, tmp_path / "out")
    assert run.call_args.kwargs["resume"] is True


def test_run_without_a_file_is_the_quick_start_in_a_folder_of_its_name(called: Any) -> None:
    run = called("consilium.run", "run")
    assert _call("run", "--quiet") == 0
    config, out = run.call_args.args
    assert config.sites.source == "phantom"
    assert out == Path("runs") / config.name


def test_run_prints_json_lines_of_what_happens(called: Any, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = called("consilium.run", "run")
    run.side_effect = lambda *_, display, **__: display({"event": "site", "loss": math.inf})
    assert _call("run", file, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"event": "site", "loss": None}


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (DataError, 2), (BackboneError, 2), (TrainingError, 1), (WireError, 1), (StateError, 1)],
)
def test_an_error_is_a_sentence_and_an_exit_code(
    called: Any, file: str, capsys: pytest.CaptureFixture[str], error: type[ConsiliumError], code: int
) -> None:
    called("consilium.run", "run", error=error("the scanner is on fire", remedy="water"))
    assert _call("run", file, "--quiet") == code
    assert capsys.readouterr().err == "error: the scanner is on fire\n  remedy: water\n"


def test_debug_before_or_after_the_verb_shows_where_an_error_came_from(called: Any, file: str) -> None:
    called("consilium.run", "run", error=TrainingError("the scanner is on fire"))
    for words in (["--debug", "run", file, "--quiet"], ["run", file, "--debug", "--quiet"]):
        with pytest.raises(TrainingError):
            cli.main(words)
    assert _call("run", "--quiet", "--", file) == 1


def test_after_two_dashes_debug_is_a_name(called: Any) -> None:
    predict = called("consilium.predict", "predict", pd.DataFrame({"id": ["--debug"]}))
    assert _call("predict", "run", "--", "--debug") == 0
    assert predict.call_args.args[1] == [Path("--debug")]


def test_an_interrupt_ends_with_its_own_code(called: Any, file: str) -> None:
    called("consilium.run", "run", error=KeyboardInterrupt())
    assert _call("run", file, "--quiet") == 130


def test_a_missing_file_is_an_error_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("run", "no-such.toml") == 2
    assert "no-such.toml" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("fly",), ("run", "--no-such-option"), ("export", "run"), ("list", "planets")])
def test_words_that_are_not_understood_end_with_2(words: tuple[str, ...]) -> None:
    assert _call(*words) == 2


def test_check_prints_what_it_found(called: Any, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = {
        "parameters": {"backbone": 1000, "trainable": 10},
        "bytes_per_round": {"up": {"total": 40, "per_site": {"a": 20, "b": 20}}, "down": {"total": 4}},
        "leakage": {},
        "sites": {"a": {"train": 3, "val": 1}, "b": {"train": 5, "val": 2}},
        "share": math.nan,
    }
    called("consilium.check", "check", SimpleNamespace(to_dict=lambda: found, warnings=["one class only at b"]))
    assert _call("check", file, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {**found, "share": None}
    assert _call("check", file) == 0
    shown = capsys.readouterr().out
    assert "backbone: 1,000" in shown
    assert ["b", "5", "2"] in [line.split()[-3:] for line in shown.splitlines()]


def test_report_compares_the_runs_it_renders(called: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    render = called("consilium.report.html", "render", tmp_path / "report.html")
    called("consilium.listing", "comparison", "a table")
    assert _call("report", str(tmp_path)) == 0
    assert render.call_args.args == ([tmp_path], tmp_path / "report.html")
    assert capsys.readouterr().out.split() == ["a", "table", str(tmp_path / "report.html")]
    assert _call("report", "one", "two") == 0
    assert render.call_args.args == ([Path("one"), Path("two")], Path("report.html"))


def test_predict_prints_a_table_json_or_csv(called: Any, capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.DataFrame({"image": ["a.png"], "p.nv": [0.25]})
    predict = called("consilium.predict", "predict", table)
    assert _call("predict", "run", "a.png", "--site", "north") == 0
    assert "0.250" in capsys.readouterr().out
    assert predict.call_args.args == (Path("run"), [Path("a.png")], "north", None)
    assert _call("predict", "run", "a.png", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"image": "a.png", "p.nv": 0.25}]
    assert _call("predict", "run", "a.png", "--csv") == 0
    assert capsys.readouterr().out.splitlines() == ["image,p.nv", "a.png,0.25"]


def test_export_prints_where_it_wrote(called: Any, capsys: pytest.CaptureFixture[str]) -> None:
    export = called("consilium.export", "export", Path("adapter"))
    assert _call("export", "run", "--format", "peft", "--out", "adapter", "--site", "north") == 0
    assert export.call_args.args == (Path("run"), "peft", Path("adapter"), "north")
    assert capsys.readouterr().out == "adapter\n"


@pytest.mark.parametrize("kind", registry.KINDS)
def test_list_shows_every_member(kind: registry.Kind, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("list", kind) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in registry.members(kind))
    assert _call("list", kind, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert [member["name"] for member in listed[kind]] == list(registry.members(kind))


@pytest.mark.parametrize(
    ("verb", "function", "result"),
    [("inspect", "inspect", {"images": 7}), ("audit", "audit_config", SimpleNamespace(to_dict=lambda: {"images": 7}))],
)
def test_data_verbs_print_what_they_found(
    called: Any, file: str, capsys: pytest.CaptureFixture[str], verb: str, function: str, result: object
) -> None:
    asked = called("consilium.sites.audit", function, result)
    assert _call("data", verb, file, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"images": 7}
    assert _call("data", verb, file, "--set", "seed=9") == 0
    assert "images: 7" in capsys.readouterr().out
    assert asked.call_args.args[0].seed == 9


def test_data_split_prints_where_it_wrote(called: Any, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    write = called("consilium.sites.audit", "write_split", "0f3a")
    assert _call("data", "split", file, "--out", "split.parquet") == 0
    assert write.call_args.args[1] == Path("split.parquet")
    assert capsys.readouterr().out == "split.parquet: split 0f3a\n"


def test_keys_and_merge_as_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.signed_hospitals import hospital

    monkeypatch.chdir(tmp_path)
    assert _call("keys", "mine.key") == 0
    assert "mine.pub: public, for --trust" in capsys.readouterr().out
    assert _call("keys", "mine.key") == 1
    assert "a key is there already" in capsys.readouterr().err
    east, west = (hospital(tmp_path, name, at) for at, name in enumerate(("east", "west")))
    both = [str(east.adapter.parent), str(west.adapter), "--trust", east.trust, "--trust", west.trust]
    assert _call("merge", *both, "--out", "merged", "--scale", "0.5", "--rank", "3") == 0
    shown = capsys.readouterr().out
    assert "merged: mean of east (" in shown
    assert "cut to rank 3, off by 0." in shown
    assert _call("merge", *both, "--out", "exact", "--scale", "0.5", "--json") == 0
    assert [term["site"] for term in json.loads(capsys.readouterr().out)["terms"]] == ["east", "west"]
    less = ["merge", "exact", "--subtract", str(west.adapter), "--trust", west.trust, "--out", "left"]
    assert _call(*less, "--rule", "sum") == 2
    assert "the merged folder's own rule holds" in capsys.readouterr().err
    assert _call(*less) == 0
    assert "left: mean of east (" in capsys.readouterr().out
    for words, code, text in (
        (["--out", "merged", "--scale", "1"], 1, "not empty"),
        (["--out", "other"], 2, "--validate"),
        (["--out", "other", "--scale", "much"], 2, "no number"),
        (["--out", "other", "--scale", "1", "--sign", "nowhere"], 2, "no private key"),
    ):
        assert _call("merge", *both, *words) == code
        assert text in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
