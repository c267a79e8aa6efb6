"""The node of a hospital, and the SuperLink: what can work no more ends, with all that it started, and says why.

Flower's program is played by a few lines that stand in its place among the entry points of installed packages.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from consilium.deployment import door, processes, watch

ROOT = Path(__file__).parents[2]
STAYS = "import threading, time; threading.Thread(target=time.sleep, args=(1000,)).start(); "  # as its web server does
CHILD = "import subprocess; child = subprocess.Popen(['sleep', '1000']); print('child', child.pid, flush=True); "
LOG = "import logging; log = logging.getLogger('flwr'); "
QUICK = (
    "from consilium.deployment import door, watch; watch.PATIENCE = watch.LOOK = 0.1; watch.LEAVING = 3.0; "
    "watch.LOOKS = 5; "
)
NODE, LINK = (watch.SUPERNODE, QUICK + "watch.main()"), (door.SUPERLINK, QUICK + "door.main()")
ORPHAN = "import subprocess; subprocess.run(['true']); " + CHILD + "child.kill(); time.sleep(1000)"
WAITING = f"""import time
    from types import SimpleNamespace as Object
    class State:
        def get_tasks(self):
            return [Object(status=Object(status=each)) for each in {{tasks}}]
    def {watch.WAITS}(state):
        while True:
            time.sleep(0.05)
    def idle(state):
        while True:
            time.sleep(0.05)
    {{then}}({{state}})"""

FLOWERS = """from datetime import timedelta
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode import start_client_internal as node
    from flwr.supernode.nodestate import NodeStateFactory
    state = NodeStateFactory(ObjectStoreFactory()).state()
    task = state.create_task("flwr-clientapp", 1)
    assert state.claim_task(task) and state.activate_task(task)
    {then}
    print("ready", flush=True)
    node._push_messages(state, None, None, None)"""


def started(folder: Path, body: str, program: tuple[str, str] = NODE) -> subprocess.Popen[str]:
    """The node, or the SuperLink, as its supervisor starts it, with this for Flower's program."""
    name, source = program
    (folder / "played.py").write_text(f"def main():\n    {body}\n")
    info = folder / "flwr-0.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flwr\nVersion: 0.0.0\n")
    (info / "entry_points.txt").write_text(f"[console_scripts]\n{name} = played:main\n")
    return subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        start_new_session=True,
    )


def said(folder: Path, body: str, program: tuple[str, str] = NODE) -> str:
    """All that it wrote, and for what it names as children: they are gone."""
    with started(folder, body, program) as process:
        try:
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    for line in out.splitlines():
        if line.startswith("child "):
            assert_gone(int(line.split()[1]))
    return out


def assert_stays(folder: Path, body: str, begins: str = "child ") -> None:
    """It says that it is there, and does not end by itself."""
    with started(folder, body) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(begins)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        os.killpg(process.pid, signal.SIGKILL)


def assert_gone(child: int) -> None:
    status, end = Path(f"/proc/{child}/stat"), time.monotonic() + 30
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "a program that the node started outlived it"
        time.sleep(0.05)


def test_a_loop_that_ends_ends_the_node_and_the_error_is_the_reason(tmp_path: Path) -> None:
    out = said(tmp_path, STAYS + CHILD + LOG + "log.error(OSError('[SSL: EOF] violation'))")
    assert f"{watch.ENDS}it no longer asks for work ([SSL: EOF] violation)" in out


def test_an_error_after_which_flower_goes_on_ends_the_node(tmp_path: Path) -> None:
    out = said(tmp_path, STAYS + CHILD + LOG + "log.error('Failed to send message %s', 7); time.sleep(1000)")
    assert f"{watch.ENDS}it met an error (Failed to send message 7)" in out


def test_a_heartbeat_that_dies_ends_the_node(tmp_path: Path) -> None:
    dies = "threading.Thread(target=lambda: int('no number')).start(); time.sleep(1000)"
    out = said(tmp_path, STAYS + CHILD + dies)
    assert f"{watch.ENDS}a part of it died (ValueError: invalid literal" in out
    assert "Traceback" in out


def test_a_program_that_it_started_and_that_ends_ends_the_node(tmp_path: Path) -> None:
    assert f"{watch.ENDS}the program that starts its client apps has ended" in said(tmp_path, STAYS + ORPHAN)


