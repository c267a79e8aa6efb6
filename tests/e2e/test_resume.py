"""A run that is killed, interrupted, starved or damaged goes on to the same bits, or says what it needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from consilium.engines.simulate import Federation, Simulation, secrets_of
from tests import federation, hospitals
from tests.e2e.processes import ROOT, Done, Parent, Running, wait_for_writer
from tests.e2e.runs import KINDS, Finished, assert_same, contents, events, words

KILL = """
import os, signal
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""
AT_STEP = """
from consilium.local.train import Optimizer
original, taken = Optimizer.step, []
def step(self, share):
    taken.append(share)
    return die() if len(taken) == {number} else original(self, share)
Optimizer.step = step
"""
AT_WRITE = """
import pathlib
original, written = pathlib.Path.replace, []
def replace(self, target):
    written.append(target)
    return die() if len(written) == {number} else original(self, target)
pathlib.Path.replace = replace
"""
IN_ROUND = """
from consilium.engines.site import Site
original = Site._learn
def learn(self, request, state, moments):
    if (self.data.name, request.round) == ("{site}", {round}):
        {action}
    return original(self, request, state, moments)
Site._learn = learn
"""
HELD = """
from consilium.coordinator import Coordinator
from consilium.exchange import Exchange
original, passed = {method}, []
def method(self, *arguments):
    passed.append(arguments)
    if len(passed) == {number}:
        open("reached", "w").close()
        open("go").read()
    return original(self, *arguments)
{method} = method
"""
NOT_FINITE = """
import torch
from consilium.strategies.fedavg import FedAvg
original = FedAvg.learn
def learn(self, received, personal, training):
    learned = original(self, received, personal, training)
    if (training.site, training.round) == ("prairie", 2):
        next(iter(learned.update.values())).fill_(torch.inf)
    return learned
FedAvg.learn = learn
"""


def _failed(done: Done, *expected: str) -> None:
    assert done.code == 1, done
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert [word for word in expected if word not in done.stderr] == [], done.stderr


def _resume(consilium: Parent, folder: Path, kind: str, *more: str) -> Done:
    return consilium(*words(folder, *KINDS[kind], *more), "--out", folder / "out", "--resume", "--json")


def _ends_like(consilium: Parent, folder: Path, kind: str, whole: Path) -> Done:
    done = _resume(consilium, folder, kind)
    assert (done.code, done.stderr) == (0, "")
    assert_same(whole, folder / "out")
    return done


# ------------------------------------------------------------------------------------------------ killed
@pytest.mark.parametrize(
    ("kind", "number"), [("fedavg", 9), ("fedavg", 23), ("fedper", 13), ("half", 8), ("best", 15), ("unseen", 50)]
)
def test_killed_while_a_site_trains(
    consilium: Parent, finished: Finished, tmp_path: Path, kind: str, number: int
) -> None:
    hook = KILL + AT_STEP.format(number=number)
    done = consilium(*words(tmp_path, *KINDS[kind]), "--out", tmp_path / "out", "--json", hook=hook)
    assert done.code == -signal.SIGKILL
    closed = [event["round"] for event in done.events if event["event"] == "round"]
    resumed = _ends_like(consilium, tmp_path, kind, finished(kind))
    repeated = [event["round"] for event in resumed.events if event["event"] == "round"]
    assert closed + repeated == [1, 2, 3], "a closed round is not trained again"


FEW = ("sites.num_sites=2", "sites.num_images=24", "train.rounds=2", *KINDS["best"], "train.moments=keep")


@pytest.mark.parametrize("part", [0, 1])
def test_killed_before_any_write(consilium: Parent, tmp_path: Path, part: int) -> None:
    """Every file that a run writes, one after the other: the process dies when it is about to put it in place."""
    whole = tmp_path / "whole"
    assert consilium(*words(tmp_path, *FEW), "--out", whole, "--quiet").code == 0
    for number in range(1 + part, 200, 2):
        out = tmp_path / str(number)
        done = consilium(*words(tmp_path, *FEW), "--out", out, hook=KILL + AT_WRITE.format(number=number))
        if done.code == 0:
            assert number > 15
            return
        assert done.code == -signal.SIGKILL
        resumed = consilium(*words(tmp_path, *FEW), "--out", out, "--quiet", "--resume")
        assert (number, resumed.code, resumed.stderr) == (number, 0, "")
        assert_same(whole, out)
        assert [event["round"] for event in events(out)] == [1, 2]
    pytest.fail("a run without an end")


