"""The rehearsal of docs/deployment.md, word by word: its files, its commands in their order, as real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")

from consilium import checkpoint, config
from consilium import run as simulation
from consilium.deployment import keeping, processes
from consilium.errors import StateError

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8").split("## 2. ")[0]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
STAYS = {"start.sh": "ready", "--page": "http://"}  # what is in a command that stays, and what it says when it is up
PATIENCE = 900.0  # seconds, on a machine with much else to do


@dataclass
class Reader:
    """Somebody who follows the guide in an empty folder; terminals stay open until the end."""

    folder: Path
    ports: dict[str, str]  # those of the guide may be taken here
    terminals: dict[str, tuple[subprocess.Popen[bytes], Path]] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        program = self.folder / "bin" / "consilium"
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m consilium "$@"\n')
        program.chmod(0o755)
        path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
        packages = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        cache = {"XDG_CACHE_HOME": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **cache, "PATH": path, "PYTHONPATH": packages}

    def save(self, name: str, text: str) -> None:
        (self.folder / name).write_text(self.here(text))

    def here(self, text: str) -> str:
        for old, new in self.ports.items():
            text = text.replace(old, new)
        return text

    def type(self, line: str) -> None:
        """One line of a sh block."""
        line = self.here(line)
        if any(sign in line for sign in STAYS):
            self.open(line)
        else:
            self.call(line)
        self.done.append(line)

    def call(self, line: str, code: int = 0) -> str:
        done = subprocess.run(
            line,
            shell=True,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == code, f"{line}\n{done.stdout}\n{done.stderr}\n{self.said()}"
        return done.stdout

    def open(self, line: str) -> None:
        out = self.folder / f"terminal-{len(self.terminals)}"
        with out.open("wb") as file:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {line}"], cwd=self.folder, env=self.environment, stdout=file, stderr=file
            )
        self.terminals[line] = process, out

    def wait(self) -> None:
        """Until all open terminals say that they are up."""
        end = time.monotonic() + PATIENCE
        for line, (process, out) in self.terminals.items():
            up = next(said for sign, said in STAYS.items() if sign in line)
            while up not in out.read_text():
                assert process.poll() is None, f"{line} ended: {out.read_text()}"
                assert time.monotonic() < end, f"{line} never said {up}: {out.read_text()}"
                time.sleep(0.1)

    def close(self, line: str) -> int:
        """Ctrl-C; the exit code."""
        process, _ = self.terminals.pop(line)
        process.send_signal(signal.SIGINT)
        return process.wait(PATIENCE)

    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in self.folder.glob("terminal-*"))


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    ports = {":9092": f":{processes.free_port()}", "8080": str(processes.free_port())}
    found = Reader(tmp_path / "r", ports)
    try:
        yield found
    finally:
        for line in list(found.terminals):
            found.close(line)


def follow(reader: Reader) -> None:
    """All blocks of the guide in their order; a toml block is the file named last before it."""
    before = 0
    for block in BLOCK.finditer(GUIDE):
        kind, text = block.groups()
        if kind == "toml":
            reader.save(re.findall(r"`(\w+\.toml)`", GUIDE[before : block.start()])[-1], text)
        else:
            assert kind == "sh"
            for line in text.splitlines():
                reader.type(line)
            reader.wait()
        before = block.end()


def in_one_process(reader: Reader, folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of the last checkpoint of the same federation as a simulation."""
    tables = [config.config_file.read(reader.folder / name) for name in ("federation.toml", "own.toml")]
    agreed, own = ({key: each for key, each in table.items() if key not in ("deployment", "gate")} for table in tables)
    out = simulation.run(config.from_dict({**agreed, **own}), folder)
    return checkpoint.load(max((out / "checkpoints").glob("*.safetensors")))[0]


def test_the_guide_followed_word_by_word(reader: Reader, tmp_path: Path) -> None:
    follow(reader)
    made = reader.folder / "made"
    assert "consilium coordinator submit made/coordinator --wait" in reader.done
    page = next(line for line in reader.terminals if "--page" in line).split()[-1]
    source = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{page}/status.json').read().decode())"
    table = json.loads(reader.call(f'{sys.executable} -c "{source}"'))
    assert (table["state"], table["closed"]) == ("finished", 2)

    ours = checkpoint.load(max((made / "coordinator" / "run" / "checkpoints").glob("*.safetensors")))[0]
    theirs = in_one_process(reader, tmp_path / "here")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    (kept,) = (made / "alpine" / "state").glob("*/")
    with pytest.raises(StateError, match="another process serves"):
        keeping.delete(made / "alpine", kept.name)
    assert [reader.close(line) for line in list(reader.terminals)] == [0] * 5
    keeping.delete(made / "alpine", kept.name)
    assert not kept.exists()
    assert not (made / "alpine" / "report.html").exists()
    assert '"kind":"finish"' in (made / "alpine" / "journal.jsonl").read_text()
