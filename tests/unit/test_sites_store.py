"""The store of decoded images: timm's pixels, once per image; damage, crashes and a full disk do no harm."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval

from consilium.data import Preprocessing, UInt8Array
from consilium.errors import DataError
from consilium.sites import images
from consilium.sites.store import Store, default_folder, open_store, transform_pixels
from tests import hospitals

PLAIN = hospitals.PREPROCESSING


@dataclass
class Counting:
    """A source of PNG bytes that counts what is asked of it."""

    contents: dict[str, bytes]
    calls: Counter[str] = field(default_factory=Counter)

    def records(self) -> None: ...

    def content(self, id: str) -> bytes:
        self.calls["content"] += 1
        if id not in self.contents:
            raise DataError("the disk did not answer")
        return self.contents[id]

    def decode(self, content: bytes) -> UInt8Array:
        self.calls["decode"] += 1
        return images.decode(content)


def source(number: int = 5) -> Counting:
    return Counting({f"i{n}": hospitals.png(hospitals.pixels(n)) for n in range(number)})


def opened(given: Counting, folder: Path, preprocessing: Preprocessing = PLAIN, decoding: str = "") -> Store:
    return open_store(given, sorted(given.contents), preprocessing, decoding=decoding, folder=folder)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(30, 20), (20, 31), (17, 17), (8, 50), (224, 224)], ids=str)
@pytest.mark.parametrize("fraction", [1.0, 0.9, 0.875])
def test_pixels_are_those_of_timm(mode: str, size: tuple[int, int], fraction: float) -> None:
    ours = replace(PLAIN, crop_mode=mode, crop_fraction=fraction, mean=(0.48, 0.1, 0.9))  # type: ignore[arg-type]
    theirs = transforms_imagenet_eval(
        16, fraction, crop_mode=mode, interpolation="bicubic", mean=ours.mean, normalize=False
    )
    pixels = hospitals.pixels(0, *size)
    expected = theirs(Image.fromarray(pixels)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(transform_pixels(pixels, ours), expected)


@pytest.mark.parametrize("name", ["nearest", "bilinear", "lanczos"])
def test_every_interpolation_is_that_of_timm(name: str) -> None:
    pixels = hospitals.pixels(0, 40, 30)
    expected = (
        transforms_imagenet_eval(16, 1.0, interpolation=name, normalize=False)(Image.fromarray(pixels))
        .permute(1, 2, 0)
        .numpy()
    )
    found = transform_pixels(pixels, replace(PLAIN, interpolation=name))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, expected)


def test_images_are_decoded_once_and_mapped(tmp_path: Path) -> None:
    given = source()
    done: list[tuple[int, int]] = []
    first = open_store(
        given, sorted(given.contents), PLAIN, folder=tmp_path, progress=lambda n, total: done.append((n, total))
    )
    again = opened(given, tmp_path)
    assert given.calls == {"decode": 5, "content": 2 * 5}
    assert done == [(n, 5) for n in range(1, 6)]
    assert isinstance(again.images, np.memmap)
    for number in range(5):
        expected = transform_pixels(hospitals.pixels(number), PLAIN)
        for store in (first, again):
            np.testing.assert_array_equal(store.images[store.rows[f"i{number}"]], expected)


def test_equal_files_share_a_row(tmp_path: Path) -> None:
    given = source(3)
    given.contents["copy"] = given.contents["i1"]
    store = opened(given, tmp_path)
    assert len(store.images) == 3
    assert store.rows["copy"] == store.rows["i1"]


def test_all_that_shapes_pixels_makes_another_store_and_nothing_else_does(tmp_path: Path) -> None:
    given = source()
    opened(given, tmp_path)
    open_store(given, sorted(given.contents, reverse=True), replace(PLAIN, std=(1.0, 1.0, 1.0)), folder=tmp_path)
    assert given.calls["decode"] == 5
    changes = [
        replace(PLAIN, image_size=8),
        replace(PLAIN, interpolation="nearest"),
        replace(PLAIN, crop_mode="squash"),
    ]
    for number, preprocessing in enumerate(changes, 2):
        opened(given, tmp_path, preprocessing)
        assert given.calls["decode"] == 5 * number
    opened(given, tmp_path, decoding="bits=12")
    assert len(list(tmp_path.glob("*.npy"))) == 5
    given.contents["i0"] = hospitals.png(hospitals.pixels(99))
    opened(given, tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 6


@pytest.mark.parametrize("remembered", [False, True])
def test_unreadable_images_are_listed_also_from_the_cache(tmp_path: Path, remembered: bool) -> None:
    given = source()
    given.contents["i3"] = b"no image"
    for _ in range(1 + remembered):
        store = open_store(given, [*sorted(given.contents), "gone"], PLAIN, folder=tmp_path)
    assert store.corrupt == ("gone", "i3")
    assert set(store.rows) == {"i0", "i1", "i2", "i4"}
    np.testing.assert_array_equal(store.images[store.rows["i4"]], transform_pixels(hospitals.pixels(4), PLAIN))


def test_no_readable_file_at_all(tmp_path: Path) -> None:
    store = open_store(source(0), ["gone"], PLAIN, folder=tmp_path)
    assert store.corrupt == ("gone",)


@pytest.mark.parametrize("damage", ["flipped", "short", "no index", "odd index"])
def test_a_damaged_store_is_built_again(tmp_path: Path, damage: str) -> None:
    given = source()
    opened(given, tmp_path)
    (data,), (index,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
    content = bytearray(data.read_bytes())
    content[-1] ^= 255
    {
        "flipped": lambda: data.write_bytes(content),
        "short": lambda: data.write_bytes(content[:-1]),
        "no index": index.unlink,
        "odd index": lambda: index.write_text(json.dumps([])),
    }[damage]()
    store = opened(given, tmp_path)
    assert given.calls["decode"] == 10
    np.testing.assert_array_equal(store.images[store.rows["i0"]], transform_pixels(hospitals.pixels(0), PLAIN))


def test_a_finished_store_needs_no_writing(tmp_path: Path) -> None:
    given = source()
    opened(given, tmp_path)
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()
    opened(given, tmp_path)
    assert not list(tmp_path.glob("*.lock"))


class Dying(Counting):
    def decode(self, content: bytes) -> UInt8Array:
        if self.calls["decode"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decode(content)


def _die(folder: Path) -> None:
    opened(Dying(source().contents), folder)


def test_a_process_killed_half_way_leaves_nothing_that_looks_like_a_store(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    given = source()
    store = opened(given, tmp_path)
    assert given.calls["decode"] == 5
    np.testing.assert_array_equal(store.images[store.rows["i4"]], transform_pixels(hospitals.pixels(4), PLAIN))
    assert not list(tmp_path.glob("*.partial"))


def _race(folder: Path, barrier: object, results: object) -> None:
    given = source(50)
    barrier.wait(60)  # type: ignore[attr-defined]
    store = opened(given, folder)
    results.put((given.calls["decode"], store.images[:].tobytes()))  # type: ignore[attr-defined]


def test_two_processes_build_one_store(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_race, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted(calls for calls, _ in found) == [0, 50]
    assert found[0][1] == found[1][1]


def _fill_up(folder: Path, results: object) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        opened(source(), folder)
    except DataError as error:
        results.put(str(error))  # type: ignore[attr-defined]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_fill_up, args=(tmp_path, results))
    process.start()
    assert "cannot be written" in results.get(timeout=60)
    process.join(60)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_too_little_space_is_seen_before_the_first_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = source()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3839))
    with pytest.raises(DataError, match="3,840 bytes are needed, 3,839 are free"):
        opened(given, tmp_path)
    assert given.calls["decode"] == 0


def test_a_cache_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        opened(source(), tmp_path / "file")


def test_the_cache_lies_where_the_user_wants_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "consilium" / "images"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Path.home() in default_folder().parents


# ------------------------------------------------------------------------------------------------ hashes that are kept
@dataclass
class Drawn(Counting):
    """A source that says what decides its bytes."""

    identity: str = "drawn, first version"


def test_a_drawn_image_is_not_drawn_again_to_be_hashed(tmp_path: Path) -> None:
    given = Drawn(source().contents)
    first = opened(given, tmp_path)
    given.calls.clear()
    second = opened(given, tmp_path)
    assert given.calls == Counter()
    assert (first.hashes, first.rows) == (second.hashes, second.rows)
    assert (first.images == second.images).all()


def test_files_are_read_every_time(tmp_path: Path) -> None:
    given = source()
    opened(given, tmp_path)
    given.calls.clear()
    opened(given, tmp_path)
    assert given.calls["content"] == len(given.contents)
    assert list(tmp_path.glob("*.hashes.json")) == []


@pytest.mark.parametrize("damage", ["identity", "cut", "changed", "more ids"])
def test_hashes_of_something_else_or_damaged_are_computed_anew(tmp_path: Path, damage: str) -> None:
    given = Drawn(source().contents)
    right = opened(given, tmp_path)
    path = next(tmp_path.glob("*.hashes.json"))
    if damage == "identity":
        given.identity = "drawn, second version"
    if damage == "cut":
        path.write_text(path.read_text()[:50])
    if damage == "changed":
        path.write_text(path.read_text().replace(right.hashes["i0"], right.hashes["i1"]))
    if damage == "more ids":
        given.contents |= source(6).contents
    given.calls.clear()
    again = opened(given, tmp_path)
    assert given.calls["content"] >= len(given.contents)
    assert {id: again.hashes[id] for id in right.hashes} == right.hashes


def test_a_cache_that_cannot_be_written_keeps_no_hashes_and_says_nothing_of_them(tmp_path: Path) -> None:
    given = Drawn(source().contents)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        opened(given, tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EEXIST, "a file"), (errno.ENOTDIR, "a file"), (errno.EROFS, "writable"), (errno.EACCES, "writable"),
     (errno.ENOSPC, "free some space"), (errno.EIO, "another folder"), (None, "free some space")],
)  # fmt: skip
def test_what_to_do_fits_what_is_wrong_with_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, words: str
) -> None:
    def failing(*_: object) -> None:
        raise OSError("too few bytes") if number is None else OSError(number, "no")

    monkeypatch.setattr("consilium.sites.store._build", failing)
    with pytest.raises(DataError) as caught:
        opened(source(), tmp_path)
    assert words in str(caught.value.remedy)
    assert ("space" in str(caught.value.remedy)) == (number in (errno.ENOSPC, None))