def test_killed_again_and_again(consilium: Parent, tmp_path: Path) -> None:
    whole, out, settings = tmp_path / "whole", tmp_path / "out", (*FEW, "train.rounds=4")
    assert consilium(*words(tmp_path, *settings), "--out", whole, "--quiet").code == 0
    hook = KILL + AT_WRITE.format(number=10)
    codes = [consilium(*words(tmp_path, *settings), "--out", out, hook=hook).code]
    while codes[-1] == -signal.SIGKILL and len(codes) < 9:
        codes.append(consilium(*words(tmp_path, *settings), "--out", out, "--resume", hook=hook).code)
    assert codes[-1] == 0
    assert codes.count(-signal.SIGKILL) == len(codes) - 1 >= 2
    assert_same(whole, out)


@contextmanager
def _held(
    consilium: Parent, folder: Path, kind: str, method: str, number: int, workers: int, *more: str
) -> Iterator[Running]:
    """A run that waits at that call of a coordinator's method; after the block all of its processes are gone."""
    for name in ("reached", "go"):
        os.mkfifo(folder / name)
    command = (*words(folder, *KINDS[kind], f"engine.workers={workers}", *more), "--out", folder / "out", "--json")
    hook = HELD.format(method=method, number=number)
    running = consilium.start(*command, hook=hook, cwd=folder, piped=True)
    with running.stream() as stream:
        wait_for_writer(folder / "reached")
        yield running
        list(stream)


@pytest.mark.parametrize(("pool", "kind"), [("threads", "drawless"), ("processes", "best")])
def test_killed_with_two_workers_in_the_middle_of_a_round(
    consilium: Parent, finished: Finished, tmp_path: Path, pool: str, kind: str
) -> None:
    second_of_round_2 = 6 if kind == "best" else 14
    more = f"engine.pool={pool}"
    with _held(consilium, tmp_path, kind, "Exchange._read", second_of_round_2, 2, more) as running:
        os.kill(running.pid, signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    assert [event["round"] for event in events(tmp_path / "out")][:1] == [1]
    _ends_like(consilium, tmp_path, kind, finished(kind))


def test_a_killed_worker_is_named_by_its_sites_and_can_be_resumed(
    consilium: Parent, finished: Finished, tmp_path: Path
) -> None:
    with _held(consilium, tmp_path, "best", "Coordinator._save", 1, 2, "engine.pool=processes") as running:
        os.kill(running.descendants("spawn_main")[0], signal.SIGKILL)
        running.wait_for_none("spawn_main")  # the pool has noticed: it ended the other worker
        (tmp_path / "go").write_text("")
    _failed(running.wait(), "too few sites replied", "round 2", "lost, its worker process died", "summit", "--resume")
    _ends_like(consilium, tmp_path, "best", finished("best"))


def test_interrupted(consilium: Parent, finished: Finished, tmp_path: Path) -> None:
    with _held(consilium, tmp_path, "fedavg", "Coordinator._save", 2, workers=1) as running:
        os.kill(running.pid, signal.SIGINT)
    done = running.wait()
    assert (done.code, done.stderr) == (130, "")
    assert [event["round"] for event in events(tmp_path / "out")] == [1, 2], "a line without its checkpoint"
    _ends_like(consilium, tmp_path, "fedavg", finished("fedavg"))


def _is_deaf(pid: int) -> bool:
    (mask,) = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) & 1 << signal.SIGINT - 1)


@pytest.mark.parametrize("pool", ["threads", "processes"])
def test_an_interrupt_ends_the_workers_at_once(consilium: Parent, tmp_path: Path, pool: str) -> None:
    settings = (*KINDS["drawless"], "engine.workers=2", f"engine.pool={pool}", "train.rounds=300")
    running = consilium.start(*words(tmp_path, *settings), "--out", tmp_path / "out", "--json", piped=True)
    with running.stream() as stream:
        next(event for event in stream if event["event"] == "round")
        workers = running.descendants("spawn_main")
        assert bool(workers) == (pool == "processes")
        assert all(_is_deaf(worker) for worker in workers)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: all processes of the group
        closed = [event["round"] for event in stream if event["event"] == "round"]
    done = running.wait()
    assert (done.code, max(closed, default=1) < 300) == (130, True)
    assert "Traceback" not in done.stderr


FOREVER = """
import time
from consilium.engines.site import Site
from consilium.local.train import Setting, Trainer
original = Trainer.fit
def fit(self, *arguments, **named):
    while (self.site, self.round) == ("alpine", 2):
        self.setting.go_on()
        time.sleep(0.01)
    if (self.site, self.round) == ("{site}", 2):
        {action}
    return original(self, *arguments, **named)
Trainer.fit = fit
"""


