"""The two tables of the tuner study: lesions set aside for an in-domain start, and all others, the federation.

    python examples/tuners/made.py ../shared/data/ham10000/metadata.csv examples/tuners/made

Writes set-aside.csv and federation.csv, and the same two with a third of the nevi, for the reduced grid. A lesion goes
by the hash of its name, so a table is the same wherever it is made and the reduced ones are subsets of the full ones.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pandas as pd

SET_ASIDE = 0.25  # of the lesions
NEVI = 1 / 3  # of the lesions of the class nv, which is two thirds of all images


def share(lesion: str, purpose: str) -> float:
    """A number in [0, 1) that only the names decide."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{lesion}".encode()).digest()[:8], "big") / 2**64


def main(metadata: Path, out: Path) -> None:
    """Divide the lesions of a table with the columns lesion_id and dx."""
    table = pd.read_csv(metadata, dtype=str)
    aside = table.lesion_id.map(lambda lesion: share(lesion, "set aside") < SET_ASIDE)
    few = (table.dx != "nv") | table.lesion_id.map(lambda lesion: share(lesion, "nevi") < NEVI)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("set-aside", aside), ("federation", ~aside)):
        table[rows].to_csv(out / f"{name}.csv", index=False)
        table[rows & few].to_csv(out / f"{name}-reduced.csv", index=False)
        print(f"{name}: {rows.sum()} images, reduced {(rows & few).sum()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
