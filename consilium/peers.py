"""Common: updates out of all proportion to their peers. In: a round's answers by site, and how far each has moved.
Out: the same answers in the same order, and why one is to be refused.

Peers are the updates of one round alone: which tensors move, and how far, differs from round to round. An update is
refused where all three hold:
    it is longer than `limit` times the lower median of the peers, itself among them
                            honest sites with many more images take more steps, and so go further
    so is its length per image
                            honest sites with few images go further for each: Adam's steps are of one size
    it is longer than what the site was sent
                            honest sites go on where their peers have nothing left to learn, as with one class and a
                            head of their own, whose steps fade to nothing; what is shorter cannot ruin a mean
Sizes of honest sites spread over three orders of magnitude; only what is broken is far out in all. The first `FEWEST`
updates wait for each other and are judged together; every later one is judged by itself, with all that were accepted
before. Of two in all, the shorter is the median. One alone has no peer.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from consilium.errors import WireError
from consilium.tensors import Tensors

ABSURD = 1e8  # no trained parameter, control or statistic of features is as large
FEWEST = 3  # of fewer, no majority could say who is out of proportion
T = TypeVar("T")


class Step(NamedTuple):
    """How far a site has moved in a round."""

    site: str
    length: float  # of the update, as a step from what the site was sent
    images: int  # it trained on, at least one
    start: float  # length of what it was sent


def lengths_of(tensors: Tensors, start: Tensors) -> tuple[float, float] | None:
    """Euclidean lengths of tensors - start, and of start, over the floating tensors that both have in one shape; None
    where there are none, as with statistics of features."""
    names = [n for n, v in tensors.items() if n in start and v.is_floating_point() and v.shape == start[n].shape]
    steps, held = (tensors[name] - start[name] for name in names), (start[name] for name in names)
    return (_length(steps), _length(held)) if names else None


def _length(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in tensors))


def check_size(site: str, tensors: Tensors) -> None:
    """WireError where a number is larger than any model's."""
    sizes = {n: float(v.abs().max()) for n, v in tensors.items() if v.is_floating_point() and v.numel()}
    if absurd := sorted(name for name, size in sizes.items() if size > ABSURD):
        what, received = f"the update of {site} is absurdly large", f"{sizes[absurd[0]]:.2g} in {absurd[0]}"
        remedy = "look at the site's training; train.refuse_longer and strategy.refuse_updates set closer bounds"
        raise WireError(what, allowed=f"numbers up to {ABSURD:g}", received=received, remedy=remedy)


def check_length(site: str, length: float, largest: float | None) -> None:
    """WireError where an update is longer than the strategy lets it be, whatever its peers are."""
    if largest is not None and length > largest:
        remedy = "look at the site's training, or raise strategy.refuse_updates"
        what, received = f"the update of {site} is too long", f"{length:.4g}"
        raise WireError(what, allowed=f"up to {largest:g}", received=received, remedy=remedy)


@dataclass
class Peers:
    """The accepted updates of a round. `limit`: see `train.refuse_longer`; 0: none is refused."""

    limit: float
    _lengths: list[float] = field(default_factory=list)  # both sorted
    _rates: list[float] = field(default_factory=list)  # lengths per image

    def judge(self, steps: Sequence[Step]) -> list[str | None]:
        """Of each of these together: why it is refused, or None; it is then a peer of those that follow."""
        for step in steps:
            insort(self._lengths, step.length)
            insort(self._rates, step.length / step.images)
        middle, rate = (values[(len(values) - 1) // 2] for values in (self._lengths, self._rates))
        return [self._without(step, middle) if self._out(step, middle, rate) else None for step in steps]

    def _out(self, step: Step, middle: float, rate: float) -> bool:
        if not (self.limit and middle and rate):  # where most stand still, there is no measure
            return False
        bound = max(self.limit * middle, step.start)
        return step.length > bound and step.length / step.images > self.limit * rate

    def _without(self, step: Step, middle: float) -> str:
        for values, value in ((self._lengths, step.length), (self._rates, step.length / step.images)):
            del values[bisect_left(values, value)]
        allowed = f"up to {max(self.limit * middle, step.start):.4g}, where the median of this round is {middle:.4g}"
        remedy = (
            "look at the site's training; strategy.clip_updates or a robust aggregate limits what one site can do, "
            f"train.refuse_longer is the bound: {self.limit:g} times the median"
        )
        what, received = f"the update of {step.site} is too long beside those of its peers", f"{step.length:.4g}"
        return str(WireError(what, allowed=allowed, received=received, remedy=remedy))


@dataclass
class Queue(Generic[T]):
    """A round's answers, each handed on as soon as it is judged, in the order in which they are put."""

    peers: Peers
    _held: list[tuple[T, Step | None]] = field(default_factory=list)
    _fewest: int = FEWEST

    def put(self, answer: T, step: Step | None) -> Iterator[tuple[T, str | None]]:
        """What can be handed on now, and why it is refused. None: there is nothing to measure of this answer."""
        self._held.append((answer, step))
        measured = sum(each is not None for _, each in self._held)
        if not measured or measured >= self._fewest:
            self._fewest = 1 if measured else self._fewest
            yield from self.rest()

    def rest(self) -> Iterator[tuple[T, str | None]]:
        """What is held yet, judged by what there is."""
        steps = [step for _, step in self._held if step is not None]
        reasons = iter(self.peers.judge(steps) if steps else ())
        judged = deque((answer, None if step is None else next(reasons)) for answer, step in self._held)
        self._held.clear()
        while judged:  # nothing that was handed on is kept
            yield judged.popleft()
