"""A machine of its own: systemd as process 1 of namespaces, over a copy of this one's disk that only it sees.

All that is written goes to memory, the network holds the loopback alone, system settings are read-only. Only units that
somebody installs there are started, with the few targets that these name. It ends, with all of its processes, when who
made it ends, however that happens; of one that is killed an empty control group stays. Process 1 has no right to set
the clock, load modules, make devices, or start the machine anew.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from consilium.deployment import processes, services

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0  # seconds after which a test gives up waiting
SYSTEMD = next((path for path in ("/lib/systemd/systemd", "/usr/lib/systemd/systemd") if Path(path).is_file()), "")
TOOLS = ("unshare", "nsenter", "setpriv", "mount", "umount", "pivot_root", "systemctl", "useradd", "runuser")
SPACES = ["--mount", "--net", "--uts", "--ipc", "--pid"]
TARGETS = ("sysinit", "basic", "multi-user", "network-online", "shutdown", "umount")
NODES = ("null", "zero", "full", "random", "urandom", "tty")
LOST_RIGHTS = "-sys_time,-sys_module,-sys_boot,-sys_rawio,-syslog,-mknod,-wake_alarm,-mac_admin,-mac_override"
UNITS = "SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/targets"  # and none of those that this machine has
OUTPUT = "[Service]\nStandardOutput=append:/run/said/%n\nStandardError=inherit\n"  # there is no journal of systemd
REFUSED = 77  # exit code where this system refuses a step
CGROUP = 0x02000000  # of Linux's unshare: a view of control groups that begins at one's own
Done = subprocess.CompletedProcess[str]


def lacking() -> str:
    """What is missing for such a machine; nothing where all is there."""
    missing = [name for name in TOOLS if shutil.which(name) is None] + ([] if SYSTEMD else ["systemd"])
    return ", ".join(missing + ([] if os.geteuid() == 0 else ["root"]))


@dataclass(frozen=True)
class Machine:
    """What runs there is asked by commands, each in all of its namespaces."""

    init: int  # process 1, as it is called outside
    folder: Path  # the one folder that is the same outside

    def __call__(self, *words: object, patience: float = PATIENCE) -> Done:
        """A command as root, to its end."""
        enter = ["nsenter", "--target", str(self.init), *SPACES, "--cgroup", "--"]
        command = [*enter, *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=patience, env=environment(), check=False, cwd="/"
        )

    def well(self, *words: object, patience: float = PATIENCE) -> str:
        """The same; it must end with 0."""
        done = self(*words, patience=patience)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.told()}"
        return done.stdout

    def user(self, name: str, *words: object, patience: float = PATIENCE) -> Done:
        """A command as one of its users."""
        return self("runuser", "-u", name, "--", *words, patience=patience)

    def path(self, path: str | Path) -> Path:
        """A file of it, as seen from outside."""
        return Path(f"/proc/{self.init}/root") / str(path).lstrip("/")

    def wait(self, until: Callable[[], Any], what: str, patience: float = PATIENCE) -> None:
        end = time.monotonic() + patience
        while not until():
            assert time.monotonic() < end, f"waited {patience:g} s for {what}\n{self.told()}"
            time.sleep(0.2)

    def told(self) -> str:
        """What units and systemd wrote, for a test that fails."""
        files = [*self.path("/run/said").glob("*"), self.folder / "kmsg"]
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)


def environment() -> dict[str, str]:
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


@contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """One that has begun; skips where this system refuses namespaces. `folder` is there too, under the same name."""
    if missing := lacking():
        pytest.skip(f"a machine with systemd needs {missing}")
    probe = subprocess.run(["unshare", *SPACES, "true"], capture_output=True, text=True, timeout=60, check=False)
    if probe.returncode:
        pytest.skip(f"this system refuses namespaces: {probe.stderr.strip()}")
    group = f"consilium-units-{os.getpid()}"
    command = ["unshare", *SPACES, "--fork", "--kill-child", sys.executable, "-m", __name__, str(folder), group]
    with (folder / "begun").open("w+") as out:
        outer = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=_killed_with_parent
        )
    try:
        made = Machine(_begun(outer, folder), folder)
        made.wait(lambda: _is_up(outer, made), "systemd")
        yield made
    finally:
        outer.kill()
        outer.wait()
        sweep = ["unshare", "--mount", sys.executable, "-m", __name__, "--sweep", group]
        subprocess.run(sweep, cwd=ROOT, check=True, timeout=60)


def _killed_with_parent() -> None:
    processes._LIBC.prctl(processes._PARENT_DIED, signal.SIGKILL)


def _begun(outer: subprocess.Popen[bytes], folder: Path) -> int:
    """Process 1 of the namespaces, once it is systemd; skips where a step before was refused."""
    end = time.monotonic() + PATIENCE
    while outer.poll() is None:
        for child in children(outer.pid):
            with suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return child
        assert time.monotonic() < end, (folder / "begun").read_text()
        time.sleep(0.1)
    said = (folder / "begun").read_text()
    assert outer.returncode == REFUSED, said
    pytest.skip(f"this system refuses a machine of its own: {said.strip()}")


def children(of: int) -> list[int]:
    """Processes that a process started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == of:
                found.append(int(entry.name))
    return found


def _is_up(outer: subprocess.Popen[bytes], made: Machine) -> bool:
    assert outer.poll() is None, f"systemd ended\n{(made.folder / 'begun').read_text()}\n{made.told()}"
    return made("systemctl", "is-active", "multi-user.target").stdout.strip() == "active"


