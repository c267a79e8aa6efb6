"""Runs start as room allows, and none is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from consilium.config import Config
from consilium.study.file import ResourcesConfig
from consilium.study.local_pool import Ends
from consilium.study.prepare import Job
from consilium.study.runner import Room, carry_out, free_memory, room_here
from consilium.study.work import Task


def job(name: str, cores: int = 1, memory: int = 1, references: str = "", device: str = "cpu") -> Job:
    needs = {"cores": cores, "memory_bytes": memory, "device": device, "references": frozenset(references)}
    return Job(name, {"axis": name}, 0, Config(), **needs)  # type: ignore[arg-type]


class Pool:
    """Ends one run at a time, the latest first, and remembers which ran together."""

    def __init__(self, fails_at: str = "") -> None:
        self.running: list[str] = []
        self.together: list[str] = []
        self.order, self.fails_at, self.stopped = "", fails_at, False

    def submit(self, task: Task) -> None:
        self.running.append(task.run)
        self.order += task.run

    def wait(self, seconds: float) -> Ends:
        assert seconds > 0
        self.together.append("".join(sorted(self.running)))
        if self.running[-1] == self.fails_at:
            raise KeyboardInterrupt
        run = self.running.pop()
        return [(run, "lost" if run == "z" else None)]

    def stop(self) -> None:
        self.stopped = True


class Watch:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str | None]] = []

    def started(self, job: Job) -> None:
        self.seen.append((job.run, "started"))

    def ended(self, job: Job, error: str | None) -> None:
        self.seen.append((job.run, error))


ROOM = Room(runs=10, cores=4, memory_bytes=10, gpu_bytes=5)


def together(jobs: list[Job], room: Room = ROOM) -> list[str]:
    pool = Pool()
    carry_out(jobs, Path("out"), room, pool, Watch())
    assert sorted(pool.order) == sorted(job.run for job in jobs)
    assert pool.stopped
    return pool.together


def test_as_many_run_together_as_the_scarcest_resource_allows() -> None:
    small = [job(name) for name in "abcdef"]
    assert together(small)[0] == "abcd"
    assert together(small, replace(ROOM, runs=2))[0] == "ab"
    assert together([job(name, cores=2) for name in "abc"])[0] == "ab"
    assert together([job(name, memory=4) for name in "abc"])[0] == "ab"
    assert together([job(name, memory=4, device="cuda") for name in "abc"])[0] == "a"


def test_what_is_too_large_for_the_machine_runs_alone_and_smaller_ones_go_before() -> None:
    assert together([job("a"), job("b", cores=9), job("c")]) == ["ac", "a", "b"]


def test_runs_that_train_the_same_reference_follow_one_another_where_others_can_go_first() -> None:
    jobs = [job("a", references="x"), job("b", references="x"), job("c", references="y"), job("d")]
    assert together(jobs, replace(ROOM, runs=2))[0] == "ac"
    assert together(jobs[:2], replace(ROOM, runs=2)) == ["ab", "a"]  # better twice than idle


def test_what_ends_is_told_and_an_interrupt_stops_all() -> None:
    watch, pool = Watch(), Pool(fails_at="b")
    with pytest.raises(KeyboardInterrupt):
        carry_out([job("b"), job("z")], Path("out"), ROOM, pool, watch)
    assert watch.seen == [("b", "started"), ("z", "started"), ("z", "lost")]
    assert pool.stopped


def test_the_study_may_take_less_or_more_than_is_there() -> None:
    jobs = [job("a", cores=64), job("b", cores=64)]
    assert room_here(ResourcesConfig(), jobs).runs == 2
    assert room_here(ResourcesConfig(memory=123), jobs).memory_bytes == 123  # type: ignore[arg-type]
    forced = room_here(ResourcesConfig(workers=2), jobs)
    assert (forced.runs, forced.cores) == (2, 128)
    assert ROOM.within(ResourcesConfig(workers=3)) == replace(ROOM, runs=3)
    assert ROOM.within(ResourcesConfig(memory=3)) == replace(ROOM, memory_bytes=3)  # type: ignore[arg-type]
    assert ROOM.within(ResourcesConfig()) == ROOM


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup/memory").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  900 kB\nMemAvailable:  100 kB\n")
    return tmp_path


def test_free_memory_is_what_the_machine_and_the_container_leave(machine: Path) -> None:
    group = machine / "sys/fs/cgroup"
    assert free_memory(machine) == 102400
    for name, text in {"max": "max\n", "current": "50\n", "stat": "anon 3\ninactive_file 7\n"}.items():
        (group / f"memory.{name}").write_text(text)
    assert free_memory(machine) == 102400
    (group / "memory.max").write_text("1000\n")
    assert free_memory(machine) == 957
    for name, text in {"limit_in_bytes": "90", "usage_in_bytes": "20", "stat": "total_inactive_file 1"}.items():
        (group / f"memory/memory.{name}").write_text(text)
    assert free_memory(machine) == 71


def test_where_the_system_does_not_say_the_physical_memory_counts(tmp_path: Path) -> None:
    assert free_memory(tmp_path) > 2**20