def test_an_interrupt_ends_threads_between_two_steps(consilium: Parent, finished: Finished, tmp_path: Path) -> None:
    hook = FOREVER.format(site="prairie", action='open("reached", "w").close()')
    os.mkfifo(tmp_path / "reached")
    settings = (*KINDS["drawless"], "engine.workers=4")
    command = (*words(tmp_path, *settings), "--out", tmp_path / "out")
    running = consilium.start(*command, hook=hook, cwd=tmp_path)
    wait_for_writer(tmp_path / "reached")
    os.kill(running.pid, signal.SIGINT)
    done = running.wait()
    assert (done.code, done.stderr) == (130, "")
    assert not list((tmp_path / "out").rglob("failures.jsonl")), "nobody takes it for a failure of the site"
    _ends_like(consilium, tmp_path, "drawless", finished("drawless"))


def test_an_error_in_one_run_ends_the_threads_of_all(consilium: Parent, tmp_path: Path) -> None:
    hook = FOREVER.format(site="pooled", action="raise SystemExit(7)")
    settings = (*KINDS["drawless"], "engine.workers=4")
    done = consilium(*words(tmp_path, *settings), "--out", tmp_path / "out", "--quiet", hook=hook)
    assert done.code == 7, done


class _BrokenPool:
    def submit(self, *_: object) -> NoReturn:
        raise BrokenProcessPool("a worker died while all was quiet")


def test_sites_of_a_pool_that_broke_before_are_lost(tmp_path: Path) -> None:
    sites, settings = federation.hospitals(6, 6), federation.configure()
    here = Federation(settings, federation.CLASSES, sites, tmp_path, secrets_of(0, sites))
    simulation = Simulation({"run": here}, 1)
    simulation.pool = _BrokenPool()  # type: ignore[assignment]
    answers = dict(simulation.transport("run").round({"a": b"", "b": b""}))
    assert [(site, answer.code) for site, answer in answers.items()] == [("a", "lost"), ("b", "lost")]


# ------------------------------------------------------------------------------------------------ failing sites
def test_one_failed_site_stops_the_run_with_its_name_and_reason(
    consilium: Parent, finished: Finished, tmp_path: Path
) -> None:
    hook = IN_ROUND.format(site="prairie", round=2, action="raise OSError('the disk of prairie is on fire')")
    done = consilium(*words(tmp_path, *KINDS["best"]), "--out", tmp_path / "out", "--quiet", hook=hook)
    _failed(
        done, "round 2: 3 of 4", "at least 4", "prairie: error, OSError: the disk of prairie is on fire", "--resume"
    )
    _ends_like(consilium, tmp_path, "best", finished("best"))


def test_below_a_full_quorum_the_run_goes_on_and_says_who_failed(consilium: Parent, tmp_path: Path) -> None:
    hook = IN_ROUND.format(site="prairie", round=1, action="raise OSError('no power')")
    plain = ("train.optimizer=sgd", "train.weight_decay=0.0", "train.local_steps=1")  # leaves lora_a as it was at first
    settings = ("train.quorum=0.75", *plain)
    done = consilium(*words(tmp_path, *settings), "--out", tmp_path / "out", hook=hook)
    assert (done.code, done.stderr) == (0, "")
    assert "prairie: error" in done.stdout
    status = [{name: site["status"] for name, site in event["sites"].items()} for event in events(tmp_path / "out")]
    assert [round["prairie"] for round in status] == ["error", "ok", "ok"], "it gets later what it missed"
    assert {round[site] for round in status for site in ("alpine", "harbour", "summit")} == {"ok"}
    failed = events(tmp_path / "out")[0]["sites"]["prairie"]
    assert failed == {"status": "error", "message": "OSError: no power"}
    down = [event["bytes"]["down"] for event in events(tmp_path / "out")]
    assert down[1]["prairie"] > down[1]["alpine"], "it was sent the drawn factors twice, as it kept nothing"
    assert down[1]["prairie"] > down[0]["prairie"], "what starts at zero is sent once it has moved"


def test_a_site_with_non_finite_numbers_stops_the_run_and_spoils_nothing(
    consilium: Parent, finished: Finished, tmp_path: Path
) -> None:
    out, settings = tmp_path / "out", KINDS["fedavg"]
    done = consilium(*words(tmp_path, *settings), "--out", out, "--quiet", hook=NOT_FINITE)
    _failed(done, "non-finite", "site prairie", "round 2", "learning_rate", "--resume")
    assert [event["round"] for event in events(out)] == [1]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["round-00001.safetensors"]
    _failed(consilium(*words(tmp_path, *settings), "--out", out, "--quiet", "--resume", hook=NOT_FINITE), "prairie")
    _ends_like(consilium, tmp_path, "fedavg", finished("fedavg"))