# ------------------------------------------------------------------------------------------------ in there
def main(folder: Path, group: str) -> None:
    """As process 1: make the machine, and become its systemd."""
    try:
        root = _disk(folder)
        _settings(root, group)
        _devices(root, folder)
        _programs(root)
        (root / "old").mkdir()
        _do("pivot_root", root, root / "old")
        os.chdir("/")
        _do("umount", "--lazy", "/old")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{error} {getattr(error, 'stderr', '')}", flush=True)
        sys.exit(REFUSED)
    own = {"container": "consilium-test", **dict([UNITS.split("=")])}
    none = dict.fromkeys(("SYSTEMD_GENERATOR_PATH", "SYSTEMD_ENVIRONMENT_GENERATOR_PATH"), "/run/none")
    words = ["setpriv", "--bounding-set", LOST_RIGHTS, SYSTEMD, "--system", "--unit=multi-user.target"]
    os.execvpe(words[0], [*words, "--log-target=kmsg", "--show-status=no"], {**environment(), **own, **none})


def _do(*words: object) -> None:
    subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True, timeout=60)


def _disk(folder: Path) -> Path:
    """This machine's disk, copied when it is written to. What else of it is needed may lie on other disks."""
    base = Path("/mnt")
    _do("mount", "--make-rprivate", "/")
    _do("mount", "-t", "tmpfs", "none", base)
    for name in ("upper", "work", "root"):
        (base / name).mkdir()
    root = base / "root"
    _do("mount", "-t", "overlay", "none", "-o", f"lowerdir=/,upperdir={base}/upper,workdir={base}/work", root)
    needed = {Path(sys.executable).resolve(), Path(sys.prefix), Path(sys.base_prefix), ROOT}
    for path in [*needed, folder]:
        there = root / str(path).lstrip("/")
        if path == folder or path.stat().st_dev != Path("/").stat().st_dev:
            there.mkdir(parents=True, exist_ok=True) if path.is_dir() else None
            _do("mount", "--bind", path, there)
            _do("mount", "-o", "remount,bind,rw" if path == folder else "remount,bind,ro", there)
        for parent in there.relative_to(root).parents:  # users there must find the program
            if path != folder and (root / parent).stat().st_dev == root.stat().st_dev:
                (root / parent).chmod((root / parent).stat().st_mode | 0o011)
    return root


def _settings(root: Path, group: str) -> None:
    """The system's own files: read-only, but for a control group of its own."""
    _do("mount", "-t", "proc", "none", root / "proc")
    _do("mount", "--bind", root / "proc" / "sys", root / "proc" / "sys")
    _do("mount", "-o", "remount,bind,ro", root / "proc" / "sys")
    _do("mount", "-t", "sysfs", "-o", "ro,nosuid,nodev,noexec", "none", root / "sys")
    _do("mount", "-t", "cgroup2", "none", root / "sys" / "fs" / "cgroup")
    own = _group(root / "sys" / "fs" / "cgroup", group)
    own.mkdir()
    (own / "cgroup.procs").write_text("0")
    _do("umount", root / "sys" / "fs" / "cgroup")
    if ctypes.CDLL(None, use_errno=True).unshare(CGROUP):
        raise OSError(ctypes.get_errno(), "unshare the control groups")
    _do("mount", "-t", "cgroup2", "none", root / "sys" / "fs" / "cgroup")


def _group(top: Path, name: str) -> Path:
    """Below the group in which the tests run."""
    own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    return top / own.lstrip("/") / name


def _devices(root: Path, folder: Path) -> None:
    for name in ("run", "dev", "etc/systemd/system"):
        _do("mount", "-t", "tmpfs", "-o", "mode=755", "none", root / name)
    for name in NODES:
        (root / "dev" / name).touch()
        _do("mount", "--bind", f"/dev/{name}", root / "dev" / name)
    for name in ("shm", "pts"):
        (root / "dev" / name).mkdir()
    _do("mount", "-t", "tmpfs", "-o", "mode=1777", "none", root / "dev" / "shm")
    _do("mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "none", root / "dev" / "pts")
    (root / "dev" / "ptmx").symlink_to("pts/ptmx")
    (root / "dev" / "fd").symlink_to("/proc/self/fd")
    (folder / "kmsg").touch()
    (root / "dev" / "kmsg").touch()
    _do("mount", "--bind", folder / "kmsg", root / "dev" / "kmsg")  # systemd writes its own log there


def _programs(root: Path) -> None:
    """The package where units expect it, and the targets that they name."""
    for name in ("targets", "none", "said"):
        (root / "run" / name).mkdir()
    for name in TARGETS:
        (root / "run" / "targets" / f"{name}.target").write_text(
            f"[Unit]\nDescription={name}\nDefaultDependencies=no\n"
        )
    output = root / "run" / "targets" / "service.d" / "output.conf"
    output.parent.mkdir()
    output.write_text(OUTPUT)
    program = root / services.PROGRAM.lstrip("/")
    program.parent.mkdir(parents=True, exist_ok=True)
    program.unlink(missing_ok=True)
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" OMP_NUM_THREADS=1 exec "{sys.executable}" -m consilium "$@"\n')
    for path in (program.parent.parent, program.parent, program):
        path.chmod(0o755)


def sweep(group: str) -> None:
    """Remove the control group of a machine that has ended; nothing is in it. In a view of its own of the disk."""
    _do("mount", "--make-rprivate", "/")
    _do("mount", "-t", "cgroup2", "none", "/mnt")
    for folder, _, _ in os.walk(_group(Path("/mnt"), group), topdown=False):
        _gone(Path(folder))


def _gone(folder: Path, patience: float = 30.0) -> None:
    """Its last processes are dead, and may not yet be taken away."""
    end = time.monotonic() + patience
    while True:
        try:
            return folder.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def run(words: Sequence[str]) -> None:
    sweep(words[1]) if words[0] == "--sweep" else main(Path(words[0]), words[1])


if __name__ == "__main__":
    run(sys.argv[1:])
