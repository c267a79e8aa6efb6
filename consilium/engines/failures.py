"""Engine: why a site failed. In: a text that may name files and images. Out: its digest; the text stays at the site."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from contextlib import suppress
from pathlib import Path

LOG = "failures.jsonl"


def seal(folder: Path, text: str) -> str:
    """Write a text to the log in the site's folder; what may travel instead."""
    salt = secrets.token_hex(16)  # else whoever guesses a file's name could see from the digest that it is right
    digest = hashlib.sha256(f"{salt}{text}".encode(errors="replace")).hexdigest()[:16]
    with suppress(OSError):  # a full disk is often the failure itself, and the reply must leave all the same
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"digest": digest, "salt": salt, "text": text}) + "\n")
    return f"see {LOG} at the site, {digest}"


def unseal(folder: Path, message: str) -> str:
    """The text that a digest stands for, where the site's folder can be read; else the message as it is."""
    found = re.search(r"[0-9a-f]{16}$", message)
    with suppress(OSError, ValueError, KeyError):
        for line in reversed((folder / LOG).read_text(encoding="utf-8").splitlines()):
            entry = json.loads(line)
            if found and entry["digest"] == found.group():
                return str(entry["text"])
    return message
