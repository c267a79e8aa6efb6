"""Encryption at rest: what was written comes back, and nothing else is taken for it."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium import checkpoint, sealing
from consilium.engines.state import SiteState, StateFolder
from consilium.errors import ConfigError, StateError
from consilium.protocols import Personal
from consilium.sealing import CHUNK, TAG, Seal, key_id, read_key
from consilium.tensors import equal
from tests import federation

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
PLACE = {"what": "state", "run": "r", "site": "a", "round": 3}
SEAL = Seal(KEY, PLACE)


def _closed(data: bytes, seal: Seal = SEAL) -> bytes:
    return b"".join(seal.close([data]))


# ------------------------------------------------------------------------------------------------ bytes
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 32), st.randoms())
def test_what_was_closed_opens_whatever_the_pieces_and_chunks(sizes: list[int], chunk: int, random: Any) -> None:
    pieces = [random.randbytes(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealing, "CHUNK", chunk)
        closed = b"".join(SEAL.close(pieces))
        assert SEAL.open(closed, "here") == b"".join(pieces)
        whole = sum(sizes)
        assert len(closed) == 32 + whole + TAG * max(1, -(-whole // chunk))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5])
def test_nothing_changed_cut_or_added_is_taken(size: int) -> None:
    closed = _closed(secrets.token_bytes(size))
    assert len(SEAL.open(closed, "here")) == size
    edges = {32, 33, 32 + CHUNK, 32 + CHUNK + TAG, 32 + 2 * (CHUNK + TAG), len(closed) - 1, len(closed) - TAG}
    for end in sorted(edge for edge in {*edges, 8, 31} if edge < len(closed)):
        with pytest.raises(StateError, match="cut"):
            SEAL.open(closed[:end], "here")
    for at in sorted({16, 31, 32, len(closed) - 1, len(closed) // 2, min(len(closed) - 1, 32 + CHUNK)}):
        broken = bytearray(closed)
        broken[at] ^= 1
        with pytest.raises(StateError, match="changed or cut, or belongs elsewhere"):
            SEAL.open(bytes(broken), "here")
    with pytest.raises(StateError, match="changed or cut"):
        SEAL.open(closed + b"x", "here")


def test_chunks_of_one_file_or_of_two_cannot_change_places() -> None:
    first, second = (_closed(secrets.token_bytes(3 * CHUNK)) for _ in range(2))
    size = CHUNK + TAG
    head, a, b, c = first[:32], first[32 : 32 + size], first[32 + size : 32 + 2 * size], first[32 + 2 * size :]
    for moved in (head + b + a + c, head + a + c, head + a + a + c, head + second[32:], second[:32] + first[32:]):
        with pytest.raises(StateError, match="changed or cut"):
            SEAL.open(moved, "here")


@pytest.mark.parametrize("changed", [{"site": "b"}, {"round": 4}, {"run": "s"}, {"what": "model"}])
def test_a_file_is_what_it_is_and_nothing_else(changed: dict[str, Any]) -> None:
    with pytest.raises(StateError, match="belongs elsewhere"):
        Seal(KEY, {**PLACE, **changed}).open(_closed(b"mine"), "here")


def test_another_key_no_key_and_no_encryption_are_told_apart() -> None:
    closed = _closed(b"mine")
    with pytest.raises(StateError, match=rf"(?s)another key.*{key_id(KEY)}.*{key_id(OTHER)}"):
        Seal(OTHER, PLACE).open(closed, "here")
    with pytest.raises(StateError, match="encrypted, and no key is given"):
        sealing.opened(closed, None, "here")
    with pytest.raises(StateError, match="not encrypted, though a key is given"):
        sealing.opened(b"plain", SEAL, "here")
    assert sealing.opened(b"plain", None, "here") == b"plain"


def test_no_two_files_are_alike_and_none_shows_its_content_or_the_key() -> None:
    first, second = _closed(b"mine" * 1000), _closed(b"mine" * 1000)
    assert first[16:] != second[16:]
    assert b"mine" not in first
    assert KEY not in first
    assert KEY.hex() not in f"{SEAL!r} {StateFolder(Path(), 'r', KEY, 'a')!r}"
    assert key_id(KEY) not in KEY.hex()
    assert hashlib.sha256(KEY).hexdigest()[:16] != key_id(KEY)


def test_the_cipher_is_the_one_of_the_standards() -> None:
    """Opened with the primitives themselves, as docs/encryption.md describes the file."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    closed = _closed(b"x" * CHUNK + b"y")
    info = b'consilium file {"round": 3, "run": "r", "site": "a", "what": "state"}'
    cipher = ChaCha20Poly1305(HKDF(SHA256(), 32, closed[16:32], info).derive(KEY))
    assert cipher.decrypt(bytes(12), closed[32 : 32 + CHUNK + TAG], None) == b"x" * CHUNK
    assert cipher.decrypt(bytes(10) + b"\x01\x01", closed[32 + CHUNK + TAG :], None) == b"y"


