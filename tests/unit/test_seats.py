"""Sites that take turns: who waits for whom, what is joined, what a failing site does to others, and that it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium.errors import ConfigError
from consilium.local import seats
from consilium.local.seats import Seat, Table, together
from consilium.protocols import Spec, Tag

LIMIT = 60  # seconds after which a group that waits for itself fails its test
SPECS = {"w": Spec((3,), Tag("w", "weight"))}


@dataclass
class Product:
    """x . w for one site, [B, 3] and [3], or for several, [S * B, 3] and [S, 3]; notes how it was called."""

    specs: Mapping[str, Spec] = field(default_factory=lambda: SPECS)
    calls: list[tuple[int, ...]] = field(default_factory=list)

    def forward(self, variables: Mapping[str, Tensor], images: Tensor, depth: int = 0) -> Tensor:  # noqa: ARG002
        weight = variables["w"]
        self.calls.append(tuple(weight.shape[:-1]))
        if not torch.isfinite(images).all() and weight.ndim == 2:
            raise ValueError("the joint pass broke")
        rows = weight if weight.ndim == 1 else weight.repeat_interleave(len(images) // len(weight), 0)
        return (images * rows).sum(-1, keepdim=True)

    def watch(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        return nullcontext({})


def _together(works: Mapping[str, Callable[[Seat], Any]], model: Product | None = None) -> dict[str, Any]:
    """In a thread of its own, so that a group that hangs is a failure and not the end of the tests."""
    table = Table(model or Product(), "cpu", "float32")  # type: ignore[arg-type]
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(together, works, table).result(timeout=LIMIT)
    finally:
        pool.shutdown(wait=False)


def _descends(start: float, steps: int, images: Tensor | None = None) -> Callable[[Seat], list[float]]:
    """Plain gradient steps on (x . w)^2."""

    def work(seat: Seat) -> list[float]:
        weight, x = torch.full((3,), float(start), requires_grad=True), torch.ones(2, 3) if images is None else images
        for _ in range(steps):
            seat.backward(seat.forward({"w": weight}, x).square().mean())
            with torch.no_grad():
                weight -= 0.05 * weight.grad
            weight.grad = None
        return weight.tolist()

    return work


def _alone(work: Callable[[Seat], Any]) -> Any:
    return _together({"only": work})["only"]


def test_sites_with_different_numbers_of_steps_do_what_each_does_alone() -> None:
    works = {"c": _descends(3, 1), "a": _descends(1, 4), "b": _descends(2, 0)}
    model = Product()
    found = _together(works, model)
    assert found == {name: _alone(work) for name, work in works.items()}
    assert list(found) == ["a", "b", "c"]
    assert model.calls == [(2,), (), (), ()]  # a and c once together; a goes on alone


def test_what_does_not_fit_goes_alone_and_what_fits_goes_together() -> None:
    sizes = {"a": 2, "b": 1, "c": 2, "d": 3, "e": 1}
    works = {site: _descends(1, 1, torch.ones(size, 3)) for site, size in sizes.items()}
    model = Product()
    _together(works, model)
    assert sorted(model.calls) == [(), (2,), (2,)]


def test_one_that_asks_twice_before_it_needs_a_gradient_holds_the_gradients_back() -> None:
    def twice(seat: Seat) -> list[float]:
        weight = torch.ones(3, requires_grad=True)
        x = torch.ones(2, 3)
        total = sum(seat.forward({"w": weight}, x).square().mean() for _ in range(2))
        seat.backward(total)
        return weight.grad.tolist()

    assert _together({"a": _descends(1, 2), "b": twice}) == {"a": _alone(_descends(1, 2)), "b": _alone(twice)}


def test_only_one_runs_at_a_time_and_always_in_the_same_order() -> None:
    told: list[str] = []

    def work(name: str) -> Callable[[Seat], None]:
        def body(seat: Seat) -> None:
            for number in range(2):
                told.append(f"{name}{number}")
                seat.backward(seat.forward({"w": torch.ones(3, requires_grad=True)}, torch.ones(1, 3)).sum())

        return body

    _together({name: work(name) for name in "cab"})
    assert told == ["a0", "b0", "c0", "a1", "b1", "c1"]


def test_an_error_of_one_site_is_told_when_the_others_have_done_their_work() -> None:
    done: list[str] = []

    def fails(seat: Seat) -> None:
        seat.forward({"w": torch.ones(3, requires_grad=True)}, torch.ones(2, 3))
        raise OSError("the disk is on fire")

    def works(seat: Seat) -> None:
        assert _descends(1, 3)(seat) == _alone(_descends(1, 3))
        done.append("works")

    with pytest.raises(OSError, match="on fire"):
        _together({"a": fails, "b": works})
    assert done == ["works"]


def test_an_error_of_the_joint_pass_reaches_all_who_took_part_and_nobody_else() -> None:
    def tries(seat: Seat) -> str:
        try:
            seat.forward({"w": torch.ones(3, requires_grad=True)}, torch.full((2, 3), torch.nan))
        except ValueError as error:
            return str(error)
        return "no error"

    other = _descends(1, 2, torch.ones(3, 3))
    found = _together({"a": tries, "b": tries, "c": other})
    assert found == {"a": "the joint pass broke", "b": "the joint pass broke", "c": _alone(other)}


def test_a_loss_that_is_not_finite_stays_with_its_site() -> None:
    def broken(seat: Seat) -> bool:
        weight = torch.ones(3, requires_grad=True)
        seat.backward(seat.forward({"w": weight}, torch.ones(2, 3)).mean() * torch.nan)
        return bool(weight.grad.isnan().all())

    assert _together({"a": _descends(1, 3), "b": broken}) == {"a": _alone(_descends(1, 3)), "b": True}


def test_what_is_no_training_step_of_the_whole_model_is_computed_by_the_site_itself() -> None:
    ways: Mapping[str, Callable[[Seat], Tensor]] = {
        "without gradients": lambda seat: torch.no_grad()(seat.forward)({"w": torch.ones(3)}, torch.ones(1, 3)),
        "a frozen weight too": lambda seat: seat.forward({"w": torch.ones(3), "base": torch.ones(1)}, torch.ones(1, 3)),
        "too few names": lambda seat: seat.forward({}, torch.ones(1, 3)),
    }

    @dataclass
    class Lenient(Product):
        def forward(self, variables: Mapping[str, Tensor], images: Tensor, depth: int = 0) -> Tensor:
            return super().forward({"w": torch.ones(3), **variables}, images, depth)

    for way in ways.values():
        model = Lenient()
        _together({"a": way, "b": way}, model)
        assert model.calls == [(), ()]


def test_nobody_else_computes_while_a_site_watches_the_model() -> None:
    def watches(seat: Seat) -> None:
        with seat.alone(Product().watch()):
            told.append("open")
            seat.forward({"w": torch.ones(3, requires_grad=True)}, torch.ones(1, 3))
            told.append("closed")

    told: list[str] = []
    _together({"a": watches, "b": watches})
    assert told == ["open", "closed"] * 2


def test_who_differentiates_by_himself_through_what_is_shared_is_told_what_to_do() -> None:
    def differentiates(seat: Seat) -> None:
        weight = torch.ones(3, requires_grad=True)
        torch.autograd.grad(seat.forward({"w": weight}, torch.ones(2, 3)).sum(), weight)

    assert _alone(differentiates) is None
    with pytest.raises(ConfigError, match=r"engine\.stacked_sites"):
        _together({"a": differentiates, "b": differentiates})


def test_after_an_interrupt_no_thread_goes_on() -> None:
    told: list[str] = []

    @dataclass
    class Interrupted(Product):
        def forward(self, variables: Mapping[str, Tensor], images: Tensor, depth: int = 0) -> Tensor:  # noqa: ARG002
            raise KeyboardInterrupt

    def work(seat: Seat) -> None:
        try:
            seat.forward({"w": torch.ones(3, requires_grad=True)}, torch.ones(2, 3))
            told.append("went on")
        except Exception:
            told.append("took it for an error of its own")

    with pytest.raises(KeyboardInterrupt):
        _together({"a": work, "b": work}, Interrupted())
    assert told == []


def test_the_time_of_common_work_is_shared_and_waiting_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(seats, "perf_counter", lambda: clock[0])

    @dataclass
    class Slow(Product):
        def forward(self, variables: Mapping[str, Tensor], images: Tensor, depth: int = 0) -> Tensor:
            clock[0] += 4
            return super().forward(variables, images, depth)

    def work(own: float) -> Callable[[Seat], float]:
        def body(seat: Seat) -> float:
            started = clock[0]
            clock[0] += own
            seat.backward(seat.forward({"w": torch.ones(3, requires_grad=True)}, torch.ones(1, 3)).sum())
            clock[0] += own
            return clock[0] - started - seat.idle

        return body

    assert _together({"a": work(10), "b": work(3)}, Slow()) == {"a": 22, "b": 8}


def test_the_global_generator_is_left_as_it_was() -> None:
    def seeds_it(seat: Seat) -> None:
        torch.manual_seed(7)
        _descends(1, 1)(seat)

    torch.manual_seed(1)
    _together({"a": seeds_it, "b": seeds_it})
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
