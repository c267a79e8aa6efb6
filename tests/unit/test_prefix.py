"""When a prefix is computed, kept, used again and refused; every test compares with the images themselves."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import config
from consilium.data import Batch
from consilium.experiment import Experiment
from consilium.local import kept, predict, prefix, train
from consilium.local.prefix import Prefixes
from consilium.local.train import Trainer
from consilium.protocols import Fitted
from consilium.tensors import Tensors
from tests import federation

EXAMPLES = federation.examples("a", 14, 0)
LAST = [{"name": "lora", "rank": 2, "blocks": [4, 5]}]
LINEAR = [{"name": "linear"}]
DRAWN = [{"name": "stochastic_block", "draw": "cycle", "blocks": [2, 3, 4, 5]}]


@contextmanager
def _reading() -> Iterator[list[int]]:
    """How many images each look into a store took."""
    seen: list[int] = []
    real = predict.read

    def read(examples: Any, rows: Any, device: str) -> Tensor:
        seen.append(len(rows))
        return real(examples, rows, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "read", read)
        patch.setattr(train, "read", read)
        yield seen


def _pieces(tuner: object, cache: Path, **tables: Any) -> Experiment:
    return federation.assemble(federation.configure(tuner=tuner, engine={"cache": str(cache)}, **tables))


def _fits(tuner: object, cache: Path, objective: Any = None, **options: Any) -> tuple[Fitted, Fitted, list[int]]:
    """The same fit without and with prefixes, and the images that the latter read."""
    pieces = _pieces(tuner, cache, train={"local_epochs": 3, **options.pop("train", {})})
    start = {name: value + 0.1 for name, value in pieces.model.initial(3).items()}
    found = []
    for prefixes in (None, pieces.setting.prefixes()):
        trainer = Trainer(pieces.setting, EXAMPLES, 1, "a", [5, 5, 4], {}, prefixes)
        chosen = None if objective is None else objective(trainer)
        with _reading() as seen:
            found.append(trainer.fit(start, objective=chosen, **options))
    return found[0], found[1], seen


def _same(first: Fitted, second: Fitted) -> bool:
    return federation.bits(first.variables) == federation.bits(second.variables) and first.loss == second.loss


# ------------------------------------------------------------------------------------------------ one fit
@pytest.mark.parametrize("tuner", [LAST, LINEAR, DRAWN])
@pytest.mark.parametrize(
    "more", [{}, {"precision": "bfloat16"}, {"accumulate": 2}, {"local_steps": 5, "local_epochs": None}]
)
def test_every_image_of_a_fit_is_read_once(tuner: object, more: dict[str, Any], tmp_path: Path) -> None:
    off, on, seen = _fits(tuner, tmp_path, train=more)
    assert sum(seen) == len(EXAMPLES)
    if more.get("precision") != "bfloat16":  # there a product of another size may round otherwise, on any machine
        assert _same(off, on)


@pytest.mark.parametrize(("rounds", "epochs", "reads"), [(1, 0.5, 7), (3, 0.5, 14), (1, 1.0, 14), (1, 1.5, 14)])
def test_no_more_is_computed_than_is_used(rounds: int, epochs: float, reads: int, tmp_path: Path) -> None:
    off, on, seen = _fits(LINEAR, tmp_path, train={"rounds": rounds, "local_epochs": epochs})
    assert _same(off, on)
    assert sum(seen) == reads


def test_augmented_images_are_never_taken_from_the_cache(tmp_path: Path) -> None:
    off, on, seen = _fits(LINEAR, tmp_path, train={"augmentation": "dermoscopy"})
    assert _same(off, on)
    assert sum(seen) == 3 * len(EXAMPLES)


def test_dropout_below_what_is_trained_is_drawn_in_every_pass(tmp_path: Path) -> None:
    dropping = [{"name": "lora", "rank": 2, "dropout": 0.5}]
    top = lambda tag: tag.role == "head"  # noqa: E731
    off, on, seen = _fits(dropping, tmp_path, only=top)
    assert _same(off, on)
    assert sum(seen) == 3 * len(EXAMPLES)


Objective = Callable[[Tensors, Batch, torch.Generator], Tensor]


def _against_another(trainer: Trainer) -> Objective:
    """A distance of outputs to a model that stays, as MOON and Ditto take it, and to one that is made anew."""
    other = {name: value + 0.1 for name, value in trainer.setting.model.initial(5).items()}

    def objective(live: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        still = trainer.loss(other, batch)
        swapped = trainer.loss(
            {**live, "blocks.4.attn.qkv.lora.shared.a": other["blocks.4.attn.qkv.lora.shared.a"]}, batch
        )
        return trainer.loss(live, batch) + 0.3 * still * trainer.loss(live, batch) + 0.1 * swapped

    return objective


def _changing_what_is_frozen(trainer: Trainer) -> Objective:
    def objective(live: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        with torch.no_grad():
            live["blocks.4.attn.qkv.lora.shared.b"].add_(0.05)
        return trainer.loss(live, batch)

    return objective


def _changing_images(trainer: Trainer) -> Objective:
    def objective(live: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        mixed = replace(batch, given=batch.images.flip(0))
        return trainer.loss(live, batch) + trainer.loss(live, mixed)

    return objective


def _watching(trainer: Trainer) -> Objective:
    def objective(live: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        with trainer.watch(["blocks.1.attn.qkv"]) as seen:
            loss = trainer.loss(live, batch)
        return loss * (1 + seen["blocks.1.attn.qkv"].square().mean())

    return objective


def _watching_features(trainer: Trainer) -> Objective:
    def objective(live: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
        with trainer.watch([]) as seen:
            loss = trainer.loss(live, batch)
        return loss + 0.01 * seen[""].square().mean()

    return objective


@pytest.mark.parametrize(
    "objective", [_against_another, _changing_what_is_frozen, _changing_images, _watching, _watching_features]
)
@pytest.mark.parametrize("block", [4, 5])
def test_an_objective_gets_what_it_asks_for(objective: Any, block: int, tmp_path: Path) -> None:
    def only(tag: Any) -> bool:
        return tag.block == block or tag.role == "head"

    off, on, _ = _fits(LAST, tmp_path, objective, only=only)
    assert _same(off, on)
    assert not torch.equal(on.variables["head.weight"], _pieces(LAST, tmp_path).model.initial(3)["head.weight"])


def test_features_are_those_of_the_images(tmp_path: Path) -> None:
    pieces = _pieces(LAST, tmp_path)
    variables = {name: value + 0.1 for name, value in pieces.model.initial(3).items()}
    off, on = (
        Trainer(pieces.setting, EXAMPLES, 1, "a", [5, 5, 4], {}, prefixes).features(variables)[0]
        for prefixes in (None, pieces.setting.prefixes())
    )
    assert torch.equal(off, on)


# ------------------------------------------------------------------------------------------------ rounds
def _run(folder: Path, tuner: object, cache: Path | None, **train: Any) -> Mapping[str, object]:
    engine = {"prefix_cache": cache is not None, "cache": None if cache is None else str(cache)}
    settings = federation.configure(tuner=tuner, engine=engine, train=train)
    outcome = federation.run(folder, settings, federation.hospitals(14, 9))
    tables = {site: (folder / "sites" / site / "predictions.parquet").read_bytes() for site in "ab"}
    return {**tables, "shared": federation.bits(outcome.shared)}


def test_a_head_alone_reads_every_image_once_in_a_run_and_none_in_the_next(tmp_path: Path) -> None:
    expected = _run(tmp_path / "off", LINEAR, None)
    for name, reads in (("on", 14 + 9 + 4 * 6), ("again", 0)):
        with _reading() as seen:
            assert _run(tmp_path / name, LINEAR, tmp_path / "cache") == expected
        assert sum(seen) == reads


def test_a_block_drawn_anew_starts_from_what_no_round_trains(tmp_path: Path) -> None:
    expected = _run(tmp_path / "off", DRAWN, None, rounds=4, local_epochs=2)
    with _reading() as seen:
        assert _run(tmp_path / "on", DRAWN, tmp_path / "cache", rounds=4, local_epochs=2) == expected
    assert sum(seen) == 14 + 9 + 4 * 6


def _damage(cache: Path) -> None:
    for path in cache.rglob("*.bin"):
        path.write_bytes(bytes(path.stat().st_size))


def _shorten(cache: Path) -> None:
    for path in cache.rglob("*.json"):
        path.write_text(path.read_text()[:20])


def _reshape(cache: Path) -> None:
    for path in cache.rglob("*.json"):
        index = json.loads(path.read_text())
        path.write_text(json.dumps({**index, "shape": index["shape"][::-1]}))


@pytest.mark.parametrize("harm", [_damage, _shorten, _reshape, shutil.rmtree])
def test_a_run_that_dies_goes_on_with_a_harmed_cache(harm: Any, tmp_path: Path) -> None:
    expected = _run(tmp_path / "whole", LINEAR, tmp_path / "other")
    settings = federation.configure(tuner=LINEAR, engine={"cache": str(tmp_path / "cache")})

    def die(event: Mapping[str, Any]) -> None:
        if event["event"] == "round" and event["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federation.run(tmp_path / "run", settings, federation.hospitals(14, 9), display=die)
    harm(tmp_path / "cache")
    assert _run(tmp_path / "run", LINEAR, tmp_path / "cache") == expected


@pytest.mark.parametrize("memory", [0, 10**9])
@pytest.mark.parametrize("disk", ["full", "budget", "no folder"])
def test_without_room_a_run_goes_on(memory: int, disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _run(tmp_path / "off", LAST, None, local_epochs=2)
    monkeypatch.setattr(prefix, "MEMORY", memory)
    if disk == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    elif disk == "budget":
        monkeypatch.setattr(kept, "BUDGET", 100)
    else:
        (tmp_path / "cache").write_text("in the way")
    assert _run(tmp_path / "on", LAST, tmp_path / "cache", local_epochs=2) == expected
    assert not list(tmp_path.glob("cache/**/*.bin"))


# ------------------------------------------------------------------------------------------------ files
def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    rows = torch.randn(5, 3, 4).to(torch.bfloat16)
    written = kept.write(tmp_path / "x.bin", rows.split(2), rows.nbytes)
    assert written is not None
    read = kept.load(tmp_path / "x.bin")
    assert read is not None
    assert torch.equal(read, rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.json"]


def test_what_a_dead_process_left_goes_and_what_is_being_written_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "BUDGET", 100)
    rows, left = torch.zeros(10, dtype=torch.float32), tmp_path / ".x.bin.1.2.partial"
    left.write_bytes(bytes(80))
    assert kept.write(tmp_path / "x.bin", [rows], rows.nbytes) is None
    long_ago = time.time() - 2 * kept.IDLE
    os.utime(left, (long_ago, long_ago))
    assert kept.write(tmp_path / "x.bin", [rows], rows.nbytes) is not None
    assert not left.exists()


def test_what_was_read_long_ago_makes_room_and_what_is_in_use_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "BUDGET", 100)
    rows = torch.zeros(10, dtype=torch.float32)
    for name in ("old", "new"):
        assert kept.write(tmp_path / f"{name}.bin", [rows], rows.nbytes) is not None
    assert kept.write(tmp_path / "more.bin", [rows], rows.nbytes) is None
    long_ago = time.time() - 2 * kept.IDLE
    os.utime(tmp_path / "old.json", (long_ago, long_ago))
    assert kept.write(tmp_path / "more.bin", [rows], rows.nbytes) is not None
    assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["more.bin", "new.bin"]


def test_what_the_key_is_made_of(tmp_path: Path) -> None:
    def path(pieces: Experiment, examples: Any = EXAMPLES, depth: int = 4, precision: str = "float32") -> Path:
        prefixes = pieces.setting.prefixes()
        assert isinstance(prefixes, Prefixes)
        return prefixes._path(examples, depth, precision)

    one = _pieces(LAST, tmp_path)
    other = federation.configure(tuner=LINEAR, engine={"cache": str(tmp_path), "workers": 2}, train={"rounds": 9})
    assert path(federation.assemble(other)) == path(one), "whatever is trained above"
    changed = EXAMPLES.images.copy()
    changed[3, 0, 0, 0] ^= 1
    differ = [
        path(one),
        path(one, depth=3),
        path(one, precision="bfloat16"),
        path(one, replace(EXAMPLES, images=changed)),
        path(one, replace(EXAMPLES, rows=EXAMPLES.rows[::-1])),
        path(_pieces(LAST, tmp_path, backbone={"name": "test_vit2"})),
        path(federation.assemble(federation.configure(tuner=LAST, engine={"cache": str(tmp_path), "threads": 2}))),
    ]
    assert len(set(differ)) == len(differ)


def test_the_cache_can_be_switched_off_and_counts_in_the_hash() -> None:
    settings = [federation.configure(engine={"prefix_cache": each}) for each in (True, False)]
    pieces = [federation.assemble(each) for each in settings]
    assert pieces[1].setting.prefixes() is None
    digest, preprocessing = pieces[0].backbone.digest, pieces[0].backbone.preprocessing
    assert len({config.config_hash(each, digest, preprocessing) for each in settings}) == 2


def test_a_model_of_which_all_is_trained_is_not_even_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from consilium.tuners import compose

    def refuse(*_: object) -> None:
        raise AssertionError("tried out")

    monkeypatch.setattr(compose, "split", refuse)
    assert _run(tmp_path / "run", [{"name": "lora", "rank": 2}], tmp_path / "cache")
