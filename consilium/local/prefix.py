"""Stage 4, local training: what the frozen part below the trained blocks makes of images. In: a split. Out: its tokens.

In one fit, all blocks below the shallowest trained one are a fixed function of the image, unless it is augmented. Their
tokens (behind all blocks: the pooled features) are computed once and used in every epoch and validation of a request;
where no round trains anything below, they are kept on disk, for later rounds and other runs. `Halves` says what a depth
is. Tokens are used only for the very values they were made with: anything else is computed from the images.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from consilium.config import TrainConfig
from consilium.data import Batch, Examples, IntArray, Preprocessing
from consilium.halves import Halves, place
from consilium.local import kept
from consilium.local.predict import BATCH_SIZE, Prefix, autocast, load_images
from consilium.protocols import Model, Selector
from consilium.tensors import Tensors

FORMAT = 1
FEW = 16  # images at once: they fit into the cache of a processor, which is up to a fifth quicker
MEMORY = 512 * 1024**2  # bytes of tokens in memory while a site answers one request; every worker has one
_pixels: dict[int, tuple[ref[Examples], str]] = {}  # identity of a split -> itself, while in use, and its digest


@dataclass(frozen=True)
class Kept:
    """The folder of prefixes, and in words all that their bits depend on beside images, depth and precision."""

    folder: Path
    identity: str


@dataclass(frozen=True)
class Pixels:
    """Loads rows of a split as they are stored: what a prefix may stand for."""

    examples: Examples
    positions: IntArray
    preprocessing: Preprocessing
    device: str

    def __call__(self) -> Tensor:
        """float32 [B, 3, H, W], normalised."""
        return load_images(self.examples, self.positions, self.preprocessing, self.device)


@dataclass(frozen=True)
class _Made:
    """Tokens [n, ...] of a split, and what they were made with; None: they are not to be had."""

    examples: Examples
    depth: int
    precision: str
    lower: Tensors
    versions: Sequence[int]
    tokens: Tensor | None

    def fits(self, lower: Tensors) -> bool:
        """Whether these are the values, by identity or else bit by bit."""
        if lower.keys() != self.lower.keys() or _versions(self.lower) != self.versions:
            return False
        return all(value is self.lower[name] or _same(value, self.lower[name]) for name, value in lower.items())


@dataclass
class Prefixes:
    """The prefixes of one site's splits while it answers one request."""

    model: Model
    preprocessing: Preprocessing
    device: str
    kept: Kept
    go_on: Callable[[], None] = lambda: None  # called before every chunk; raises where a run has ended meanwhile
    made: list[_Made] = field(default_factory=list)
    fit: Fit | None = None
    used: int = 0  # bytes of memory
    whole: int = 0  # open watches of modules, which only a pass through all of them meets

    def depth(self, chosen: Selector) -> int:
        """The deepest prefix that does not depend on the chosen variables; 0 where there is none."""
        return self._depth([name for name, spec in self.model.specs.items() if chosen(spec.tag)])

    @cached_property
    def lasting(self) -> int:
        """The depth below which no round trains anything."""
        return self._depth(self.model.specs)

    @property
    def refused(self) -> bool:
        """Whether there would be something to keep, but the backbone cannot be split."""
        return self._lowest(self.model.specs) > 0 == self.lasting

    def split(self, variables: Tensors, examples: Examples, depth: int, precision: str) -> Prefix | None:
        """What the model makes of a split up to `depth`; None where it is not to be had."""
        halves = self.model.halves if depth > 0 and len(examples) else None
        if halves is None or not halves.usable(variables):
            return None
        lower = {name: value.to(self.device) for name, value in variables.items() if self.place(name) < depth}
        for each in self.made:
            if each.examples is examples and (each.depth, each.precision) == (depth, precision) and each.fits(lower):
                break
        else:
            tokens = self._make(halves, lower, examples, depth, precision)
            each = _Made(examples, depth, precision, lower, _versions(lower), tokens)
            self.made.append(each)
        return None if each.tokens is None else Prefix(each.tokens, depth)

    def of_batch(self, variables: Tensors, batch: Batch) -> Prefix | None:
        """Of one batch, for variables of the fit under way; None: take the images."""
        stored = batch.given
        if self.fit is None or self.whole or not isinstance(stored, Pixels) or stored.examples is not self.fit.examples:
            return None
        found = self.fit.prefix(self, variables)
        return None if found is None else found.rows(stored.positions, self.device)

    @contextmanager
    def watch(self, modules: Collection[str]) -> Iterator[Tensors]:
        """`Model.watch` of a model that is meanwhile called with images."""
        self.whole += 1
        try:
            with self.model.watch(modules) as seen:
                yield seen
        finally:
            self.whole -= 1

    def place(self, name: str, deepest: int | None = None) -> int:
        """As `halves.place`; the head is on top of all."""
        if deepest is None:
            deepest = self.model.halves.deepest if self.model.halves is not None else 0
        spec = self.model.specs.get(name)
        on_top = spec.tag.role == "head" if spec is not None else name.startswith("head.")  # one of an earlier stage
        return deepest if on_top else place(name, deepest)

    def _depth(self, names: Iterable[str]) -> int:
        if self._lowest(names := list(names)) == 0:
            return 0  # so that a model of which all is trained is not tried out
        halves = self.model.halves
        if halves is None or not halves.usable(self.model.specs):
            return 0
        return min([halves.even, *map(self.place, names)])

    def _lowest(self, names: Iterable[str]) -> int:
        return min((self.place(name, sys.maxsize) for name in names), default=sys.maxsize)

    def _make(self, halves: Halves, lower: Tensors, examples: Examples, depth: int, precision: str) -> Tensor | None:
        size = len(examples) * halves.sizes[depth] * 4
        lasts = not lower and depth <= self.lasting and halves.plain(depth)
        path = self._path(examples, depth, precision) if lasts else None
        found = kept.load(path) if path is not None else None
        if found is None and path is not None:
            found = kept.write(path, self._chunks(halves, lower, examples, depth, precision), size)
        if found is None and self.used + size <= MEMORY:
            self.used += size
            found = torch.cat(list(self._chunks(halves, lower, examples, depth, precision)))
        return found

    def _chunks(
        self, halves: Halves, lower: Tensors, examples: Examples, depth: int, precision: str
    ) -> Iterator[Tensor]:
        """In the order of the split and of the same size whoever asks, so that the bits are the same on a GPU too."""
        below = self.split(lower, examples, self.lasting, precision) if self.lasting < depth else None
        size = FEW if self.device == "cpu" else BATCH_SIZE
        for start in range(0, len(examples), size):
            self.go_on()
            rows = np.arange(start, min(start + size, len(examples)))
            pixels = Pixels(examples, rows, self.preprocessing, self.device)
            inputs = Prefix(pixels(), 0) if below is None else below.rows(rows, self.device)
            with torch.no_grad(), autocast(self.device, precision):
                made = halves.run(lower, inputs.tokens, inputs.depth, depth)
            yield made.cpu()

    def _path(self, examples: Examples, depth: int, precision: str) -> Path:
        text = json.dumps([FORMAT, self.kept.identity, depth, precision, _digest_of_pixels(examples)])
        return self.kept.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.bin"


