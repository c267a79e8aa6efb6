"""Common: encryption at rest. In: pieces of a file, a key, what the file is. Out: the file as it lies on the disk.

ChaCha20-Poly1305 (RFC 8439) over chunks, as STREAM (Hoang, Reyhanitabar, Rogaway, Vizár, CRYPTO 2015): every file has
a key of its own, HKDF-SHA256 (RFC 5869) of the site's key, a random salt and what the file is, and every chunk is
authenticated with its number and whether it is the last. So a changed, shortened, longer or exchanged file is refused,
as is one that stands where another file of the same key should.

    magic           8 bytes
    key             8 bytes: which key, without a way back to it
    salt           16 bytes
    chunks         each up to 1 MiB, and 16 bytes of tag
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from consilium.errors import ConfigError, StateError

MAGIC = b"CnslSeal"
CHUNK, TAG, SALT, KEY = 2**20, 16, 16, 32  # bytes
_HEAD = len(MAGIC) + 8 + SALT
_MAKE = "put it where it was, or, for a new run, make one: (umask 077; openssl rand -hex 32 > site.key)"
_HOME = "give the key that this file was encrypted with: engine.state_key_file or engine.state_key_variable"


@dataclass(frozen=True)
class Seal:
    """A key of 32 bytes, and what a file is: nobody can pass it off as another."""

    key: bytes = field(repr=False)
    place: Mapping[str, str | int]

    def close(self, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
        """The encrypted file, in pieces; never more than a chunk and a piece in memory."""
        salt, held, number = os.urandom(SALT), bytearray(), 0
        cipher = self._cipher(salt)
        yield MAGIC + bytes.fromhex(key_id(self.key)) + salt
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while len(held) + len(view) > CHUNK:  # the last chunk is never empty unless all is
                taken = CHUNK - len(held)
                held += view[:taken]
                yield cipher.encrypt(_nonce(number, last=False), bytes(held), None)
                held, view, number = bytearray(), view[taken:], number + 1
            held += view
        yield cipher.encrypt(_nonce(number, last=True), bytes(held), None)

    def open(self, data: bytes, where: str) -> bytes:
        """What was encrypted; StateError for another key, and for every file but the one that `close` wrote."""
        remedy = "restore this file from a backup, or start again with another --out"
        if not is_sealed(data):
            what = "this file is not encrypted, though a key is given"
            raise StateError(what, where=where, remedy="give no key, or start again with another --out")
        if len(data) < _HEAD + TAG:
            raise StateError(
                "this encrypted file is cut short", where=where, received=f"{len(data)} bytes", remedy=remedy
            )
        theirs, ours = data[len(MAGIC) : len(MAGIC) + 8].hex(), key_id(self.key)
        if theirs != ours:
            what = "this file is encrypted with another key"
            raise StateError(what, where=where, allowed=f"key {theirs}", received=f"key {ours}", remedy=_HOME)
        cipher, body = self._cipher(data[_HEAD - SALT : _HEAD]), memoryview(data)[_HEAD:]
        starts = range(0, len(body), CHUNK + TAG)
        try:
            chunks = [
                cipher.decrypt(_nonce(at, last=start == starts[-1]), body[start : start + CHUNK + TAG], None)
                for at, start in enumerate(starts)
            ]
        except (InvalidTag, ValueError) as error:
            what = "this encrypted file was changed or cut, or belongs elsewhere"
            place = ", ".join(f"{name} {value}" for name, value in self.place.items())
            raise StateError(what, where=where, allowed=place, remedy=remedy) from error
        return b"".join(chunks)

    def _cipher(self, salt: bytes) -> ChaCha20Poly1305:
        info = b"consilium file " + json.dumps(dict(self.place), sort_keys=True).encode()
        return ChaCha20Poly1305(_derived(self.key, info, KEY, salt))


def sealed(
    what: Literal["state", "model", "start"], key: bytes | None, agreement: str, site: str, round: int = 0
) -> Seal | None:
    """How a site's file is encrypted, if it is: as that of this run, this site and, of a state, this round alone."""
    return Seal(key, {"what": what, "run": agreement, "site": site, "round": round}) if key else None


def opened(data: bytes, seal: Seal | None, where: str) -> bytes:
    """A file's content; StateError where it is encrypted and there is no key, or the other way round."""
    if seal is not None:
        return seal.open(data, where)
    if is_sealed(data):
        raise StateError("this file is encrypted, and no key is given", where=where, remedy=_HOME)
    return data


def is_sealed(data: bytes) -> bool:
    """Whether a file says that it is encrypted."""
    return data[: len(MAGIC)] == MAGIC


def key_id(key: bytes) -> str:
    """Which key it is, for messages and for comparing: 16 hexadecimal digits, without a way back."""
    return _derived(key, b"consilium key id", 8, None).hex()


def _derived(key: bytes, info: bytes, length: int, salt: bytes | None) -> bytes:
    return HKDF(SHA256(), length, salt, info).derive(key)


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


# ------------------------------------------------------------------------------------------------ where a key is
def read_key(file: Path | None, variable: str | None) -> bytes | None:
    """The key in a file that only its owner can read, or in an environment variable; None where neither is named.
    ConfigError, which never holds the key, where it is missing, open to others or no key."""
    if file is not None:
        return _key(_text_of(file), f"engine.state_key_file = {file}")
    if variable is not None:
        if variable not in os.environ:
            what, where = "the environment has no such variable", "engine.state_key_variable"
            raise ConfigError(what, where=where, received=variable, remedy=f"{_MAKE}, and export its content")
        return _key(os.environ[variable], f"engine.state_key_variable = {variable}")
    return None


def _text_of(file: Path) -> str:
    where = "engine.state_key_file"
    try:
        mode, text = file.stat().st_mode, file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is no text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ConfigError("the key cannot be read", where=where, received=f"{file}: {reason}", remedy=_MAKE) from None
    if stat.S_IMODE(mode) & 0o077:
        allowed, received = "0600 or 0400: its owner alone", f"{stat.S_IMODE(mode):04o}"
        remedy = f"chmod 600 {file}, and make a new key if others may have read this one"
        raise ConfigError("others can read the key", where=where, allowed=allowed, received=received, remedy=remedy)
    return text


def _key(text: str, where: str) -> bytes:
    found = text.strip()
    if re.fullmatch(f"[0-9a-fA-F]{{{2 * KEY}}}", found) is None:
        allowed, received = f"{2 * KEY} hexadecimal digits", f"{len(found)} characters that are no such key"
        raise ConfigError("this is no key", where=where, allowed=allowed, received=received, remedy=_MAKE)
    return bytes.fromhex(found)
