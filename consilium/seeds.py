"""Common: every random draw. In: (run seed, round, site, purpose). Out: a seed or generator from these alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, *, round: int = 0, site: str = "", purpose: str) -> int:
    """A 63-bit seed from the four names of a draw; equal names give equal seeds on every machine."""
    text = f"{seed}|{round}|{site}|{purpose}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(seed: int, *, round: int = 0, site: str = "", purpose: str) -> torch.Generator:
    """A CPU torch generator for one draw."""
    import torch

    return torch.Generator().manual_seed(derive(seed, round=round, site=site, purpose=purpose))


def numpy_generator(seed: int, *, round: int = 0, site: str = "", purpose: str) -> np.random.Generator:
    """A NumPy generator for one draw."""
    import numpy as np

    return np.random.default_rng(derive(seed, round=round, site=site, purpose=purpose))


@contextmanager
def ambient(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block (dropout reads them) and restore them afterwards."""
    import torch

    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would write down for later what a GPU is to do
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        yield
