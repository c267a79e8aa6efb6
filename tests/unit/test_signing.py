"""Keys and signatures: what is signed, by whom, and what a changed file looks like."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from consilium import signing
from consilium.errors import ConfigError, StateError

TENSORS = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
META = {"model": "east", "classes": ["x", "y"]}


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "keys" / "east.key"
    signing.new_key(path)
    return path


def test_what_was_signed_is_verified_and_tells_the_key(key: Path) -> None:
    signed = signing.sign(TENSORS, META, key)
    (known,) = signing.trusted([str(key.with_suffix(".pub"))])
    assert signing.verify(TENSORS, signed, "here") == known.key
    assert {name: value for name, value in signed.items() if name != signing.KEY} == META


def test_the_private_key_is_for_its_owner_alone_and_never_replaced(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    with pytest.raises(StateError, match="a key is there already"):
        signing.new_key(key)
    key.unlink()
    with pytest.raises(StateError, match=r"east\.pub"):
        signing.new_key(key)
    assert before.startswith(b"-----BEGIN PRIVATE KEY")


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: ({**t, "a": t["a"] + 1e-7}, m),
        lambda t, m: ({"a": t["a"], "c": t["b"]}, m),
        lambda t, m: (t, {**m, "model": "west"}),
        lambda t, m: (t, {**m, "more": 1}),
        lambda t, m: (t, {name: value for name, value in m.items() if name != "classes"}),
        lambda t, m: (t, {**m, signing.KEY: {**m[signing.KEY], "signature": "00" * 64}}),
        lambda t, m: (t, {**m, signing.KEY: {**m[signing.KEY], "public_key": "zz"}}),
        lambda t, m: (t, {**m, signing.KEY: {"algorithm": "ed25519"}}),
    ],
)
def test_any_change_is_found(key: Path, change) -> None:
    tensors, meta = change(TENSORS, signing.sign(TENSORS, META, key))
    with pytest.raises(StateError, match=r"does not fit(.|\n)*here"):
        signing.verify(tensors, meta, "here")


@pytest.mark.parametrize("meta", [META, {**META, signing.KEY: "me"}, {**META, signing.KEY: {"algorithm": "none"}}])
def test_what_is_not_signed_is_refused(meta: dict[str, object]) -> None:
    with pytest.raises(StateError, match=r"not signed(.|\n)*here"):
        signing.verify(TENSORS, meta, "here")


def test_a_key_is_trusted_for_the_sites_that_were_named(key: Path) -> None:
    public = key.with_suffix(".pub")
    own, anyone = signing.trusted([f"east={public}", str(public)])
    signing.accept(own.key, "east", [own], "here")
    signing.accept(own.key, "west", [anyone], "here")
    for known in ([own], []):
        with pytest.raises(StateError, match=r"'west' is signed with a key that is not trusted(.|\n)*here"):
            signing.accept(own.key, "west", known, "here")


def test_a_file_that_is_no_key_is_named(key: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no public key(.|\n)*nowhere"):
        signing.trusted([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="no public key"):
        signing.trusted([str(key)])
    with pytest.raises(ConfigError, match="no private key"):
        signing.sign(TENSORS, META, key.with_suffix(".pub"))
    other = tmp_path / "curve.pem"
    plain = serialization.NoEncryption()
    other.write_bytes(
        generate_private_key(SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain
        )
    )
    with pytest.raises(ConfigError, match=r"another kind(.|\n)*Ed25519"):
        signing.sign(TENSORS, META, other)


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="could not be written"):
        signing.new_key(tmp_path / "file" / "key")
