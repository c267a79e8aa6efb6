"""What `deploy init` writes for the system, what verbs of a hospital say to a new engineer, and true exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from consilium.deployment import board, files, init, reach, services
from consilium.engines.kept import claimed
from tests.commands import call
from tests.hospitals_apart import FEDERATION, SITE, Apart, made


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    apart = made(tmp_path_factory.mktemp("finished"), FEDERATION.replace("rounds = 3", "rounds = 1"))
    apart.conduct()
    return apart


# ------------------------------------------------------------------------------------------------ what is written
def test_every_script_and_unit_is_silent_towards_the_internet(finished: Apart) -> None:
    written = [*finished.folder.glob("*/start.sh"), *finished.folder.glob("*/systemd/*.service")]
    assert len(written) == 4 + 1 + 3 * 2
    for path in written:
        lines = path.read_text().splitlines()
        assert all(any(line.endswith(f"{key}={value}") for line in lines) for key, value in services.OFFLINE.items())


def test_scripts_are_for_a_plain_shell(finished: Apart) -> None:
    for path in finished.folder.glob("*/*.sh"):
        assert path.stat().st_mode & 0o100
        assert subprocess.run(["sh", "-n", path], check=False).returncode == 0


def test_users_have_a_home_that_is_theirs_and_check_has_the_cache_of_the_service(finished: Apart) -> None:
    """As `site check` writes the cache of images that the service then reads."""
    script = (finished.at("alpine") / "install.sh").read_text()
    reads = unit(finished.at("alpine") / "systemd" / "consilium-site-alpine.service")
    assert '--home-dir "/var/lib/$user"' in script
    cache = "/var/cache/consilium/alpine"
    assert f"env XDG_CACHE_HOME={cache} {services.PROGRAM} site check" in script
    assert (
        f"Environment=XDG_CACHE_HOME={cache}"
        in (finished.at("alpine") / "systemd" / "consilium-site-alpine.service").read_text()
    )
    assert reads["CacheDirectory"] == "consilium/alpine"


def unit(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line and line[0] != "#")


def test_who_reads_images_has_no_network_and_who_has_it_is_another_user(finished: Apart) -> None:
    folder = finished.at("alpine") / "systemd"
    reads = unit(folder / "consilium-site-alpine.service")
    speaks = unit(folder / "consilium-node-alpine.service")
    assert (reads["PrivateNetwork"], reads["RestrictAddressFamilies"]) == ("yes", "AF_UNIX")
    assert reads["User"] != speaks["User"] == reads["ExecStart"].split()[-1]
    assert reads["ExecStart"].split("--socket ")[1].split()[0] == speaks["ExecStart"].split("--socket ")[1]
    assert speaks["ReadWritePaths"].split("/")[3] != reads["ReadWritePaths"].split("/")[3]
    for each in (reads, speaks, unit(finished.at("coordinator") / "systemd" / "consilium-coordinator.service")):
        assert (each["Restart"], each["RestartPreventExitStatus"], each["NoNewPrivileges"]) == ("always", "2", "yes")


def test_words_of_the_units_are_words_of_the_command_line(finished: Apart, capsys: pytest.CaptureFixture[str]) -> None:
    for path in finished.folder.glob("*/systemd/*.service"):
        _, *words = unit(path)["ExecStart"].split()
        assert call(*words) == 2  # of folders that are not there
        assert ".toml in it" in capsys.readouterr().err


def test_the_system_itself_reads_the_units(finished: Apart, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("no systemd here")
    for path in finished.folder.glob("*/systemd/*.service"):
        copy = tmp_path / path.name
        copy.write_text(path.read_text().replace(services.PROGRAM, "/bin/true"))
        done = subprocess.run([program, "verify", copy], capture_output=True, text=True, check=False)
        assert (done.returncode, [line for line in done.stderr.splitlines() if path.name in line]) == (0, [])


@pytest.mark.parametrize("name", ["a b", "a%n", "$(id)", "-x", "ä", "a;b", "a\nb", "x" * 65])
def test_names_that_a_script_or_a_unit_would_read_otherwise(name: str, tmp_path: Path) -> None:
    text = FEDERATION.replace('"prairie"]', json.dumps(name, ensure_ascii=False) + "]")
    (tmp_path / "federation.toml").write_text(text, encoding="utf-8")
    assert call("deploy", "init", tmp_path / "federation.toml", "--out", tmp_path / "made") == 2
    assert not (tmp_path / "made").exists()


# ------------------------------------------------------------------------------------------------ at a hospital
def test_what_is_kept_is_shown_and_deleted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apart = made(tmp_path, FEDERATION.replace("rounds = 3", "rounds = 1"))
    apart.conduct()
    folder = apart.at("alpine")
    (run,) = (each.name for each in (folder / "state").glob("*/"))
    assert call("site", "states", folder, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["run"] == run
    assert row["bytes"] > 0
    for wrong in ("0" * 16, "..", ".", "", f"{run}/answers"):
        assert call("site", "states", folder, "--delete", wrong, "--yes") == 2
    with claimed(folder / "state"):
        assert call("site", "states", folder, "--delete", run, "--yes") == 1
    assert "another process serves" in capsys.readouterr().err
    assert call("site", "states", folder, "--delete", run, "--yes") == 0
    assert not (folder / "state" / run).exists()
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["event"] == "deleted"
    capsys.readouterr()
    assert call("site", "states", folder) == 0
    assert "nothing is kept" in capsys.readouterr().out


def test_deleting_asks_first(finished: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished.at("harbour")
    (run,) = (each.name for each in (folder / "state").glob("*/"))
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    assert call("site", "states", folder, "--delete", "0" * 16) == 2  # nobody is asked of what is not there
    assert call("site", "states", folder, "--delete", run) == 1
    assert (folder / "state" / run).is_dir()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--socket", "/tmp/x"), "belong to --service-only"),
        (("--node-user", "nobody"), "belong to --service-only"),
        (("--service-only", "--node-user", "no-such-user"), "no user of this name"),
    ],
)
def test_a_service_that_cannot_be_asked(
    words: tuple[str, ...], said: str, finished: Apart, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("site", "join", finished.at("alpine"), *words) == 2
    assert said in capsys.readouterr().err


def test_a_node_without_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apart = made(tmp_path)
    (apart.at("alpine") / "keys" / "node.key").unlink()
    assert call("site", "node", apart.at("alpine")) == 2
    assert "node.key" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ exit codes
@pytest.mark.parametrize(
    ("state", "code"), [("finished", 0), ("failed", 1), ("died", 1), ("starting", 3), ("running", 3)]
)
def test_status_says_how_the_run_stands(state: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text(FEDERATION)
    (tmp_path / "own.toml").write_text(SITE)
    folder = init.init(tmp_path / "federation.toml", tmp_path / "made", tmp_path / "own.toml")[0]
    assert call("coordinator", "status", folder) == 1  # no run was begun
    time = {"starting": board.now(), "running": board.now()}.get(state, "2020-01-01T00:00:00+00:00")
    table = {"state": "running" if state == "died" else state, "round": 1, "sites": {}, "time": time}
    (folder / board.STATUS).write_text(json.dumps(table))
    assert call("coordinator", "status", folder) == code
    assert call("coordinator", "status", folder, "--json") == code


def test_words_and_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = made(tmp_path)
    away = [reach.Finding("connection", "bad", "nobody listens")]
    monkeypatch.setattr(reach, "connection", lambda *_: away)
    leader, site = apart.at("coordinator"), apart.at("alpine")
    assert call("coordinator", "start", tmp_path / "nowhere") == 2
    assert call("coordinator", "submit", tmp_path / "nowhere") == 2
    assert call("coordinator", "status", tmp_path / "nowhere") == 2
    assert call("coordinator", "stop", tmp_path / "nowhere") == 2
    assert call("coordinator", "stop", leader) == 1
    assert call("coordinator", "resume", leader) == 1
    assert call("coordinator", "enrol", leader, "stranger", site / "keys" / "node.key.pub") == 2
    assert call("site", "join", tmp_path / "nowhere") == 2
    assert call("site", "check", site) == 1
    assert call("site", "approve", site, "--by", "me", "--yes", "--digest", "0" * 64) == 2
    (site / "journal.jsonl").write_text("{}\n")
    assert call("site", "audit-log", site) == 1
    (site / files.SITE).write_text("site = ")
    assert call("site", "states", site) == 2