@dataclass
class Fit:
    """One fit: which of the tensors that an objective shows are those it was given, and so stay what they are."""

    examples: Examples
    live: Tensors
    passes: float  # over the split, in this fit
    config: TrainConfig
    known: dict[tuple[object, ...], Prefix | None] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.versions = {id(value): value._version for value in self.live.values()}

    def prefix(self, prefixes: Prefixes, variables: Tensors) -> Prefix | None:
        """The deepest one that depends on no tensor that is trained, drawn, or not of this fit."""
        moving = [name for name, value in variables.items() if value.requires_grad]
        if any(prefixes.place(name, sys.maxsize) == 0 for name in moving):
            return None
        halves = prefixes.model.halves
        if halves is None:
            return None
        quiet = halves.quiet if torch.is_grad_enabled() else halves.deepest
        depth = min([quiet, halves.even, *map(prefixes.place, moving)])
        lower = {name: value for name, value in variables.items() if prefixes.place(name) < depth}
        if any(self.versions.get(id(value)) != value._version for value in lower.values()):
            return None
        key = (depth, *((name, id(value)) for name, value in lower.items()))
        if key not in self.known:
            self.known[key] = self._worthy(prefixes, lower, depth)
        return self.known[key]

    def _worthy(self, prefixes: Prefixes, lower: Tensors, depth: int) -> Prefix | None:
        """What is computed for the whole split must be used more often than once, here or in later rounds."""
        for each in (depth, min(depth, prefixes.lasting)):
            changes = any(prefixes.place(name) < each for name in lower)
            rounds = 1 if changes else self.config.rounds * self.config.participation
            found = (
                prefixes.split(lower, self.examples, each, self.config.precision) if self.passes * rounds > 1 else None
            )
            if found is not None:
                return found
        return None


def _versions(tensors: Tensors) -> list[int]:
    return [value._version for value in tensors.values()]


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)


def _digest_of_pixels(examples: Examples) -> str:
    """Of the stored pixels of a split, in its order; read once for as long as the split is in use."""
    at = id(examples)
    known = _pixels.get(at)
    if known is not None and known[0]() is examples:
        return known[1]
    total = hashlib.sha256(str((len(examples), examples.images.shape[1:])).encode())
    for row in examples.rows:
        total.update(np.ascontiguousarray(examples.images[row]).data)
    _pixels[at] = ref(examples, lambda _: _forget(at)), total.hexdigest()
    return total.hexdigest()


def _forget(at: int) -> None:
    _pixels.pop(at, None)
