"""Common: who made a file. In: named tensors, JSON and a private key. Out: the same JSON with an Ed25519 signature.

Ed25519: Bernstein, Duif, Lange, Schwabe, Yang, CHES 2011; RFC 8032, by the `cryptography` library. Signed is a digest
of all tensors and of everything else in the JSON, so that neither can be exchanged for another's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consilium import checkpoint
from consilium.errors import ConfigError, StateError
from consilium.tensors import Tensors, digest_all

KEY = "signature"  # of the JSON, where public key and signature stand
_PEM, _RAW = serialization.Encoding.PEM, serialization.Encoding.Raw
_PKCS8, _PLAIN = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
_INFO = serialization.PublicFormat.SubjectPublicKeyInfo


@dataclass(frozen=True)
class Trusted:
    """A public key, 64 hexadecimal digits, and the one site that may sign with it; None: any."""

    key: str
    site: str | None = None


def new_key(path: Path) -> tuple[Path, str]:
    """Write a private key to `path`, which only its owner may read, and the public one to `path` with the ending .pub.

    The public file and its key. StateError where one of the two is there already: a key is never replaced.
    """
    public = path.with_suffix(".pub")
    if there := [str(each) for each in (path, public) if each.exists()]:
        remedy = "choose another name; whoever trusts the old key would not know a new one"
        raise StateError("a key is there already", where=", ".join(there), remedy=remedy)
    key = Ed25519PrivateKey.generate()
    _write_secret(path, key.private_bytes(_PEM, _PKCS8, _PLAIN))
    checkpoint.write_bytes(public, key.public_key().public_bytes(_PEM, _INFO))
    return public, _hex(key.public_key())


def sign(tensors: Tensors, meta: Mapping[str, Any], private: Path) -> dict[str, Any]:
    """`meta` with the public key and the signature of everything in it and of the tensors."""
    key = _load(private, "private")
    plain = {name: value for name, value in meta.items() if name != KEY}
    signature = key.sign(_message(tensors, plain)).hex()
    return {**plain, KEY: {"algorithm": "ed25519", "public_key": _hex(key.public_key()), "signature": signature}}


def verify(tensors: Tensors, meta: Mapping[str, Any], where: str) -> str:
    """The public key that signed exactly these tensors and this JSON; StateError without a signature, or one that does
    not fit."""
    found = meta.get(KEY)
    if not isinstance(found, Mapping) or found.get("algorithm") != "ed25519":
        remedy = "export it again with --sign, at the site that trained it"
        raise StateError("this adapter is not signed", where=where, remedy=remedy)
    plain = {name: value for name, value in meta.items() if name != KEY}
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(found["public_key"]))
        key.verify(bytes.fromhex(found["signature"]), _message(tensors, plain))
    except (InvalidSignature, KeyError, TypeError, ValueError) as error:
        what = "the signature does not fit: somebody changed this adapter after it was signed"
        raise StateError(what, where=where, remedy="fetch it again from the site that signed it") from error
    return _hex(key)


def trusted(words: Sequence[str]) -> tuple[Trusted, ...]:
    """Keys from words `FILE` or `SITE=FILE`; ConfigError for a file that holds no public key."""
    pairs = [word.rpartition("=") for word in words]
    return tuple(Trusted(_hex(_load(Path(file), "public")), site or None) for site, _, file in pairs)


def accept(key: str, site: str, known: Sequence[Trusted], where: str) -> None:
    """StateError unless the key is trusted to sign for this site."""
    if not any(each.key == key and each.site in (None, site) for each in known):
        allowed = ", ".join(f"{each.site or 'any site'}: {each.key[:16]}" for each in known) or "none"
        remedy = "ask the site for its public key on another way than the adapter came, and name it with --trust"
        what = f"this adapter of {site!r} is signed with a key that is not trusted for it"
        raise StateError(what, where=where, allowed=allowed, received=key[:16], remedy=remedy)


def _message(tensors: Tensors, meta: Mapping[str, Any]) -> bytes:
    return b"consilium adapter\0" + json.dumps([digest_all(tensors), meta], sort_keys=True).encode()


def _hex(key: Ed25519PublicKey) -> str:
    return key.public_bytes(_RAW, serialization.PublicFormat.Raw).hex()


def _load(path: Path, kind: str) -> Any:
    """ConfigError for a file that is missing, protected, or holds something else."""
    remedy = "`consilium keys FILE` writes FILE, which is private, and FILE.pub"
    try:
        data = path.read_bytes()
        private = kind == "private"
        key = serialization.load_pem_private_key(data, None) if private else serialization.load_pem_public_key(data)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"this is no {kind} key", where=str(path), received=str(error)[:200], remedy=remedy
        ) from error
    if not isinstance(key, Ed25519PrivateKey if kind == "private" else Ed25519PublicKey):
        what = f"this {kind} key is of another kind"
        raise ConfigError(what, where=str(path), allowed="Ed25519", received=type(key).__name__, remedy=remedy)
    return key


def _write_secret(path: Path, data: bytes) -> None:
    """A new file that nobody else may read, at no moment."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(number)
    except OSError as error:
        raise checkpoint.not_written(path, error) from error