def test_an_absurd_learning_rate_is_named_and_fails_again(consilium: Parent, tmp_path: Path) -> None:
    settings = ("train.learning_rate=1e30", "train.clip_norm=0", "sites.num_sites=2")
    command = (*words(tmp_path, *settings), "--out", tmp_path / "out", "--quiet")
    for more in ((), ("--resume",)):
        _failed(consilium(*command, *more), "non-finite", "alpine", "harbour", "lower train.learning_rate", "again")
    assert not (tmp_path / "out" / "result.json").exists()


# ------------------------------------------------------------------------------------------------ damaged folders
@pytest.fixture
def stopped(consilium: Parent, tmp_path: Path) -> Path:
    """A run folder after round 2 of 3 in which somebody pulled the plug."""
    hook = KILL + IN_ROUND.format(site="prairie", round=3, action="die()")
    done = consilium(*words(tmp_path, *KINDS["best"]), "--out", tmp_path / "out", hook=hook)
    assert done.code == -signal.SIGKILL
    return tmp_path / "out"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [_truncate, _flip])
def test_a_damaged_newest_checkpoint_costs_one_round(
    consilium: Parent, finished: Finished, stopped: Path, damage: Callable[[Path], None]
) -> None:
    damage(stopped / "checkpoints" / "round-00002.safetensors")
    done = _ends_like(consilium, stopped.parent, "best", finished("best"))
    warnings = [event["text"] for event in done.events if event["event"] == "warning"]
    assert any("round-00002.safetensors is damaged" in text for text in warnings)
    assert [event["round"] for event in done.events if event["event"] == "round"] == [2, 3]


def test_without_any_whole_checkpoint_the_file_and_the_remedy_are_named(consilium: Parent, stopped: Path) -> None:
    for path in (stopped / "checkpoints").iterdir():
        _truncate(path)
    before = contents(stopped)
    _failed(_resume(consilium, stopped.parent, "best"), "round-00002.safetensors", "remedy", "backup")
    assert contents(stopped) == before


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
def test_a_site_whose_state_is_lost_is_named(
    consilium: Parent, finished: Finished, stopped: Path, damage: Callable[[Path], None]
) -> None:
    path = stopped / "sites" / "harbour" / "state-00002.safetensors"
    saved = path.read_bytes()
    damage(path)
    _failed(_resume(consilium, stopped.parent, "best"), "harbour: refused", str(path.parent), "backup")
    path.write_bytes(saved)
    _ends_like(consilium, stopped.parent, "best", finished("best"))


def test_a_site_whose_folder_is_lost_is_named(consilium: Parent, stopped: Path) -> None:
    shutil.rmtree(stopped / "sites" / "harbour")
    _failed(_resume(consilium, stopped.parent, "best"), "harbour: refused", "lacks the state", "round 2")


def test_a_damaged_log_or_configuration_is_named(consilium: Parent, stopped: Path) -> None:
    (stopped / "events.jsonl").write_text("{")
    _failed(_resume(consilium, stopped.parent, "best"), "events.jsonl", "cannot be read")
    (stopped / "config.json").write_text("{")
    _failed(_resume(consilium, stopped.parent, "best"), "config.json", "cannot be read", "remedy")


# ------------------------------------------------------------------------------------------------ a full disk
FULL = """
import resource
from consilium.coordinator import Coordinator
original = Coordinator.{method}
def method(self, *arguments):
    if {when}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    return original(self, *arguments)
Coordinator.{method} = method
"""


