"""The script behind `make demo`: which Python it takes, and what it says where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "environment.sh"


def _make(folder: Path, path: str, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": str(folder.parent), **extra}
    return subprocess.run(["sh", str(SCRIPT), str(folder)], env=environment, capture_output=True, text=True)


def _stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_a_python_that_does_not_suit_is_passed_over(tmp_path: Path) -> None:
    _stub(tmp_path / "bin", "python3", "exit 1")
    _stub(tmp_path / "bin", "python3.12", f'exec {sys.executable} "$@"')
    done = _make(tmp_path / "made", f"{tmp_path / 'bin'}:{os.defpath}")
    assert done.returncode == 0, done.stderr
    pip = subprocess.run([tmp_path / "made/bin/python", "-m", "pip", "--version"], capture_output=True, check=True)
    assert b"pip" in pip.stdout


def test_without_a_suitable_python_the_message_says_what_to_install(tmp_path: Path) -> None:
    _stub(tmp_path / "bin", "old", "exit 1")
    done = _make(tmp_path / "made", f"{tmp_path / 'bin'}:{os.defpath}", PYTHON="old")
    assert done.returncode == 1
    assert "Python 3.11, 3.12 or 3.13" in done.stderr
    assert "apt install python3 python3-venv" in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = _make(tmp_path / "mine", os.defpath, PYTHON=sys.executable)
    assert done.returncode == 1
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