def test_a_superlink_ends_with_the_program_that_starts_the_coordinators(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    assert f"{watch.ENDS}the program that starts the coordinator's has ended" in said(tmp_path, STAYS + ORPHAN, LINK)


def test_a_wait_for_a_reply_that_no_task_will_bring_ends_the_node(tmp_path: Path) -> None:
    out = said(tmp_path, STAYS + CHILD + WAITING.format(tasks=[watch.DONE] * 2, then=watch.WAITS, state="State()"))
    assert f"{watch.ENDS}a client app has ended, and no reply of it is there" in out


@pytest.mark.parametrize(
    ("tasks", "then", "state"),
    [
        ([watch.DONE, "running"], watch.WAITS, "State()"),
        ([watch.DONE, "a new word"], watch.WAITS, "State()"),
        ([watch.DONE], "idle", "State()"),
        ([watch.DONE], watch.WAITS, "None"),
        ([], watch.WAITS, "State()"),
    ],
)
def test_a_wait_for_a_task_that_is_open_ends_nothing(tasks: list[str], then: str, state: str, tmp_path: Path) -> None:
    """Nor does one in another part of Flower's, or with words that are not known."""
    assert_stays(tmp_path, CHILD + WAITING.format(tasks=tasks, then=then, state=state))


@pytest.mark.parametrize(
    "then",
    [
        "assert state.finish_task(task, 'failed', 'asked to end')",
        "state.task_token_store[task].active_until -= timedelta(hours=1)",  # killed before it had fetched a message
    ],
)
def test_flowers_own_wait_for_an_app_that_has_ended_ends_the_node(then: str, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    assert f"{watch.ENDS}a client app has ended" in said(tmp_path, STAYS + CHILD + FLOWERS.format(then=then))


def test_flowers_own_wait_for_an_app_at_work_ends_nothing(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    assert_stays(tmp_path, FLOWERS.format(then=""), "ready")


def test_it_takes_leave_where_flower_does(tmp_path: Path) -> None:
    leaves = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (print('left', flush=True), sys.exit(0))); "
    out = said(tmp_path, STAYS + leaves + LOG + "log.error('Failed'); time.sleep(1000)")
    assert out.splitlines()[-2:] == [f"{watch.ENDS}it met an error (Failed)", "left"]


def test_it_makes_an_end_where_flower_takes_no_leave(tmp_path: Path) -> None:
    stays = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    assert watch.ENDS in said(tmp_path, STAYS + stays + CHILD + LOG + "log.error('Failed'); time.sleep(1000)")


def test_an_exit_of_flowers_own_is_left_to_it(tmp_path: Path) -> None:
    with started(tmp_path, LOG + "log.error('Exit Code: 305'); raise SystemExit(7)") as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 7
    assert watch.ENDS not in out


def test_what_is_no_error_ends_nothing(tmp_path: Path) -> None:
    assert_stays(tmp_path, CHILD + LOG + "log.warning('Connection attempt failed'); import time; time.sleep(1000)")


@pytest.mark.parametrize(
    ("wrote", "why"),
    [
        ("before\nThis program ends: it met an error (x)\nafter\n", "it met an error (x)"),
        ("CERTIFICATE_VERIFY_FAILED\nThis program ends: y\n", "the coordinator is not whom keys/ca.crt vouches for"),
        ("This program ends: a part of it died ('401 Unauthorized')\n", processes._REASONS["401 Unauthorized"]),
        ("Exit Code: 7\nbad words\nhelp\n", "bad words help"),
        ("nothing\n", "see supernode.log"),
    ],
)
def test_the_sites_log_says_why_a_node_ended(wrote: str, why: str, tmp_path: Path) -> None:
    log = tmp_path / "supernode.log"
    log.write_text("of an earlier start: This program ends: long ago\n" + wrote)
    assert processes._why(log, len("of an earlier start: This program ends: long ago\n")) == why


def test_the_supervisor_starts_it_again_and_tells_why(tmp_path: Path) -> None:
    told: list[Mapping[str, object]] = []
    command = [sys.executable, "-c", f"print({watch.ENDS + 'so it is'!r})"]
    with processes.Supervised("node", command, tmp_path, tmp_path / "supernode.log", told.append, pause=0.01):
        end = time.monotonic() + 60
        while sum(each["event"] == "started" for each in told) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert next(each for each in told if each["event"] == "ended")["why"] == "so it is"


def test_the_supervisor_outlives_what_cannot_be_started(tmp_path: Path) -> None:
    told: list[Mapping[str, object]] = []
    with processes.Supervised("node", ["/no/such"], tmp_path, tmp_path / "log", told.append, pause=0.01):
        end = time.monotonic() + 60
        while len(told) < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert all(each["event"] == "ended" and "could not be started" in str(each["why"]) for each in told)
