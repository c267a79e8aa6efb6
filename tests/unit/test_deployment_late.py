"""deployment.late = "next_round": refused where it would be wrong or idle, and shown wherever a run is looked at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from typer.testing import CliRunner

from consilium import checkpoint
from consilium.cli import app
from consilium.deployment import board, files, page
from consilium.errors import ConfigError
from consilium.messages import decode_reply, envelope_of
from consilium.report import load, sections
from tests.hospitals_apart import FEDERATION, made

NEXT = FEDERATION.replace("grace = 5", 'grace = 5\nlate = "next_round"')
SCAFFOLD = NEXT.replace('"fedavg"', '"scaffold"').replace(
    "[evaluation]", 'optimizer = "sgd"\nmomentum = 0\nweight_decay = 0\nclip_norm = 0\n[evaluation]'
)


@pytest.mark.parametrize(
    ("text", "why", "received"),
    [
        (SCAFFOLD, "more than trained parameters is sent", "strategy scaffold, tuner lora"),
        (NEXT.replace('"fedavg"', '"fedopt"'), "more than form the mean", "strategy fedopt, tuner lora"),
        (NEXT + '[wire]\ncodec = "int8"\n', "a codec sends steps", "strategy fedavg, tuner lora"),
        (
            NEXT.replace('name = "lora"\nrank = 2', 'name = "stochastic_block"'),
            "other tensors are sent in other rounds",
            "strategy fedavg, tuner stochastic_block",
        ),
        (NEXT.replace("quorum = 0.6\n", ""), "no round is closed without a late site", "3 rounds, a quorum of 1 of 3"),
        (NEXT.replace("quorum = 0.6", "quorum = 0.7"), "no round is closed", "3 rounds, a quorum of 0.7 of 3"),
        (NEXT.replace("rounds = 3", "rounds = 1"), "no round is closed", "1 rounds, a quorum of 0.6 of 3"),
    ],
)
def test_it_is_refused_in_words_before_folders_are_made(text: str, why: str, received: str, tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        files.read_text(path)
    assert why in str(caught.value)
    assert received in str(caught.value)
    assert "deployment.late in" in str(caught.value)
    done = CliRunner().invoke(app, ["deploy", "init", str(path), "--out", str(tmp_path / "made")])
    assert done.exit_code == 2 or isinstance(done.exception, ConfigError)
    assert not (tmp_path / "made").exists()


def test_a_file_that_was_changed_later_is_refused_by_everybody(tmp_path: Path) -> None:
    apart = made(tmp_path)
    for name in (files.COORDINATOR, "alpine"):
        (apart.at(name) / files.FEDERATION).write_text(SCAFFOLD)
    with pytest.raises(ConfigError, match="a late reply cannot count"):
        files.settled(apart.at(files.COORDINATOR))  # before a run is submitted
    with pytest.raises(ConfigError, match="a late reply cannot count"):
        files.read_site(apart.at("alpine"))  # in site check and site join


def test_only_known_policies_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(NEXT.replace("next_round", "whenever"))
    with pytest.raises(ConfigError, match=r"(?s)late.*'drop' or 'next_round'"):
        files.read_text(path)


def test_the_weights_need_not_be_there_where_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(
        NEXT.replace('"random"', '"weights/elsewhere.safetensors"').replace("test_vit", "vit_tiny_patch16_224")
    )
    assert files.read_text(path).deployment.late == "next_round"


def test_a_late_reply_counts_and_is_shown(tmp_path: Path) -> None:
    apart = made(tmp_path, NEXT)
    out = apart.conduct(apart.slow_at_first())
    folder = apart.at(files.COORDINATOR)
    lines = page.rounds(out / "events.jsonl")
    rows = [line["sites"]["prairie"] for line in lines]
    assert [(row["status"], row.get("late_from")) for row in rows] == [("late", None), ("ok", 1), ("ok", None)]
    asked = [envelope_of(request) for site, request, _ in apart.seen if site == "prairie"]
    assert [(each["kind"], each["round"], each["builds_on"]) for each in asked] == [
        ("round", 1, 0), ("round", 3, 1), ("finish", 3, 3),
    ]  # fmt: skip
    assert lines[1]["bytes"]["up"]["prairie"] == lines[2]["bytes"]["up"]["prairie"] > 0
    assert lines[1]["bytes"]["down"]["prairie"] == 0
    result = json.loads((out / "result.json").read_text())
    assert result["late"] == {"policy": "next_round", "counted": {"prairie": [2]}}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [(each["site"], each["policy"]) for each in log if each["event"] == "late"] == [("prairie", "next_round")]
    assert "3 of 3, prairie for round 1" in page.html(folder)
    report = (out / "report.html").read_text()
    assert "reply to the round before" in report
    assert "3 of 3, prairie for round 1" in report
    losses = sections._losses(load.load_run(out), "prairie")
    assert losses == [(1, None), (1, rows[1]["loss"]), (3, rows[2]["loss"])]  # where it was trained


def test_what_also_misses_the_next_round_is_given_up_and_the_site_asked_afresh(tmp_path: Path) -> None:
    apart = made(tmp_path, NEXT)
    out = apart.conduct(apart.slow_at_first(takes=150))
    rows = [line["sites"]["prairie"] for line in page.rounds(out / "events.jsonl")]
    assert [(row["status"], row.get("late_from")) for row in rows] == [("late", None), ("late", None), ("ok", None)]
    assert rows[1]["message"] == "it is still at work on an earlier request"
    log = [json.loads(line) for line in (apart.at(files.COORDINATOR) / "log.jsonl").read_text().splitlines()]
    assert [each["policy"] for each in log if each["event"] == "late"] == ["given up"]
    asked = [envelope_of(request) for site, request, _ in apart.seen if site == "prairie"]
    assert [(each["round"], each["builds_on"]) for each in asked] == [(1, 0), (3, 0), (3, 3)]


def test_the_sum_is_formed_of_what_was_sent(tmp_path: Path) -> None:
    """Round 2: what alpine and harbour learnt in it, and prairie in round 1."""
    text = NEXT.replace("rounds = 3", "rounds = 2")
    apart = made(tmp_path, text)
    out = apart.conduct(apart.slow_at_first())
    site = apart.resident("alpine").site
    terms = {}
    for name, request, reply in apart.seen:
        fields = envelope_of(request)
        if fields["kind"] == "round" and (fields["round"] == 2 or name == "prairie"):
            terms[name] = decode_reply(reply, site.experiment.up(2))
    assert sorted((name, reply.round) for name, reply in terms.items()) == [
        ("alpine", 2),
        ("harbour", 2),
        ("prairie", 1),
    ]
    found = checkpoint.load(out / "checkpoints" / "round-00002.safetensors")[0]
    replies = list(terms.values())
    for variable in replies[0].tensors:
        values = np.stack([reply.tensors[variable].double().numpy() for reply in replies])
        mean = np.average(values, axis=0, weights=[reply.num_examples for reply in replies])
        torch.testing.assert_close(found[f"shared/{variable}"].double(), torch.from_numpy(mean), rtol=1e-6, atol=1e-9)


def test_while_it_runs_the_board_says_which_round_a_reply_is_for(tmp_path: Path) -> None:
    (tmp_path / "coordinator").mkdir()
    shown = board.Board(tmp_path / "coordinator")
    event = {"event": "site", "kind": "round", "round": 2, "site": "prairie", "status": "ok", "late_from": 1}
    shown.show(event)
    row = board.read(tmp_path / "coordinator")["sites"]["prairie"]
    assert (row["status"], row["message"]) == ("done", "its reply to round 1, which came late")


def test_under_the_other_policy_nothing_counts_late(tmp_path: Path) -> None:
    apart = made(tmp_path)
    out = apart.conduct(apart.slow_at_first())
    assert json.loads((out / "result.json").read_text())["late"] == {"policy": "drop", "counted": {}}
    assert "late_from" not in (out / "events.jsonl").read_text()
