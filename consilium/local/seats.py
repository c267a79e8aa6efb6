"""Stage 4, local training of several sites at once. In: the work of each site, as a function. Out: what it gives.

Every site has a thread of its own, in which its side of a round runs as if it were alone. Only one of them runs at a
time, in the order of their names, until it needs the model's outputs or their gradient; there it waits. When all wait,
what fits together goes through the model as one batch, the sites' own tensors stacked along a first axis; then they go
on. So strategies, objectives and optimisers know nothing of it, and the order of all that is done is fixed.

A site that ends early, or fails, is not waited for any more. A thread that serves waits only for the one site that it
has just let go, so nothing can wait for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor

from consilium.errors import ConfigError
from consilium.local.predict import autocast
from consilium.protocols import Model
from consilium.tensors import Tensors

Result = TypeVar("Result")
Answer = Tensor | BaseException | None


class _Stop(BaseException):
    """Unwinds the thread of a site that nobody will let go any more; no `except Exception` holds it up."""


@dataclass(frozen=True)
class _Forward:
    variables: Tensors
    images: Tensor
    depth: int
    fits: Hashable  # forward passes of equal values can be one; None: this one cannot be joined


@dataclass(frozen=True)
class _Backward:
    loss: Tensor


@dataclass(frozen=True)
class _End(Generic[Result]):
    result: Callable[[], Result]  # raises what the work let out


@dataclass
class Table:
    """What the seats of a group share: the model and how training calls it. `open`: whether gradients may flow now."""

    model: Model
    device: str
    precision: str
    open: bool = False

    def forward(self, wishes: Sequence[_Forward]) -> Sequence[Tensor]:
        """Outputs [B, C] of each."""
        stacked = {name: torch.stack([wish.variables[name] for wish in wishes]) for name in wishes[0].variables}
        with autocast(self.device, self.precision):
            outputs = self.model.forward(stacked, torch.cat([wish.images for wish in wishes]), wishes[0].depth)
        if outputs.requires_grad:
            outputs.register_hook(self._require_open)  # type: ignore[no-untyped-call]
        return outputs.chunk(len(wishes))

    def backward(self, wishes: Sequence[_Backward]) -> Sequence[None]:
        """Add the gradient of each loss to the tensors of its site."""
        self.open = True
        try:
            torch.autograd.backward([wish.loss for wish in wishes])
        finally:
            self.open = False
        return [None for _ in wishes]

    def _require_open(self, gradient: Tensor) -> None:  # noqa: ARG002
        if not self.open:
            raise ConfigError(
                "the strategy differentiates within its objective, through what several sites share",
                where="engine.stacked_sites",
                allowed=1,
                remedy="set engine.stacked_sites = 1",
            )


@dataclass
class Seat:
    """Where one site waits for the others. `idle`: seconds it has waited, without its share of the common work."""

    table: Table
    idle: float = 0.0
    watching: int = 0
    answers: SimpleQueue[Answer] = field(default_factory=SimpleQueue)
    wishes: SimpleQueue[Any] = field(default_factory=SimpleQueue)

    def forward(self, variables: Tensors, images: Tensor, depth: int = 0) -> Tensor:
        """The model's outputs [B, C], as by `Model.forward`."""
        wish = _Forward(variables, images, depth, self._fits(variables, images, depth))
        found = None if self.watching else self._ask(wish)
        return self.table.model.forward(variables, images, depth) if found is None else found

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this site's loss to its tensors."""
        self._ask(_Backward(loss))

    @contextmanager
    def alone(self, watch: AbstractContextManager[Tensors]) -> Iterator[Tensors]:
        """A `Model.watch`, while which this site computes everything by itself, and nobody else anything."""
        self.watching += 1
        try:
            with watch as seen:
                yield seen
        finally:
            self.watching -= 1

    def _fits(self, variables: Tensors, images: Tensor, depth: int) -> Hashable:
        """Names, shapes and types, where this thread is set as for training and the names are all that tuners and head
        train: what has frozen weights beside them, or lacks some, cannot be stacked."""
        mixed = torch.is_autocast_enabled(torch.device(self.table.device).type)
        usual = torch.is_grad_enabled() and mixed == (self.table.precision != "float32")
        if not usual or variables.keys() != self.table.model.specs.keys():
            return None
        each = ((name, tuple(value.shape), value.dtype) for name, value in sorted(variables.items()))
        return (*each, tuple(images.shape), images.dtype, depth)

    def _ask(self, wish: _Forward | _Backward) -> Tensor | None:
        started = perf_counter()
        self.wishes.put(wish)
        answer = self.answers.get()
        self.idle += perf_counter() - started
        if isinstance(answer, BaseException):
            raise answer
        return answer


def together(works: Mapping[str, Callable[[Seat], Result]], table: Table) -> dict[str, Result]:
    """Do the work of every site, each with a seat; raises the first error that a work lets out, when all have ended."""
    seats = {site: Seat(table) for site in sorted(works)}
    threads = {site: _thread(works[site], seat, torch.get_num_threads()) for site, seat in seats.items()}
    with torch.random.fork_rng():  # sites seed torch's global generator in turns
        try:
            return _conduct(seats, threads)
        finally:  # after an interrupt too, no thread may go on and write under the feet of whoever resumes
            for site, thread in threads.items():
                seats[site].answers.put(_Stop())
                if thread.ident is not None:
                    thread.join()


def _conduct(seats: Mapping[str, Seat], threads: Mapping[str, Thread]) -> dict[str, Any]:
    ended: dict[str, _End[Any]] = {}
    waiting: dict[str, _Forward | _Backward] = {}

    def until_it_waits(site: str) -> None:
        wish = seats[site].wishes.get()
        (ended if isinstance(wish, _End) else waiting)[site] = wish

    for site, thread in threads.items():
        thread.start()
        until_it_waits(site)
    while waiting:
        for sites in _sets(waiting):
            answers = _serve([waiting.pop(site) for site in sites], [seats[site] for site in sites])
            for site, answer in zip(sites, answers, strict=True):
                seats[site].answers.put(answer)
                until_it_waits(site)
    return {site: ended[site].result() for site in seats}


def _thread(work: Callable[[Seat], Result], seat: Seat, number: int) -> Thread:
    def body() -> None:
        torch.set_num_threads(number)
        try:
            result = work(seat)
            seat.wishes.put(_End(lambda: result))
        except BaseException as error:
            seat.wishes.put(_End(partial(_raise, error)))

    return Thread(target=body, daemon=True)


def _raise(error: BaseException) -> NoReturn:
    raise error


def _sets(waiting: Mapping[str, _Forward | _Backward]) -> list[list[str]]:
    """Who is answered now, and who of them together: those who want outputs or, where none does, all who want a
    gradient. By then each site of a joint forward pass has its loss, or will never have one."""
    sets: dict[Hashable, list[str]] = {}
    for site, wish in sorted(waiting.items()):
        if isinstance(wish, _Forward):
            sets.setdefault(site if wish.fits is None else wish.fits, []).append(site)
    return list(sets.values()) or [sorted(waiting)]


def _serve(wishes: Sequence[Any], seats: Sequence[Seat]) -> Sequence[Answer]:
    """An answer for each of those who are answered together; None for who is alone and computes its outputs itself."""
    started, table = perf_counter(), seats[0].table
    if len(wishes) == 1 and isinstance(wishes[0], _Forward):
        return [None]
    try:
        return table.forward(wishes) if isinstance(wishes[0], _Forward) else table.backward(wishes)
    except Exception as error:
        return [error] * len(wishes)
    finally:
        for seat in seats:
            seat.idle -= (perf_counter() - started) / len(seats)