@pytest.mark.parametrize(
    ("method", "when", "limit", "expected"),
    [
        ("_save", "arguments[0].server.round == 2", 1000, "round-00002.safetensors"),
        ("_close_round", "arguments[1] == 2", 9000, "state-00002.safetensors"),
        ("_finish", "True", 3000, "predictions.parquet"),
    ],
)
def test_a_full_disk_spoils_nothing(
    consilium: Parent, finished: Finished, tmp_path: Path, method: str, when: str, limit: int, expected: str
) -> None:
    out, hook = tmp_path / "out", FULL.format(method=method, when=when, limit=limit)
    done = consilium(*words(tmp_path, *KINDS["half"]), "--out", out, "--quiet", hook=hook)
    _failed(done, "could not be written", expected, "too large", "free disk space", "--resume")
    assert not list(out.rglob("*.tmp"))
    _ends_like(consilium, tmp_path, "half", finished("half"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk(consilium: Parent, finished: Finished, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 60_000))
    command = (*words(small_disk, *KINDS["half"]), "--out", small_disk / "out", "--quiet")
    _failed(consilium(*command), "no room", "GB free", "free disk space")
    ballast.write_bytes(bytes(ballast.stat().st_size - 65_000))  # room for the states alone
    _failed(consilium(*command), "could not be written", "No space left", "free disk space", "--resume")
    ballast.unlink()
    _ends_like(consilium, small_disk, "half", finished("half"))


# ------------------------------------------------------------------------------------------------ whose folder it is
def test_a_finished_run_stays_as_it_is(consilium: Parent, finished: Finished, tmp_path: Path) -> None:
    before = contents(finished("fedavg"))
    command = [*words(tmp_path, *KINDS["fedavg"]), "--out", finished("fedavg"), "--json"]
    done = consilium(*command, "--resume")
    assert (done.code, done.stderr) == (0, "")
    assert {event["event"] for event in done.events} == {"finish"} | {
        event["event"] for event in done.events if event["event"] == "warning"
    }
    assert contents(finished("fedavg")) == before
    _failed(consilium(*command), "already holds a run", "--resume", "--out")
    assert contents(finished("fedavg")) == before


@pytest.mark.parametrize(
    ("setting", "different"),
    [("train.rounds=4", "train.rounds"), ("seed=4", "config_hash, seed"), ("sites.seed=1", "data_digest")],
)
def test_a_folder_of_another_run_is_refused(
    consilium: Parent, finished: Finished, tmp_path: Path, setting: str, different: str
) -> None:
    before = contents(finished("half"))
    command = [*words(tmp_path, *KINDS["half"], setting), "--out", finished("half"), "--quiet"]
    _failed(consilium(*command, "--resume"), "belongs to another", different, "choose another --out")
    _failed(consilium(*command), "already holds a run")
    assert contents(finished("half")) == before


def test_other_pixels_under_the_same_names_are_refused(consilium: Parent, tmp_path: Path) -> None:
    table = hospitals.two_sites()
    hospitals.write(tmp_path, table)
    columns = "{image='image', label='label', site='site', group='patient'}"
    sites = f"sites={{source='manifest', table='{tmp_path}/table.csv', images='{tmp_path}/images', columns={columns}}}"
    command = [*words(tmp_path, sites, "train.rounds=1"), "--out", tmp_path / "out", "--quiet", "--resume"]
    assert consilium(*command).code == 0
    before = contents(tmp_path / "out")
    (tmp_path / "images" / "i0003.png").write_bytes(hospitals.png(hospitals.pixels(999)))
    _failed(consilium(*command), "other data", "different: data_digest")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_folder_of_somebody_else_is_left_alone(consilium: Parent, tmp_path: Path, resume: tuple[str, ...]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = consilium(*words(tmp_path), "--out", tmp_path / "mine", *resume)
    _failed(done, "not empty and holds no run", "choose another --out")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}
    _failed(consilium(*words(tmp_path), "--out", tmp_path / "mine" / "thesis.txt"), "a file, not a folder")
    _failed(consilium(*words(tmp_path), "--out", tmp_path / "mine" / "thesis.txt" / "out"), "no run folder", "--out")


def test_a_second_process_in_the_same_folder_is_refused(consilium: Parent, finished: Finished, tmp_path: Path) -> None:
    command = [*words(tmp_path, *KINDS["half"]), "--out", tmp_path / "out", "--quiet"]
    with _held(consilium, tmp_path, "half", "Coordinator._close_round", 2, workers=1) as running:
        before = contents(tmp_path / "out")
        for second in (command, [*command, "--resume"]):
            _failed(consilium(*second), "another process works in this run folder", "remedy")
        assert contents(tmp_path / "out") == before
        (tmp_path / "go").write_text("")
    assert running.wait().code == 0
    assert_same(finished("half"), tmp_path / "out")


def test_the_command_as_a_user_types_it(finished: Finished, tmp_path: Path) -> None:
    """No warm parent: `python -m consilium`, killed from outside at an event, and resumed."""
    command = [sys.executable, "-m", "consilium", *words(tmp_path, *KINDS["half"]), "--out", tmp_path / "out", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if json.loads(line)["event"] == "round")
        process.kill()
    assert process.returncode in (-signal.SIGKILL, 0)  # 0 where it was faster than the kill
    done = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same(finished("half"), tmp_path / "out")
