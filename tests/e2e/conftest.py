"""One warm parent of processes, and runs that were left alone, to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import processes, runs


@pytest.fixture(scope="session")
def consilium(tmp_path_factory: pytest.TempPathFactory, _own_cache: None) -> Iterator[processes.Parent]:
    """Calls the command line in a process of its own."""
    with processes.parent(tmp_path_factory.mktemp("processes")) as made:
        yield made


@pytest.fixture(scope="session")
def finished(consilium: processes.Parent, tmp_path_factory: pytest.TempPathFactory) -> runs.Finished:
    """Run folders of the kinds in `runs.KINDS`, finished without a disturbance; for reading only."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            done = consilium(*runs.words(folder, *runs.KINDS[kind]), "--quiet", "--out", folder / "out")
            assert (done.code, done.stderr) == (0, ""), done
            made[kind] = folder / "out"
        return made[kind]

    return run
