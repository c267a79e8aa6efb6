"""Image files: which file an id means, and what becomes of every kind of pixel."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from consilium.errors import DataError
from consilium.sites.images import Archive, decode, first_few
from tests import hospitals

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (6, 5), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (6, 5, 3), dtype=np.uint8)
FIVE = RANDOM.integers(0, 256, (6, 5, 5), dtype=np.uint8)
DEEP = RANDOM.integers(0, 65536, (6, 5, 3), dtype=np.uint16)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def deep_png(array: np.ndarray) -> bytes:
    """A 16-bit PNG written by hand: Pillow cannot write 16-bit colours."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(array: np.ndarray, photometric: int, *, planar: bool = False) -> bytes:
    """An uncompressed little-endian TIFF of [H, W, C], interleaved or in planes; Pillow cannot write these."""
    height, width, channels = array.shape
    bits, num_extra = 8 * array.itemsize, channels - (3 if photometric == 2 else 1)
    planes = [array[..., c] for c in range(channels)] if planar else [array]
    data = [plane.astype(f"<u{array.itemsize}").tobytes() for plane in planes]
    offsets = [8 + sum(map(len, data[:number])) for number in range(len(data))]
    values = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [photometric], 273: offsets}
    values |= {277: [channels], 278: [height], 279: [len(plane) for plane in data], 284: [2 if planar else 1]}
    values |= {338: [0] * num_extra} if num_extra else {}
    blob, entries, start = b"", b"", 8 + sum(map(len, data))
    for tag, numbers in values.items():
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        entries += struct.pack("<HHI", tag, 4, len(numbers)) + (
            packed if len(numbers) == 1 else struct.pack("<I", start + len(blob))
        )
        blob += packed if len(numbers) > 1 else b""
    head = struct.pack("<2sHI", b"II", 42, start + len(blob))
    return head + b"".join(data) + blob + struct.pack("<H", len(values)) + entries + bytes(4)


def repeated(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


KINDS = {
    "colour png": (saved(Image.fromarray(COLOUR)), COLOUR),
    "grey png": (saved(Image.fromarray(GREY)), repeated(GREY)),
    "one bit": (saved(Image.fromarray(GREY > 127)), repeated(np.where(GREY > 127, 255, 0))),
    "palette": (saved(Image.fromarray(COLOUR).quantize(256)), COLOUR),
    "tiff": (saved(Image.fromarray(COLOUR), "TIFF"), COLOUR),
    "deep grey png": (saved(Image.fromarray(DEEP[..., 0])), repeated(DEEP[..., 0] >> 8)),
    "deep colour png": (deep_png(DEEP), DEEP >> 8),
    "deep grey tiff": (saved(Image.fromarray(DEEP[..., 0]), "TIFF"), repeated(DEEP[..., 0] >> 8)),
    "deep colour tiff": (tiff(DEEP, 2), DEEP >> 8),
    "white is zero": (tiff(DEEP[..., :1], 0), repeated(255 - (DEEP[..., 0] >> 8))),
    "five channels": (tiff(FIVE, 2), FIVE[..., :3]),
    "planes": (tiff(COLOUR, 2, planar=True), COLOUR),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixel_becomes_rgb(kind: str) -> None:
    content, expected = KINDS[kind]
    np.testing.assert_array_equal(decode(content), expected)


def test_eight_bits_survive_being_stored_as_sixteen() -> None:
    wide = GREY.astype(np.uint16) * 257
    np.testing.assert_array_equal(decode(saved(Image.fromarray(wide))), repeated(GREY))


def test_a_transparent_pixel_is_black_whatever_colour_it_hides() -> None:
    image = np.dstack([COLOUR, np.full((6, 5), 255, dtype=np.uint8)])
    image[0, 0, 3] = 0
    found = decode(saved(Image.fromarray(image)))
    assert found[0, 0].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(found[1:], COLOUR[1:])


def test_a_jpeg_is_turned_as_its_camera_was_held() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.full((6, 5, 3), 128, dtype=np.uint8))
    assert decode(saved(image, "JPEG", exif=exif)).shape == (5, 6, 3)


def test_significant_bits_scale_a_twelve_bit_camera() -> None:
    values = np.array([[0, 2048, 4095, 5000]], dtype=np.uint16)
    assert decode(saved(Image.fromarray(values)), bits=12)[0, :, 0].tolist() == [0, 128, 255, 255]
    with pytest.raises(DataError, match="grey images only"):
        decode(deep_png(DEEP), bits=12)


BAD = {
    "nothing": b"",
    "text": b"no image",
    "half": saved(Image.fromarray(hospitals.pixels(0, 80, 80)))[:2000],
    "gif": saved(Image.fromarray(GREY), "GIF"),
    "floats": saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "signed": saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "pages": saved(Image.fromarray(GREY), "TIFF", save_all=True, append_images=[Image.fromarray(GREY)]),
    "deep planes": tiff(DEEP, 2, planar=True),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read_without_guessing_is_refused(kind: str) -> None:
    with pytest.raises(DataError, match="not a readable"):
        decode(BAD[kind])


FILES = {"a.jpg": b"1", "deep/b.PNG": b"2", "deep/c.tif": b"3", "other/c.tif": b"4", "d.e.jpg": b"5", "a.txt": b"6"}
HIDDEN = {"__MACOSX/a.jpg": b"7", "deep/.b.png": b"8"}


@pytest.fixture(params=["folder", "zip"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Archive:
    if request.param == "zip":
        return Archive(hospitals.zipped(tmp_path / "images.zip", {**FILES, **HIDDEN}))
    for name, content in {**FILES, **HIDDEN}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return Archive(tmp_path)


@pytest.mark.parametrize(
    ("id", "content"),
    [
        ("a", b"1"),
        ("a.jpg", b"1"),
        ("b", b"2"),
        ("deep/b", b"2"),
        ("deep/c", b"3"),
        ("other/c.tif", b"4"),
        ("d.e", b"5"),
    ],
)
def test_an_id_finds_its_file(archive: Archive, id: str, content: bytes) -> None:
    assert archive.read(archive.resolve([id])[id]) == content


UNFIT = [
    (["c"], "fit several"),
    (["x", "y", "b"], "2 image files are missing"),
    (["b", "deep/b"], "same image file"),
    (["eep/b"], "missing"),
]


@pytest.mark.parametrize(("ids", "message"), UNFIT)
def test_an_id_that_means_no_file_or_two_is_refused(archive: Archive, ids: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        archive.resolve(ids)


def test_a_whole_path_wins_over_a_file_of_the_same_name_further_down(tmp_path: Path) -> None:
    archive = Archive(hospitals.zipped(tmp_path / "images.zip", {"a.png": b"1", "deep/a.png": b"2"}))
    assert archive.resolve(["a.png"]) == {"a.png": "a.png"}
    with pytest.raises(DataError, match="several"):
        archive.resolve(["a"])


def test_an_archive_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder or zip"):
        Archive(tmp_path / "images")


def test_a_damaged_member_of_a_zip_is_an_error_of_that_file(tmp_path: Path) -> None:
    path = hospitals.zipped(tmp_path / "images.zip", {"a.png": b"1234567890"})
    path.write_bytes(path.read_bytes().replace(b"1234567890", b"1234567891"))
    with pytest.raises(DataError, match=r"a\.png"):
        Archive(path).read("a.png")


def test_long_lists_are_cut() -> None:
    assert first_few(range(7), 3) == "0, 1, 2 ... and 4 more"
    assert first_few([]) == ""
