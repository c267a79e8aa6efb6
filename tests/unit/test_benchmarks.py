"""The benchmarks do the job they say: contestants train the same tensors on the same images. No time is asserted."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import (
    anew,
    apart,
    clock,
    data_path,
    deployment,
    flower,
    frame,
    growth,
    inside,
    job,
    limit,
    measure,
    page,
    plain,
    rounds,
)
from benchmarks.frame import Estimate, Result, Row, Scale
from benchmarks.job import Job
from consilium import config
from consilium.experiment import assemble

SMALL = Job(2, 6, 2, 2)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """The job of the benchmarks with a smaller backbone, in a folder of its own."""
    monkeypatch.setattr(job, "FOLDER", tmp_path)
    monkeypatch.setattr(job, "BACKBONE", "test_vit")
    monkeypatch.setattr(job, "SIZE", 32)
    monkeypatch.setattr(job, "BATCH", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield SMALL
    torch.set_num_threads(before)


def test_contestants_take_turns_and_a_ratio_is_of_neighbours() -> None:
    order: list[str] = []

    def contestant(name: str, value: float) -> Any:
        return lambda: order.append(name) or value * len(order)

    samples = frame.alternate({"a": contestant("a", 1.0), "b": contestant("b", 2.0)}, repeats=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert samples == {"a": [3.0, 5.0], "b": [8.0, 12.0]}
    assert frame.ratio(samples["b"], samples["a"]) == Estimate((8 / 3 + 12 / 5) / 2, 12 / 5, 8 / 3)


@pytest.mark.parametrize(("way", "value", "met"), [("<=", 1.05, True), ("<=", 1.06, False), (">=", 1.05, True)])
def test_a_target_is_met_by_the_median(way: Any, value: float, met: bool) -> None:
    assert Row("a", Estimate(value, 0, 9), target=(way, 1.05)).met is met
    assert Row("a", Estimate(value, 0, 9)).met is None


def test_a_command_is_charged_for_all_its_processes_and_leaves_none() -> None:
    inner = "x = bytearray(120_000_000); import time; time.sleep(30)"
    outer = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True)\n"
        f"print(os.environ['{measure.MARK}']); time.sleep(1.2)"
    )
    cost = measure.command([sys.executable, "-c", outer])
    assert cost.peak_bytes > 120_000_000
    assert cost.processes == 2
    assert measure.marked(cost.output.strip()) == []
    assert measure.MARK not in os.environ


def test_a_command_that_fails_says_what_it_wrote() -> None:
    with pytest.raises(RuntimeError, match="patience"):
        measure.command([sys.executable, "-c", "raise SystemExit('out of patience')"])


def test_the_job_has_as_many_images_as_it_says_and_is_what_a_user_would_write(small: Job, tmp_path: Path) -> None:
    prepared = small.prepare()
    assert [len(getattr(data, part)) for data in prepared.sites.values() for part in ("train", "val", "test")] == (
        [6, 2, 2] * 2
    )
    (tmp_path / "federation.toml").write_text(job.toml(small.table()))
    assert config.load(tmp_path / "federation.toml") == small.config()


def test_the_plain_loop_is_the_function_that_the_federation_trains(small: Job) -> None:
    settings, classes = small.config(), small.prepare().classes
    experiment, loop = assemble(settings, classes), plain.ours(settings, classes)
    variables = experiment.model.initial(0)
    assert sorted(map(tuple, (spec.shape for spec in experiment.model.specs.values()))) == sorted(
        tuple(each.shape) for each in loop.trained
    )
    images, labels = next(plain.batches(limit.pooled(small, 12), loop.preprocessing, 0))
    body, head = loop.forward.children()  # type: ignore[attr-defined]
    names = [name for name, spec in experiment.model.specs.items() if spec.tag.role == "head"]
    head.load_state_dict({name.rpartition(".")[2]: variables[name] for name in names})
    torch.testing.assert_close(loop.forward(images), experiment.model.forward(variables, images))
    before = [each.detach().clone() for each in loop.trained]
    assert math.isfinite(float(loop.step(images, labels)))
    assert all(not torch.equal(old, new) for old, new in zip(before, loop.trained, strict=True) if new.grad.any())
    assert not any(each.requires_grad for each in body.parameters() if not any(each is one for one in loop.trained))


def test_peers_train_as_many_parameters(small: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    loop = plain.ours(small.config(), small.prepare().classes)
    count = sum(each.numel() for each in loop.trained)
    assert sum(each.numel() for each in plain.with_peft(4, loop.preprocessing).trained) == count
    monkeypatch.syspath_prepend(str(measure.ROOT / "benchmarks" / "flower_app"))
    theirs = importlib.import_module("bench_app.model")
    described = json.loads(json.dumps(flower.describe(small)))
    model = theirs.build(described)
    assert sum(each.numel() for each in model.parameters() if each.requires_grad) == count
    loss, steps, images = theirs.train_epoch(model, theirs.load_split(described, 1, "train"), described, 0)
    assert (steps, images) == (2, 6)
    assert math.isfinite(loss)
    assert math.isfinite(theirs.evaluate(model, theirs.load_split(described, 1, "val"), described)[0])


def test_a_round_is_measured_without_a_gap(small: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "Job", lambda *_: small)
    result = rounds.run(Scale(quick=True))
    assert result.facts["steps per round"] == 4
    assert result.facts["not found"] == []
    shares = [row.measured.value for row in result.rows if row.what.startswith("share")]
    assert sum(shares) == pytest.approx(100)
    assert min(shares) > 0


def test_a_clock_counts_an_inner_call_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    found = clock.Clock()
    inner = found.wrap(lambda: next(ticks), "inner")
    outer = found.wrap(lambda: [inner(), inner()], "outer")
    outer()
    assert found.calls == {"inner": 2, "outer": 1}
    assert found.take() == {"inner": 4.0, "outer": 3.0}
    assert found.take() == {}


def test_what_the_product_no_longer_has_is_named() -> None:
    with clock.watching({"x": (("consilium.coordinator", "no_such_function"),)}) as found:
        pass
    assert found.missing == ["consilium.coordinator.no_such_function"]


def test_made_sites_train_what_they_say_and_copies_do_the_same(small: Job) -> None:
    pytest.importorskip("peft")
    classes, sites = small.prepare().classes, inside.made_sites(small, 3, 5, 2)
    found = inside.federate(small.config(train={"rounds": 2}), sites, classes)
    loop = plain.Copies(sites, len(classes), found.experiment.backbone.preprocessing)
    assert min(loop.round(), loop.round()) > 0
    assert found.images == loop.images == [15, 15]
    assert found.steps == [6, 6]
    assert loop.parameters == sum(torch.Size(spec.shape).numel() for spec in found.experiment.model.specs.values())
    assert all(map(math.isfinite, [*found.losses, *loop.losses]))
    assert not inside.same_bits(found.shared, {name: value + 1 for name, value in found.shared.items()})


@pytest.mark.parametrize("name", bench.MODULES)
def test_every_benchmark_goes_by_its_name(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{bench.MODULES[name]}")
    assert module.NAME == name  # noqa: SIM300
    assert module.TITLE
    assert callable(module.run)


def test_files_and_store_give_as_many_images(small: Job) -> None:
    examples = limit.pooled(small, 8)
    files = data_path.encoded(4)
    preprocessing = plain.ours(small.config(), small.prepare().classes).preprocessing
    assert data_path._through_store(examples, preprocessing) > 0
    assert all(data_path._through_files(found, preprocessing) > 0 for found in files.values())


def test_an_exponent_is_the_slope_of_logarithms() -> None:
    assert growth.exponent([1, 10, 100], [3, 300, 30_000]) == pytest.approx(2)


def test_results_are_kept_per_benchmark_and_a_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = Result()
    result.add("a ratio", Estimate(2.0, 1.5, 2.5), target=("<=", 3.0))

    def broken(_: Scale) -> Result:
        raise ValueError("no luck")

    target = tmp_path / "results.json"
    monkeypatch.setattr(rounds, "run", lambda _: result)
    monkeypatch.setattr(limit, "run", broken)
    assert bench.run(["round"], Scale(True), target) is False
    assert bench.run(["limit"], Scale(True), target) is True
    kept = json.loads(target.read_text())
    assert list(kept) == ["limit", "round"]  # in the order of the table
    assert "no luck" in kept["limit"]["failed"]
    text = page.renewed(f"by hand\n{page.START}\nold\n{page.END}\nand this\n", kept)
    assert text.startswith("by hand\n")
    assert text.endswith("\nand this\n")
    assert "| a ratio | at most 3 x | 2 (1.5 to 2.5) x | yes |" in text.replace("\N{MULTIPLICATION SIGN}", "x")
    assert "old" not in text


def test_the_page_shows_the_results_that_lie_beside_it() -> None:
    found = json.loads(page.RESULTS.read_text())
    assert page.PAGE.read_text() == page.renewed(page.PAGE.read_text(), found)
    own = {name: found[name] for name in ("deployment",) if name in found}
    assert page.APART.read_text() == page.renewed(page.APART.read_text(), own)
    assert not any("failed" in entry for entry in found.values())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0031, "1.0031"),
        (1.0, "1"),
        (1.251, "1.25"),
        (0.0123, "0.0123"),
        (3351.783, "3,352"),
        (12.0, "12"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert page.number(value) == text


def test_a_hospital_that_asks_its_service_imports_no_more_than_one_of_the_package() -> None:
    code = "import sys; from benchmarks import anew; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_growth_of_memory_is_a_slope_and_a_process_has_memory() -> None:
    assert deployment.slope([3.0, 5.0, 7.0]) == pytest.approx(2.0)
    found = deployment.Watched(memory=[9, 9, 9, 100, 101, 102], events=[])
    assert found.growth == pytest.approx(1.0)  # the first rounds are warm-up
    assert apart.resident_bytes(os.getpid()) > 10e6
    assert 0.1 < anew.age() < 24 * 3600