# ------------------------------------------------------------------------------------------------ states
STATE = SiteState(2, {"w": torch.arange(6.0)}, Personal({"p": torch.randn(40, 30)}), {"w": torch.ones(6)})


def test_a_state_comes_back_and_is_nowhere_in_clear(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "a", "r", KEY, "a")
    folder.save(STATE, keep=())
    found = folder.load(2)
    assert equal(found.personal.tensors, STATE.personal.tensors)
    assert equal(found.sent, STATE.sent)
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not [mark for mark in federation.traces({**STATE.personal.tensors, **STATE.received}) if mark in everything]
    StateFolder(tmp_path / "plain", "r").save(STATE, keep=())
    plain = b"".join(path.read_bytes() for path in (tmp_path / "plain").iterdir())
    assert all(mark in plain for mark in federation.traces(STATE.personal.tensors)), "the search would find it"


def test_states_cannot_be_exchanged_between_sites_rounds_and_runs(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "a", "r", KEY, "a")
    folder.save(STATE, keep=())
    written = (tmp_path / "a" / "state-00002.safetensors").read_bytes()
    for other in (
        (StateFolder(tmp_path / "b", "r", KEY, "b"), 2),
        (StateFolder(tmp_path / "c", "s", KEY, "a"), 2),
        (folder, 3),
    ):
        checkpoint.write_bytes(other[0].folder / f"state-{other[1]:05d}.safetensors", written)
        with pytest.raises(StateError, match="belongs elsewhere"):
            other[0].load(other[1])
    assert folder.load(2).round == 2, "the true one is as it was"


def test_a_full_disk_leaves_the_earlier_file_and_nothing_in_clear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StateFolder(tmp_path, "r", KEY, "a")
    folder.save(STATE, keep=())
    before = (tmp_path / "state-00002.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(StateError, match="could not be written"):
        folder.save(STATE, keep=())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


# ------------------------------------------------------------------------------------------------ where the key is
def _file(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "site.key"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def test_a_key_is_read_from_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_KEY", KEY.hex().upper())
    assert read_key(None, None) is None
    assert read_key(_file(tmp_path, f"{KEY.hex()}\n"), None) == KEY
    assert read_key(_file(tmp_path, KEY.hex(), 0o400), None) == KEY
    assert read_key(None, "SITE_KEY") == KEY


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        (KEY.hex(), 0o640, "others can read the key"),
        (KEY.hex(), 0o604, "others can read the key"),
        (KEY.hex()[:-1], 0o600, "no key.*63 characters"),
        (KEY.hex() + "00", 0o600, "no key.*66 characters"),
        ("g" * 64, 0o600, "no key"),
        ("", 0o600, "no key.*0 characters"),
        (KEY, 0o600, "no key"),
        (b"\xff" * 32, 0o600, "it is no text"),
    ],
)
def test_what_is_no_key_is_refused_without_showing_it(tmp_path: Path, text: str | bytes, mode: int, says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}") as caught:
        read_key(_file(tmp_path, text, mode), None)
    shown = text if isinstance(text, str) else text.decode("latin-1")
    assert not shown or shown not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_missing_key_is_named_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SITE_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"(?s)no such variable.*SITE_KEY.*openssl"):
        read_key(None, "SITE_KEY")
    with pytest.raises(ConfigError, match=r"(?s)cannot be read.*gone\.key: No such file"):
        read_key(tmp_path / "gone.key", None)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(tmp_path, None)
    monkeypatch.setenv("SITE_KEY", "hunter2")
    with pytest.raises(ConfigError, match="no key") as caught:
        read_key(None, "SITE_KEY")
    assert "hunter2" not in str(caught.value)


def test_one_place_for_a_key() -> None:
    with pytest.raises(ConfigError, match="not both"):
        federation.configure(engine={"state_key_file": "a", "state_key_variable": "B"})
