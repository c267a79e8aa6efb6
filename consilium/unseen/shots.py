"""Composition: which few images a new site trains on. In: its training split. Out: k images of each class.

A draw puts the images of each class into one order, and k takes the first k of it: the images of a smaller k are among
those of a larger one. Every patient (or lesion) gives one image before any gives a second. An order depends on the ids
and groups, the run's seed, the site and the number of the draw alone.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from consilium import seeds
from consilium.data import Examples, IntArray


def few(examples: Examples, shots: int, seed: int, site: str, draw: int) -> Examples:
    """`shots` images of every class, or all of a class that has fewer, in the order of the split."""
    ranked = order(examples, seed, site, draw)
    labels = examples.labels[ranked]
    places = [ranked[labels == label][:shots] for label in np.unique(labels)]
    return examples.at(np.sort(np.concatenate(places)) if places else ranked)


def order(examples: Examples, seed: int, site: str, draw: int) -> IntArray:
    """All positions in the split: the order in which images of a class are taken."""
    generator = seeds.numpy_generator(seed, site=site, purpose=f"shots, draw {draw}")
    groups = sorted(set(examples.groups.tolist()))
    rank = dict(zip(groups, generator.permutation(len(groups)).tolist(), strict=True))
    shuffled = np.argsort(examples.ids, kind="stable")[generator.permutation(len(examples))]
    given: Counter[tuple[str, int]] = Counter()
    turns: dict[int, tuple[int, int]] = {}
    for at in shuffled.tolist():
        group, label = str(examples.groups[at]), int(examples.labels[at])
        turns[at] = given[group, label], rank[group]
        given[group, label] += 1
    return np.array(sorted(turns, key=turns.__getitem__), dtype=np.int64)
