"""The socket in front of a site's service: bytes in, bytes out, for its owner alone."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.engines import relay
from consilium.errors import StateError


def test_any_bytes_come_through(tmp_path: Path) -> None:
    with relay.Listener(tmp_path / "s" / "relay", lambda data: data + data) as listener:

        @settings(max_examples=30, deadline=None)
        @given(data=st.binary(max_size=5_000))
        def check(data: bytes) -> None:
            assert relay.ask(listener.path, data) == data + data

        check()
        large = bytes(3_000_001)
        assert relay.ask(listener.path, large) == large + large


def test_nothing_is_a_message_too(tmp_path: Path) -> None:
    with relay.Listener(tmp_path / "s" / "relay", lambda data: data) as listener:
        assert [relay.ask(listener.path, b"") for _ in range(200)] == [b""] * 200


def test_only_the_owner_can_open_it(tmp_path: Path) -> None:
    with relay.Listener(tmp_path / "s" / "relay", lambda data: data) as listener:
        assert stat.S_IMODE(listener.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(listener.path.parent.stat().st_mode) == 0o700


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(StateError, match="others can enter"):
        relay.Listener(tmp_path / "open" / "relay", lambda data: data)


def test_another_user_gets_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    with relay.Listener(tmp_path / "s" / "relay", lambda data: asked.append(data) or data) as listener:
        monkeypatch.setattr(relay, "_may_ask", lambda *_: False)
        with pytest.raises(relay.Unreachable):
            relay.ask(listener.path, b"secret?")
    assert asked == []


def test_who_calls_is_asked_of_the_system() -> None:
    here, there = socket.socketpair()
    with here, there:
        assert relay._may_ask(here, {os.getuid()})
        assert not relay._may_ask(here, {os.getuid() + 1})


def test_the_user_of_the_node_is_let_in_and_nobody_else(tmp_path: Path) -> None:
    other = relay.Other(os.getuid() + 1, os.getgid())
    with relay.Listener(tmp_path / "s" / "relay", lambda data: data, other) as listener:
        assert stat.S_IMODE(listener.path.stat().st_mode) == 0o660
        assert stat.S_IMODE(listener.path.parent.stat().st_mode) == 0o750
        assert listener.path.stat().st_gid == listener.path.parent.stat().st_gid == other.group
        assert listener._users == {os.getuid(), 0, other.user}


def _asked_by(user: int, path: Path) -> int:
    """0 where a process of that user got an answer, 3 where it got none."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            os._exit(0 if relay.ask(path, b"?") == b"?" else 4)
        except relay.Unreachable:
            os._exit(3)
        except BaseException:
            os._exit(5)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(os.getuid() != 0, reason="only the system's own user can become another one")
def test_for_real_one_other_user_gets_answers_and_a_third_does_not() -> None:
    with TemporaryDirectory() as name:  # which others can enter, as they cannot enter a folder of pytest
        Path(name).chmod(0o755)
        with relay.Listener(Path(name) / "s" / "relay", lambda data: data, relay.Other(4711, 4711)) as listener:
            assert [_asked_by(user, listener.path) for user in (4711, 4712, 0)] == [0, 3, 0]
            Path(name, "s").chmod(0o755)
            listener.path.chmod(0o666)  # permissions that somebody spoilt: the system still says who calls
            assert [_asked_by(user, listener.path) for user in (4711, 4712)] == [0, 3]


def test_a_group_that_the_service_is_no_member_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chown(*_: object) -> None:
        raise PermissionError("no member")

    monkeypatch.setattr(relay.os, "chown", chown)
    with pytest.raises(StateError, match="node's user cannot be let in"):
        relay.Listener(tmp_path / "s" / "relay", lambda data: data, relay.Other(1, 1))


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(relay.Unreachable, match="FileNotFoundError"):
        relay.ask(tmp_path / "relay", b"?")
    with relay.Listener(tmp_path / "s" / "relay", lambda data: data) as listener:
        pass
    with pytest.raises(relay.Unreachable):
        relay.ask(listener.path, b"?")


def test_a_service_that_fails_once_answers_the_next(tmp_path: Path) -> None:
    def answer(data: bytes) -> bytes:
        if data == b"bad":
            raise RuntimeError("patient_JOHN_DOE")
        return data

    with relay.Listener(tmp_path / "s" / "relay", answer) as listener:
        with pytest.raises(relay.Unreachable) as caught:
            relay.ask(listener.path, b"bad")
        assert "JOHN" not in str(caught.value)
        assert relay.ask(listener.path, b"good") == b"good"


@pytest.mark.parametrize("start", [b"", b"12", struct.pack("<Q", 50) + b"short", struct.pack("<Q", 1 << 60)])
def test_a_caller_who_goes_away_half_way_stops_nobody(tmp_path: Path, start: bytes) -> None:
    with relay.Listener(tmp_path / "s" / "relay", lambda data: data) as listener:
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(listener.path))
            caller.sendall(start)
        assert relay.ask(listener.path, b"next") == b"next"


def test_one_request_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def answer(data: bytes) -> bytes:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        with lock:
            inside -= 1
        return data

    with relay.Listener(tmp_path / "s" / "relay", answer) as listener:
        found: list[bytes] = []
        callers = [
            threading.Thread(target=lambda at=at: found.append(relay.ask(listener.path, bytes([at]))))
            for at in range(8)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert sorted(found) == [bytes([at]) for at in range(8)]
    assert most == 1


@pytest.mark.skipif(not relay._FOLDERS.is_dir(), reason="this system takes short names only")
def test_a_folder_with_a_long_name(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 60) / ("x" * 120) / "relay"
    opened = len(os.listdir(relay._FOLDERS))
    with relay.Listener(path, lambda data: data[::-1]) as listener:
        assert relay.ask(path, b"abc") == b"cba"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not listener.path.exists()
    with pytest.raises(relay.Unreachable):
        relay.ask(path, b"abc")
    with pytest.raises(relay.Unreachable):
        relay.ask(path.parent / "away" / "relay", b"abc")
    assert len(os.listdir(relay._FOLDERS)) == opened, "no folder is left open"


def test_a_name_too_long_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StateError, match="too long"):
        relay.Listener(tmp_path / ("x" * 120), lambda data: data)
    monkeypatch.setattr(relay, "_FOLDERS", tmp_path / "none")
    with pytest.raises(StateError, match="too long"):
        relay.Listener(tmp_path / ("x" * 120) / "relay", lambda data: data)


def test_a_socket_that_a_killed_service_left_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "relay"))
    with relay.Listener(folder / "relay", lambda data: data) as listener:
        assert relay.ask(listener.path, b"alive") == b"alive"


def test_a_request_that_says_it_is_too_long_is_not_read(tmp_path: Path) -> None:
    asked: list[int] = []

    def answer(data: bytes) -> bytes:
        asked.append(len(data))
        return data

    with relay.Listener(tmp_path / "own" / "site", answer, largest=100):
        for length in (101, 1 << 34, (1 << 64) - 1):
            with socket.socket(socket.AF_UNIX) as caller:
                caller.settimeout(60)
                caller.connect(str(tmp_path / "own" / "site"))
                caller.sendall(struct.pack("<Q", length))
                assert caller.recv(1) == b"", "hung up without waiting for the rest"
        assert relay.ask(tmp_path / "own" / "site", b"x" * 100) == b"x" * 100
    assert asked == [100]
